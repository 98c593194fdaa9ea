"""Several real processes must give what one process gives on the concatenated batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch

from clusterns import ClusterNSLoss


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(tmp_path, world_size):
    output = tmp_path / "rank0.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    subprocess.run(
        [*command, str(world_size), str(Path(worker.__file__)), str(output)],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ranks = torch.load(output, weights_only=True)
    for with_negatives, result in ranks.items():
        torch.manual_seed(100)  # rank 0's generator
        model = worker.encoder()
        torch.manual_seed(100)
        loss_fn = ClusterNSLoss(worker.WIDTH, 4, start_cosine=1.0, bml_weight=0.1)
        whole = [[torch.cat(part) for part in worker.data(step, world_size)] for step in range(worker.STEPS)]
        losses = worker.train(model, loss_fn, whole, with_negatives)
        assert loss_fn.clustering_active
        torch.testing.assert_close(result["losses"], torch.stack(losses))
        torch.testing.assert_close(result["weight"], model.weight.detach())
        torch.testing.assert_close(result["centroids"], loss_fn.centroids)
