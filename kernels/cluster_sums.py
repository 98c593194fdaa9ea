"""Sums of the points of each cluster, for points sorted by cluster: each is read once.

The sorted points are cut into chunks of one length, and a program sums what each cluster has in its chunk; a
second launch adds up the parts. All in a fixed order, and as fast where one cluster has all the points. Parts
are (chunks + K, D): cluster k's of chunk c is row c + k, where no two meet, for along the sorted points one
of both grows from part to part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import row_starts, wait_for_the_launch_before

BATCH_SIZES = ["num_centroids"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def member_sums_kernel(
    x_ptr,  # (B, D) points
    order_ptr,  # (B,) int64: the points, those of a cluster side by side
    ids_ptr,  # (B,) int32: their clusters, ascending
    borders_ptr,  # (K + 1,) int64: where each cluster begins in `order`, and where the last one ends
    parts_ptr,  # out (chunks + K, D) float32
    num_centroids,
    dim,
    x_stride,
    DEPENDENT: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (chunks, dimension tiles)."""
    wait_for_the_launch_before(DEPENDENT)
    chunk = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = chunk.to(tl.int64) * BLOCK_CHUNK
    end = tl.minimum(start + BLOCK_CHUNK, tl.load(borders_ptr + num_centroids))
    while start < end:
        cluster = tl.load(ids_ptr + start)
        stop = tl.minimum(end, tl.load(borders_ptr + cluster + 1))
        total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        for first in range(start, stop, BLOCK_B):
            places = first + tl.arange(0, BLOCK_B)
            rows = tl.load(order_ptr + places, mask=places < stop, other=0)
            mask = (places < stop)[:, None] & (d < dim)[None, :]
            total += tl.load(row_starts(x_ptr, rows, x_stride) + d[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
        part = (chunk + cluster).to(tl.int64)
        tl.store(parts_ptr + part * dim + d, tl.sum(total, axis=0), mask=d < dim)
        start = stop


@triton.jit
def part_sums_kernel(
    parts_ptr,  # (chunks + K, D) float32
    borders_ptr,  # (K + 1,) int64
    sums_ptr,  # out (K, D) float32
    dim,
    DEPENDENT: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (K, dimension tiles)."""
    wait_for_the_launch_before(DEPENDENT)
    cluster = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(borders_ptr + cluster), tl.load(borders_ptr + cluster + 1)
    low = cluster + start // BLOCK_CHUNK
    high = cluster + tl.where(start < end, (end - 1) // BLOCK_CHUNK + 1, start // BLOCK_CHUNK)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first in range(low, high, BLOCK_B):
        parts = first + tl.arange(0, BLOCK_B)
        mask = (parts < high)[:, None] & (d < dim)[None, :]
        total += tl.load(row_starts(parts_ptr, parts, dim) + d[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + cluster * dim + d, tl.sum(total, axis=0), mask=d < dim)
