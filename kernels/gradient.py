"""Gradients of the objective: both products and the way back through the normalisation, in one launch.

One program makes one (M, D) tile of ∂loss/∂z for anchors, positives or explicit negatives, from the weights
that `objective.py` has left, W_ij = w_ij / (‖a_i‖ ‖p_j‖) with w = Bτ · ∂loss/∂S:

    da = f (W p − a along_a / ‖a‖²),  dp = f (Wᵀ a − p along_p / ‖p‖²),  f = upstream / (Bτ)

The norms of both factors are in the weights, so the raw embeddings are multiplied as they are, and
along_a = Σ_j w_ij S_ij is there already: no second pass over the embeddings.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import multiply_add, padded, read_scalar, row_starts, wait_for_the_launch_before

BATCH_SIZES = ["num_rows", "num_negatives", "num_centroids", "num_tiles"]


@triton.jit
def _add_product(
    product,  # (M, D)
    weights,  # (M, 1) where the weights of each row start
    mask,  # (M,)
    step,  # from a weight to the next
    limit,  # weights that can be read; those beyond `count` are 0
    z_ptr,  # (count, D)
    stride,
    count,
    d,
    dim,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """product + weights · rows of z."""
    for start in range(0, count, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        weight = tl.load(weights + at[None, :] * step, mask=mask[:, None] & (at < limit)[None, :], other=0.0)
        both = (at < count)[:, None] & (d < dim)[None, :]
        z = tl.load(row_starts(z_ptr, at, stride) + d[None, :], mask=both, other=0.0)  # (N, D)
        product = multiply_add(weight, z, product, PRECISION, UPCAST)
    return product


@triton.jit
def _store_through_norm(product, z_ptr, z_stride, out_ptr, rows, d, count, dim, inverse, along, factor):
    """dz = factor (product − z along / ‖z‖²), written in the dtype of z."""
    mask = (rows < count)[:, None] & (d < dim)[None, :]
    z = tl.load(row_starts(z_ptr, rows, z_stride) + d[None, :], mask=mask, other=0.0).to(tl.float32)
    gradient = (product - z * inverse[:, None] * (inverse * along)[:, None]) * factor
    out = row_starts(out_ptr, rows, dim) + d[None, :]
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def gradient_kernel(
    x_ptr,  # (B, D) anchors
    y_ptr,  # (B, D) positives
    negatives_ptr,  # (N, D) explicit negatives
    centroids_ptr,  # (K, D) in the dtype of centroid_weights
    x_gradient_ptr,  # out (B, D), contiguous
    y_gradient_ptr,  # out (B, D)
    negatives_gradient_ptr,  # out (N, D)
    weights_ptr,  # (B, padded(B) + N) W
    centroid_weights_ptr,  # (B, K) likewise
    x_inverse_ptr,  # (B,)
    y_inverse_ptr,  # (padded(B) + N,)
    x_along_ptr,  # (B,) Σ_j w_ij S_ij
    y_along_ptr,  # (row tiles of the objective, padded(B) + N) parts of Σ_i w_ij S_ij
    upstream_ptr,  # 0-dim: the gradient of the loss
    temperature,
    num_rows,
    num_negatives,
    num_centroids,
    num_tiles,  # of the objective
    dim,
    x_stride,
    y_stride,
    negatives_stride,
    centroids_stride,
    weights_stride,
    centroid_weights_stride,
    y_along_stride,
    HAS_X_GRADIENT: tl.constexpr,
    NEED_Y: tl.constexpr,
    HAS_NEGATIVES_GRADIENT: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr,
    HAS_CENTROIDS: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: ((anchor tiles + positive tiles + negative tiles) · dimension tiles,), each set if needed."""
    wait_for_the_launch_before(DEPENDENT)
    dimension_tiles = tl.cdiv(dim, BLOCK_D)
    tile = tl.program_id(0) // dimension_tiles
    d = tl.program_id(0) % dimension_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(upstream_ptr).to(tl.float32) / (num_rows * read_scalar(temperature, TEMPERATURE_POINTER))
    first = padded(num_rows)  # where the explicit negatives start in a row
    product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    x_tiles = 0
    if HAS_X_GRADIENT:
        x_tiles = row_tiles
        if tile < x_tiles:
            rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = rows < num_rows
            starts = row_starts(weights_ptr, rows, weights_stride)
            product = _add_product(
                product, starts, mask, 1, first, y_ptr, y_stride, num_rows, d, dim, PRECISION, UPCAST, BLOCK_N
            )
            if HAS_NEGATIVES:
                product = _add_product(
                    product, starts + first, mask, 1, padded(num_negatives), negatives_ptr, negatives_stride,
                    num_negatives, d, dim, PRECISION, UPCAST, BLOCK_N,
                )  # fmt: skip
            if HAS_CENTROIDS:
                starts = row_starts(centroid_weights_ptr, rows, centroid_weights_stride)
                product = _add_product(
                    product, starts, mask, 1, padded(num_centroids), centroids_ptr, centroids_stride,
                    num_centroids, d, dim, PRECISION, UPCAST, BLOCK_N,
                )  # fmt: skip
            inverse = tl.load(x_inverse_ptr + rows, mask=mask, other=0.0)
            along = tl.load(x_along_ptr + rows, mask=mask, other=0.0)
            _store_through_norm(
                product, x_ptr, x_stride, x_gradient_ptr, rows, d, num_rows, dim, inverse, along, factor
            )

    if NEED_Y or HAS_NEGATIVES_GRADIENT:
        if tile >= x_tiles:
            tile -= x_tiles
            # Positives, then explicit negatives: `first` is where this set starts in a row.
            source, stride, out, count, first = y_ptr, y_stride, y_gradient_ptr, num_rows, 0
            if HAS_NEGATIVES_GRADIENT:
                y_tiles = 0
                if NEED_Y:
                    y_tiles = row_tiles
                if tile >= y_tiles:
                    tile -= y_tiles
                    source, stride, out = negatives_ptr, negatives_stride, negatives_gradient_ptr
                    count, first = num_negatives, padded(num_rows)
            own = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # rows of this set
            columns = first + own  # where they stand in a row
            product = _add_product(
                product, weights_ptr + columns[:, None], own < padded(count), weights_stride, num_rows, x_ptr,
                x_stride, num_rows, d, dim, PRECISION, UPCAST, BLOCK_N,
            )  # fmt: skip
            inverse = tl.load(y_inverse_ptr + columns, mask=own < count, other=0.0)
            along = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, num_tiles, BLOCK_N):
                at = start + tl.arange(0, BLOCK_N)
                parts = row_starts(y_along_ptr, at, y_along_stride) + columns[None, :]
                both = (own < count)[None, :] & (at < num_tiles)[:, None]
                along += tl.sum(tl.load(parts, mask=both, other=0.0), axis=0)
            _store_through_norm(product, source, stride, out, own, d, count, dim, inverse, along, factor)
