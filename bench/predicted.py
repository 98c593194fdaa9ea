"""How long may a training step of a large batch take on an H100? A model; no figure of it is measured.

    python bench/audit.py --large [--output bench/results/large-predicted.csv]

For B of `BATCHES`, D = 768, K = 128, bfloat16, the margin loss, clusters of one size and a workspace of
1 GiB: the launches of the library, recorded on tensors without storage, and how many programs fit a
multiprocessor, read off their code for sm_90. A launch takes 3.5 µs and the longer of its bytes at 3.0 TB/s
and, for each group of programs, waves · (steps + 1) · the longer of 800 cycles and a step's operations at
790 TFLOP/s, and 15 instructions for each element of a product once it is there (counted in the first
product's code: 1,984 for 128 a thread, loop included). Loops over cluster-mates have n_k = B/K of them.
Products 2 and 3 are the vendor's: operations at 790 TFLOP/s, or their bytes. Left out: what torch does once a
batch (sorting, copies in cluster order, norms).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import audit
import torch
from report import machine, write_csv
from torch import Tensor

from clusterns.kernels import cosine_launchers, launch
from clusterns.kernels.launch import cdiv
from clusterns.kernels.target import Target, assume
from clusterns.objective import triton_products
from clusterns.objective.problem import Batch, Clusters, Options
from clusterns.objective.sweep import sweep

BATCHES, DIM, CLUSTERS, WORKSPACE = (8192, 65536, 262144), 768, 128, 2**30
RATE = audit.RATES["bf16"]
CYCLES_PER_ELEMENT = 15 / 128  # four warps issue an instruction each in a cycle
COLUMNS = """B chunk_rows chunks kernel launches programs programs_per_multiprocessor waves bytes operations
predicted_us predicted_ms""".split()
HEAD = """# bench/audit.py --large: predictions for an H100, nothing is measured; predicted.py has the model
# D = {dim}, K = {clusters}, bfloat16, bml, clusters of one size, workspace {workspace} MiB
# triton {triton}, commit {commit}
# predicted_us is of one launch, predicted_ms of all; floor: 6·B²·D operations at 790 TFLOP/s
"""


class Work(NamedTuple):
    """What a launch has to do."""

    groups: list[tuple[int, float]]  # programs, and steps of a loop in each
    operations: float
    bytes: float
    elements: float = 0.0  # of products that a program finishes


def record(batch: int) -> list[launch.Launch | launch.Operation]:
    """A step's launches, and the vendor's products."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        launch.recorded([launch.Operation(triton_products._accumulate, {"out": out, "a": a, "b": b})])

    x, y, ids = meta(batch, DIM), meta(batch, DIM), meta(batch, dtype=torch.int64)
    centroids = meta(CLUSTERS, DIM, dtype=torch.float32)
    options = Options(false_negatives="bml", workspace_bytes=WORKSPACE)
    with launch.recording() as recorded, mock.patch.object(triton_products, "_accumulate", product):
        cosine_launchers.cluster_sums(x, centroids)  # the update; then the assignment anew
        cosine_launchers.nearest_centroids(x, centroids)
        given = Batch(x, y, None, 0.05, Clusters(ids, centroids, ids), options)
        sweep(given, (True, True, False, False), "triton-chunked")
    return recorded


def work_of(this: launch.Launch | launch.Operation, batch: int) -> Work:
    """By kernel; R rows, n columns, m cluster-mates."""
    if isinstance(this, launch.Operation):
        (rows, length), columns = this.arguments["a"].shape, this.arguments["b"].shape[1]
        moved = 2 * length * (rows + columns) + 8 * rows * columns
        return Work([], 2.0 * rows * length * columns, moved)
    name, given, tiles = this.kernel.__name__, this.arguments, this.tiles.blocks
    m, programs, size = batch // CLUSTERS, math.prod(this.grid), 2
    rows, columns = given.get("num_rows", 0), given.get("num_columns", 0)
    height, width = tiles.get("BLOCK_M", 0), tiles.get("BLOCK_N", 0)
    along = cdiv(DIM, tiles["BLOCK_D"])
    if name == "weights_kernel":
        count = cdiv(rows, height) * cdiv(columns, width)
        each, of_y = cdiv(count, programs), given["y_ptr"].itemsize
        moved = DIM * (size * rows + of_y * columns) + rows * columns * (size + 4 / width)
        terms = 3 if of_y == 4 else 1
        return Work([(programs, each * along)], 2.0 * terms * count * height * width * DIM, moved,
                    each * height * width)  # fmt: skip
    if name == "assignment_kernel":
        steps = along * (1 + cdiv(given["num_centroids"], width))
        moved = size * DIM * rows + 28 * rows
        return Work([(programs, steps)], 4.0 * rows * given["num_centroids"] * DIM, moved, height * width)
    if name == "gather_kernel":  # a tile of rows meets the columns of all clusters that it has rows of
        blocks = ((m + height) / width + 1) / this.grid[1]
        moved = size * DIM * (4 * rows + m) + rows * m
        return Work([(programs, along * (2 + blocks))], 2 * programs * blocks * height * width * DIM, moved,
                    blocks * height * width)  # fmt: skip
    if name == "margins_kernel":
        of_rows, met = cdiv(rows, height) * along, cdiv(rows + m, height) * along
        at_once = min(met, programs - of_rows)  # of those that have mates; the others end as they begin
        steps = (m + height) / width + 1, cdiv(met, at_once) * ((min(m, rows) + height) / width + 1)
        groups = [(of_rows, steps[0]), (at_once, steps[1]), (programs - of_rows - at_once, 1)]
        done = sum(count * steps for count, steps in groups[:2])
        moved = 2 * rows * m + DIM * (size * (2 * rows + m) + 8 * (2 * rows + m))
        return Work(groups, 2.0 * done * height * width * tiles["BLOCK_D"], moved, height * tiles["BLOCK_D"])
    if name == "settle_kernel":
        steps = cdiv(given["num_parts"], width) + along
        return Work([(programs, steps)], 0.0, rows * (4 * given["num_parts"] + 2 * size * DIM))
    if name == "finish_kernel":
        return Work([(programs, 2 * along)], 0.0, rows * DIM * (4 + 3 * size))
    if name == "member_sums_kernel":
        steps = tiles["BLOCK_CHUNK"] / tiles["BLOCK_B"] + 1
        return Work([(programs, steps)], 0.0, DIM * (size * batch + 4 * given["parts_ptr"].shape[0]))
    parts = cdiv(m, tiles["BLOCK_CHUNK"]) + 1
    return Work([(programs, cdiv(parts, tiles["BLOCK_B"]))], 0.0, 4 * DIM * given["parts_ptr"].shape[0])


def name_of(this: launch.Launch | launch.Operation) -> str:
    """The kernel, and which of its uses."""
    if isinstance(this, launch.Operation):
        turned = this.arguments["a"].stride(0) == 1
        return f"product {3 if turned else 2}, the vendor's"
    of = " of centroids" * this.constants.get("HAS_USES", False)
    of += " of positives" * (not this.constants.get("HAS_SCALE", True))
    return this.kernel.__name__ + of


def predict(this: launch.Launch | launch.Operation, fitting: int, batch: int) -> dict[str, Any]:
    """Columns of a launch, of whose programs `fitting` fit a multiprocessor."""
    work = work_of(this, batch)
    seconds = max(work.operations / RATE, work.bytes / audit.BANDWIDTH)
    row: dict[str, Any] = {"bytes": round(work.bytes), "operations": round(work.operations)}
    if work.groups:
        programs = sum(count for count, _ in work.groups)
        side_by_side = min(fitting, cdiv(programs, audit.MULTIPROCESSORS))
        steps = sum(count * each for count, each in work.groups)
        of_a_step = side_by_side * work.operations / steps / RATE * audit.MULTIPROCESSORS * audit.CLOCK
        chain = sum(
            math.ceil(count / audit.MULTIPROCESSORS / fitting) * (each + 1) for count, each in work.groups
        )
        waves = math.ceil(programs / audit.MULTIPROCESSORS / fitting)
        finishing = waves * side_by_side * work.elements * CYCLES_PER_ELEMENT
        cycles = chain * max(audit.STEP_CYCLES, of_a_step) + finishing
        seconds = max(seconds, cycles / audit.CLOCK)
        row |= {"programs": programs, "programs_per_multiprocessor": fitting, "waves": waves}
    return row | {"predicted_us": round(audit.LAUNCH_US + 1e6 * seconds, 1)}


def rows_of(batch: int, fitting: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a step, as in its first chunk, then the sum and the floor."""
    found: dict[str, dict[str, Any]] = {}
    chunk, total = 0, 0.0
    for this in record(batch):
        name = name_of(this)
        key = f"{name} {getattr(this, 'constants', '')} {getattr(this, 'tiles', '')}"
        if isinstance(this, launch.Launch) and key not in fitting:
            built = audit.compile_launch(this, "sm_90")
            used = audit.read_cubin(built)[1]["registers"], this.tiles.num_warps, built.metadata.shared
            fitting[key] = audit.programs_per_multiprocessor(*used)
        elif name.startswith("product 2"):
            chunk = max(chunk, len(this.arguments["a"]))
        row = predict(this, fitting.get(key, 0), batch)
        first = found.setdefault(key, {"kernel": name, "launches": 0, **row, "predicted_ms": 0.0})
        first["launches"] += 1
        first["predicted_ms"] += row["predicted_us"] / 1e3
        total += row["predicted_us"] / 1e3
    floor = 6e3 * batch**2 * DIM / RATE
    ends = [{"kernel": "sum", "predicted_ms": total}, {"kernel": "floor", "predicted_ms": floor}]
    for row in [*found.values(), *ends]:
        ms = round(row["predicted_ms"], 3)
        yield {"B": batch, "chunk_rows": chunk, "chunks": cdiv(batch, chunk), **row, "predicted_ms": ms}


def main(output: Path | None) -> int:
    """Print and write the table."""
    rows, fitting = [], {}
    with assume(Target("cuda", 90)):
        for batch in BATCHES:
            for row in rows_of(batch, fitting):
                print("  ".join(f"{name} {row.get(name, '')}" for name in COLUMNS), flush=True)
                rows.append(row)
    if output is not None:
        sizes = {"dim": DIM, "clusters": CLUSTERS, "workspace": WORKSPACE // 2**20}
        write_csv(output, COLUMNS, rows, HEAD.format(**machine(), **sizes))
    return 0
