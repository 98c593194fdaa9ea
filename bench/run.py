"""What a step costs beside its rivals, on a CPU or a GPU: parity first, then time and memory, in one run.

    python bench/run.py                                  the published table of a CPU (`make bench`)
    python bench/run.py step --batch 256 --dim 768       a whole training step, ours beside eager torch
    python bench/run.py objective --batch 64 --dim 384   the objective for given centroids
    python bench/run.py step --batch 256 64 16384 --before ../old    beside another checkout of this package
    python bench/run.py plain | both | large | k-means | evaluate [--seconds 480 --output DIR]
    python bench/run.py exactness | training | host | tiles | crossover    the question of that file

Without sizes a question has its own list, the most important figures first, ours and eager before any other
(--list prints it). Every row is on disk as soon as it is measured; what does not fit the budget, or comes
after an interrupt, is listed as skipped. A row that fails says so and the run goes on. Status 1: a row of
ours failed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import corpus
import torch
from contenders import BF16, DTYPES, FP16, FP32, KINDS, Case, rivals
from harness import BEFORE, Bench, LostDevice
from measure import Clock, clock_of
from report import OURS, ROOT, Results, machine, short

Item = tuple[Case, str]
Stage = tuple[str, Callable[[], None]]


# --- what is measured --------------------------------------------------------------------------------------


def items(cases: Iterable[Case], names: Sequence[str] | None = None) -> Iterator[Item]:
    """Every contender in every case, by default all there are."""
    for case in cases:
        for name in rivals(case.kind) if names is None else names:
            yield case, name


def kinds_of(what: str) -> tuple[str, ...]:
    """Kinds of cases that a question with sizes is about."""
    return ("step", "plain", "both") if what == "large" else (what,)


def chosen(wanted: argparse.Namespace) -> Iterator[Item]:
    """The sizes of the command line."""
    names = wanted.contenders
    if names is None:
        names = ["eager", BEFORE] if wanted.before else ["eager"]
    for dtype in wanted.dtype:
        for dim in wanted.dim:
            shape = (dim, wanted.clusters, DTYPES[dtype], wanted.precision)
            cases = [Case(kind, batch, *shape) for batch in wanted.batch for kind in kinds_of(wanted.what)]
            yield from items(cases, [OURS, *names])


def step_design() -> Iterator[Item]:
    """On a GPU: small batches, the most important first."""
    headline, plain = ([Case(kind, 512, dtype=dtype) for dtype in (BF16, FP32)] for kind in ("step", "plain"))
    sweep = [Case("step", 64 * 2**each, dtype=dtype) for dtype in (BF16, FP32) for each in range(7)]
    shapes = {"dtype": FP32, "precision": "high"}, {"dtype": FP16}, {"dim": 384}, {"dim": 1024}
    sweep += [Case("step", 512, **shape) for shape in shapes]
    yield from items([*headline, *plain], (OURS, "eager"))
    yield from items(headline, ("published", "torch.compile"))
    yield from items(plain)
    yield from items(sweep, (OURS, "eager", "published"))
    yield from items(headline[:1], ("clusterns torch",))
    yield from items(sweep[:7], ("torch.compile",))


def large_design() -> Iterator[Item]:
    """On a GPU: how near to the matrix rate, in how much memory, beside whom? 65,536 rows first."""
    sizes = (65536, 8192, 262144, 4096, 16384, 32768, 131072)
    triples = [(Case("step", size), Case("plain", size), Case("both", size)) for size in sizes]
    for number, (step, *others) in enumerate(triples):
        ours = (OURS, "clusterns 256 MiB")
        yield from items([step, replace(step, dominant=0.9)], ours if number < 3 else ours[:1])
        yield from items(others, (OURS,))
        yield from items([step, *others], ("eager",))
    for step, *others in triples:
        yield from items([step], ("torch.compile", "clusterns torch"))
        yield from items(others)


def design(wanted: argparse.Namespace) -> list[Item]:
    """What to measure, each once."""
    on_gpu, what = wanted.device == "cuda", wanted.what
    small, large = ((256, 768), (64, 384)), (32768, 256)
    if wanted.batch:
        found = chosen(wanted)
    elif what is None:
        sizes = itertools.product((small[0], large), ("objective", "plain"))
        found = items([*(Case(kind, *size, dtype=FP32) for size, kind in sizes), *corpus.CASES])
    elif on_gpu and what in ("step", "large"):
        found = step_design() if what == "step" else large_design()
    elif what in ("k-means", "evaluate"):
        found = items(case for case in corpus.CASES if case.kind.startswith(what))
    else:
        sizes = itertools.product([large] if what == "large" else small, kinds_of(what))
        found = items(Case(kind, *size, dtype=FP32) for size, kind in sizes)
    return list(dict.fromkeys(found))


def stages_of(wanted: argparse.Namespace, results: Results, clock: Clock) -> list[Stage]:
    """All there is to do, by name."""
    if wanted.what in OWN_SIZES:
        return import_module(wanted.what).stages(wanted, results, clock)
    large = wanted.what == "large"
    bench = Bench(results, clock, graphs=results.on_gpu and not large, before=wanted.before)
    stages = [(f"{name} {case}", partial(bench.measure, case, name)) for case, name in design(wanted)]
    if large:
        stages.insert(0, ("matrix rate", bench.matrix_rate))
    return stages


def run_all(todo: list[Stage], results: Results, deadline: float) -> bool:
    """Measure until the deadline or an interrupt, and skip the rest by name.

    Returns whether no stage broke off by itself.
    """
    ends = (signal.SIGINT, signal.SIGTERM)
    for each in ends:  # a shell may have handed INT down as ignored
        signal.signal(each, signal.default_int_handler)
    reason, well = "time budget", True
    try:
        while todo and time.monotonic() < deadline:
            name, stage = todo[0]
            try:
                stage()
            except LostDevice:
                raise
            except Exception as error:  # what comes next does not depend on it
                well = False
                results.skip([name], f"failed, {short(error)}")
            todo.pop(0)
    except KeyboardInterrupt:
        reason = "interrupted"
    except LostDevice as error:
        reason, well = f"the device was lost: {error}", False
        todo.pop(0)
    for each in ends:  # the report is short
        signal.signal(each, signal.SIG_IGN)
    results.skip([name for name, _ in todo], reason)
    return well


SIZED = ["step", "objective", "plain", "both", "large", "k-means", "evaluate"]
CROSSING = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
# Questions of files of their own: sizes unless others are given, and no time budget.
OWN_SIZES: dict[str, dict[str, object]] = {
    "crossover": {"batch": CROSSING, "dtype": ["bfloat16", "float32"]},
    "exactness": {"batch": [64, 300, 1024, 4096], "dtype": list(DTYPES)},
    "host": {"batch": [512]},
    "tiles": {"batch": [256, 512, 2048], "dtype": ["bfloat16", "float32"]},
    "training": {"batch": [128, 256, 1024, 4096], "dim": [384], "clusters": 64, "rounds": 3, "steps": 15},
}


def command_line() -> argparse.Namespace:
    """What is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", nargs="?", choices=[*SIZED, *OWN_SIZES], help="without one: the published table of a CPU")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, help="time budget, default 480, none for the table and a file's question")
    add("--output", type=Path, default=ROOT / "runs" / "bench", help="folder, default runs/bench")
    add("--batch", type=int, nargs="+", help="rows B; training: of the trainers, then of the memory")
    add("--dim", type=int, nargs="+", help="D, default 768; training: width of the encoder")
    add("--clusters", type=int, help="K, default 128")
    add("--dtype", choices=list(DTYPES), nargs="+", help="default float32")
    add("--precision", choices=["highest", "high", "medium"], default="highest")
    add("--contenders", nargs="*", help="beside ours, default eager (and before)")
    add("--before", type=Path, help="another checkout of this package to measure beside this one")
    add("--rounds", type=int, help="most rounds of a comparison")
    add("--layers", type=int, default=6, help="training: of the encoder, default %(default)s")
    add("--steps", type=int, help="training: steps of each trainer, default 15")
    add("--list", action="store_true", help="print what would be measured, and end")
    wanted = parser.parse_args()
    if wanted.batch and wanted.what in (None, "k-means", "evaluate"):
        parser.error(
            f"--batch: expected with another question, {wanted.what or 'the table'} has its own sizes"
        )
    known = [name for kind in kinds_of(wanted.what) for name in KINDS.get(kind, {})] + [BEFORE]
    unknown = [name for name in wanted.contenders or [] if name not in known]
    if unknown:
        expected = ", ".join(dict.fromkeys(known))
        parser.error(f"--contenders: expected of {expected}, got {', '.join(unknown)}")
    own = OWN_SIZES.get(wanted.what, {})
    usual = {"dim": [768], "clusters": 128, "dtype": ["float32"], **own}
    usual["seconds"] = math.inf if own or wanted.what is None else 480.0
    for name, value in usual.items():
        if getattr(wanted, name) is None:
            setattr(wanted, name, value)
    return wanted


def main() -> int:
    """Measure, write, print."""
    wanted = command_line()
    deadline = time.monotonic() + wanted.seconds
    on_gpu = wanted.device == "cuda"
    settings = {"rounds": 7, "seconds": 0.3} if wanted.what == "large" else {"rounds": 25, "seconds": 0.6}
    if not on_gpu:
        settings = {"rounds": 200, "seconds": 4.0, "block_seconds": 5e-3}
    settings["rounds"] = wanted.rounds or settings["rounds"]
    # A list of what a GPU would do needs none.
    clock = Clock() if wanted.list else clock_of(wanted.device, **settings)
    found = {} if wanted.list else machine()
    results = Results(wanted.output, found, wanted.what or "", on_gpu=on_gpu)
    stages = stages_of(wanted, results, clock)
    if wanted.list:
        print("\n".join(name for name, _ in stages))
        return 0
    well = run_all(stages, results, deadline)
    results.summary()
    return 0 if well and results.ours_are_right() else 1


if __name__ == "__main__":
    sys.exit(main())
