"""The GPU benchmark in one command: `python bench/gpu_step.py --output DIR [--seconds N]`.

The most important figures come first, ours and eager before any other. Every row is on disk as soon as it is
measured; what does not fit the budget, or comes after an interrupt, is listed as skipped. `--device cpu` runs
the same machinery at tiny sizes, whose figures say nothing about a GPU. A row that fails says so and the run
goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from gpu_contenders import CONTENDERS, OURS, Case
from gpu_measure import Bench, Stage, parser, prepare, run_all
from gpu_plot import plot
from gpu_training_step import Shape, measure_training

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


def design() -> Iterator[Item]:
    """What is measured, the most important first."""
    headline = [Case("step", 512, dtype=dtype) for dtype in (BF16, FP32)]
    plain = [Case("plain", 512, dtype=dtype) for dtype in (BF16, FP32)]
    yield from items(headline, (EAGER,))
    yield None, "training step", ()
    yield from items(plain, ("eager",))
    yield from items(headline, (PUBLISHED, COMPILED))
    yield from items(plain, ("sentence-transformers", "linear_cross_entropy"))
    for dtype in (BF16, FP32):
        cases = [Case("step", batch, dtype=dtype) for batch in (256, 1024, 128, 64)]
        yield from items(cases, (EAGER, PUBLISHED))
    yield from items([Case("step", 512, dtype=FP32, precision="high")], (EAGER, PUBLISHED))
    yield from items([Case("step", 512, dtype=FP16)], (EAGER, PUBLISHED))
    shapes = [{"dim": 384}, {"dim": 1024}, {"clusters": 96}, {"clusters": 512}]
    yield from items([Case("step", 512, **shape) for shape in shapes], (EAGER, PUBLISHED))
    for dtype in (BF16, FP32):  # our kernels try several tile shapes there, which is compiled first
        yield from items([Case("step", batch, dtype=dtype) for batch in (2048, 4096)], (EAGER, PUBLISHED))
    yield from items(headline[:1], (REPLAYED, TORCH), BOTH)
    yield from items(plain[:1], (COMPILED,), BOTH)
    yield from items([Case("plain", batch) for batch in (2048, 128, 4096)], ("eager",), BOTH)
    yield from items([Case("step", batch) for batch in (256, 2048, 1024, 128)], (COMPILED,), BOTH)
    yield from items(plain[1:], (COMPILED,), BOTH)
    for case in plain:
        yield from items([case], FOREIGN, BOTH)


def tiny_design() -> Iterator[Item]:
    """Every kind of item at sizes for a CPU."""
    small = {"dim": 64, "clusters": 8}
    steps = [Case("step", batch, dtype=dtype, **small) for dtype in (FP32, BF16) for batch in (16, 32)]
    plain = [Case("plain", 32, dtype=dtype, **small) for dtype in (FP32, BF16)]
    yield from items(steps, (EAGER,))
    yield None, "training step", ()
    yield from items(steps, (PUBLISHED, TORCH))
    yield from items(plain, tuple(CONTENDERS["plain"])[1:], BOTH)
    yield from items(steps[:1], (COMPILED,))


def stages(todo: Iterable[Item], bench: Bench, shape: Shape) -> list[Stage]:
    """Name and work of each, those that come twice once."""
    chosen: dict[tuple[Case | None, str], tuple[str, ...]] = {}
    for case, name, whats in todo:
        chosen.setdefault((case, name), whats)
    return [
        (f"{name} {case}", partial(bench.measure, case, name, whats))
        if case
        else (name, partial(measure_training, bench.results, bench.watch, shape))
        for (case, name), whats in chosen.items()
    ]


def main() -> int:
    """Measure, write, print."""
    wanted = parser(__doc__.splitlines()[0], 480.0).parse_args()
    deadline = time.monotonic() + wanted.seconds
    watch, results = prepare(wanted, "", {}, {"block_seconds": 5e-4, "rounds": 5, "seconds": 0.2})
    shape = Shape() if results.on_gpu else Shape(batch=8, tokens=8, layers=1, hidden=32, clusters=4)
    todo = design() if results.on_gpu else tiny_design()
    alive = run_all(stages(todo, Bench(results, watch), shape), results, deadline)
    results.summary()
    print(f"\nwritten to {wanted.output}", flush=True)
    results.draw(plot)  # last: it takes seconds, which an interrupt may not leave
    return 0 if alive and results.ours_are_right() else 1


if __name__ == "__main__":
    sys.exit(main())
