"""One rank of the test of several ranks in test_cached.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clusterns.cached import CachedClusterNSLoss

DIM, WIDTH, STEPS = 10, 8, 4
ROWS = (13, 7)  # four mini-batches and two of each part


class Encoder(nn.Module):
    """The same weights on every rank, and a buffer, which DistributedDataParallel broadcasts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(DIM, 12), nn.Tanh(), nn.Linear(12, WIDTH)).double()
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings (rows, WIDTH)."""
        return self.scale * self.layers(inputs)


def data(step: int) -> list[list[torch.Tensor]]:
    """Both views and the mined negatives, each as the rows of every rank."""
    generator = torch.Generator().manual_seed(step)
    parts = [torch.randn(sum(ROWS), DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [list(part.split(ROWS)) for part in parts]


def train(model: nn.Module, loss_of, batches) -> torch.Tensor:
    """A few optimiser steps; returns the losses (steps,)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for parts in batches:
        loss = loss_of(*parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def run(output: str) -> None:
    """Train this rank's share in both ways to name `no_sync`; rank 0 writes what it ended with."""
    rank = dist.get_rank()
    result = {}
    for how in ("encode is the module", "no_sync is given"):
        model = DistributedDataParallel(Encoder())
        all_reduces = []

        def count_and_average(state, bucket, all_reduces=all_reduces):
            all_reduces.append(bucket.index())
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, count_and_average)
        torch.manual_seed(100 + rank)  # ranks draw different first picks unless rank 0's is broadcast
        loss_fn = CachedClusterNSLoss(
            WIDTH, 4, mini_batch_size=4, start_cosine=1.0, bml_weight=0.1, process_group=dist.group.WORLD
        )

        def loss_of(*parts, how=how, model=model, loss_fn=loss_fn):
            if how == "encode is the module":
                return loss_fn(model, *parts)
            return loss_fn(lambda inputs: model(inputs), *parts, no_sync=model.no_sync)

        batches = [[part[rank] for part in data(step)] for step in range(STEPS)]
        losses = train(model, loss_of, batches)
        result[how] = {
            "weights": {name: value.detach() for name, value in model.module.named_parameters()},
            "centroids": loss_fn.centroids,
            "losses": losses,
            "all_reduces": len(all_reduces),
        }
    if rank == 0:
        torch.save(result, output)
