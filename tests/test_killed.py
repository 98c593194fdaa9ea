"""Processes killed before every change they make on the disk: what is there is whole, and nothing stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import forked
import killed_worker
import pytest
import torch
from safetensors.torch import load_file
from tiny import write_sts_folder
from train_problems import flags, save_tiny_model, sentences, write_dev

from clusterns.files import sweep

SHORT = (
    "--max-steps 2 --eval-steps 2 --patience 0 --checkpoint-steps 1 --keep-checkpoints 1 --log-steps 1 "
    "--batch-size 8"
)
STEPS = "--max-steps 18 --eval-steps 4 --patience 0 --checkpoint-steps 3 --keep-checkpoints 2 --log-steps 2"
EVERYTHING = (
    "--accumulation-steps 2 --mlm-weight 0.1 --learn-temperature --centroid-update adamw --warmup-steps 4 "
    "--prompt bert --denoise trained"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model, sentences and STS sets."""
    root = tmp_path_factory.mktemp("killed")
    save_tiny_model(root / "model", pooling="mean", std=0.2)
    (root / "sentences.txt").write_text("\n".join(sentences(130)) + "\n", encoding="utf-8")
    write_dev(root / "dev")
    write_sts_folder(root / "sts")
    return root


@pytest.fixture
def start(tmp_path):
    """Runs a command that dies before change `kill_at` of a folder; else returns how many it made.

    `kept` is for copies of what is there before each of them.
    """

    def run(given: list[str], folder: Path, kill_at: int = 0, kept: Path | None = None) -> int:
        count = tmp_path / "count"
        cache = folder / "rows" if given[0] == "report" else tmp_path / "rows"
        arguments = (given, str(folder), kill_at, str(count), str(cache), kept and str(kept))
        process = forked.start(killed_worker.run, *arguments)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
        return 0 if kill_at else int(count.read_text(encoding="utf-8"))

    return run


def training(place: Path, output: Path, *more: str) -> list[str]:
    given = ["--sts-dir", str(place / "dev"), "--no-tensorboard", "--resume"]
    return flags(place / "model", place / "sentences.txt", output, *given, *" ".join(more).split())


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def visible(folder: Path) -> frozenset:
    """What a start goes on from: names, and what is in the tensors."""
    shown = [name for name in files(folder) if ".clusterns-" not in name]
    return frozenset((name, (folder / name).read_bytes() if "tensors" in name else b"") for name in shown)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.startswith(".clusterns-")]


def ends_alike(one: Path, other: Path) -> None:
    """Same weights, centroids, log, best model, summary and checkpoints, to the bit."""
    assert files(one) == files(other)
    for name in files(one):
        if name.endswith(".safetensors"):
            ours, theirs = (load_file(folder / name) for folder in (one, other))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
        elif name.endswith("log.jsonl"):
            ours, theirs = (
                [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
                for folder in (one, other)
            )
            for record in (*ours, *theirs):
                record.pop("seconds")
            assert ours == theirs, name
        elif name == "training.json":
            ours, theirs = (
                json.loads((folder / name).read_text(encoding="utf-8")) for folder in (one, other)
            )
            for key in ("finished", "scores", "best_step"):
                assert ours[key] == theirs[key]


@pytest.mark.parametrize("part", range(2))  # for processes of tests side by side
def test_training_killed_before_every_change(part, place, start, tmp_path):
    """The next start clears what is left, goes on, and ends as the run that was not killed.

    A killed process leaves on the disk what is there at that moment, which one run is enough to copy.
    """
    whole, kept, parts = (tmp_path / name for name in ("whole", "kept", "parts"))
    (tmp_path / "whole").mkdir()
    changes = start(training(place, whole, SHORT), whole, kept=kept)
    assert changes > 80
    given = training(place, parts, SHORT)
    seen: set[frozenset] = set()
    for kill_at in range(1 + part * changes // 2, 1 + (part + 1) * changes // 2):
        (kept / str(kill_at)).rename(parts)
        assert len(leftovers(parts)) <= 1
        if (state := visible(parts)) in seen:  # that a start goes on from it has been seen
            for folder in (parts, parts / "checkpoints"):
                sweep(folder)
            assert not leftovers(parts)
        else:
            start(given, parts)
            ends_alike(parts, whole)
        seen.add(state)
        shutil.rmtree(parts, ignore_errors=True)
    assert sorted(os.listdir(tmp_path)) == ["count", "kept", "rows", "whole"]


def test_training_killed_again_and_again(place, start, tmp_path):
    """With all that a checkpoint may hold, each start killed somewhat later than the one before it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = start(training(place, whole, STEPS, EVERYTHING), whole)
    given = training(place, parts, STEPS, EVERYTHING)
    for part in (9, 7, 5, 4):
        start(given, parts, changes // part)
    start(given, parts)
    ends_alike(parts, whole)


def commands(place: Path, folder: Path) -> dict[str, list[str]]:
    model = str(place / "model")
    sets = ["--sts-dir", str(place / "sts"), "--resamples", "0"]
    named = {"--json": "figures.json", "--markdown": "figures.md", "--figure": "figures.png"}
    outputs = [part for flag, name in named.items() for part in (flag, str(folder / name))]
    shown = [
        "--sentences",
        str(place / "sentences.txt"),
        "--output",
        str(folder / "page.html"),
        "--map",
        "pca",
    ]
    return {
        "evaluate": ["evaluate", model, *sets, *outputs],
        "report": ["report", model, *shown],  # and the cache of rows, which is in that folder too
    }


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_written_files_killed_before_every_change(command, place, start, tmp_path):
    """Each run finds what the one before it left, killed one change earlier."""
    folder = tmp_path / "folder"
    folder.mkdir()
    given = commands(place, folder)[command]
    changes = start(given, folder)
    assert changes >= 20
    expected = files(folder)
    contents = {name: (folder / name).read_bytes() for name in expected if not name.startswith("rows/")}
    shutil.rmtree(folder)
    folder.mkdir()
    for kill_at in range(1, changes + 1):
        start(given, folder, kill_at)
        assert len(leftovers(folder)) <= 1
        for name, content in contents.items():
            assert not (folder / name).exists() or (folder / name).read_bytes() == content
        for path in folder.glob("rows/[!.]*"):  # which is not written where it is there
            if path.is_dir():
                shutil.rmtree(path)
    start(given, folder)
    assert files(folder) == expected
    assert not leftovers(folder)
