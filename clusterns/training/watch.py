"""What to watch while a run learns: cosines, cluster occupancy, and warnings that say what to do.

All of it is computed on the steps that are logged, and only there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional import nearest_centroids
from ..loss import ClusterNSLoss
from ..objective.norms import unit_rows, without_autocast

# Anchors whose softmax is looked at; all of their negatives are.
SAMPLED_ANCHORS = 256
# Steps before which embeddings may look collapsed, and logged steps in a row that a warning takes.
EARLIEST_STEP, IN_A_ROW = 50, 3
# A largest cluster with this share of the batch, or a positive this little above the mean, is a collapse.
LARGEST_SHARE, LEAST_GAP = 0.5, 0.05


@torch.no_grad()
def measure(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    loss_fn: ClusterNSLoss,
    clustered: bool,
) -> dict[str, Tensor]:
    """What `loss_fn.last` does not tell of a batch, 0-d tensors on the device.

    Args:
        anchors, positives: (B, D) embeddings of the whole batch, raw.
        negatives: (N, D) mined hard negatives, or None.
        loss_fn: after its step on that batch.
        clustered: whether clustering was active in that step.

    Always `effective_negatives`: the number of equally hard negatives that would weigh as these do, exp of
    the entropy of the softmax over all that is not the positive, mean over up to 256 anchors. With clustering
    also `mates_cosine` (between views of two sentences of one cluster; 0 where no sentence has a mate),
    `centroids_cosine` (between two different ones), `empty_clusters`, `largest_cluster` (share of the batch)
    and `cluster_entropy` (of the occupancy; 1 where all clusters are equally full).
    """
    with without_autocast(anchors.device):
        a, _ = unit_rows(anchors.float(), torch.float32)  # (B, D)
        p, _ = unit_rows(positives.float(), torch.float32)  # (B, D)
        found: dict[str, Tensor] = {}
        hard: list[Tensor] = []  # what stands beside the positives as negatives, unit rows
        counts: list[Tensor] = []  # how often each of them does
        if negatives is not None:
            hard.append(unit_rows(negatives.float(), torch.float32)[0])
            counts.append(torch.ones_like(hard[0][:, 0]))
        if clustered:
            near = nearest_centroids(anchors.float(), loss_fn.centroids)
            c, _ = unit_rows(loss_fn.centroids, torch.float32)  # (K, D)
            found |= _occupancy(a, p, c, near.nearest)
            if loss_fn.hard_negatives:
                hard.append(c)
                counts.append(torch.bincount(near.runner_up, minlength=len(c)).float())
        found["effective_negatives"] = _effective_negatives(a, p, hard, counts, loss_fn.temperature)
    return found


def _occupancy(a: Tensor, p: Tensor, c: Tensor, nearest: Tensor) -> dict[str, Tensor]:
    """Terms of unit rows a, p (B, D), centroids c (K, D) and cluster ids (B,); no B×B matrix is made."""
    size = torch.bincount(nearest, minlength=len(c)).float()  # (K,)
    sums = [torch.zeros_like(c).index_add_(0, nearest, side) for side in (a, p)]  # (K, D) each
    pairs = (size * (size - 1)).sum()
    mates = (sums[0] * sums[1]).sum() - (a * p).sum()
    share = size / size.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    k = len(c)
    return {
        "mates_cosine": torch.where(pairs > 0, mates / pairs.clamp_min(1), 0.0),
        "centroids_cosine": (c.sum(dim=0).square().sum() - k) / max(k * (k - 1), 1),
        "empty_clusters": (size == 0).sum().float(),
        "largest_cluster": share.max(),
        "cluster_entropy": entropy / math.log(max(k, 2)),
    }


def _effective_negatives(
    a: Tensor, p: Tensor, hard: list[Tensor], counts: list[Tensor], temperature: float | Tensor
) -> Tensor:
    """Mean over sampled anchors of exp(entropy) of the softmax over their negatives."""
    rows = min(len(a), SAMPLED_ANCHORS)
    places = torch.arange(rows, device=a.device) * len(a) // rows  # evenly over the batch, so over the ranks
    columns = torch.cat([p, *hard])  # (B + N + K, D)
    weight = torch.cat([torch.ones_like(p[:, 0]), *counts])  # (B + N + K,)
    logits = a[places] @ columns.T / temperature + weight.log()  # (rows, B + N + K)
    logits[torch.arange(rows, device=a.device), places] = -torch.inf
    log_share = logits.log_softmax(dim=1)
    share = log_share.exp()
    # A column that stands for n equal negatives has n shares of share / n.
    each = torch.where(share > 0, log_share - weight.log(), 0.0)
    return (-(share * each).sum(dim=1)).exp().mean()


class Watch:
    """Warns of runs that go wrong, once of each kind. A warning is its name and a text that says what to do.

    Args:
        loss_fn: whose settings the advice names.

    """

    def __init__(self, loss_fn: ClusterNSLoss) -> None:
        self.loss_fn = loss_fn
        self.lowest_cosine: float | None = None
        self.lowest_step = 0
        self.in_a_row: dict[str, int] = {}
        self.told: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""
        names = ("lowest_cosine", "lowest_step", "in_a_row", "told")
        return {name: copy.copy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in self.state_dict():
            setattr(self, name, copy.copy(state[name]))

    def start(self, cosine: float) -> tuple[str, str]:
        """Of clustering, at this mean cosine."""
        return (
            "clustering starts",
            f"clustering starts with {self.loss_fn.num_clusters} centroids "
            f"(mean cosine {cosine:.3f} <= {self.loss_fn.start_cosine})",
        )

    def look(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """At the figures of a logged step; yields warnings."""
        cosine, positive = values["mean_cosine"], values["positive_cosine"]
        if not self.loss_fn.clustering_active and (self.lowest_cosine is None or cosine < self.lowest_cosine):
            self.lowest_cosine, self.lowest_step = cosine, step
        if self._lasts("embeddings collapsed", step >= EARLIEST_STEP and positive - cosine < LEAST_GAP):
            yield (
                "embeddings collapsed",
                f"two views of a sentence (cosine {positive:.3f}) are hardly more alike than any two "
                f"sentences ({cosine:.3f}); lower --learning-rate, and see whether the sentences differ",
            )
        share, clusters = values.get("largest_cluster", 0.0), self.loss_fn.num_clusters
        if self._lasts("clusters collapsed", clusters > 2 and share >= LARGEST_SHARE):
            yield (
                "clusters collapsed",
                f"one of {clusters} clusters holds {share:.0%} of the batch and "
                f"{values['empty_clusters']:.0f} are empty; lower --start-cosine, so that they are seeded "
                "from sentences further apart, or lower --centroid-momentum",
            )

    def end(self, step: int) -> Iterator[tuple[str, str]]:
        """Of the run; yields a warning where clustering, though wanted, has never started."""
        if not self.loss_fn.num_clusters or self.loss_fn.clustering_active or self.lowest_cosine is None:
            return
        yield (
            "clustering never started",
            f"clustering never started, all {step} steps were plain InfoNCE: the lowest mean cosine seen was "
            f"{self.lowest_cosine:.3f}, at step {self.lowest_step}, while --start-cosine is "
            f"{self.loss_fn.start_cosine:g}; raise it above {self.lowest_cosine:.2f}, or train longer",
        )

    def _lasts(self, name: str, is_so: bool) -> bool:
        """Whether it is so on several logged steps in a row, for the first time."""
        self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if is_so else 0
        if self.in_a_row[name] < IN_A_ROW or name in self.told:
            return False
        self.told.append(name)
        return True
