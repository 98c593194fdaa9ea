"""The torch path of the objective: three matrix products in row chunks, no B×B tensor.

One `autograd.Function` computes the loss and, where a gradient is wanted, the gradients in the same
sweep over the rows; its backward only scales them. Per chunk of R rows (a, p, n, c: unit rows of
anchors, positives, explicit negatives, centroids; columns X = [p; n; c]):

    product 1   E = exp(a Xᵀ/τ + bias)           bias: log n_k on the centroid columns
                Z = row sums of E                loss_i = log(Z_i / E_ii)
                E ← Z ⊙ ∂(B·loss)/∂(logits)      only the diagonal and the cluster-mates' cells change
    product 2   ∂loss/∂a = (E X) · 1/(BτZ)
    product 3   ∂loss/∂X += Eᵀ (a · 1/(BτZ))

Exact identities used (each stands in `reference.py` in its plain form):

* Σ_j exp(cos(a_i, c_runner_up(j))/τ) = Σ_k n_k exp(a_i·c_k/τ): the hard-negative block is B×K.
* Cosines are ≤ 1, so for τ ≥ 0.025 exp(·/τ) can neither overflow nor vanish in float32, and no running
  maximum is needed; below that (or for a temperature on the device) each row subtracts its maximum.
* False negatives live on cluster-mates only. Sorted by cluster id they are contiguous columns, so the
  margin loss touches about B²/K cells instead of B².
* d z = (da − a (a·da)) / ‖z‖ for a = z/‖z‖.

Memory above inputs and gradients: O((B+N+K)·D) for the unit rows plus one chunk of the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .normalization import compute_dtype, unit_rows, without_autocast
from .options import Options

# Largest |logit| for which exp and sums of 2^40 of them stay inside the dtype without a running maximum.
_SAFE_LOGIT = {torch.float32: 40.0, torch.float64: 300.0}

_SAFE_WEIGHT = 20.0  # likewise for |w|

# Rows of a cluster-mate block: enough to fill vector units, few enough that little else falls into it.
_MATE_ROWS = 256

# Below this batch size, copying the rows into cluster order costs more than the cells it saves.
_SORTED_BATCH = 1024


class ClusterAwareInfoNCE(torch.autograd.Function):
    """The objective for given clusters; gradients are computed in the forward."""

    @staticmethod
    def forward(
        ctx,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        centroids: Tensor | None,
        hard_negative_ids: Tensor | None,
        centroid_cosines: Tensor | None,
        cluster_ids: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return loss, InfoNCE, BML, mean cosine over all B² cells and over the diagonal, each 0-d."""
        inputs = (anchors, positives, negatives, temperature)
        with torch.no_grad(), without_autocast(anchors.device):
            sweep = _Sweep(*inputs, centroids, hard_negative_ids, centroid_cosines, cluster_ids, options)
            values = sweep.run(ctx.needs_input_grad[:4])
        ctx.save_for_backward(*sweep.gradients)
        ctx.dtypes = [value.dtype if isinstance(value, Tensor) else None for value in inputs]
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward by the gradient of the loss.

        They stay in the compute dtype until scaled: a loss scale exists to keep float16 from underflowing.
        """
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


class _MateBlock(NamedTuple):
    """Cells of S that hold every cluster-mate of a few consecutive rows."""

    cells: Tensor  # (rows, width), a view into the chunk
    local: slice  # the rows within the chunk
    mates: Tensor  # (rows, width) bool: same cluster; the sentence itself counts


class _Sweep:
    """One pass over the rows. `run` fills `gradients`: anchors, positives, negatives, temperature."""

    def __init__(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        centroids: Tensor | None,
        hard_negative_ids: Tensor | None,
        centroid_cosines: Tensor | None,
        cluster_ids: Tensor | None,
        options: Options,
    ):
        self.options = options
        self.dtype = compute_dtype(anchors, positives, negatives)
        self.batch = len(anchors)
        self.temperature = (
            temperature.detach().to(self.dtype) if isinstance(temperature, Tensor) else temperature
        )
        self.false_negatives = options.false_negatives if cluster_ids is not None else "keep"
        self.gradients: list[Tensor | None] = [None] * 4

        # Sorted by cluster, mates are neighbours. Not where reading the borders would wait for the device.
        self.order: Tensor | None = None
        self.cluster_ids = cluster_ids
        sortable = anchors.device.type == "cpu" and self.batch >= _SORTED_BATCH
        if cluster_ids is not None and self.false_negatives != "keep" and sortable:
            self.order = cluster_ids.argsort(stable=True)
            self.cluster_ids = ids = cluster_ids[self.order]
            self.border_low = torch.searchsorted(ids, ids).tolist()
            self.border_high = torch.searchsorted(ids, ids, right=True).tolist()
            anchors, positives = anchors.detach()[self.order], positives.detach()[self.order]
            hard_negative_ids = hard_negative_ids[self.order] if hard_negative_ids is not None else None
            centroid_cosines = centroid_cosines[self.order] if centroid_cosines is not None else None

        num_negatives = len(negatives) if negatives is not None else 0
        num_centroids = len(centroids) if centroids is not None and hard_negative_ids is not None else 0
        # Columns of the chunk: positives, then explicit negatives, then centroids.
        self.first_centroid = self.batch + num_negatives
        self.columns = anchors.new_empty(
            (self.first_centroid + num_centroids, anchors.shape[1]), dtype=self.dtype
        )
        self.a, self.anchor_scale = unit_rows(anchors, self.dtype)
        _, positive_scale = unit_rows(positives, self.dtype, self.columns[: self.batch])
        scales = [positive_scale]
        if negatives is not None:
            scales.append(unit_rows(negatives, self.dtype, self.columns[self.batch : self.first_centroid])[1])
        self.column_scale = torch.cat(scales)  # (B+N,)
        self.centroid_cosines = centroid_cosines
        self.own_bonus: Tensor | None = None
        if num_centroids:
            assert centroids is not None
            assert hard_negative_ids is not None
            unit_rows(centroids, self.dtype, self.columns[self.first_centroid :])
            self._count_hard_negatives(hard_negative_ids, num_centroids)

    def _count_hard_negatives(self, ids: Tensor, num_centroids: int) -> None:
        """log n_k for the centroid columns, and what w adds to it in an anchor's own column."""
        counts = self.a.new_zeros(num_centroids).scatter_add_(0, ids, self.a.new_ones(len(ids)))
        self.log_counts = counts.log()  # −inf where k is nobody's hard negative: the column drops out
        weight = self.options.hard_negative_weight
        if weight != 0.0:
            own, shift = counts[ids], max(weight, 0.0)
            # log(n_k − 1 + e^w) − log n_k
            replaced = (own - 1) * math.exp(-shift) + math.exp(weight - shift)
            self.own_ids, self.own_bonus = ids, replaced.log() + shift - own.log()

    def run(self, needs_grad: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        need_anchor, need_positive, need_negative, need_temperature = needs_grad
        batch, options = self.batch, self.options
        grad_a = torch.empty_like(self.a) if need_anchor or need_temperature else None
        # The columns that want a gradient are one range: positives, explicit negatives, or both.
        wanted = slice(0 if need_positive else batch, self.first_centroid if need_negative else batch)
        grad_columns = torch.empty_like(self.columns[wanted]) if wanted.stop > wanted.start else None
        want_gradients = grad_a is not None or grad_columns is not None
        safe = (
            not isinstance(self.temperature, Tensor)
            and 1.0 / self.temperature <= _SAFE_LOGIT[self.dtype]
            and abs(options.hard_negative_weight) <= _SAFE_WEIGHT
        )
        self.positive_logit = self.a.new_empty(batch)
        self.margin_sum = self.a.new_zeros(())
        self.slope_times_delta = self.a.new_zeros(())
        log_others, self.row_scale = self.a.new_empty(batch), self.a.new_empty(batch)
        row_bytes = len(self.columns) * self.dtype.itemsize
        rows = min(batch, max(1, options.workspace_bytes // (3 * row_bytes)))
        buffer = self.a.new_empty((rows, len(self.columns)))

        for start in range(0, batch, rows):
            chunk = slice(start, min(start + rows, batch))
            logits = self._logits(chunk, buffer[: chunk.stop - start])  # product 1
            diagonal = logits.diagonal(start)
            self.positive_logit[chunk] = diagonal
            slopes = self._false_negatives(logits, chunk, want_gradients)
            self._bias_hard_negatives(logits, chunk)
            shift = None if safe else logits.amax(dim=1)
            weights = logits.exp_() if shift is None else logits.sub_(shift[:, None]).exp_()  # E
            # With the positive kept apart neither the loss nor its gradient is a difference of near-equals.
            own = diagonal.clone()
            diagonal.zero_()
            others = weights.sum(dim=1)
            total = others + own  # Z
            log_others[chunk] = others.log() if shift is None else others.log() + shift
            if not want_gradients:
                continue
            # ∂loss/∂S = 1/(Bτ) · (E/Z − I + W − diag(row sums of W)), here times BτZ. W: slopes of the BML.
            diagonal -= others
            for (cells, local, _), slope in slopes:
                slope *= (total[local] * (options.bml_weight * self.temperature / batch))[:, None]
                cells += slope
                diagonal[local] -= slope.sum(dim=1)
            row_scale = self.row_scale[chunk] = (1.0 / (batch * self.temperature)) / total
            if grad_a is not None:
                torch.mm(weights, self.columns, out=grad_a[chunk])  # product 2
            if grad_columns is not None:
                share = self.a[chunk] * row_scale[:, None]
                grad_columns.addmm_(weights[:, wanted].T, share, beta=1 if start else 0)  # product 3

        margin = log_others - self.positive_logit
        info_nce = torch.logaddexp(margin, torch.zeros_like(margin)).mean()  # log(1 + Σ_others / E_ii)
        bml = torch.zeros_like(info_nce)
        if self.false_negatives == "bml":
            bml = self.margin_sum * self.temperature / batch**2 + self._margin_at_zero()
        if want_gradients:
            self._finish(needs_grad, grad_a, grad_columns, wanted)
        mean_cosine = self.a.sum(dim=0) @ self.columns[:batch].sum(dim=0) / batch**2
        positive_cosine = self.positive_logit.mean() * self.temperature
        return info_nce + options.bml_weight * bml, info_nce, bml, mean_cosine, positive_cosine

    def _logits(self, chunk: slice, out: Tensor) -> Tensor:
        """a Xᵀ/τ for the rows of a chunk."""
        if isinstance(self.temperature, Tensor):
            return torch.mm(self.a[chunk], self.columns.T, out=out).div_(self.temperature)
        scale = 1 / self.temperature
        if self.centroid_cosines is None:
            return torch.addmm(out, self.a[chunk], self.columns.T, beta=0, alpha=scale, out=out)
        known = self.first_centroid  # the assignment has multiplied a with the centroids already
        others, columns = out[:, :known], self.columns[:known]
        torch.addmm(others, self.a[chunk], columns.T, beta=0, alpha=scale, out=others)
        torch.mul(self.centroid_cosines[chunk], scale, out=out[:, known:])
        return out

    def _false_negatives(
        self, logits: Tensor, chunk: slice, want_slopes: bool
    ) -> list[tuple[_MateBlock, Tensor]]:
        """Treat the chunk's cluster-mates: drop them, or sum their margins and return the slopes."""
        if self.false_negatives == "keep":
            return []
        slopes = []
        for block in self._mate_blocks(logits, chunk):
            if self.false_negatives == "exclude":
                block.cells.masked_fill_(block.mates, -torch.inf)
            else:
                slope = self._margin(block, chunk.start)
                if want_slopes and self.options.bml_weight != 0.0:
                    slopes.append((block, slope))
        if self.false_negatives == "exclude":
            logits.diagonal(chunk.start).copy_(self.positive_logit[chunk])
        return slopes

    def _mate_blocks(self, logits: Tensor, chunk: slice) -> Iterator[_MateBlock]:
        """Split the chunk's rows so that a block and its temporaries stay within the workspace."""
        assert self.cluster_ids is not None
        step = max(1, self.options.workspace_bytes // (12 * self.batch * self.dtype.itemsize))
        if self.order is not None:
            step = min(step, _MATE_ROWS)
        for first in range(chunk.start, chunk.stop, step):
            last = min(first + step, chunk.stop)
            low, high = 0, self.batch
            if self.order is not None:
                low, high = self.border_low[first], self.border_high[last - 1]
            local = slice(first - chunk.start, last - chunk.start)
            mates = self.cluster_ids[first:last, None] == self.cluster_ids[None, low:high]
            yield _MateBlock(logits[local, low:high], local, mates)

    def _margin(self, block: _MateBlock, start: int) -> Tensor:
        """Add the block's margins, beyond what Δ = 0 adds, to the sum; return slopes in {−1, 0, 1}.

        Per cell and in units of logits, relu(Δ+α) + relu(−Δ−β) = slope · Δ + α[Δ > −α] − β[Δ < −β] with
        slope = [Δ > −α] − [Δ < −β]. Counting i = j as a mate is harmless: Δ_ii = 0 is what the cell would
        add anyway, and its slope on S_ii cancels against its slope on s_i.
        """
        cells, local, mates = block
        positive = self.positive_logit[start + local.start : start + local.stop, None]
        alpha, beta = self.options.bml_alpha / self.temperature, self.options.bml_beta / self.temperature
        delta = cells - positive
        above, below = (delta > -alpha).logical_and_(mates), (delta < -beta).logical_and_(mates)
        slope = above.to(self.dtype) - below.to(self.dtype)
        slope_times_delta = torch.dot(slope.view(-1), delta.view(-1))
        self.slope_times_delta += slope_times_delta
        self.margin_sum += slope_times_delta
        at_zero = self._margin_at_zero() / self.temperature
        for constant, cells_counted in ((alpha, above), (-beta, below), (-at_zero, mates)):
            self.margin_sum += constant * cells_counted.count_nonzero().to(self.dtype)
        return slope

    def _margin_at_zero(self) -> float:
        """What a cell with Δ = 0 adds, and so every cell but the mates': relu(α) + relu(−β)."""
        return max(self.options.bml_alpha, 0.0) + max(-self.options.bml_beta, 0.0)

    def _bias_hard_negatives(self, logits: Tensor, chunk: slice) -> None:
        """Turn the centroid columns into log(n_k · exp(a·c_k/τ))."""
        if self.first_centroid == len(self.columns):
            return
        hard = logits[:, self.first_centroid :]
        hard += self.log_counts
        if self.own_bonus is not None:
            hard.scatter_add_(1, self.own_ids[chunk, None], self.own_bonus[chunk, None])

    def _finish(
        self, needs_grad: tuple[bool, ...], grad_a: Tensor | None, grad_columns: Tensor | None, wanted: slice
    ) -> None:
        """Carry the gradients through τ and the normalisation, back into the caller's order of rows."""
        need_anchor, need_positive, need_negative, need_temperature = needs_grad
        if grad_a is not None:
            along = (self.a * grad_a).sum(dim=1)
            if need_temperature:  # −1/τ · Σ_ij S_ij ∂InfoNCE/∂S_ij
                margins = (
                    self.slope_times_delta * self.temperature * (self.options.bml_weight / self.batch**2)
                )
                self.gradients[3] = (margins - along @ self.row_scale) / self.temperature
            if need_anchor:
                scale = self.row_scale * self.anchor_scale
                self.gradients[0] = self._unsort(_through_norm(grad_a, self.a, along, scale))
        if grad_columns is not None:
            units = self.columns[wanted]
            along = (units * grad_columns).sum(dim=1)
            gradient = _through_norm(grad_columns, units, along, self.column_scale[wanted])
            split = self.batch - wanted.start
            if need_positive:
                self.gradients[1] = self._unsort(gradient[:split])
            if need_negative:
                self.gradients[2] = gradient[split:]

    def _unsort(self, rows: Tensor) -> Tensor:
        if self.order is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self.order, rows)


def _through_norm(gradient: Tensor, unit: Tensor, along: Tensor, scale: Tensor) -> Tensor:
    """dz = (du − u (u·du)) / ‖z‖, in place on `gradient`."""
    return gradient.addcmul_(unit, along[:, None], value=-1).mul_(scale[:, None])
