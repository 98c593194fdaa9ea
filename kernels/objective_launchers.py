"""Launchers of the objective where its cosines fit the workspace: all rows and columns are one chunk.

    cosines of the batch; with centroids to move also the assignment to the old ones,
    the update, and the assignment to the new ones                                       1 to 3 launches
    InfoNCE, margin loss and everything that is summed up                                1 launch
    both (or all three) gradients                                                        1 launch

The cosines are kept for the gradients, B·(B+N+K) float32. Arguments are checked by the callers
(`clusterns.checks`). Embeddings are (rows, D) of one dtype with a unit column stride; every output is new
unless said otherwise. No function waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cosine_launchers
from .gradient import gradient_kernel
from .launch import LARGE_BATCH, Tiles, cdiv, launch, new_float32, padded
from .objective import objective_kernel
from .tiles import BML, EXCLUDE, KEEP

FALSE_NEGATIVES = {"keep": KEEP.value, "exclude": EXCLUDE.value, "bml": BML.value}


class State(NamedTuple):
    """What the forward leaves to the backward; what an assignment gives is empty without one."""

    cosines: Tensor  # (B, padded(padded(B) + N)) float32
    x_inverse: Tensor  # (B,)
    y_inverse: Tensor  # as a row of the cosines
    counters: Tensor  # how often each centroid is a hard negative, see `tiles.counters`
    row_state: Tensor  # (4, B), see `objective.ROW_STATE`
    nearest: Tensor  # (B,) int64
    runner_up: Tensor  # (B,) int64
    centroid_cosines: Tensor  # (B, padded(K))
    centroid_inverse: Tensor  # (K,)
    centroids: Tensor  # (K, D) as they were in this step


def forward(
    x: Tensor,
    y: Tensor,
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
    *numbers: Any,
) -> tuple[Tensor, ...]:
    """Loss, 0-dim, terms (8,) named by `objective.TERMS`, and the fields of `State`.

    With a `statistic` the centroids (K, D) are moved first, in place. cluster_ids and hard_ids (B,) mark
    false negatives and put the hard negatives in; where None they are those of an assignment, if it
    `assigns`.
    numbers: w, "keep", "exclude" or "bml", λ, α, β.
    """
    rows, clusters = x.shape[0], 0 if centroids is None else centroids.shape[0]
    counters = cosine_launchers.new_counters(x, clusters)
    cosines, x_inverse, y_inverse, best_cosine, best_id = cosine_launchers.compare(
        x, y, negatives, centroids if statistic else None, counters
    )
    kept = new_float32(x, 0, 0)
    if centroids is not None and statistic:
        _, kept = cosine_launchers.update(x, x_inverse, best_cosine, best_id, centroids, statistic, momentum)
        torch.autograd.graph.increment_version(centroids)
    elif centroids is not None and keeps_centroids:
        kept = centroids.clone()  # the state may move on before the backward
    if centroids is not None and assigns:
        found = cosine_launchers.assign(
            x, centroids, counters, keep_cosines=has_hard, count_uses=hard_ids is None
        )
    else:
        found = cosine_launchers.Assignment.new(x, 0, 0, False)
    if hard_ids is not None:
        uses = counters[padded(clusters) : padded(clusters) + clusters]
        uses.scatter_add_(0, hard_ids.long(), torch.ones_like(hard_ids, dtype=torch.int32))
    loss, terms, row_state = new_float32(x), new_float32(x, 8), new_float32(x, 4, rows)
    state = State(
        cosines, x_inverse, y_inverse, counters, row_state, found.nearest, found.runner_up, found.cosines,
        found.centroid_inverse, kept,
    )  # fmt: skip
    explicit = 0 if negatives is None else negatives.shape[0]
    launch(
        objective_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]),),
        Tiles({"BLOCK_M": 4, "BLOCK_N": 256}, num_warps=8, num_stages=1),
        **_common(state, cluster_ids, hard_ids, assigns, has_hard, temperature, numbers),
        nearest=found.nearest if assigns else None,
        nearest_cosine=found.nearest_cosine if assigns else None,
        runner_up_cosine=found.runner_up_cosine if assigns else None,
        row_terms=new_float32(x, 8, rows),
        loss=loss,
        terms=terms,
        num_negatives=explicit,
        HAS_NEGATIVES=explicit > 0,
    )
    return (loss, terms, *state)


def backward(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    cluster_ids: Tensor | None,
    hard_ids: Tensor | None,
    has_hard: bool,
    needs: tuple[bool, bool, bool],
    *numbers_and_state: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y and negatives, where needed, times `upstream` (0-dim); contiguous, in x's dtype.

    The other arguments as in `forward`, and its `State`.
    """
    *numbers, fields = numbers_and_state
    state, dim, inputs = State(*fields), x.shape[1], (x, y, negatives)
    gradients = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if need and z is not None else None
        for need, z in zip(needs, inputs, strict=True)
    ]
    counts = [out.shape[0] for out in gradients if out is not None]
    has_hard = has_hard and needs[0]  # the centroids pull on the anchors alone
    launch(
        gradient_kernel,
        lambda block: (sum(cdiv(count, block["BLOCK_M"]) for count in counts) * cdiv(dim, block["BLOCK_D"]),),
        _gradient_tiles(x),
        x=x,
        y=y,
        negatives=negatives,
        centroids=state.centroids if has_hard else None,
        x_gradient=gradients[0],
        y_gradient=gradients[1] if gradients[1] is not None else gradients[2],
        negatives_gradient=gradients[2],
        x_inverse=state.x_inverse,
        y_inverse=state.y_inverse,
        centroid_inverse=state.centroid_inverse if has_hard else None,
        **_common(state, cluster_ids, hard_ids, state.nearest.shape[0] > 0, has_hard, temperature, numbers),
        upstream=upstream,
        num_negatives=0 if negatives is None else negatives.shape[0],
        dim=dim,
        NEED_Y=gradients[1] is not None,
        FLOAT16=x.dtype == torch.float16,
    )
    return tuple(gradients)


def _common(
    state: State,
    cluster_ids: Tensor | None,
    hard_ids: Tensor | None,
    assigned: bool,
    has_hard: bool,
    temperature: float | Tensor,
    numbers: Any,
) -> dict[str, Any]:
    """What both kernels take."""
    weight, word, bml_weight, alpha, beta = numbers
    if assigned:
        cluster_ids = state.nearest if cluster_ids is None else cluster_ids
        hard_ids = state.runner_up if hard_ids is None else hard_ids
    return {
        "cosines": state.cosines,
        "centroid_cosines": state.centroid_cosines if has_hard else None,
        "cluster_ids": None if word == "keep" else cluster_ids,
        "hard_ids": hard_ids if has_hard else None,
        "counters": state.counters,
        "row_state": state.row_state,
        "temperature": temperature,
        "hard_negative_weight": float(weight),
        "bml_weight": float(bml_weight),
        "alpha": float(alpha),
        "beta": float(beta),
        "num_rows": state.cosines.shape[0],
        "num_centroids": state.centroid_inverse.shape[0],
        "cosine_blocks": state.cosines.shape[1] // 16,
        "centroid_blocks": state.centroid_cosines.shape[1] // 16 if has_hard else 0,
        "FALSE_NEGATIVES": FALSE_NEGATIVES[word],
    }


def _gradient_tiles(x: Tensor) -> Tiles:
    if x.dtype.itemsize == 2:
        if x.shape[0] < LARGE_BATCH:
            return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64}, num_warps=8)
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128}, num_warps=8, num_stages=2)
    return Tiles({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64}, num_warps=8)
