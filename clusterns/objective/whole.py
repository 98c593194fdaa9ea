"""The objective on Triton where its cosines fit the workspace: all rows and columns are one chunk.

    cosines of the batch; with centroids to move also the assignment to the old ones,
    the update, and the assignment to the new ones                                       1 to 3 launches
    InfoNCE, margin loss and everything that is summed up                                1 launch
    both (or all three) gradients, in the backward                                       1 launch

The cosines are kept for the backward, B·(B+N+K) float32. Larger batches are swept in row chunks
(`triton_products`), which never hold them all. Optional results that were not asked for are empty tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import cosine_launchers, objective_launchers
from ..kernels.launch import padded
from .problem import WORKSPACE_BYTES


class State(NamedTuple):
    """What the forward leaves to the backward."""

    cosines: Tensor  # (B, padded(padded(B) + N)) float32
    anchor_inverse: Tensor  # (B,)
    positive_inverse: Tensor  # as a row of the cosines
    counters: Tensor  # how often each centroid is a hard negative, see `kernels.tiles.counters`
    row_state: Tensor  # (4, B)
    nearest: Tensor  # (B,) int64
    runner_up: Tensor  # (B,) int64
    centroid_cosines: Tensor  # (B, padded(K))
    centroid_inverse: Tensor  # (K,)
    centroids: Tensor  # (K, D) as they were in this step


def forward(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    centroids: Tensor | None,
    cluster_ids: Tensor | None,
    hard_ids: Tensor | None,
    assigns: bool,
    has_hard: bool,
    keeps_centroids: bool,
    statistic: str,
    momentum: float,
    *numbers,
) -> tuple[Tensor, ...]:
    """Loss, 0-d, terms (8,), and `State`; with a `statistic` the centroids (K, D) are moved first, in place.

    cluster_ids and hard_ids (B,) are those of an assignment where missing.
    """
    clusters = 0 if centroids is None else centroids.shape[0]
    counters = cosine_launchers.new_counters(anchors, clusters)
    moving = centroids if statistic else None
    cosines, anchor_inverse, positive_inverse, *best = cosine_launchers.compare(
        anchors, positives, negatives, moving, counters
    )
    kept = anchors.new_empty((0, 0), dtype=torch.float32)
    if centroids is not None and statistic:
        _, kept = cosine_launchers.update(anchors, anchor_inverse, *best, centroids, statistic, momentum)
        torch.autograd.graph.increment_version(centroids)
    elif centroids is not None and keeps_centroids:
        kept = centroids.clone()  # the state may move on before the backward
    assigned = cosine_launchers.Assignment.new(anchors, 0, 0, False)
    if centroids is not None and assigns:
        assigned = cosine_launchers.assign(
            anchors, centroids, counters, keep_cosines=has_hard, count_uses=hard_ids is None
        )
    if hard_ids is not None:
        uses = counters[padded(clusters) : padded(clusters) + clusters]
        uses.scatter_add_(0, hard_ids.long(), torch.ones_like(hard_ids, dtype=torch.int32))
    loss, terms, row_state = objective_launchers.evaluate(
        cosines,
        0 if negatives is None else negatives.shape[0],
        counters,
        objective_launchers.Numbers(temperature, *numbers),
        num_centroids=clusters,
        centroid_cosines=assigned.cosines if has_hard else None,
        cluster_ids=assigned.nearest if cluster_ids is None and assigns else cluster_ids,
        hard_ids=(assigned.runner_up if hard_ids is None else hard_ids) if has_hard else None,
        nearest=assigned.nearest if assigns else None,
        nearest_cosine=assigned.nearest_cosine if assigns else None,
        runner_up_cosine=assigned.runner_up_cosine if assigns else None,
    )
    state = State(
        cosines, anchor_inverse, positive_inverse, counters, row_state, assigned.nearest, assigned.runner_up,
        assigned.cosines, assigned.centroid_inverse, kept,
    )  # fmt: skip
    return (loss, terms, *state)


def backward(
    upstream: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    cluster_ids: Tensor | None,
    hard_ids: Tensor | None,
    has_hard: bool,
    needs: tuple[bool, bool, bool],
    numbers: tuple,
    state: State,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of anchors, positives and negatives, where needed, times `upstream` (0-d)."""
    if cluster_ids is None and state.nearest.shape[0]:
        cluster_ids = state.nearest
    if hard_ids is None:
        hard_ids = state.runner_up
    return objective_launchers.differentiate(
        upstream,
        anchors,
        positives,
        negatives,
        state.cosines,
        state.anchor_inverse,
        state.positive_inverse,
        state.row_state,
        state.counters,
        objective_launchers.Numbers(temperature, *numbers),
        needs,
        centroids=state.centroids,
        centroid_cosines=state.centroid_cosines if has_hard else None,
        centroid_inverse=state.centroid_inverse,
        cluster_ids=cluster_ids,
        hard_ids=hard_ids if has_hard else None,
        num_centroids=state.centroid_inverse.shape[0],
    )


def similarity(x: Tensor, y: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos(x_i, y_j)/τ (M, padded(N)) float32, 1/‖x‖ (M,) and 1/‖y‖ (padded(N),)."""
    return cosine_launchers.compare(x, y, temperature=temperature)[:3]


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    """Nearest and runner-up ids (B,), their cosines (B,), and 1/‖point‖ (B,).

    In row chunks, so that the best of each tile of centroids stays within the workspace.
    """
    clusters = centroids.shape[0]
    found = []
    for chunk in points.split(max(1, WORKSPACE_BYTES // cosine_launchers.partial_bytes(clusters))):
        each = cosine_launchers.assign(
            chunk, centroids, cosine_launchers.new_counters(chunk, clusters).zero_()
        )
        found.append((*each[:4], each.x_inverse))
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))


def cluster_sums(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Members (K,) of each cluster of points around centroids, and their sum (K, D), both float32."""
    nearest, _, cosine, _, inverse = assign(points, centroids)
    return cosine_launchers.update(
        points, inverse, cosine[None, None], nearest[None, None], centroids, "sums", 0.0
    )
