"""Rows of the GPU benchmark: kept on disk as they come, checked against the targets, printed last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from gpu_contenders import OURS
from machine import write_json

COLUMNS = """
contender kind what B D K dtype precision status note device_us device_us_p20 device_us_p80 graph_us
graph_us_p20 graph_us_p80 graph_note host_us host_us_p20 host_us_p80 peak_mib loss loss_error gradient_error
centroid_error graph_gradient_error ratio_device ratio_graph ratio_host ratio_memory kernels adds_percent
adds_percent_p20 adds_percent_p80 regime workspace_mib tflops rate_fraction floor_us
""".split()
MEANING = {
    "device_us": "device time per call, launched eagerly; median of blocks of calls between two events",
    "graph_us": "the same as replays of a CUDA graph",
    "host_us": "wall time per call, waiting for the device after each",
    "peak_mib": "peak memory of one call above inputs and their gradients",
    "ratio_device, ratio_graph, ratio_host": "theirs over ours, median over blocks taken in turn",
    "loss_error, gradient_error, centroid_error": "relative, against the float64 reference on the CPU or GPU",
    "tflops": "6·B²·D operations (assignment: 2·B·K·D) over device_us",
    "rate_fraction": "tflops over the rate of a matrix product, measured on the same card in the same run",
    "floor_us": "those operations at that rate",
    "adds_percent": "training step: longer than plain SimCSE's by this, median over steps taken in turn",
}
ON_TARGET = {"B": 512, "D": 768, "K": 128}


class Results:
    """Rows and skips, rewritten as JSON after each."""

    def __init__(self, folder: Path, machine: dict[str, object], *, on_gpu: bool, suffix: str = ""):
        self.folder, self.on_gpu = folder, on_gpu
        # No file of a CPU run looks like GPU figures.
        self.stem = ("gpu" if on_gpu else "cpu-machinery") + suffix
        self.machine = machine
        self.rows: list[dict] = []
        self.skipped: list[str] = []

    def add(self, row: dict) -> None:
        """Keep a row, print it, write everything."""
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"columns: expected some of COLUMNS, got {unknown}")
        self.rows.append(row)
        print(line(row), flush=True)
        self.write()

    def skip(self, names: Iterable[str], reason: str) -> None:
        """Name what was not measured."""
        self.skipped += [f"{name}: {reason}" for name in names]
        self.write()

    def draw(self, plot: Callable[[list[dict], Path, str], object]) -> None:
        """Plot the rows beside them."""
        title = f"{self.machine['gpu']}, torch {self.machine['torch']}, commit {self.machine['commit']}"
        try:
            title = title if self.on_gpu else f"CPU MACHINERY CHECK, {title}"
            plot(self.rows, self.folder / f"{self.stem}.png", title)
        except Exception as error:  # the figures are on disk; a picture less must not hide them
            print(f"no plot: {type(error).__name__}: {error}")

    def ours_are_right(self) -> bool:
        """Whether all of our own rows were measured."""
        ours = [row for row in self.rows if row["contender"] == OURS]
        return bool(ours) and all(row["status"] == "ok" for row in ours)

    def write(self) -> None:
        """The file, which is complete at any time."""
        content = {
            "note": "" if self.on_gpu else "CPU figures of the benchmark's machinery: not GPU figures",
            "machine": self.machine,
            "meaning": MEANING,
            "targets": self.targets() if self.stem == "gpu" else [],
            "rows": self.rows,
            "skipped": self.skipped,
        }
        write_json(self.folder / f"{self.stem}.json", plain(content))

    def find(self, contender: str, **columns) -> dict | None:
        """First measured row of a contender with these columns."""
        wanted = {"contender": contender, "status": "ok", **columns}
        return next((r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())), None)

    def targets(self) -> list[dict]:
        """The targets with what was measured; figure None where nothing was."""
        if not self.on_gpu:
            return []
        found = []
        for dtype in ("bfloat16", "float32"):
            shape = {**ON_TARGET, "kind": "step", "what": "both", "dtype": dtype, "precision": "highest"}

            def check(name, contender, column, limit, at_most=False, shape=shape, dtype=dtype):
                row = self.find(contender, **shape)
                found.append(target(f"{dtype}: {name}", row and row.get(column), limit, at_most))

            check("published over ours, launched", "published step", "ratio_device", 20)
            for mode, column in (("launched", "ratio_device"), ("as graphs", "ratio_graph")):
                check(f"best eager over ours, {mode}", "eager step", column, 5)
                check(f"torch.compile over ours, {mode}", "torch.compile", column, 2)
            check("our step as a graph, microseconds", OURS, "graph_us", 60, at_most=True)
        training = self.find("ClusterNS", kind="training")
        added = training and training.get("adds_percent")
        found.append(target("BERT-base step: ClusterNS adds, % of plain SimCSE's", added, 2, at_most=True))
        return found

    def summary(self) -> None:
        """Everything that matters in a short table, the targets last."""
        print(
            "\n== forward + backward: microseconds launched / as a graph / seen by the host; theirs over ours"
        )
        for row in self.rows:
            if row["status"] == "ok" and row["what"] in ("both", "whole"):
                print(line(row, short=True))
        others = [row for row in self.rows if row["status"] != "ok"]
        absent = {row["contender"] for row in others if row["status"] == "not installed"}
        print(f"\n== {len(self.rows) - len(others)} rows measured")
        for row in others:
            if row["status"] not in ("not installed", "left out"):
                print(line(row))
        for row in self.rows:
            if row["contender"] == OURS and row.get("graph_note") and self.on_gpu:
                print(f"no graph of ours: {line(row, short=True)}: {row['graph_note']}")
        print(f"not installed: {', '.join(sorted(absent)) or 'none'}")
        print(f"skipped: {len(self.skipped)}, named in {self.stem}.json")
        print("\n".join(f"  {each}" for each in self.skipped[:20]))
        for what, most in (("forward", 4), ("backward", 2)):
            row = self.find(OURS, kind="step", what=what) or {}
            print(f"launches of our step (expected at most {most}): {row.get('kernels') or 'not counted'}")
        print(f"\n== {self.machine.get('gpu')}, torch {self.machine['torch']}, {self.machine['commit']}")
        if not self.on_gpu:
            print("These are CPU figures of the machinery: the targets are for a GPU and were not checked.")
        for each in self.targets():
            figure = "-" if each["figure"] is None else f"{each['figure']:.2f}"
            print(f"{each['target']:58} {each['limit']:>8} {figure:>10}  {each['verdict']}")


def plain(value):
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def target(name: str, figure: float | None, limit: float, at_most: bool) -> dict:
    """One target and whether it was reached."""
    if figure is None:
        verdict = "not measured"
    else:
        verdict = "reached" if (figure <= limit if at_most else figure >= limit) else "MISSED"
    return {
        "target": name,
        "limit": f"<= {limit:g}" if at_most else f">= {limit:g}",
        "figure": figure,
        "verdict": verdict,
    }


def line(row: dict, short: bool = False) -> str:
    """A row in one line; `short` without loss and errors."""

    def number(column: str, form: str, unit: str) -> str:
        return (
            f"{row[column]:{form}}{unit}" if row.get(column) is not None else f"{'-':>{form.split('.')[0]}}"
        )

    shape = f"{row['kind']:8} {row['what']:8} B={row['B']} D={row['D']} K={row['K']} {row['dtype']}"
    if row["dtype"] == "float32":
        shape += f" {row['precision']}"
    text = f"{row['contender']:29} {shape:52}"
    if row["status"] != "ok":
        return f"{text} {row['status']} {row.get('note', '')}".rstrip()
    text += " ".join(number(f"{name}_us", "10.1f", "") for name in ("device", "graph", "host"))
    text += number("peak_mib", "9.1f", " MiB")
    if row.get("tflops") is not None:
        text += f"  {row['tflops']:.1f} TFLOP/s"
        text += f" ({row['rate_fraction']:.0%} of the rate)" if row.get("rate_fraction") else ""
    text += f"  {row['regime']}" if row.get("regime") else ""
    for name in ("device", "graph", "host", "memory"):
        if row.get(f"ratio_{name}") is not None:
            text += f"  {name} {row[f'ratio_{name}']:.2f}x"
    if row.get("adds_percent") is not None:
        text += f"  adds {row['adds_percent']:+.2f} %"
    if short:
        return text
    if row.get("loss") is not None:
        text += f"  loss {row['loss']:.5f}"
    if row.get("gradient_error") is not None:
        text += f" (error {row['loss_error']:.1e}, gradients {row['gradient_error']:.1e})"
    return text
