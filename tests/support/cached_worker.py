"""One rank of the test of several ranks in test_cached.py, and the one process that it is compared with."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clusterns import CachedClusterNSLoss, ClusterNSLoss

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


def train(how: str | None = None, gather: str = "all") -> dict:
    """What a few optimiser steps end with: of a rank's share, in one way to name `no_sync`, or of all."""
    model, all_reduces = Encoder(), []
    settings = {"num_clusters": 4, "start_cosine": 1.0, "bml_weight": 0.1}
    if how is None:
        rank, loss_fn = 0, ClusterNSLoss(WIDTH, **settings)
        loss_of = lambda *parts: loss_fn(*map(model, parts))  # noqa: E731
    else:
        rank, encode = dist.get_rank(), DistributedDataParallel(model)
        loss_fn = CachedClusterNSLoss(
            WIDTH, mini_batch_size=4, process_group=dist.group.WORLD, gather=gather, **settings
        )

        def count_and_average(state, bucket):
            all_reduces.append(bucket.index())
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        encode.register_comm_hook(None, count_and_average)
        loss_of = partial(loss_fn, encode)
        if how == "no_sync is given":
            loss_of = partial(loss_fn, lambda inputs: encode(inputs), no_sync=encode.no_sync)
    torch.manual_seed(100 + rank)  # ranks draw different first picks unless rank 0's is broadcast
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        both = [torch.randn(sum(ROWS), DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
        loss = loss_of(*(both if how is None else [part.split(ROWS)[rank] for part in both]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert loss_fn.clustering_active
    weights = {name: value.detach() for name, value in model.named_parameters()}
    found = {"losses": torch.stack(losses), "weights": weights, "centroids": loss_fn.centroids}
    return found | ({} if how is None else {"all_reduces": len(all_reduces)})


def run(output: str) -> None:
    """Train this rank's share in both ways; rank 0 writes what it ended with."""
    ways = {"encode is the module": "all", "no_sync is given": "ring"}
    result = {how: train(how, gather) for how, gather in ways.items()}
    if dist.get_rank() == 0:
        torch.save(result, output)
