"""One rank of the tests of sudden death in test_distributed.py: rank 1 dies amid its second step."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from clusterns import ClusterNSLoss
from clusterns.objective.torch_products import TorchProducts

EXIT_CODE = 17  # of the rank that dies
WIDTH, ROWS = 8, 6


def main(gather: str, folder: str) -> None:
    rank = dist.get_rank()
    note = Path(folder) / str(rank)
    loss_fn = ClusterNSLoss(WIDTH, 3, start_cosine=1.0, process_group=dist.group.WORLD, gather=gather)
    close = TorchProducts.close

    def dying(*arguments):
        """The first sweep of the step is done, blocks and gradients are still on their way."""
        close(*arguments)
        note.write_text("dies", encoding="utf-8")
        os._exit(EXIT_CODE)

    for step in (1, 2, 3):
        if step == 2 and rank == 1:
            TorchProducts.close = dying
        a, p = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
        try:
            loss_fn(a, p).backward()
        except Exception as error:
            note.write_text(f"step {step} raised {type(error).__name__}", encoding="utf-8")
            raise
