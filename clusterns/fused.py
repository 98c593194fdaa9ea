"""The Triton path of the objective: three launches bring the cosines, one the loss, one the gradients.

The launchers of `clusterns.kernels` stand behind `torch.library` operators, which `torch.compile` takes
whole, and these behind autograd functions:

    compare       cosines of the batch; with centroids to update also the assignment to the old ones,
                  the update, and the assignment to the new ones                       1 to 3 launches
    evaluate      InfoNCE, margin loss and everything that is summed up                  1 launch
    differentiate both (or all three) gradients                                          1 launch

The cosines are kept for the backward, B·(B+N+K) float32, so this path is for batches whose cosines fit the
workspace; larger ones are swept in row chunks (`clusterns.large`), which never holds them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import operators  # noqa: F401 (defines torch.ops.clusterns)
from .checks import check_differentiated_once
from .kernels import target
from .options import Options


class Update(NamedTuple):
    """How the centroids move in a step: towards the "sum" or the "mean" of their members, by γ."""

    statistic: str
    momentum: float


class Terms(NamedTuple):
    """Result of `objective`: 0-d tensors, all but `loss` detached; the last three only with centroids."""

    loss: Tensor
    info_nce: Tensor
    bml: Tensor
    mean_cosine: Tensor
    positive_cosine: Tensor
    nearest_cosine: Tensor
    hard_negative_cosine: Tensor
    with_mates: Tensor


class _Objective(torch.autograd.Function):
    """Loss over finished cosines; the gradients reach the embeddings and τ."""

    @staticmethod
    def forward(
        ctx,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        temperature: Tensor | None,
        compared: tuple[Tensor, ...],
        centroids: Tensor | None,
        cluster_ids: Tensor | None,
        hard_ids: Tensor | None,
        assigned: bool,
        options: Options,
        tau: float,
    ) -> tuple[Tensor, Tensor]:
        (cosines, anchor_inverse, positive_inverse, counters) = compared[:4]
        nearest, _, nearest_cosine, runner_up_cosine, centroid_cosines, centroid_inverse, _ = compared[4:]
        has_hard = hard_ids is not None
        num_centroids = 0 if centroids is None else centroids.shape[0]
        numbers = (
            options.hard_negative_weight,
            options.false_negatives,
            options.bml_weight,
            options.bml_alpha,
            options.bml_beta,
        )
        loss, terms, row_state = torch.ops.clusterns.evaluate(
            cosines,
            0 if negatives is None else negatives.shape[0],
            counters,
            num_centroids,
            centroid_cosines if has_hard else None,
            cluster_ids,
            hard_ids,
            nearest if assigned else None,
            nearest_cosine if assigned else None,
            runner_up_cosine if assigned else None,
            tau,
            temperature,
            *numbers,
        )
        needs_centroids = has_hard and ctx.needs_input_grad[0]  # they pull on the anchors alone
        ctx.save_for_backward(
            anchors,
            positives,
            negatives,
            temperature,
            cosines,
            anchor_inverse,
            positive_inverse,
            row_state,
            counters,
            centroids if needs_centroids else None,
            centroid_cosines if needs_centroids else None,
            centroid_inverse if needs_centroids else None,
            cluster_ids,
            hard_ids,
            terms,
        )
        ctx.num_centroids = num_centroids
        ctx.tau, ctx.numbers = tau, numbers
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)  # else the engine fills zeros for `terms`: one more launch
        return loss, terms

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _grad_terms: None) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        if grad_loss is None:
            return (None,) * 11
        anchors, positives, negatives, temperature, *saved, terms = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        numbers = (ctx.tau, temperature, *ctx.numbers)
        gradients: list[Tensor | None] = [None, None, None]
        if any(needs):
            found = torch.ops.clusterns.differentiate(
                grad_loss, anchors, positives, negatives, *saved, ctx.num_centroids, *needs, *numbers
            )
            gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        of_temperature = None
        if temperature is not None and ctx.needs_input_grad[3]:
            of_temperature = (terms[7] * grad_loss).to(temperature.dtype)
        return (*gradients, of_temperature, None, None, None, None, None, None, None)


def objective(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    centroids: Tensor | None,
    cluster_ids: Tensor | None,
    hard_negative_ids: Tensor | None,
    options: Options,
    *,
    hard_negatives: bool = True,
    update: Update | None = None,
) -> Terms:
    """Loss and parts; with `update` the centroids (K, D), float32, are moved first, in place.

    Arguments as `clusterns.functional.info_nce`, checked there. Without `hard_negatives` the centroids only
    assign clusters.
    """
    dtype = common_dtype(anchors, positives, negatives)
    anchors, positives = unit_stride(anchors.to(dtype)), unit_stride(positives.to(dtype))
    if negatives is not None:
        negatives = unit_stride(negatives.to(dtype))
    state = centroids
    if centroids is not None:
        centroids = unit_stride(centroids.detach().float())
    clusters = 0 if centroids is None else centroids.shape[0]
    needs_hard = clusters > 0 and hard_negatives and (hard_negative_ids is not None or clusters > 1)
    needs_ids = clusters > 0 and (cluster_ids is None or (needs_hard and hard_negative_ids is None))
    keeps_graph = anchors.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        compared = torch.ops.clusterns.compare(
            anchors.detach(),
            positives.detach(),
            None if negatives is None else negatives.detach(),
            centroids,
            needs_hard or needs_ids,
            needs_hard,
            hard_negative_ids if needs_hard else None,
            "" if update is None else update.statistic,
            0.0 if update is None else update.momentum,
        )
        if update is not None and state is not None and centroids is not None:
            if state.dtype != torch.float32 or state.stride(1) != 1:  # a copy was moved
                state.copy_(centroids)
            centroids = compared[-1]
        elif needs_hard and keeps_graph and centroids is not None:
            centroids = centroids.clone()  # the state may move on before the backward
    assigned = needs_hard or needs_ids
    if cluster_ids is None and needs_ids:
        cluster_ids = compared[4]
    if hard_negative_ids is None and needs_hard:
        hard_negative_ids = compared[5]
    if cluster_ids is None:
        options = options._replace(false_negatives="keep")
    elif options.false_negatives == "keep":
        cluster_ids = None
    loss, terms = _Objective.apply(
        anchors,
        positives,
        negatives,
        temperature if isinstance(temperature, Tensor) else None,
        compared,
        centroids,
        cluster_ids,
        hard_negative_ids if needs_hard else None,
        assigned,
        options,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
    )
    return Terms(loss, *terms.unbind()[:7])


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that all share, else float32."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose neighbouring columns are neighbours in memory."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def cosine_bytes(anchors: Tensor, negatives: Tensor | None, centroids: Tensor | None) -> int:
    """Bytes of the cosines kept for the backward."""
    rows = anchors.shape[0]
    columns = rows + sum(z.shape[0] for z in (negatives, centroids) if z is not None)
    return 4 * rows * columns


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, temperature: Tensor | None, tau: float) -> Tensor:
        cosines, x_inverse, y_inverse = torch.ops.clusterns.similarity(x, y, tau, temperature)
        ctx.save_for_backward(x, y, temperature, cosines, x_inverse, y_inverse)
        ctx.tau = tau
        # A copy wherever the caller must not see the padding or write into what the backward needs.
        result = cosines[:, : y.shape[0]]
        return (
            result.clone(memory_format=torch.contiguous_format)
            if any(ctx.needs_input_grad)
            else result.contiguous()
        )

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        x, y, temperature, *saved = ctx.saved_tensors
        need_x, need_y, need_temperature, _ = ctx.needs_input_grad
        found = torch.ops.clusterns.similarity_backward(
            upstream, x, y, *saved, ctx.tau, temperature, need_x, need_y
        )
        of_temperature = None
        if need_temperature:  # ∂R/∂τ = −R/τ
            total = (upstream * saved[0][:, : y.shape[0]]).sum()
            of_temperature = (-total / temperature).to(temperature.dtype)
        return found[0] if need_x else None, found[1] if need_y else None, of_temperature, None


def cosine_similarity_matrix(a: Tensor, b: Tensor, temperature: float | Tensor) -> Tensor:
    """cos(a_i, b_j)/τ, (M, N) float32, differentiable in a, b and τ."""
    dtype = common_dtype(a, b)
    a, b = unit_stride(a.to(dtype)), unit_stride(b.to(dtype))
    return _Similarity.apply(
        a,
        b,
        temperature if isinstance(temperature, Tensor) else None,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
    )


@torch.no_grad()
def nearest_centroids(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest and runner-up ids (B,) int64 and their cosines (B,) float32."""
    return torch.ops.clusterns.assign(unit_stride(points.detach()), unit_stride(centroids.detach().float()))[
        :4
    ]


@torch.no_grad()
def cluster_sums(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Members (K,) of each cluster of points around centroids, and their sum (K, D), both float32."""
    return torch.ops.clusterns.cluster_sums(
        unit_stride(points.detach()), unit_stride(centroids.detach().float())
    )


def why_not(*tensors: Tensor | None) -> str | None:
    """Say why this path cannot run on the tensors and what to do; None if it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device if present else None
    return target.why_not(device, *(tensor.dtype for tensor in present))
