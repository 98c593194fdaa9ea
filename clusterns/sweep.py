"""The objective without a B×B tensor: three matrix products in row chunks, on one process or many.

One `autograd.Function` computes the loss and, where a gradient is wanted, the gradients in the same sweep
over the rows; its backward only scales them. Per chunk of R rows (a, p, n, c: unit rows of anchors,
positives, explicit negatives, centroids; columns X = [p; n; c]):

    product 1   E = exp(a Xᵀ/τ + bias)           bias: log n_k on the centroid columns
                Z = row sums of E                loss_i = log(Z_i / E_ii)
    product 2   ∂loss/∂a = (E X) · 1/(BτZ)       less p, and the margin loss
    product 3   ∂loss/∂X += Eᵀ (a · 1/(BτZ))     likewise

Exact identities used (each stands in `reference.py` in its plain form):

* Σ_j exp(cos(a_i, c_runner_up(j))/τ) = Σ_k n_k exp(a_i·c_k/τ): the hard-negative block is B×K.
* Cosines are ≤ 1, so for τ ≥ 0.025 exp(·/τ) can neither overflow nor vanish in float32, and no maximum is
  needed; below that each row subtracts its maximum.
* False negatives live on cluster-mates only. Sorted by cluster id they are contiguous columns, so the
  margin loss touches about B²/K cells instead of B².
* d z = (da − a (a·da)) / ‖z‖ for a = z/‖z‖.
* Z just adds up over blocks of columns, and so do both gradients once Z is known: a rank may own any rows
  and see any columns at a time (`clusterns.distributed`).

Two sweepers do the work behind one interface: `chunked.Sweeper` in plain torch, `large.Sweeper` in Triton.
Memory above inputs and gradients: O((B+N+K)·D) and one chunk of the workspace.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_differentiated_once
from .normalization import without_autocast
from .options import Options

if TYPE_CHECKING:
    from .distributed import Ranks


class Clusters(NamedTuple):
    """What clustering says of the M rows of a process; nothing here gets a gradient."""

    ids: Tensor | None = None  # (M,): rows of one id are false negatives of each other
    centroids: Tensor | None = None  # (K, D), raw: hard negatives
    hard_ids: Tensor | None = None  # (M,) int64: the centroid that is row i's hard negative
    cosines: Tensor | None = None  # (M, K) of anchors and centroids, if they are known already


class Rows(NamedTuple):
    """The rows that a process owns, and what they share with the rest of the batch."""

    anchors: Tensor  # (M, D)
    positives: Tensor  # (M, D), row i belongs to anchor i
    temperature: float | Tensor
    clusters: Clusters
    hard_counts: Tensor | None  # (K,) n_k: for how many sentences of the whole batch k is the hard negative
    batch: int  # B, rows of the whole batch
    options: Options
    needs: tuple[bool, bool, bool, bool]  # gradients wanted: anchors, positives, negatives, temperature


class Block(NamedTuple):
    """Columns that the rows are compared with. The block with the rows' own positives is swept first."""

    positives: Tensor  # (n, D)
    negatives: Tensor | None  # (N, D)
    cluster_ids: Tensor | None  # (n,)
    first: int | None  # column of anchor 0's own positive, where it is here


class Phase(enum.Enum):
    """What a sweep over a block does."""

    BOTH = "the block is all there is: totals and, with each chunk's, its gradients"
    TOTALS = "add the block to the rows' totals"
    GRADIENTS = "gradients, now that the totals of the rows are known"


class Found(NamedTuple):
    """What comes out of a batch."""

    loss: Tensor  # 0-d
    terms: Tensor  # (4,) InfoNCE, BML, mean cosine, mean positive cosine
    gradients: tuple[Tensor | None, ...]  # of anchors, positives, negatives, temperature; unscaled


class ClusterAwareInfoNCE(torch.autograd.Function):
    """The objective for given clusters; gradients are computed in the forward."""

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
        ranks: Ranks | None,
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
        with torch.no_grad(), without_autocast(anchors.device):
            if ranks is not None:
                found = ranks.sweep(*inputs, clusters, options, needs, backend)
            elif torch.compiler.is_compiling():
                found = _as_operator(*inputs, clusters, options, needs, backend)
            else:
                found = sweep_alone(*inputs, clusters, options, needs, backend)
        ctx.save_for_backward(*found.gradients)
        ctx.dtypes = [value.dtype if isinstance(value, Tensor) else None for value in inputs]
        ctx.mark_non_differentiable(found.terms)
        return found.loss, found.terms

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


def sweep_alone(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    clusters: Clusters,
    options: Options,
    needs: tuple[bool, bool, bool, bool],
    backend: str,
) -> Found:
    """Loss and gradients of a batch that one process holds whole."""
    counts = count_hard_negatives(clusters)
    rows = Rows(anchors, positives, _detached(temperature), clusters, counts, len(anchors), options, needs)
    sweeper = make_sweeper(backend, rows, negatives)
    columns = sweeper.sweep(Block(positives, negatives, clusters.ids, 0), Phase.BOTH)
    of_positives, of_negatives = columns.gradients()
    of_temperature = sweeper.temperature_gradient()
    gradients = (sweeper.anchor_gradient(), of_positives, of_negatives, of_temperature)
    return Found(*combine(rows, sweeper.sums(), *sweeper.directions()), gradients)


def make_sweeper(backend: str, rows: Rows, negatives: Tensor | None) -> Any:
    """`large.Sweeper` for "triton-chunked", else `chunked.Sweeper`."""
    if backend == "triton-chunked":
        from .large import Sweeper as LargeSweeper

        return LargeSweeper(rows, negatives)
    from .chunked import Sweeper

    return Sweeper(rows, negatives)


def count_hard_negatives(clusters: Clusters) -> Tensor | None:
    """n_k (K,) over the rows at hand, float32: how often each centroid is a hard negative."""
    if clusters.centroids is None or clusters.hard_ids is None:
        return None
    ids, num_centroids = clusters.hard_ids, len(clusters.centroids)
    counts = torch.zeros(num_centroids, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))


def combine(rows: Rows, sums: Tensor, anchor_sum: Tensor, positive_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and terms of `Found` from sums over all rows.

    sums (3,): of the InfoNCE of each row, of the margins beyond what Δ = 0 adds, of the positive cosines.
    anchor_sum, positive_sum (D,): of the unit rows.
    """
    batch, options = rows.batch, rows.options
    info_nce, margins, positive = sums.unbind()
    bml = torch.zeros_like(info_nce)
    if options.false_negatives == "bml" and rows.clusters.ids is not None:
        bml = margins / batch**2 + margin_at_zero(options)
    info_nce = info_nce / batch
    loss = info_nce + options.bml_weight * bml
    return loss, torch.stack([info_nce, bml, anchor_sum @ positive_sum / batch**2, positive / batch])


def margin_at_zero(options: Options) -> float:
    """What a cell with Δ = 0 adds, and so every cell but the mates': relu(α) + relu(−β)."""
    return max(options.bml_alpha, 0.0) + max(-options.bml_beta, 0.0)


def is_safe(temperature: float, options: Options, largest_logit: float, largest_weight: float) -> bool:
    """Whether exp(cos/τ) and its sums stay inside the dtype without a row maximum."""
    return 1.0 / temperature <= largest_logit and abs(options.hard_negative_weight) <= largest_weight


def own_bonus(counts: Tensor, weight: float) -> Tensor:
    """log(n_k − 1 + e^w) − log n_k, what w adds to the logit of a sentence's own hard negative."""
    shift = max(weight, 0.0)
    replaced = (counts - 1) * math.exp(-shift) + math.exp(weight - shift)
    return replaced.log() + shift - counts.log()


def _detached(temperature: float | Tensor) -> float | Tensor:
    return temperature.detach() if isinstance(temperature, Tensor) else temperature


def _as_operator(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    clusters: Clusters,
    options: Options,
    needs: tuple[bool, bool, bool, bool],
    backend: str,
) -> Found:
    """`sweep_alone` behind `torch.ops.clusterns.sweep`, into which a compiler does not look."""
    is_tensor = isinstance(temperature, Tensor)
    loss, terms, *gradients = torch.ops.clusterns.sweep(
        anchors,
        positives,
        negatives,
        1.0 if is_tensor else float(temperature),
        temperature if is_tensor else None,
        *clusters,
        *options,
        list(needs),
        backend,
    )
    return Found(loss, terms, tuple(g if need else None for g, need in zip(gradients, needs, strict=True)))
