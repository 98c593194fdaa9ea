"""Stateless operations.

Inputs may be float16, bfloat16, float32 or float64 and need not be normalised or contiguous. Half precision
is accumulated in float32, also under autocast; float64 inputs are computed in float64. Float32 matrix
products follow `torch.get_float32_matmul_precision()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import fused, reference
from .backend import choose_backend
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
from .normalization import compute_dtype, unit_rows, without_autocast
from .options import WORKSPACE_BYTES, Options
from .sweep import ClusterAwareInfoNCE, Clusters

if TYPE_CHECKING:
    from .distributed import Ranks

FALSE_NEGATIVES = ("bml", "exclude", "keep")


class NearestCentroids(NamedTuple):
    """Result of `nearest_centroids`: each (rows,), ids int64, cosines in the compute dtype."""

    nearest: Tensor
    runner_up: Tensor
    nearest_cosine: Tensor
    runner_up_cosine: Tensor


class ObjectiveTerms(NamedTuple):
    """Result of `objective`: 0-d tensors, all but `loss` detached."""

    loss: Tensor
    info_nce: Tensor
    bml: Tensor
    mean_cosine: Tensor
    positive_cosine: Tensor


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
        return fused.cosine_similarity_matrix(a, b, temperature)
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
    if points.is_cuda and fused.why_not(points, centroids) is None:
        return NearestCentroids(*fused.nearest_centroids(points, centroids))
    dtype = compute_dtype(points, centroids)
    return assign_unit_rows(unit_rows(points, dtype)[0], centroids)[0]


def assign_unit_rows(a: Tensor, centroids: Tensor) -> tuple[NearestCentroids, Tensor | None]:
    """`nearest_centroids` for points (B, D) that are normalised already, without checks.

    Also returns all cosines (B, K) where they take at most a quarter of the workspace, so that the loss
    need not compute them again.
    """
    rows, clusters = len(a), len(centroids)
    ids = torch.empty((2, rows), dtype=torch.int64, device=a.device)
    cosines = torch.empty((2, rows), dtype=a.dtype, device=a.device)
    step = max(1, WORKSPACE_BYTES // (2 * clusters * a.dtype.itemsize))
    with without_autocast(a.device):
        c, _ = unit_rows(centroids, a.dtype)
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            g = a[chunk] @ c.T
            for rank in range(2):  # argmax returns the first of equals; topk promises nothing
                best = g.argmax(dim=1, keepdim=True)
                ids[rank, chunk] = best[:, 0]
                cosines[rank, chunk] = g.gather(1, best)[:, 0]
                g.scatter_(1, best, -torch.inf)
    small = rows * clusters * a.dtype.itemsize <= WORKSPACE_BYTES // 4  # so it was one chunk
    whole = g.scatter_(1, ids.T, cosines.T) if small else None
    if clusters == 1:
        whole, ids[1] = None, -1
    return NearestCentroids(ids[0], ids[1], cosines[0], cosines[1]), whole


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
    dtype = compute_dtype(anchors, positives)
    with without_autocast(anchors.device):
        a, _ = unit_rows(anchors, dtype)
        p, _ = unit_rows(positives, dtype)
        indices = torch.empty(num_clusters, dtype=torch.int64, device=anchors.device)
        chosen = torch.zeros(batch, dtype=torch.bool, device=anchors.device)
        pick = torch.tensor([first], device=anchors.device)
        for rank in range(num_clusters):
            indices[rank : rank + 1] = pick
            chosen.index_fill_(0, pick, True)
            similarity = torch.mv(p, a.index_select(0, pick)[0]).masked_fill_(chosen, torch.inf)
            pick = similarity.argmin(dim=0, keepdim=True)
        return anchors.detach().to(dtype)[indices], indices


def objective(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    centroids: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    centroid_cosines: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    cluster_ids: Tensor | None = None,
    false_negatives: str = "keep",
    bml_weight: float = 1e-4,
    bml_alpha: float = 0.2,
    bml_beta: float = 0.5,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
    ranks: Ranks | None = None,
) -> ObjectiveTerms:
    """Loss and parts of the objective; see `info_nce`, which returns the loss alone, for the arguments.

    `centroid_cosines`: (B, K) cosines of anchors and centroids, if the caller has them from an assignment.
    `ranks`: the embeddings and ids are this rank's rows of a batch that several ranks share.
    """
    _check_objective(anchors, positives, negatives, centroids, hard_negative_ids, cluster_ids)
    check_temperature(temperature, "anchors", anchors)
    check_choice("false_negatives", false_negatives, FALSE_NEGATIVES)
    check_number("hard_negative_weight", hard_negative_weight)
    check_number("bml_weight", bml_weight, at_least=0)
    check_number("bml_alpha", bml_alpha)
    check_number("bml_beta", bml_beta)
    check_count("workspace_bytes", workspace_bytes, at_least=1)
    backend = choose_backend(
        backend, anchors, positives, negatives, centroids, workspace_bytes, shared=ranks is not None
    )
    check_transforms(backend)
    options = Options(hard_negative_weight, false_negatives, bml_weight, bml_alpha, bml_beta, workspace_bytes)
    if backend == "triton":
        terms = fused.objective(
            anchors, positives, negatives, temperature, centroids, cluster_ids, hard_negative_ids, options
        )
        return ObjectiveTerms(*terms[:5])

    if centroids is not None and (hard_negative_ids is None or cluster_ids is None):
        with torch.no_grad():
            dtype = compute_dtype(anchors, positives, negatives)
            if backend == "triton-chunked":
                nearest, runner_up, *_ = fused.nearest_centroids(anchors, centroids)
            elif backend == "reference":
                nearest, runner_up = reference.nearest_and_runner_up(anchors.to(dtype), centroids.to(dtype))
            else:
                assigned, centroid_cosines = assign_unit_rows(unit_rows(anchors, dtype)[0], centroids)
                nearest, runner_up = assigned[:2]
        cluster_ids = nearest if cluster_ids is None else cluster_ids
        if hard_negative_ids is None and len(centroids) > 1:
            hard_negative_ids = runner_up
    if hard_negative_ids is not None:
        hard_negative_ids = hard_negative_ids.long()

    if backend == "reference":
        return _reference_objective(
            anchors,
            positives,
            temperature=temperature,
            negatives=negatives,
            centroids=centroids,
            hard_negative_ids=hard_negative_ids,
            hard_negative_weight=hard_negative_weight,
            cluster_ids=cluster_ids,
            false_negatives=false_negatives,
            bml_weight=bml_weight,
            bml_alpha=bml_alpha,
            bml_beta=bml_beta,
        )
    clusters = Clusters(cluster_ids, centroids, hard_negative_ids, centroid_cosines)
    inputs = (anchors, positives, negatives, temperature)
    loss, terms = ClusterAwareInfoNCE.apply(
        *inputs, clusters, options, backend, ranks, torch.is_grad_enabled()
    )
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
    false_negatives: str = "keep",
    bml_weight: float = 1e-4,
    bml_alpha: float = 0.2,
    bml_beta: float = 0.5,
    workspace_bytes: int = WORKSPACE_BYTES,
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
            and adds `bml_weight` (λ) times the two-sided margin loss with margins α and β.
        bml_weight: λ ≥ 0.
        bml_alpha: α, upper margin: cos(i, j) should stay α below cos(i, i).
        bml_beta: β, lower margin: and not fall further than β below it.
        workspace_bytes: memory for logits and their temporaries, whatever the batch size.
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
    if hard_negative_ids is not None and centroids is not None:
        check_within("hard_negative_ids", hard_negative_ids, len(centroids))
    return objective(
        anchors,
        positives,
        temperature=temperature,
        negatives=negatives,
        centroids=centroids,
        hard_negative_ids=hard_negative_ids,
        hard_negative_weight=hard_negative_weight,
        cluster_ids=cluster_ids,
        false_negatives=false_negatives,
        bml_weight=bml_weight,
        bml_alpha=bml_alpha,
        bml_beta=bml_beta,
        workspace_bytes=workspace_bytes,
        backend=backend,
    ).loss


def _check_objective(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    centroids: Tensor | None,
    hard_negative_ids: Tensor | None,
    cluster_ids: Tensor | None,
) -> None:
    check_embeddings("anchors", anchors)
    check_like("positives", positives, "anchors", anchors, same_rows=True)
    if negatives is not None:
        check_like("negatives", negatives, "anchors", anchors)
    if centroids is not None:
        check_like("centroids", centroids, "anchors", anchors)
    if hard_negative_ids is not None:
        check_ids("hard_negative_ids", hard_negative_ids, len(anchors), "anchors", anchors)
        if centroids is None:
            raise ValueError("hard_negative_ids: expected together with centroids, got centroids=None")
    if cluster_ids is not None:
        check_ids("cluster_ids", cluster_ids, len(anchors), "anchors", anchors)


def _reference_objective(anchors: Tensor, positives: Tensor, **arguments) -> ObjectiveTerms:
    dtype = compute_dtype(anchors, positives, arguments["negatives"])
    for name in ("negatives", "centroids"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].to(dtype)
    z1, z2 = anchors.to(dtype), positives.to(dtype)
    with without_autocast(anchors.device):
        terms = reference.objective(z1, z2, **arguments)
        cosines = reference.cosine_similarity_matrix(z1, z2).detach()
    return ObjectiveTerms(*terms, cosines.mean(), cosines.diagonal().mean())
