"""Started by torchrun: several trainings one after the other, perhaps with a rank that fails.

train_distributed_worker.py '{"runs": [[arguments], ...], "fails": {"rank": 1, "method": "judge", "step": 3}}'
"""

from __future__ import annotations

import json
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


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if "fails" in job:
        fail(**job["fails"])
    train.draw_run = lambda records, path: path.touch()  # most of the time of a tiny run
    torch.distributed.init_process_group("gloo")
    for arguments in job["runs"]:
        status = main(arguments)
        if status:
            sys.exit(status)
