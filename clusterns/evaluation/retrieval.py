"""Finding the passages that answer a query, by cosine: ranks, and the figures that are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..corpus.judged import Queries
from .correlation import Floats, check_finite
from .sts_scores import Vectors

# Ranks that figures look at.
DEPTH = 10
# Cosines closer than this are one: the last bits of a product depend on how it was blocked.
TIE = 1e-9
# Cosines held at a time, 128 MB.
_CELLS = 1 << 24


def relevant_ranks(
    name: str,
    queries: Tensor,
    passages: Tensor,
    relevant: Sequence[Sequence[int]],
    not_for: Mapping[int, int] | None = None,
) -> Tensor:
    """Ranks from 1, by cosine, that each query gives its own passages: (Q, 10), best first, padded with ∞.

    Args:
        name: of the set, for the ValueError where there are NaN or infinity.
        queries, passages: (Q, D) and (P, D).
        relevant: for each query the places of its own passages, one at least.
        not_for: passages that a query does not meet, by its place: those that read as itself.

    Another passage as near as its own one, to 1e-9, ranks before it: embeddings that are all equal score as
    the worst.
    """
    for rows in (queries, passages):
        check_finite(name, rows)
    passages = F.normalize(passages.detach().double(), dim=1)
    ranks = torch.full((len(queries), DEPTH), math.inf, dtype=torch.float64)
    step = max(1, _CELLS // len(passages))
    for start in range(0, len(queries), step):
        chunk = F.normalize(queries[start : start + step].detach().double(), dim=1)
        for row, cosines in enumerate(chunk @ passages.T, start):
            if not_for and row in not_for:
                cosines[not_for[row]] = -math.inf
            own = cosines[list(relevant[row])].sort(descending=True).values
            least = own[:DEPTH, None] - TIE
            others = (cosines >= least).sum(dim=1) - (own >= least).sum(dim=1)
            ranks[row, : len(least)] = (others + torch.arange(1, len(least) + 1)).double()
    return ranks


def query_ranks(name: str, judged: Queries, vectors: Vectors) -> Tensor:
    """`relevant_ranks` of queries that are embedded."""
    place = {passage: index for index, passage in enumerate(judged.passages)}
    not_for = {row: place[query] for row, query in enumerate(judged.queries) if query in place}
    embedded = vectors.of(judged.queries), vectors.of(judged.passages)
    return relevant_ranks(name, *embedded, judged.relevant, not_for)


def retrieval_figures(ranks: Tensor, relevant: Sequence[Sequence[int]]) -> dict[str, Floats]:
    """MRR@10, recall@1, 5 and 10, and nDCG@10 of each query, (Q,) each, from 0 to 1.

    Args:
        ranks: (Q, 10), of `relevant_ranks`.
        relevant: as there; how many passages a query has is what its recall is a share of.
    """
    counts = torch.tensor([len(places) for places in relevant], dtype=torch.float64)
    gains = (1 + ranks).log2().reciprocal().where(ranks <= DEPTH, 0.0)
    ideal = torch.arange(2, DEPTH + 2, dtype=torch.float64).log2().reciprocal().cumsum(dim=0)
    figures = {"mrr_at_10": ranks[:, 0].reciprocal().where(ranks[:, 0] <= DEPTH, 0.0)}
    for depth in (1, 5, DEPTH):
        figures[f"recall_at_{depth}"] = (ranks <= depth).sum(dim=1) / counts
    figures["ndcg_at_10"] = gains.sum(dim=1) / ideal[counts.clamp(max=DEPTH).long() - 1]
    return {key: values.numpy() for key, values in figures.items()}
