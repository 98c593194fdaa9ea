"""Nearest and runner-up centroid of any number of points, in one launch.

One program owns a tile of points and goes through all centroids; the two best of each point stay in
registers, so nothing is merged afterwards and no cosine is written. 2·TERMS·B·K·D operations, TERMS of them 2
in half precision and 1 in float32. Bytes: each point once from memory, then once for each tile of centroids
from the cache, and the centroids once for each tile of points.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    better_two,
    inverse_norm,
    multiply_add,
    row_starts,
    two_best,
    wait_for_the_launch_before,
)

BATCH_SIZES = ["num_rows", "num_centroids"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def assignment_kernel(
    x_ptr,  # (B, D) points
    high_ptr,  # (K, D) unit centroids, in the dtype of the points
    low_ptr,  # (K, D) what those lack for half-precision points, with HAS_LOW
    nearest_ptr,  # out (B,) int64
    runner_up_ptr,  # out (B,) int64, −1 if K = 1
    nearest_cosine_ptr,  # out (B,)
    runner_up_cosine_ptr,  # out (B,)
    x_inverse_ptr,  # out (B,) 1/‖x_i‖
    num_rows,
    num_centroids,
    dim,
    x_stride,
    HAS_LOW: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (row tiles,)."""
    wait_for_the_launch_before(DEPENDENT)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < num_rows
    # Reads stay inside, what they give is not written.
    x_rows = row_starts(x_ptr, tl.minimum(rows, num_rows - 1), x_stride)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, dim, BLOCK_D):  # before the products, which read from shared memory alone
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(d < dim)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    x_inverse = inverse_norm(square)

    lowest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    score_1, id_1, score_2, id_2 = lowest, rows * 0, lowest, rows * 0
    for first in range(0, num_centroids, BLOCK_N):
        ids = first + tl.arange(0, BLOCK_N)
        within = tl.minimum(ids, num_centroids - 1)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (d < dim)[None, :]
            x = tl.load(x_rows + d[None, :], mask=inside, other=0.0)  # (M, D)
            high = tl.load(row_starts(high_ptr, within, dim) + d[None, :], mask=inside, other=0.0)  # (N, D)
            if HAS_LOW:
                low = tl.load(row_starts(low_ptr, within, dim) + d[None, :], mask=inside, other=0.0)
                products = multiply_add(x, tl.trans(low), products, PRECISION, UPCAST)
            products = multiply_add(x, tl.trans(high), products, PRECISION, UPCAST)
        # The length of the point changes nothing in their order.
        found = two_best(products, ids, num_centroids)
        score_1, id_1, score_2, id_2 = better_two(
            score_1, id_1, score_2, id_2, found[0], found[1], found[2], found[3]
        )

    directed = x_inverse > 0  # False for NaN; without a direction all cosines are equal
    id_1 = tl.where(directed, id_1, 0)
    id_2 = tl.where(num_centroids > 1, tl.where(directed, id_2, 1), -1)
    tl.store(x_inverse_ptr + rows, x_inverse, mask=mask)
    tl.store(nearest_ptr + rows, id_1.to(tl.int64), mask=mask)
    tl.store(runner_up_ptr + rows, id_2.to(tl.int64), mask=mask)
    tl.store(nearest_cosine_ptr + rows, score_1 * x_inverse, mask=mask)
    tl.store(runner_up_cosine_ptr + rows, score_2 * x_inverse, mask=mask)
