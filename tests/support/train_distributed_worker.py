"""A rank of several trainings one after the other, of which one fails."""

from __future__ import annotations

import os
import sys

import torch

from clusterns import train
from clusterns.cli import main


def fail(rank: int, method: str, step: int, run: str) -> None:
    """Make a method of one run raise on one rank from a step on."""
    whole = getattr(train.Run, method)

    def failing(self, *arguments, **keywords):
        if self.step >= step and self.output.name == run:
            raise ValueError(f"{method}: expected to go on, was made to fail at step {self.step}")
        return whole(self, *arguments, **keywords)

    if int(os.environ["RANK"]) == rank:
        setattr(train.Run, method, failing)


def run(runs: list[list[str]], fails: dict, printed: str) -> None:
    """With the environment that torchrun makes, and what is said in a file of the folder `printed`."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    descriptor = os.open(os.path.join(printed, f"rank-{rank}"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    fail(**fails)
    train.draw_run = lambda records, path: path.touch()  # most of the time of a tiny run
    for arguments in runs:
        status = main(arguments)
        if status:
            sys.exit(status)
