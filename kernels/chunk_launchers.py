"""Launchers for one chunk of rows of a large batch: weights, margins, gradients through the normalisation.

Embeddings are (rows, D) of one dtype with a unit column stride. Outputs are written into what the caller
gives, which owns the workspace. No function waits for the device.
"""

from __future__ import annotations

from torch import Tensor

from .launch import Tiles, cdiv, launch, padded, product_constants
from .margins import margins_kernel
from .through_norm import through_norm_kernel
from .weights import MAXIMA, TOTALS, WEIGHTS, weights_kernel

MODES = {"maxima": MAXIMA.value, "totals": TOTALS.value, "weights": WEIGHTS.value}


def column_tiles(y: Tensor, x: Tensor) -> int:
    """Rows of `partial` that `weigh` fills for columns y (n, D)."""
    return cdiv(y.shape[0], _weight_tiles(x, y).blocks["BLOCK_N"])


def weigh(
    mode: str,
    x: Tensor,
    y: Tensor,
    x_inverse: Tensor,
    y_inverse: Tensor,
    temperature: float | Tensor,
    partial: Tensor,
    weights: Tensor | None = None,
    *,
    own: Tensor | None = None,
    cluster_ids: tuple[Tensor, Tensor] | None = None,
    uses: Tensor | None = None,
    hard_ids: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    reference: Tensor | None = None,
) -> None:
    """Row "maxima" or "totals" of x (R, D) against y (n, D), or totals and "weights" (R, padded(n)).

    partial: (column_tiles, R) float32. own: (R,) columns that are left out. cluster_ids: of rows and columns,
    equal ones are left out too. uses, hard_ids: y are centroids, each standing `uses` times. reference: (R,),
    the base-2 logit subtracted from each row.
    """
    rows, columns = x.shape[0], y.shape[0]
    tiles = _weight_tiles(x, y)
    launch(
        weights_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]) * cdiv(columns, block["BLOCK_N"]),),
        {
            "x_ptr": x,
            "y_ptr": y,
            "x_inverse_ptr": x_inverse,
            "y_inverse_ptr": y_inverse,
            "own_ptr": own,
            "row_ids_ptr": cluster_ids[0] if cluster_ids else None,
            "column_ids_ptr": cluster_ids[1] if cluster_ids else None,
            "uses_ptr": uses,
            "hard_ids_ptr": hard_ids,
            "reference_ptr": reference,
            "weights_ptr": weights,
            "partial_ptr": partial,
            "temperature": temperature,
            "hard_negative_weight": float(hard_negative_weight),
            "num_rows": rows,
            "num_columns": columns,
            "dim": x.shape[1],
            "x_stride": x.stride(0),
            "y_stride": y.stride(0),
            "weight_blocks": padded(columns) // 16,
        },
        {
            "MODE": MODES[mode],
            "HAS_OWN": own is not None,
            "EXCLUDE": cluster_ids is not None,
            "HARD": uses is not None,
            "HAS_REFERENCE": reference is not None,
            "TEMPERATURE_POINTER": isinstance(temperature, Tensor),
            "FLOAT32": x.dtype != y.dtype,
            **product_constants(x),
        },
        tiles,
    )


def add_margins(
    x: Tensor,
    y: Tensor,
    x_inverse: Tensor,
    y_inverse: Tensor,
    x_order: Tensor | None,
    y_order: Tensor,
    borders: tuple[Tensor, Tensor],
    own: Tensor,
    positive: Tensor,
    margins: tuple[float, float],
    *,
    values: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    out_scale: float = 1.0,
    transposed: bool = False,
) -> None:
    """Margin loss of rows with their cluster-mates, see `margins_kernel` for every argument.

    borders, own: (R,) int64 by sorted row. values: (R,) float32 sums of the slopes and of the margins. out:
    the gradient of the unit rows, added to.
    """
    rows, dim = borders[0].shape[0], x.shape[1]
    slope_sum, margin = values or (None, None)
    tiles = _margin_tiles(x)
    launch(
        margins_kernel,
        lambda block: (cdiv(rows, block["BLOCK_M"]), cdiv(dim, block["BLOCK_OUT"]) if out is not None else 1),
        {
            "x_ptr": x,
            "y_ptr": y,
            "x_inverse_ptr": x_inverse,
            "y_inverse_ptr": y_inverse,
            "x_order_ptr": x_order,
            "y_order_ptr": y_order,
            "low_ptr": borders[0],
            "high_ptr": borders[1],
            "own_ptr": own,
            "positive_ptr": positive,
            "out_ptr": out,
            "slope_sum_ptr": slope_sum,
            "margin_ptr": margin,
            "alpha": float(margins[0]),
            "beta": float(margins[1]),
            "out_scale": float(out_scale),
            "num_rows": rows,
            "num_columns": y_order.shape[0],
            "dim": dim,
            "x_stride": x.stride(0),
            "y_stride": y.stride(0),
        },
        {
            "HAS_X_ORDER": x_order is not None,
            "TRANSPOSED": transposed,
            "VALUES": values is not None,
            "GRADIENT": out is not None,
            **product_constants(x),
        },
        tiles,
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
    launch(
        through_norm_kernel,
        lambda block: (cdiv(z.shape[0], block["BLOCK_M"]),),
        {
            "gradient_ptr": gradient,
            "z_ptr": z,
            "inverse_ptr": inverse,
            "index_ptr": index,
            "out_ptr": out,
            "num_rows": z.shape[0],
            "dim": z.shape[1],
            "z_stride": z.stride(0),
        },
        {"HAS_INDEX": index is not None, "SCALED": scaled},
        Tiles({"BLOCK_M": 4, "BLOCK_D": 256}),
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
