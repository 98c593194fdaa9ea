"""Several real processes must give what one process gives on the concatenated batch, or all fail."""

from __future__ import annotations

import os
from pathlib import Path

import distributed_worker
import pytest
import ranks
import torch
import torch.distributed as dist

from clusterns import ClusterNSLoss
from clusterns.objective.torch_products import TorchProducts

EXIT_CODE = 17  # of the rank that dies


def test_ranks_equal_one_process(tmp_path):
    """Four of them, three and two."""
    found = ranks.start(4, tmp_path / "store", distributed_worker.run, str(tmp_path))
    assert ranks.exit_codes(found) == [0] * 4
    checked = sorted(path.name for path in tmp_path.glob("* ranks"))
    assert checked == ["2 ranks", "3 ranks", "4 ranks"]


def test_cost_of_a_rank(tmp_path):
    """Of four, in operations and bytes, and what it sends while it computes."""
    found = ranks.start(4, tmp_path / "store", distributed_worker.check_cost, 1024, 64)
    assert ranks.exit_codes(found) == [0] * 4


def die_amid_a_step(gather, folder):
    """Three steps of a rank; on rank 1 the second ends after its first sweep, with blocks on their way."""
    note, close = Path(folder, str(dist.get_rank())), TorchProducts.close
    loss_fn = ClusterNSLoss(8, 3, start_cosine=1.0, process_group=dist.group.WORLD, gather=gather)

    def dying(*arguments):
        close(*arguments)
        note.write_text("dies", encoding="utf-8")
        os._exit(EXIT_CODE)

    for step in (1, 2, 3):
        if step == 2 and dist.get_rank() == 1:
            TorchProducts.close = dying
        try:
            loss_fn(*torch.randn(2, 6, 8, requires_grad=True)).backward()
        except Exception as error:
            note.write_text(f"step {step} raised {type(error).__name__}", encoding="utf-8")
            raise


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_ranks_raise_by_themselves_when_one_dies(tmp_path, gather):
    found = ranks.start(3, tmp_path / "store", die_amid_a_step, gather, str(tmp_path))
    assert ranks.exit_codes(found) == [1, EXIT_CODE, 1]
    notes = [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(3)]
    assert notes == ["step 2 raised RuntimeError", "dies", "step 2 raised RuntimeError"]
