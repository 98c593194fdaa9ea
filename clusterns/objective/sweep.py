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

Operations, of the products: 6·B²·D on one process. 8·B²·D where every row's Z must be known before the first
gradient: on a ring of ranks, and with directions="both", as the weight of pair (i, j) then holds the total of
column j too, which is known after the last row. Less would be to keep S.

Memory above inputs and gradients: O((B+N+K)·D) and one chunk of the workspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .problem import Batch, Block, Found, Needs, combine, count_hard_negatives
from .ranks import Alone
from .torch_products import TorchProducts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Products(Protocol):
    """The three products of a batch, and what its rows have found so far; `Any` is a backend's own."""

    has_margins: bool  # some pair is in the margin loss
    # With directions="both", (2, B) by place in the whole batch (of a column: `block.place` and its number in
    # the block as the caller gave it), natural logarithms, in the dtype of the computation; else None.
    # [0, j]: log Σ_i exp(S_ij/τ) over the rows i of this process other than j's own, pairs that are out left
    #         out; −inf where there is none.
    # [1, j]: S_jj/τ where row j is of this process, else −inf.
    # After the round of totals `sweep` puts log Σ exp over the ranks in its place, the same bits on each: [0]
    # is then over all rows but the own, [1] every column's own logit, logaddexp of both log Z of the columns.
    log_columns: Tensor | None

    def __init__(self, batch: Batch, ranks: Alone, hard_counts: Tensor | None):
        """hard_counts (K,): for how many sentences of the whole batch k is the hard negative, n_k."""

    def open(self, block: Block, totals: bool, gradients: bool) -> Any:
        """Columns of a block, for the totals of the rows, for gradients, or for both."""

    def chunks(self, columns: Any) -> Iterator[Any]:
        """Rows at a time."""

    def weigh(self, columns: Any, rows: Any) -> Any:
        """Product 1, and with `totals` all sums over the columns."""

    def differentiate(self, columns: Any, rows: Any, weights: Any) -> None:
        """Products 2 and 3."""

    def close(self, columns: Any) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the block's positives and explicit negatives, where wanted."""

    def own(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the anchors (M, D) and of τ, 0-d, where wanted; once."""

    def sums(self) -> Tensor:
        """Sums over the rows of this process, (3 + 2·D,).

        Of InfoNCE, of the margins beyond what Δ = 0 adds, of s_i; and of the unit rows a_i and p_i. With
        directions="both" row i adds to the first half of what it costs as a row and as a column.
        """


def sweep(batch: Batch, needs: Needs, backend: str, ranks: Alone | None = None) -> Found:
    """Loss and gradients of a batch, of which these are this process's rows; with `ranks` all call it."""
    ranks = ranks or Alone(batch.anchors.shape[0], needs)
    counts = count_hard_negatives(batch.clusters)
    products = make_products(backend)(batch, ranks, ranks.sum(counts) if counts is not None else None)
    home = Block(batch.positives, batch.negatives, batch.clusters.ids, ranks.first, 0)
    # Every Z must be known before a gradient.
    wants, both = any(ranks.needs), batch.options.directions == "both"
    one_round = ranks.one_block and not both
    rounds = [(True, wants)] if one_round else [(True, False), (False, True)][: 1 + wants]
    for totals, gradients in rounds:
        for block in ranks.blocks(home):
            columns = products.open(block, totals, gradients)
            for rows in products.chunks(columns):
                weights = products.weigh(columns, rows)
                if gradients:
                    products.differentiate(columns, rows, weights)
            if gradients:
                ranks.give(*products.close(columns))
            del block, columns, rows, weights  # before the next block takes its workspace
        if totals and both:
            assert products.log_columns is not None
            products.log_columns = ranks.gather(products.log_columns).logsumexp(dim=0)
    loss, terms = combine(batch.options, ranks.batch, ranks.sum(products.sums()), products.has_margins)
    of_anchors, of_temperature = products.own()
    found = [of_anchors, *ranks.take()]
    if ranks.size > 1:  # back to the gradient of one process under an average; τ's is whole on each rank
        found = [None if gradient is None else gradient * ranks.size for gradient in found]
        of_temperature = None if of_temperature is None else ranks.sum(of_temperature)
    found.append(of_temperature)
    return Found(loss, terms, tuple(g if need else None for g, need in zip(found, needs, strict=True)))


def make_products(backend: str) -> type[Products]:
    """`TritonProducts` for "triton-chunked", else `TorchProducts`."""
    if backend != "triton-chunked":
        return TorchProducts
    from .triton_products import TritonProducts

    return TritonProducts
