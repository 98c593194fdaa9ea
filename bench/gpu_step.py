"""The GPU benchmark in one command: `python bench/gpu_step.py --output DIR [--seconds N] [--quick]`.

The most important figures come first. Every row is on disk as soon as it is measured; what does not fit the
budget is listed as skipped. `--device cpu` runs the same machinery at tiny sizes, whose figures say nothing
about a GPU. A row that fails says so and the run goes on.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_contenders import CONTENDERS, OURS, Case
from gpu_measure import Bench, LostDevice, short
from gpu_plot import plot
from gpu_results import Results
from gpu_timing import CudaStopwatch, Stopwatch
from gpu_training_step import Shape, measure_training
from machine import machine

ALL = ("both", "forward", "backward")
BOTH = ("both",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPILED, REPLAYED = "torch.compile", "torch.compile reduce-overhead"
EAGER, PUBLISHED, TORCH = "eager step", "published step", "clusterns backend=torch"
# Their kernels are unknown to us: last, since a fault in one ends the run.
FOREIGN = ("pytorch-metric-learning", "Liger", "cut-cross-entropy", "Inf-CL")
Item = tuple[Case | None, str, tuple[str, ...]]  # no case: the BERT-base training step


def items(cases: list[Case], names: tuple[str, ...], whats: tuple[str, ...] = ALL) -> Iterator[Item]:
    """Every contender in every case, ours first in each."""
    for case in cases:
        for name in (OURS, *names):
            yield case, name, whats


def design(quick: bool) -> Iterator[Item]:
    """What is measured, the most important first."""
    headline = [Case("step", 512, dtype=dtype) for dtype in (BF16, FP32)]
    yield from items(headline, (EAGER, PUBLISHED, COMPILED))
    yield None, "training step", ()
    plain = [Case("plain", 512, dtype=dtype) for dtype in (BF16, FP32)]
    yield from items(plain, ("eager", "sentence-transformers", "linear_cross_entropy"))
    small, large = ((64,), (2048,)) if quick else ((256, 1024, 128, 64), (2048, 4096))
    sweep = (BF16,) if quick else (BF16, FP32)
    for dtype in sweep:
        yield from items([Case("step", batch, dtype=dtype) for batch in small], (EAGER, PUBLISHED))
    yield from items([Case("step", 512, dtype=FP32, precision="high")], (EAGER, PUBLISHED))
    yield from items([Case("step", 512, dtype=FP16)], (EAGER, PUBLISHED))
    if not quick:
        shapes = [{"dim": 384}, {"dim": 1024}, {"clusters": 96}, {"clusters": 512}]
        yield from items([Case("step", 512, **shape) for shape in shapes], (EAGER, PUBLISHED))
    for dtype in sweep:  # our kernels try several tile shapes there, which is compiled first
        yield from items([Case("step", batch, dtype=dtype) for batch in large], (EAGER, PUBLISHED))
    yield from items(headline[:1], (REPLAYED, TORCH), BOTH)
    yield from items(plain[:1], (COMPILED,), BOTH)
    if not quick:
        yield from items([Case("plain", batch) for batch in (2048, 128, 4096)], ("eager",), BOTH)
        yield from items([Case("step", batch) for batch in (256, 2048, 1024, 128)], (COMPILED,), BOTH)
        yield from items(plain[1:], (COMPILED,), BOTH)
    for case in plain:
        yield from items([case], FOREIGN, BOTH)


def tiny_design() -> Iterator[Item]:
    """Every kind of item at sizes for a CPU."""
    small = {"dim": 64, "clusters": 8}
    steps = [Case("step", batch, dtype=dtype, **small) for dtype in (FP32, BF16) for batch in (16, 32)]
    yield from items(steps, (EAGER, PUBLISHED, TORCH))
    yield None, "training step", ()
    yield from items(
        [Case("plain", 32, dtype=dtype, **small) for dtype in (FP32, BF16)],
        tuple(CONTENDERS["plain"])[1:],
        BOTH,
    )
    yield from items([Case("step", 32, dtype=FP32, **small)], (COMPILED,), ALL)


class TimeIsUp(BaseException):
    """The process was asked to end; not an `Exception`, which a failed row may be."""


def on_terminate(*_arguments) -> None:
    """End the measurements, not the report."""
    raise TimeIsUp


def run_all(todo: list[Item], bench: Bench, shape: Shape, deadline: float) -> bool:
    """Measure item by item until the deadline; whatever is left is skipped by name.

    Returns whether the device is still there.
    """
    done: set[tuple] = set()
    reason, lost = "time budget", False
    try:
        while todo and time.monotonic() < deadline:
            case, name, whats = todo[0]
            if case is None:
                measure_training(bench.results, bench.watch, shape)
            elif (case, name) not in done:  # ours stands first in every group of rivals
                bench.measure(case, name, whats)
            done.add((case, name))
            todo.pop(0)
    except TimeIsUp:
        reason = "the process was asked to end"
    except LostDevice as error:
        lost = True
        todo.pop(0)
        reason = f"the device was lost: {error}"
    except KeyboardInterrupt:
        reason = "interrupted"
    left = dict.fromkeys((case, name) for case, name, _ in todo)
    for case, name in left:
        if (case, name) not in done:
            bench.results.skip(f"{name} {case or ''}".strip(), reason)
    return not lost


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu")
    parser.add_argument("--seconds", type=float, default=480.0, help="time budget")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter samples")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def main() -> int:
    """Measure, write, print."""
    wanted = arguments()
    deadline = time.monotonic() + wanted.seconds
    signal.signal(signal.SIGTERM, on_terminate)
    on_gpu = wanted.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("No GPU is available here: nothing was measured. --device cpu runs the machinery on the CPU.")
        return 2
    samples = {"block_seconds": 5e-4, "rounds": 5, "seconds": 0.2} if wanted.quick else {}
    watch = CudaStopwatch(**samples) if on_gpu else Stopwatch(**samples)
    results = Results(wanted.output, machine(gpu=True) | {"command": " ".join(sys.argv)}, on_gpu=on_gpu)
    results.machine["timed with"] = watch.label
    if not on_gpu:
        print("CPU run: it checks the machinery at tiny sizes. These are not GPU figures.")
    shape = Shape() if on_gpu else Shape(batch=8, tokens=8, layers=1, hidden=32, clusters=4)
    todo = list(design(wanted.quick) if on_gpu else tiny_design())
    alive = run_all(todo, Bench(results, watch), shape, deadline)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the report is short
    results.write()
    title = f"{results.machine['gpu']}, torch {torch.__version__}, commit {results.machine['commit']}"
    try:
        plot(
            results.rows,
            wanted.output / f"{results.stem}.png",
            title if on_gpu else f"CPU MACHINERY CHECK, {title}",
        )
    except Exception as error:  # the figures are on disk; a picture less must not hide them
        print(f"no plot: {short(error)}")
    results.summary()
    print(f"\nwritten to {wanted.output}")
    ours = [row for row in results.rows if row["contender"] == OURS]
    return 0 if alive and ours and all(row["status"] == "ok" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
