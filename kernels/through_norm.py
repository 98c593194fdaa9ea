"""From the gradient of unit rows to that of the rows themselves: dz = (du − u (u·du)) / ‖z‖.

SCALED: what comes in is du / ‖z‖ already, as products with weights that carry the norms give it.
"""

from __future__ import annotations

import triton
import triton.language as tl

BATCH_SIZES = ["num_rows"]


@triton.jit(do_not_specialize=BATCH_SIZES)
def through_norm_kernel(
    gradient_ptr,  # (R, D) float32 du
    z_ptr,  # (R, D)
    inverse_ptr,  # (R,) 1/‖z‖
    index_ptr,  # (R,) int64: the row of `out` that row i goes to
    out_ptr,  # out (·, D)
    num_rows,
    dim,
    z_stride,
    HAS_INDEX: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (row tiles,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    inverse = tl.load(inverse_ptr + rows, mask=row_mask, other=0.0)[:, None]
    target = rows
    if HAS_INDEX:
        target = tl.load(index_ptr + rows, mask=row_mask, other=0)
    along = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = row_mask[:, None] & (d < dim)
        z = tl.load(z_ptr + rows[:, None] * z_stride + d, mask=mask, other=0.0).to(tl.float32)
        along += z * tl.load(gradient_ptr + rows[:, None] * dim + d, mask=mask, other=0.0)
    along = tl.sum(along, axis=1)[:, None] * inverse
    for start in range(0, dim, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = row_mask[:, None] & (d < dim)
        z = tl.load(z_ptr + rows[:, None] * z_stride + d, mask=mask, other=0.0).to(tl.float32)
        du = tl.load(gradient_ptr + rows[:, None] * dim + d, mask=mask, other=0.0)
        dz = du - z * inverse * along
        if not SCALED:
            dz = dz * inverse
        tl.store(out_ptr + target[:, None] * dim + d, dz.to(out_ptr.dtype.element_ty), mask=mask)
