"""What a run tells while it goes on: lines on the terminal, log.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm


class Journal:
    """The log of a run, and its figures for TensorBoard; silent on all ranks but the first.

    Args:
        path: of log.jsonl, one JSON object a line.
        seconds: that the run has taken already, whose log then goes on; None begins a new one.
        step: of the run, after which TensorBoard forgets what it was told.
        tensorboard: folder of its events, or None.
        silent: write and say nothing.

    Raises ImportError with one line where TensorBoard is wanted and not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        seconds: float | None = None,
        step: int = 0,
        tensorboard: Path | None = None,
        silent: bool = False,
    ) -> None:
        self.path, self.silent = path, silent
        self.began = time.monotonic() - (seconds or 0.0)
        self.records: list[dict[str, Any]] = []
        self.scalars: Any = None
        if silent:
            return
        if seconds is None:
            path.write_text("", encoding="utf-8")
        else:
            self.records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if tensorboard is not None:
            self.scalars = _summary_writer(tensorboard, step)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time in which it stood still."""
        return time.monotonic() - self.began

    def event(self, step: int, name: str, text: str, **values: float) -> None:
        """Say what happened, and log it."""
        self.say(step, text)
        self._write({"step": step, "event": name, **values})

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self._write({"step": step, **values})
        self._chart(step, {tag_of(name): value for name, value in values.items()})

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Say and log what dev gives."""
        self.say(step, "dev " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        self._write({"step": step, "dev": dict(scores)})
        self._chart(step, {f"dev/{name}": value for name, value in scores.items()})

    def say(self, step: int, text: str) -> None:
        """A line on the terminal, beside the bar."""
        if not self.silent:
            tqdm.write(f"step {step}: {text}")

    def sync(self) -> None:
        """Make the disk hold the log."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Write what is still on its way to TensorBoard."""
        if self.scalars is not None:
            self.scalars.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self.silent:
            return
        record = {**record, "seconds": round(self.seconds, 3)}
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _chart(self, step: int, values: Mapping[str, float]) -> None:
        if self.scalars is not None:
            for tag, value in values.items():
                self.scalars.add_scalar(tag, value, step)


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"--report-to: expected TensorBoard, got: {error}; "
            'pip install "clusterns[train]" or --report-to none'
        ) from error
    # What a run that was killed had told beyond its last checkpoint is no longer shown.
    return SummaryWriter(str(folder), purge_step=step + 1)


# Where a figure of the log stands in TensorBoard, if not under cosine/ or training/.
_GROUPS = {
    "loss": ("loss", "info_nce", "bml", "mlm"),
    "clusters": ("empty_clusters", "largest_cluster", "cluster_entropy", "with_mates"),
    "negatives": ("effective_negatives",),
}


def tag_of(name: str) -> str:
    """The TensorBoard tag of a figure of the log."""
    if name.endswith("_cosine"):
        return f"cosine/{name.removesuffix('_cosine')}"
    group = next((group for group, names in _GROUPS.items() if name in names), "training")
    return f"{group}/{name}"
