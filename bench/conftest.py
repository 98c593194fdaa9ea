"""Ratios beside the times: every group's contenders against ours, printed and written as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
OURS = "clusterns"


def machine() -> dict[str, object]:
    """Where and with what a figure was measured."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": revision.stdout.strip() or "unknown",
        "command": "make bench",
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores"


@pytest.fixture
def peak_memory():
    """Measure a contender's peak memory in a process of its own, in MiB above inputs and gradients."""

    def measure(contender: str, batch: int, dim: int, clusters: int) -> float:
        command = [
            sys.executable,
            str(HERE / "memory_worker.py"),
            contender,
            *map(str, (batch, dim, clusters)),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(json.loads(output)["peak_mib"])

    return measure


def pytest_terminal_summary(terminalreporter, config):
    """After pytest-benchmark's own table: the ratios, and bench/results/cpu.json."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, dict]] = {}
    for bench in session.benchmarks if session else []:
        if bench.stats.rounds:
            row = {"median_ms": bench.stats.median * 1e3, "rounds": bench.stats.rounds, **bench.extra_info}
            groups.setdefault(bench.group, {})[bench.params["contender"]] = row
    if not groups:
        return
    for name, rows in groups.items():
        ours = rows.get(OURS)
        terminalreporter.section(name)
        for contender, row in sorted(rows.items(), key=lambda item: item[1]["median_ms"]):
            if ours and "peak_mib" in row:
                row["memory_ratio"] = row["peak_mib"] / ours["peak_mib"]
            columns = [f"{contender:24} {row['median_ms']:10.2f} ms  loss {row['loss']:.6f}"]
            columns += [f"{row['time_ratio']:8.2f}x time"] if "time_ratio" in row else []
            columns += [f"{row['peak_mib']:8.0f} MiB peak"] if "peak_mib" in row else []
            columns += [f"{row['memory_ratio']:6.2f}x memory"] if "memory_ratio" in row else []
            terminalreporter.write_line("  ".join(columns))
    results = HERE / "results" / "cpu.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps({"machine": machine(), "groups": groups}, indent=1) + "\n")
    terminalreporter.write_line(f"\nwritten to {results.relative_to(HERE.parent)}")
