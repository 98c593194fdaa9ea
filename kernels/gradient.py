"""Gradients of the objective: both products and the way back through the normalisation, in one launch.

One program makes one (M, D) tile of ∂loss/∂z for anchors, positives or explicit negatives, from the weights
w = Bτ · ∂loss/∂S that `objective.py` has left in the place of the cosines:

    da = w p,  dp = wᵀ a,  dz = (da − a (a·da)) / ‖z‖

The norms of the summed rows are folded into the weights, so the raw embeddings are the other factor, and
a·da = Σ_j w_ij S_ij is there already: no second pass over the embeddings.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import multiply_add, padded, read_scalar, row_starts

BATCH_SIZES = ["num_rows", "num_negatives", "num_centroids", "num_tiles", "cosine_blocks", "centroid_blocks"]

# Weights below this in float16 lose nothing that matters: they are scaled so that the largest can be this.
_LARGEST_HALF = tl.constexpr(16384.0)


@triton.jit
def _largest(values_ptr, count):
    """Largest of `count` numbers ≥ 0; 1 if all are 0."""
    largest = tl.zeros((1024,), tl.float32)
    for start in range(0, count, 1024):
        at = start + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.load(values_ptr + at, mask=at < count, other=0.0))
    largest = tl.max(largest, axis=0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def _add_product(
    product,  # (M, D)
    weights,  # (M, 1) where the weights of each row start
    mask,  # (M,)
    step,  # from a weight to the next
    limit,  # weights that can be read; those beyond `count` are 0
    factor,
    z_ptr,  # (count, D)
    inverse_ptr,  # (count,) 1/‖z‖
    stride,
    count,
    d,
    dim,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """product + factor · weights · unit rows of z, operands in DTYPE; with UNIT those rows are made first."""
    for start in range(0, count, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        inside = at < count
        weight = tl.load(weights + at[None, :] * step, mask=mask[:, None] & (at < limit)[None, :], other=0.0)
        weight = weight * factor
        inverse = tl.load(inverse_ptr + at, mask=inside, other=0.0)
        both = inside[:, None] & (d < dim)[None, :]
        z = tl.load(row_starts(z_ptr, at, stride) + d[None, :], mask=both, other=0.0)  # (N, D)
        if UNIT:
            z = z * inverse[:, None]
        else:
            weight = weight * inverse[None, :]
        product = multiply_add(weight.to(DTYPE), z.to(DTYPE), product, PRECISION, UPCAST)
    return product


@triton.jit
def _store_through_norm(product, z_ptr, z_stride, out_ptr, rows, d, count, dim, inverse, along, factor):
    """dz = (du − u (u·du)) / ‖z‖ for du = product and u·du = along, written in the dtype of z."""
    mask = (rows < count)[:, None] & (d < dim)[None, :]
    z = tl.load(row_starts(z_ptr, rows, z_stride) + d[None, :], mask=mask, other=0.0).to(tl.float32)
    unit = z * inverse[:, None]
    gradient = (product - unit * along[:, None]) * (inverse * factor)[:, None]
    out = row_starts(out_ptr, rows, dim) + d[None, :]
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def gradient_kernel(
    x_ptr,  # (B, D) anchors
    y_ptr,  # (B, D) positives
    negatives_ptr,  # (N, D) explicit negatives
    centroids_ptr,  # (K, D) float32
    x_gradient_ptr,  # out (B, D), contiguous
    y_gradient_ptr,  # out (B, D)
    negatives_gradient_ptr,  # out (N, D)
    weights_ptr,  # (B, padded(B) + N)
    centroid_weights_ptr,  # (B, K)
    x_inverse_ptr,  # (B,)
    y_inverse_ptr,  # as a row of weights
    centroid_inverse_ptr,  # (K,)
    x_along_ptr,  # (B,) Σ_j w_ij S_ij
    y_along_ptr,  # (row tiles of the objective, padded(B) + N) parts of Σ_i w_ij S_ij
    upstream_ptr,  # 0-dim: the gradient of the loss
    temperature,
    bml_weight,
    num_rows,
    num_negatives,
    num_centroids,
    num_tiles,  # of the objective
    dim,
    x_stride,
    y_stride,
    negatives_stride,
    centroids_stride,
    cosine_blocks,
    centroid_blocks,
    HAS_X_GRADIENT: tl.constexpr,
    NEED_Y: tl.constexpr,
    HAS_NEGATIVES_GRADIENT: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr,
    HAS_CENTROIDS: tl.constexpr,
    FLOAT16: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: ((anchor tiles + positive tiles + negative tiles) · dimension tiles,), each set if needed."""
    dimension_tiles = tl.cdiv(dim, BLOCK_D)
    tile = tl.program_id(0) // dimension_tiles
    d = tl.program_id(0) % dimension_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    tau = read_scalar(temperature, TEMPERATURE_POINTER)
    factor = tl.load(upstream_ptr).to(tl.float32) / (num_rows * tau)
    first = padded(num_rows)  # where the explicit negatives start in a row
    row_length = cosine_blocks.to(tl.int64) * 16
    # float16 has a narrow range: bring the weights, at most 1 + λτ, near its top, whatever the norms.
    headroom, largest = 1.0, 1.0
    if FLOAT16:
        headroom = _LARGEST_HALF / (1.0 + read_scalar(bml_weight, False) * tau)
    product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    x_tiles = 0
    if HAS_X_GRADIENT:
        x_tiles = row_tiles
        if tile < x_tiles:
            rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = rows < num_rows
            starts = row_starts(weights_ptr, rows, row_length)
            if FLOAT16:
                largest = _largest(y_inverse_ptr, num_rows)
                if HAS_NEGATIVES:
                    largest = tl.maximum(largest, _largest(y_inverse_ptr + first, num_negatives))
            product = _add_product(
                product, starts, mask, 1, first, headroom / largest, y_ptr, y_inverse_ptr, y_stride, num_rows,
                d, dim, False, x_ptr.dtype.element_ty, PRECISION, UPCAST, BLOCK_N,
            )  # fmt: skip
            if HAS_NEGATIVES:
                product = _add_product(
                    product, starts + first, mask, 1, padded(num_negatives), headroom / largest,
                    negatives_ptr, y_inverse_ptr + first, negatives_stride, num_negatives, d, dim, False,
                    x_ptr.dtype.element_ty, PRECISION, UPCAST, BLOCK_N,
                )  # fmt: skip
            product = product * largest
            if HAS_CENTROIDS:
                starts = row_starts(centroid_weights_ptr, rows, centroid_blocks.to(tl.int64) * 16)
                product = _add_product(
                    product, starts, mask, 1, padded(num_centroids), headroom, centroids_ptr,
                    centroid_inverse_ptr, centroids_stride, num_centroids, d, dim, True,
                    x_ptr.dtype.element_ty, PRECISION, UPCAST, BLOCK_N,
                )  # fmt: skip
            inverse = tl.load(x_inverse_ptr + rows, mask=mask, other=0.0)
            along = tl.load(x_along_ptr + rows, mask=mask, other=0.0)
            product = product / headroom
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
            mask = own < padded(count)
            along = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, num_tiles, BLOCK_N):
                at = start + tl.arange(0, BLOCK_N)
                parts = y_along_ptr + at.to(tl.int64)[None, :] * row_length + columns[:, None]
                both = (own < count)[:, None] & (at < num_tiles)[None, :]
                along += tl.sum(tl.load(parts, mask=both, other=0.0), axis=1)
            if FLOAT16:
                largest = _largest(x_inverse_ptr, num_rows)
            product = _add_product(
                product, weights_ptr + columns[:, None], mask, row_length, num_rows, headroom / largest,
                x_ptr, x_inverse_ptr, x_stride, num_rows, d, dim, False, x_ptr.dtype.element_ty, PRECISION,
                UPCAST, BLOCK_N,
            )  # fmt: skip
            inverse = tl.load(y_inverse_ptr + columns, mask=mask, other=0.0)
            product = product * (largest / headroom)
            _store_through_norm(product, source, stride, out, own, d, count, dim, inverse, along, factor)
