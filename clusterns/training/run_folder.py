"""The output folder of a training run: who may write into it, its log and its summary.

model files           the best model so far, as transformers and sentence-transformers load it
loss.safetensors      the clustering state that belongs to it
README.md             its card, unless a user has written one
log.jsonl             one JSON object a line: terms of a step, dev scores, events
training.json         settings, versions and, once finished, scores
training.png          the picture of the run
checkpoints/          see `checkpoint.py`
tensorboard/          the log's figures for TensorBoard
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..evaluation.tables import format_table
from ..files import holding, is_staged, replacing, staging, sweep
from ..models.folder import HEAD_FILE
from ..models.settings import SETTINGS_FILE
from .config import TrainConfig, to_dict

LOCK, LOG, SUMMARY, PICTURE = ".lock", "log.jsonl", "training.json", "training.png"
TENSORBOARD, CHECKPOINTS, STATE = "tensorboard", "checkpoints", "loss.safetensors"
CARD = "README.md"
CARD_MARK = "<!-- Of `clusterns train`, which replaces this card as long as this line is in it. -->"
# What another run must not leave beside the summary of one.
_OUTCOME = ("model.safetensors", HEAD_FILE, STATE, SETTINGS_FILE, PICTURE, TENSORBOARD, CARD)


class Claim:
    """That of a run on its folder; where it was empty, what a run leaves that never began goes."""

    def __init__(self, output: Path, *, is_empty: bool) -> None:
        self.output, self.is_empty, self.has_begun = output, is_empty, False

    def clear(self) -> None:
        """Remove what a run without a step has written into an empty folder."""
        if self.is_empty and not self.has_begun:
            for path in self.output.iterdir():
                if path.name == LOCK:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@contextlib.contextmanager
def claimed(output: Path, *, overwrite: bool, resume: bool) -> Iterator[Claim]:
    """Hold the output folder for one run.

    Raises NotADirectoryError for a file, FileExistsError for a folder that is in use, or that holds files
    and is neither to be overwritten nor, with `resume`, that of a training, and OSError for one that cannot
    be written to.
    """
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            try:
                if output.exists() and not output.is_dir():
                    raise NotADirectoryError(f"--output-dir: expected a folder, got the file {output}")
                made = [folder for folder in (output, *output.parents) if not folder.exists()]
                output.mkdir(parents=True, exist_ok=True)
                is_held = stack.enter_context(holding(output / LOCK))
            except BlockingIOError:
                raise FileExistsError(
                    f"--output-dir: expected a folder of its own, {output} is in use by a running training; "
                    f"if there is none, remove {output / LOCK}"
                ) from None
            except OSError as error:
                if error.strerror is None:  # the line above
                    raise
                raise type(error)(
                    f"--output-dir: expected a folder that can be written to, got {output} ({error.strerror})"
                ) from error
            if not is_held:
                text = f"{output}: this disk has no locks, see to it that no other training writes there"
                warnings.warn(text, stacklevel=3)
            for folder in (output, output / CHECKPOINTS):
                sweep(folder)
            is_empty = not any(path.name != LOCK and not is_staged(path) for path in output.iterdir())
            if not overwrite and not is_empty:
                if not resume:
                    raise FileExistsError(
                        f"--output-dir: expected a new or empty folder, {output} holds files; choose another "
                        "or pass --overwrite-output-dir, or --resume to go on with the training in it"
                    )
                if not is_training(output):
                    raise FileExistsError(
                        f"--resume: expected the output folder of a training, {output} holds other files"
                    )
            claim = Claim(output, is_empty=is_empty)
            try:
                yield claim
            except BaseException:
                claim.clear()
                raise
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # but for a failure it is not empty
                folder.rmdir()


def is_training(output: Path) -> bool:
    """Whether a training, with or without its summary, is in the folder."""
    return (output / SUMMARY).is_file() or any((output / CHECKPOINTS).glob("step-*"))


def begin_anew(output: Path, config: TrainConfig) -> list[str]:
    """Write the summary of a training that begins, and remove what of an earlier one could pass for its own.

    Returns the names of what is removed. Each goes at one blow, so that no checkpoint is ever taken for the
    last of them; and the checkpoints go first: a start that is killed here is one that --resume begins anew.
    """
    was_training, removed = is_training(output), []
    for name in (CHECKPOINTS, SUMMARY, *_OUTCOME):
        if name == SUMMARY:
            write_summary(output, config, finished=False)
        elif was_training and (output / name).exists() and not (name == CARD and is_of_user(output / name)):
            with staging(output) as place:
                os.rename(output / name, place / name)
            removed.append(name)
    return removed


def is_of_user(card: Path) -> bool:
    """Whether a card is there that no training wrote, or that a user has taken over."""
    return card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace")


def read_summary(output: Path) -> dict[str, Any]:
    """training.json, or an empty dict where there is none that can be read."""
    try:
        summary = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def versions() -> dict[str, str]:
    """Of what a model depends on."""
    return {
        "clusterns": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_summary(output: Path, config: TrainConfig, *, finished: bool, **facts: Any) -> None:
    """Write training.json whole or not at all: settings, versions, and the facts."""
    summary = {"finished": finished, "settings": to_dict(config), "versions": versions(), **facts}
    with replacing(output / SUMMARY) as path:
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def report(
    config: TrainConfig, output: Path, scores: dict[str, dict[str, float]], best_step: int, total_steps: int
) -> None:
    """Print what came out, and what to do next."""
    print()
    if scores["after"]:
        print(f"{format_table(scores)}\n\nbest dev score at step {best_step} of {total_steps}")
    if scores["after"] and best_step == 0:
        print("no step beat the start: the model that is kept is the one that the training began with")
    print(f"model, log and picture: {output} ({LOG}, {PICTURE})")
    print(
        f"next: clusterns encode {output} FILE --output X.npy; clusterns report {output} --sentences FILE ..."
    )
    if config.from_scratch:
        print(
            "a real run, on your own sentences:\n  clusterns train --model MODEL --train-file FILE --dev FILE"
        )
