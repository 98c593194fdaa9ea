"""How near to the matrix rate of the chip is a large batch, and in how much memory?

    python bench/gpu_large_batch.py --output DIR [--seconds 300]     on a GPU
    python bench/gpu_large_batch.py --arithmetic                     expected figures, measured by nobody
    TRITON_INTERPRET=1 python bench/gpu_large_batch.py --device cpu  the machinery at tiny sizes

bf16, D = 768, K = 128, forward and backward, B = 4,096 to 262,144 and once 1,048,576: ours first, then where
the fused and the chunked regime cross, the assignment of a million points, and last the rivals, each up to
the size that fits memory and time. Losses and gradients are held against float64 (our torch path, which
`exactness.py` holds against the reference) before anything is timed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_contenders import CONTENDERS, OURS, Case
from gpu_large_measure import LargeBench, Sizes
from gpu_measure import LostDevice, short
from gpu_plot import plot_large
from gpu_results import Results, line
from gpu_step import TimeIsUp, on_terminate
from gpu_timing import CudaStopwatch, Stopwatch
from machine import machine

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


def stages(bench: LargeBench, sizes: Sizes) -> list[tuple[str, Callable[[], None]]]:
    """Name and work of everything to measure, the most important first."""
    cases = [
        Case(kind, batch, sizes.dim, sizes.clusters) for batch in sizes.batches for kind in ("step", "plain")
    ]
    todo: list[tuple[str, Callable[[], None]]] = [("matrix rate", bench.matrix_rate)]
    todo += [(f"{OURS} {case}", lambda case=case: bench.measure(case, OURS)) for case in cases]
    todo.append((f"once B={sizes.once[0]}", bench.measure_once))
    todo += [(f"crossover B={each}", lambda each=each: bench.crossover(each)) for each in sizes.crossover]
    todo.append(("assignment", bench.assignment))
    rivals = {
        "step": ("eager step", "torch.compile", "clusterns backend=torch"),
        "plain": ("eager", "Inf-CL", "Liger", "cut-cross-entropy", "torch.compile", "linear_cross_entropy"),
    }
    for case in cases:
        for name in rivals[case.kind]:
            todo.append((f"{name} {case}", lambda case=case, name=name: bench.measure(case, name)))
        if case.kind == "plain":
            other = Case("other loss", case.batch, sizes.dim, sizes.clusters)
            for name in CONTENDERS["other loss"]:
                todo.append((f"{name} {other}", lambda case=other, name=name: bench.measure(case, name)))
    return todo


def run_all(todo: list[tuple[str, Callable[[], None]]], results: Results, deadline: float) -> bool:
    """Measure until the deadline, skip the rest by name; returns whether the device is still there."""
    reason, alive = "time budget", True
    try:
        while todo and time.monotonic() < deadline:
            todo.pop(0)[1]()
    except TimeIsUp:
        reason = "the process was asked to end"
    except LostDevice as error:
        reason, alive = f"the device was lost: {error}", False
    for name, _ in todo:
        results.skip(name, reason)
    return alive


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu")
    parser.add_argument("--seconds", type=float, default=300.0, help="time budget")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--arithmetic", action="store_true", help="print expected figures and end")
    return parser.parse_args()


def main() -> int:
    """Measure, write, print."""
    wanted = arguments()
    on_gpu = wanted.device == "cuda"
    sizes = Sizes() if on_gpu else TINY
    if wanted.arithmetic:
        print(arithmetic(Sizes()))
        return 0
    if on_gpu and not torch.cuda.is_available():
        print("No GPU is available here: nothing was measured. --device cpu runs the machinery on the CPU.")
        return 2
    deadline = time.monotonic() + wanted.seconds
    signal.signal(signal.SIGTERM, on_terminate)
    short_samples = {"rounds": 7, "seconds": 0.3} if on_gpu else {"block_seconds": 1e-4, "rounds": 1}
    watch = (CudaStopwatch if on_gpu else Stopwatch)(**short_samples)
    found = machine(gpu=True) | {"command": " ".join(sys.argv), "timed with": watch.label}
    results = Results(wanted.output, found, on_gpu=on_gpu, suffix="-large")
    if not on_gpu:
        print("CPU run: it checks the machinery at tiny sizes. These are not GPU figures.")
    alive = run_all(stages(LargeBench(results, watch, sizes, deadline), sizes), results, deadline)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    results.write()
    title = f"{found['gpu']}, torch {torch.__version__}, commit {found['commit']}"
    try:
        path = wanted.output / f"{results.stem}.png"
        plot_large(results.rows, path, title if on_gpu else f"CPU MACHINERY CHECK, {title}")
    except Exception as error:  # the figures are on disk; a picture less must not hide them
        print(f"no plot: {short(error)}")
    print("\n== large batches: microseconds, peak memory, achieved rate")
    print("\n".join(line(row, short=True) for row in results.rows))
    print("\n".join(f"skipped {each}" for each in results.skipped))
    print(f"matrix rate: {found.get('matrix rate')}")
    if on_gpu:
        print(arithmetic(sizes))
    ours = [row for row in results.rows if row["contender"] == OURS]
    return 0 if alive and ours and all(row["status"] == "ok" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
