"""Two real processes train as one does on the same batches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import ranks
import torch
import train_problems
from safetensors.torch import load_file
from tiny import assert_close
from train_problems import command, log_of, run, write_place
from transformers import XLNetConfig, XLNetModel

from clusterns import train
from clusterns.cli import main
from clusterns.encoder import SentenceEncoder

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")
TWICE = "--max-steps 4 --accumulation-steps 2"
# What is computed by one process and by two, on the same batches and without dropout: name -> model, flags.
RUNS = {
    "published": ("still", "STS --max-steps 4 --eval-steps 2"),
    "options": ("still", f"{TWICE} --learn-temperature --gather ring --num-workers 1"),
    "cached": ("still", f"{TWICE} --mini-batch-size 5"),
    "triplets": (
        "still",
        "--max-steps 4 --prompt bert --denoise trained --text-columns sent0,sent1,hard_neg",
    ),
    # With parameters that get no gradient: for a mask that there is not.
    "xlnet": ("xlnet", "--max-steps 2"),
}
# With dropout: each rank has random numbers of its own.
NOISY = (
    "STS --max-steps 6 --eval-steps 3 --checkpoint-steps 2 --accumulation-steps 2 --mlm-weight 0.1 --resume"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = write_place(tmp_path_factory.mktemp("distributed"))
    torch.manual_seed(0)
    xlnet = XLNetModel(XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, dropout=0.0, vocab_size=500))
    tokenizer = SentenceEncoder.from_pretrained(root / "still").tokenizer
    SentenceEncoder(xlnet, tokenizer, pooling="mean").save(root / "xlnet")
    return root


def names(name: str) -> dict[str, str]:
    """The model and the file of one of RUNS."""
    return {"model": RUNS[name][0], "file": "triplets.csv" if name == "triplets" else "sentences.txt"}


def train_all(runs: list[list[str]], fails: dict, folder: str) -> None:
    """On one rank, with the environment that torchrun makes; on one of them a method fails from a step on."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    descriptor = os.open(os.path.join(folder, f"rank-{rank}"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    method = getattr(train.Run, fails["method"])

    def failing(self, *arguments, **keywords):
        if self.step >= fails["step"] and self.output.name == fails["run"]:
            raise ValueError(f"{fails['method']}: expected to go on, was made to fail at step {self.step}")
        return method(self, *arguments, **keywords)

    if rank == fails["rank"]:
        setattr(train.Run, fails["method"], failing)
    train.draw_run = lambda records, path, *_: path.touch()  # most of the time of a tiny run
    for arguments in runs:
        if status := main(arguments):
            sys.exit(status)


def said_by_two(folder: Path, runs: list[list[str]], **fails: object) -> str:
    """What two ranks say, of which one fails in the end: none waits for one that is gone."""
    folder.mkdir()
    found = ranks.start(2, folder / "meeting", train_all, runs, fails, str(folder))
    assert ranks.exit_codes(found) == [2, 2]
    return "".join((folder / f"rank-{rank}").read_text(encoding="utf-8") for rank in range(2))


def test_two_ranks(place, tmp_path):
    """They train as one process does, and an error on one ends both: in two starts, as a start is slow."""
    runs = [command(place, tmp_path / name, RUNS[name][1], **names(name)) for name in RUNS]
    whole, broken = (command(place, tmp_path / name, NOISY) for name in ("whole", "broken"))
    fails = {"rank": 1, "method": "train_step", "step": 5, "run": "broken"}
    said = said_by_two(tmp_path / "first", [*runs, whole, broken], **fails)
    assert "clusterns: error: rank 1: train_step: expected to go on, was made to fail at step 5" in said
    assert "clusterns: error: lost the other processes of the run" in said
    for name, (model, more) in RUNS.items():
        run(place, tmp_path / "one" / name, more, **names(name))
        assert_ends_as_one(name, place / model, tmp_path / name, tmp_path / "one" / name)
    # The run that broke between two checkpoints goes on; then rank 0 fails, and the other waits for a score.
    judged = command(place, tmp_path / "judged", RUNS["published"][1])
    fails = {"rank": 0, "method": "judge", "step": 2, "run": "judged"}
    said = said_by_two(tmp_path / "second", [broken, judged], **fails)
    assert "going on after step 4" in said
    assert "clusterns: error: judge: expected to go on, was made to fail at step 2" in said
    train_problems.assert_ends_alike(tmp_path / "broken", tmp_path / "whole")


def assert_ends_as_one(name: str, start: Path, mine: Path, theirs: Path) -> None:
    """Figures, weights and clustering state, up to rounding."""
    records, others = ([record for record in log_of(folder) if "loss" in record] for folder in (mine, theirs))
    assert len(records) == len(others) > 0
    for record, other in zip(records, others, strict=True):
        assert record.keys() == other.keys()
        for key in record.keys() - {"seconds"}:
            assert record[key] == pytest.approx(other[key], rel=2e-3, abs=2e-4), (name, key)
    # Denoising takes away what the template alone gives, which leaves some gradients little but rounding.
    train_problems.assert_trained_alike(start, mine, theirs, 0.06 if name == "triplets" else 0.005)
    ours, expected = (load_file(folder / "loss.safetensors") for folder in (mine, theirs))
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        assert_close(value, expected[key], 1e-2)
    assert any("dev" in record for record in log_of(mine)) == (name == "published")
