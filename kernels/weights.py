"""First product of a large batch: softmax weights of a chunk of rows, never the cosines themselves.

One program makes one (M, N) tile of E_ij = exp(cos(x_i, y_j)/τ − reference_i), writes E_ij/‖y_j‖ in the dtype
of `weights` for the two products that follow, and the tile's row sums in float32. The norm rides on the
weight, so the products take the raw rows: no normalised copy, and half precision loses nothing.

    MAXIMA    row maxima of the logits alone, where τ is too small for a reference known beforehand
    TOTALS    row sums alone
    WEIGHTS   both sums and weights

Logits are kept in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .objective import log2_uses
from .tiles import LOG2_E, LOWEST, padded, product_tile, read_scalar, row_starts

MAXIMA = tl.constexpr(0)
TOTALS = tl.constexpr(1)
WEIGHTS = tl.constexpr(2)

# The smallest τ for which no row maximum is needed: e^±40 and sums of 2^40 of them fit float32.
SAFE_TEMPERATURE = tl.constexpr(0.025)

BATCH_SIZES = ["num_rows", "num_columns", "weight_blocks"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def weights_kernel(
    x_ptr,  # (R, D) rows of the chunk
    y_ptr,  # (n, D) columns: positives, explicit negatives, or centroids
    x_inverse_ptr,  # (R,) 1/‖x_i‖
    y_inverse_ptr,  # (n,)
    own_ptr,  # (R,) int64: the column of row i's own positive, which is left out
    row_ids_ptr,  # (R,) int: cluster of each row
    column_ids_ptr,  # (n,) int
    uses_ptr,  # (n,) float32: n_k of each centroid
    hard_ids_ptr,  # (R,) int64: the hard negative of sentence i
    reference_ptr,  # (R,) base 2
    weights_ptr,  # out (R, n), 16 · weight_blocks numbers a row
    partial_ptr,  # out (column tiles, R) float32: row sums, or maxima
    temperature,  # τ, a number or a pointer
    hard_negative_weight,
    num_rows,
    num_columns,
    dim,
    x_stride,
    y_stride,
    weight_blocks,
    MODE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    HAS_USES: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (row tiles · column tiles,); neighbours share their columns, and all of x stays in the cache."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    row_tile, column_tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1)
    safe_columns = tl.minimum(columns, num_columns - 1)
    tau = read_scalar(temperature, TEMPERATURE_POINTER)
    partial = partial_ptr + column_tile.to(tl.int64) * num_rows + rows
    needed = True
    if MODE == MAXIMA:
        if TEMPERATURE_POINTER:  # only the device knows whether a maximum is needed
            needed = tau < SAFE_TEMPERATURE
            tl.store(partial, tl.full((BLOCK_M,), LOWEST, tl.float32), mask=row_mask)
            tl.debug_barrier()
    if needed:
        x_rows, y_rows = row_starts(x_ptr, safe_rows, x_stride), row_starts(y_ptr, safe_columns, y_stride)
        products, _, _ = product_tile(x_rows, y_rows, dim, False, False, PRECISION, UPCAST, BLOCK_D)
        x_scale = tl.load(x_inverse_ptr + safe_rows) * (LOG2_E / tau)
        y_inverse = tl.load(y_inverse_ptr + safe_columns)
        logits = products * x_scale[:, None] * y_inverse[None, :]  # (M, N)
        others = (columns < num_columns)[None, :]
        if HAS_OWN:
            others = others & (columns[None, :] != tl.load(own_ptr + safe_rows)[:, None])
        if HAS_ROW_IDS:
            mine = tl.load(row_ids_ptr + safe_rows)[:, None]
            others = others & (tl.load(column_ids_ptr + safe_columns)[None, :] != mine)
        if HAS_USES:
            own_hard = tl.load(hard_ids_ptr + safe_rows)[:, None]
            uses = tl.load(uses_ptr + safe_columns)[None, :]
            weight = read_scalar(hard_negative_weight, False)
            logits += log2_uses(uses, columns[None, :] == own_hard, weight)
            others = others & (uses > 0)
        if MODE == MAXIMA:
            tl.store(partial, tl.max(tl.where(others, logits, LOWEST), axis=1), mask=row_mask)
        else:
            if HAS_REFERENCE:
                logits -= tl.load(reference_ptr + safe_rows)[:, None]
            e = tl.where(others, tl.exp2(logits), 0.0)
            tl.store(partial, tl.sum(e, axis=1), mask=row_mask)
            if MODE == WEIGHTS:
                starts = row_starts(weights_ptr, safe_rows, weight_blocks.to(tl.int64) * 16)
                both = row_mask[:, None] & (columns < padded(num_columns))[None, :]
                e = e * y_inverse[None, :]
                tl.store(starts + columns[None, :], e.to(weights_ptr.dtype.element_ty), mask=both)
