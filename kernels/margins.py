"""Gradient of the margin loss from its slopes: grouped products, one group for each cluster.

Rows and columns are sorted by cluster, so the mates of a tile of rows, or of columns, stand side by side and
a program goes over those alone. Rows with more than `most_mates` are left out, with slopes in the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import multiply_add, read_scalar, row_starts

BATCH_SIZES = ["num_rows", "num_positives", "first_row", "most_mates"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def margins_kernel(
    slopes_ptr,  # (R, most_mates) int8, see `weights_kernel`
    x_ptr,  # (R, D) rows of the chunk
    y_ptr,  # (n, D) positives
    x_inverse_ptr,  # (R,)
    y_inverse_ptr,  # (n,)
    low_ptr,  # (R,) int64: the mates of row i are the columns low ≤ j < high
    high_ptr,  # (R,) int64
    column_low_ptr,  # (n,) int64: the mates of column j are the rows low ≤ i < high of the process
    column_high_ptr,  # (n,) int64
    own_ptr,  # (R,) int64: the column of row i's own positive, no mate
    row_scale_ptr,  # (R,): x_gradient is multiplied by it later
    x_gradient_ptr,  # in and out (R, D) float32
    y_gradient_ptr,  # in and out (n, D) float32, over ‖y‖
    slope_scale,  # λ/B²
    num_rows,
    num_positives,
    first_row,  # of the chunk
    most_mates,
    dim,
    y_stride,
    HAS_OWN: tl.constexpr,
    HAS_X_GRADIENT: tl.constexpr,
    HAS_Y_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (row tiles if they have a gradient + column tiles if they have, blocks of D)."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = (d < dim)[None, :]
    slope_scale = read_scalar(slope_scale, False)
    tile, row_tiles = tl.program_id(0), 0
    if HAS_X_GRADIENT:
        row_tiles = tl.cdiv(num_rows, BLOCK_M)
    if tile < row_tiles:
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < num_rows
        low = tl.load(low_ptr + rows, mask=row_mask, other=0).to(tl.int32)
        high = tl.load(high_ptr + rows, mask=row_mask, other=0).to(tl.int32)
        high = tl.where(high - low <= most_mates, high, low)
        first = tl.min(tl.where(high > low, low, num_positives), axis=0) // BLOCK_N * BLOCK_N
        low, high = low[:, None], high[:, None]
        own = low - 1
        if HAS_OWN:
            own = tl.load(own_ptr + rows, mask=row_mask, other=-1).to(tl.int32)[:, None]
        slope_rows = row_starts(slopes_ptr, rows, most_mates) - low
        for start in range(first, tl.max(high), BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            at, column_mask = columns[None, :], columns < num_positives
            mask = (at >= low) & (at < high) & (at != own)
            slope = tl.load(slope_rows + at, mask=mask, other=0).to(tl.float32)
            y_inverse = tl.load(y_inverse_ptr + columns, mask=column_mask, other=0.0)
            y_rows = row_starts(y_ptr, columns, y_stride)
            y = tl.load(y_rows + d[None, :], mask=column_mask[:, None] & d_mask, other=0.0)
            pull = (slope * y_inverse[None, :]).to(y.dtype)
            accumulator = multiply_add(pull, y, accumulator, PRECISION, UPCAST)
        row_scale = tl.load(row_scale_ptr + rows, mask=row_mask, other=1.0)
        at = row_starts(x_gradient_ptr, rows, dim) + d[None, :]
        mask = row_mask[:, None] & d_mask
        before = tl.load(at, mask=mask, other=0.0)
        tl.store(at, before + accumulator * (slope_scale / row_scale)[:, None], mask=mask)
    elif HAS_Y_GRADIENT:
        # The columns of this chunk's clusters stand side by side.
        first_tile = tl.load(low_ptr).to(tl.int32) // BLOCK_M + tile - row_tiles
        end_tile = tl.cdiv(tl.load(high_ptr + num_rows - 1).to(tl.int32), BLOCK_M)
        for column_tile in tl.range(first_tile, end_tile, tl.num_programs(0) - row_tiles):
            accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            mine = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mine_mask = mine < num_positives
            start_mate = tl.load(column_low_ptr + mine, mask=mine_mask, other=first_row) - first_row
            end_mate = tl.load(column_high_ptr + mine, mask=mine_mask, other=first_row) - first_row
            start_mate = tl.maximum(start_mate, 0).to(tl.int32)
            end_mate = tl.minimum(end_mate, num_rows).to(tl.int32)
            some = end_mate > start_mate
            mates = tl.load(high_ptr + start_mate, mask=some, other=0)
            mates -= tl.load(low_ptr + start_mate, mask=some, other=0)
            some = some & (mates <= most_mates)
            start_mate, end_mate = tl.where(some, start_mate, num_rows), tl.where(some, end_mate, 0)
            from_row, to_row = tl.min(start_mate, axis=0) // BLOCK_N * BLOCK_N, tl.max(end_mate, axis=0)
            start_mate, end_mate = start_mate[None, :], end_mate[None, :]
            for start in range(from_row, to_row, BLOCK_N):
                others = start + tl.arange(0, BLOCK_N)
                others_mask = others < num_rows
                cells = (others[:, None] >= start_mate) & (others[:, None] < end_mate)  # (N, M)
                if HAS_OWN:
                    positives = tl.load(own_ptr + others, mask=others_mask, other=-1).to(tl.int32)
                    cells = cells & (mine[None, :] != positives[:, None])
                firsts = tl.load(low_ptr + others, mask=others_mask, other=0)[:, None]
                slopes = row_starts(slopes_ptr, others, most_mates) - firsts + mine[None, :]
                slopes = tl.load(slopes, mask=cells, other=0).to(tl.float32)
                x_inverse = tl.load(x_inverse_ptr + others, mask=others_mask, other=0.0)
                x_rows = row_starts(x_ptr, others, dim)
                x = tl.load(x_rows + d[None, :], mask=others_mask[:, None] & d_mask, other=0.0)
                pulls = tl.trans((slopes * x_inverse[:, None]).to(x.dtype))
                accumulator = multiply_add(pulls, x, accumulator, PRECISION, UPCAST)
            if to_row > from_row:
                scale = tl.load(y_inverse_ptr + mine, mask=mine_mask, other=0.0) * slope_scale
                out_rows = row_starts(y_gradient_ptr, mine, dim) + d[None, :]
                inside = mine_mask[:, None] & d_mask
                so_far = tl.load(out_rows, mask=inside, other=0.0)
                tl.store(out_rows, so_far + accumulator * scale[:, None], mask=inside)
