"""Run by torchrun: gradients under DistributedDataParallel against those of one process with all rows."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch.nn.parallel import DistributedDataParallel

from clusterns.sentence_transformers import ClusterNSLoss

TEXTS = ["a cat sat", "the dog ran", "bird", "the bird ran far", "a dog sat slowly", "mat", "home", "far far"]
OTHERS = ["the cat", "a dog", "bird bird", "far bird", "dog slowly sat", "the mat", "slowly home", "far"]


def step(model, loss, rows):
    bare = getattr(model, "module", model)
    columns = [dict(bare.preprocess(texts[rows])) for texts in (TEXTS, OTHERS)]
    bare.zero_grad()
    value = loss(columns, None)
    value.backward()
    return value.detach(), [p.grad.clone() for p in bare.parameters() if p.grad is not None]


def compare(folder: str, mini_batch_size: int | None) -> None:
    settings = {"mini_batch_size": mini_batch_size, "start_cosine": 1.0, "centroid_momentum": 0.1}
    alone, shared = (SentenceTransformer(folder, device="cpu").train() for _ in range(2))
    wrapped = DistributedDataParallel(shared, find_unused_parameters=True)
    rows = (slice(0, 3), slice(3, 8))[dist.get_rank()]  # as ragged as a last batch
    of_one = ClusterNSLoss(alone, 3, **settings)
    of_all = ClusterNSLoss(shared, 3, gather_across_devices=True, **settings)
    of_all.model = wrapped  # as the Trainer does
    for number in range(3):
        torch.manual_seed(number)  # of the first pick
        value, gradients = step(alone, of_one, slice(0, 8))
        torch.manual_seed(number)
        of_ranks, averaged = step(wrapped, of_all, rows)
        torch.testing.assert_close(of_ranks, value, rtol=1e-5, atol=1e-6)
        assert len(gradients) == len(averaged) > 10
        for one, other in zip(averaged, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(of_all.objective.centroids, of_one.objective.centroids)
    assert bool(of_all.objective.initialized)


def main() -> None:
    dist.init_process_group("gloo")
    for mini_batch_size in (None, 3):
        compare(sys.argv[1], mini_batch_size)
    if dist.get_rank() == 0:
        print("ranks agree with one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
