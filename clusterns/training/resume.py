"""What of a running training goes into a checkpoint, and how a run goes on from it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..encoder import SentenceEncoder
from .checkpoint import Checkpoint, Checkpoints
from .config import COMPARED_BY_CONTENT, FREE_ON_RESUME, LENGTH, TrainConfig, flag, to_dict
from .devices import random_states, restore_random_states
from .hub import write_card
from .processes import Processes
from .run_folder import LOG

# Attributes of the run that JSON holds as they are.
_PROGRESS = ("epoch batch deferred first_scores best_scores best_step evaluations_without_gain").split()


def find_checkpoint(
    config: TrainConfig, output: Path, processes: Processes, summary: dict[str, Any]
) -> Checkpoint | None:
    """The newest checkpoint of the output folder, if the run is to go on from one; None where it begins.

    `summary` is what training.json holds. Raises ValueError, naming the setting, where the checkpoint was
    made with other settings that would change the run, or a run that has ended is to go on for longer and
    cannot; and what `Checkpoints.read` raises.
    """
    if not config.resume:
        return None
    checkpoints = Checkpoints(output, config.keep_checkpoints)
    last = processes.of_first(checkpoints.last())
    if last is None:
        if summary.get("finished"):
            name, before, now = next(changes(config, summary["settings"], FREE_ON_RESUME))
            raise ValueError(
                f"{flag(name)}: expected {before!r} as in {output}, whose training has ended and left no "
                f"checkpoint to go on from (--checkpoint-steps writes them), got {now!r}"
            )
        return None
    checkpoint = checkpoints.read(last, LOG)
    settings = checkpoint.progress["settings"]
    free = FREE_ON_RESUME | COMPARED_BY_CONTENT | LENGTH
    for name, before, now in changes(config, settings, free):
        raise ValueError(
            f"{flag(name)}: expected {before!r} as in {last}, which --resume goes on from, got {now!r}"
        )
    gainless = checkpoint.progress["evaluations_without_gain"]
    if summary.get("finished") and 0 < config.patience <= gainless:
        raise ValueError(
            f"--patience: expected 0 or more than {gainless}, as the training in {output} has ended after so "
            f"many evaluations without a gain, got {config.patience}"
        )
    size = checkpoint.progress["processes"]
    if size != processes.size:
        raise ValueError(f"--nproc-per-node: expected {size} processes as in {last}, got {processes.size}")
    return checkpoint


def changes(
    config: TrainConfig, settings: Mapping[str, Any], free: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Names of the settings, but for the free ones, that differ from earlier ones; what they were and are."""
    now = json.loads(json.dumps(to_dict(config)))
    for name in sorted(settings.keys() | now.keys()):
        if name not in free and settings.get(name) != now.get(name):
            yield name, settings.get(name), now.get(name)


def save_checkpoint(run: Any) -> None:
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
            "content": _content(run),
            "seconds": run.journal.seconds,
            "watch": run.watch.state_dict(),
            "processes": run.processes.size,
            "settings": to_dict(run.config),
        },
        log=run.journal.path,
        best=[run.output / name for name in run.saved],
    )


def load_checkpoint(run: Any, checkpoint: Checkpoint) -> None:
    """Put a new run where the checkpoint's one stood; every rank calls it.

    Raises ValueError for a checkpoint of another model or of other data.
    """
    progress = checkpoint.progress
    if progress["rows"] != _rows(run):
        got = "other ones" if progress["rows"][0] == _rows(run)[0] else f"{_rows(run)[0]:,}"
        raise ValueError(
            f"--train-file: expected the {progress['rows'][0]:,} rows of {checkpoint.folder}, got {got}"
        )
    for name, now in _content(run).items():
        if progress.get("content", {}).get(name, now) != now:
            name = "dev" if name == "sts_dir" and run.config.dev is not None else name
            raise ValueError(
                f"{flag(name)}: expected what {checkpoint.folder} began with, got another, "
                f"{getattr(run.config, name)}"
            )
    if progress["step"] > run.total_steps:
        raise ValueError(
            f"--max-steps: expected at least the {progress['step']} steps of {checkpoint.folder}, got "
            f"{run.total_steps}"
        )
    checkpoint.load_modules(run.modules)
    for name, part in _parts(run).items():
        part.load_state_dict(checkpoint.training[name])
    # The rate of the next step is that of a run of this length; the state has that of the length before.
    for group, rate, factor in zip(
        run.optimizer.param_groups, run.schedule.base_lrs, run.schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(progress["step"])
    run.step = progress["step"]
    for name in _PROGRESS:
        setattr(run, name, progress[name])
    run.watch.load_state_dict(progress["watch"])
    if run.processes.is_first:
        run.saved = run.checkpoints.restore_files(checkpoint, run.output / LOG)
        if run.saved:
            write_card(run)
    restore_random_states(checkpoint.training["random"][run.processes.rank], run.device)
    run.processes.say(f"going on after step {run.step}, from {checkpoint.folder}")
    quiet = COMPARED_BY_CONTENT | {"output_dir", "overwrite_output_dir", "resume"}
    for name, before, now in changes(run.config, progress["settings"], quiet):
        run.processes.say(f"{flag(name)} is {now!r} from here on, was {before!r}")


def fingerprint(encoder: SentenceEncoder) -> str:
    """What tells an encoder from others: settings, vocabulary and weights of the transformer."""
    config = {name: value for name, value in encoder.transformer.config.to_dict().items() if name[0] != "_"}
    config.pop("transformers_version", None)
    tokenizer = encoder.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab())
    told = json.dumps([encoder.settings(), config, vocabulary], default=str, sort_keys=True)
    digest = xxhash.xxh3_128(told.encode())
    for name, value in encoder.transformer.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprints(run: Any) -> dict[str, Any]:
    """What tells the data and the encoder of a run from others, by the settings that name them."""
    return {"train_file": _rows(run), "model": run.origin, "dev": run.task.dev_content}


def _rows(run: Any) -> list[Any]:
    """How many rows there are, and what tells those of a file from others."""
    folder = getattr(run.task.rows, "folder", None)
    return [len(run.task.rows), folder and folder.name]


def _content(run: Any) -> dict[str, str]:
    """What tells the encoder that a run began with, and what judges it, from others, by their settings.

    "sts_dir" is whatever judges it, STS or not, so that none goes on by another.
    """
    return {"model": run.origin, "sts_dir": run.task.dev_content}


def _parts(run: Any) -> dict[str, Any]:
    return {"optimizer": run.optimizer, "schedule": run.schedule, "scaler": run.scaler}
