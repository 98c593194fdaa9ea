"""Launchers of the cosines: similarity, assignment, update of the centroids.

Arguments are checked by the callers (`clusterns.checks`). Embeddings are (rows, D) of one dtype with a
unit column stride; every output is new unless said otherwise. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .centroid_update import SUMS, TOWARDS_MEAN, TOWARDS_SUM, centroid_update_kernel
from .launch import LARGE_BATCH, Tiles, cdiv, launch, new_float32, operations, padded, product_constants
from .similarity import cosine_kernel
from .similarity_gradient import similarity_gradient_kernel
from .target import target_of

UPDATES = {"sums": SUMS.value, "sum": TOWARDS_SUM.value, "mean": TOWARDS_MEAN.value}


def num_columns(num_positives: int, num_negatives: int) -> int:
    """Columns of the cosines up to the last one in use."""
    return padded(num_positives) + num_negatives if num_negatives else num_positives


def num_counters(num_rows: int, num_centroids: int) -> int:
    """Length of the counter buffer (`tiles.counters`): sizes, uses, arrivals."""
    return 2 * padded(num_centroids) + 16 + cdiv(num_rows, 16)


def compare(
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None = None,
    centroids: Tensor | None = None,
    counters: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cosines of x (B, D) with y (C, D) and negatives (N, D), over τ; also the best of each centroid tile.

    Sets `counters` to zero. Returns cosines (B, padded(padded(C) + N)) float32, the negatives from column
    padded(C); 1/‖x‖ (B,); 1/‖y‖ likewise, as one row; and for `update` the best cosine and its id within each
    tile of centroids, (2, tiles, B) each.
    """
    rows, columns = x.shape[0], num_columns(y.shape[0], negatives.shape[0] if negatives is not None else 0)
    cosines = new_float32(x, rows, padded(columns))
    x_inverse, y_inverse = new_float32(x, rows), new_float32(x, cosines.shape[1])
    tiles = _cosine_tiles(x, rows)
    partial = _partial(x, centroids, tiles)
    _launch_cosines(
        x,
        tiles,
        y=y,
        negatives=negatives,
        centroids=centroids,
        cosines=cosines,
        x_inverse=x_inverse,
        y_inverse=y_inverse,
        centroid_inverse=new_float32(x, centroids.shape[0]) if centroids is not None else None,
        partial=partial,
        counters=counters,
        clear=counters is not None,
        temperature=temperature,
    )
    return cosines, x_inverse, y_inverse, *partial


class Assignment(NamedTuple):
    """Result of `assign`: (B,) each, then cosines (B, padded(K)) if kept, 1/‖c‖ (K,), 1/‖x‖ (B,)."""

    nearest: Tensor
    runner_up: Tensor
    nearest_cosine: Tensor
    runner_up_cosine: Tensor
    cosines: Tensor
    centroid_inverse: Tensor
    x_inverse: Tensor


def assign(
    x: Tensor, centroids: Tensor, counters: Tensor, *, keep_cosines: bool = False, count_uses: bool = True
) -> Assignment:
    """Nearest and runner-up centroid of x (B, D) among centroids (K, D) float32, ids int64.

    Adds the sizes of the clusters, and with `count_uses` how often each is a runner-up, to `counters`, which
    must hold zeros.
    """
    rows, clusters = x.shape[0], centroids.shape[0]
    nearest, runner_up = (torch.empty(rows, dtype=torch.int64, device=x.device) for _ in range(2))
    nearest_cosine, runner_up_cosine = new_float32(x, rows), new_float32(x, rows)
    cosines = new_float32(x, *((rows, padded(clusters)) if keep_cosines else (0, 0)))
    centroid_inverse, x_inverse = new_float32(x, clusters), new_float32(x, rows)
    tiles = _cosine_tiles(x, rows)
    _launch_cosines(
        x,
        tiles,
        centroids=centroids,
        centroid_cosines=cosines if keep_cosines else None,
        x_inverse=x_inverse,
        centroid_inverse=centroid_inverse,
        partial=_partial(x, centroids, tiles),
        outputs=(nearest, runner_up, nearest_cosine, runner_up_cosine),
        counters=counters,
        count_uses=count_uses,
    )
    return Assignment(
        nearest, runner_up, nearest_cosine, runner_up_cosine, cosines, centroid_inverse, x_inverse
    )


def update(
    x: Tensor,
    x_inverse: Tensor,
    best_cosine: Tensor,
    best_id: Tensor,
    centroids: Tensor,
    statistic: str,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Move `centroids` (K, D), in place, towards the "sum" or "mean" of their members; or only sum up.

    best_cosine, best_id: the best within each tile of centroids as `compare` returns them, or for ids that
    are known (1, 1, B). Returns for "sums" the members' counts (K,) and sums (K, D), else an empty tensor and
    a copy of the moved centroids.
    """
    clusters, dim = centroids.shape
    sums_only = statistic == "sums"
    counts = new_float32(x, clusters if sums_only else 0)
    result = new_float32(x, clusters, dim)
    tiles = _update_tiles(x)
    launch(
        centroid_update_kernel,
        lambda block: (cdiv(clusters, block["BLOCK_K"]), cdiv(dim, block["BLOCK_D"])),
        {
            "x_ptr": x,
            "x_inverse_ptr": x_inverse,
            "partial_cosine_ptr": best_cosine,
            "partial_id_ptr": best_id,
            "centroids_ptr": centroids,
            "updated_ptr": None if sums_only else result,
            "counts_ptr": counts if sums_only else None,
            "sums_ptr": result if sums_only else None,
            "momentum": float(momentum),
            "num_rows": x.shape[0],
            "num_centroids": clusters,
            "num_tiles": best_cosine.shape[1],
            "dim": dim,
            "x_stride": x.stride(0),
            "centroids_stride": centroids.stride(0),
        },
        {"UPDATE": UPDATES[statistic], **product_constants(x)},
        tiles,
    )
    return counts, result


def differentiate_similarity(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    cosines: Tensor,
    x_inverse: Tensor,
    y_inverse: Tensor,
    temperature: float | Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of cos(x, y)/τ (M, N) for its upstream gradient (M, N) float32, in the dtypes of x and y."""
    dim = x.shape[1]
    gradients = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if need else None
        for need, z in zip(needs, (x, y), strict=True)
    ]
    counts = [z.shape[0] if out is not None else 0 for z, out in zip((x, y), gradients, strict=True)]
    if not any(counts):
        return None, None
    launch(
        similarity_gradient_kernel,
        lambda block: (sum(cdiv(count, block["BLOCK_M"]) for count in counts) * cdiv(dim, block["BLOCK_D"]),),
        {
            "x_ptr": x,
            "y_ptr": y,
            "x_gradient_ptr": gradients[0] if gradients[0] is not None else gradients[1],
            "y_gradient_ptr": gradients[1] if gradients[1] is not None else gradients[0],
            "upstream_ptr": upstream,
            "cosines_ptr": cosines,
            "x_inverse_ptr": x_inverse,
            "y_inverse_ptr": y_inverse,
            "temperature": temperature,
            "num_rows": x.shape[0],
            "num_columns": y.shape[0],
            "dim": dim,
            "x_stride": x.stride(0),
            "y_stride": y.stride(0),
            "upstream_row_stride": upstream.stride(0),
            "upstream_column_stride": upstream.stride(1),
            "cosine_blocks": cosines.shape[1] // 16,
        },
        {
            "NEED_X": gradients[0] is not None,
            "NEED_Y": gradients[1] is not None,
            "TEMPERATURE_POINTER": isinstance(temperature, Tensor),
            **product_constants(x),
        },
        Tiles({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 64}, num_stages=2),
    )
    return gradients[0], gradients[1]


def _launch_cosines(
    x: Tensor,
    tiles: Tiles,
    *,
    x_inverse: Tensor,
    partial: tuple[Tensor, Tensor],
    y: Tensor | None = None,
    negatives: Tensor | None = None,
    centroids: Tensor | None = None,
    cosines: Tensor | None = None,
    centroid_cosines: Tensor | None = None,
    y_inverse: Tensor | None = None,
    centroid_inverse: Tensor | None = None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    counters: Tensor | None = None,
    clear: bool = False,
    count_uses: bool = False,
    temperature: float | Tensor = 1.0,
) -> None:
    has = {name: z is not None for name, z in (("y", y), ("negatives", negatives), ("centroids", centroids))}
    count = {
        name: z.shape[0] if z is not None else 0 for name, z in (("y", y), ("n", negatives), ("c", centroids))
    }
    nearest, runner_up, nearest_cosine, runner_up_cosine = outputs or (None,) * 4

    def grid(block: Mapping[str, int]) -> tuple[int, ...]:
        columns = cdiv(count["y"], block["BLOCK_N"]) + cdiv(count["n"], block["BLOCK_N"])
        return (cdiv(x.shape[0], block["BLOCK_M"]) * (columns + cdiv(count["c"], block["BLOCK_K"])),)

    launch(
        cosine_kernel,
        grid,
        {
            "x_ptr": x,
            "y_ptr": y,
            "negatives_ptr": negatives,
            "centroids_ptr": centroids,
            "cosines_ptr": cosines,
            "centroid_cosines_ptr": centroid_cosines,
            "x_inverse_ptr": x_inverse,
            "y_inverse_ptr": y_inverse,
            "centroid_inverse_ptr": centroid_inverse,
            "partial_cosine_ptr": partial[0],
            "partial_id_ptr": partial[1],
            "nearest_ptr": nearest,
            "runner_up_ptr": runner_up,
            "nearest_cosine_ptr": nearest_cosine,
            "runner_up_cosine_ptr": runner_up_cosine,
            "counters_ptr": counters,
            "temperature": temperature,
            "num_rows": x.shape[0],
            "num_columns": count["y"],
            "num_negatives": count["n"],
            "num_centroids": count["c"],
            "num_counters": counters.numel() if counters is not None else 0,
            "dim": x.shape[1],
            "x_stride": x.stride(0),
            "y_stride": y.stride(0) if y is not None else 0,
            "negatives_stride": negatives.stride(0) if negatives is not None else 0,
            "centroids_stride": centroids.stride(0) if centroids is not None else 0,
            "cosine_blocks": cosines.shape[1] // 16 if cosines is not None else 0,
            "centroid_blocks": centroid_cosines.shape[1] // 16 if centroid_cosines is not None else 0,
        },
        {
            "HAS_COLUMNS": has["y"],
            "HAS_NEGATIVES": has["negatives"],
            "HAS_CENTROIDS": has["centroids"],
            "STORE_CENTROID_COSINES": centroid_cosines is not None,
            "FINISH": outputs is not None,
            "COUNT_USES": count_uses,
            "CLEAR": clear,
            "TEMPERATURE_POINTER": isinstance(temperature, Tensor),
            "WAIT_FOR_STORES": target_of(x.device).waits_for_stores,
            **product_constants(x),
        },
        tiles,
        # A launch that counts must not be repeated, so it is not swept.
        work=0 if outputs else operations(x, count["y"] + count["n"]),
    )


# Centroids of one tile, whatever the batch.
_CENTROID_TILE = 32


def partial_bytes(num_centroids: int) -> int:
    """Scratch memory per row of `assign`."""
    return 2 * cdiv(num_centroids, _CENTROID_TILE) * 8


def _partial(x: Tensor, centroids: Tensor | None, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Best and second-best cosine and id within each tile of centroids, (2, tiles, B); empty without."""
    count = cdiv(centroids.shape[0], tiles.blocks["BLOCK_K"]) if centroids is not None else 0
    shape = (2, count, x.shape[0])
    return (
        new_float32(x, *shape),
        torch.empty(shape, dtype=torch.int32, device=x.device),
    )


def _cosine_tiles(x: Tensor, rows: int) -> Tiles:
    """Small batches get small tiles, to fill the chip. Half precision takes 64 rows, what HGMMA needs."""
    if x.dtype.itemsize == 2:
        if rows < LARGE_BATCH:
            blocks = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_K": _CENTROID_TILE, "BLOCK_K_D": 32}
            return Tiles(blocks)
        blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64, "BLOCK_K": _CENTROID_TILE, "BLOCK_K_D": 32}
        return Tiles(blocks, num_warps=8)
    n = 32 if rows < LARGE_BATCH else 64
    return Tiles({"BLOCK_M": 64, "BLOCK_N": n, "BLOCK_D": 32, "BLOCK_K": _CENTROID_TILE, "BLOCK_K_D": 32})


def _update_tiles(x: Tensor) -> Tiles:
    if x.dtype.itemsize == 2:
        return Tiles({"BLOCK_K": 64, "BLOCK_B": 64, "BLOCK_D": 32})
    return Tiles({"BLOCK_K": 32, "BLOCK_B": 32, "BLOCK_D": 32})
