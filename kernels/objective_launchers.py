"""Launchers of the objective where its cosines fit the workspace: all rows and columns are one chunk.

    cosines of the batch; with centroids to move also the assignment to the old ones,
    the update, and the assignment to the new ones                                       1 to 3 launches
    InfoNCE, margin loss and everything that is summed up                                1 launch
    both (or all three) gradients                                                        1 launch

For the gradients B·(B+N+K) weights are kept, in the place of the cosines. Arguments are checked by the callers (`clusterns.checks`). Embeddings are (rows, D) of one dtype with a unit column stride; every
output is new unless said otherwise. No function waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cosine_launchers
from .gradient import gradient_kernel
from .launch import LARGE_BATCH, Tiles, cdiv, launch, new_float32, padded
from .objective import objective_kernel
from .target import target_of
from .tiles import BML, EXCLUDE, KEEP

FALSE_NEGATIVES = {"keep": KEEP.value, "exclude": EXCLUDE.value, "bml": BML.value}


class State(NamedTuple):
    """What the forward leaves to the backward; empty what there is none of."""

    weights: Tensor  # (B, padded(padded(B) + N)) bfloat16 for such rows, else float32
    x_inverse: Tensor  # (B,)
    y_inverse: Tensor  # (padded(padded(B) + N),)
    x_along: Tensor  # (B,)
    y_along: Tensor  # (row tiles of the objective, padded(padded(B) + N))
    centroid_weights: Tensor  # (B, padded(K)) in the dtype of the weights
    centroids: Tensor  # (K, D) likewise, as they were in this step


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
    for_gradients: bool,
    statistic: str,
    momentum: float,
    weight: float,
    false_negatives: str,
    bml_weight: float,
    alpha: float,
    beta: float,
) -> tuple[Tensor, ...]:
    """Loss, 0-dim, terms (8,) named by `objective.TERMS`, and the fields of `State`.

    With a `statistic` the centroids (K, D) are moved first, in place. cluster_ids and hard_ids (B,) mark
    false negatives and put the hard negatives in; where None they are those of an assignment, if it
    `assigns`. The numbers are w, λ, α and β.
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
    elif centroids is not None and has_hard and for_gradients:
        kept = centroids.to(cosine_launchers.factor_dtype(x), copy=True)  # the state may move on before the backward
    found = cosine_launchers.Assignment.new(x, 0, 0, False)
    if centroids is not None and assigns:
        found = cosine_launchers.assign(
            x, centroids, counters, x_inverse, keep_cosines=has_hard, count_uses=hard_ids is None
        )
        cluster_ids = found.nearest if cluster_ids is None else cluster_ids
    if hard_ids is not None:
        uses = counters[padded(clusters) : padded(clusters) + clusters]
        uses.scatter_add_(0, hard_ids.long(), torch.ones_like(hard_ids, dtype=torch.int32))
    elif has_hard:
        hard_ids = found.runner_up
    tiles = _objective_tiles(rows)
    programs = cdiv(rows, tiles.blocks["BLOCK_M"])
    loss, terms = new_float32(x), new_float32(x, 8)
    y_along = new_float32(x, programs if for_gradients else 0, cosines.shape[1])
    weights, centroid_weights = (z.view(cosine_launchers.factor_dtype(x)) for z in (cosines, found.cosines))
    state = State(weights, x_inverse, y_inverse, new_float32(x, rows), y_along, centroid_weights, kept)
    launch(
        objective_kernel,
        lambda block: (programs,),
        tiles,
        cosines=cosines,
        centroid_cosines=found.cosines if has_hard else None,
        cluster_ids=None if false_negatives == "keep" else cluster_ids,
        hard_ids=hard_ids if has_hard else None,
        counters=counters,
        nearest=found.nearest if assigns else None,
        nearest_cosine=found.nearest_cosine if assigns else None,
        runner_up_cosine=found.runner_up_cosine if assigns else None,
        weights=weights if for_gradients else None,
        centroid_weights=centroid_weights if for_gradients and has_hard else None,
        x_inverse=x_inverse,
        y_inverse=y_inverse,
        centroid_inverse=found.centroid_inverse if has_hard else None,
        x_along=state.x_along,
        y_along=y_along,
        row_terms=new_float32(x, 8, rows),
        loss=loss,
        terms=terms,
        temperature=temperature,
        hard_negative_weight=float(weight),
        bml_weight=float(bml_weight),
        alpha=float(alpha),
        beta=float(beta),
        num_rows=rows,
        num_negatives=0 if negatives is None else negatives.shape[0],
        num_centroids=clusters,
        HAS_NEGATIVES=negatives is not None,
        FALSE_NEGATIVES=FALSE_NEGATIVES[false_negatives],
    )
    return (loss, terms, *state)


def backward(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    needs: tuple[bool, bool, bool],
    fields: list[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y and negatives, where needed, times `upstream` (0-dim); contiguous, in x's dtype.

    fields: the `State` of `forward` for these embeddings and τ.
    """
    state, dim = State(*fields), x.shape[1]
    gradients = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if need and z is not None else None
        for need, z in zip(needs, (x, y, negatives), strict=True)
    ]
    counts = [out.shape[0] for out in gradients if out is not None]
    # The centroids pull on the anchors alone.
    has_centroids = state.centroid_weights.shape[0] > 0 and gradients[0] is not None
    launch(
        gradient_kernel,
        lambda block: (sum(cdiv(count, block["BLOCK_M"]) for count in counts) * cdiv(dim, block["BLOCK_D"]),),
        _gradient_tiles(x),
        x=x,
        y=y,
        negatives=negatives,
        centroids=state.centroids if has_centroids else None,
        x_gradient=gradients[0],
        y_gradient=gradients[1] if gradients[1] is not None else gradients[2],
        negatives_gradient=gradients[2],
        weights=state.weights,
        centroid_weights=state.centroid_weights if has_centroids else None,
        x_inverse=state.x_inverse,
        y_inverse=state.y_inverse,
        x_along=state.x_along,
        y_along=state.y_along,
        upstream=upstream,
        temperature=temperature,
        num_rows=x.shape[0],
        num_negatives=0 if negatives is None else negatives.shape[0],
        num_centroids=state.centroids.shape[0],
        num_tiles=state.y_along.shape[0],
        dim=dim,
        NEED_Y=gradients[1] is not None,
        PRECISION=target_of(x.device).precision(False if x.dtype == torch.float16 else None, turned=True),
    )
    return tuple(gradients)


def _objective_tiles(rows: int) -> Tiles:
    """A few whole rows a program, which leaves one row of `y_along`: an eighth of many cosines."""
    m, n = (4, 512) if rows < LARGE_BATCH else (8, 256)
    return Tiles({"BLOCK_M": m, "BLOCK_N": n}, num_warps=8)


def _gradient_tiles(x: Tensor) -> Tiles:
    if x.dtype == torch.bfloat16:
        m, n, d = (64, 64, 64) if x.shape[0] < LARGE_BATCH else (128, 64, 128)
        return Tiles({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, num_warps=8)
    return Tiles({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64}, num_warps=8)
