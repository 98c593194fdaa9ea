"""Where and with what a figure was measured, rows kept on disk as they come, and targets."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import json
import math
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
RESULTS = ROOT / "bench" / "results"
ABSOLUTE = re.compile(r"(?<![^\s\"'=,:(\[])/[\w.+@~-]+(?:/[\w.+@~-]+)*")
OURS = "clusterns"


# --- files -------------------------------------------------------------------------------------------------


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
    """`write` of a JSON document, which has no NaN: null in its place."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write(path, json.dumps(plain(content), indent=1) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict], head: str = "") -> None:
    """`write` of a table below a line; what a row lacks is empty, what has no column is left out."""
    text = io.StringIO(head)
    text.seek(0, io.SEEK_END)
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


# --- origin ------------------------------------------------------------------------------------------------


def machine() -> dict[str, object]:
    """Processor, GPU, versions, commit, date and command."""
    found: dict[str, object] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "transformers", "sentence-transformers")},
        "commit": _commit(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": "none",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def output(*command: str, folder: Path = ROOT) -> str:
    """First line a command prints, "unknown" where it cannot run."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _commit() -> str:
    """What CLUSTERNS_COMMIT says (a copy of the tree has no .git), else `git describe`."""
    found = os.environ.get("CLUSTERNS_COMMIT") or output("git", "describe", "--always", "--dirty")
    if found == "unknown":
        print("commit: unknown, since there is no git here and CLUSTERNS_COMMIT is not set", file=sys.stderr)
    return found


def _command() -> str:
    """How this process was started, without the paths of this machine."""
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return interpreted + shlex.join(["python", *map(without_paths, sys.argv)])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores"


def short(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


# --- rows --------------------------------------------------------------------------------------------------

MEANING = {
    "device_us": "device time per call, launched eagerly; median of blocks of calls between two events",
    "graph_us": "the same as replays of a CUDA graph",
    "peak_mib": "peak memory of one call above inputs and their gradients",
    "ratio_device, ratio_graph": "theirs over ours, median over blocks taken in turn",
    "dominant, ratio_balanced": "share of one cluster in the batch; its time over that without one",
    "_p20, _p80, _fastest": "percentiles over the rounds; the fastest of theirs over the fastest of ours",
    "loss_error, gradient_error, centroid_error": "relative, against float64",
    "tflops": "6·B²·D operations over device_us",
    "rate_fraction": "tflops over the rate of a matrix product, measured on the same device in the same run",
}
# Of our step at B=512, D=768, K=128 on a GPU: theirs over ours at least, and microseconds at most.
TARGETS = [
    ("published", "ratio_device", 20), ("eager", "ratio_device", 5), ("eager", "ratio_graph", 5),
    ("torch.compile", "ratio_device", 2), ("torch.compile", "ratio_graph", 2), (OURS, "graph_us", 60),
]  # fmt: skip


class Results:
    """Rows and skips as JSON, rewritten after each."""

    def __init__(self, folder: Path, found: dict[str, object], name: str, *, on_gpu: bool):
        self.on_gpu, self.machine = on_gpu, found
        # No file of a CPU run looks like GPU figures.
        self.path = folder / f"{'gpu' if on_gpu else 'cpu'}{'-' * bool(name)}{name}.json"
        self.rows: list[dict] = []
        self.skipped: list[str] = []

    def add(self, row: dict) -> None:
        """Keep a row, or one that is there and has grown; print it, write everything."""
        print(line(row), flush=True)
        if not any(row is each for each in self.rows):
            self.rows.append(row)
        self.write()

    def skip(self, names: Iterable[str], reason: str) -> None:
        """Name what was not measured."""
        self.skipped += [f"{name}: {reason}" for name in names]
        self.write()

    def write(self) -> None:
        """The file, which is complete at any time."""
        content = {
            "note": "" if self.on_gpu else "CPU figures: not GPU figures",
            "machine": self.machine,
            "meaning": MEANING,
            "rows": self.rows,
            "skipped": self.skipped,
        }
        write_json(self.path, content)

    def find(self, contender: str, **columns: object) -> dict:
        """First measured row of a contender with these columns; empty if there is none."""
        wanted = {"contender": contender, "status": "ok", **columns}
        return next((row for row in self.rows if wanted.items() <= row.items()), {})

    def ours_are_right(self) -> bool:
        """Whether all of our own rows were measured."""
        ours = [row for row in self.rows if row["contender"].lower().startswith(OURS)]
        return bool(ours) and all(row["status"] in ("ok", "left out") for row in ours)

    def summary(self) -> None:
        """What was not measured, why, and the targets; the rows have been printed as they came."""
        others = [row for row in self.rows if row["status"] != "ok"]
        absent = {row["contender"] for row in others if row["status"] == "not installed"}
        print(f"\n== {len(self.rows) - len(others)} rows measured")
        for row in others:
            if row["status"] not in ("not installed", "left out"):
                print(line(row))
        print(f"not installed: {', '.join(sorted(absent)) or 'none'}")
        print(f"skipped: {len(self.skipped)}", *self.skipped[:20], sep="\n  ")
        for name in ("gpu", "torch", "commit", "matrix rate"):
            print(f"{name}: {self.machine.get(name)}")
        for dtype, (name, column, limit) in itertools.product(("bfloat16", "float32"), TARGETS):
            row = self.find(name, kind="step", B=512, D=768, K=128, dtype=dtype, precision="highest")
            if self.on_gpu and row:
                print(f"{dtype} {name} {column}: {row.get(column)}, the target is {limit}")
        print(f"written to {self.path}", flush=True)


def line(row: dict) -> str:
    """A row in one line: what it is of, its status, and whatever figures it has, by their columns' names."""
    shape = f"{row['kind']:9} B={row['B']} D={row['D']} K={row['K']} {row['dtype']}"
    if row["dtype"] == "float32" and row["precision"] != "highest":
        shape += f" {row['precision']}"
    text = f"{row['contender']:29} {shape:46}" + f" {row['status']}" * (row["status"] != "ok")
    for name, value in row.items():
        is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_figure and name not in ("B", "D", "K") and not name.endswith(("us_p20", "us_p80")):
            text += f"  {name} {value:{',.1f' if abs(value) >= 1000 else '.4g'}}"
    return " ".join([text, *(row[name] for name in ("graph_note", "note") if row.get(name))])
