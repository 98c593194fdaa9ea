"""What of a running training goes into a checkpoint, and how a run goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, Checkpoints
from .config import FREE_ON_RESUME, TrainConfig, to_dict
from .devices import random_states, restore_random_states
from .processes import Processes
from .run_folder import LOG, model_files

if TYPE_CHECKING:
    from ..train import Run

# Attributes of the run that JSON holds as they are.
_PROGRESS = ("epoch batch deferred first_scores best_scores best_step evaluations_without_gain").split()


def find_checkpoint(config: TrainConfig, output: Path, processes: Processes) -> Checkpoint | None:
    """The newest checkpoint of the output folder, if the run is to go on from one; None where it begins.

    Raises ValueError, naming the setting, where that was made with other settings, and what
    `Checkpoints.read` raises.
    """
    checkpoints = Checkpoints(output, config.keep_checkpoints)
    last = processes.of_first(checkpoints.last() if config.resume else None)
    if last is None:
        return None
    checkpoint = checkpoints.read(last, LOG)
    before, now = checkpoint.progress["settings"], json.loads(json.dumps(to_dict(config)))
    for name in sorted(before.keys() | now.keys()):
        if name not in FREE_ON_RESUME and before.get(name) != now.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')}: expected {before.get(name)!r} as in {last}, which --resume "
                f"goes on from, got {now.get(name)!r}"
            )
    size = checkpoint.progress["processes"]
    if size != processes.size:
        raise ValueError(f"--nproc-per-node: expected {size} processes as in {last}, got {processes.size}")
    processes.say(f"going on after step {checkpoint.progress['step']}, from {last}")
    return checkpoint


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint of the run as it stands after a step; every rank calls it."""
    random = run.processes.of_all(random_states(run.device))
    if not run.processes.is_first:
        return
    run.journal.sync()
    run.checkpoints.save(
        run.step,
        modules=run.modules,
        training={**{name: part.state_dict() for name, part in _parts(run).items()}, "random": random},
        progress={
            **{name: getattr(run, name) for name in _PROGRESS},
            "rows": _rows(run),
            "seconds": run.journal.seconds,
            "watch": run.watch.state_dict(),
            "processes": run.processes.size,
            "settings": to_dict(run.config),
        },
        log=run.journal.path,
        best=model_files(run.output) if run.task.dev is not None else [],
    )


def load_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Put a new run where the checkpoint's one stood; every rank calls it.

    Raises ValueError for a checkpoint of another model or of other data.
    """
    progress = checkpoint.progress
    if progress["rows"] != _rows(run):
        got = "other ones" if progress["rows"][0] == _rows(run)[0] else f"{_rows(run)[0]:,}"
        raise ValueError(
            f"--train-file: expected the {progress['rows'][0]:,} rows of {checkpoint.folder}, got {got}"
        )
    checkpoint.load_modules(run.modules)
    for name, part in _parts(run).items():
        part.load_state_dict(checkpoint.training[name])
    run.step = progress["step"]
    for name in _PROGRESS:
        setattr(run, name, progress[name])
    run.watch.load_state_dict(progress["watch"])
    if run.processes.is_first:
        run.checkpoints.restore_files(checkpoint, run.output / LOG)
    restore_random_states(checkpoint.training["random"][run.processes.rank], run.device)


def _rows(run: Run) -> list[Any]:
    """How many rows there are, and what tells those of a file from others."""
    folder = getattr(run.task.rows, "folder", None)
    return [len(run.task.rows), folder and folder.name]


def _parts(run: Run) -> dict[str, Any]:
    return {"optimizer": run.optimizer, "schedule": run.schedule, "scaler": run.scaler}
