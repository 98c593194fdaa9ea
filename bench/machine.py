"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def machine(gpu: bool = False) -> dict[str, object]:
    """Processor, versions and commit; with `gpu` also the GPU, its driver, and what else matters there."""
    found: dict[str, object] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": "make bench",
    }
    if gpu:
        found |= {name: version(name) for name in ("triton", "transformers", "sentence-transformers")}
        found["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        found["gpu"] = "none"
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": properties.name,
                "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
                "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            }
    return found


def commit() -> str:
    """`git describe`; without git what CLUSTERNS_COMMIT or a file COMMIT says."""
    described = output("git", "describe", "--always", "--dirty")
    if described == "unknown" and os.environ.get("CLUSTERNS_COMMIT"):
        described = os.environ["CLUSTERNS_COMMIT"]
    if described == "unknown" and (ROOT / "COMMIT").is_file():
        described = (ROOT / "COMMIT").read_text().strip()
    return described


def output(*command: str) -> str:
    """First line a command prints, "unknown" where it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def version(package: str) -> str:
    """Installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores"
