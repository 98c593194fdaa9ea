"""Where and with what a figure was measured, rows kept on disk as they come, targets, tables and pictures."""

from __future__ import annotations

import csv
import datetime
import io
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


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    """A figure and its grid of axes, for a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def save_figure(figure, path: Path) -> None:
    """A figure, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


# --- origin ------------------------------------------------------------------------------------------------


def machine() -> dict[str, object]:
    """Processor, GPU, versions, commit, date and command."""
    found: dict[str, object] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "transformers", "sentence-transformers")},
        "commit": _commit(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": "none",
    }
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


def version(package: str) -> str:
    """Installed version of a package."""
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


def arithmetic(workspace: int = 2**28, dim: int = 768, clusters: int = 128) -> str:
    """Floor of time and memory of a large batch, from sizes alone."""
    lines = [f"ARITHMETIC, NOT MEASURED: bf16, D={dim}, K={clusters}; 6·B²·D at 750 TFLOP/s, no chip's rate"]
    for batch, limit in [*((4096 * 2**each, workspace) for each in range(7)), (2**20, 8 * workspace)]:
        row_bytes = 28 * dim + 2 * batch + 4 * clusters + 4 * (batch // 128)
        rows = min(batch, max(1, limit // row_bytes))
        rows -= rows % 128 if rows > 128 else 0
        above = (rows * row_bytes + 4 * batch * dim) / 2**20  # a chunk, a float32 (B, D)
        milliseconds = 6e3 * batch**2 * dim / 750e12
        lines.append(f"B={batch:9,} {milliseconds:8.2f} ms, {rows:6,} rows a chunk, {above:5.0f} MiB more")
    return "\n".join(lines)


# --- rows --------------------------------------------------------------------------------------------------

MEANING = {
    "device_us": "device time per call, launched eagerly; median of blocks of calls between two events",
    "graph_us": "the same as replays of a CUDA graph",
    "host_us": "wall time per call, waiting for the device after each",
    "peak_mib": "peak memory of one call above inputs and their gradients",
    "ratio_device, ratio_graph, ratio_host": "theirs over ours, median over blocks taken in turn",
    "loss_error, gradient_error, centroid_error": "relative, against float64",
    "tflops": "6·B²·D operations (assignment: 2·B·K·D) over device_us",
    "rate_fraction": "tflops over the rate of a matrix product, measured on the same device in the same run",
    "adds_percent": "training step: longer than plain SimCSE's by this, median over steps taken in turn",
    "share": "of our training step",
    "wait_ms, first_batch_ms": "mean wait for a batch after the first, wait for the first",
    "processor_us_per_row": "of a whole epoch, workers' included",
    "_p20, _p80, _fastest": "percentiles over the rounds; the fastest of theirs over the fastest of ours",
}


class Results:
    """Rows and skips, rewritten after each: as JSON, or with `columns` as a table in CSV."""

    def __init__(
        self,
        folder: Path,
        found: dict[str, object],
        name: str,
        *,
        on_gpu: bool,
        columns: Sequence[str] = (),
    ):
        self.on_gpu, self.machine, self.columns = on_gpu, found, columns
        # No file of a CPU run looks like GPU figures.
        stem = f"{'gpu' if on_gpu else 'cpu'}{'-' * bool(name)}{name}.json"
        self.path = folder / (f"{name}.csv" if columns else stem)
        self.rows: list[dict] = []
        self.skipped: list[str] = []

    def add(self, row: dict) -> None:
        """Keep a row, print it, write everything."""
        print(line(row), flush=True)
        self.keep([row])

    def keep(self, rows: Iterable[dict]) -> None:
        """Keep rows, or those that are there and have grown, and write everything."""
        self.rows += [row for row in rows if not any(row is each for each in self.rows)]
        self.write()

    def skip(self, names: Iterable[str], reason: str) -> None:
        """Name what was not measured."""
        self.skipped += [f"{name}: {reason}" for name in names]
        self.write()

    def write(self) -> None:
        """The file, which is complete at any time."""
        if self.columns:
            write_csv(self.path, self.columns, [self.machine | row for row in self.rows])
            return
        content = {
            "note": "" if self.on_gpu else "CPU figures: not GPU figures",
            "machine": self.machine,
            "meaning": MEANING,
            "targets": self.targets(),
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

    def targets(self) -> list[dict]:
        """The targets on a GPU with what was measured; figure None where nothing was."""
        found = []

        def check(name: str, figure: float | None, sign: str, limit: float) -> None:
            reached = figure is not None and (figure <= limit if sign == "<=" else figure >= limit)
            verdict = "not measured" if figure is None else "reached" if reached else "MISSED"
            found.append({"target": name, "limit": f"{sign} {limit}", "figure": figure, "verdict": verdict})

        for dtype in ("bfloat16", "float32"):
            shape = {"kind": "step", "what": "both", "B": 512, "D": 768, "K": 128, "precision": "highest"}
            for name, column, limit in (
                ("published", "ratio_device", 20), ("eager", "ratio_device", 5), ("eager", "ratio_graph", 5),
                ("torch.compile", "ratio_device", 2), ("torch.compile", "ratio_graph", 2),
            ):  # fmt: skip
                way = "as graphs" if column == "ratio_graph" else "launched"
                row = self.find(name, dtype=dtype, **shape)
                check(f"{dtype}: {name} over ours, {way}", row.get(column), ">=", limit)
            ours = self.find(OURS, dtype=dtype, **shape)
            check(f"{dtype}: our step as a graph, microseconds", ours.get("graph_us"), "<=", 60)
        added = self.find("ClusterNS", kind="training", B=256, D=768).get("adds_percent")
        check("BERT-base step: ClusterNS adds, % of plain SimCSE's", added, "<=", 2)
        return found if self.on_gpu else []

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
        for what, most in (("forward", 4), ("backward", 2)) if self.on_gpu else ():
            row = self.find(OURS, kind="step", what=what)
            print(f"launches of our step (expected at most {most}): {row.get('kernels') or 'not counted'}")
        for name in ("gpu", "torch", "commit", "matrix rate"):
            print(f"{name}: {self.machine.get(name)}")
        for each in self.targets():
            figure = "-" if each["figure"] is None else f"{each['figure']:.2f}"
            print(f"{each['target']:58} {each['limit']:>8} {figure:>10}  {each['verdict']}")
        print(f"written to {self.path}", flush=True)

    def draw(self) -> None:
        """Time, achieved rate and memory against B beside the rows, where a kind has several sizes."""
        try:
            device = self.machine["gpu" if self.on_gpu else "cpu"]
            title = "{}, torch {torch}, commit {commit}".format(device, **self.machine)
            draw(self.rows, self.path.with_suffix(".png"), title)
        except Exception as error:  # the figures are on disk; a picture less must not hide them
            print(f"no plot: {short(error)}")


def line(row: dict) -> str:
    """A row in one line: what it is of, its status, and whatever figures it has, by their columns' names."""
    shape = f"{row['kind']:8} {row['what']:8} B={row['B']} D={row['D']} K={row['K']} {row['dtype']}"
    if row["dtype"] == "float32" and row["precision"] != "highest":
        shape += f" {row['precision']}"
    text = f"{row['contender']:29} {shape:52}" + f" {row['status']}" * (row["status"] != "ok")
    for name, value in row.items():
        is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_figure and name not in ("B", "D", "K") and not name.endswith(("us_p20", "us_p80")):
            text += f"  {name} {value:{',.1f' if abs(value) >= 1000 else '.4g'}}"
    return " ".join([text, *(row[name] for name in ("graph_note", "note") if row.get(name))])


PANELS = {
    "device_us": "microseconds",
    "tflops": "TFLOP/s, counting 6·B²·D",
    "peak_mib": "peak MiB above inputs and gradients",
}


def draw(rows: list[dict], path: Path, title: str) -> None:
    """A column of panels for each kind and dtype with several B."""
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and row["what"] == "both" and row["precision"] == "highest":
            key = row["kind"], row["dtype"], row["D"], row["K"]
            kinds.setdefault(key, []).append(row)
    kinds = {key: own for key, own in kinds.items() if len({row["B"] for row in own}) > 1}
    panels = [name for name in PANELS if any(row.get(name) for own in kinds.values() for row in own)]
    if not panels:
        return
    names = list(dict.fromkeys(row["contender"] for own in kinds.values() for row in own))
    figure, axes = new_figure(len(panels), len(kinds), (5.2 * len(kinds), 4 * len(panels)))
    for (key, own), columns in zip(kinds.items(), axes.T, strict=True):
        for axis, panel in zip(columns, panels, strict=True):
            for index, name in enumerate(names):
                for column, style in ((panel, "-"), *[("graph_us", "--")] * (panel == "device_us")):
                    points = {
                        row["B"]: row[column] for row in own if row["contender"] == name and row.get(column)
                    }
                    if points:
                        label = name if column == panel else f"{name}, as a graph"
                        points = dict(sorted(points.items()))
                        axis.plot([*points], [*points.values()], f"C{index}o{style}", ms=4, label=label)
            axis.set(ylabel=PANELS[panel], yscale="linear" if panel == "tflops" else "log")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3, which="both")
            if axis.lines:
                axis.legend(fontsize=7)
        columns[0].set_title("{}, {}, D={}, K={}".format(*key), fontsize=9)
        columns[-1].set_xlabel("batch size B")
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)
