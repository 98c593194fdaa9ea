"""How near to the matrix rate of the chip is a large batch, and in how much memory?

    python bench/gpu_large_batch.py --output DIR [--seconds 300]     on a GPU
    python bench/gpu_large_batch.py --arithmetic                     expected figures, measured by nobody
    TRITON_INTERPRET=1 python bench/gpu_large_batch.py --device cpu  the machinery at tiny sizes

bf16, D = 768, K = 128, forward and backward, B = 4,096 to 262,144 and once 1,048,576: ours and eager torch
first, then where the fused and the chunked regime cross, the assignment of a million points, and last the
rivals, each up to the size that fits memory and time. Losses and gradients are held against float64 (our
torch path, which `exactness.py` holds against the reference) before anything is timed.
"""

from __future__ import annotations

import sys
import time
from functools import partial

from gpu_contenders import CONTENDERS, OURS, Case
from gpu_large_measure import LargeBench, Sizes
from gpu_measure import Stage, parser, prepare, run_all
from gpu_plot import plot_large
from gpu_results import line

MIB = 2**20
RATES = {"989 (datasheet, dense bf16)": 989e12, "750": 750e12, "600": 600e12}
TINY = Sizes(
    batches=(16, 40), dim=16, clusters=8, workspace_bytes=5000, once=(48, 6000), crossover=(16,),
    assignment=(64, 16), products=((64, 64, 128),), backend="triton",
)  # fmt: skip


def arithmetic(sizes: Sizes) -> str:
    """Floor of time, traffic of the weights E and memory, computed from sizes alone."""
    lines = [
        f"ARITHMETIC, NOT MEASURED: bf16, D={sizes.dim}, K={sizes.clusters}; floor = 6·B²·D over the rate "
        "(H100 and H200 SXM alike)",
        f"{'B':>9} {'operations':>11} "
        + " ".join(f"{'ms at ' + name:>30}" for name in RATES)
        + f" {'rows/chunk':>10} {'E written':>10} {'read':>10} {'MiB above':>10}",
    ]
    for batch, workspace in [(each, sizes.workspace_bytes) for each in sizes.batches] + [sizes.once]:
        row_bytes = 28 * sizes.dim + 2 * batch + 4 * sizes.clusters + 4 * (batch // 128)
        rows = min(batch, max(1, workspace // row_bytes))
        rows -= rows % 128 if rows > 128 else 0
        weights = 2 * rows * batch / MIB
        operations = 6 * batch**2 * sizes.dim
        times = " ".join(f"{operations / rate * 1e3:30.2f}" for rate in RATES.values())
        # A chunk, and the float32 sum of the positives' gradient (B, D).
        above = (rows * row_bytes + 4 * batch * sizes.dim) / MIB
        lines.append(
            f"{batch:9,} {operations:11.2e} {times} {rows:10,} {weights:6.0f} MiB {2 * weights:6.0f} MiB "
            f"{above:10.0f}"
        )
    lines.append(
        "E written and read: per chunk, once as the first product leaves it, twice by the other two;"
    )
    lines.append("MiB above: inputs and gradients, one chunk and a float32 (B, D) sum.")
    return "\n".join(lines)


def stages(bench: LargeBench, sizes: Sizes) -> list[Stage]:
    """Name and work of everything to measure, the most important first."""
    shape = (sizes.dim, sizes.clusters)
    cases = [Case(kind, batch, *shape) for batch in sizes.batches for kind in ("step", "plain")]
    rivals = {
        "step": ("torch.compile", "clusterns backend=torch"),
        "plain": ("Inf-CL", "Liger", "cut-cross-entropy", "torch.compile", "linear_cross_entropy"),
    }

    def each(case: Case, *names: str) -> list[Stage]:
        return [(f"{name} {case}", partial(bench.measure, case, name)) for name in names]

    todo: list[Stage] = [("matrix rate", bench.matrix_rate)]
    for case in cases:
        todo += each(case, OURS, "eager step" if case.kind == "step" else "eager")
    todo.append((f"once B={sizes.once[0]}", bench.measure_once))
    todo += [(f"crossover B={batch}", partial(bench.crossover, batch)) for batch in sizes.crossover]
    todo.append(("assignment", bench.assignment))
    for case in cases:
        todo += each(case, *rivals[case.kind])
        if case.kind == "plain":
            todo += each(Case("other loss", case.batch, *shape), *CONTENDERS["other loss"])
    return todo


def main() -> int:
    """Measure, write, print."""
    command_line = parser(__doc__.splitlines()[0], 300.0)
    command_line.add_argument("--arithmetic", action="store_true", help="print expected figures and end")
    wanted = command_line.parse_args()
    deadline = time.monotonic() + wanted.seconds
    if wanted.arithmetic:
        print(arithmetic(Sizes()))
        return 0
    short_samples = {"rounds": 7, "seconds": 0.3}, {"block_seconds": 1e-4, "rounds": 1}
    watch, results = prepare(wanted, "-large", *short_samples)
    sizes = Sizes() if results.on_gpu else TINY
    alive = run_all(stages(LargeBench(results, watch, sizes, deadline), sizes), results, deadline)
    print("\n== large batches: microseconds, peak memory, achieved rate")
    print("\n".join(line(row, short=True) for row in results.rows))
    print("\n".join(f"skipped {each}" for each in results.skipped))
    print(f"matrix rate: {results.machine.get('matrix rate')}")
    if results.on_gpu:
        print(arithmetic(sizes))
    results.draw(plot_large)
    return 0 if alive and results.ours_are_right() else 1


if __name__ == "__main__":
    sys.exit(main())
