"""Launchers for one chunk of rows of a large batch: before its products, amid and after them.

Embeddings are (rows, D) of one dtype with a unit column stride. What is given beside the arguments goes by
the names of the kernels' parameters, which say what each is. Outputs are written into what the caller gives,
which owns the workspace. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Tiles, cdiv, launch
from .margins import margins_kernel
from .rows import finish_kernel, gather_kernel, settle_kernel
from .target import target_of
from .weights import TOTALS, WEIGHTS, weights_kernel

MODES = {"totals": TOTALS.value, "weights": WEIGHTS.value}

# Rows of one program of `gather`, whose sums of unit rows are kept.
GATHERED = 64

# What the launches of a chunk share, by the names of the kernels' parameters.
Chunk = Mapping[str, Any]


def column_tiles(x: Tensor, y: Tensor) -> int:
    """Rows of `partial` that `weigh` fills."""
    return cdiv(y.shape[0], _weight_tiles(x, y).blocks["BLOCK_N"])


def row_tiles(x: Tensor, y: Tensor) -> int:
    """Rows of `column_partial` that `weigh` fills."""
    return cdiv(x.shape[0], _weight_tiles(x, y).blocks["BLOCK_M"])


def whole_waves(rows: int, like: Tensor) -> int:
    """So many rows, or fewer, whose product (rows, D) has a tile of 128 × 256 for every multiprocessor."""
    of_a_wave = 128 * (target_of(like.device).multiprocessors // cdiv(like.shape[1], 256))
    tile = of_a_wave if 0 < of_a_wave <= rows else min(128, rows)
    return rows // tile * tile


def shares(x: Tensor, margin_parts: int) -> int:
    """Programs of `gather` that share the mates of a row, so that few rows fill the chip too."""
    return max(1, min(target_of(x.device).multiprocessors // cdiv(len(x), GATHERED), margin_parts))


def gather(chunk: Chunk, **given: Any) -> None:
    """Norms (R,) and, where asked for, copies of rows of x; s_i and sums of unit rows; the margin loss."""
    x, rows = chunk["x"], len(chunk["x_inverse"])
    n, d = (64, 64) if x.dtype.itemsize == 2 else (32, 32)
    tiles = Tiles({"BLOCK_M": GATHERED, "BLOCK_N": n, "BLOCK_D": d}, num_warps=8)
    grid = cdiv(rows, GATHERED), chunk.get("num_shares", 1)
    launch(gather_kernel, lambda _: grid, tiles, chunk, **given, num_rows=rows, dim=x.shape[1])


def weigh(mode: str, chunk: Chunk, **given: Any) -> None:
    """Row sums of E for x (R, D) and y (n, D): log2 of the "totals" alone, or sums and "weights"."""
    x, y = chunk["x"], chunk["y"]
    tiles, target = _weight_tiles(x, y), target_of(x.device)
    blocks = tiles.blocks
    part = 64 if x.dtype != y.dtype else 16 if target.arch == 100 else 32  # the most that spill no register
    programs = cdiv(x.shape[0], blocks["BLOCK_M"]) * cdiv(y.shape[0], blocks["BLOCK_N"])
    if target.loads_tiles and x.dtype == y.dtype and x.dtype.itemsize == 2 and _aligned(x) and _aligned(y):
        programs = min(programs, target.multiprocessors)
        given["x_descriptor"] = TensorDescriptor.from_tensor(x, [blocks["BLOCK_M"], blocks["BLOCK_D"]])
        given["y_descriptor"] = TensorDescriptor.from_tensor(y, [blocks["BLOCK_N"], blocks["BLOCK_D"]])
    launch(
        weights_kernel,
        lambda _: (programs,),
        tiles,
        chunk,
        **given,
        num_rows=x.shape[0],
        num_columns=y.shape[0],
        num_programs=programs,
        dim=x.shape[1],
        MODE=MODES[mode],
        PART=part,
    )


def settle(chunk: Chunk, **given: Any) -> None:
    """Bring the sums of x (R, D) together; with row_scale all that is needed for the other two products."""
    x, tiles = chunk["x"], Tiles({"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_D": 256})
    given |= {"num_rows": len(x), "dim": x.shape[1], "PART": _weight_tiles(x, chunk["y"]).blocks["BLOCK_N"]}
    launch(settle_kernel, lambda block: (cdiv(len(x), block["BLOCK_M"]),), tiles, chunk, **given)


def add_margins(chunk: Chunk, **given: Any) -> None:
    """Add the margin loss to the gradients of x (R, D) and the positives (n, D), where they are given."""
    x, tiles = chunk["x"], _margin_tiles(chunk["x"])
    rows, columns = (cdiv(count, tiles.blocks["BLOCK_M"]) for count in (len(x), chunk["num_positives"]))
    columns = min(2 * rows, columns)  # that have mates here; if there are more, a program has several
    programs = rows * (given["x_gradient"] is not None) + columns * (given["y_gradient"] is not None)
    grid = programs, cdiv(x.shape[1], tiles.blocks["BLOCK_D"])
    launch(margins_kernel, lambda _: grid, tiles, chunk, **given, num_rows=len(x), dim=x.shape[1])


def finish(gradient: Tensor, z: Tensor, inverse: Tensor, **given: Any) -> None:
    """Gradient of rows z (R, D) through the normalisation, from that of their unit rows (R, D) float32."""
    tiles = Tiles({"BLOCK_M": 4, "BLOCK_D": 256})
    given |= {"gradient": gradient, "z": z, "inverse": inverse, "num_rows": len(z), "dim": z.shape[1]}
    launch(finish_kernel, lambda block: (cdiv(len(z), block["BLOCK_M"]),), tiles, **given)


def _aligned(z: Tensor) -> bool:
    """Whether a descriptor can be made of it."""
    return (z.stride(0) * z.itemsize | z.data_ptr()) % 16 == 0


def _weight_tiles(x: Tensor, y: Tensor) -> Tiles:
    """Half precision with half precision: large tiles on the matrix units."""
    if x.dtype != y.dtype or x.dtype.itemsize != 2:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32}, num_warps=8)
    columns = 256 if target_of(x.device).loads_tiles else 128
    return Tiles({"BLOCK_M": 128, "BLOCK_N": columns, "BLOCK_D": 64}, num_warps=8)


def _margin_tiles(x: Tensor) -> Tiles:
    if x.dtype.itemsize == 2:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128}, num_warps=8)
    return Tiles({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 32})
