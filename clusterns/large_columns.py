"""Columns that a large batch's rows are compared with, and what comes of them: the side of the third product.

The rows' side is `large.Sweeper`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kernels import chunk_launchers as launchers
from .reference import SHORTEST_NORM
from .sweep import Block

if TYPE_CHECKING:
    from .large import Sweeper


class Source(NamedTuple):
    """Columns of one kind: raw rows (n, D), 1/‖row‖ (n,), and what the second and third product take."""

    raw: Tensor
    inverse: Tensor
    operand: Tensor
    tiles: int
    is_centroids: bool


class Columns:
    """A block's columns and their gradients, (n, D) float32, but for the projection."""

    def __init__(self, sweeper: Sweeper, block: Block, want_gradients: bool):
        rows = sweeper.rows
        _, need_positives, need_negatives, _ = rows.needs
        self.sources = [sweeper.source(block.positives)]
        needed = [need_positives]
        if block.negatives is not None:
            self.sources.append(sweeper.source(block.negatives))
            needed.append(need_negatives)
        self.found: list[Tensor | None] = [
            source.raw.new_empty(source.raw.shape, dtype=torch.float32) if want_gradients and need else None
            for source, need in zip(self.sources, needed, strict=True)
        ]
        self.own: Tensor | None = None  # (M,) by sorted row: the column of its own positive
        if block.first is not None:
            self.own = block.first + sweeper.row_numbers
            if sweeper.centroids is not None:
                self.sources.append(sweeper.centroids)
        self.cluster_ids = block.cluster_ids
        if sweeper.false_negatives == "bml":
            assert block.cluster_ids is not None
            assert sweeper.cluster_ids is not None
            self.order = block.cluster_ids.argsort(stable=True)
            ids, row_ids = block.cluster_ids[self.order], sweeper.cluster_ids
            self.row_borders = _borders(ids, row_ids)
            self.borders = _borders(row_ids, ids)  # of the columns, among the sorted rows
            count = len(ids)
            self.own_place = torch.full_like(sweeper.row_numbers, -1)  # sorted column of each sorted row
            self.owner_place = torch.full_like(self.order, -1)  # sorted row of each sorted column
            if self.own is not None:
                places = torch.empty_like(self.order)
                places[self.order] = torch.arange(count, device=ids.device)
                self.own_place = places[self.own]
                self.owner_place[self.own_place] = torch.arange(len(row_ids), device=ids.device)

    def unprojected(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients g of positives (n, D) and negatives (N, D), where wanted, before g − u (u·g)."""
        return self.found[0], self.found[1] if len(self.found) > 1 else None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of positives and negatives themselves."""
        through: list[Tensor | None] = []
        for source, gradient in zip(self.sources, self.found, strict=False):
            if gradient is None:
                through.append(None)
                continue
            out = torch.empty(source.raw.shape, dtype=kept_dtype(source.raw.dtype), device=gradient.device)
            launchers.through_norm(gradient, source.raw, source.inverse, out, scaled=True)
            through.append(out)
        self.found = []
        return through[0], through[1] if len(through) > 1 else None


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out (M, N) float32 = a (M, L) · b (L, N), added to what is there unless `first`; sums are float32."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
    elif a.is_cuda and torch.version.hip is None:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=0 if first else 1, out=out)
    else:  # the interpreter; and ROCm, where torch gives half-precision products no float32 result
        product = a @ b if a.is_cuda else a.float() @ b.float()
        if first:
            out.copy_(product)
        else:
            out += product


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """How gradients wait for the backward: float16 would underflow before it is scaled."""
    return torch.float32 if dtype == torch.float16 else dtype


def _borders(ids: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """First and past-the-last place in sorted `ids` of each of `of`."""
    return torch.searchsorted(ids, of), torch.searchsorted(ids, of, right=True)


def inverse_norms(z: Tensor) -> Tensor:
    """1/‖z_i‖ in float32, 0 for a row without direction."""
    norm = torch.linalg.vector_norm(z, dim=1, dtype=torch.float32)
    return norm.reciprocal().masked_fill_(norm <= SHORTEST_NORM, 0.0)
