"""The torch path of the objective: row chunks of the logits, on any device, in float32 or float64.

`Sweeper` has the rows that a process owns and meets them with blocks of columns; see `clusterns.sweep` for
the products and the identities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .normalization import compute_dtype, through_norm, unit_rows
from .sweep import Block, Phase, Rows, is_safe, margin_at_zero, own_bonus

# Largest |logit| for which exp and sums of 2^40 of them stay inside the dtype without a row maximum.
_SAFE_LOGIT = {torch.float32: 40.0, torch.float64: 300.0}

_SAFE_WEIGHT = 20.0  # likewise for |w|

# Rows of a cluster-mate block: enough to fill vector units, few enough that little else falls into it.
_MATE_ROWS = 256

# Below this batch size, copying the rows into cluster order costs more than the cells it saves.
_SORTED_BATCH = 1024


class _MateBlock(NamedTuple):
    """Cells of S that hold every cluster-mate of a few consecutive rows."""

    cells: Tensor  # (rows, width), a view into the chunk
    local: slice  # the rows within the chunk
    mates: Tensor  # (rows, width) bool: same cluster; the sentence itself counts


class _Columns:
    """Unit rows X of a block, the positives in cluster order where that pays, and their gradient."""

    def __init__(self, sweeper: Sweeper, block: Block):
        rows, dtype = sweeper.rows, sweeper.dtype
        positives, negatives = block.positives, block.negatives
        self.num_positives = len(positives)
        self.known = self.num_positives + (len(negatives) if negatives is not None else 0)
        self.order: Tensor | None = None
        self.cluster_ids = block.cluster_ids
        self.own: Tensor | None = None
        if block.first is not None:  # where each row's own positive stands
            self.own = torch.arange(block.first, block.first + len(sweeper.a), device=positives.device)
        if sweeper.order is not None:
            assert block.cluster_ids is not None
            assert sweeper.cluster_ids is not None
            same = block.cluster_ids is rows.clusters.ids
            self.order = sweeper.order if same else block.cluster_ids.argsort(stable=True)
            self.cluster_ids = ids = block.cluster_ids[self.order]
            self.border_low = torch.searchsorted(ids, sweeper.cluster_ids).tolist()
            self.border_high = torch.searchsorted(ids, sweeper.cluster_ids, right=True).tolist()
            positives = positives.detach()[self.order]
            if self.own is not None and not same:
                places = torch.empty_like(self.order)
                places[self.order] = torch.arange(len(places))
                self.own = places[self.own[sweeper.order]]
        # Centroids come with the own positives: every row meets them once.
        centroids = rows.clusters.centroids if rows.hard_counts is not None and self.own is not None else None
        width = self.known + (len(centroids) if centroids is not None else 0)
        self.has_centroids = centroids is not None
        self.units = positives.new_empty((width, positives.shape[1]), dtype=dtype)
        scales = [unit_rows(positives, dtype, self.units[: self.num_positives])[1]]
        if negatives is not None:
            scales.append(unit_rows(negatives, dtype, self.units[self.num_positives : self.known])[1])
        if centroids is not None:
            unit_rows(centroids, dtype, self.units[self.known :])
        self.scale = torch.cat(scales)  # (n+N,)
        _, self.need_positives, self.need_negatives, _ = rows.needs
        self.need_negatives &= negatives is not None
        # The columns that want a gradient are one range: positives, explicit negatives, or both.
        start, stop = (0 if self.need_positives else self.num_positives), self.num_positives
        self.wanted = slice(start, self.known if self.need_negatives else stop)
        self.gradient: Tensor | None = None  # of the unit rows `wanted`

    def make_gradient(self) -> None:
        if self.wanted.stop > self.wanted.start:
            self.gradient = torch.empty_like(self.units[self.wanted])

    def unprojected(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients g of positives (n, D) and negatives (N, D), where wanted, before g − u (u·g); once."""
        if self.gradient is not None:
            self.gradient *= self.scale[self.wanted, None]
        return self._split()

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of positives and negatives; once."""
        if self.gradient is not None:
            units = self.units[self.wanted]
            along = (units * self.gradient).sum(dim=1)
            through_norm(self.gradient, units, along, self.scale[self.wanted])
        return self._split()

    def _split(self) -> tuple[Tensor | None, Tensor | None]:
        if self.gradient is None:
            return None, None
        split = self.num_positives - self.wanted.start
        return (
            unsorted(self.gradient[:split], self.order) if self.need_positives else None,
            self.gradient[split:] if self.need_negatives else None,
        )


class Sweeper:
    """Rows that meet blocks of columns; keeps what the rows have found so far."""

    def __init__(self, rows: Rows, negatives: Tensor | None):
        self.rows, self.options = rows, rows.options
        self.dtype = compute_dtype(rows.anchors, rows.positives, negatives)
        tau = rows.temperature
        self.temperature = tau.to(self.dtype) if isinstance(tau, Tensor) else tau
        ids = rows.clusters.ids
        self.false_negatives = self.options.false_negatives if ids is not None else "keep"

        # Sorted by cluster, mates are neighbours. Not where reading the borders would wait for the device.
        self.order: Tensor | None = None
        self.cluster_ids = ids
        anchors, hard_ids, cosines = rows.anchors, rows.clusters.hard_ids, rows.clusters.cosines
        sortable = anchors.device.type == "cpu" and rows.batch >= _SORTED_BATCH
        if ids is not None and self.false_negatives != "keep" and sortable:
            self.order = ids.argsort(stable=True)
            self.cluster_ids = ids[self.order]
            anchors = anchors.detach()[self.order]
            hard_ids = hard_ids[self.order] if hard_ids is not None else None
            cosines = cosines[self.order] if cosines is not None else None
        self.centroid_cosines = cosines

        self.a, self.anchor_scale = unit_rows(anchors, self.dtype)
        self.own_bonus: Tensor | None = None
        if rows.hard_counts is not None:
            counts = rows.hard_counts.to(self.dtype)
            self.log_counts = counts.log()  # −inf where k is nobody's hard negative: the column drops out
            if self.options.hard_negative_weight != 0.0:
                assert hard_ids is not None
                self.own_hard = hard_ids
                self.own_bonus = own_bonus(counts[hard_ids], self.options.hard_negative_weight)
        self.safe = not isinstance(self.temperature, Tensor) and is_safe(
            self.temperature, self.options, _SAFE_LOGIT[self.dtype], _SAFE_WEIGHT
        )
        count = len(self.a)
        self.positive_logit = self.a.new_empty(count)
        self.log_others: Tensor | None = None  # (M,) log Σ E without the positive, over the blocks so far
        self.slope_sum = self.a.new_zeros(count)  # row sums of the slopes of the margin loss
        self.margin_sum = self.a.new_zeros(())
        self.slope_times_delta = self.a.new_zeros(())
        self.gradient: Tensor | None = None  # (M, D), of the unit rows
        self.positive_sum: Tensor | None = None

    def sweep(self, block: Block, phase: Phase) -> _Columns:
        """Meet a block of columns; what was found for them is in the result."""
        columns = _Columns(self, block)
        if block.first is not None and phase is not Phase.GRADIENTS:
            own = slice(columns.num_positives) if len(self.a) == columns.num_positives else columns.own
            self.positive_sum = columns.units[own].sum(dim=0)
        need_anchor, _, _, need_temperature = self.rows.needs
        first_gradient = False
        if phase is not Phase.TOTALS:
            columns.make_gradient()
            if self.gradient is None and (need_anchor or need_temperature):
                self.gradient, first_gradient = torch.empty_like(self.a), True
        want_rows = phase is not Phase.TOTALS and (need_anchor or need_temperature)
        want_columns = columns.gradient is not None
        log_others = self.a.new_empty(len(self.a))

        row_bytes = len(columns.units) * self.dtype.itemsize
        count = min(len(self.a), max(1, self.options.workspace_bytes // (3 * row_bytes)))
        buffer = self.a.new_empty((count, len(columns.units)))
        for start in range(0, len(self.a), count):
            chunk = slice(start, min(start + count, len(self.a)))
            logits = self._logits(columns, chunk, buffer[: chunk.stop - start])  # product 1
            own = columns.own[chunk, None] if columns.own is not None else None
            if own is not None and phase is not Phase.GRADIENTS:
                self.positive_logit[chunk] = logits.gather(1, own)[:, 0]
            slopes = self._false_negatives(columns, logits, chunk, phase)
            self._bias_hard_negatives(columns, logits, chunk)
            shift = self._shift(logits, chunk, phase)
            weights = logits.exp_() if shift is None else logits.sub_(shift[:, None]).exp_()  # E
            if own is not None:  # kept apart: then neither loss nor gradient is a difference of near-equals
                weights.scatter_(1, own, 0.0)
            if phase is not Phase.GRADIENTS:
                others = weights.sum(dim=1)
                log_others[chunk] = others.log() if shift is None else others.log() + shift
            if not (want_rows or want_columns):
                continue
            if phase is Phase.BOTH:
                positive = self.positive_logit[chunk]
                total = others + (positive if shift is None else positive - shift).exp()  # Z
            else:
                others, total = self._known_totals(chunk, shift)
            # ∂loss/∂S = 1/(Bτ) · (E/Z − I + W − diag(row sums of W)), here times BτZ. W: slopes of the BML.
            unit = total * (self.options.bml_weight * self.temperature / self.rows.batch)
            for (cells, local, _), slope in slopes:
                cells += slope.mul_(unit[local, None])
            if own is not None:
                weights.scatter_add_(1, own, -(others + self.slope_sum[chunk] * unit)[:, None])
            row_scale = (1.0 / (self.rows.batch * self.temperature)) / total
            if want_rows:
                self._add_to_rows(weights, columns.units, chunk, row_scale, first_gradient)  # product 2
            if columns.gradient is not None:
                share = self.a[chunk] * row_scale[:, None]
                wanted = weights[:, columns.wanted]
                columns.gradient.addmm_(wanted.T, share, beta=1 if start else 0)  # product 3
        if phase is not Phase.GRADIENTS:
            seen = self.log_others
            self.log_others = log_others if seen is None else torch.logaddexp(seen, log_others)
        return columns

    def sums(self) -> Tensor:
        """Sums over the rows, (3,): InfoNCE, margins beyond Δ = 0, positive cosines."""
        assert self.log_others is not None
        margin = self.log_others - self.positive_logit
        info_nce = torch.logaddexp(margin, torch.zeros_like(margin)).sum()  # log(1 + Σ_others / E_ii)
        return torch.stack(
            [info_nce, self.margin_sum * self.temperature, self.positive_logit.sum() * self.temperature]
        )

    def directions(self) -> tuple[Tensor, Tensor]:
        """Sums of the unit rows of anchors and of their positives, (D,) each."""
        assert self.positive_sum is not None
        return self.a.sum(dim=0), self.positive_sum

    def temperature_gradient(self) -> Tensor | None:
        """−1/τ · Σ_ij S_ij ∂InfoNCE/∂S_ij over the rows; 0-d. Before `anchor_gradient`."""
        if not self.rows.needs[3]:
            return None
        assert self.gradient is not None
        along = (self.a * self.gradient).sum()  # with the margin loss, which does not depend on τ
        share = self.temperature * (self.options.bml_weight / self.rows.batch**2)
        return (self.slope_times_delta * share - along) / self.temperature

    def anchor_gradient(self) -> Tensor | None:
        """Gradient of the anchors (M, D), through the normalisation, in the caller's order; once."""
        if not self.rows.needs[0]:
            return None
        assert self.gradient is not None
        along = (self.a * self.gradient).sum(dim=1)
        return unsorted(through_norm(self.gradient, self.a, along, self.anchor_scale), self.order)

    def _add_to_rows(
        self, weights: Tensor, units: Tensor, chunk: slice, row_scale: Tensor, first: bool
    ) -> None:
        assert self.gradient is not None
        rows = self.gradient[chunk]
        if first:
            torch.mm(weights, units, out=rows).mul_(row_scale[:, None])
        else:
            rows.addcmul_(weights @ units, row_scale[:, None])

    def _shift(self, logits: Tensor, chunk: slice, phase: Phase) -> Tensor | None:
        """What is subtracted from each row of logits, (R,); None where nothing needs to be."""
        if self.safe:
            return None
        positive = self.positive_logit[chunk]
        if phase is Phase.GRADIENTS:
            assert self.log_others is not None
            return torch.logaddexp(self.log_others[chunk], positive)
        return torch.maximum(logits.amax(dim=1), positive)

    def _known_totals(self, chunk: slice, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ E without and with the positive over all blocks, in units of exp(shift)."""
        assert self.log_others is not None
        others, positive = self.log_others[chunk], self.positive_logit[chunk]
        if shift is None:
            return others.exp(), others.exp() + positive.exp()
        return (others - shift).exp(), torch.ones_like(others)

    def _logits(self, columns: _Columns, chunk: slice, out: Tensor) -> Tensor:
        """a Xᵀ/τ for the rows of a chunk."""
        a, units = self.a[chunk], columns.units
        if isinstance(self.temperature, Tensor):
            return torch.mm(a, units.T, out=out).div_(self.temperature)
        scale = 1 / self.temperature
        if self.centroid_cosines is None or not columns.has_centroids:
            return torch.addmm(out, a, units.T, beta=0, alpha=scale, out=out)
        known = columns.known  # the assignment has multiplied a with the centroids already
        others = out[:, :known]
        torch.addmm(others, a, units[:known].T, beta=0, alpha=scale, out=others)
        torch.mul(self.centroid_cosines[chunk], scale, out=out[:, known:])
        return out

    def _false_negatives(
        self, columns: _Columns, logits: Tensor, chunk: slice, phase: Phase
    ) -> list[tuple[_MateBlock, Tensor]]:
        """Treat the chunk's cluster-mates: drop them, or sum their margins and return the slopes."""
        if self.false_negatives == "keep":
            return []
        slopes = []
        for block in self._mate_blocks(columns, logits, chunk):
            if self.false_negatives == "exclude":
                block.cells.masked_fill_(block.mates, -torch.inf)
            else:
                slope = self._margin(block, chunk.start, phase)
                if phase is not Phase.TOTALS and any(self.rows.needs) and self.options.bml_weight != 0.0:
                    slopes.append((block, slope))
        return slopes

    def _mate_blocks(self, columns: _Columns, logits: Tensor, chunk: slice) -> Iterator[_MateBlock]:
        """Split the chunk's rows so that a block and its temporaries stay within the workspace."""
        assert self.cluster_ids is not None
        assert columns.cluster_ids is not None
        width = columns.num_positives
        step = max(1, self.options.workspace_bytes // (12 * width * self.dtype.itemsize))
        if self.order is not None:
            step = min(step, _MATE_ROWS)
        for first in range(chunk.start, chunk.stop, step):
            last = min(first + step, chunk.stop)
            low, high = 0, width
            if self.order is not None:
                low, high = columns.border_low[first], columns.border_high[last - 1]
            local = slice(first - chunk.start, last - chunk.start)
            mates = self.cluster_ids[first:last, None] == columns.cluster_ids[None, low:high]
            yield _MateBlock(logits[local, low:high], local, mates)

    def _margin(self, block: _MateBlock, start: int, phase: Phase) -> Tensor:
        """Slopes in {−1, 0, 1}; adds the block's margins, beyond what Δ = 0 adds, to the sums.

        Per cell and in units of logits, relu(Δ+α) + relu(−Δ−β) = slope · Δ + α[Δ > −α] − β[Δ < −β] with
        slope = [Δ > −α] − [Δ < −β]. Counting i = j as a mate is harmless: Δ_ii = 0 is what the cell would
        add anyway, and its slope on S_ii cancels against its slope on s_i.
        """
        cells, local, mates = block
        rows = slice(start + local.start, start + local.stop)
        alpha, beta = self.options.bml_alpha / self.temperature, self.options.bml_beta / self.temperature
        delta = cells - self.positive_logit[rows, None]
        above, below = (delta > -alpha).logical_and_(mates), (delta < -beta).logical_and_(mates)
        slope = above.to(self.dtype) - below.to(self.dtype)
        if phase is Phase.GRADIENTS:  # counted in an earlier sweep
            return slope
        self.slope_sum[rows] += slope.sum(dim=1)
        slope_times_delta = torch.dot(slope.view(-1), delta.view(-1))
        self.slope_times_delta += slope_times_delta
        self.margin_sum += slope_times_delta
        at_zero = margin_at_zero(self.options) / self.temperature
        for constant, cells_counted in ((alpha, above), (-beta, below), (-at_zero, mates)):
            self.margin_sum += constant * cells_counted.count_nonzero().to(self.dtype)
        return slope

    def _bias_hard_negatives(self, columns: _Columns, logits: Tensor, chunk: slice) -> None:
        """Turn the centroid columns into log(n_k · exp(a·c_k/τ))."""
        if not columns.has_centroids:
            return
        hard = logits[:, columns.known :]
        hard += self.log_counts
        if self.own_bonus is not None:
            hard.scatter_add_(1, self.own_hard[chunk, None], self.own_bonus[chunk, None])


def unsorted(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in the order they had before `rows[order]`."""
    if order is None:
        return rows
    return torch.empty_like(rows).index_copy_(0, order, rows)
