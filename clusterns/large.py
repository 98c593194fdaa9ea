"""The Triton path for batches whose cosines do not fit the workspace: 6·B²·D operations both ways.

Per chunk of rows the first product is a Triton kernel whose epilogue leaves softmax weights, in bfloat16 for
half-precision embeddings, and their row sums in float32; the two products that follow are the vendor
library's, added up over chunks in float32. 1/Z scales anchors and results, never the matrix. Raw rows are
multiplied and the norms divided out, so half precision is exact in the cosines.

float16 embeddings too have bfloat16 weights: exp(cos/τ) leaves the range of float16. The gradient of explicit
negatives, which weights alone make up, then takes the other factor of its product in two parts; with one it
would be further from the truth than plain torch in float16. The margin loss is a kernel of its own over the
diagonal blocks of cluster-mates: its slopes, λ/B² each, would vanish beside the weights in half precision.

`Sweeper` has the interface of `chunked.Sweeper`. No function waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fused import common_dtype, unit_stride
from .kernels import chunk_launchers as launchers
from .kernels.launch import padded
from .large_columns import Columns, Source, accumulate, inverse_norms, kept_dtype
from .sweep import Block, Phase, Rows, is_safe

_LOG2_E = math.log2(math.e)
_SAFE_TEMPERATURE = 0.025  # kernels.weights.SAFE_TEMPERATURE
_SAFE_WEIGHT = 20.0


class Sweeper:
    """Rows that meet blocks of columns; keeps what the rows have found so far.

    Rows are sorted by cluster where the margin loss wants mates side by side; the arrays kept here are in
    that order, the results in the caller's.
    """

    def __init__(self, rows: Rows, negatives: Tensor | None):
        self.rows, self.options = rows, rows.options
        self.dtype = common_dtype(rows.anchors, rows.positives, negatives)
        self.weight_dtype = torch.bfloat16 if self.dtype.itemsize == 2 else torch.float32
        self.anchors = unit_stride(rows.anchors.detach().to(self.dtype))
        device, count = self.anchors.device, len(self.anchors)
        ids = rows.clusters.ids
        self.false_negatives = self.options.false_negatives if ids is not None else "keep"
        self.order: Tensor | None = None
        self.row_numbers = torch.arange(count, device=device)
        self.cluster_ids = ids
        if ids is not None and self.false_negatives == "bml":
            self.order = self.row_numbers = ids.argsort(stable=True)
            self.cluster_ids = ids[self.order]
        self.anchor_inverse = inverse_norms(self.anchors)
        self.hard_ids: Tensor | None = None
        self.centroids: Source | None = None
        if rows.hard_counts is not None:
            assert rows.clusters.centroids is not None
            assert rows.clusters.hard_ids is not None
            raw = rows.clusters.centroids.detach().float().contiguous()
            tiles = launchers.column_tiles(raw, self.anchors)
            self.centroids = Source(raw, inverse_norms(raw), raw, tiles, True)
            self.hard_ids = self._sorted(rows.clusters.hard_ids)
            self.uses = rows.hard_counts.float()
        tau = rows.temperature
        self.temperature = tau.float() if isinstance(tau, Tensor) else tau
        self.needs_maximum = isinstance(tau, Tensor) or not is_safe(
            tau, self.options, 1 / _SAFE_TEMPERATURE, _SAFE_WEIGHT
        )

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.positive_cosine = zeros(count)
        self.log_others: Tensor | None = None  # base 2
        self.slope_sum, self.margin_sum = zeros(count), zeros(count)
        self.anchor_sum, self.positive_sum = (zeros(self.anchors.shape[1]) for _ in range(2))
        self.along = zeros()  # Σ a_i · ∂InfoNCE/∂a_i
        self.unit_gradient: Tensor | None = None  # (M, D) float32, sorted: over several blocks
        self.gradient: Tensor | None = None  # (M, D), of the anchors themselves

    def source(self, raw: Tensor) -> Source:
        """Columns of embeddings."""
        raw = unit_stride(raw.detach().to(self.dtype))
        operand = raw.to(self.weight_dtype)
        return Source(raw, inverse_norms(raw), operand, launchers.column_tiles(raw, self.anchors), False)

    def sweep(self, block: Block, phase: Phase) -> Columns:
        """Meet a block of columns; what was found for them is in the result."""
        want_gradients = phase is not Phase.TOTALS and any(self.rows.needs)
        columns = Columns(self, block, want_gradients)
        need_rows = self.rows.needs[0] or self.rows.needs[3]
        if need_rows and phase is Phase.BOTH:
            self.gradient = torch.empty(
                self.anchors.shape, dtype=kept_dtype(self.dtype), device=self.anchors.device
            )
        if need_rows and phase is Phase.GRADIENTS and self.unit_gradient is None:
            self.unit_gradient = torch.zeros(
                self.anchors.shape, dtype=torch.float32, device=self.anchors.device
            )
        log_others = torch.empty_like(self.positive_cosine)
        count = self._rows_of_a_chunk(columns, want_gradients)
        buffers = [
            torch.empty(
                (count, padded(len(source.raw))),
                dtype=torch.float32 if source.is_centroids else self.weight_dtype,
                device=self.anchors.device,
            )
            if want_gradients
            else None
            for source in columns.sources
        ]
        for start in range(0, len(self.anchors), count):
            chunk = slice(start, min(start + count, len(self.anchors)))
            self._sweep_chunk(columns, chunk, buffers, log_others, phase, want_gradients)
        if phase is not Phase.GRADIENTS:
            seen = self.log_others
            self.log_others = log_others if seen is None else torch.logaddexp2(seen, log_others)
        of_positives = columns.found[0]
        if want_gradients and self._has_slopes() and of_positives is not None:
            launchers.add_margins(
                columns.sources[0].raw, self.anchors, columns.sources[0].inverse, self.anchor_inverse,
                columns.order, self.row_numbers, columns.borders, columns.owner_place, self.positive_cosine,
                (self.options.bml_alpha, self.options.bml_beta),
                out=of_positives, out_scale=self._slope_scale(), transposed=True,
            )  # fmt: skip
        return columns

    def _sweep_chunk(
        self,
        columns: Columns,
        chunk: slice,
        buffers: list[Tensor | None],
        log_others: Tensor,
        phase: Phase,
        want_gradients: bool,
    ) -> None:
        numbers, own = self.row_numbers[chunk], None
        x = self.anchors[chunk] if self.order is None else self.anchors.index_select(0, numbers)
        x_inverse = self.anchor_inverse[numbers]
        count = len(x)
        a = x.float() * x_inverse[:, None]  # (R, D)
        p: Tensor | None = None
        if columns.own is not None:
            own, positives = columns.own[chunk], columns.sources[0]
            p = positives.raw.index_select(0, own).float() * positives.inverse[own, None]
            if phase is not Phase.GRADIENTS:
                self.positive_cosine[chunk] = (a * p).sum(dim=1)
                self.anchor_sum += a.sum(dim=0)
                self.positive_sum += p.sum(dim=0)
        positive = self.positive_cosine[chunk] * (_LOG2_E / self.temperature)  # logit, base 2
        reference = self._reference(columns, x, x_inverse, own, chunk, positive, phase)
        mode = "weights" if want_gradients else "totals"
        partial = self._weigh(mode, columns, x, x_inverse, own, chunk, reference, buffers)
        if phase is not Phase.GRADIENTS:
            others = partial.sum(dim=0)
            log_others[chunk] = others.log2() if reference is None else others.log2() + reference
        else:
            assert self.log_others is not None
            known = self.log_others[chunk]
            others = (known if reference is None else known - reference).exp2()
        if not want_gradients:
            self._margins(columns, x, x_inverse, chunk, None, phase)
            return
        total = others + (positive if reference is None else positive - reference).exp2()  # Z
        batch = self.rows.batch
        row_scale = 1.0 / (batch * self.temperature * total)
        du: Tensor | None = None
        if self.rows.needs[0] or self.rows.needs[3]:
            du = torch.empty_like(a)
            for position, (source, weights) in enumerate(zip(columns.sources, buffers, strict=True)):
                assert weights is not None
                part = weights[:count, : len(source.raw)]
                accumulate(du, part, source.operand, first=position == 0)  # product 2
            du *= row_scale[:, None]
            if self.rows.needs[3]:
                self.along += torch.dot(a.view(-1), du.view(-1))
        self._margins(columns, x, x_inverse, chunk, du, phase)
        own_weight: Tensor | None = None
        if own is not None:  # the positive, kept apart from the weights: no difference of near-equals
            own_weight = others * row_scale
            if self.rows.needs[3]:
                self.along -= torch.dot(own_weight, self.positive_cosine[chunk])
            own_weight = own_weight + self.slope_sum[chunk] * self._slope_scale()
            assert p is not None
            if du is not None:
                du -= p * own_weight[:, None]
        scaled = a * row_scale[:, None]
        share = scaled.to(self.weight_dtype)
        for position, (gradient, weights) in enumerate(zip(columns.found, buffers, strict=False)):
            if gradient is not None:
                assert weights is not None
                part = weights[:count, : len(gradient)].T
                accumulate(gradient, part, share, first=chunk.start == 0)  # product 3
                if position > 0 and self.dtype == torch.float16:
                    accumulate(gradient, part, (scaled - share).to(share.dtype), first=False)
        if own is not None and own_weight is not None and columns.found[0] is not None:
            own_weight *= columns.sources[0].inverse[own]
            columns.found[0].index_add_(0, own, a * own_weight[:, None], alpha=-1)
        if du is not None:
            if phase is Phase.BOTH:
                assert self.gradient is not None
                launchers.through_norm(du, x, x_inverse, self.gradient, numbers)
            else:
                assert self.unit_gradient is not None
                self.unit_gradient[chunk] += du

    def sums(self) -> Tensor:
        """Sums over the rows, (3,): InfoNCE, margins beyond Δ = 0, positive cosines."""
        assert self.log_others is not None
        margin = self.log_others / _LOG2_E - self.positive_cosine / self.temperature
        info_nce = torch.logaddexp(margin, torch.zeros_like(margin)).sum()  # log(1 + Σ_others / E_ii)
        return torch.stack([info_nce, self.margin_sum.sum(), self.positive_cosine.sum()])

    def directions(self) -> tuple[Tensor, Tensor]:
        """Sums of the unit rows of anchors and of their positives, (D,) each."""
        return self.anchor_sum, self.positive_sum

    def temperature_gradient(self) -> Tensor | None:
        """−1/τ · Σ_ij S_ij ∂InfoNCE/∂S_ij over the rows; 0-d."""
        return -self.along / self.temperature if self.rows.needs[3] else None

    def anchor_gradient(self) -> Tensor | None:
        """Gradient of the anchors (M, D), in the caller's order."""
        if not self.rows.needs[0]:
            return None
        if self.gradient is None:
            assert self.unit_gradient is not None
            self.gradient = torch.empty(
                self.anchors.shape, dtype=kept_dtype(self.dtype), device=self.anchors.device
            )
            x, inverse = self._sorted(self.anchors), self._sorted(self.anchor_inverse)
            launchers.through_norm(self.unit_gradient, x, inverse, self.gradient, self.row_numbers)
        return self.gradient

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows[self.order]

    def _has_slopes(self) -> bool:
        return self.false_negatives == "bml" and self.options.bml_weight != 0.0

    def _slope_scale(self) -> float:
        return self.options.bml_weight / self.rows.batch**2

    def _rows_of_a_chunk(self, columns: Columns, want_gradients: bool) -> int:
        """So many rows that weights and temporaries stay within the workspace; whole tiles if it can be."""
        row_bytes = 28 * self.anchors.shape[1] + 4 * sum(source.tiles for source in columns.sources)
        if want_gradients:
            for source in columns.sources:
                itemsize = 4 if source.is_centroids else self.weight_dtype.itemsize
                row_bytes += padded(len(source.raw)) * itemsize
        count = max(1, self.options.workspace_bytes // row_bytes)
        return min(len(self.anchors), count - count % 128 if count > 128 else count)

    def _reference(
        self,
        columns: Columns,
        x: Tensor,
        x_inverse: Tensor,
        own: Tensor | None,
        chunk: slice,
        positive: Tensor,
        phase: Phase,
    ) -> Tensor | None:
        """What is subtracted from each row's logits, (R,) base 2; None where τ is large enough."""
        if not self.needs_maximum:
            return None
        if phase is Phase.GRADIENTS:
            assert self.log_others is not None
            largest = torch.logaddexp2(self.log_others[chunk], positive)
        else:
            partial = self._weigh("maxima", columns, x, x_inverse, own, chunk, None, None)
            largest = torch.maximum(partial.amax(dim=0), positive)
        # A learned τ is known to the device alone, and so is whether the kernel has looked for maxima.
        if isinstance(self.temperature, Tensor) and abs(self.options.hard_negative_weight) <= _SAFE_WEIGHT:
            largest = largest.masked_fill(self.temperature >= _SAFE_TEMPERATURE, 0.0)
        return largest

    def _weigh(
        self,
        mode: str,
        columns: Columns,
        x: Tensor,
        x_inverse: Tensor,
        own: Tensor | None,
        chunk: slice,
        reference: Tensor | None,
        buffers: list[Tensor | None] | None,
    ) -> Tensor:
        """Run the first product for every kind of columns; row sums or maxima by tile, (tiles, R)."""
        partial = torch.empty(
            (sum(source.tiles for source in columns.sources), len(x)), dtype=torch.float32, device=x.device
        )
        first = 0
        for position, source in enumerate(columns.sources):
            ids = None
            if position == 0 and self.false_negatives == "exclude":
                assert self.cluster_ids is not None
                assert columns.cluster_ids is not None
                ids = (self.cluster_ids[chunk], columns.cluster_ids)
            weights = buffers[position] if buffers is not None else None
            launchers.weigh(
                mode, x, source.raw, x_inverse, source.inverse, self.temperature,
                partial[first : first + source.tiles], weights,
                own=own if position == 0 else None,
                cluster_ids=ids,
                uses=self.uses if source.is_centroids else None,
                hard_ids=self.hard_ids[chunk] if source.is_centroids and self.hard_ids is not None else None,
                hard_negative_weight=self.options.hard_negative_weight,
                reference=reference,
            )  # fmt: skip
            first += source.tiles
        return partial

    def _margins(
        self,
        columns: Columns,
        x: Tensor,
        x_inverse: Tensor,
        chunk: slice,
        du: Tensor | None,
        phase: Phase,
    ) -> None:
        """Margin loss of the chunk's rows: sums on the first visit, and the gradient added to du (R, D)."""
        if self.false_negatives != "bml":
            return
        values = None
        if phase is not Phase.GRADIENTS:
            values = (torch.empty_like(x_inverse), torch.empty_like(x_inverse))
        out = du if self._has_slopes() else None
        if values is None and out is None:
            return
        low, high = columns.row_borders
        launchers.add_margins(
            x, columns.sources[0].raw, x_inverse, columns.sources[0].inverse,
            None, columns.order, (low[chunk], high[chunk]), columns.own_place[chunk],
            self.positive_cosine[chunk], (self.options.bml_alpha, self.options.bml_beta),
            values=values, out=out, out_scale=self._slope_scale(),
        )  # fmt: skip
        if values is not None:
            self.slope_sum[chunk] += values[0]
            self.margin_sum[chunk] += values[1]
