"""The three products on Triton, for batches whose cosines are not kept: 6·B²·D operations.

Per chunk of rows the first product is a Triton kernel that leaves softmax weights, in bfloat16 for
half-precision embeddings, and their row sums in float32; the two products that follow are the vendor
library's, added up over chunks in float32. 1/Z scales anchors and results, never the matrix. Raw rows are
multiplied and the norms divided out, so half precision is exact in the cosines. Eight launches a chunk:

    gather                       rows in cluster order, norms, s_i
    weigh, and weigh centroids   product 1
    settle                       log Z and what follows from it
    product 2, product 3         the vendor library's
    add_margins                  slopes of the margin loss, −1, 0 or 1, times rows: groups of cluster-mates
    finish                       gradient of the anchors

(Two more before them where a row maximum is needed: a look for Z alone.) The margin loss is apart, since its
slopes, λ/B² each, would vanish beside the weights in half precision. Only where a cluster holds more than an
eighth of the columns do they ride on the weights, rounded up or down by chance, or it would cost as much as
the sweep.

float16 embeddings too have bfloat16 weights: exp(cos/τ) leaves the range of float16. The gradient of explicit
negatives, which weights alone make up, then takes the other factor of its product in two parts; with one it
would be further from the truth than plain torch in float16.

With directions="both" a first round finds Z of rows and columns. In the second the weights are E/Z_i + E/Z_j.

`TritonProducts` has the interface of `torch_products.TorchProducts`. No function waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..kernels import chunk_launchers as launchers
from ..kernels.launch import cdiv, padded
from ..kernels.weights import SAFE_TEMPERATURE
from .norms import common_dtype, inverse_norms, kept_dtype, unit_stride
from .problem import SAFE_WEIGHT, Batch, Block
from .ranks import Alone

_LOG2_E = math.log2(math.e)

# A cluster of more than one column in so many has its slopes on the weights.
_FEW_MATES = 8


class Mates(NamedTuple):
    """Where cluster-mates stand once rows and columns are sorted by cluster: first, past the last."""

    of_rows: tuple[Tensor, Tensor]  # (M,) each, columns
    of_columns: tuple[Tensor, Tensor]  # (n,) each, rows


class Buffers(NamedTuple):
    """What a chunk of R rows is worked out in, None where there is none."""

    partial: Tensor  # row sums by parts of the columns
    margin_partial: Tensor | None
    column_partial: Tensor | None
    rows: Tensor | None  # (R, D) raw rows in cluster order
    weights: Tensor | None  # (R, padded(n+N) + padded(K))
    slopes: Tensor | None  # (R, most mates) int8
    reference: Tensor | None  # (R,)
    row_scale: Tensor | None  # (R,) 1/(BτZ)
    share: Tensor | None  # (R, D) unit rows times that
    rest: Tensor | None  # (R, D) and what share has lost
    pull: Tensor | None  # (R, D) float32 product 2


class Columns(NamedTuple):
    """A block's columns: positives, then explicit negatives."""

    raw: Tensor  # (n+N, D)
    inverse: Tensor  # (n+N,) 1/‖row‖
    positives: int  # n
    order: Tensor | None  # (n,) which of the block as it came
    places: Tensor  # (n,) in the batch
    ids: Tensor | None  # (n,)
    own: Tensor | None  # (M,) by sorted row: the column of its own positive, where it is here
    mates: Mates | None
    centroids: Tensor | None  # (K, D) raw, which the rows meet beside their own positives
    operand: Tensor | None  # raw and, from padded(n+N) on, centroids, as products 2 and 3 take them
    wanted: slice  # the columns that want a gradient
    gradient: Tensor | None  # of those, float32, over ‖row‖ and without the projection
    log_totals: Tensor | None  # (n,) log2 Z of the positives as columns, once known
    chunk: int  # R
    buffers: Buffers
    totals: bool


class TritonProducts:
    """Rows that meet blocks of columns; keeps what the rows have found so far.

    Rows and columns are sorted by cluster where the margin loss wants mates side by side; the arrays kept
    here are in that order, the results in the caller's.
    """

    def __init__(self, batch: Batch, ranks: Alone, hard_counts: Tensor | None):
        self.batch, self.options, self.ranks = batch, batch.options, ranks
        self.dtype = common_dtype(batch.anchors, batch.positives, batch.negatives)
        self.weight_dtype = torch.bfloat16 if self.dtype.itemsize == 2 else torch.float32
        self.anchors = unit_stride(batch.anchors.detach().to(self.dtype))
        self.device, count = self.anchors.device, len(self.anchors)
        columns = ranks.batch if ranks.one_block else count
        columns_bytes = columns * self.anchors.shape[1] * (4 + self.weight_dtype.itemsize)
        self.workspace_bytes = self.options.workspace(self.device, columns_bytes)
        clusters = batch.clusters
        word = self.options.false_negatives if clusters.ids is not None else "keep"
        self.excludes, self.has_margins = word == "exclude", word == "bml"
        self.order: Tensor | None = None
        self.row_numbers = torch.arange(count, device=self.device)
        if self.has_margins and clusters.ids is not None:
            self.order = self.row_numbers = clusters.ids.argsort(stable=True)
        self.cluster_ids = None if clusters.ids is None else self._sorted(clusters.ids)
        self.centroids: Tensor | None = None
        if hard_counts is not None:
            assert clusters.centroids is not None
            assert clusters.hard_ids is not None
            self.centroids = clusters.centroids.detach().float().contiguous()
            self.centroid_inverse = inverse_norms(self.centroids)
            self.hard_ids, self.uses = self._sorted(clusters.hard_ids), hard_counts.float()
        tau = batch.temperature
        self.temperature = tau.detach().float() if isinstance(tau, Tensor) else tau
        self.needs_maximum = not self.options.is_safe(tau, 1 / SAFE_TEMPERATURE.value)
        # A learned τ is known to the device alone, and so is whether it needs a reference.
        self.skips = isinstance(tau, Tensor) and abs(self.options.hard_negative_weight) <= SAFE_WEIGHT
        self.slope_scale = float(self.options.bml_weight / ranks.batch**2)
        both = self.options.directions == "both"
        self.size = float((1 + both) * ranks.batch)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=self.device)

        self.inverse, self.positive_cosine = zeros(count), zeros(count)
        self.log_others = torch.full_like(self.inverse, -torch.inf)  # base 2
        self.margins = zeros(3, count)  # Σ slope, margins, slope·Δ
        self.own_weight, self.along = zeros(count), zeros(count)
        self.unit_sums: list[Tensor] = []  # (·, 2·D) each, of anchors and positives
        self.gradient: Tensor | None = None  # (M, D) of the anchors
        self.unit_gradient: Tensor | None = None  # (M, D) float32: over several blocks
        self.log_columns = torch.full((2, ranks.batch), -torch.inf, device=self.device) if both else None
        self.log_total: Tensor | None = None  # (M,) base 2, once known

    def open(self, block: Block, totals: bool, gradients: bool) -> Columns:
        """Prepare to meet a block: for the totals of the rows, for the gradients, or for both."""
        need_anchors, need_positives, need_negatives, need_temperature = self.ranks.needs
        positives, ids = block.positives.detach(), block.cluster_ids
        count = len(positives)
        places = torch.arange(count, device=self.device)
        order, own, mates, log_totals = None, None, None, None
        if self.has_margins:
            assert ids is not None
            assert self.cluster_ids is not None
            order = ids.argsort(stable=True)
            place_of = torch.empty_like(order)
            place_of[order] = places
            ids = ids[order]
            mates = Mates(_borders(ids, self.cluster_ids), _borders(self.cluster_ids, ids))
        if block.own is not None:
            own = block.own + self.row_numbers
            own = own if order is None else place_of[own]
        places = block.place + (places if order is None else order)
        if self.log_columns is not None and not totals:
            log_totals = torch.logaddexp(*self.log_columns)[places] * _LOG2_E
        centroids = self.centroids if own is not None else None
        raw, operand = self._lay_out(block, order, centroids if gradients else None)
        wanted = slice(0 if need_positives else count, len(raw) if need_negatives else count)
        gradient = None
        if gradients:
            size = wanted.stop - wanted.start
            gradient = raw.new_empty((size, raw.shape[1]), dtype=torch.float32) if size else None
            if not totals and self.log_total is None:
                self.log_total = torch.logaddexp2(self.log_others, self._positive_logits())
            if (need_anchors or need_temperature) and self.gradient is None and self.unit_gradient is None:
                if self.ranks.one_block:
                    self.gradient = torch.empty_like(self.anchors, dtype=kept_dtype(self.dtype))
                else:
                    self.unit_gradient = torch.zeros_like(self.anchors, dtype=torch.float32)
        chunk, buffers = self._buffers(raw, count, centroids, totals, gradients)
        return Columns(
            raw, inverse_norms(raw, torch.float32), count, order, places, ids, own, mates, centroids, operand,
            wanted, gradient, log_totals, chunk, buffers, totals,
        )  # fmt: skip

    def chunks(self, columns: Columns) -> Iterator[slice]:
        """Rows whose weights fit the workspace."""
        for start in range(0, len(self.anchors), columns.chunk):
            yield slice(start, min(start + columns.chunk, len(self.anchors)))

    def weigh(self, columns: Columns, rows: slice) -> dict[str, Any]:
        """Take product 1 and settle what its sums decide; returns what the chunk's launches are given."""
        buffers, totals, gradients = columns.buffers, columns.totals, columns.buffers.weights is not None
        chunk, log_others = self._chunk_of(columns, rows), self.log_others[rows]
        if buffers.rows is not None or (totals and columns.own is not None):
            self._gather(columns, rows, chunk)
        if not gradients:
            self._look("totals", columns, rows, chunk, column_partial=buffers.column_partial)
            launchers.settle(chunk, log_others=log_others, LOGS=True)
            if buffers.column_partial is not None:
                self._add_to_columns(columns, rows, chunk, buffers.column_partial)
            return chunk
        reference = None if self.log_total is None else self.log_total[rows]
        if totals and self.needs_maximum:  # a look at Z alone, for what the weights are relative to
            assert buffers.reference is not None
            reference = buffers.reference[: len(chunk["x"])]
            alone = chunk | {"low": None, "margins": None}
            self._look("totals", columns, rows, alone, SKIPS=self.skips)
            launchers.settle(alone, reference=reference, LOGS=True, SKIPS=self.skips)
        self._look(
            "weights", columns, rows, chunk, reference=reference, column_reference=columns.log_totals,
            weights=buffers.weights, slopes=buffers.slopes,
        )  # fmt: skip
        log_own_column = None
        if self.log_columns is not None and columns.own is not None:
            log_own_column = self.log_columns[0, columns.places[chunk["own"]]] * _LOG2_E
        if not totals:
            chunk["partial"] = None  # the sums are known
        launchers.settle(
            chunk, log_others=log_others, reference=reference, log_own_column=log_own_column,
            own_weight=self.own_weight[rows], row_scale=buffers.row_scale, share=buffers.share,
            rest=buffers.rest, weights=None if buffers.slopes is None else buffers.weights,
        )  # fmt: skip
        return chunk

    def differentiate(self, columns: Columns, rows: slice, weights: dict[str, Any]) -> None:
        """Take products 2 and 3."""
        chunk, buffers, out = weights, columns.buffers, columns.gradient
        assert buffers.weights is not None
        assert buffers.share is not None
        assert columns.operand is not None
        x = chunk["x"]
        values, share = buffers.weights[: len(x)], buffers.share[: len(x)]
        pull = None if buffers.pull is None else buffers.pull[: len(x)]
        if pull is not None:
            _accumulate(pull, values[:, : len(columns.operand)], columns.operand, first=True)
        if out is not None:
            _accumulate(out, values[:, columns.wanted].T, share, first=rows.start == 0)
            if buffers.rest is not None:
                negatives = slice(columns.positives, columns.wanted.stop)
                part = out[columns.positives - columns.wanted.start :]
                _accumulate(part, values[:, negatives].T, buffers.rest[: len(x)], first=False)
        if buffers.slopes is not None and columns.mates is not None:
            column_low, column_high = columns.mates.of_columns
            launchers.add_margins(
                chunk, slopes=buffers.slopes, column_low=column_low, column_high=column_high,
                row_scale=buffers.row_scale, x_gradient=pull, y_gradient=out if self.ranks.needs[1] else None,
                first_row=rows.start,
            )  # fmt: skip
        if pull is not None:
            partner: dict[str, Tensor] = {}
            if columns.own is not None:
                partner = {"partner": columns.raw, "partner_index": chunk["own"]}
                partner |= {"partner_weight": self.own_weight[rows], "partner_inverse": columns.inverse}
            launchers.finish(
                pull, x, self.inverse[rows], scale=buffers.row_scale, out=self.gradient, **partner,
                unit=self.unit_gradient, index=self.row_numbers[rows], along=self.along[rows],
            )  # fmt: skip

    def close(self, columns: Columns) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the block's positives (n, D) and explicit negatives (N, D), where wanted."""
        found: list[Tensor | None] = [None, None]
        if columns.gradient is None:
            return None, None
        # Those that ranks add up stay in float32.
        dtype = torch.float32 if self.ranks.size > 1 else kept_dtype(self.dtype)
        count = columns.positives
        for which, (start, stop) in enumerate(((0, count), (count, len(columns.raw)))):
            if start < columns.wanted.start or stop > columns.wanted.stop or (which and start == stop):
                continue
            part, partner = slice(start, stop), {}
            if not which and columns.own is not None:
                owner = torch.full_like(columns.places, -1)
                owner[columns.own] = torch.arange(len(columns.own), device=self.device)
                weight = (self.own_weight * self.inverse)[owner] * columns.inverse[:count]
                index = self.row_numbers[owner].masked_fill_(owner < 0, -1)
                partner = {"partner": self.anchors, "partner_index": index, "partner_weight": weight}
            found[which] = out = torch.empty_like(columns.raw[part], dtype=dtype)
            launchers.finish(
                columns.gradient[start - columns.wanted.start :][: stop - start], columns.raw[part],
                columns.inverse[part], out=out, SCALED=True, **partner,
                index=None if which else columns.order,
            )  # fmt: skip
        return found[0], found[1]

    def sums(self) -> Tensor:
        """Sums over the rows of this process, (3 + 2·D,)."""
        logits = self._positive_logits()
        info_nce = softplus((self.log_others - logits) / _LOG2_E)
        if self.log_columns is not None:
            own = self.ranks.first + self.row_numbers
            of_columns = softplus(self.log_columns[0, own] - logits / _LOG2_E)
            info_nce = (info_nce + of_columns) / 2
        rows = torch.stack([info_nce, self.margins[1], self.positive_cosine])
        return torch.cat([rows.sum(dim=1), torch.cat(self.unit_sums).sum(dim=0)])

    def own(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the anchors (M, D), in the caller's order, and of τ, 0-d, where wanted."""
        need_anchors, _, _, need_temperature = self.ranks.needs
        if self.unit_gradient is not None:
            self.gradient = torch.empty_like(self.anchors, dtype=kept_dtype(self.dtype))
            inverse = torch.empty_like(self.inverse)
            inverse[self.row_numbers] = self.inverse
            launchers.finish(self.unit_gradient, self.anchors, inverse, out=self.gradient, along=self.along)
        of_temperature = None
        if need_temperature:  # what the margin loss adds to a·du is no share of InfoNCE
            along = self.along.sum() - self.slope_scale * self.margins[2].sum()
            of_temperature = -along / self.temperature
        return self.gradient if need_anchors else None, of_temperature

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows[self.order]

    def _positive_logits(self) -> Tensor:
        """s_i/τ (M,), base 2."""
        return self.positive_cosine * (_LOG2_E / self.temperature)

    def _lay_out(
        self, block: Block, order: Tensor | None, centroids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Columns as product 1 takes them, (n+N, D), and with the centroids as products 2 and 3 do.

        No copy of positives that may stay as they are.
        """
        positives, negatives = block.positives.detach(), block.negatives
        if order is None and negatives is None and centroids is None:
            raw = unit_stride(positives.to(self.dtype))
            return raw, raw.to(self.weight_dtype)
        count = len(positives)
        width = count + (0 if negatives is None else len(negatives))
        first, size = padded(width), 0 if centroids is None else len(centroids)
        operand = positives.new_zeros((first + size, positives.shape[1]), dtype=self.weight_dtype)
        raw = operand[:width]
        if self.dtype != self.weight_dtype:
            raw = positives.new_empty((width, positives.shape[1]), dtype=self.dtype)
        raw[:count] = positives if order is None else positives.to(self.dtype).index_select(0, order)
        if negatives is not None:
            raw[count:] = negatives.detach()
        if self.dtype != self.weight_dtype:
            operand[:width] = raw
        if centroids is not None:
            operand[first:] = centroids
        return raw, operand

    def _buffers(
        self, raw: Tensor, positives: int, centroids: Tensor | None, totals: bool, gradients: bool
    ) -> tuple[int, Buffers]:
        """Rows of a chunk, as many as the workspace allows for, and what they are worked out in."""
        need_anchors, _, need_negatives, need_temperature = self.ranks.needs
        x, dim, half = self.anchors, self.anchors.shape[1], self.weight_dtype
        mates, both = self.has_margins, self.log_columns is not None and totals and not gradients
        parts = of_positives = launchers.column_tiles(x, raw)
        width = padded(len(raw))
        if centroids is not None:
            parts, width = parts + launchers.column_tiles(x, centroids), width + len(centroids)
        slopes = self._most_mates(positives) if mates and gradients and self.slope_scale else 0
        pulls = gradients and (need_anchors or need_temperature)
        rest = gradients and self.dtype == torch.float16 and need_negatives and len(raw) > positives
        # By name: numbers a row, their dtype. `column_partial` has a row for many.
        layout: dict[str, tuple[int, torch.dtype]] = {
            "partial": (parts, torch.float32),
            "margin_partial": (3 * of_positives * (mates and totals), torch.float32),
            "column_partial": (cdiv(positives, 64) * both, torch.float32),
            "rows": (dim * (self.order is not None), self.dtype),
            "weights": (padded(width) * gradients, half),
            "slopes": (slopes, torch.int8),
            "reference": (int(gradients and totals and self.needs_maximum), torch.float32),
            "row_scale": (int(gradients), torch.float32),
            "share": (dim * gradients, half),
            "rest": (dim * rest, half),
            "pull": (dim * pulls, torch.float32),
        }
        row_bytes = sum(count * dtype.itemsize for count, dtype in layout.values())
        chunk = min(len(x), self._chunk(row_bytes))
        made = {
            name: raw.new_empty((chunk, count), dtype=dtype) if count else None
            for name, (count, dtype) in layout.items()
        }
        if both:
            made["column_partial"] = raw.new_empty(
                (launchers.row_tiles(x[:chunk], raw), positives), dtype=torch.float32
            )
        return chunk, Buffers(**made)  # type: ignore[arg-type]

    def _chunk(self, row_bytes: int) -> int:
        """Rows that fit the workspace, and a whole number of waves of tiles if that can be."""
        most = max(1, self.workspace_bytes // row_bytes)
        return most if most >= len(self.anchors) else launchers.whole_waves(most, self.anchors)

    def _chunk_of(self, columns: Columns, rows: slice) -> dict[str, Any]:
        """What the launches of a chunk are given, by the names of their parameters."""
        buffers, x, options = columns.buffers, self.anchors[rows], self.options
        if buffers.rows is not None:
            x = buffers.rows[: len(x)]
        chunk: dict[str, Any] = {
            "x": x, "y": columns.raw, "x_inverse": self.inverse[rows], "y_inverse": columns.inverse,
            "num_positives": columns.positives, "own": None if columns.own is None else columns.own[rows],
            "positive": self.positive_cosine[rows], "temperature": self.temperature, "batch": self.size,
            "slope_scale": self.slope_scale, "partial": buffers.partial,
        }  # fmt: skip
        chunk["num_margin_parts"] = chunk["num_parts"] = launchers.column_tiles(x, columns.raw)
        if columns.centroids is not None:
            chunk["num_parts"] += launchers.column_tiles(x, columns.centroids)
        if columns.mates is not None:
            low, high = columns.mates.of_rows
            chunk |= {"low": low[rows], "high": high[rows], "most_mates": self._most_mates(columns.positives)}
            chunk |= {"alpha": float(options.bml_alpha), "beta": float(options.bml_beta)}
            chunk |= {"margins": self.margins[:, rows], "margin_partial": buffers.margin_partial}
            chunk["num_shares"] = launchers.shares(x, chunk["num_margin_parts"])
        return chunk

    def _gather(self, columns: Columns, rows: slice, chunk: dict[str, Any]) -> None:
        """Rows of a chunk in their order, norms, the margin loss; and s_i and sums of unit rows if totals."""
        more: dict[str, Any] = {}
        if columns.own is not None and columns.totals:
            tiles = cdiv(len(chunk["x"]), launchers.GATHERED)
            more["sums"] = self.inverse.new_empty((tiles, 2 * self.anchors.shape[1]))
            self.unit_sums.append(more["sums"])
        if columns.buffers.rows is not None:
            chunk = chunk | {"x": self.anchors}
            more |= {"order": self.row_numbers[rows], "copy": columns.buffers.rows[: len(chunk["x_inverse"])]}
        launchers.gather(chunk, slopes=columns.buffers.slopes, **more)

    def _look(self, mode: str, columns: Columns, rows: slice, chunk: dict[str, Any], **more: Any) -> None:
        """Run the first product for positives and explicit negatives, and for centroids."""
        if self.excludes and self.cluster_ids is not None:
            more |= {"row_ids": self.cluster_ids[rows], "column_ids": columns.ids}
        launchers.weigh(mode, chunk, **more)
        if columns.centroids is not None:
            of_centroids = {name: chunk[name] for name in ("x", "x_inverse", "temperature")}
            of_centroids |= {"y": columns.centroids, "y_inverse": self.centroid_inverse, "uses": self.uses}
            first, weights = chunk["num_margin_parts"] * len(chunk["x"]), more.get("weights")
            launchers.weigh(
                mode, of_centroids, partial=chunk["partial"].view(-1)[first:],
                weights=None if weights is None else weights[:, padded(len(columns.raw)) :],
                reference=more.get("reference"), SKIPS=more.get("SKIPS", False),
                hard_ids=self.hard_ids[rows],
                hard_negative_weight=float(self.options.hard_negative_weight),
            )  # fmt: skip

    def _add_to_columns(self, columns: Columns, rows: slice, chunk: dict[str, Any], partial: Tensor) -> None:
        """Add a chunk of rows to the totals of the columns."""
        assert self.log_columns is not None
        found = partial[: launchers.row_tiles(chunk["x"], columns.raw)]
        others, positives = self.log_columns
        others[columns.places] = torch.logaddexp(others[columns.places], (found / _LOG2_E).logsumexp(dim=0))
        if columns.own is not None:
            own = self.positive_cosine[rows] / self.temperature
            positives[columns.places[chunk["own"]]] = own

    def _most_mates(self, positives: int) -> int:
        return padded(cdiv(positives, _FEW_MATES))


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
