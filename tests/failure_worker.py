"""One rank of the tests of sudden death in test_distributed.py: rank 1 dies amid its second step."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from clusterns import ClusterNSLoss, chunked

EXIT_CODE = 17  # of the rank that dies
WIDTH, ROWS = 8, 6


def main(gather: str, meeting: str, folder: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Longer than the tests wait: the others must notice the death itself, not that time has passed.
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=90)
    )
    note = Path(folder) / str(rank)
    loss_fn = ClusterNSLoss(WIDTH, 3, start_cosine=1.0, process_group=dist.group.WORLD, gather=gather)
    sweep = chunked.Sweeper.sweep

    def dying(*arguments):
        """The first sweep of the step is done, blocks and gradients are still on their way."""
        sweep(*arguments)
        note.write_text("dies")
        os._exit(EXIT_CODE)

    for step in (1, 2, 3):
        if step == 2 and rank == 1:
            chunked.Sweeper.sweep = dying
        a, p = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
        try:
            loss_fn(a, p).backward()
        except Exception as error:
            note.write_text(f"step {step} raised {type(error).__name__}")
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
