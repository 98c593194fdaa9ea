"""Stateless operations.

Inputs may be float16, bfloat16, float32 or float64 and need not be normalised or contiguous. Half precision
is accumulated in float32, also under autocast; float64 inputs are computed in float64. Float32 matrix
products follow `torch.get_float32_matmul_precision()`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import choose_backend
from .captured import Captured
from .checks import (
    check_choice,
    check_count,
    check_embeddings,
    check_ids,
    check_like,
    check_number,
    check_temperature,
    check_transforms,
    check_within,
    under_functorch,
)
from .objective import operators
from .objective.norms import compute_dtype, unit_rows, without_autocast, without_autograd
from .objective.problem import DIRECTIONS, WORKSPACE_BYTES, Batch, Clusters, Known, Options
from .objective.ranks import Alone, seeding_chain
from .rules import CloseMates, Rule, check_has_clusters, check_rule


class NearestCentroids(NamedTuple):
    """Result of `nearest_centroids`: each (rows,), ids int64, cosines in the compute dtype."""

    nearest: Tensor
    runner_up: Tensor
    nearest_cosine: Tensor
    runner_up_cosine: Tensor


class ObjectiveTerms(NamedTuple):
    """Result of `objective`: 0-d tensors, all but `loss` detached; the last three if Triton assigned."""

    loss: Tensor
    info_nce: Tensor
    bml: Tensor
    mean_cosine: Tensor
    positive_cosine: Tensor
    nearest_cosine: Tensor | None = None
    hard_negative_cosine: Tensor | None = None
    with_mates: Tensor | None = None


def cosine_similarity_matrix(a: Tensor, b: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """cos(a_i, b_j) / τ for all pairs, differentiable in a, b and τ; on a GPU once, as `info_nce`.

    Args:
        a: (M, D) embeddings.
        b: (N, D) embeddings on the same device.
        temperature: τ > 0, a number or a 0-dim tensor on the same device.

    Returns:
        (M, N), float32, or float64 if an input is float64.

    """
    check_embeddings("a", a)
    check_like("b", b, "a", a)
    check_temperature(temperature, "a", a)
    if choose_backend("auto", a, b) == "triton" and not under_functorch():
        return operators.cosine_similarity_matrix(a, b, temperature)
    dtype = compute_dtype(a, b)
    with without_autocast(a.device):
        scaled = reference.unit(a.to(dtype)) * (1.0 / temperature)
        return scaled @ reference.unit(b.to(dtype)).T


@torch.no_grad()
def nearest_centroids(points: Tensor, centroids: Tensor) -> NearestCentroids:
    """Nearest and second-nearest centroid of each point by cosine; no gradient flows.

    Args:
        points: (B, D) embeddings.
        centroids: (K, D), raw, on the same device.

    Returns:
        ids in [0, K), the lowest on ties, and cosines. With K = 1 there is no runner-up: id −1, cosine −inf.
        A row with a non-finite value gets valid but meaningless ids.

    """
    check_embeddings("points", points)
    check_like("centroids", centroids, "points", points)
    on_triton = choose_backend("auto", points, centroids).startswith("triton")
    backend = "triton-chunked" if on_triton else "torch"
    found = assign(points, centroids, compute_dtype(points, centroids), backend)
    return NearestCentroids(*(found.ids, found.hard_ids, found.nearest_cosine, found.runner_up_cosine))  # type: ignore[arg-type]


@torch.no_grad()
def assign(points: Tensor, centroids: Tensor, dtype: torch.dtype, backend: str) -> Clusters:
    """Clusters of points (B, D) by their nearest and runner-up centroid, without checks.

    In torch it is computed in `dtype`, and what the loss would compute again is kept where it is small beside
    the workspace.
    """
    if backend == "triton-chunked":
        nearest, runner_up, cosine, second = operators.nearest_centroids(points, centroids)
        return Clusters(nearest, centroids, runner_up, cosine, second)
    if backend == "reference":
        wide = points.to(dtype), centroids.to(dtype)
        ids, G = reference.nearest_and_runner_up(*wide), reference.cosine_similarity_matrix(*wide)
        cosine, second = (G.gather(1, each[:, None])[:, 0] for each in ids)
        return Clusters(ids[0], centroids, ids[1], cosine, second)
    found = []
    with without_autograd(), without_autocast(points.device):
        (a, scale), (c, _) = unit_rows(points, dtype), unit_rows(centroids, dtype)
        clusters = c.shape[0]
        for chunk in a.split(max(1, WORKSPACE_BYTES // (2 * clusters * dtype.itemsize))):
            G = chunk @ c.T
            cosine, nearest = G.max(dim=1)  # the first of equals; topk promises nothing
            second, runner_up = G.scatter_(1, nearest[:, None], -torch.inf).max(dim=1)
            found.append((nearest, runner_up, cosine, second))
    if len(found) > 1:
        nearest, runner_up, cosine, second = map(torch.cat, zip(*found, strict=True))
    known = None
    if clusters == 1:
        runner_up = torch.full_like(runner_up, -1)
    elif a.numel() + a.shape[0] * clusters <= WORKSPACE_BYTES // (16 * dtype.itemsize):  # so it is one chunk
        known = Known(a, scale, c, G.scatter_(1, nearest[:, None], cosine[:, None]))
    return Clusters(nearest, centroids, runner_up, cosine, second, known)


@torch.no_grad()
def seed_centroids(
    anchors: Tensor,
    positives: Tensor,
    num_clusters: int,
    *,
    first: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick K sentences of the batch as centroids: each the one least similar to the pick before it.

    It is a chain (method step 2): the next pick minimises cos(anchor of the *last* pick, positive of j) over
    the j not yet chosen.

    Args:
        anchors: (B, D) first views; the centroids are raw rows of it.
        positives: (B, D) second views.
        num_clusters: K, at most B.
        first: index of the first pick; random if None.
        generator: source of that random index (a CPU generator).

    Returns:
        centroids (K, D) in the dtype of the computation, and their indices (K,) int64.

    """
    check_embeddings("anchors", anchors)
    check_like("positives", positives, "anchors", anchors, same_rows=True)
    check_count("num_clusters", num_clusters, at_least=1)
    batch = len(anchors)
    if num_clusters > batch:
        raise ValueError(
            f"num_clusters: expected at most the batch size {batch} at seeding, got {num_clusters}"
        )
    if first is None:
        first = int(torch.randint(batch, (1,), generator=generator))
    if not 0 <= first < batch:
        raise ValueError(f"first: expected an index in [0, {batch}), got {first}")
    return seeding_chain(anchors, positives, num_clusters, first, Alone(batch))


def evaluate(
    batch: Batch, backend: str, ranks: Alone | None = None, captured: Captured | None = None
) -> ObjectiveTerms:
    """Loss and parts of the objective for input that is checked, on a backend as `choose_backend` returns it.

    `ranks`: the embeddings and ids are this rank's rows of a batch that several ranks share.
    `captured`: a step that "triton" replays where it fits.
    """
    clusters, options = batch.clusters, batch.options
    if backend == "triton":
        loss, terms = operators.whole_batch(batch, captured)
        parts: list[Tensor | None] = list(terms.unbind()[:7])
        if not clusters.hard_negatives:
            parts[5] = None
        return ObjectiveTerms(loss, *parts[: 4 if clusters.centroids is None else 7])  # type: ignore[arg-type]
    if clusters.hard_ids is not None and clusters.hard_ids.dtype != torch.int64:
        batch = _with(batch, clusters=_with(clusters, hard_ids=clusters.hard_ids.long()))
    if backend == "reference":
        return _reference_objective(batch)
    run = operators.Sweep.apply
    if torch.compiler.is_compiling() and not isinstance(options.false_negatives, str):
        run = torch.compiler.disable(run)  # a rule is Python of its own, and asks the numbers
    loss, terms = run(*batch, backend, ranks, torch.is_grad_enabled())
    return ObjectiveTerms(loss, *terms.unbind())


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    centroids: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    cluster_ids: Tensor | None = None,
    false_negatives: str | Rule = "keep",
    bml_weight: float = 1e-4,
    bml_alpha: float = 0.2,
    bml_beta: float = 0.5,
    directions: str = "one",
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over in-batch negatives, optionally with centroids, clusters and explicit negatives.

    With two tensors it is the plain loss: mean_i cross_entropy([cos(a_i, p_1)/τ … cos(a_i, p_B)/τ], i).

    Args:
        anchors: (B, D) first views, B ≥ 1.
        positives: (B, D) second views; row i belongs to anchor i.
        temperature: τ > 0: a number, or a 0-dim tensor on the device, which may require a gradient.
        negatives: (N, D) mined hard negatives; every anchor sees all of them.
        centroids: (K, D) raw centroids. Every anchor sees, once for each sentence j, the hard negative of j.
        hard_negative_ids: (B,) int, the centroid that is sentence j's hard negative; its runner-up if None.
        hard_negative_weight: w, added to the logit of an anchor's own centroid.
        cluster_ids: (B,) int, sentences of one id are false negatives of each other; the nearest centroid if
            None and centroids are given.
        false_negatives: "keep" leaves them in the denominator, "exclude" takes them out, "bml" leaves them
            and adds `bml_weight` (λ) times the two-sided margin loss with margins α and β. Or a rule of your
            own or of `clusterns.rules`, which the torch path serves, also where Triton would.
        bml_weight: λ ≥ 0.
        bml_alpha: α, upper margin: cos(i, j) should stay α below cos(i, i).
        bml_beta: β, lower margin: and not fall further than β below it.
        directions: "one" has anchors look for positives. "both" is the mean of that and of positives looking
            for anchors, cross_entropy([cos(a_1, p_j)/τ … cos(a_B, p_j)/τ], j), without negatives and
            centroids; what "exclude" or a rule takes out is out of both. That is CLIP's loss where nothing
            else is given, at a third more operations. The margin loss stays that of the anchors.
        workspace_bytes: memory for logits and their temporaries, whatever the batch size; if None 256 MiB, on
            a GPU 896 MiB or less where that is over a quarter of what is free.
        backend: "auto", "triton", "torch" or "reference", see `choose_backend`.

    Returns:
        0-d float32, or float64 if an embedding is float64. Gradient reaches anchors, positives, negatives and
        τ; never the centroids. Zero rows have cosine 0 and gradient 0. Only "reference" is twice
        differentiable, and works within `torch.func`.

    Raises:
        TypeError, ValueError: one line that names the argument, what was expected and what came.
        RuntimeError: backend="triton" where it cannot run, with the reason; within `torch.func`, or in a
            backward with `create_graph=True`, for another backend than "reference".

    Source: method steps 5 to 8; Deng et al. 2023, section 3.

    """
    clusters = Clusters(cluster_ids, centroids, hard_negative_ids)
    options = Options(
        hard_negative_weight, false_negatives, bml_weight, bml_alpha, bml_beta, workspace_bytes, directions
    )
    return objective(Batch(anchors, positives, negatives, temperature, clusters, options), backend).loss


def objective(batch: Batch, backend: str = "auto") -> ObjectiveTerms:
    """Loss and parts of the objective; see `info_nce`, which returns the loss alone, for the arguments."""
    anchors, positives, negatives, temperature, clusters, options = batch
    ids, centroids, hard_ids = clusters[:3]
    check_embeddings("anchors", anchors)
    check_like("positives", positives, "anchors", anchors, same_rows=True)
    for name, others in (("negatives", negatives), ("centroids", centroids)):
        if others is not None:
            check_like(name, others, "anchors", anchors)
    for name, rows in (("hard_negative_ids", hard_ids), ("cluster_ids", ids)):
        if rows is not None:
            check_ids(name, rows, len(anchors), "anchors", anchors)
    if hard_ids is not None:
        if centroids is None:
            raise ValueError("hard_negative_ids: expected together with centroids, got centroids=None")
        check_within("hard_negative_ids", hard_ids, len(centroids))
    check_temperature(temperature, "anchors", anchors)
    check_options(options)
    check_has_clusters(options.false_negatives, ids is not None or centroids is not None)
    backend = choose_backend(backend, anchors, positives, negatives, centroids, options)
    check_transforms(backend)
    if centroids is not None and backend != "triton":
        batch = _with(batch, clusters=_complete(batch, backend))
    return evaluate(batch, backend)


def check_options(options: Options) -> None:
    """Require settings of the objective that make sense."""
    check_number("hard_negative_weight", options.hard_negative_weight)
    check_rule("false_negatives", options.false_negatives)
    check_number("bml_weight", options.bml_weight, at_least=0)
    check_number("bml_alpha", options.bml_alpha)
    check_number("bml_beta", options.bml_beta)
    check_choice("directions", options.directions, DIRECTIONS)
    if options.workspace_bytes is not None:
        check_count("workspace_bytes", options.workspace_bytes, at_least=1)


def _with(record: Any, **changes: Any) -> Any:
    """`record._replace(...)`, whose fields the compiler of torch 2.11 loses at a graph break."""
    return type(record)(**(record._asdict() | changes))


@torch.no_grad()
def _complete(batch: Batch, backend: str) -> Clusters:
    """Clusters with what is missing of them from an assignment to the centroids."""
    ids, centroids, hard_ids = batch.clusters[:3]
    assert centroids is not None
    clusters, dtype = batch.clusters, compute_dtype(*batch[:3])
    if ids is None or hard_ids is None:
        clusters = assign(batch.anchors, centroids, dtype, backend)
        if hard_ids is not None or len(centroids) == 1:
            clusters = _with(clusters, hard_ids=hard_ids)
    if ids is not None:
        clusters = _with(clusters, ids=ids)
        if isinstance(batch.options.false_negatives, CloseMates):
            check_within("cluster_ids", ids, len(centroids))
            own = unit_rows(centroids, dtype)[0][ids]
            nearest_cosine = (unit_rows(batch.anchors, dtype)[0] * own).sum(dim=1)
            clusters = _with(clusters, nearest_cosine=nearest_cosine)
    return clusters


def _reference_objective(batch: Batch) -> ObjectiveTerms:
    dtype, clusters = compute_dtype(*batch[:3]), batch.clusters
    anchors, positives = batch.anchors.to(dtype), batch.positives.to(dtype)
    negatives, centroids = (None if z is None else z.to(dtype) for z in (batch.negatives, clusters.centroids))
    numbers = batch.options._asdict()
    del numbers["workspace_bytes"]
    with without_autocast(batch.anchors.device):
        terms = reference.objective(
            anchors,
            positives,
            temperature=batch.temperature,
            negatives=negatives,
            centroids=centroids,
            hard_negative_ids=clusters.hard_ids,
            cluster_ids=clusters.ids,
            nearest_cosine=clusters.nearest_cosine,
            **numbers,
        )
        cosines = reference.cosine_similarity_matrix(anchors, positives).detach()
    return ObjectiveTerms(*terms, cosines.mean(), cosines.diagonal().mean())
