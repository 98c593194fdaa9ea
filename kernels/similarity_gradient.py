"""Backward of the cosine similarity matrix: both gradients through the normalisation, in one launch.

For R = cos(x, y)/τ with upstream gradient U: du = U v/τ for the unit rows u, v, and
dz = (du − u (u·du)) / ‖z‖ with u·du = Σ_j U_ij R_ij. U is float32, and so are both products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import multiply_add, read_scalar, store_through_norm

BATCH_SIZES = ["num_rows", "num_columns", "cosine_blocks"]


@triton.jit(do_not_specialize=[*BATCH_SIZES, "upstream_row_stride", "upstream_column_stride"])
def similarity_gradient_kernel(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    x_gradient_ptr,  # out (M, D), contiguous
    y_gradient_ptr,  # out (N, D)
    upstream_ptr,  # (M, N) float32, any strides
    cosines_ptr,  # (M, N) the forward's result, 16 · cosine_blocks numbers from row to row
    x_inverse_ptr,  # (M,)
    y_inverse_ptr,  # (N,)
    temperature,
    num_rows,
    num_columns,
    dim,
    x_stride,
    y_stride,
    upstream_row_stride,
    upstream_column_stride,
    cosine_blocks,
    NEED_X: tl.constexpr,
    NEED_Y: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: ((row tiles + column tiles) · dimension tiles,), each set if needed."""
    dimension_tiles = tl.cdiv(dim, BLOCK_D)
    tile = tl.program_id(0) // dimension_tiles
    d = tl.program_id(0) % dimension_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    row_length = cosine_blocks.to(tl.int64) * 16
    # One code for both sets: `own` are the rows of this set, `other` those summed over.
    own_ptr, own_stride, own_inverse_ptr, out_ptr, own_count = (
        y_ptr,
        y_stride,
        y_inverse_ptr,
        y_gradient_ptr,
        num_columns,
    )
    other_ptr, other_stride, other_inverse_ptr, other_count = x_ptr, x_stride, x_inverse_ptr, num_rows
    own_step, other_step = upstream_column_stride.to(tl.int64), upstream_row_stride.to(tl.int64)
    own_length, other_length = tl.full((), 1, tl.int64), row_length
    if NEED_X:
        row_tiles = tl.cdiv(num_rows, BLOCK_M)
        if tile < row_tiles:
            own_ptr, own_stride, own_inverse_ptr, out_ptr, own_count = (
                x_ptr,
                x_stride,
                x_inverse_ptr,
                x_gradient_ptr,
                num_rows,
            )
            other_ptr, other_stride, other_inverse_ptr, other_count = (
                y_ptr,
                y_stride,
                y_inverse_ptr,
                num_columns,
            )
            own_step, other_step = upstream_row_stride.to(tl.int64), upstream_column_stride.to(tl.int64)
            own_length, other_length = row_length, tl.full((), 1, tl.int64)
        else:
            tile -= row_tiles
    own = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_own = tl.minimum(own, own_count - 1).to(tl.int64)[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, other_count, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        mask = other < other_count
        at = other.to(tl.int64)
        upstream = tl.load(
            upstream_ptr + safe_own * own_step + at[None, :] * other_step, mask=mask[None, :], other=0.0
        )  # (M, N)
        cosine = tl.load(
            cosines_ptr + safe_own * own_length + at[None, :] * other_length, mask=mask[None, :], other=0.0
        )
        along += tl.sum(upstream * cosine, axis=1)
        weight = upstream * tl.load(other_inverse_ptr + other, mask=mask, other=0.0)[None, :]
        z = tl.load(
            other_ptr + at[:, None] * other_stride + d[None, :],
            mask=mask[:, None] & (d < dim)[None, :],
            other=0.0,
        )  # (N, D)
        product = multiply_add(weight, z.to(tl.float32), product, PRECISION, UPCAST)
    inverse = tl.load(own_inverse_ptr + tl.minimum(own, own_count - 1))
    tau = read_scalar(temperature, TEMPERATURE_POINTER)
    store_through_norm(
        product / tau, own_ptr, own_stride, out_ptr, own, d, own_count, dim, inverse, along, 1.0
    )
