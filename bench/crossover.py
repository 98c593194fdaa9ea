"""Up to which size is a batch faster as a whole than in chunks? `choose_backend` goes by the answer.

    python bench/run.py crossover [--batch 1024 2048 4096 --dim 768 --clusters 128]

Forward and backward of the objective for given centroids on both of Triton's paths, blocks in turn, on a GPU.
A row has the time in chunks over that as a whole; the file ends up with the cells of the cosines, B·(B+N+K),
at which it falls below 1 for good, between neighbours on logarithmic scales.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from contenders import DTYPES, MARGINS, OURS, TAU, Case, make_views
from measure import Clock, columns
from report import Results

from clusterns import functional
from clusterns.objective.problem import Batch, Clusters, Options

PATHS = {"whole": "triton", "chunks": "triton-chunked"}


def crossing(rows: list[dict]) -> float | None:
    """Cells at which chunks become the faster path and stay it; None if they do not cross."""
    points = [(math.log(row["cells"]), math.log(row["ratio_chunks"])) for row in rows]
    points.sort(reverse=True)
    for (more, low), (fewer, high) in itertools.pairwise(points):
        if low >= 0:
            break
        if high >= 0:
            return round(math.exp(fewer + (more - fewer) * high / (high - low)))
    return None


def measure(results: Results, clock: Clock, case: Case) -> None:
    """The row of a size, and where the paths of its dtype cross as far as is known."""
    torch.set_float32_matmul_precision(case.precision)
    views, options = make_views(case, clock.device), Options(false_negatives="bml", **MARGINS)
    batch = Batch(*views[:2], None, TAU, Clusters(None, views.centers), options)
    upstream = torch.ones((), device=clock.device)

    def run(path: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(functional.objective(batch, path).loss, views.leaves(), upstream)

    with mock.patch.object(functional, "choose_backend", lambda path, *given: path):
        whole, chunks = clock.samples([clock.timer(partial(run, path)) for path in PATHS.values()])
    ratios = [theirs / ours for theirs, ours in zip(chunks, whole, strict=True)]
    row = columns("whole_us", whole) | columns("chunks_us", chunks) | columns("ratio_chunks", ratios)
    row["cells"] = case.batch * (case.batch + case.negatives + case.clusters)
    results.add({"contender": OURS, **case.columns(), "status": "ok", "note": "", **row})
    same = {name: value for name, value in case.columns().items() if name != "B"}
    cells = crossing([each for each in results.rows if same.items() <= each.items()])
    shown = "not in these sizes" if cells is None else f"{cells} cells, B = {math.isqrt(cells)}"
    results.machine[f"crossover {' '.join(map(str, same.values()))}"] = shown
    results.write()
    print(f"crossover {same['dtype']} D={case.dim}: {shown}", flush=True)


def stages(wanted: argparse.Namespace, results: Results, clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do: a size a stage."""
    if not (results.on_gpu or wanted.list):
        raise SystemExit("crossover: expected a GPU, there is none; --list shows what would be measured")
    cases = [
        Case("objective", batch, dim, wanted.clusters, DTYPES[dtype], wanted.precision)
        for dtype in wanted.dtype
        for dim in wanted.dim
        for batch in wanted.batch
    ]
    return [(f"crossover {case}", partial(measure, results, clock, case)) for case in cases]
