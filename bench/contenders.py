"""Problems and contenders that the timing and the memory benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from baselines import (
    Settings,
    eager_formula,
    eager_info_nce,
    linear_cross_entropy_info_nce,
    published_formulation,
)
from torch import Tensor

import clusterns

SETTINGS = Settings()
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def problem(batch: int, dim: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and positives (B, D) around K centers, both wanting gradients, and the centers (K, D)."""
    generator = torch.Generator().manual_seed(0)
    centers = 0.8 * torch.randn(clusters, dim, generator=generator)
    members = torch.randint(clusters, (batch,), generator=generator)
    anchors = centers[members] + torch.randn(batch, dim, generator=generator)
    positives = anchors + 3 * torch.randn(batch, dim, generator=generator)
    return anchors.requires_grad_(), positives.requires_grad_(), centers


def _ours(anchors: Tensor, positives: Tensor, centroids: Tensor) -> Tensor:
    return clusterns.info_nce(
        anchors,
        positives,
        temperature=SETTINGS.temperature,
        centroids=centroids,
        false_negatives="bml",
        bml_weight=SETTINGS.bml_weight,
        bml_alpha=SETTINGS.bml_alpha,
        bml_beta=SETTINGS.bml_beta,
    )


# The whole objective for given centroids: assignment, hard negatives, margin loss.
OBJECTIVE: dict[str, Loss] = {
    "clusterns": _ours,
    "eager formula": lambda a, p, c: eager_formula(a, p, c, SETTINGS),
    "published formulation": lambda a, p, c: published_formulation(a, p, c, SETTINGS),
}

# Plain InfoNCE.
PLAIN: dict[str, Loss] = {
    "clusterns": lambda a, p, c: clusterns.info_nce(a, p, temperature=SETTINGS.temperature),
    "eager": lambda a, p, c: eager_info_nce(a, p, SETTINGS),
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    PLAIN["linear_cross_entropy"] = lambda a, p, c: linear_cross_entropy_info_nce(min(len(a), 1024))(
        a, p, SETTINGS
    )


def paired_ratio(theirs: Callable[[], None], ours: Callable[[], None], rounds: int) -> float:
    """Median over rounds of their time over ours, taken back to back, since a shared machine drifts."""
    ratios = []
    for _ in range(rounds):
        times = []
        for run in (theirs, ours):
            run()  # what the other left in the caches and the allocator is not this one's cost
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def step(loss: Loss, anchors: Tensor, positives: Tensor, centroids: Tensor) -> Callable[[], None]:
    """Forward and backward once, gradients written afresh."""

    def run() -> None:
        anchors.grad = positives.grad = None
        loss(anchors, positives, centroids).backward()

    return run
