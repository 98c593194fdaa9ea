"""The loop of the objective: blocks of columns, chunks of rows, three products; on one process or many.

Loss and, where a gradient is wanted, the gradients come out of the same sweep. Exact identities used, each of
which stands in `reference.py` in its plain form:

1. Σ_j exp(cos(a_i, c_runner_up(j))/τ) = Σ_k n_k exp(a_i·c_k/τ): the hard-negative block is B×K.
2. The mean of S needs no S: it is a product of two sums of unit rows.
3. Cosines are ≤ 1, so for τ ≥ 0.025 exp(·/τ) can neither overflow nor vanish in float32, and no maximum is
   needed; below that each row subtracts its maximum.
4. Three products, no pass over the logits between them: 1/Z scales rows and results.
5. False negatives live on cluster-mates only, about B²/K cells.
6. dz = (da − a (a·da)) / ‖z‖ for a = z/‖z‖.
7. Cluster ids replace every B×B mask.

Memory above inputs and gradients: O((B+N+K)·D) and one chunk of the workspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .problem import Batch, Block, Clusters, Found, Needs, Options, Sums, combine, count_hard_negatives
from .ranks import Alone
from .torch_products import TorchProducts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Products(Protocol):
    """The three products of a batch, and what its rows have found so far; `Any` is a backend's own."""

    has_margins: bool  # some pair is in the margin loss

    def __init__(self, batch: Batch): ...
    def open(self, block: Block, totals: bool, gradients: bool) -> Any:
        """Columns of a block, for the totals of the rows, for gradients, or for both."""

    def chunks(self, columns: Any) -> Iterator[slice]:
        """Rows at a time."""

    def weigh(self, columns: Any, rows: slice) -> Any:
        """Product 1, and with `totals` all sums over the columns."""

    def differentiate(self, columns: Any, rows: slice, weights: Any) -> None:
        """Products 2 and 3."""

    def close(self, columns: Any) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the block's positives and explicit negatives, where wanted."""

    def own(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the anchors (M, D) and of τ, 0-d, where wanted; once."""

    def sums(self) -> Sums:
        """Over the rows of this process."""


def sweep(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    clusters: Clusters,
    options: Options,
    needs: Needs,
    backend: str,
    ranks: Alone | None = None,
) -> Found:
    """Loss and gradients of a batch, of which these are this process's rows; with `ranks` all call it."""
    ranks = ranks or Alone(anchors.shape[0], needs)
    if ranks.size > 1:
        anchors, positives = anchors.contiguous(), positives.contiguous()
        negatives = negatives.contiguous() if negatives is not None else None
    tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
    counts = count_hard_negatives(clusters)
    counts = ranks.sum(counts) if counts is not None else None
    batch = Batch(
        anchors,
        positives,
        negatives,
        tau,
        clusters,
        options,
        ranks.needs,
        ranks.batch,
        ranks.first,
        ranks.size > 1,
        counts,
    )
    products = make_products(backend, batch)
    home, wants = Block(positives, negatives, clusters.ids, ranks.first, 0), any(ranks.needs)
    # Z of every row must be known before a gradient.
    rounds = [(True, wants)] if ranks.one_block else [(True, False), (False, True)][: 1 + wants]
    for totals, gradients in rounds:
        for block in ranks.blocks(home):
            columns = products.open(block, totals, gradients)
            for rows in products.chunks(columns):
                weights = products.weigh(columns, rows)
                if gradients:
                    products.differentiate(columns, rows, weights)
            if gradients:
                ranks.give(*products.close(columns))
    loss, terms = combine(batch, Sums(*ranks.sum_each(products.sums())), products.has_margins)
    of_anchors, of_temperature = products.own()
    found = [of_anchors, *ranks.take()]
    if ranks.size > 1:  # back to the gradient of one process under an average; τ's is whole on each rank
        found = [None if gradient is None else gradient * ranks.size for gradient in found]
        of_temperature = None if of_temperature is None else ranks.sum(of_temperature)
    found.append(of_temperature)
    return Found(loss, terms, tuple(g if need else None for g, need in zip(found, needs, strict=True)))


def make_products(backend: str, batch: Batch) -> Products:
    """`TritonProducts` for "triton-chunked", else `TorchProducts`."""
    if backend != "triton-chunked":
        return TorchProducts(batch)
    from .triton_products import TritonProducts

    return TritonProducts(batch)
