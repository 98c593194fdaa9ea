"""First product of a large batch: softmax weights of a chunk of rows, never the cosines themselves.

One tile is (M, N) of E_ij = exp(cos(x_i, y_j)/τ − reference_i). It leaves E_ij/‖y_j‖ in the dtype of
`weights` for the two products that follow, and its row sums in float32. The norm rides on the weight, so the
products take the raw rows: no normalised copy, and half precision loses nothing.

    TOTALS    log2 of the row sums alone, each tile by its own maximum: for any τ without a reference; and
              likewise of the column sums, where the positives look for their anchors too
    WEIGHTS   row sums and weights

The margin loss lives on cluster-mates, which stand side by side. Where a row has more than `most_mates`, its
slopes, −1, 0 or 1, ride on the weights, see `with_slope`; those of all others are `rows.gather_kernel`'s.

Where the chip loads tiles by descriptors, as many programs as it has multiprocessors go through the tiles.
Logits are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .objective import log2_uses, margin_slope
from .tiles import LN_2, LOG2_E, LOWEST, multiply_add, padded, read_scalar, row_starts

TOTALS = tl.constexpr(0)
WEIGHTS = tl.constexpr(1)

# The smallest τ for which no row maximum is needed: e^±40 and sums of 2^40 of them fit float32.
SAFE_TEMPERATURE = tl.constexpr(0.025)

BATCH_SIZES = ["num_rows", "num_columns", "num_positives", "num_programs", "most_mates"]


@triton.jit
def with_slope(e, slope, LOW: tl.constexpr):
    """A weight ≥ 0 that carries a slope: 1 in the last bit that is kept, −1 in the sign.

    LOW: that bit of a float32, 1, or 2^16 where bfloat16 is kept. Rounded to one bit less.
    """
    bits = (e.to(tl.int32, bitcast=True) + LOW) & (-2 * LOW)
    bits = tl.where(slope > 0, bits | LOW, bits)
    return tl.where(slope < 0, bits | -(2**31), bits).to(tl.float32, bitcast=True)  # −e of 0 would be +0


@triton.jit
def without_slope(weight, LOW: tl.constexpr):
    """The weight and the slope that `with_slope` has put together, float32 both."""
    bits = weight.to(tl.float32).to(tl.int32, bitcast=True)
    slope = ((bits & LOW) != 0).to(tl.float32) - (bits < 0).to(tl.float32)
    return (bits & (0x7FFFFFFF - LOW)).to(tl.float32, bitcast=True), slope


@triton.jit
def log2_of_sums(logits, mask, AXIS: tl.constexpr):
    """log2 Σ 2^logit along an axis; −inf where nothing is in the mask."""
    largest = tl.max(tl.where(mask, logits, LOWEST), axis=AXIS)
    shifted = logits - tl.expand_dims(largest, AXIS)
    return largest + tl.log2(tl.sum(tl.where(mask, tl.exp2(shifted), 0.0), axis=AXIS))


@triton.jit
def log2_add(x, y):
    """log2(2^x + 2^y), −inf for two of them."""
    largest = tl.maximum(x, y)
    sums = tl.exp2(x - largest) + tl.exp2(y - largest)
    return tl.where(largest == float("-inf"), largest, largest + tl.log2(sums))


@triton.jit
def _parts(z, NUMBER: tl.constexpr):
    """Columns from left to right in so many parts, a tuple: a power of 2."""
    if NUMBER == 1:
        parts = (z,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))
        parts = _parts(left, NUMBER // 2) + _parts(right, NUMBER // 2)
    return parts


@triton.jit(do_not_specialize=BATCH_SIZES)
def weights_kernel(
    x_ptr,  # (R, D) rows of the chunk
    y_ptr,  # (n, D) columns: positives, then explicit negatives; or centroids
    x_descriptor,  # both again, for chips that load tiles by descriptors, else None
    y_descriptor,
    x_inverse_ptr,  # (R,) 1/‖x_i‖
    y_inverse_ptr,  # (n,)
    own_ptr,  # (R,) int64: the column of row i's own positive, which is left out
    row_ids_ptr,  # (R,) int: cluster of each row, whose other positives are left out
    column_ids_ptr,  # (positives,) int
    low_ptr,  # (R,) int64: the mates of row i are the columns low ≤ j < high, but for its own
    high_ptr,  # (R,) int64
    positive_ptr,  # (R,) s_i
    uses_ptr,  # (n,) float32: n_k of each centroid
    hard_ids_ptr,  # (R,) int64: the hard negative of sentence i
    reference_ptr,  # (R,) base 2
    column_reference_ptr,  # (positives,) base 2: what a column's own E are relative to, which are added
    weights_ptr,  # out (R, padded(n))
    partial_ptr,  # out (column tiles, R) float32: row sums, log2 of them for TOTALS
    column_partial_ptr,  # out (row tiles, positives) likewise
    margin_partial_ptr,  # out (3, column tiles, R), where a row has many mates: Σ slope, margins, slope·Δ
    temperature,  # τ, a number or a pointer
    hard_negative_weight,
    alpha,
    beta,
    num_rows,
    num_columns,
    num_positives,
    num_programs,
    most_mates,
    dim,
    x_stride,
    y_stride,
    weights_stride,
    MODE: tl.constexpr,
    SKIPS: tl.constexpr,  # a τ that only the device knows may need no reference
    HAS_X_DESCRIPTOR: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_SLOPES: tl.constexpr,  # on the weights
    HAS_USES: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_COLUMN_REFERENCE: tl.constexpr,
    HAS_COLUMN_PARTIAL: tl.constexpr,
    HAS_MARGIN_PARTIAL: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PART: tl.constexpr,  # columns finished at a time: a whole tile would not fit the registers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (num_programs,); neighbours share their columns, and all of x stays in the cache."""
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    PARTS: tl.constexpr = BLOCK_N // PART
    last_tile = row_tiles * column_tiles
    tau = read_scalar(temperature, TEMPERATURE_POINTER)
    if SKIPS:
        last_tile = tl.where(tau < SAFE_TEMPERATURE, last_tile, 0)
    for tile in tl.range(tl.program_id(0), last_tile, num_programs):
        row_tile, column_tile = tile % row_tiles, tile // row_tiles
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        x_rows = row_starts(x_ptr, tl.minimum(rows, num_rows - 1), x_stride)
        y_rows = row_starts(y_ptr, tl.minimum(columns, num_columns - 1), y_stride)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, dim, BLOCK_D):
            if HAS_X_DESCRIPTOR:
                x = x_descriptor.load([row_tile * BLOCK_M, start])
                y = y_descriptor.load([column_tile * BLOCK_N, start])
            else:
                d = start + tl.arange(0, BLOCK_D)
                x = tl.load(x_rows + d[None, :], mask=(d < dim)[None, :], other=0.0)
                y = tl.load(y_rows + d[None, :], mask=(d < dim)[None, :], other=0.0)
            products = multiply_add(x, tl.trans(y), products, PRECISION, UPCAST)
        parts = _parts(products, PARTS)
        row_mask, safe_rows = rows < num_rows, tl.minimum(rows, num_rows - 1)
        x_scale = tl.load(x_inverse_ptr + safe_rows) * (LOG2_E / tau)
        if HAS_OWN:
            own = tl.load(own_ptr + safe_rows).to(tl.int32)[:, None]
        if HAS_ROW_IDS:
            mine = tl.load(row_ids_ptr + safe_rows)[:, None]
        if HAS_USES:
            own_hard = tl.load(hard_ids_ptr + safe_rows).to(tl.int32)[:, None]
        if HAS_REFERENCE:
            reference = tl.load(reference_ptr + safe_rows)[:, None]
        if HAS_LOW:
            low = tl.load(low_ptr + safe_rows).to(tl.int32)
            high = tl.load(high_ptr + safe_rows).to(tl.int32)
            high = tl.where(high - low > most_mates, high, low)
            first, last = tl.min(tl.where(high > low, low, num_columns), axis=0), tl.max(high, axis=0)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        slope_sum, margin_sum, along = sums, sums, sums
        if MODE == TOTALS:
            sums += float("-inf")
        for number in tl.static_range(PARTS):
            left = column_tile * BLOCK_N + number * PART
            columns = left + tl.arange(0, PART)
            column_mask = columns < num_columns
            y_inverse = tl.load(y_inverse_ptr + columns, mask=column_mask, other=0.0)
            # Norm and border in one operation: each that is saved here is a hundredth of the sweep.
            border = tl.where(column_mask, 0.0, float("-inf"))
            logits = parts[number] * x_scale[:, None] * y_inverse[None, :] + border[None, :]
            others = tl.full((BLOCK_M, PART), True, tl.int1)  # rows beyond the last are not written
            if MODE == TOTALS:
                others = row_mask[:, None] & column_mask[None, :]
            if HAS_OWN:
                others = others & (columns[None, :] != own)
            if HAS_ROW_IDS:
                is_positive = columns < num_positives
                ids = tl.load(column_ids_ptr + columns, mask=is_positive, other=0)[None, :]
                others = others & ((ids != mine) | ~is_positive[None, :])
            biased = logits
            if HAS_USES:
                uses = tl.load(uses_ptr + columns, mask=column_mask, other=0.0)[None, :]
                weight = read_scalar(hard_negative_weight, False)
                biased += log2_uses(uses, columns[None, :] == own_hard, weight)
                others = others & (uses > 0)
            if MODE == TOTALS:
                sums = log2_add(sums, log2_of_sums(biased, others, 1))
                if HAS_COLUMN_PARTIAL:
                    of_columns = log2_of_sums(logits, others, 0)
                    at = column_partial_ptr + row_tile.to(tl.int64) * num_positives + columns
                    tl.store(at, of_columns, mask=columns < num_positives)
            else:
                if HAS_REFERENCE:
                    biased -= reference
                e = tl.where(others, tl.exp2(biased), 0.0)
                sums += tl.sum(e, axis=1)
                if HAS_COLUMN_REFERENCE:
                    at, mask = column_reference_ptr + columns, columns < num_positives
                    own_column = tl.load(at, mask=mask, other=float("inf"))[None, :]
                    # From what is there already, or it spills on sm_90; 1 keeps inf · 0 out.
                    own_column = tl.minimum(biased + (reference - own_column), 1.0)
                    e += tl.exp2(own_column) * others.to(tl.float32)
                e *= y_inverse[None, :]
            if HAS_LOW:
                if (first < left + PART) & (last > left):
                    mates = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
                    if HAS_OWN:
                        mates = mates & (columns[None, :] != own)
                    upper, lower = read_scalar(alpha, False), read_scalar(beta, False)
                    delta = biased
                    if HAS_REFERENCE:
                        delta += reference
                    delta = delta * (tau * LN_2) - tl.load(positive_ptr + safe_rows)[:, None]
                    slope = tl.where(mates, margin_slope(delta, upper, lower), 0.0)
                    if HAS_MARGIN_PARTIAL:
                        at_zero = tl.maximum(upper, 0.0) + tl.maximum(-lower, 0.0)
                        margin = tl.maximum(delta + upper, 0.0) + tl.maximum(-delta - lower, 0.0) - at_zero
                        slope_sum += tl.sum(slope, axis=1)
                        margin_sum += tl.sum(tl.where(mates, margin, 0.0), axis=1)
                        along += tl.sum(tl.where(mates, slope * delta, 0.0), axis=1)
                    if HAS_SLOPES:
                        LOW: tl.constexpr = 1 if weights_ptr.dtype.element_ty == tl.float32 else 65536
                        e = tl.where(mates, with_slope(e, slope, LOW), e)
            if MODE == WEIGHTS:
                starts = row_starts(weights_ptr, rows, weights_stride)
                both = row_mask[:, None] & (columns < padded(num_columns))[None, :]
                tl.store(starts + columns[None, :], e.to(weights_ptr.dtype.element_ty), mask=both)
            if not HAS_X_DESCRIPTOR:
                tl.debug_barrier()  # or what the next part reads is read now, and registers spill (sm_100)
        partial = column_tile.to(tl.int64) * num_rows + rows
        tl.store(partial_ptr + partial, sums, mask=row_mask)
        if HAS_LOW and HAS_MARGIN_PARTIAL:
            many = row_mask & (high > low)
            step = column_tiles.to(tl.int64) * num_rows
            at = margin_partial_ptr + partial
            tl.store(at, slope_sum, mask=many)
            tl.store(at + step, margin_sum, mask=many)
            tl.store(at + 2 * step, along, mask=many)
