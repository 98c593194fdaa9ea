"""Launchers of the cosines: similarity, assignment, update of the centroids.

Arguments are checked by the callers (`clusterns.checks`). Embeddings are (rows, D) of one dtype with a
unit column stride; every output is new unless said otherwise. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .assignment import assignment_kernel
from .centroid_update import TOWARDS_MEAN, TOWARDS_SUM, centroid_update_kernel
from .cluster_sums import member_sums_kernel, part_sums_kernel
from .launch import LARGE_BATCH, Tiles, cdiv, launch, new_float32, padded
from .similarity import cosine_kernel
from .target import target_of
from .tiles import SHORTEST_NORM

UPDATES = {"sum": TOWARDS_SUM.value, "mean": TOWARDS_MEAN.value}

# Centroids of one tile, whatever the batch.
_CENTROID_TILE = 32

# Points from which the assignment's large tiles give each multiprocessor two programs.
_MANY_POINTS = 2**15


def new_counters(x: Tensor, num_centroids: int) -> Tensor:
    """The counter buffer of a batch x (B, D), uninitialised: sizes, uses, arrivals (`tiles.counters`)."""
    length = 2 * padded(num_centroids) + 16 + cdiv(x.shape[0], 16)
    return torch.empty(length, dtype=torch.int32, device=x.device)


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
    rows, columns = x.shape[0], y.shape[0]
    if negatives is not None:
        columns = padded(columns) + negatives.shape[0]
    cosines = new_float32(x, rows, padded(columns))
    x_inverse, y_inverse = new_float32(x, rows), new_float32(x, cosines.shape[1])
    partial = _partial(x, centroids)
    _launch_cosines(
        x,
        partial,
        y=y,
        negatives=negatives,
        centroids=centroids,
        cosines=cosines,
        x_inverse=x_inverse,
        y_inverse=y_inverse,
        centroid_inverse=new_float32(x, centroids.shape[0]) if centroids is not None else None,
        counters=counters,
        num_counters=counters.numel() if counters is not None else 0,
        temperature=temperature,
        CLEAR=counters is not None,
    )
    return cosines, x_inverse, y_inverse, *partial


def factor_dtype(x: Tensor) -> torch.dtype:
    """Of weights and centroids in the gradients' products; float16 has too narrow a range for weights."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


class Assignment(NamedTuple):
    """Result of `assign`: (B,) each, then cosines (B, padded(K)) if kept, 1/‖c‖ (K,)."""

    nearest: Tensor
    runner_up: Tensor
    nearest_cosine: Tensor
    runner_up_cosine: Tensor
    cosines: Tensor
    centroid_inverse: Tensor

    @classmethod
    def new(cls, x: Tensor, rows: int, num_centroids: int, kept: bool) -> Assignment:
        """Uninitialised, for some rows like those of x."""
        ids = [torch.empty(rows, dtype=torch.int64, device=x.device) for _ in range(2)]
        shapes = (
            (rows,),
            (rows,),
            (rows, padded(num_centroids)) if kept else (0, 0),
            (num_centroids,),
        )
        return cls(*ids, *(new_float32(x, *shape) for shape in shapes))


def assign(
    x: Tensor,
    centroids: Tensor,
    counters: Tensor,
    x_inverse: Tensor,
    *,
    keep_cosines: bool = False,
    count_uses: bool = True,
) -> Assignment:
    """Nearest and runner-up centroid of a small batch x (B, D) among centroids (K, D) float32, ids int64.

    x_inverse: 1/‖x‖ (B,). The centroids' tiles stand side by side in the grid.
    Adds the sizes of the clusters, and with `count_uses` how often each is a runner-up, to `counters`, which
    must hold zeros.
    """
    found = Assignment.new(x, x.shape[0], centroids.shape[0], keep_cosines)
    _launch_cosines(
        x,
        _partial(x, centroids),
        centroids=centroids,
        centroid_cosines=found.cosines if keep_cosines else None,
        x_inverse=x_inverse,
        centroid_inverse=found.centroid_inverse,
        nearest=found.nearest,
        runner_up=found.runner_up,
        nearest_cosine=found.nearest_cosine,
        runner_up_cosine=found.runner_up_cosine,
        counters=counters,
        temperature=1.0,
        COUNT_USES=count_uses,
    )
    return found


def update(
    x: Tensor,
    x_inverse: Tensor,
    best_cosine: Tensor,
    best_id: Tensor,
    centroids: Tensor,
    statistic: str,
    momentum: float,
) -> Tensor:
    """Move `centroids` (K, D), in place, towards the "sum" or "mean" of their members.

    best_cosine, best_id: the best within each tile of centroids as `compare` returns them. Returns a copy of
    the moved centroids in `factor_dtype`.
    """
    clusters, dim = centroids.shape
    moved = torch.empty(clusters, dim, dtype=factor_dtype(x), device=x.device)
    launch(
        centroid_update_kernel,
        lambda block: (cdiv(clusters, block["BLOCK_K"]), cdiv(dim, block["BLOCK_D"])),
        _update_tiles(x),
        x=x,
        x_inverse=x_inverse,
        partial_cosine=best_cosine,
        partial_id=best_id,
        centroids=centroids,
        updated=moved,
        momentum=momentum,
        num_rows=x.shape[0],
        num_centroids=clusters,
        dim=dim,
        UPDATE=UPDATES[statistic],
        TILES=best_cosine.shape[1],
    )
    return moved


def similarity(x: Tensor, y: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos(x_i, y_j)/τ (M, padded(N)) float32, 1/‖x‖ (M,) and 1/‖y‖ (padded(N),)."""
    return compare(x, y, temperature=temperature)[:3]


def nearest_centroids(points: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    """Nearest and runner-up ids (B,) int64, their cosines (B,), and 1/‖point‖ (B,); `assignment.py`.

    Memory: these 28 bytes a point, and the unit centroids.
    """
    rows, clusters = points.shape[0], centroids.shape[0]
    ids = [torch.empty(rows, dtype=torch.int64, device=points.device) for _ in range(2)]
    cosines = [new_float32(points, rows) for _ in range(2)]
    x_inverse = new_float32(points, rows)
    high, low = _unit_terms(centroids, points.dtype)
    launch(
        assignment_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]),),
        _assignment_tiles(points),
        x=points,
        high=high,
        low=low,
        nearest=ids[0],
        runner_up=ids[1],
        nearest_cosine=cosines[0],
        runner_up_cosine=cosines[1],
        x_inverse=x_inverse,
        num_rows=rows,
        num_centroids=clusters,
        dim=points.shape[1],
    )
    return (*ids, *cosines, x_inverse)


def cluster_sums(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Members (K,) of each cluster of points around centroids, and their sum (K, D), both float32.

    After the assignment the ids are sorted and each point is read once more, `cluster_sums.py`. Memory: some
    80 bytes a point, and (K + B/256)·D floats for parts of the sums.
    """
    clusters, dim = centroids.shape
    nearest, *_, inverse = nearest_centroids(points, centroids)
    # Points without a direction come behind all clusters. 32 bits: half the work for the sort.
    ids, order = torch.where(inverse > 0, nearest, clusters).int().sort(stable=True)
    borders = torch.searchsorted(ids, torch.arange(clusters + 1, dtype=ids.dtype, device=ids.device))
    tiles = Tiles({"BLOCK_CHUNK": 256, "BLOCK_B": 16, "BLOCK_D": 256})
    chunks = cdiv(points.shape[0], tiles.blocks["BLOCK_CHUNK"])
    parts, sums = new_float32(points, chunks + clusters, dim), new_float32(points, clusters, dim)
    launch(
        member_sums_kernel,
        lambda block: (chunks, cdiv(dim, block["BLOCK_D"])),
        tiles,
        x=points,
        order=order,
        ids=ids,
        borders=borders,
        parts=parts,
        num_centroids=clusters,
        dim=dim,
    )
    launch(
        part_sums_kernel,
        lambda block: (clusters, cdiv(dim, block["BLOCK_D"])),
        tiles,
        parts=parts,
        borders=borders,
        sums=sums,
        dim=dim,
    )
    return borders.diff().float(), sums


def _unit_terms(centroids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Unit rows of centroids (K, D) float32, rounded to `dtype`, and for half precision what that lost.

    Two terms keep 16 bits in bfloat16 and 22 in float16, at the speed of half precision.
    """
    norm = torch.linalg.vector_norm(centroids, dim=1, keepdim=True)
    unit = centroids * torch.threshold_(norm, SHORTEST_NORM.value, torch.inf).reciprocal_()
    high = unit.to(dtype)
    return high, unit.sub_(high).to(dtype) if dtype.itemsize == 2 else None


def _launch_cosines(x: Tensor, partial: tuple[Tensor, Tensor], **given: Any) -> None:
    """Launch `cosine_kernel` for what is given of its arguments."""
    sources = [given.get(name) for name in ("y", "negatives", "centroids")]
    columns, explicit, clusters = (0 if z is None else z.shape[0] for z in sources)

    def grid(block: Mapping[str, int]) -> tuple[int, ...]:
        tiles = cdiv(columns, block["BLOCK_N"]) + cdiv(explicit, block["BLOCK_N"])
        assigning = cdiv(clusters, block["BLOCK_K"]) * cdiv(x.shape[0], block["BLOCK_K_M"])
        return (assigning + cdiv(x.shape[0], block["BLOCK_M"]) * tiles,)

    launch(
        cosine_kernel,
        grid,
        _cosine_tiles(x),
        x=x,
        partial_cosine=partial[0],
        partial_id=partial[1],
        num_rows=x.shape[0],
        num_columns=columns,
        num_negatives=explicit,
        num_centroids=clusters,
        dim=x.shape[1],
        **given,
    )


def _partial(x: Tensor, centroids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Best and second-best cosine and id within each tile of centroids, (2, tiles, B); empty without."""
    count = cdiv(centroids.shape[0], _CENTROID_TILE) if centroids is not None else 0
    shape = (2, count, x.shape[0])
    return new_float32(x, *shape), torch.empty(shape, dtype=torch.int32, device=x.device)


def _cosine_tiles(x: Tensor) -> Tiles:
    """Small batches get small tiles, to fill the chip. Half precision takes 64 rows, what HGMMA needs."""
    half, large = x.dtype.itemsize == 2, x.shape[0] >= LARGE_BATCH
    m, n, warps = (128, 128, 8) if half and large else (64, 64 if large else 32, 4)
    d = 64 if half else 32
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}
    blocks |= {"BLOCK_K": _CENTROID_TILE, "BLOCK_K_M": 64, "BLOCK_K_D": d}
    return Tiles(blocks, num_warps=warps)


def _assignment_tiles(x: Tensor) -> Tiles:
    """Wide in the centroids, for the points are read again with each tile of them.

    Half precision on sm_90 has accumulators of 128 by 128 in one warpgroup: while one of two programs on a
    multiprocessor looks for its two best, the other multiplies. Elsewhere that many registers spill.
    """
    if x.dtype.itemsize == 4:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32})
    target, many = target_of(x.device), x.shape[0] >= _MANY_POINTS
    on_hopper = (target.backend, target.arch) == ("cuda", 90)
    blocks = {"BLOCK_M": 128 if many else 64, "BLOCK_N": 128, "BLOCK_D": 32}
    return Tiles(blocks, num_warps=8 if many and not on_hopper else 4, num_stages=4 if on_hopper else 3)


def _update_tiles(x: Tensor) -> Tiles:
    return Tiles({"BLOCK_K": 16, "BLOCK_B": 64, "BLOCK_D": 64})
