"""What autograd and `torch.compile` see: differentiable functions, over operators in `torch.ops.clusterns`.

An operator has a schema, one implementation for every device (the launchers know where they run), and a fake
one that gives shapes alone. A compiler takes it whole; outside of one its implementation is called at once.
Optional results that were not asked for are empty tensors. The launchers are imported when first needed:
without a GPU nobody waits for Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_differentiated_once
from .norms import (
    common_dtype,
    compute_dtype,
    kept_dtype,
    through_norm,
    unit_stride,
    without_autocast,
    without_autograd,
)
from .problem import Batch, Clusters, Options
from .sweep import sweep

if TYPE_CHECKING:
    from ..captured import Captured
    from .ranks import Alone

# The launchers rely on a unit column stride.
_EXACT_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
_library = torch.library.Library("clusterns", "DEF")


def _operator(schema: str, function: Any, fake: Any) -> Any:
    """Make an operator of a function; returns what calls either, the operator within a compiler alone.

    The function may return None, for which the operator has an empty tensor.
    """
    name = schema.split("(")[0]

    def implementation(*arguments):
        return _filled(arguments, function(*arguments))

    _library.define(schema, tags=(_EXACT_STRIDES,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"clusterns::{name}", fake)
    operator = getattr(torch.ops.clusterns, name)

    def call(*arguments):
        return (operator if torch.compiler.is_compiling() else function)(*arguments)

    return call


@functools.cache
def _module(name: str) -> Any:
    return import_module(f"clusterns.kernels.{name}")


def _launcher(module: str, schema: str, place: int | None = None) -> Any:
    """An operator that is the launcher of its name in a module of `clusterns.kernels`.

    place: where τ stands, in the schema as a number and a tensor.
    """
    name = schema.split("(")[0]

    def function(*arguments):
        launcher = getattr(_module(module), name)
        if place is not None:
            tau = _joined(*arguments[place : place + 2])
            arguments = (*arguments[:place], tau, *arguments[place + 2 :])
        return launcher(*arguments)

    def fake(*arguments):
        with _module("launch").recording():  # all but the launches
            return function(*arguments)

    return _operator(schema, function, fake)


def _split(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """τ as schemas take it."""
    return (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)


def _joined(temperature: float, tensor: Tensor | None) -> float | Tensor:
    return temperature if tensor is None else tensor


def _filled(arguments: Sequence[Any], found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    like = next(each for each in arguments if isinstance(each, Tensor))
    return tuple(_empty(like, 0, 0) if each is None else each for each in found)


def _empty(like: Tensor, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


_TAU = "float temperature, Tensor? temperature_tensor"
_NUMBERS = "float weight, str false_negatives, float bml_weight, float bml_alpha, float bml_beta"


# --- the sweep, in torch or on Triton ----------------------------------------------------------------------


def _fake_sweep(anchors, positives, negatives, temperature, tensor, ids, centroids, hard_ids, *rest):
    *_, needs, backend = rest
    inputs = (anchors, positives, negatives)
    dtype = torch.float32 if backend == "triton-chunked" else compute_dtype(*inputs)
    kept = kept_dtype(common_dtype(*inputs)) if backend == "triton-chunked" else dtype
    kinds = [*((getattr(z, "shape", ()), kept) for z in inputs), ((), dtype)]
    gradients = [
        _empty(anchors, *shape, dtype=kind) if need else _empty(anchors, 0, 0)
        for (shape, kind), need in zip(kinds, needs, strict=True)
    ]
    return (_empty(anchors, dtype=dtype), _empty(anchors, 4, dtype=dtype), *gradients)


def _sweep(anchors, positives, negatives, temperature, tensor, ids, centroids, hard_ids, *rest):
    *numbers, needs, backend = rest
    clusters, tau = Clusters(ids, centroids, hard_ids), _joined(temperature, tensor)
    batch = Batch(anchors, positives, negatives, tau, clusters, Options(*numbers))
    found = sweep(batch, tuple(needs), backend)
    gradients = [_empty(anchors, 0, 0) if g is None else g.contiguous() for g in found.gradients]
    if backend == "torch" and needs[2]:  # a part of one tensor with that of the positives
        gradients[2] = gradients[2].clone()
    return (found.loss, found.terms, *gradients)


_sweep_operator = _operator(
    f"sweep(Tensor anchors, Tensor positives, Tensor? negatives, {_TAU}, Tensor? ids, Tensor? centroids, "
    f"Tensor? hard_ids, {_NUMBERS}, int? workspace_bytes, str directions, bool[] needs, str backend) -> "
    "(Tensor loss, Tensor terms, Tensor anchors, Tensor positives, Tensor negatives, Tensor temperature)",
    _sweep,
    _fake_sweep,
)


class Sweep(torch.autograd.Function):
    """The objective for given clusters by `sweep`; gradients are computed in the forward."""

    @staticmethod
    def forward(
        ctx,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        clusters: Clusters,
        options: Options,
        backend: str,
        ranks: Alone | None,
        keeps_graph: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, 0-d, and InfoNCE, BML, mean cosine over all B² cells and over the diagonal, (4,).

        One tensor for all that has no gradient: where BML is 0 the loss is InfoNCE, a compiler then returns
        one buffer for both, and marking that as not differentiable cuts the gradient of the loss too.

        keeps_graph: `torch.is_grad_enabled()` of the caller: in here it is off, and `needs_input_grad` does
        not know of it.
        """
        inputs = (anchors, positives, negatives, temperature)
        a, p, n, tau = (need and keeps_graph for need in ctx.needs_input_grad[:4])
        needs = (a, p, n, tau)
        whole = torch.compiler.is_compiling() and ranks is None
        # A rule of the user's own may use autograd itself.
        quiet = without_autograd() if isinstance(options.false_negatives, str) else torch.no_grad()
        with quiet, without_autocast(anchors.device):
            if whole:
                loss, terms, *found = _sweep_operator(
                    anchors, positives, negatives, *_split(temperature), *clusters[:3], *options, list(needs),
                    backend,
                )  # fmt: skip
                gradients = tuple(g if need else None for g, need in zip(found, needs, strict=True))
            else:
                loss, terms, gradients = sweep(Batch(*inputs, clusters, options), needs, backend, ranks)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [value.dtype if isinstance(value, Tensor) else None for value in inputs]
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward by the gradient of the loss.

        Those of float16 stay in float32 until scaled: a loss scale exists to keep them from underflowing.
        """
        check_differentiated_once()
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


# --- a batch whose cosines fit the workspace, on Triton ----------------------------------------------------


def _forward_function(*arguments):
    *given, temperature, assigns, has_hard, for_gradients, statistic, momentum, weight, rule = arguments[:15]
    options, numbers = (
        (assigns, has_hard, for_gradients, statistic, rule),
        (weight, *arguments[15:], momentum),
    )
    return _module("objective_launchers").forward(given, options, (temperature, *numbers))


def _fake_forward(*arguments):
    given, options = arguments[:7], (*arguments[8:12], arguments[14])
    length = _module("objective_launchers").workspace_length(given, options)
    return _empty(given[0]), _empty(given[0], 8), _empty(given[0], length, dtype=torch.uint8)


def _backward_function(*arguments):
    *given, temperature, clusters, needs, workspace = arguments
    return _module("objective_launchers").backward(given, clusters, tuple(needs), temperature, workspace)


def _fake_backward(*arguments):
    wanted = zip(arguments[1:4], arguments[-2], strict=True)
    return _filled(arguments, [_empty(z, *z.shape, dtype=z.dtype) if need else None for z, need in wanted])


_forward = _operator(
    "forward(Tensor anchors, Tensor positives, Tensor? negatives, Tensor(a!)? centroids, Tensor? ids, "
    "Tensor? hard_ids, Tensor? temperature_tensor, float temperature, bool assigns, bool has_hard, "
    f"bool for_gradients, str statistic, float momentum, {_NUMBERS}) -> "
    "(Tensor loss, Tensor terms, Tensor workspace)",
    _forward_function,
    _fake_forward,
)
_backward = _operator(
    "backward(Tensor upstream, Tensor anchors, Tensor positives, Tensor? negatives, "
    "Tensor? temperature_tensor, float temperature, int clusters, bool[] needs, Tensor workspace) -> "
    "(Tensor anchors, Tensor positives, Tensor negatives)",
    _backward_function,
    _fake_backward,
)


class _Whole(torch.autograd.Function):
    """Loss of a whole batch; the gradients, made in the backward, reach the embeddings and τ."""

    @staticmethod
    def forward(
        ctx, anchors, positives, negatives, temperature, centroids, clusters, options, keeps_graph, captured
    ):
        ids, hard_ids = clusters.ids, clusters.hard_ids
        count = 0 if centroids is None else centroids.shape[0]
        has_hard = count > 0 and clusters.hard_negatives and (hard_ids is not None or count > 1)
        assigns = has_hard or (count > 0 and ids is None)
        statistic, momentum = clusters.update or ("", 0.0)
        weight, rule, *margins = options[:5]
        if ids is None and not assigns:
            rule = "keep"
        tau, tensor = _split(temperature)
        needs = [need and keeps_graph for need in ctx.needs_input_grad[:3]]
        given = (
            anchors, positives, negatives, centroids, ids, hard_ids if has_hard else None, tensor, tau,
            assigns, has_hard, any(needs), statistic, momentum, weight, rule, *margins,
        )  # fmt: skip
        ctx.rest, replayed = (tau, count if has_hard else 0), None
        with torch.no_grad():
            if captured is not None:
                replayed = captured.forward((_forward, _backward), given, ctx.rest, needs)
            ctx.replayed, (loss, terms, workspace) = replayed or (None, _forward(*given))
        if statistic and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(centroids)
        ctx.save_for_backward(anchors, positives, negatives, tensor, terms, workspace)
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)  # else the engine fills zeros for `terms`: one more launch
        return loss, terms

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _grad_terms: None) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        if grad_loss is None:
            return (None,) * 9
        *given, terms, workspace = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients: list[Tensor | None] = [None, None, None]
        if any(needs):
            launch = _backward if ctx.replayed is None else ctx.replayed.backward
            found = launch(grad_loss, *given, *ctx.rest, needs, workspace)
            gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        of_temperature, temperature = None, given[3]
        if temperature is not None and ctx.needs_input_grad[3]:
            of_temperature = (terms[7] * grad_loss).to(temperature.dtype)
        return (*gradients, of_temperature, None, None, None, None, None)


def shares(centroids: Tensor) -> bool:
    """Whether the kernels take the centroids as they are."""
    return centroids.dtype == torch.float32 and centroids.stride(1) == 1


def whole_batch(batch: Batch, captured: Captured | None = None) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and terms (8,), which `kernels.objective.TERMS` names, on Triton.

    Clusters that are missing are those of an assignment, after the `update`, which moves the centroids (K, D)
    in place. A `captured` step is replayed in place of the launches, where it fits.
    """
    temperature, clusters, options = batch[3:]
    dtype = common_dtype(*batch[:3])
    inputs = [None if z is None else unit_stride(z if z.dtype == dtype else z.to(dtype)) for z in batch[:3]]
    state = clusters.centroids
    centroids = None if state is None else unit_stride(state.detach().float())
    found = _Whole.apply(
        *inputs, temperature, centroids, clusters, options, torch.is_grad_enabled(), captured
    )
    if clusters.update is not None and state is not None and centroids is not None and not shares(state):
        state.copy_(centroids)  # a copy was moved
    return found


# --- similarity and assignment on their own ----------------------------------------------------------------


_similarity = _launcher(
    "cosine_launchers",
    f"similarity(Tensor x, Tensor y, {_TAU}) -> (Tensor cosines, Tensor x_inverse, Tensor y_inverse)",
    place=2,
)
_nearest_centroids = _launcher(
    "cosine_launchers",
    "nearest_centroids(Tensor points, Tensor centroids) -> (Tensor nearest, "
    "Tensor runner_up, Tensor nearest_cosine, Tensor runner_up_cosine, Tensor inverse)",
)
_cluster_sums = _launcher(
    "cosine_launchers",
    "cluster_sums(Tensor points, Tensor centroids) -> (Tensor counts, Tensor sums)",
)


class _CosineSimilarity(torch.autograd.Function):
    """R = cos(x, y)/τ by one launch; dx = (du − u (u·du)) / ‖x‖ with du = U v/τ for the unit rows u, v."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
        cosines, x_inverse, y_inverse = _similarity(x, y, *_split(temperature))
        # A copy: the caller must not see the padding or write into what the backward needs.
        result = cosines[:, : y.shape[0]].clone(memory_format=torch.contiguous_format)
        needs_result = isinstance(temperature, Tensor) and ctx.needs_input_grad[2]
        ctx.save_for_backward(
            x,
            y,
            x_inverse,
            y_inverse[: y.shape[0]],
            cosines if needs_result else None,
            _split(temperature)[1],
        )
        ctx.tau = _split(temperature)[0]
        return result

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        x, y, x_inverse, y_inverse, cosines, tensor = ctx.saved_tensors
        tau = _joined(ctx.tau, tensor)
        u, v = x.float() * x_inverse[:, None], y.float() * y_inverse[:, None]
        found: list[Tensor | None] = [None, None, None]
        with without_autocast(x.device):
            if ctx.needs_input_grad[0]:
                found[0] = through_norm(upstream @ v / tau, u, x_inverse[:, None]).to(x.dtype)
            if ctx.needs_input_grad[1]:
                found[1] = through_norm(upstream.T @ u / tau, v, y_inverse[:, None]).to(y.dtype)
        if cosines is not None and tensor is not None:  # ∂R/∂τ = −R/τ
            found[2] = -((upstream * cosines[:, : len(y)]).sum() / tensor).to(tensor.dtype)
        return tuple(found)


def cosine_similarity_matrix(a: Tensor, b: Tensor, temperature: float | Tensor) -> Tensor:
    """cos(a_i, b_j)/τ, (M, N) float32 on Triton, differentiable in a, b and τ."""
    dtype = common_dtype(a, b)
    return _CosineSimilarity.apply(unit_stride(a.to(dtype)), unit_stride(b.to(dtype)), temperature)


@torch.no_grad()
def nearest_centroids(points: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    """Nearest and runner-up ids (B,) int64 and their cosines (B,) float32, on Triton."""
    views = unit_stride(points.detach()), unit_stride(centroids.detach().float())
    return _nearest_centroids(*views)[:4]


@torch.no_grad()
def cluster_sums(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Members (K,) of each cluster of points around centroids, and their sum (K, D), float32, on Triton."""
    views = unit_stride(points.detach()), unit_stride(centroids.detach().float())
    return _cluster_sums(*views)
