"""The two-sided margin loss on cluster-mates alone: diagonal blocks of the cosines, sorted by cluster.

One program owns M rows and a block of the embedding dimension, and goes over the columns that hold mates of
its rows. The cosines are made again for each block of the dimension: for K clusters that is about 1/K of a
product, and no B×B slope matrix, nor a gradient as wide as the embedding, is held.

Per pair of mates: Δ = cos(a_i, p_j) − s_i, margin relu(Δ+α) + relu(−Δ−β), slope −1, 0 or 1. TRANSPOSED: the
rows are positives and the columns anchors, so s belongs to the column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .objective import margin_slope
from .tiles import multiply_add, product_tile, read_scalar, row_starts

BATCH_SIZES = ["num_rows", "num_columns"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def margins_kernel(
    x_ptr,  # (·, D); sorted row r is row x_order[r], or r itself
    y_ptr,  # (·, D)
    x_inverse_ptr,  # 1/‖x‖, in the order of x
    y_inverse_ptr,
    x_order_ptr,  # (R,) int64
    y_order_ptr,  # (n,) int64
    low_ptr,  # (R,) int64: the mates of sorted row r are the sorted columns low ≤ c < high
    high_ptr,  # (R,) int64
    own_ptr,  # (R,) int64: the sorted column that is the row's other view, −1 where it is not here
    positive_ptr,  # s by sorted row, by sorted column if TRANSPOSED
    out_ptr,  # (·, D) float32, in the order of x: slopes · unit columns · out_scale is added,
    # over ‖x‖ if TRANSPOSED
    slope_sum_ptr,  # out (R,) row sums of the slopes
    margin_ptr,  # out (R,) row sums of the margins beyond what Δ = 0 adds
    alpha,
    beta,
    out_scale,
    num_rows,
    num_columns,
    dim,
    x_stride,
    y_stride,
    HAS_X_ORDER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid: (row tiles, blocks of D), one block of D without HAS_OUT."""
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = places < num_rows
    safe_places = tl.minimum(places, num_rows - 1)
    rows = safe_places.to(tl.int64)
    if HAS_X_ORDER:
        rows = tl.load(x_order_ptr + safe_places)
    low = tl.load(low_ptr + safe_places)  # (M,)
    high = tl.load(high_ptr + safe_places)
    own = tl.load(own_ptr + safe_places)
    x_rows, x_inverse = row_starts(x_ptr, rows, x_stride), tl.load(x_inverse_ptr + rows)
    alpha, beta = read_scalar(alpha, False), read_scalar(beta, False)
    at_zero = tl.maximum(alpha, 0.0) + tl.maximum(-beta, 0.0)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    accumulator = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    slope_sum = tl.zeros((BLOCK_M,), tl.float32)
    margin_sum = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.min(low, axis=0) // BLOCK_N * BLOCK_N
    last = tl.max(high, axis=0)
    for start in range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)  # (N,) sorted columns
        safe_at = tl.minimum(at, num_columns - 1)
        columns = tl.load(y_order_ptr + safe_at)
        y_rows = row_starts(y_ptr, columns, y_stride)
        products, _, _ = product_tile(x_rows, y_rows, dim, False, False, PRECISION, UPCAST, BLOCK_D)
        y_inverse = tl.load(y_inverse_ptr + columns)
        if TRANSPOSED:
            positive = tl.load(positive_ptr + safe_at)[None, :]
        else:
            positive = tl.load(positive_ptr + safe_places)[:, None]
        delta = products * x_inverse[:, None] * y_inverse[None, :] - positive  # (M, N)
        mates = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None]) & (at[None, :] != own[:, None])
        slope = tl.where(mates, margin_slope(delta, alpha, beta), 0.0)
        if HAS_MARGIN:
            margin = tl.maximum(delta + alpha, 0.0) + tl.maximum(-delta - beta, 0.0) - at_zero
            margin_sum += tl.sum(tl.where(mates, margin, 0.0), axis=1)
            slope_sum += tl.sum(slope, axis=1)
        if HAS_OUT:
            y = tl.load(y_rows + d[None, :], mask=(d < dim)[None, :], other=0.0)  # (N, D)
            pull = (slope * y_inverse[None, :]).to(y.dtype)
            accumulator = multiply_add(pull, y, accumulator, PRECISION, UPCAST)
    if HAS_MARGIN:
        if tl.program_id(1) == 0:
            tl.store(slope_sum_ptr + places, slope_sum, mask=row_mask)
            tl.store(margin_ptr + places, margin_sum, mask=row_mask)
    if HAS_OUT:
        both = row_mask[:, None] & (d < dim)[None, :]
        out = out_ptr + rows[:, None] * dim + d[None, :]
        if TRANSPOSED:
            accumulator = accumulator * x_inverse[:, None]
        before = tl.load(out, mask=both, other=0.0)
        tl.store(out, before + accumulator * read_scalar(out_scale, False), mask=both)
