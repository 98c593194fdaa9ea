"""Checkpoints of a training run: everything it needs to go on as if it had never stopped.

`OUTPUT_DIR/checkpoints/step-00000500/` holds

    modules.safetensors   encoder with its head, loss (centroids, moments), MLM head: name -> tensor
    training.pt           states of optimiser, schedule, scaler and of the random generators of each rank;
                          plain values and tensors, read with weights_only
    log.jsonl             the log up to this step
    best/                 the best model so far, as links to the files in the output folder
    progress.json         where the run stands, its settings, and size and CRC-32 of the files above

A checkpoint is written in a hidden folder, synced to the disk and moved: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import staging
from ..models.folder import first_line

FORMAT = "clusterns checkpoint"
VERSION = 1
MODULES, TRAINING, PROGRESS, BEST = "modules.safetensors", "training.pt", "progress.json", "best"


@dataclass
class Checkpoint:
    """What `Checkpoints.read` found."""

    folder: Path
    progress: dict[str, Any]
    modules: dict[str, Tensor]
    training: dict[str, Any]

    def load_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Fill the modules, by the name they were saved under; ValueError where shapes or names differ."""
        wanted = {
            f"{place}.{name}": value
            for place, module in modules.items()
            for name, value in module.state_dict().items()
        }
        for name in sorted(wanted.keys() | self.modules.keys()):
            shapes = [tuple(of[name].shape) if name in of else "none" for of in (wanted, self.modules)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{self.folder}: expected {name} of shape {shapes[0]} for this model and loss, "
                    f"got {shapes[1]}; it is of another model"
                )
        for place, module in modules.items():
            prefix = f"{place}."
            own = {n.removeprefix(prefix): v for n, v in self.modules.items() if n.startswith(prefix)}
            module.load_state_dict(own)


class Checkpoints:
    """The checkpoints of one output folder, at most `keep` of them.

    Raises OSError with one line where one cannot be written; the ones before it stay.
    """

    def __init__(self, output: Path, keep: int) -> None:
        self.output, self.folder, self.keep = output, output / "checkpoints", keep

    def all(self) -> list[Path]:
        """Their folders, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def last(self) -> Path | None:
        """The newest, or None."""
        return next(reversed(self.all()), None)

    def save(
        self,
        step: int,
        *,
        modules: Mapping[str, nn.Module],
        training: Mapping[str, Any],
        progress: Mapping[str, Any],
        log: Path,
        best: list[Path],
    ) -> Path:
        """Write the checkpoint of a step, then delete the oldest beyond `keep`; returns its folder.

        Args:
            step: optimiser steps so far.
            modules: by name; their state dicts are saved.
            training: states of what is no module.
            progress: what JSON can hold.
            log: the log so far, which is copied.
            best: files of the best model below the output folder, which are linked.
        """
        final = self.folder / f"step-{step:08d}"
        try:
            self.folder.mkdir(exist_ok=True)
            with staging(self.folder) as place:
                made, old = place / "new", place / "old"
                made.mkdir()
                save_file(_tensors(modules), made / MODULES)
                torch.save(dict(training), made / TRAINING)
                shutil.copyfile(log, made / log.name)
                for path in best:
                    _link(path, made / BEST / path.relative_to(self.output))
                facts = {
                    "format": FORMAT,
                    "version": VERSION,
                    "step": step,
                    **progress,
                    "files": {name: _size_and_crc(made / name) for name in (MODULES, TRAINING, log.name)},
                }
                (made / PROGRESS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
                for path in (*(path for path in made.iterdir() if path.is_file()), made):
                    _sync(path)
                if final.exists():  # of a run that was resumed from an earlier one
                    os.rename(final, old)
                os.rename(made, final)
                _sync(self.folder)
                self._drop_oldest(place)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
            last = self.last()
            raise OSError(
                f"step {step}: cannot write a checkpoint in {self.folder} ({first_line(error)}); "
                + (f"the last good one is {last}" if last else "there is none before it")
            ) from error
        return final

    def read(self, folder: Path, log_name: str) -> Checkpoint:
        """Read one whole; ValueError with one line where it is foreign, damaged or of another version."""
        try:
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}: expected a checkpoint of clusterns train, got none ({first_line(error)})"
            ) from error
        if not isinstance(progress, dict) or progress.get("format") != FORMAT:
            raise ValueError(f"{folder}: expected a checkpoint of clusterns train, got another {PROGRESS}")
        if progress.get("version") != VERSION:
            raise ValueError(
                f"{folder}: expected checkpoint version {VERSION}, got {progress.get('version')!r}"
            )
        if not {"step", "settings", "files"} <= progress.keys():
            raise ValueError(f"{folder / PROGRESS}: expected step, settings and files, got others")
        advice = "delete that folder to resume from the one before it"
        for name in (MODULES, TRAINING, log_name):
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path}: expected a whole checkpoint, got none of this file; {advice}")
            if _size_and_crc(path) != progress["files"].get(name):
                raise ValueError(f"{path}: expected the file as it was written, got a damaged one; {advice}")
        try:
            modules = load_file(folder / MODULES)
            training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        except Exception as error:  # both readers have many
            raise ValueError(
                f"{folder}: expected a whole checkpoint, got: {first_line(error)}; {advice}"
            ) from error
        return Checkpoint(folder, progress, modules, training)

    def restore_files(self, checkpoint: Checkpoint, log: Path) -> list[str]:
        """Put log and best model back to what they were at the checkpoint; returns the model's files."""
        best = checkpoint.folder / BEST
        found = [path for path in best.rglob("*") if path.is_file()] if best.is_dir() else []
        with staging(self.output) as place:
            self._drop_oldest(place)  # a kill may have come before that
            # The log is appended to, and must not change in the checkpoint; a model's files are replaced.
            shutil.copyfile(checkpoint.folder / log.name, place / log.name)
            os.replace(place / log.name, log)
            for path in found:
                target = self.output / path.relative_to(best)
                if target.exists() and path.samefile(target):
                    continue  # no kill came between; and renaming a link onto its like does nothing
                _link(path, place / "file")
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(place / "file", target)
        return sorted(path.relative_to(best).as_posix() for path in found)

    def _drop_oldest(self, place: Path) -> None:
        """Move those beyond `keep` out of sight, one at a blow, to where they go from the disk."""
        for path in self.all()[: -self.keep]:
            os.rename(path, place / path.name)


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All tensors on the CPU; those that go by two names get a copy for each, as safetensors asks."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for place, module in modules.items():
        for name, value in module.state_dict().items():
            value = value.detach().cpu().contiguous()
            tensors[f"{place}.{name}"] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    return tensors


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without links
        shutil.copyfile(path, target)


def _size_and_crc(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return [path.stat().st_size, crc]


def _sync(path: Path) -> None:
    """Make the disk hold what was written to a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
