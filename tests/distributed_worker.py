"""One rank of the test in test_distributed.py; started by torchrun."""

from __future__ import annotations

import gc
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clusterns import ClusterNSLoss

DIM, WIDTH, STEPS = 10, 8, 4
ROWS = (13, 7, 11)  # ragged on purpose


def data(step: int, world_size: int):
    """Both views and the mined negatives of the whole batch, and the rows of each rank."""
    generator = torch.Generator().manual_seed(step)
    rows = ROWS[:world_size]
    total = sum(rows)
    views = [torch.randn(total, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [list(view.split(rows)) for view in views]


def encoder() -> torch.nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(5)
    return torch.nn.Linear(DIM, WIDTH).double()


def train(model, loss_fn, step_data, wrap_negatives: bool):
    """Four optimiser steps; returns weights, centroids and losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for anchors, positives, negatives in step_data:
        embedded = model(torch.cat([anchors, positives, negatives]))
        a, p, n = embedded.split([len(anchors), len(positives), len(negatives)])
        loss = loss_fn(a, p, n if wrap_negatives else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def run(output: str) -> None:
    """Train this rank's share; rank 0 writes what it ended with."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(100 + rank)  # ranks draw different first picks unless rank 0's is broadcast
    result = {}
    for wrap_negatives in (False, True):
        model = DistributedDataParallel(encoder())
        torch.manual_seed(100 + rank)
        loss_fn = ClusterNSLoss(WIDTH, 4, start_cosine=1.0, bml_weight=0.1, process_group=dist.group.WORLD)
        shares = [[part[rank] for part in data(step, world_size)] for step in range(STEPS)]
        losses = train(model, loss_fn, shares, wrap_negatives)
        everyone = [torch.empty_like(loss_fn.centroids) for _ in range(world_size)]
        dist.all_gather(everyone, loss_fn.centroids)
        assert all(torch.equal(c, everyone[0]) for c in everyone), "ranks hold different centroids"
        result[wrap_negatives] = {
            "weight": model.module.weight.detach(),
            "centroids": loss_fn.centroids,
            "losses": torch.stack(losses),
        }
    if rank == 0:
        torch.save(result, output)


def main(output: str) -> None:
    """Run inside a process group, and leave it cleanly.

    The group's threads must end while the interpreter lives, or the process may abort as it exits. They
    end with the last reference to the group, and DistributedDataParallel holds some in a cycle: so `run`
    is a function of its own, whose locals are gone when the group is destroyed.
    """
    dist.init_process_group("gloo")
    run(output)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
