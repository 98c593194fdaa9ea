"""Members and sums of each cluster of a small batch, and the step of the centroids to them, in one launch.

One program makes one (K, D) tile: a product of the 0/1 membership matrix with the raw points. No atomic
addition of floats, so the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import multiply_add, read_scalar, row_starts, wait_for_the_launch_before

BATCH_SIZES = ["num_rows", "num_centroids"]

# Values of the constexpr UPDATE.
TOWARDS_SUM = tl.constexpr(0)  # the authors' code
TOWARDS_MEAN = tl.constexpr(1)  # the paper, Eq. 7


@triton.jit(do_not_specialize=BATCH_SIZES)
def centroid_update_kernel(
    x_ptr,  # (B, D) raw points
    x_inverse_ptr,  # (B,) 1/‖x_i‖; rows where it is not positive have no direction and are left out
    partial_cosine_ptr,  # (TILES, B): the best cosine within each tile of centroids
    partial_id_ptr,  # (TILES, B) int32: its id
    centroids_ptr,  # (K, D) float32, updated in place
    updated_ptr,  # out (K, D), a copy of the updated centroids
    momentum,  # γ
    num_rows,
    num_centroids,
    dim,
    x_stride,
    centroids_stride,
    UPDATE: tl.constexpr,
    TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (cluster tiles, dimension tiles); TILES of centroids were compared."""
    wait_for_the_launch_before(DEPENDENT)
    clusters = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    count = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, num_rows, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        mask = rows < num_rows
        valid = tl.load(x_inverse_ptr + rows, mask=mask, other=0.0) > 0  # False for NaN
        best = tl.full((BLOCK_B,), float("-inf"), tl.float32)
        nearest = tl.zeros((BLOCK_B,), tl.int32)
        for tile in tl.static_range(TILES):
            at = rows + num_rows.to(tl.int64) * tile
            cosine = tl.load(partial_cosine_ptr + at, mask=mask, other=0.0)
            ids = tl.load(partial_id_ptr + at, mask=mask, other=0)
            wins = cosine > best  # strictly: the lowest id of equals
            best = tl.where(wins, cosine, best)
            nearest = tl.where(wins, ids, nearest)
        members = ((nearest[:, None] == clusters[None, :]) & valid[:, None]).to(tl.float32)  # (B, K)
        count += tl.sum(members, axis=0)
        mask = valid[:, None] & (d < dim)[None, :]
        x = tl.load(row_starts(x_ptr, rows, x_stride) + d[None, :], mask=mask, other=0.0)  # (B, D)
        if x.dtype == tl.float32:
            total = multiply_add(tl.trans(x), members.to(tl.bfloat16), total, PRECISION, UPCAST)
        else:
            total = multiply_add(tl.trans(x), members.to(x.dtype), total, PRECISION, UPCAST)

    total = tl.trans(total)  # (K, D)
    inside = (clusters < num_centroids)[:, None] & (d < dim)[None, :]
    at = row_starts(centroids_ptr, clusters, centroids_stride) + d[None, :]
    old = tl.load(at, mask=inside, other=0.0)
    if UPDATE == TOWARDS_MEAN:
        total = total / tl.maximum(count, 1.0)[:, None]
    momentum = read_scalar(momentum, False)
    # As torch.lerp: exact at both ends.
    near_old = old + momentum * (total - old)
    near_new = total - (total - old) * (1.0 - momentum)
    new = tl.where(momentum < 0.5, near_old, near_new)
    new = tl.where((count > 0)[:, None], new, old)
    tl.store(at, new, mask=inside)
    # The backward of this step needs them after the next step has moved them on.
    copy = row_starts(updated_ptr, clusters, dim) + d[None, :]
    tl.store(copy, new.to(updated_ptr.dtype.element_ty), mask=inside)
