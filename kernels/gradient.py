"""Gradients of the objective: both products and the way back through the normalisation, in one launch.

One program makes one (M, D) tile of ∂loss/∂z for anchors, positives or explicit negatives. The weights
∂loss/∂S are made from the cosines tile by tile, in registers, and never stored:

    ∂loss/∂S_ij = 1/(Bτ) · w_ij     w_ij = softmax_ij + λτ/B · slope_ij,  w_ii = −Σ_{j≠i} w_ij
    da = w p,  dp = wᵀ a,  dz = (da − a (a·da)) / ‖z‖

The norms of the summed rows are folded into the weights, so the raw embeddings are the other factor, and
a·da = Σ_j w_ij S_ij needs no second pass over the embeddings.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .objective import hard_logits, margin_slope
from .tiles import (
    BML,
    EXCLUDE,
    KEEP,
    LOG2_E,
    counters,
    load_row,
    multiply_add,
    padded,
    read_scalar,
    store_through_norm,
)

BATCH_SIZES = ["num_rows", "num_negatives", "num_centroids", "cosine_blocks", "centroid_blocks"]

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
def _weights(
    cosine,  # S_ij, any (·, ·) layout
    row,  # i, broadcastable, and with it what the forward left of row i:
    log_total,
    own_weight,
    positive,
    row_cluster,
    column,  # j, likewise
    column_cluster,
    num_rows,
    scale,
    slope_unit,
    alpha,
    beta,
    FALSE_NEGATIVES: tl.constexpr,
):
    """w_ij = Bτ · ∂loss/∂S_ij."""
    weight = tl.exp2(cosine * scale - log_total)
    if FALSE_NEGATIVES != KEEP:
        mates = (row_cluster == column_cluster) & (column < num_rows)
        if FALSE_NEGATIVES == EXCLUDE:
            weight = tl.where(mates, 0.0, weight)
        if FALSE_NEGATIVES == BML:
            slope = margin_slope(cosine - positive, alpha, beta) * slope_unit
            weight += tl.where(mates, slope, 0.0)
    return tl.where(row == column, own_weight, weight)


@triton.jit(do_not_specialize=BATCH_SIZES)
def gradient_kernel(
    x_ptr,  # (B, D) anchors
    y_ptr,  # (B, D) positives
    negatives_ptr,  # (N, D) explicit negatives
    centroids_ptr,  # (K, D) float32
    x_gradient_ptr,  # out (B, D), contiguous
    y_gradient_ptr,  # out (B, D)
    negatives_gradient_ptr,  # out (N, D)
    cosines_ptr,  # (B, padded(B) + N)
    centroid_cosines_ptr,  # (B, K)
    x_inverse_ptr,  # (B,)
    y_inverse_ptr,  # as a row of cosines
    centroid_inverse_ptr,  # (K,)
    row_state_ptr,  # (4, B)
    cluster_ids_ptr,  # (B,) int
    hard_ids_ptr,  # (B,) int
    counters_ptr,  # int32, see `counters`
    upstream_ptr,  # 0-dim: the gradient of the loss
    temperature,
    hard_negative_weight,
    bml_weight,
    alpha,
    beta,
    num_rows,
    num_negatives,
    num_centroids,
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
    HAS_HARD_IDS: tl.constexpr,
    FLOAT16: tl.constexpr,
    FALSE_NEGATIVES: tl.constexpr,
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
    d_mask = (d < dim)[None, :]
    tau = read_scalar(temperature, TEMPERATURE_POINTER)
    scale = LOG2_E / tau
    alpha, beta = read_scalar(alpha, False), read_scalar(beta, False)
    bml_weight = read_scalar(bml_weight, False)
    hard_negative_weight = read_scalar(hard_negative_weight, False)
    slope_unit = bml_weight * tau / num_rows
    factor = tl.load(upstream_ptr).to(tl.float32) / (num_rows * tau)
    _, uses_ptr, _, _ = counters(counters_ptr, num_centroids)
    row_length = cosine_blocks.to(tl.int64) * 16
    # float16 has a narrow range: bring the weights, at most 1 + λτ, near its top, whatever the norms.
    headroom = 1.0
    if FLOAT16:
        headroom = _LARGEST_HALF / (1.0 + bml_weight * tau)

    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    x_tiles = 0
    if HAS_X_GRADIENT:
        x_tiles = row_tiles
        if tile < x_tiles:
            largest = 1.0
            if FLOAT16:
                largest = _largest(y_inverse_ptr, num_rows)
                if HAS_NEGATIVES:
                    largest = tl.maximum(largest, _largest(y_inverse_ptr + padded(num_rows), num_negatives))
            rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            safe_rows = tl.minimum(rows, num_rows - 1)
            state = row_state_ptr + safe_rows
            log_total = tl.load(state)[:, None]
            own_weight = tl.load(state + num_rows)[:, None]
            positive = tl.load(state + 2 * num_rows)[:, None]
            row_cluster = safe_rows[:, None]
            if FALSE_NEGATIVES != KEEP:
                row_cluster = tl.load(cluster_ids_ptr + safe_rows)[:, None]
            starts = cosines_ptr + safe_rows.to(tl.int64)[:, None] * row_length
            product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for start in range(0, num_rows, BLOCK_N):
                columns = start + tl.arange(0, BLOCK_N)
                mask = columns < num_rows
                cosine = load_row(starts, columns[None, :], num_rows)  # (M, N)
                cluster = columns
                if FALSE_NEGATIVES != KEEP:
                    cluster = tl.load(cluster_ids_ptr + columns, mask=mask, other=0)
                weight = _weights(
                    cosine,
                    rows[:, None],
                    log_total,
                    own_weight,
                    positive,
                    row_cluster,
                    columns[None, :],
                    cluster[None, :],
                    num_rows,
                    scale,
                    slope_unit,
                    alpha,
                    beta,
                    FALSE_NEGATIVES,
                )
                inverse = tl.load(y_inverse_ptr + columns, mask=mask, other=0.0) * (headroom / largest)
                weight = tl.where(mask[None, :], weight * inverse[None, :], 0.0)
                at = columns.to(tl.int64)[:, None] * y_stride + d[None, :]
                y = tl.load(y_ptr + at, mask=mask[:, None] & d_mask, other=0.0)  # (N, D)
                product = multiply_add(weight.to(y.dtype), y, product, PRECISION, UPCAST)
            if HAS_NEGATIVES:
                for start in range(0, num_negatives, BLOCK_N):
                    columns = start + tl.arange(0, BLOCK_N)
                    mask = columns < num_negatives
                    first = padded(num_rows)
                    cosine = load_row(starts + first, columns[None, :], num_negatives)
                    inverse = tl.load(y_inverse_ptr + first + columns, mask=mask, other=0.0)
                    weight = tl.exp2(cosine * scale - log_total) * (inverse * (headroom / largest))[None, :]
                    weight = tl.where(mask[None, :], weight, 0.0)
                    at = columns.to(tl.int64)[:, None] * negatives_stride + d[None, :]
                    y = tl.load(negatives_ptr + at, mask=mask[:, None] & d_mask, other=0.0)
                    product = multiply_add(weight.to(y.dtype), y, product, PRECISION, UPCAST)
            product = product * largest
            if HAS_HARD_IDS:
                own_hard = tl.load(hard_ids_ptr + safe_rows).to(tl.int32)[:, None]
                starts = centroid_cosines_ptr + safe_rows.to(tl.int64)[:, None] * (
                    centroid_blocks.to(tl.int64) * 16
                )
                for start in range(0, num_centroids, BLOCK_N):
                    ids = start + tl.arange(0, BLOCK_N)
                    mask = ids < num_centroids
                    cosine, logit = hard_logits(
                        starts, ids[None, :], num_centroids, uses_ptr, own_hard, hard_negative_weight, scale
                    )  # (M, N)
                    weight = tl.exp2(logit - log_total) * headroom
                    inverse = tl.load(centroid_inverse_ptr + ids, mask=mask, other=0.0)
                    at = ids.to(tl.int64)[:, None] * centroids_stride + d[None, :]
                    c = tl.load(centroids_ptr + at, mask=mask[:, None] & d_mask, other=0.0)  # (N, D)
                    c = (c * inverse[:, None]).to(x_ptr.dtype.element_ty)
                    product = multiply_add(weight.to(c.dtype), c, product, PRECISION, UPCAST)
            inverse = tl.load(x_inverse_ptr + safe_rows)
            along = tl.load(state + 3 * num_rows)
            product = product / headroom
            store_through_norm(
                product, x_ptr, x_stride, x_gradient_ptr, rows, d, num_rows, dim, inverse, along, factor
            )

    if NEED_Y or HAS_NEGATIVES_GRADIENT:
        if tile >= x_tiles:
            tile -= x_tiles
            # Positives, then explicit negatives: `first` is where this set starts in the cosines' columns.
            source, stride, out, count, first = y_ptr, y_stride, y_gradient_ptr, num_rows, 0
            if HAS_NEGATIVES_GRADIENT:
                y_tiles = 0
                if NEED_Y:
                    y_tiles = row_tiles
                if tile >= y_tiles:
                    tile -= y_tiles
                    source, stride, out = negatives_ptr, negatives_stride, negatives_gradient_ptr
                    count, first = num_negatives, padded(num_rows)
            largest = 1.0
            if FLOAT16:
                largest = _largest(x_inverse_ptr, num_rows)
            own = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # this set's own rows
            own_mask = own < count
            columns = first + own  # where they stand in the cosines
            cluster = columns
            if FALSE_NEGATIVES != KEEP:
                cluster = tl.load(cluster_ids_ptr + columns, mask=columns < num_rows, other=0)
            product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            along = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, num_rows, BLOCK_N):
                rows = start + tl.arange(0, BLOCK_N)
                mask = rows < num_rows
                state = row_state_ptr + rows
                at = rows.to(tl.int64)[None, :] * row_length + columns[:, None]
                both = (own < padded(count))[:, None] & mask[None, :]  # as `load_row`
                cosine = tl.load(cosines_ptr + at, mask=both, other=0.0)  # (M, N), transposed
                row_cluster = rows
                if FALSE_NEGATIVES != KEEP:
                    row_cluster = tl.load(cluster_ids_ptr + rows, mask=mask, other=0)
                weight = _weights(
                    cosine,
                    rows[None, :],
                    tl.load(state, mask=mask, other=0.0)[None, :],
                    tl.load(state + num_rows, mask=mask, other=0.0)[None, :],
                    tl.load(state + 2 * num_rows, mask=mask, other=0.0)[None, :],
                    row_cluster[None, :],
                    columns[:, None],
                    cluster[:, None],
                    num_rows,
                    scale,
                    slope_unit,
                    alpha,
                    beta,
                    FALSE_NEGATIVES,
                )
                weight = tl.where(mask[None, :], weight, 0.0)
                along += tl.sum(weight * cosine, axis=1)
                inverse = tl.load(x_inverse_ptr + rows, mask=mask, other=0.0) * (headroom / largest)
                weight = weight * inverse[None, :]
                at = rows.to(tl.int64)[:, None] * x_stride + d[None, :]
                x = tl.load(x_ptr + at, mask=mask[:, None] & d_mask, other=0.0)  # (N, D)
                product = multiply_add(weight.to(x.dtype), x, product, PRECISION, UPCAST)
            inverse = tl.load(y_inverse_ptr + columns, mask=own_mask, other=0.0)
            product = product * (largest / headroom)
            store_through_norm(product, source, stride, out, own, d, count, dim, inverse, along, factor)
