"""The three products in plain torch: row chunks of the logits, on any device, in float32 or float64.

Per chunk of R rows (X = [p; n; c]: unit rows of the block's positives and explicit negatives, and of the
centroids):

    product 1   E = exp(a Xᵀ/τ + bias)           bias: log n_k on the centroid columns
                Z = row sums of E                loss_i = log(Z_i / E_ii)
    product 2   ∂loss/∂a = (E X) · 1/(BτZ)       less p, and the margin loss
    product 3   ∂loss/∂X += Eᵀ (a · 1/(BτZ))     likewise

1/Z scales rows and results, never the matrix (identity 4). Cluster-mates are sorted side by side on a large
batch, so their rule is asked about some B²/K cells instead of B² (identity 5).

With directions="both" a first round finds Z of the columns too. In the second the weights are E/Z, of a pair
(i, j) exp(S_ij/τ)/Z_i + exp(S_ij/τ)/Z_j, and 1/(2Bτ) is what is left to scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..rules import Pairs, Side, ask, rule_of
from .norms import compute_dtype, through_norm, unit_rows
from .problem import Batch, Block, own_bonus
from .ranks import Alone

# Largest |logit| for which exp and sums of 2^40 of them stay inside the dtype without a row maximum.
_SAFE_LOGIT = {torch.float32: 40.0, torch.float64: 300.0}

# Where log(1 + e^x) is x to the last bit of float64.
_LINEAR = 40.0

# Rows that a rule is asked about at a time where mates stand side by side: enough to fill vector units, few
# enough that little else falls between them.
_MATE_ROWS = 256

# One cell in so many is few.
_FEW = 8

# Below this batch size, copying the rows into cluster order costs more than the cells it saves.
_SORTED_BATCH = 1024


class Columns(NamedTuple):
    """Unit rows of a block, the positives sorted by cluster where the rows are, and their gradient."""

    units: Tensor  # (n+N, D)
    scale: Tensor  # (n+N, 1) 1/‖row‖
    order: Tensor | None  # (n,)
    side: Side  # of the positives
    borders: tuple[list[int], list[int]] | None  # by row: the first and past the last of its mates
    own: Tensor | None  # (M, 1) the column of the row's own positive, where it is here
    wanted: slice  # the columns that want a gradient: positives, explicit negatives, or both
    gradient: Tensor | None  # of the unit rows `wanted`
    buffer: Tensor  # (R, n+N+K) for the weights of a chunk
    totals: bool
    log_totals: Tensor | None  # (n,) log Z of the positives as columns, once known; with directions="both"


class Rows(NamedTuple):
    """A chunk of rows: views into what is kept of all of them."""

    where: slice
    a: Tensor  # (R, D) unit rows
    own: Tensor | None  # (R, 1) the column of the row's own positive, where it is here
    gradient: Tensor | None  # (R, D) of the unit rows, but for the factor `scale`
    centroid_cosines: Tensor | None  # (R, K)
    own_hard: Tensor | None  # (R, 1) own hard negative, and what w adds to its logit
    own_bonus: Tensor | None
    positive: Tensor  # (R, 1) logit of the own positive
    log_others: Tensor  # (R, 1) log Σ E of the others, over the blocks so far
    scale: Tensor  # (R, 1) 1/(BτZ)
    slope_sum: Tensor  # (R,) sums of the margin loss
    slope_times_delta: Tensor  # (R,)
    margin_sum: Tensor  # (R,)


class Weights(NamedTuple):
    """A chunk after its first product."""

    values: Tensor  # (R, n+N+K): E, but 0 for the own positive; E/Z of both directions, where both are wanted
    others: Tensor  # (R, 1) their row sums, in both directions the row's and that of its own column
    shift: Tensor | None  # (R, 1) what was subtracted from the logits; None where nothing needs to be
    held: list[Held]


class Held(NamedTuple):
    """Pairs in the margin loss, and their slopes in {−1, 0, 1}."""

    rows: Tensor | slice  # of the chunk: (pairs,), or all of some
    cells: Tensor  # (pairs,) places in the chunk, or a view into it
    slope: Tensor


class TorchProducts:
    """Rows that meet blocks of columns; keeps what the rows have found so far."""

    def __init__(self, batch: Batch, ranks: Alone, hard_counts: Tensor | None):
        self.batch, self.options, self.ranks = batch, batch.options, ranks
        self.workspace_bytes = self.options.workspace(batch.anchors.device)
        self.dtype = compute_dtype(batch.anchors, batch.positives, batch.negatives)
        clusters, known = batch.clusters, batch.clusters.known
        if known is not None and known.anchors.dtype != self.dtype:
            known = None
        tau = batch.temperature
        self.temperature = tau.detach().to(self.dtype) if isinstance(tau, Tensor) else tau
        self.safe = self.options.is_safe(tau, _SAFE_LOGIT[self.dtype])
        self.rule = rule_of(self.options.false_negatives, clusters.ids is not None)
        self.has_margins = False

        # Sorted by cluster, mates are neighbours. Not where reading the borders would wait for the device.
        on_cpu = batch.anchors.device.type == "cpu"
        within = getattr(self.rule, "within_clusters", False)
        self.order = (
            clusters.ids.argsort(stable=True)
            if within and on_cpu and clusters.ids is not None and ranks.batch >= _SORTED_BATCH
            else None
        )
        if known is None:
            self.a, self.anchor_scale = unit_rows(self._sorted(batch.anchors.detach()), self.dtype)
        else:
            self.a, self.anchor_scale = self._sorted(known.anchors), self._sorted(known.anchor_scale)
        count = self.a.shape[0]
        self.numbers = torch.arange(count, device=self.a.device)
        self.centroids: Tensor | None = None  # unit rows
        centroid_cosines, own_hard, bonus = None, None, None
        if hard_counts is not None:
            assert clusters.centroids is not None
            assert clusters.hard_ids is not None
            self.centroids = known.centroids if known else unit_rows(clusters.centroids, self.dtype)[0]
            centroid_cosines = self._sorted(known.cosines) if known else None
            counts = hard_counts.to(self.dtype)
            self.log_counts = counts.log()  # −inf where k is nobody's hard negative: the column drops out
            if self.options.hard_negative_weight != 0.0:
                own_hard = self._sorted(clusters.hard_ids)[:, None]
                bonus = own_bonus(counts[own_hard], self.options.hard_negative_weight)
        gradient = torch.empty_like(self.a) if ranks.needs[0] or ranks.needs[3] else None
        state = (*self.a.new_empty((3, count, 1)).unbind(), *self.a.new_zeros((3, count)).unbind())
        self.rows = Rows(slice(0, count), self.a, None, gradient, centroid_cosines, own_hard, bonus, *state)
        self.positive_sum: Tensor | None = None
        both = self.options.directions == "both"
        self.log_columns = self.a.new_full((2, ranks.batch), -torch.inf) if both else None
        places = self.numbers if self.order is None else self.order
        self.side = Side(
            places + ranks.first if ranks.first else places,
            None if clusters.ids is None else self._sorted(clusters.ids),
            self.rows.positive,
            None if clusters.nearest_cosine is None else self._sorted(clusters.nearest_cosine),
        )

    def open(self, block: Block, totals: bool, gradients: bool) -> Columns:
        """Prepare to meet a block: for the totals of the rows, for the gradients, or for both."""
        positives, negatives, ids = block.positives.detach(), block.negatives, block.cluster_ids
        count = positives.shape[0]
        order, borders, own = None, None, None
        numbers = (
            self.numbers if count == self.numbers.shape[0] else torch.arange(count, device=self.a.device)
        )
        places = numbers + block.place if block.place else numbers
        if block.own is not None:
            own = self.numbers + block.own if block.own else self.numbers
            own = own[:, None]
        if self.order is not None:
            assert ids is not None
            assert self.side.ids is not None
            same = ids is self.batch.clusters.ids
            order = self.order if same else ids.argsort(stable=True)
            ids, positives, places = ids[order], positives[order], places[order]
            low, high = (torch.searchsorted(ids, self.side.ids, right=right) for right in (False, True))
            borders = (low.tolist(), high.tolist())
            if own is not None and not same:
                column = torch.empty_like(order)
                column[order] = numbers
                own = column[own[self.order]]
        width = count + (len(negatives) if negatives is not None else 0)
        if negatives is None:
            units, scale = unit_rows(positives, self.dtype)
        else:
            units = positives.new_empty((width, positives.shape[1]), dtype=self.dtype)
            parts = ((positives, units[:count]), (negatives, units[count:]))
            scale = torch.cat([unit_rows(z, self.dtype, out)[1] for z, out in parts])
        if totals and own is not None:
            mine = units if own.shape[0] == width else units[own[:, 0]]
            self.positive_sum = mine.sum(dim=0)
        _, need_positives, need_negatives, _ = self.ranks.needs
        wanted = slice(0 if need_positives else count, width if need_negatives else count)
        gradient = None
        if gradients and wanted.start < wanted.stop:
            gradient = units.new_empty((wanted.stop - wanted.start, units.shape[1]))
        if self.centroids is not None and own is not None:  # every row meets them once
            width += self.centroids.shape[0]
        step = max(1, self.workspace_bytes // (3 * width * self.dtype.itemsize))
        buffer = units.new_empty((min(self.a.shape[0], step), width))
        side, log_totals = Side(places, ids), None
        if self.log_columns is not None and not totals:
            log_totals = torch.logaddexp(*self.log_columns)[places]
        return Columns(units, scale, order, side, borders, own, wanted, gradient, buffer, totals, log_totals)

    def chunks(self, columns: Columns) -> Iterator[Rows]:
        """Rows whose weights fit the workspace."""
        count, step = self.a.shape[0], columns.buffer.shape[0]
        everything = self.rows._replace(own=columns.own)
        if step == count:  # the same without a view: each takes its time beside a small batch
            yield everything
            return
        for start in range(0, count, step):
            where = slice(start, min(start + step, count))
            yield Rows(where, *(None if each is None else each[where] for each in everything[1:]))  # type: ignore[arg-type]

    def weigh(self, columns: Columns, rows: Rows) -> Weights:
        """Take product 1; what the rule decides; and with `totals` what adds up over the columns."""
        values = self._logits(columns, rows)
        own, positive, known, shift = rows.own, rows.positive, rows.log_others, None
        if own is not None and columns.totals:
            torch.gather(values, 1, own, out=positive)
        held = self._ask_rule(columns, values, rows) if self.rule is not None else []
        by_column = None if self.log_columns is None else self._by_column(columns, own, values)
        if not self.safe or columns.log_totals is not None:
            if columns.totals:
                shift = torch.maximum(values.amax(dim=1, keepdim=True), positive)
            else:
                shift = torch.logaddexp(known, positive)
            values.sub_(shift)
        values.exp_()
        if columns.log_totals is not None and by_column is not None:
            values[:, : by_column.shape[1]].add_(by_column)
        if own is not None:  # kept apart: then neither loss nor gradient is a difference of near-equals
            values.scatter_(1, own, 0.0)
        if columns.totals:
            others = values.sum(dim=1, keepdim=True)
            log_others = torch.log(others, out=None if own is None else known)  # the own block comes first
            if shift is not None:
                log_others.add_(shift)
            if own is None:
                torch.logaddexp(known, log_others, out=known)
            if self.log_columns is not None:
                self._add_to_columns(columns, rows, values, by_column)
        elif columns.log_totals is not None:
            others = (known - positive).sigmoid_() + (self._own_columns()[rows.where] - positive).sigmoid_()
        else:
            others = known.exp() if shift is None else (known - shift).exp()
        return Weights(values, others, shift, held)

    def differentiate(self, columns: Columns, rows: Rows, weights: Weights) -> None:
        """Turn E into BτZ · ∂loss/∂S, and take products 2 and 3.

        ∂loss/∂S = 1/(Bτ) · (E/Z − I + W − diag(row sums of W)); W: slopes of the margin loss times λτ/B.
        """
        values, others, shift, held = weights
        if columns.log_totals is None:
            total = others + (rows.positive if shift is None else rows.positive - shift).exp()  # Z
        else:
            total = torch.full_like(others, 2.0)  # the weights are E/Z, the loss is half of their sum
        unit = total
        if self.has_margins:
            unit = total * (self.options.bml_weight * self.temperature / self.ranks.batch)
        for some, cells, slope in held:
            if isinstance(some, slice):
                cells.addcmul_(slope, unit[some])
            else:
                values.view(-1).index_add_(0, cells, slope * unit.view(-1)[some])
        if rows.own is not None:
            own_weight = others
            if self.has_margins:
                own_weight = torch.addcmul(others, rows.slope_sum[:, None], unit)
            values.scatter_add_(1, rows.own, own_weight.neg())
        scale = torch.reciprocal(total, out=rows.scale).div_(self.ranks.batch * self.temperature)
        if rows.gradient is not None:
            known, first = columns.units.shape[0], columns.own is not None  # the own block comes first
            rows.gradient.addmm_(values[:, :known], columns.units, beta=0 if first else 1)
            if values.shape[1] > known:
                assert self.centroids is not None
                rows.gradient.addmm_(values[:, known:], self.centroids)
        if columns.gradient is not None:
            parts = values[:, columns.wanted].T
            columns.gradient.addmm_(parts, rows.a * scale, beta=1 if rows.where.start else 0)

    def close(self, columns: Columns) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the block's positives (n, D) and explicit negatives (N, D), where wanted."""
        gradient, wanted = columns.gradient, columns.wanted
        if gradient is None:
            return None, None
        through_norm(gradient, columns.units[wanted], columns.scale[wanted])
        split = columns.side.places.shape[0] - wanted.start
        positives = _unsorted(gradient[:split], columns.order) if split else None
        return positives, gradient[split:] if gradient.shape[0] > split else None

    def sums(self) -> Tensor:
        """Sums over the rows of this process, (3 + 2·D,)."""
        assert self.positive_sum is not None
        rows = self.rows
        # log(1 + Σ_others / E_ii)
        info_nce = softplus((rows.log_others - rows.positive)[:, 0], threshold=_LINEAR)
        if self.log_columns is not None:
            of_columns = softplus((self._own_columns() - rows.positive)[:, 0], threshold=_LINEAR)
            info_nce.add_(of_columns).div_(2)
        sums = torch.stack([info_nce, rows.margin_sum, rows.positive[:, 0]]).sum(dim=1)
        sums[1:].mul_(self.temperature)
        return torch.cat([sums, self.a.sum(dim=0), self.positive_sum])

    def own(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the anchors (M, D), in the caller's order, and of τ, 0-d, where wanted; once."""
        gradient, of_temperature = self.rows.gradient, None
        if gradient is None:
            return None, None
        if self.ranks.needs[3]:  # −1/τ · Σ_ij S_ij ∂InfoNCE/∂S_ij
            along = ((self.a * gradient).sum(dim=1, keepdim=True) * self.rows.scale).sum()  # with the margins
            share = self.temperature * (self.options.bml_weight / self.ranks.batch**2)
            of_temperature = (self.rows.slope_times_delta.sum() * share - along) / self.temperature
        if not self.ranks.needs[0]:
            return None, of_temperature
        through_norm(gradient, self.a, self.anchor_scale * self.rows.scale)
        return _unsorted(gradient, self.order), of_temperature

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows[self.order]

    def _logits(self, columns: Columns, rows: Rows) -> Tensor:
        """a Xᵀ/τ for the rows of a chunk, with log n_k on the centroids' columns, (R, n+N+K)."""
        out, units, scale = columns.buffer, columns.units, 1 / self.temperature
        if out.shape[0] > rows.a.shape[0]:
            out = out[: rows.a.shape[0]]
        others, hard = out[:, : units.shape[0]], out[:, units.shape[0] :]
        alpha = 1 if isinstance(scale, Tensor) else scale
        torch.addmm(others, rows.a, units.T, beta=0, alpha=alpha, out=others)
        if isinstance(scale, Tensor):
            others.mul_(scale)
        if hard.shape[1]:
            assert self.centroids is not None
            cosines = rows.centroid_cosines
            if cosines is None:
                cosines = rows.a @ self.centroids.T
            if isinstance(scale, Tensor):
                torch.addcmul(self.log_counts, cosines, scale, out=hard)
            else:
                torch.add(self.log_counts, cosines, alpha=scale, out=hard)
            if rows.own_hard is not None and rows.own_bonus is not None:
                hard.scatter_add_(1, rows.own_hard, rows.own_bonus)
        return out

    def _by_column(self, columns: Columns, own: Tensor | None, values: Tensor) -> Tensor | None:
        """What is to be taken of the logits: with `totals` log Σ E by column, (n,), unless E itself is safe.

        Then, what each column adds to E/Z, (R, n).
        """
        logits = values[:, : columns.side.places.shape[0]]
        if columns.log_totals is not None:
            return (logits - columns.log_totals).exp_()
        if self.safe:
            return None
        if own is not None:
            values.scatter_(1, own, -torch.inf)
        return logits.logsumexp(dim=0)

    def _add_to_columns(self, columns: Columns, rows: Rows, values: Tensor, met: Tensor | None) -> None:
        """Add a chunk of rows to the totals of the columns: E, or log Σ E by column where that was `met`."""
        assert self.log_columns is not None
        places, (others, positives) = columns.side.places, self.log_columns
        if met is None:
            met = values[:, : places.shape[0]].sum(dim=0).log_()
        others[places] = torch.logaddexp(others[places], met)
        if rows.own is not None:
            positives[self.side.places[rows.where]] = rows.positive[:, 0]

    def _own_columns(self) -> Tensor:
        """Log Σ E of the others in the column of the rows' own positives, (M, 1)."""
        assert self.log_columns is not None
        return self.log_columns[0, self.side.places, None]

    def _ask_rule(self, columns: Columns, values: Tensor, rows: Rows) -> list[Held]:
        """Put the rule's decisions into the logits of a chunk, and return what the margin loss holds.

        It is asked about some rows at a time, so that a mask and its temporaries stay within the workspace.
        """
        assert self.rule is not None
        width, start = columns.side.places.shape[0], rows.where.start
        step = max(1, self.workspace_bytes // (12 * width * self.dtype.itemsize))
        if columns.borders is not None:
            step = min(step, _MATE_ROWS)
        held = []
        for first in range(start, rows.where.stop, step):
            some = slice(first, min(first + step, rows.where.stop))
            low, high = 0, width
            if columns.borders is not None:
                low, high = columns.borders[0][first], columns.borders[1][some.stop - 1]
            local = slice(first - start, some.stop - start)
            cells = values[local, low:high]
            pairs = Pairs(cells, self.temperature, self.side, columns.side, some, slice(low, high))
            decision = ask(self.rule, pairs)
            if decision.held is not None:
                self.has_margins = True
                held.append(self._hold(columns, rows, values, decision.held, local, low))
            if decision.out is not None:
                cells.masked_fill_(decision.out, -torch.inf)
        return held

    def _hold(
        self, columns: Columns, rows: Rows, values: Tensor, pairs: Tensor, some: slice, low: int
    ) -> Held:
        """Slopes of the margin loss for pairs (some, width) bool; adds the margins beyond Δ = 0 to the sums.

        Per pair and in units of logits it is relu(Δ+α) + relu(−Δ−β), whose slope is [Δ > −α] − [Δ < −β]. A
        sentence as its own mate is harmless: Δ_ii = 0 is what the cell would add anyway, and its slope on
        S_ii cancels against its slope on s_i.
        """
        alpha, beta = self.options.bml_alpha / self.temperature, self.options.bml_beta / self.temperature
        at_zero = self.options.margin_at_zero / self.temperature
        # Where few pairs are held, those alone. On a GPU, to know would be to wait for the device.
        if values.device.type == "cpu" and int(pairs.count_nonzero()) * _FEW < pairs.numel():
            i, j = pairs.nonzero(as_tuple=True)
            if some.start:
                i += some.start
            cells = torch.add(j, i, alpha=values.shape[1])
            if low:
                cells += low
            delta = values.view(-1)[cells].sub_(rows.positive.view(-1)[i])
            above, below = (delta + alpha).clamp_min_(0.0), (delta + beta).clamp_max_(0.0)
            margins, slope = above - below, above.sign_().add_(below.sign_())
            if columns.totals:
                rows.slope_sum.index_add_(0, i, slope)
                rows.margin_sum.index_add_(0, i, margins.sub_(at_zero))
                if self.ranks.needs[3]:
                    rows.slope_times_delta.index_add_(0, i, slope * delta)
            return Held(i, cells, slope)
        cells = values[some, low : low + pairs.shape[1]]
        delta = cells - rows.positive[some]
        above, below = (delta + alpha).clamp_min_(0.0), (delta + beta).clamp_max_(0.0)
        margins, slope = above - below, above.sign_().add_(below.sign_()).mul_(pairs)
        if columns.totals:
            rows.slope_sum[some] += slope.sum(dim=1)
            rows.margin_sum[some] += margins.sub_(at_zero).mul_(pairs).sum(dim=1)
            if self.ranks.needs[3]:
                rows.slope_times_delta[some] += delta.mul_(slope).sum(dim=1)
        return Held(some, cells, slope)


def _unsorted(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in the order they had before `rows[order]`."""
    return rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows)
