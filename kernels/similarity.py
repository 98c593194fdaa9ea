"""Cosine tiles: the similarity matrix, and nearest and runner-up centroid, in one launch.

One program makes one (M, N) tile of cos(x_i, ·). Its columns come from up to three sources, side by side in
the grid, so that a small batch still fills the chip:

    centroids   two best of the tile; with HAS_NEAREST the last tile of a row block merges them
    y           in-batch positives           → cosines (B, padded(C) + N)
    negatives   explicit hard negatives      → the same rows, from column padded(C)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    better_two,
    counters,
    is_last_to_arrive,
    padded,
    product_tile,
    read_scalar,
    row_starts,
    two_best,
    wait_for_the_launch_before,
)

# Sizes that change with the batch: no specialisation, or a new batch size would compile again.
BATCH_SIZES = [
    "num_rows",
    "num_columns",
    "num_negatives",
    "num_centroids",
    "num_counters",
]


@triton.jit
def _merge_two_best(partial_cosine_ptr, partial_id_ptr, rows, num_rows, num_tiles):
    """Two best over all centroid tiles, in the order of the tiles: ties stay with the lowest id."""
    mask = rows < num_rows
    step = num_rows.to(tl.int64)
    lowest = tl.full(rows.shape, float("-inf"), tl.float32)
    first_cosine, first, second_cosine, second = lowest, rows * 0, lowest, rows * 0
    for tile in tl.range(0, num_tiles, loop_unroll_factor=4):  # four reads on their way at once
        at = rows + step * tile
        cosine_1 = tl.load(partial_cosine_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        id_1 = tl.load(partial_id_ptr + at, mask=mask, other=0, cache_modifier=".cg")
        at += step * num_tiles
        cosine_2 = tl.load(partial_cosine_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        id_2 = tl.load(partial_id_ptr + at, mask=mask, other=0, cache_modifier=".cg")
        first_cosine, first, second_cosine, second = better_two(
            first_cosine, first, second_cosine, second, cosine_1, id_1, cosine_2, id_2
        )
    return first_cosine, first, second_cosine, second


@triton.jit(do_not_specialize=BATCH_SIZES)
def cosine_kernel(
    x_ptr,  # (B, D) points
    y_ptr,  # (C, D) columns
    negatives_ptr,  # (N, D) more columns
    centroids_ptr,  # (K, D) float32
    cosines_ptr,  # out (B, padded(C) + N) float32, over τ; rows of a multiple of 16 numbers
    centroid_cosines_ptr,  # out (B, K) float32, likewise
    x_inverse_ptr,  # (B,) 1/‖x_i‖: out beside y, else in
    y_inverse_ptr,  # out, as a row of cosines
    centroid_inverse_ptr,  # out (K,)
    partial_cosine_ptr,  # scratch (2, centroid tiles, B): best and second best of each tile
    partial_id_ptr,  # scratch (2, centroid tiles, B) int32
    nearest_ptr,  # out (B,) int64
    runner_up_ptr,  # out (B,) int64, −1 if K = 1
    nearest_cosine_ptr,  # out (B,)
    runner_up_cosine_ptr,  # out (B,)
    counters_ptr,  # int32, see `counters`: counted here with HAS_NEAREST, set to zero with CLEAR
    temperature,  # τ, a number or a pointer
    num_rows,
    num_columns,
    num_negatives,
    num_centroids,
    num_counters,
    dim,
    x_stride,
    y_stride,
    negatives_stride,
    centroids_stride,
    cosines_stride,
    centroid_cosines_stride,
    HAS_Y: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr,
    HAS_CENTROIDS: tl.constexpr,
    HAS_CENTROID_COSINES: tl.constexpr,
    HAS_NEAREST: tl.constexpr,
    COUNT_USES: tl.constexpr,
    CLEAR: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    WAIT_FOR_STORES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K_M: tl.constexpr,
    BLOCK_K_D: tl.constexpr,
):
    """Grid: (centroid tiles · their row tiles + column tiles · row tiles,), the longest first."""
    wait_for_the_launch_before(DEPENDENT)
    program = tl.program_id(0)
    if CLEAR:
        if program == tl.num_programs(0) - 1:
            for start in range(0, num_counters, 1024):
                at = start + tl.arange(0, 1024)
                tl.store(counters_ptr + at, tl.zeros((1024,), tl.int32), mask=at < num_counters)

    assigning = 0
    if HAS_CENTROIDS:
        centroid_tiles = tl.cdiv(num_centroids, BLOCK_K)
        assigning = centroid_tiles * tl.cdiv(num_rows, BLOCK_K_M)
        if program < assigning:
            row_tile, tile = program // centroid_tiles, program % centroid_tiles
            rows = row_tile * BLOCK_K_M + tl.arange(0, BLOCK_K_M)
            row_mask = rows < num_rows
            ids = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            # Reads stay inside, what they give is not written.
            x_rows = row_starts(x_ptr, tl.minimum(rows, num_rows - 1), x_stride)
            c_rows = row_starts(centroids_ptr, tl.minimum(ids, num_centroids - 1), centroids_stride)
            # Centroids stay float32.
            cosines, _, centroid_inverse = product_tile(
                x_rows, c_rows, dim, False, True, PRECISION, UPCAST, BLOCK_K_D
            )
            cosines = cosines * centroid_inverse[None, :]
            if not HAS_Y:  # beside y the best of a row is all that is asked for
                cosines = cosines * tl.load(x_inverse_ptr + rows, mask=row_mask, other=0.0)[:, None]
            cosine_1, id_1, cosine_2, id_2 = two_best(cosines, ids, num_centroids)
            at = tile.to(tl.int64) * num_rows + rows
            tl.store(partial_cosine_ptr + at, cosine_1, mask=row_mask)
            tl.store(partial_id_ptr + at, id_1, mask=row_mask)
            if HAS_NEAREST:
                at += centroid_tiles.to(tl.int64) * num_rows
                tl.store(partial_cosine_ptr + at, cosine_2, mask=row_mask)
                tl.store(partial_id_ptr + at, id_2, mask=row_mask)
            if row_tile == 0:
                tl.store(centroid_inverse_ptr + ids, centroid_inverse, mask=ids < num_centroids)
            if HAS_CENTROID_COSINES:
                starts = row_starts(centroid_cosines_ptr, rows, centroid_cosines_stride)
                both = row_mask[:, None] & (ids < padded(num_centroids))[None, :]  # as `load_row`
                tl.store(starts + ids[None, :], cosines, mask=both)
            if HAS_NEAREST:
                sizes_ptr, uses_ptr, _, arrivals_ptr = counters(counters_ptr, num_centroids)
                if is_last_to_arrive(arrivals_ptr + row_tile, centroid_tiles, WAIT_FOR_STORES):
                    cosine_1, id_1, cosine_2, id_2 = _merge_two_best(
                        partial_cosine_ptr, partial_id_ptr, rows, num_rows, centroid_tiles
                    )
                    # Integer additions: the order in which programs arrive does not show.
                    tl.atomic_add(sizes_ptr + id_1, 1, mask=row_mask, sem="relaxed")
                    if COUNT_USES:
                        tl.atomic_add(uses_ptr + id_2, 1, mask=row_mask & (num_centroids > 1), sem="relaxed")
                    id_2 = tl.where(num_centroids > 1, id_2, -1)
                    tl.store(nearest_ptr + rows, id_1.to(tl.int64), mask=row_mask)
                    tl.store(nearest_cosine_ptr + rows, cosine_1, mask=row_mask)
                    tl.store(runner_up_ptr + rows, id_2.to(tl.int64), mask=row_mask)
                    tl.store(runner_up_cosine_ptr + rows, cosine_2, mask=row_mask)

    if HAS_Y:
        if program >= assigning:
            program -= assigning
            row_tiles = tl.cdiv(num_rows, BLOCK_M)
            row_tile, tile = program % row_tiles, program // row_tiles
            rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row_mask = rows < num_rows
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            source, stride, count, first = y_ptr, y_stride, num_columns, 0
            if HAS_NEGATIVES:
                column_tiles = tl.cdiv(num_columns, BLOCK_N)
                if tile >= column_tiles:
                    source, stride, count = negatives_ptr, negatives_stride, num_negatives
                    first = padded(num_columns)
                    columns -= column_tiles * BLOCK_N
            x_rows = row_starts(x_ptr, tl.minimum(rows, num_rows - 1), x_stride)
            y_rows = row_starts(source, tl.minimum(columns, count - 1), stride)
            cosines, x_inverse, y_inverse = product_tile(
                x_rows, y_rows, dim, True, True, PRECISION, UPCAST, BLOCK_D
            )
            cosines = cosines * x_inverse[:, None] * y_inverse[None, :]
            if tile == 0:
                tl.store(x_inverse_ptr + rows, x_inverse, mask=row_mask)
            column_mask = columns < padded(count)  # as `load_row`
            if row_tile == 0:
                tl.store(y_inverse_ptr + first + columns, y_inverse, mask=column_mask)
            cosines = cosines * (1.0 / read_scalar(temperature, TEMPERATURE_POINTER))
            starts = row_starts(cosines_ptr, rows, cosines_stride)
            both = row_mask[:, None] & column_mask[None, :]
            tl.store(starts + (first + columns)[None, :], cosines, mask=both)
