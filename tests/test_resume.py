"""Runs that are killed, and go on: they end with the bits of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import resume_worker
import torch
from safetensors.torch import load_file
from train_problems import flags, save_tiny_model, sentences, write_dev

STEPS = "--max-steps 18 --eval-steps 4 --patience 0 --checkpoint-steps 3 --keep-checkpoints 2 --log-steps 2"
EVERYTHING = (
    "--accumulation-steps 2 --mlm-weight 0.1 --learn-temperature --centroid-update adamw --warmup-steps 4 "
    "--prompt bert --denoise trained"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model, sentences and dev set."""
    root = tmp_path_factory.mktemp("resume")
    save_tiny_model(root / "model", pooling="mean", std=0.2)
    (root / "sentences.txt").write_text("\n".join(sentences(130)) + "\n")
    write_dev(root / "sts")
    return root


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have all modules loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["clusterns.train", "clusterns.training.figure", "matplotlib.pyplot", "resume_worker"]
    )
    return context


def arguments(place: Path, output: Path, more: str) -> list[str]:
    given = ["--sts-dir", str(place / "sts"), "--no-tensorboard", *STEPS.split(), *more.split()]
    return flags(place / "model", place / "sentences.txt", output, *given)


def start(processes, given: list[str], output: Path, kill_at: int = 0, count_file: Path | None = None):
    counts = None if count_file is None else str(count_file)
    process = processes.Process(target=resume_worker.run, args=(given, str(output), kill_at, counts))
    process.start()
    return process


def ends_alike(one: Path, other: Path) -> None:
    """Same weights, centroids, log, best model, summary and checkpoints, to the bit."""
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith(".safetensors"):
            ours, theirs = (load_file(folder / name) for folder in (one, other))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
        elif name.endswith("log.jsonl"):
            ours, theirs = (
                [json.loads(line) for line in (folder / name).read_text().splitlines()]
                for folder in (one, other)
            )
            for record in (*ours, *theirs):
                record.pop("seconds")
            assert ours == theirs, name
        elif name == "training.json":
            ours, theirs = (json.loads((folder / name).read_text()) for folder in (one, other))
            for key in ("finished", "scores", "best_step"):
                assert ours[key] == theirs[key]
    assert not list(one.parent.glob(f".{one.name}*"))


@pytest.mark.parametrize("more", ["", EVERYTHING], ids=["published", "everything"])
def test_killed_many_times_at_random_points(place, processes, tmp_path, more):
    """By SIGKILL before a file is touched, and at random times."""
    whole, parts, count = tmp_path / "whole", tmp_path / "parts", tmp_path / "count"
    process = start(processes, [*arguments(place, whole, more), "--resume"], whole, count_file=count)
    process.join()
    assert process.exitcode == 0
    touches = int(count.read_text())
    assert touches > 200

    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    given = [*arguments(place, parts, more), "--resume"]
    for _ in range(4):
        process = start(processes, given, parts, kill_at=draw.randint(1, touches // 2))
        process.join(draw.uniform(0.3, 3.0))  # if it has not got there by then, it dies where it is
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), f"seed {seed}"
    process = start(processes, given, parts)
    process.join()
    assert process.exitcode == 0, f"seed {seed}"
    ends_alike(parts, whole)
