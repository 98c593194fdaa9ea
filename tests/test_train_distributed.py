"""Two real processes train as one does on the same batches."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import train_distributed_worker
from safetensors.torch import load_file
from tiny import assert_close
from train_problems import (
    assert_trained_alike,
    flags,
    log_of,
    save_tiny_model,
    sentences,
    tiny_tokenizer,
    write_dev,
)
from transformers import AutoModel, LongformerConfig, XLNetConfig

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")
# What is computed by one process and by two, on the same batches and without dropout.
RUNS = {
    "published": "--max-steps 6 --eval-steps 3",
    "options": "--max-steps 4 --accumulation-steps 2 --learn-temperature --gather ring --num-workers 1",
    "cached": "--max-steps 4 --mini-batch-size 5 --accumulation-steps 2",
    "triplets": "--max-steps 4 --text-columns sent0,sent1,hard_neg --prompt bert --denoise trained",
}
# Encoders with parameters that get no gradient: for global attention, and for a mask that there is not.
UNUSED = {
    "longformer": LongformerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_window=8,
        max_position_embeddings=130,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        vocab_size=500,
        pad_token_id=0,
    ),
    "xlnet": XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, dropout=0.0, vocab_size=500),
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
    # Dropout: each rank has random numbers of its own.
    save_tiny_model(root / "noisy", pooling="mean", std=0.2)
    for name, config in UNUSED.items():
        torch.manual_seed(0)
        SentenceEncoder(AutoModel.from_config(config), tiny_tokenizer(), pooling="mean").save(root / name)
    return root


def arguments(place: Path, name: str, output: Path) -> list[str]:
    file = "triplets.csv" if name == "triplets" else "sentences.txt"
    more = [*RUNS[name].split(), "--no-tensorboard"]
    if name == "published":
        more += ["--sts-dir", str(place / "sts")]
    return flags(place / "model", place / file, output, *more)


def run_under_torchrun(job: dict) -> str:
    """Start two ranks, of which one fails; returns what they said. A hang would last an hour."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # One thread each: of a model this small two threads only wait for each other.
    done = subprocess.run(
        [*command, train_distributed_worker.__file__, json.dumps(job)],
        capture_output=True,
        encoding="utf-8",
        timeout=1800,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run(job: dict, folder: Path) -> str:
    """The same without torchrun, which takes long to start: no rank waits for one that is gone."""
    found = ranks.start(2, folder / "meeting", train_distributed_worker.run, job, str(folder))
    assert all(ranks.exit_codes(found))
    return "".join((folder / f"rank-{rank}").read_text(encoding="utf-8") for rank in range(2))


def noisy(place: Path, output: Path) -> list[str]:
    more = (
        "--max-steps 6 --eval-steps 3 --checkpoint-steps 2 --accumulation-steps 2 --mlm-weight 0.1 --resume"
    )
    given = ["--sts-dir", str(place / "sts"), "--no-tensorboard", *more.split()]
    return flags(place / "noisy", place / "sentences.txt", output, *given)


def test_two_ranks(place, tmp_path):
    """They train as one process does, and an error on one ends both: in two starts, as a start is slow."""
    whole, broken = (noisy(place, tmp_path / name) for name in ("whole", "broken"))
    runs = [*(arguments(place, name, tmp_path / name) for name in RUNS), whole, broken]
    fails = {"rank": 1, "method": "train_step", "step": 5, "run": "broken"}
    said = run_under_torchrun({"runs": runs, "fails": fails})
    assert "clusterns: error: rank 1: train_step: expected to go on, was made to fail at step 5" in said
    for name in RUNS:
        assert main(arguments(place, name, tmp_path / "one" / name)) == 0
        ends_as_one(name, place / "model", tmp_path / name, tmp_path / "one" / name)
    # The run that broke between two checkpoints goes on; then rank 0 fails, and the other waits for a score.
    again = arguments(place, "published", tmp_path / "judged")
    fails = {"rank": 0, "method": "judge", "step": 2, "run": "judged"}
    more = ["--max-steps", "3", "--no-tensorboard"]
    odd = [flags(place / name, place / "sentences.txt", tmp_path / name, *more) for name in UNUSED]
    said = run({"runs": [broken, *odd, again], "fails": fails}, tmp_path)
    assert "going on after step 4" in said
    assert "clusterns: error: judge: expected to go on, was made to fail at step 3" in said
    ends_alike(tmp_path / "broken", tmp_path / "whole")
    for name in UNUSED:
        assert main(flags(place / name, place / "sentences.txt", tmp_path / "one" / name, *more)) == 0
        ends_as_one(name, place / name, tmp_path / name, tmp_path / "one" / name)


def ends_as_one(name: str, start: Path, mine: Path, theirs: Path) -> None:
    """Figures, weights and clustering state, up to rounding."""
    records, others = ([record for record in log_of(folder) if "loss" in record] for folder in (mine, theirs))
    assert len(records) == len(others) > 0
    for record, other in zip(records, others, strict=True):
        assert record.keys() == other.keys()
        for key in record.keys() - {"seconds"}:
            assert record[key] == pytest.approx(other[key], rel=2e-3, abs=2e-4), (name, key)
    # Denoising takes away what the template alone gives, which leaves some gradients little but rounding.
    assert_trained_alike(start, mine, theirs, 0.06 if name == "triplets" else 0.005)
    ours, expected = (load_file(folder / "loss.safetensors") for folder in (mine, theirs))
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        assert_close(value, expected[key], 1e-2)
    assert any("dev" in record for record in log_of(mine)) == (name == "published")


def ends_alike(one: Path, other: Path) -> None:
    """To the bit: weights, clustering state, checkpoint and log."""
    for file in ("model.safetensors", "loss.safetensors", "checkpoints/step-00000006/modules.safetensors"):
        ours, theirs = (load_file(folder / file) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), file
    ours, theirs = (log_of(folder) for folder in (one, other))
    for record in (*ours, *theirs):
        record.pop("seconds")
    assert ours == theirs
