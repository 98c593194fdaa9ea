"""Launchers for one chunk of rows of a large batch: weights, margins, gradients through the normalisation.

Embeddings are (rows, D) of one dtype with a unit column stride. Outputs are written into what the caller
gives, which owns the workspace. No function waits for the device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import Tiles, cdiv, launch, padded
from .margins import margins_kernel
from .through_norm import through_norm_kernel
from .weights import MAXIMA, TOTALS, WEIGHTS, weights_kernel

MODES = {"maxima": MAXIMA.value, "totals": TOTALS.value, "weights": WEIGHTS.value}


def column_tiles(y: Tensor, x: Tensor) -> int:
    """Rows of `partial` that `weigh` fills for columns y (n, D)."""
    return cdiv(y.shape[0], _weight_tiles(x, y).blocks["BLOCK_N"])


def weigh(mode: str, x: Tensor, y: Tensor, **given: Any) -> None:
    """Row "maxima" or "totals" of x (R, D) against y (n, D), or totals and "weights" (R, padded(n)).

    given: tensors and numbers by the names of `weights_kernel`'s parameters. own (R,): columns that are left
    out; row_ids, column_ids: equal ones are left out too; uses, hard_ids: y are centroids, each standing
    `uses` times; reference (R,): the base-2 logit subtracted from each row; partial: (column_tiles, R)
    float32.
    """
    rows, columns = x.shape[0], y.shape[0]
    launch(
        weights_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]) * cdiv(columns, block["BLOCK_N"]),),
        _weight_tiles(x, y),
        x=x,
        y=y,
        **given,
        num_rows=rows,
        num_columns=columns,
        dim=x.shape[1],
        weight_blocks=padded(columns) // 16,
        MODE=MODES[mode],
    )


def add_margins(x: Tensor, y: Tensor, borders: tuple[Tensor, Tensor], **given: Any) -> None:
    """Margin loss of rows with their cluster-mates.

    borders, own: (R,) int64 by sorted row. given: by the names of `margins_kernel`'s parameters, which say
    what each is; slope_sum and margin (R,) float32 for the values, out for the gradient of the unit rows,
    added to.
    """
    rows, dim, out = borders[0].shape[0], x.shape[1], given.get("out")
    launch(
        margins_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]), 1 if out is None else cdiv(dim, block["BLOCK_OUT"])),
        _margin_tiles(x),
        x=x,
        y=y,
        low=borders[0],
        high=borders[1],
        **given,
        num_rows=rows,
        num_columns=given["y_order"].shape[0],
        dim=dim,
    )


def through_norm(
    gradient: Tensor,
    z: Tensor,
    inverse: Tensor,
    out: Tensor,
    index: Tensor | None = None,
    *,
    scaled: bool = False,
) -> None:
    """Write the gradient of z (R, D) to out[index], from that of its unit rows (R, D) float32.

    With `scaled` the latter is over ‖z‖ already.
    """
    rows, dim = z.shape
    launch(
        through_norm_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]),),
        Tiles({"BLOCK_M": 4, "BLOCK_D": 256}),
        gradient=gradient,
        z=z,
        inverse=inverse,
        index=index,
        out=out,
        num_rows=rows,
        dim=dim,
        SCALED=scaled,
    )


def _weight_tiles(x: Tensor, y: Tensor) -> Tiles:
    """Half precision with half precision: large tiles on the matrix units."""
    if x.dtype == y.dtype and x.dtype.itemsize == 2:
        return Tiles({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=8)
    return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32})


def _margin_tiles(x: Tensor) -> Tiles:
    if x.dtype.itemsize == 2:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_OUT": 128})
    return Tiles({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_OUT": 32}, num_stages=2)
