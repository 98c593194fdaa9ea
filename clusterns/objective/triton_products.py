"""The three products on Triton, for batches whose cosines do not fit the workspace: 6·B²·D operations.

Per chunk of rows the first product is a Triton kernel whose epilogue leaves softmax weights, in bfloat16 for
half-precision embeddings, and their row sums in float32; the two products that follow are the vendor
library's, added up over chunks in float32. 1/Z scales anchors and results, never the matrix. Raw rows are
multiplied and the norms divided out, so half precision is exact in the cosines.

float16 embeddings too have bfloat16 weights: exp(cos/τ) leaves the range of float16. The gradient of explicit
negatives, which weights alone make up, then takes the other factor of its product in two parts; with one it
would be further from the truth than plain torch in float16. The margin loss is a kernel of its own over the
diagonal blocks of cluster-mates: its slopes, λ/B² each, would vanish beside the weights in half precision.

`TritonProducts` has the interface of `torch_products.TorchProducts`. No function waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..kernels import chunk_launchers as launchers
from ..kernels.launch import padded
from ..kernels.weights import SAFE_TEMPERATURE
from .norms import common_dtype, inverse_norms, kept_dtype, unit_stride
from .problem import SAFE_WEIGHT, Batch, Block
from .ranks import Alone

_LOG2_E = math.log2(math.e)


class Source(NamedTuple):
    """Columns of one kind."""

    raw: Tensor  # (n, D)
    inverse: Tensor  # (n,) 1/‖row‖
    operand: Tensor  # (n, D) what the second and third product take
    tiles: int
    is_centroids: bool
    wanted: bool = False  # whether they want a gradient
    gradient: Tensor | None = None  # (n, D) float32, over ‖row‖ and without the projection
    weights: Tensor | None = None  # (R, padded(n)) of a chunk


class Mates(NamedTuple):
    """Where cluster-mates stand once rows and columns are sorted by cluster."""

    order: Tensor  # (n,) columns
    of_rows: tuple[Tensor, Tensor]  # (M,) each: first and past the last sorted column of each sorted row
    of_columns: tuple[Tensor, Tensor]  # (n,) each: and the sorted rows of each sorted column
    own: Tensor  # (M,) the sorted column of each sorted row's own positive; −1 where it is not here
    owner: Tensor  # (n,) the sorted row of each sorted column


class Columns(NamedTuple):
    """A block's columns: positives, explicit negatives and, beside the own positives, centroids."""

    sources: list[Source]
    own: Tensor | None  # (M,) by sorted row: the column of its own positive, where it is here
    ids: Tensor | None
    mates: Mates | None
    chunk: int  # R
    totals: bool
    differentiate: bool


class Weights(NamedTuple):
    """A chunk after its first product."""

    x: Tensor  # (R, D) raw rows
    x_inverse: Tensor  # (R,)
    a: Tensor  # (R, D) unit rows
    p: Tensor | None  # (R, D) unit rows of their positives, where these are here
    positive: Tensor  # (R,) E of the own positive
    others: Tensor  # (R,) row sums of the others


class TritonProducts:
    """Rows that meet blocks of columns; keeps what the rows have found so far.

    Rows are sorted by cluster where the margin loss wants mates side by side; the arrays kept here are in
    that order, the results in the caller's.
    """

    def __init__(self, batch: Batch, ranks: Alone, hard_counts: Tensor | None):
        self.batch, self.options, self.ranks = batch, batch.options, ranks
        self.dtype = common_dtype(batch.anchors, batch.positives, batch.negatives)
        self.weight_dtype = torch.bfloat16 if self.dtype.itemsize == 2 else torch.float32
        self.anchors = unit_stride(batch.anchors.detach().to(self.dtype))
        device, count = self.anchors.device, len(self.anchors)
        clusters = batch.clusters
        word = self.options.false_negatives if clusters.ids is not None else "keep"
        self.excludes, self.has_margins = word == "exclude", word == "bml"
        self.order: Tensor | None = None
        self.row_numbers = torch.arange(count, device=device)
        if self.has_margins and clusters.ids is not None:
            self.order = self.row_numbers = clusters.ids.argsort(stable=True)
        self.cluster_ids = None if clusters.ids is None else self._sorted(clusters.ids)
        self.anchor_inverse = inverse_norms(self.anchors, torch.float32)
        self.centroids: Source | None = None
        if hard_counts is not None:
            assert clusters.centroids is not None
            assert clusters.hard_ids is not None
            self.centroids = self._source(clusters.centroids.float().contiguous(), is_centroids=True)
            self.hard_ids, self.uses = self._sorted(clusters.hard_ids), hard_counts.float()
        tau = batch.temperature
        self.temperature = tau.detach().float() if isinstance(tau, Tensor) else tau
        self.needs_maximum = not self.options.is_safe(tau, 1 / SAFE_TEMPERATURE.value)
        self.slope_scale = self.options.bml_weight / ranks.batch**2
        self.margins = {
            "alpha": float(self.options.bml_alpha),
            "beta": float(self.options.bml_beta),
            "out_scale": float(self.slope_scale),
        }

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.positive_cosine = zeros(count)
        self.log_others = torch.full_like(self.positive_cosine, -torch.inf)  # base 2
        self.slope_sum, self.margin_sum = zeros(count), zeros(count)
        self.anchor_sum, self.positive_sum = (zeros(self.anchors.shape[1]) for _ in range(2))
        self.along = zeros()  # Σ a_i · ∂InfoNCE/∂a_i
        self.unit_gradient: Tensor | None = None  # (M, D) float32, sorted: over several blocks
        self.gradient: Tensor | None = None  # (M, D), of the anchors themselves

    def open(self, block: Block, totals: bool, gradients: bool) -> Columns:
        """Prepare to meet a block: for the totals of the rows, for the gradients, or for both."""
        need_anchors, need_positives, need_negatives, need_temperature = self.ranks.needs
        sources, own = [self._source(block.positives, need_positives)], None
        if block.negatives is not None:
            sources.append(self._source(block.negatives, need_negatives))
        if block.own is not None:
            own = block.own + self.row_numbers
            if self.centroids is not None:
                sources.append(self.centroids)
        chunk = min(len(self.anchors), self._chunk(sources, gradients))
        if gradients:
            sources = [
                each._replace(
                    gradient=torch.empty_like(each.raw, dtype=torch.float32) if each.wanted else None,
                    weights=each.operand.new_empty((chunk, padded(len(each.raw)))),
                )
                for each in sources
            ]
            if need_anchors or need_temperature:
                if totals:
                    self.gradient = torch.empty_like(self.anchors, dtype=kept_dtype(self.dtype))
                elif self.unit_gradient is None:
                    self.unit_gradient = torch.zeros_like(self.anchors, dtype=torch.float32)
        mates = self._find_mates(block.cluster_ids, own) if self.has_margins else None
        return Columns(sources, own, block.cluster_ids, mates, chunk, totals, gradients)

    def _chunk(self, sources: list[Source], gradients: bool) -> int:
        """So many rows that weights and temporaries stay within the workspace; whole tiles if it can be."""
        row_bytes = 28 * self.anchors.shape[1] + 4 * sum(source.tiles for source in sources)
        if gradients:
            row_bytes += sum(padded(len(each.raw)) * each.operand.itemsize for each in sources)
        chunk = max(1, self.options.workspace_bytes // row_bytes)
        return chunk - chunk % 128 if chunk > 128 else chunk

    def chunks(self, columns: Columns) -> Iterator[slice]:
        """Rows whose weights fit the workspace."""
        for start in range(0, len(self.anchors), columns.chunk):
            yield slice(start, min(start + columns.chunk, len(self.anchors)))

    def weigh(self, columns: Columns, rows: slice) -> Weights:
        """Take product 1; with `totals` also what adds up over the columns."""
        numbers, p = self.row_numbers[rows], None
        x = self.anchors[rows] if self.order is None else self.anchors.index_select(0, numbers)
        x_inverse = self.anchor_inverse[numbers]
        a = x.float() * x_inverse[:, None]
        if columns.own is not None:
            own, positives = columns.own[rows], columns.sources[0]
            p = positives.raw.index_select(0, own).float() * positives.inverse[own, None]
            if columns.totals:
                self.positive_cosine[rows] = (a * p).sum(dim=1)
                self.anchor_sum += a.sum(dim=0)
                self.positive_sum += p.sum(dim=0)
        positive = self.positive_cosine[rows] * (_LOG2_E / self.temperature)  # logit, base 2
        known, reference = self.log_others[rows], None  # the latter is subtracted from each row's logits
        if self.needs_maximum:
            if columns.totals:
                maxima = self._launch("maxima", columns, x, x_inverse, rows, None)
                reference = torch.maximum(maxima.amax(dim=0), positive)
            else:
                reference = torch.logaddexp2(known, positive)
            # A learned τ is known to the device alone, and so is whether the kernel has looked for maxima.
            if isinstance(self.temperature, Tensor) and abs(self.options.hard_negative_weight) <= SAFE_WEIGHT:
                reference = reference.masked_fill(self.temperature >= SAFE_TEMPERATURE.value, 0.0)
        mode = "weights" if columns.differentiate else "totals"
        partial = self._launch(mode, columns, x, x_inverse, rows, reference)
        if columns.totals:
            others = partial.sum(dim=0)
            log_others = others.log2() if reference is None else others.log2() + reference
            torch.logaddexp2(known, log_others, out=known)
        else:
            others = (known if reference is None else known - reference).exp2()
        positive = (positive if reference is None else positive - reference).exp2()
        weights = Weights(x, x_inverse, a, p, positive, others)
        if not columns.differentiate:
            self._add_margins(columns, rows, weights, None)
        return weights

    def differentiate(self, columns: Columns, rows: slice, weights: Weights) -> None:
        """Take products 2 and 3."""
        x, x_inverse, a, p, positive, others = weights
        row_scale = 1.0 / (self.ranks.batch * self.temperature * (positive + others))  # 1/(BτZ)
        need_anchors, _, _, need_temperature = self.ranks.needs
        parts = [
            source.weights[: len(x), : len(source.raw)]
            for source in columns.sources
            if source.weights is not None
        ]
        du: Tensor | None = None
        if need_anchors or need_temperature:
            du = torch.empty_like(a)
            for place, (source, part) in enumerate(zip(columns.sources, parts, strict=True)):
                _accumulate(du, part, source.operand, first=place == 0)  # product 2
            du *= row_scale[:, None]
            if need_temperature:
                self.along += torch.dot(a.view(-1), du.view(-1))
        self._add_margins(columns, rows, weights, du)
        own_weight: Tensor | None = None
        if p is not None:  # the positive, kept apart from the weights: no difference of near-equals
            own_weight = others * row_scale
            if need_temperature:
                self.along -= torch.dot(own_weight, self.positive_cosine[rows])
            own_weight = own_weight + self.slope_sum[rows] * self.slope_scale
            if du is not None:
                du -= p * own_weight[:, None]
        scaled = a * row_scale[:, None]
        share = scaled.to(self.weight_dtype)
        positives = columns.sources[0]
        for source, part in zip(columns.sources, parts, strict=True):
            if source.gradient is not None:
                _accumulate(source.gradient, part.T, share, first=rows.start == 0)  # product 3
                if source is not positives and self.dtype == torch.float16:
                    _accumulate(source.gradient, part.T, (scaled - share).to(share.dtype), first=False)
        if own_weight is not None and columns.own is not None and positives.gradient is not None:
            own = columns.own[rows]
            own_weight *= positives.inverse[own]
            positives.gradient.index_add_(0, own, a * own_weight[:, None], alpha=-1)
        if du is None:
            return
        if self.unit_gradient is not None:
            self.unit_gradient[rows] += du
        else:
            launchers.through_norm(du, x, x_inverse, self.gradient, self.row_numbers[rows])

    def close(self, columns: Columns) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the block's positives (n, D) and explicit negatives (N, D), where wanted."""
        positives, mates = columns.sources[0], columns.mates
        if mates is not None and self.slope_scale and positives.gradient is not None:
            launchers.add_margins(
                positives.raw, self.anchors, mates.of_columns, x_inverse=positives.inverse,
                y_inverse=self.anchor_inverse, x_order=mates.order, y_order=self.row_numbers, own=mates.owner,
                positive=self.positive_cosine, out=positives.gradient, TRANSPOSED=True, **self.margins,
            )  # fmt: skip
        # Those that ranks add up stay in float32.
        dtype = torch.float32 if self.ranks.size > 1 else kept_dtype(self.dtype)
        through: list[Tensor | None] = [None, None]
        for place, source in enumerate(columns.sources):
            if source.gradient is not None:
                through[place] = out = torch.empty_like(source.raw, dtype=dtype)
                launchers.through_norm(source.gradient, source.raw, source.inverse, out, scaled=True)
        return through[0], through[1]

    def sums(self) -> Tensor:
        """Sums over the rows of this process, (3 + 2·D,)."""
        margin = self.log_others / _LOG2_E - self.positive_cosine / self.temperature
        rows = torch.stack([softplus(margin), self.margin_sum, self.positive_cosine])
        return torch.cat([rows.sum(dim=1), self.anchor_sum, self.positive_sum])

    def own(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the anchors (M, D), in the caller's order, and of τ, 0-d, where wanted."""
        need_anchors, _, _, need_temperature = self.ranks.needs
        of_temperature = -self.along / self.temperature if need_temperature else None
        if not need_anchors:
            return None, of_temperature
        if self.gradient is None:
            assert self.unit_gradient is not None
            self.gradient = torch.empty_like(self.anchors, dtype=kept_dtype(self.dtype))
            x, inverse = self._sorted(self.anchors), self._sorted(self.anchor_inverse)
            launchers.through_norm(self.unit_gradient, x, inverse, self.gradient, self.row_numbers)
        return self.gradient, of_temperature

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows[self.order]

    def _source(self, raw: Tensor, wanted: bool = False, is_centroids: bool = False) -> Source:
        raw = unit_stride(raw.detach() if is_centroids else raw.detach().to(self.dtype))
        operand = raw if is_centroids else raw.to(self.weight_dtype)
        tiles = launchers.column_tiles(raw, self.anchors)
        return Source(raw, inverse_norms(raw, torch.float32), operand, tiles, is_centroids, wanted)

    def _find_mates(self, ids: Tensor | None, own: Tensor | None) -> Mates:
        assert ids is not None
        assert self.cluster_ids is not None
        order, row_ids = ids.argsort(stable=True), self.cluster_ids
        ids = ids[order]
        own_place = torch.full_like(self.row_numbers, -1)
        owner_place = torch.full_like(order, -1)
        if own is not None:
            places = torch.empty_like(order)
            places[order] = torch.arange(len(order), device=order.device)
            own_place = places[own]
            owner_place[own_place] = torch.arange(len(own), device=order.device)
        return Mates(order, _borders(ids, row_ids), _borders(row_ids, ids), own_place, owner_place)

    def _launch(
        self, mode: str, columns: Columns, x: Tensor, x_inverse: Tensor, rows: slice, reference: Tensor | None
    ) -> Tensor:
        """Run the first product for every kind of columns; row sums or maxima by tile, (tiles, R)."""
        tiles = [source.tiles for source in columns.sources]
        partial = torch.empty((sum(tiles), len(x)), dtype=torch.float32, device=x.device)
        for source, part in zip(columns.sources, partial.split(tiles), strict=True):
            more: dict[str, Tensor | None] = {}
            if source is columns.sources[0]:
                more["own"] = columns.own[rows] if columns.own is not None else None
                if self.excludes and self.cluster_ids is not None:
                    more.update(row_ids=self.cluster_ids[rows], column_ids=columns.ids)
            if source.is_centroids:
                more.update(uses=self.uses, hard_ids=self.hard_ids[rows])
            launchers.weigh(
                mode, x, source.raw, x_inverse=x_inverse, y_inverse=source.inverse, partial=part,
                weights=source.weights if mode == "weights" else None, temperature=self.temperature,
                hard_negative_weight=float(self.options.hard_negative_weight), reference=reference, **more,
            )  # fmt: skip
        return partial

    def _add_margins(self, columns: Columns, rows: slice, weights: Weights, du: Tensor | None) -> None:
        """Margin loss of the chunk's rows: sums on the first visit, and the gradient added to du (R, D)."""
        mates, positives = columns.mates, columns.sources[0]
        out = du if self.slope_scale else None
        if mates is None or (out is None and not columns.totals):
            return
        x, x_inverse = weights.x, weights.x_inverse
        slope_sum, margin = (torch.empty_like(x_inverse) if columns.totals else None for _ in range(2))
        low, high = mates.of_rows
        launchers.add_margins(
            x, positives.raw, (low[rows], high[rows]), x_inverse=x_inverse, y_inverse=positives.inverse,
            y_order=mates.order, own=mates.own[rows], positive=self.positive_cosine[rows], out=out,
            slope_sum=slope_sum, margin=margin, **self.margins,
        )  # fmt: skip
        if slope_sum is not None and margin is not None:
            self.slope_sum[rows] += slope_sum
            self.margin_sum[rows] += margin


def _accumulate(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
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


def _borders(ids: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """First and past-the-last place in sorted `ids` of each of `of`."""
    return torch.searchsorted(ids, of), torch.searchsorted(ids, of, right=True)
