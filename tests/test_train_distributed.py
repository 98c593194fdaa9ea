"""Two real processes under torchrun train as one does on the same batches."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_problems import flags, log_of, save_tiny_model, sentences, write_dev

WORKER = Path(__file__).parent / "train_distributed_worker.py"
# What is computed by one process and by two, on the same batches and without dropout.
RUNS = {
    "published": "--max-steps 6 --eval-steps 3",
    "options": "--max-steps 4 --accumulation-steps 2 --learn-temperature --gather ring --num-workers 1",
    "cached": "--max-steps 4 --mini-batch-size 5 --accumulation-steps 2",
    "triplets": "--max-steps 4 --text-columns sent0,sent1,hard_neg --prompt bert --denoise trained",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model without dropout, sentences, triplets and a dev set."""
    root = tmp_path_factory.mktemp("distributed")
    save_tiny_model(root / "model", dropout=0.0, pooling="mean", std=0.2)
    texts = sentences(390)
    (root / "sentences.txt").write_text("\n".join(texts) + "\n")
    with (root / "triplets.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sent0", "sent1", "hard_neg"])
        rows.writerows(zip(texts[:130], texts[130:260], texts[260:], strict=True))
    write_dev(root / "sts")
    return root


def arguments(place: Path, name: str, output: Path) -> list[str]:
    file = "triplets.csv" if name == "triplets" else "sentences.txt"
    more = [*RUNS[name].split(), "--no-tensorboard"]
    if name == "published":
        more += ["--sts-dir", str(place / "sts")]
    return flags(place / "model", place / file, output, *more)


def run(processes: int, *job: str, fails: bool = False) -> str:
    """Start one process, or two ranks; returns what they said. A hang would last an hour."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # One thread each: of a model this small two threads only wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *job], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_processes_train_as_one(place, tmp_path):
    one, two = (
        {name: arguments(place, name, tmp_path / f"{count}-{name}") for name in RUNS}
        for count in ("one", "two")
    )
    run(1, str(WORKER), json.dumps({"runs": [*one.values()]}))
    run(2, str(WORKER), json.dumps({"runs": [*two.values()]}))
    for name in RUNS:
        folders = [tmp_path / f"{count}-{name}" for count in ("one", "two")]
        theirs, ours = ([record for record in log_of(folder) if "loss" in record] for folder in folders)
        assert len(ours) == len(theirs) > 0
        for record, other in zip(ours, theirs, strict=True):
            assert record.keys() == other.keys()
            for key in record.keys() - {"seconds"}:
                assert record[key] == pytest.approx(other[key], rel=2e-4, abs=2e-5), (name, key)
        # AdamW makes large what is rounding in a gradient: not each weight, but all together end alike.
        start, yours, mine = (
            load_file(folder / "model.safetensors") for folder in (place / "model", *folders)
        )
        apart = torch.cat([(mine[key] - yours[key]).flatten() for key in start]).norm()
        moved = torch.cat([(yours[key] - start[key]).flatten() for key in start]).norm()
        assert apart < 0.02 * moved, (name, apart, moved)
        yours, mine = (load_file(folder / "loss.safetensors") for folder in folders)
        for key, value in mine.items():
            torch.testing.assert_close(value, yours[key], rtol=1e-3, atol=1e-3)
    assert [r["dev"] for r in log_of(tmp_path / "two-published") if "dev" in r]


def test_an_error_on_one_rank_ends_both_and_both_go_on(place, tmp_path):
    """Rank 1 fails in training, between two checkpoints; then the run ends as one that nothing stopped."""
    save_tiny_model(
        tmp_path / "model", pooling="mean", std=0.2
    )  # dropout: each rank has random numbers of its own
    more = (
        "--max-steps 6 --eval-steps 3 --checkpoint-steps 2 --accumulation-steps 2 --no-tensorboard --resume"
    )
    given = ["--sts-dir", str(place / "sts"), "--mlm-weight", "0.1", *more.split()]
    whole, broken = (
        flags(tmp_path / "model", place / "sentences.txt", tmp_path / name, *given)
        for name in ("whole", "broken")
    )
    fails = {"rank": 1, "method": "train_step", "step": 5, "run": "broken"}
    said = run(2, str(WORKER), json.dumps({"runs": [whole, broken], "fails": fails}), fails=True)
    assert "clusterns: error: rank 1: train_step: expected to go on, was made to fail at step 5" in said
    assert "going on after step 4" in run(2, "-m", "clusterns", *broken)
    for file in ("model.safetensors", "loss.safetensors", "checkpoints/step-00000006/modules.safetensors"):
        ours, theirs = (load_file(tmp_path / name / file) for name in ("broken", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), file
    ours, theirs = (log_of(tmp_path / name) for name in ("broken", "whole"))
    for record in (*ours, *theirs):
        record.pop("seconds")
    assert ours == theirs


def test_an_error_in_evaluation_ends_the_rank_that_waits(place, tmp_path):
    job = {"runs": [arguments(place, "published", tmp_path / "run")]}
    job["fails"] = {"rank": 0, "method": "judge", "step": 2, "run": "run"}
    said = run(2, str(WORKER), json.dumps(job), fails=True)
    assert "clusterns: error: judge: expected to go on, was made to fail at step 3" in said
