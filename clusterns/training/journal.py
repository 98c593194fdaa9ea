"""What a run tells while it goes on: lines on the terminal, log.jsonl, and who charts it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..models.folder import first_line
from .run_folder import TENSORBOARD


class Journal:
    """The log of a run, and its figures for a tracker; silent on all ranks but the first.

    Args:
        path: of log.jsonl, one JSON object a line; its folder names the run.
        seconds: that the run has taken already, whose log then goes on; None begins a new one.
        step: of the run, after which TensorBoard forgets what it was told.
        report_to: "tensorboard", "trackio" or "wandb", which then chart the figures; or "none".
        settings: of the run, for trackio and wandb.
        silent: write and say nothing.

    Raises what `import_tracker` raises, and ValueError with one line where the tracker begins no run.
    """

    def __init__(
        self,
        path: Path,
        *,
        seconds: float | None = None,
        step: int = 0,
        report_to: str = "none",
        settings: Mapping[str, Any] | None = None,
        silent: bool = False,
    ) -> None:
        self.path, self.silent = path, silent
        self.began = time.monotonic() - (seconds or 0.0)
        self.records: list[dict[str, Any]] = []
        self.tracker: Any = None
        if silent:
            return
        if seconds is None:
            path.write_text("", encoding="utf-8")
        else:
            self.records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if report_to == "tensorboard":
            self.tracker = _TensorBoard(path.parent / TENSORBOARD, step)
        elif report_to != "none":
            self.tracker = self._begin_run(report_to, dict(settings or {}))

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
        """Write what is still on its way to the tracker."""
        if self.tracker is not None:
            self.tracker.finish()

    def _write(self, record: dict[str, Any]) -> None:
        if self.silent:
            return
        record = {**record, "seconds": round(self.seconds, 3)}
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _chart(self, step: int, values: Mapping[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(dict(values), step=step)

    def _begin_run(self, tracker: str, settings: dict[str, Any]) -> Any:
        """A run of trackio or wandb; a resumed one goes on, by the name or the id that the log has of it."""
        module = import_tracker(tracker)
        folder = self.path.parent.resolve()
        name = f"{folder.parent.name}/{folder.name}" if folder.name.startswith("seed-") else folder.name
        known = [record["id"] for record in self.records if record.get("event") == tracker]
        again: dict[str, Any] = {"name": name}
        if known:
            again = {"name" if tracker == "trackio" else "id": known[-1], "resume": "allow"}
        elif tracker == "trackio":
            again["resume"] = "never"  # it gives another name where this one is taken
        project = os.environ.get(f"{tracker.upper()}_PROJECT", "clusterns")
        try:
            run = module.init(project=project, config=settings, **again)
        except Exception as error:  # of the tracker, of what it uses to connect
            raise ValueError(
                f"--report-to: expected {tracker} to begin a run, got: {first_line(error)}; --report-to none "
                "goes without"
            ) from error
        if not known:
            self._write({"step": 0, "event": tracker, "id": run.name if tracker == "trackio" else run.id})
        return run


class _TensorBoard:
    """A writer of TensorBoard with the words of the other trackers."""

    def __init__(self, folder: Path, step: int) -> None:
        # What a run that was killed had told beyond its last checkpoint is no longer shown.
        self.writer = import_tracker("tensorboard").SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def finish(self) -> None:
        self.writer.close()


def import_tracker(name: str) -> Any:
    """The module of a tracker; ImportError with one line where it is not installed."""
    try:
        return import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ImportError(
            f"--report-to: expected the package {name}, got: {error}; pip install {name}, or --report-to none"
        ) from error


# Where a figure of the log stands in a tracker, if not under cosine/ or training/.
_GROUPS = {
    "loss": ("loss", "info_nce", "bml", "dimensions", "mlm"),
    "clusters": ("empty_clusters", "largest_cluster", "cluster_entropy", "with_mates"),
    "negatives": ("effective_negatives",),
}


def tag_of(name: str) -> str:
    """The name of a figure of the log in a tracker: a group and itself."""
    if name.endswith("_cosine"):
        return f"cosine/{name.removesuffix('_cosine')}"
    group = next((group for group, names in _GROUPS.items() if name in names), "training")
    return f"{group}/{name}"
