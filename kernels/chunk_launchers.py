"""Launchers for one chunk of rows of a large batch: before its products, amid and after them.

Embeddings are (rows, D) of one dtype with a unit column stride. What is given beside the arguments goes by
the names of the kernels' parameters, which say what each is. Outputs are written into what the caller gives,
which owns the workspace. No function waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
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


def part(x: Tensor) -> int:
    """Columns that share one row of `partial`."""
    return 64 if x.dtype == torch.float32 or target_of(x.device).loads_tiles else 32


def parts(x: Tensor, y: Tensor) -> int:
    """Rows of `partial` that `weigh` fills."""
    tile = _weight_tiles(x, y).blocks["BLOCK_N"]
    return cdiv(y.shape[0], tile) * (tile // part(x))


def row_tiles(x: Tensor, y: Tensor) -> int:
    """Rows of `column_partial` that `weigh` fills."""
    return cdiv(x.shape[0], _weight_tiles(x, y).blocks["BLOCK_M"])


def whole_waves(rows: int, like: Tensor) -> int:
    """So many rows, or fewer, whose product (rows, D) has a tile of 128 × 256 for every multiprocessor."""
    of_a_wave = 128 * (target_of(like.device).multiprocessors // cdiv(like.shape[1], 256))
    tile = of_a_wave if 0 < of_a_wave <= rows else min(128, rows)
    return rows // tile * tile


def gather(x: Tensor, inverse: Tensor, **given: Any) -> None:
    """Norms (R,) and, where asked for, copies of rows of x; s_i and sums of unit rows; the margin loss."""
    n, d = (64, 64) if x.dtype.itemsize == 2 else (32, 32)
    blocks = {"BLOCK_M": GATHERED, "BLOCK_N": n, "BLOCK_D": d}
    _by_rows(gather_kernel, len(inverse), Tiles(blocks, num_warps=8), x=x, inverse=inverse, **given)


def weigh(mode: str, x: Tensor, y: Tensor, **given: Any) -> None:
    """Row sums of E for x (R, D) and y (n, D): log2 of the "totals" alone, or sums and "weights"."""
    tiles, target = _weight_tiles(x, y), target_of(x.device)
    blocks = tiles.blocks
    programs = cdiv(x.shape[0], blocks["BLOCK_M"]) * cdiv(y.shape[0], blocks["BLOCK_N"])
    if target.loads_tiles and x.dtype == y.dtype and x.dtype.itemsize == 2 and _aligned(x) and _aligned(y):
        programs = min(programs, target.multiprocessors)
        given["x_descriptor"] = TensorDescriptor.from_tensor(x, [blocks["BLOCK_M"], blocks["BLOCK_D"]])
        given["y_descriptor"] = TensorDescriptor.from_tensor(y, [blocks["BLOCK_N"], blocks["BLOCK_D"]])
    launch(
        weights_kernel,
        lambda _: (programs,),
        tiles,
        x=x,
        y=y,
        **given,
        num_rows=x.shape[0],
        num_columns=y.shape[0],
        num_programs=programs,
        dim=x.shape[1],
        MODE=MODES[mode],
        PART=part(x),
    )


def settle(x: Tensor, **given: Any) -> None:
    """Bring the sums of x (R, D) together; with row_scale all that is needed for the other two products."""
    tiles = Tiles({"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_D": 256})
    _by_rows(settle_kernel, x.shape[0], tiles, x=x, PART=part(x), **given)


def add_margins(x: Tensor, y: Tensor, slopes: Tensor, **given: Any) -> None:
    """Add the margin loss to the gradients of x (R, D) and the positives y (n, D), where they are given."""
    rows = x.shape[0] if given["x_gradient"] is not None else 0
    columns = y.shape[0] if given["y_gradient"] is not None else 0
    launch(
        margins_kernel,
        lambda block: (
            cdiv(rows, block["BLOCK_M"]) + cdiv(columns, block["BLOCK_M"]),
            cdiv(x.shape[1], block["BLOCK_D"]),
        ),
        _margin_tiles(x),
        slopes=slopes,
        x=x,
        y=y,
        **given,
        num_rows=x.shape[0],
        num_columns=y.shape[0],
        most_mates=slopes.shape[1],
        dim=x.shape[1],
    )


def finish(gradient: Tensor, z: Tensor, inverse: Tensor, **given: Any) -> None:
    """Gradient of rows z (R, D) through the normalisation, from that of their unit rows (R, D) float32."""
    tiles = Tiles({"BLOCK_M": 4, "BLOCK_D": 256})
    _by_rows(finish_kernel, len(z), tiles, gradient=gradient, z=z, inverse=inverse, **given, dim=z.shape[1])


def _by_rows(kernel: Any, rows: int, tiles: Tiles, **given: Any) -> None:
    given.setdefault("dim", given["x"].shape[1] if "x" in given else 0)
    launch(kernel, lambda block: (cdiv(rows, block["BLOCK_M"]),), tiles, **given, num_rows=rows)


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
