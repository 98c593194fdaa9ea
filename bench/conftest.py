"""Ratios beside the times: every group's contenders against ours, printed and written as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from machine import machine, write_json

HERE = Path(__file__).parent
OURS = "clusterns"


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
    """After pytest-benchmark's own table: the ratios, and bench/results/cpu.json.

    A part of the benchmarks (-k, single files) is written nowhere: it is not to take the place of them all.
    """
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, dict]] = {}
    for bench in session.benchmarks if session else []:
        if bench.stats.rounds:
            row = {"median_ms": bench.stats.median * 1e3, "rounds": bench.stats.rounds, **bench.extra_info}
            groups.setdefault(bench.group, {})[bench.params["contender"]] = row
    for name, rows in groups.items():
        ours = rows.get(OURS)
        terminalreporter.section(name)
        for contender, row in sorted(rows.items(), key=lambda item: item[1]["median_ms"]):
            if ours and "peak_mib" in row:
                row["memory_ratio"] = row["peak_mib"] / ours["peak_mib"]
            columns = [f"{contender:24} {row['median_ms']:10.2f} ms"]
            columns += [f"loss {row['loss']:.6f}"] if "loss" in row else []
            columns += [f"{row['time_ratio']:8.2f}x time"] if "time_ratio" in row else []
            columns += [f"{row['peak_mib']:8.0f} MiB peak"] if "peak_mib" in row else []
            columns += [f"{row['memory_ratio']:6.2f}x memory"] if "memory_ratio" in row else []
            terminalreporter.write_line("  ".join(columns))
    in_part = config.option.keyword or [Path(argument).resolve() for argument in config.args] != [HERE]
    if groups and not in_part:
        file = HERE / "results" / "cpu.json"
        write_json(file, {"machine": machine() | {"command": "make bench"}, "groups": groups})
        terminalreporter.write_line(f"\nwritten to {file}")
