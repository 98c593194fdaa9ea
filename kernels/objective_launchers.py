"""Launchers of the objective where its cosines fit the workspace: all rows and columns are one chunk.

    cosines of the batch; with centroids to move also the assignment to the old ones,
    the update, and the assignment to the new ones                                       1 to 3 launches
    InfoNCE, margin loss and everything that is summed up                                1 launch
    both (or all three) gradients                                                        1 launch

For the gradients B·(B+N+K) weights are kept, in the place of the cosines. What is launched is written down as
`..._steps`, which a plan repeats. Arguments are checked by the callers (`clusterns.checks`). Embeddings are
(rows, D) of one dtype with a unit column stride. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cosine_launchers
from .cosine_launchers import factor_dtype
from .gradient import gradient_kernel
from .launch import LARGE_BATCH, Tiles, cdiv, launch, new_float32, operate, padded, recording
from .objective import objective_kernel
from .plan import LATER, Numbers, Plan, Tensors, plan_of
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


def forward_steps(
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    centroids: Tensor | None,
    cluster_ids: Tensor | None,
    hard_ids: Tensor | None,
    temperature: Tensor | None,
    assigns: bool,
    has_hard: bool,
    for_gradients: bool,
    statistic: str,
    false_negatives: str,
) -> tuple[tuple[Tensor, Tensor], State]:
    """Loss, 0-dim, and terms (8,) named by `objective.TERMS`; and the `State`.

    With a `statistic` the centroids (K, D) are moved first, in place. cluster_ids and hard_ids (B,) mark
    false negatives and put the hard negatives in; where None they are those of an assignment, if it
    `assigns`. τ is a tensor, or a number that comes later, as all numbers.
    """
    numbers = Numbers() if temperature is None else Numbers(temperature)
    rows, clusters = x.shape[0], 0 if centroids is None else centroids.shape[0]
    counters = cosine_launchers.new_counters(x, clusters)
    cosines, x_inverse, y_inverse, best_cosine, best_id = cosine_launchers.compare(
        x, y, negatives, centroids if statistic else None, counters
    )
    kept = new_float32(x, 0, 0)
    if centroids is not None and statistic:
        near = (best_cosine, best_id)
        moved = cosine_launchers.update(x, x_inverse, *near, centroids, statistic, numbers.momentum)
        kept = moved if has_hard else kept
    elif centroids is not None and has_hard and for_gradients:  # the state may move on before the backward
        kept = torch.empty_like(centroids, dtype=factor_dtype(x), memory_format=torch.contiguous_format)
        operate(_copy, into=kept, source=centroids)
    found = cosine_launchers.Assignment.new(x, 0, 0, False)
    if centroids is not None and assigns:
        found = cosine_launchers.assign(
            x, centroids, counters, x_inverse, keep_cosines=has_hard, count_uses=hard_ids is None
        )
        cluster_ids = found.nearest if cluster_ids is None else cluster_ids
    if hard_ids is not None:
        operate(_count, uses=counters[padded(clusters) : padded(clusters) + clusters], ids=hard_ids)
    elif has_hard:
        hard_ids = found.runner_up
    tiles = _objective_tiles(rows)
    programs = cdiv(rows, tiles.blocks["BLOCK_M"])
    loss, terms = new_float32(x), new_float32(x, 8)
    y_along = new_float32(x, programs if for_gradients else 0, cosines.shape[1])
    weights, centroid_weights = (z.view(factor_dtype(x)) for z in (cosines, found.cosines))
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
        num_rows=rows,
        num_negatives=0 if negatives is None else negatives.shape[0],
        num_centroids=clusters,
        HAS_NEGATIVES=negatives is not None,
        FALSE_NEGATIVES=FALSE_NEGATIVES[false_negatives],
        **{name: value for name, value in numbers._asdict().items() if name != "momentum"},
    )
    return (loss, terms), state


def _copy(into: Tensor, source: Tensor) -> None:
    into.copy_(source)


def _count(uses: Tensor, ids: Tensor) -> None:
    uses.scatter_add_(0, ids.long(), torch.ones_like(ids, dtype=torch.int32))


def backward_steps(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    temperature: Tensor | None,
    clusters: int,
    needs: tuple[bool, bool, bool],
) -> tuple[list[Tensor | None], State]:
    """Gradients of x, y and negatives, where needed, times `upstream` (0-dim); contiguous, in x's dtype.

    After a forward with `clusters` hard negatives, from its `State`.
    """
    centroids = new_float32(x, clusters, x.shape[1]) if clusters else None
    with recording():  # for what it leaves alone
        given = (x, y, negatives, centroids, None, None, None)
        _, state = forward_steps(*given, clusters > 0, clusters > 0, True, "", "keep")
    dim = x.shape[1]
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
        temperature=LATER if temperature is None else temperature,
        num_rows=x.shape[0],
        num_negatives=0 if negatives is None else negatives.shape[0],
        num_centroids=state.centroids.shape[0],
        num_tiles=state.y_along.shape[0],
        dim=dim,
        NEED_Y=gradients[1] is not None,
        PRECISION=target_of(x.device).precision(False if x.dtype == torch.float16 else None, turned=True),
    )
    return gradients, state


def workspace_length(given: Tensors, options: tuple[Any, ...]) -> int:
    """Bytes of the workspace of a `forward`."""
    return Plan(forward_steps, given, options).length


def forward(given: Tensors, options: tuple[Any, ...], numbers: Sequence[float]) -> tuple[Tensor, ...]:
    """Loss and terms of `forward_steps(*given, *options)`, and the workspace, where a `backward` goes on.

    numbers: the `plan.Numbers`; of a τ among the tensors that in its place does not count.
    """
    x = given[0]
    assert x is not None
    plan = plan_of(forward_steps, given, options)
    workspace = torch.empty(plan.length, dtype=torch.uint8, device=x.device)
    loss, terms = new_float32(x), new_float32(x, 8)
    plan.run((*given, loss, terms, workspace), numbers)
    return loss, terms, workspace


def backward(
    given: Tensors, clusters: int, needs: tuple[bool, ...], temperature: float, workspace: Tensor
) -> list[Tensor | None]:
    """Gradients of `backward_steps(*given, clusters, needs)`."""
    plan = plan_of(backward_steps, given, (clusters, needs))
    gradients = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if need and z is not None else None
        for need, z in zip(needs, given[1:4], strict=True)
    ]
    plan.run((*given, *gradients, workspace), (temperature,))
    return gradients


def _objective_tiles(rows: int) -> Tiles:
    """A few whole rows a program, which leaves one row of `y_along`: an eighth of many cosines."""
    m = 4 if rows < LARGE_BATCH else 8
    return Tiles({"BLOCK_M": m, "BLOCK_N": 256}, num_warps=8)


def _gradient_tiles(x: Tensor) -> Tiles:
    """Two programs a multiprocessor for small batches, in one wave."""
    if x.dtype != torch.bfloat16:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64})
    if x.shape[0] < LARGE_BATCH:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64})
    return Tiles({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128}, num_warps=8)
