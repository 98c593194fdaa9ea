"""Which tiles are fastest? Each kernel of a step, on a GPU, with other tiles than the library's.

    python bench/run.py tiles [--batch 256 512 2048] [--dtype bfloat16 float32] [--list]

One row for each set of tiles: the time of its kernel in a whole step, forward and backward, with clustering
active. The library's own come first; what is much faster there belongs into its `_..._tiles` function. Those
of a large batch, in half precision alone, have their own size, a step in chunks.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import DTYPES, HALF, KINDS, OURS, Built, Case, make_views
from measure import Clock
from report import Results

from clusterns.kernels import chunk_launchers, cosine_launchers, objective_launchers
from clusterns.kernels.launch import Tiles
from clusterns.kernels.plan import plans


def _tiles(names: str, *sizes: tuple[int, ...]) -> list[Tiles]:
    """Tiles from sizes in the order of their names, then warps and stages."""
    blocks = [f"BLOCK_{name}" for name in names.split()]
    return [Tiles(dict(zip(blocks, each, strict=False)), *each[len(blocks) :]) for each in sizes]


# The kernel, where its tiles are chosen, and others.
CANDIDATES: dict[str, tuple[Any, str, list[Tiles]]] = {
    "cosine_kernel": (cosine_launchers, "_cosine_tiles", _tiles(
        "M N D K K_M K_D", (64, 32, 64, 32, 64, 64, 4, 4), (64, 64, 64, 32, 64, 64, 4, 3),
        (64, 64, 64, 32, 64, 64, 8, 3), (64, 32, 32, 32, 64, 32, 4, 3), (64, 64, 32, 32, 64, 32, 4, 3),
        (64, 32, 64, 32, 32, 64, 4, 3), (128, 128, 64, 32, 64, 64, 8, 3), (128, 128, 64, 32, 128, 64, 8, 3),
    )),
    "centroid_update_kernel": (cosine_launchers, "_update_tiles", _tiles(
        "K B D", (16, 128, 64, 4, 3), (16, 64, 64, 8, 3), (32, 64, 64, 4, 3), (64, 64, 16, 8, 3),
        (16, 64, 64, 4, 2),
    )),
    "objective_kernel": (objective_launchers, "_objective_tiles", _tiles(
        "M N", (4, 256, 4, 1), (2, 256, 4, 1), (4, 512, 8, 1), (2, 512, 4, 1), (8, 256, 8, 1),
        (16, 128, 8, 1),
    )),
    "gradient_kernel": (objective_launchers, "_gradient_tiles", _tiles(
        "M N D", (64, 64, 64, 8, 3), (64, 64, 128, 4, 3), (64, 64, 128, 8, 3), (128, 64, 64, 4, 3),
        (128, 64, 128, 8, 3), (64, 32, 64, 8, 3), (64, 32, 32, 4, 3), (64, 64, 64, 4, 2),
    )),
    "weights_kernel": (chunk_launchers, "_weight_tiles", _tiles(
        "M N D", (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3),
        (256, 128, 64, 8, 3),
    )),
    "assignment_kernel": (cosine_launchers, "_assignment_tiles", _tiles(
        "M N D", (128, 128, 32, 4, 4), (128, 128, 64, 4, 2), (256, 128, 64, 8, 3),
    )),
}  # fmt: skip

OF_CHUNKS, ROWS = ("weights_kernel", "assignment_kernel"), 16384


def measure(results: Results, clock: Any, case: Case, kernel: str, tiles: Tiles | None) -> None:
    """The row of one kernel with tiles, by default the library's."""
    module, name, _ = CANDIDATES[kernel]
    chosen = getattr(module, name)
    torch.set_float32_matmul_precision(case.precision)
    try:
        if tiles is not None:
            # Not for points beside float32 centroids.
            setattr(module, name, lambda *z: tiles if z[0].dtype == z[-1].dtype else chosen(*z))
        plans.clear()
        ours = f"{OURS} in chunks" if kernel in OF_CHUNKS else OURS
        built = Built(KINDS[case.kind][ours], case, make_views(case, clock.device))
        for _ in range(3):
            built.run()
        seen = [re.fullmatch(r"(\w+) ([\d.]+) us", each) for each in clock.kernels(built.run)]
        times = [float(each[2]) for each in seen if each and each[1] == kernel]
        shown = "the library's" if tiles is None else f"{dict(tiles.blocks)}, {tiles.num_warps} warps"
        row = {"kernel": kernel, "tiles": shown, "stages": tiles.num_stages if tiles else None}
        row |= {f"launch_{number}_us": each for number, each in enumerate(times)}
        results.add({"contender": OURS, **case.columns(), "status": "ok", "note": f"{kernel} {shown}", **row})
    finally:
        setattr(module, name, chosen)
        plans.clear()


def stages(wanted: argparse.Namespace, results: Results, clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do: a set of tiles a stage."""
    if not (results.on_gpu or wanted.list):
        raise SystemExit("tiles: expected a GPU, there is none; --list shows what would be measured")
    shape = (wanted.dim[0], wanted.clusters)
    cases = [
        Case("step", batch, *shape, DTYPES[dtype], wanted.precision)
        for dtype in wanted.dtype
        for batch in (ROWS, *wanted.batch)
    ]
    return [
        (f"{kernel} {tiles or 'as they are'} {case}", partial(measure, results, clock, case, kernel, tiles))
        for kernel, (_, _, others) in CANDIDATES.items()
        for tiles in (None, *others)
        for case in cases
        if (case.batch == ROWS) == (kernel in OF_CHUNKS) and (kernel not in OF_CHUNKS or case.dtype in HALF)
    ]
