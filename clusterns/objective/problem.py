"""What a batch is made of, and what the identities of the objective say without a product.

Notation: B sentences of the whole batch, M rows of them on this process, n positives and N explicit negatives
at hand, K centroids, D dimensions; a, p, c unit rows; S_ij = a_i·p_j, s_i = S_ii; logits are cosines over τ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import Rule

# For a chunk of logits and its temporaries, or for the cosines of a whole batch on the Triton path: on a CPU,
# and at most on a GPU. There it is what a chunk of 5,632 rows takes at B = 65,536, which fills an H200 (132
# multiprocessors) with tiles of a product at D = 768.
WORKSPACE_BYTES = 256 * 2**20
GPU_WORKSPACE_BYTES = 896 * 2**20

SAFE_WEIGHT = 20.0  # largest |w| that needs no row maximum

DIRECTIONS = ("one", "both")

Needs = tuple[bool, bool, bool, bool]  # gradients wanted: anchors, positives, negatives, temperature


class Options(NamedTuple):
    """w, what happens to false negatives, λ, α, β, the memory for logits, and who looks for whom."""

    hard_negative_weight: float = 0.0
    false_negatives: str | Rule = "keep"
    bml_weight: float = 1e-4
    bml_alpha: float = 0.2
    bml_beta: float = 0.5
    workspace_bytes: int | None = None
    directions: str = "one"  # anchors look for positives; in "both", also positives for anchors

    @property
    def margin_at_zero(self) -> float:
        """What each cell with Δ = 0 adds to the margin loss, relu(α) + relu(−β): all but a few cells."""
        return max(0.0, self.bml_alpha) + max(0.0, -self.bml_beta)

    def workspace(self, device: torch.device, columns: int = 0) -> int:
        """Bytes for a chunk; on a GPU by default no more than a quarter of what is free, by halves.

        columns: bytes that these and their gradient take, read and written by every chunk. A larger workspace
        than they are would save little of the memory that a batch takes, a smaller one much time.
        """
        if self.workspace_bytes is not None:
            return self.workspace_bytes
        if device.type != "cuda":
            return WORKSPACE_BYTES
        most = max(GPU_WORKSPACE_BYTES, columns)
        if not torch.cuda.is_current_stream_capturing():
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + kept
            while most > WORKSPACE_BYTES // 4 and most > free // 4:
                most //= 2
        return most

    def is_safe(self, temperature: float | Tensor, largest_logit: float) -> bool:
        """Whether exp(cos/τ), and sums of 2^40 of them, fit the dtype without a row maximum (identity 3)."""
        known = not isinstance(temperature, Tensor) and 1.0 / temperature <= largest_logit
        return known and abs(self.hard_negative_weight) <= SAFE_WEIGHT


class Update(NamedTuple):
    """How the centroids move in a step: towards the "sum" or the "mean" of their members, by γ."""

    statistic: str
    momentum: float


class Known(NamedTuple):
    """What an assignment has computed already, where it is small enough to keep."""

    anchors: Tensor  # (M, D) unit rows
    anchor_scale: Tensor  # (M, 1) 1/‖anchor‖
    centroids: Tensor  # (K, D) unit rows
    cosines: Tensor  # (M, K) of both


class Clusters(NamedTuple):
    """What clustering says of the M rows of a process; nothing here gets a gradient."""

    ids: Tensor | None = None  # (M,): rows of one id are false negatives of each other
    centroids: Tensor | None = None  # (K, D), raw: hard negatives
    hard_ids: Tensor | None = None  # (M,) int64: the centroid that is row i's hard negative
    nearest_cosine: Tensor | None = None  # (M,) with the centroid of a row's own cluster
    runner_up_cosine: Tensor | None = None  # (M,)
    known: Known | None = None
    # For the kernels, which assign where `ids` or `hard_ids` are missing, after an update.
    hard_negatives: bool = True
    update: Update | None = None


class Batch(NamedTuple):
    """What the objective is of: the rows of a process, which may be a part of the batch."""

    anchors: Tensor  # (M, D)
    positives: Tensor  # (M, D), row i belongs to anchor i
    negatives: Tensor | None = None  # (N, D), every anchor sees all of them
    temperature: float | Tensor = 0.05
    clusters: Clusters = Clusters()
    options: Options = Options()


class Block(NamedTuple):
    """Columns that the rows are compared with. The block with the rows' own positives is swept first."""

    positives: Tensor  # (n, D)
    negatives: Tensor | None  # (N, D)
    cluster_ids: Tensor | None  # (n,)
    place: int  # of the first positive in the batch
    own: int | None  # column of anchor 0's own positive, where it is here


class Found(NamedTuple):
    """What comes out of a batch."""

    loss: Tensor  # 0-d
    terms: Tensor  # (4,) InfoNCE, BML, mean cosine, mean positive cosine
    gradients: tuple[Tensor | None, ...]  # of anchors, positives, negatives, temperature; unscaled


def count_hard_negatives(clusters: Clusters) -> Tensor | None:
    """n_k (K,) over the rows at hand, float32: the hard-negative block is B×K, not B×B (identity 1)."""
    if clusters.centroids is None or clusters.hard_ids is None:
        return None
    ids, num_centroids = clusters.hard_ids, len(clusters.centroids)
    counts = torch.zeros(num_centroids, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))


def own_bonus(counts: Tensor, weight: float) -> Tensor:
    """log(n_k − 1 + e^w) − log n_k: what w adds to the logit of a sentence's own hard negative."""
    shift = max(weight, 0.0)
    replaced = (counts - 1) * math.exp(-shift) + math.exp(weight - shift)
    return replaced.log() + shift - counts.log()


def combine(options: Options, size: int, sums: Tensor, has_margins: bool) -> tuple[Tensor, Tensor]:
    """Loss and terms of `Found` from the sums over all `size` rows that `Products.sums` gives, (3 + 2·D,)."""
    info_nce, bml, positive_cosine = (sums[:3] / size).unbind()
    bml = bml / size
    if has_margins:
        bml = bml + options.margin_at_zero
    mean_cosine = torch.dot(*sums[3:].chunk(2)) / size**2  # without S: identity 2
    loss = torch.add(info_nce, bml, alpha=options.bml_weight)
    return loss, torch.stack([info_nce, bml, mean_cosine, positive_cosine])
