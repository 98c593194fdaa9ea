"""Where and with what a figure was measured, and how it is written down."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from clusterns.files import replacing

ROOT = Path(__file__).resolve().parents[1]
ABSOLUTE = re.compile(r"(?<![^\s\"'=,:(\[])/[\w.+@~-]+(?:/[\w.+@~-]+)*")


def without_paths(text: str) -> str:
    """The text with paths relative to the repository where they lie in or beside it, else their last name."""

    def shown(found: re.Match[str]) -> str:
        path = Path(found[0])
        near = ROOT.parent.name and path.is_relative_to(ROOT.parent)
        return os.path.relpath(path, ROOT) if near else path.name

    return ABSOLUTE.sub(shown, text)


def write(path: Path, text: str) -> None:
    """A result, whole or not at all, without the paths of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(without_paths(text), encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """`write` of a JSON document."""
    write(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict], head: str = "") -> None:
    """`write` of a table below a line; what a row lacks is empty, what has no column is left out."""
    text = io.StringIO(head)
    text.seek(0, io.SEEK_END)
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def machine(gpu: bool = False) -> dict[str, object]:
    """Processor, versions, commit and command; with `gpu` also the GPU and its driver."""
    found: dict[str, object] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": command(),
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
    """What CLUSTERNS_COMMIT says (a copy of the tree has no .git), else `git describe`."""
    found = os.environ.get("CLUSTERNS_COMMIT") or output("git", "describe", "--always", "--dirty")
    if found == "unknown":
        print("commit: unknown, since there is no git here and CLUSTERNS_COMMIT is not set", file=sys.stderr)
    return found


def command() -> str:
    """How this process was started, without the paths of this machine."""
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return interpreted + shlex.join(["python", *map(without_paths, sys.argv)])


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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores"
