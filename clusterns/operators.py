"""`torch.ops.clusterns`: launchers of `clusterns.kernels`, and the sweep, as operators for `torch.compile`.

Each has a schema, one implementation for every device (the launchers know where they run), and a fake one
that gives shapes alone. Optional results that were not asked for are empty tensors. Autograd is not here but
in `clusterns.fused` and `clusterns.sweep`: it costs less around the operators than inside them. The launchers
are imported when first needed: without a GPU nobody waits for Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import WORKSPACE_BYTES, Options

# The launchers rely on a unit column stride.
_EXACT_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
_library = torch.library.Library("clusterns", "DEF")


def _register(schema: str):
    """Define an operator by its schema and run the decorated function for it on every device."""

    def decorate(function):
        name = schema.split("(")[0]
        _library.define(schema, tags=(_EXACT_STRIDES,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return decorate


# --- cosines, assignment, update ---------------------------------------------------------------------------


@_register(
    "compare(Tensor anchors, Tensor positives, Tensor? negatives, Tensor(a!)? centroids, bool assign, "
    "bool keep_cosines, Tensor? hard_ids, str update, float momentum) -> "
    "(Tensor cosines, Tensor anchor_inverse, Tensor positive_inverse, Tensor counters, Tensor nearest, "
    "Tensor runner_up, Tensor nearest_cosine, Tensor runner_up_cosine, Tensor centroid_cosines, "
    "Tensor centroid_inverse, Tensor updated)"
)
def _compare(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    centroids: Tensor | None,
    assign: bool,
    keep_cosines: bool,
    hard_ids: Tensor | None,
    update: str,
    momentum: float,
) -> tuple[Tensor, ...]:
    from .kernels import cosine_launchers

    clusters = centroids.shape[0] if centroids is not None else 0
    counters = torch.empty(
        cosine_launchers.num_counters(anchors.shape[0], clusters), dtype=torch.int32, device=anchors.device
    )
    moving = centroids if update else None
    cosines, anchor_inverse, positive_inverse, best_cosine, best_id = cosine_launchers.compare(
        anchors, positives, negatives, moving, counters
    )
    if centroids is not None and update:
        _, updated = cosine_launchers.update(
            anchors, anchor_inverse, best_cosine, best_id, centroids, update, momentum
        )
        torch.autograd.graph.increment_version(centroids)
    else:
        updated = anchors.new_empty((0, 0), dtype=torch.float32)
    if centroids is not None and assign:
        assigned = cosine_launchers.assign(
            anchors, centroids, counters, keep_cosines=keep_cosines, count_uses=hard_ids is None
        )[:6]
    else:
        shapes = ((0,), (0,), (0, 0), (0,))
        assigned = (
            *(anchors.new_empty(0, dtype=torch.int64) for _ in range(2)),
            *(anchors.new_empty(shape, dtype=torch.float32) for shape in shapes),
        )
    if hard_ids is not None:
        first = cosine_launchers.padded(clusters)
        uses = counters[first : first + clusters]
        uses.scatter_add_(0, hard_ids.long(), torch.ones_like(hard_ids, dtype=torch.int32))
    return (cosines, anchor_inverse, positive_inverse, counters, *assigned, updated)


@torch.library.register_fake("clusterns::compare")
def _(anchors, positives, negatives, centroids, assign, keep_cosines, hard_ids, update, momentum):
    rows, dim = anchors.shape
    clusters = centroids.shape[0] if centroids is not None else 0
    explicit = negatives.shape[0] if negatives is not None else 0
    assign = assign and centroids is not None
    assigned_rows, kept = (rows if assign else 0), assign and keep_cosines

    def new(*shape, dtype=torch.float32):
        return anchors.new_empty(shape, dtype=dtype)

    columns = _padded(rows) + explicit
    return (
        new(rows, _padded(columns)),
        new(rows),
        new(_padded(columns)),
        new(2 * _padded(clusters) + 16 + (rows + 15) // 16, dtype=torch.int32),
        new(assigned_rows, dtype=torch.int64),
        new(assigned_rows, dtype=torch.int64),
        new(assigned_rows),
        new(assigned_rows),
        new(rows if kept else 0, _padded(clusters) if kept else 0),
        new(clusters if assign else 0),
        new(clusters if update else 0, dim if update else 0),
    )


def _padded(count):
    return (count + 15) // 16 * 16


# --- loss --------------------------------------------------------------------------------------------------

_NUMBERS = (
    "float temperature, Tensor? temperature_tensor, float hard_negative_weight, str false_negatives, "
    "float bml_weight, float bml_alpha, float bml_beta"
)


def _numbers(temperature, temperature_tensor, weight, false_negatives, bml_weight, alpha, beta):
    from .kernels import objective_launchers

    tau = temperature if temperature_tensor is None else temperature_tensor
    return objective_launchers.Numbers(tau, weight, bml_weight, alpha, beta, false_negatives)


@_register(
    "evaluate(Tensor cosines, int num_negatives, Tensor counters, int num_centroids, "
    "Tensor? centroid_cosines, Tensor? cluster_ids, Tensor? hard_ids, Tensor? nearest, "
    f"Tensor? nearest_cosine, Tensor? runner_up_cosine, {_NUMBERS}) -> "
    "(Tensor loss, Tensor terms, Tensor row_state)"
)
def _evaluate(
    cosines,
    num_negatives,
    counters,
    num_centroids,
    centroid_cosines,
    cluster_ids,
    hard_ids,
    nearest,
    nearest_cosine,
    runner_up_cosine,
    *numbers,
):
    from .kernels import objective_launchers

    return objective_launchers.evaluate(
        cosines,
        num_negatives,
        counters,
        _numbers(*numbers),
        num_centroids=num_centroids,
        centroid_cosines=centroid_cosines,
        cluster_ids=cluster_ids,
        hard_ids=hard_ids,
        nearest=nearest,
        nearest_cosine=nearest_cosine,
        runner_up_cosine=runner_up_cosine,
    )


@torch.library.register_fake("clusterns::evaluate")
def _(cosines, *_arguments):
    return cosines.new_empty(()), cosines.new_empty(8), cosines.new_empty((4, cosines.shape[0]))


@_register(
    "differentiate(Tensor upstream, Tensor anchors, Tensor positives, Tensor? negatives, Tensor cosines, "
    "Tensor anchor_inverse, Tensor positive_inverse, Tensor row_state, Tensor counters, Tensor? centroids, "
    "Tensor? centroid_cosines, Tensor? centroid_inverse, Tensor? cluster_ids, Tensor? hard_ids, "
    f"int num_centroids, bool need_anchors, bool need_positives, bool need_negatives, {_NUMBERS}) -> "
    "(Tensor anchors, Tensor positives, Tensor negatives)"
)
def _differentiate(
    upstream,
    anchors,
    positives,
    negatives,
    cosines,
    anchor_inverse,
    positive_inverse,
    row_state,
    counters,
    centroids,
    centroid_cosines,
    centroid_inverse,
    cluster_ids,
    hard_ids,
    num_centroids,
    need_anchors,
    need_positives,
    need_negatives,
    *numbers,
):
    from .kernels import objective_launchers

    gradients = objective_launchers.differentiate(
        upstream,
        anchors,
        positives,
        negatives,
        cosines,
        anchor_inverse,
        positive_inverse,
        row_state,
        counters,
        _numbers(*numbers),
        (need_anchors, need_positives, need_negatives),
        centroids=centroids,
        centroid_cosines=centroid_cosines,
        centroid_inverse=centroid_inverse,
        cluster_ids=cluster_ids,
        hard_ids=hard_ids,
        num_centroids=num_centroids,
    )
    return tuple(anchors.new_empty((0, 0)) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake("clusterns::differentiate")
def _(upstream, anchors, positives, negatives, *rest):
    needs = rest[11:14]
    return tuple(
        z.new_empty(z.shape) if need and z is not None else anchors.new_empty((0, 0))
        for need, z in zip(needs, (anchors, positives, negatives), strict=True)
    )


# --- similarity and assignment on their own ----------------------------------------------------------------


@_register(
    "similarity(Tensor x, Tensor y, float temperature, Tensor? temperature_tensor) -> "
    "(Tensor cosines, Tensor x_inverse, Tensor y_inverse)"
)
def _similarity(x, y, temperature, temperature_tensor):
    from .kernels import cosine_launchers

    tau = temperature if temperature_tensor is None else temperature_tensor
    cosines, x_inverse, y_inverse, _, _ = cosine_launchers.compare(x, y, temperature=tau)
    return cosines, x_inverse, y_inverse


@torch.library.register_fake("clusterns::similarity")
def _(x, y, temperature, temperature_tensor):
    new = {"dtype": torch.float32}
    rows, columns = x.shape[0], y.shape[0]
    return (
        x.new_empty((rows, _padded(columns)), **new),
        x.new_empty(rows, **new),
        x.new_empty(_padded(columns), **new),
    )


@_register(
    "similarity_backward(Tensor upstream, Tensor x, Tensor y, Tensor cosines, Tensor x_inverse, "
    "Tensor y_inverse, float temperature, Tensor? temperature_tensor, bool need_x, bool need_y) -> "
    "(Tensor x, Tensor y)"
)
def _similarity_backward(
    upstream, x, y, cosines, x_inverse, y_inverse, temperature, temperature_tensor, need_x, need_y
):
    from .kernels import cosine_launchers

    tau = temperature if temperature_tensor is None else temperature_tensor
    found = cosine_launchers.differentiate_similarity(
        upstream, x, y, cosines, x_inverse, y_inverse, tau, (need_x, need_y)
    )
    return tuple(x.new_empty((0, 0)) if gradient is None else gradient for gradient in found)


@torch.library.register_fake("clusterns::similarity_backward")
def _(upstream, x, y, cosines, x_inverse, y_inverse, temperature, temperature_tensor, need_x, need_y):
    return tuple(
        z.new_empty(z.shape) if need else x.new_empty((0, 0)) for need, z in ((need_x, x), (need_y, y))
    )


@_register(
    "assign(Tensor points, Tensor centroids) -> "
    "(Tensor nearest, Tensor runner_up, Tensor nearest_cosine, Tensor runner_up_cosine, Tensor inverse)"
)
def _assign(points, centroids):
    """In row chunks, so that the best of each tile of centroids stays within the workspace."""

    from .kernels import cosine_launchers

    clusters = centroids.shape[0]
    rows = max(1, WORKSPACE_BYTES // (cosine_launchers.partial_bytes(clusters)))
    found = []
    for chunk in points.split(rows):
        counters = torch.zeros(
            cosine_launchers.num_counters(chunk.shape[0], clusters), dtype=torch.int32, device=points.device
        )
        each = cosine_launchers.assign(chunk, centroids, counters)
        found.append((*each[:4], each.x_inverse))
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))


@torch.library.register_fake("clusterns::assign")
def _(points, centroids):
    rows = points.shape[0]
    ids, numbers = {"dtype": torch.int64}, {"dtype": torch.float32}
    return (
        points.new_empty(rows, **ids),
        points.new_empty(rows, **ids),
        *(points.new_empty(rows, **numbers) for _ in range(3)),
    )


@_register("cluster_sums(Tensor points, Tensor centroids) -> (Tensor counts, Tensor sums)")
def _cluster_sums(points, centroids):
    from .kernels import cosine_launchers

    nearest, _, cosine, _, inverse = _assign(points, centroids)
    return cosine_launchers.update(
        points, inverse, cosine[None, None], nearest[None, None], centroids, "sums", 0.0
    )


@torch.library.register_fake("clusterns::cluster_sums")
def _(points, centroids):
    return centroids.new_empty(centroids.shape[0]), centroids.new_empty(centroids.shape)


# --- sweep, in torch or on Triton --------------------------------------------------------------------------


@_register(
    "sweep(Tensor anchors, Tensor positives, Tensor? negatives, float temperature, "
    "Tensor? temperature_tensor, Tensor? cluster_ids, Tensor? centroids, Tensor? hard_ids, Tensor? cosines, "
    "float hard_negative_weight, str false_negatives, float bml_weight, float bml_alpha, float bml_beta, "
    'int workspace_bytes, bool[] needs, str backend="triton-chunked") -> (Tensor loss, Tensor terms, '
    "Tensor anchors, Tensor positives, Tensor negatives, Tensor temperature)"
)
def _sweep(anchors, positives, negatives, temperature, temperature_tensor, *rest):
    from .sweep import Clusters, sweep_alone

    numbers, needs, backend = _sweep_arguments(rest)
    clusters, options = Clusters(*numbers[:4]), Options(*numbers[4:])
    tau = temperature if temperature_tensor is None else temperature_tensor
    found = sweep_alone(anchors, positives, negatives, tau, clusters, options, tuple(needs), backend)
    gradients = [anchors.new_empty((0, 0)) if g is None else g.contiguous() for g in found.gradients]
    if backend == "torch" and needs[2]:  # a part of one tensor with that of the positives
        gradients[2] = gradients[2].clone()
    return (found.loss, found.terms, *gradients)


@torch.library.register_fake("clusterns::sweep")
def _(anchors, positives, negatives, temperature, temperature_tensor, *rest):
    _, needs, backend = _sweep_arguments(rest)
    dtypes = {z.dtype for z in (anchors, positives, negatives) if z is not None}
    if backend == "torch":
        dtype = kept = torch.float64 if torch.float64 in dtypes else torch.float32
    else:
        dtype, kept = torch.float32, dtypes.pop() if len(dtypes) == 1 else torch.float32
        kept = torch.float32 if kept == torch.float16 else kept
    shapes = [z.shape if z is not None else () for z in (anchors, positives, negatives)]
    gradients = [
        anchors.new_empty(shape, dtype=kept) if need else anchors.new_empty((0, 0))
        for shape, need in zip(shapes, needs, strict=False)
    ]
    tau = anchors.new_empty((), dtype=dtype) if needs[3] else anchors.new_empty((0, 0))
    return (anchors.new_empty((), dtype=dtype), anchors.new_empty(4, dtype=dtype), *gradients, tau)


def _sweep_arguments(rest):
    """Numbers, needs and backend; the dispatcher leaves out a backend that is the default."""
    *numbers, needs, backend = rest if isinstance(rest[-1], str) else (*rest, "triton-chunked")
    return numbers, needs, backend
