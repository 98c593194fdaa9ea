"""What a step costs beside its rivals, on a CPU or a GPU: parity first, then time and memory, in one run.

    python bench/run.py step --batch 256 --dim 768       a whole training step, ours beside eager torch
    python bench/run.py objective --batch 64 --dim 384   the objective for given centroids
    python bench/run.py step --batch 256 64 16384 --before ../old    beside another checkout of this package
    python bench/run.py plain | large | assign | k-means | evaluate [--seconds 480 --output DIR]
    python bench/run.py exactness | training | data      the question of that file, which is a script too

Without sizes a question has its own list, the most important figures first, ours and eager before any other
(--list prints it). Every row is on disk as soon as it is measured; what does not fit the budget, or comes
after an interrupt, is listed as skipped. A row that fails says so and the run goes on. Status 1: a row of
ours failed.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import corpus
import parity
import torch
from contenders import DTYPES, KINDS, OURS, Built, Case, Contender, rivals
from measure import Clock, Elsewhere, Timer, available_bytes, clock_of, columns, in_a_process
from report import RESULTS, ROOT, Results, arithmetic, machine, output, short

BEFORE = "before"  # ours from another checkout
CHECKED_AT_MOST = {"cpu": 4096, "cuda": 2**18}  # rows of a loss at which parity is asked
CALL_SECONDS = {"cpu": 120.0, "cuda": 12.0}  # a longer call, judged by another batch, is left out
ALL, BOTH = ("both", "forward", "backward"), ("both",)
MEMORY_FROM = 16384  # rows from which a CPU's memory is measured, by a process for each
FP32, BF16, FP16 = DTYPES.values()
Item = tuple[Case | None, str, tuple[str, ...]]  # no case: the training step of BERT-base
Stage = tuple[str, Callable[[], None]]


class LostDevice(RuntimeError):
    """The device answers no more; whatever would come next would fail too."""


class Bench:
    """Measures contenders of one case at a time against ours in that case."""

    def __init__(
        self,
        results: Results,
        clock: Clock,
        deadline: float = math.inf,
        *,
        large: bool = False,  # rates, no graphs
        before: Path | None = None,
    ):
        self.results, self.clock, self.deadline = results, clock, deadline
        self.large, self.before = large, before
        self.device, self.on_gpu = clock.device.type, clock.device.type == "cuda"
        self.case: Case | None = None
        self.ours: Built | None = None  # what the others' times are compared with
        self.last: Built | None = None  # what was measured last
        self.rate: float | None = None  # operations a second
        self.took: dict[tuple, tuple[int, float]] = {}  # a contender's B and microseconds

    def matrix_rate(self) -> None:
        """The best rate of matrix products in bfloat16 (on a CPU float32), which fractions refer to."""
        shapes = [(8192, 768, 65536), (8192, 8192, 8192)] if self.on_gpu else [(1024, 1024, 1024)]
        rates = {each: self.clock.matrix_rate(*each, BF16 if self.on_gpu else FP32) for each in shapes}
        self.rate = max(rates.values())
        listed = ", ".join(f"{shape} {rate / 1e12:.3g}" for shape, rate in rates.items())
        self.results.machine["matrix rate"] = f"TFLOP/s of torch.mm by (M, L, N): {listed}"

    def start(self, case: Case) -> None:
        """Make the data and the truth, which on many rows is that of the first of them."""
        if self.case == case:
            return
        self.case = self.ours = self.last = self.views = self.checked_views = self.truth = None
        self.clock.release()
        torch.set_float32_matmul_precision(case.precision)
        most = CHECKED_AT_MOST[self.device] if case.is_loss else case.batch
        self.checked = replace(case, batch=min(case.batch, most))
        self.views = self.checked_views = parity.data_of(case, self.clock.device)
        if self.checked != case:
            self.checked_views = parity.data_of(self.checked, self.clock.device)
        self.truth = parity.expected(self.checked, self.checked_views)
        self.clock.release()
        self.case = case

    def measure(self, case: Case, name: str, whats: Sequence[str]) -> None:
        """Add the rows of one contender; one row that says why where it cannot be measured."""
        base = {"contender": name, "what": "both", **case.columns()}
        contender = KINDS[case.kind].get(OURS if name == BEFORE else name)
        if contender is None:  # it is of another kind
            return
        reason = contender.unavailable(case) or self._too_large(case, contender)
        if reason:
            status = reason if reason == "not installed" else "left out"
            self.results.add({**base, "status": status, "note": reason})
            return
        try:
            self.start(case)
            if name == BEFORE:
                self._measure_before(base, case)
            else:
                self._measure(base, contender, whats)
        except torch.OutOfMemoryError:
            self.results.add({**base, "status": "out of memory", "note": ""})
        except Exception as error:  # a rival that fails must not end the run
            self.results.add({**base, "status": "failed", "note": short(error)})
        finally:
            if "compile" in name:
                torch._dynamo.reset()
            try:
                self.clock.release()
                self.clock.synchronize()
            except RuntimeError as error:
                raise LostDevice(short(error)) from error

    def _too_large(self, case: Case, contender: Contender) -> str:
        needs = contender.matrices * case.batch**2 * case.dtype.itemsize
        if not self.on_gpu and 1.3 * needs > available_bytes():
            return f"needs about {needs / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are available"
        batch, before = self.took.get((*_shape(case.columns()), contender.name), (case.batch, 0.0))
        seconds = 1e-6 * before * (case.batch / batch) ** 2
        limit = min(CALL_SECONDS[self.device], max(0.0, self.deadline - time.monotonic()) / 3)
        return f"a call would take about {seconds:.0f} s" if seconds > limit else ""

    def check(self, built: Built, run: Callable[[], object]) -> tuple[dict, str]:
        """Errors of a run on the rows that are checked, and what is wrong with them."""
        built.reset()
        is_truth = parity.is_of_a_corpus(self.case) and built.contender.name == OURS
        answer = self.truth if is_truth else run()
        self.clock.synchronize()
        found = parity.check(self.checked, answer, built, self.truth)
        built.reset()
        return found

    def build(self, contender: Contender) -> tuple[Built, dict, str]:
        """A contender, built and checked."""
        built = Built(contender, self.checked, self.checked_views)
        found, problem = self.check(built, built.run())
        if self.checked == self.case:
            return built, found, problem
        del built
        return Built(contender, self.case, self.views), {**found, "checked_B": self.checked.batch}, problem

    def _measure(self, base: dict, contender: Contender, whats: Sequence[str]) -> None:
        built, found, problem = self.build(contender)
        if problem:
            self.results.add({**base, **found, "status": "parity failed", "note": problem})
            return
        self.last = built
        if contender.name == OURS:
            self.ours = built
        elif self.ours is None:  # its own rows came before another case
            mine, _, wrong = self.build(KINDS[self.case.kind][OURS])
            self.ours = None if wrong else mine
        for what in whats:
            row = {**base, **found, "what": what, "status": "ok", "note": ""}
            if what == "backward" and contender.no_backward_alone:
                self.results.add({**row, "status": "left out", "note": contender.no_backward_alone})
                continue
            for view in ("device", "host", "graph") if self.on_gpu and not self.large else ("device",):
                row |= self._times(built, what, view)
            row |= self._memory(built, what) | self._rates(row)
            if contender.name == OURS and self.on_gpu:
                row |= self._kernels(built, what)
            self.results.add(row)

    def _times(self, built: Built, what: str, view: str) -> dict[str, object]:
        note: dict[str, object] = {}
        timer = built.timer(what, view, self.clock)
        if view == "graph":
            captured = built.graph(what, self.clock)
            if isinstance(captured, str):
                return {"graph_note": captured}
            if what == "both" and self.checked == self.case:  # a graph may be wrong alone
                found, problem = self.check(built, captured)
                note = {"graph_gradient_error": found.get("gradient_error")}
                if problem:
                    return {**note, "graph_note": f"parity of the replay failed: {problem}"}
        ours = None if self.ours in (None, built) else self.ours.timer(what, view, self.clock)
        return note | self._compare(timer, ours, view)

    def _compare(self, timer: Timer, ours: Timer | None, view: str) -> dict[str, object]:
        """Spread of the times, and of theirs over ours in rounds."""
        theirs, *mine = self.clock.samples([timer] if ours is None else [timer, ours])
        found = {"rounds": len(theirs), **columns(f"{view}_us", theirs)}
        for each in mine:
            found |= columns(f"ratio_{view}", [a / b for a, b in zip(theirs, each, strict=True)])
            found[f"ratio_{view}_fastest"] = min(theirs) / min(each)
        return found

    def _measure_before(self, base: dict, case: Case) -> None:
        """Ours from another checkout beside ours from this one, each in a process of its own."""
        where = self.device, self.clock.now is time.process_time
        sides: list[Elsewhere] = []
        try:
            for checkout in (self.before, ROOT):
                sides.append(Elsewhere(checkout, elsewhere, case, *where))  # noqa: PERF401
            commit = output("git", "describe", "--always", "--dirty", folder=self.before)
            row = {**base, **sides[0].found, "status": "ok", "note": f"commit {commit}"}
            self.results.add(row | self._compare(*sides, "device"))
        finally:
            for side in sides:
                side.close()

    def _memory(self, built: Built, what: str) -> dict[str, float]:
        if what == "backward":  # what it frees was there before it began
            return {}
        if self.on_gpu:
            held = sum(z.nbytes for z in self.views[:2]) if what == "both" and self.case.is_loss else 0
            peak = self.clock.peak_mib(built.run(what), held)
        elif self.case.is_loss and self.case.batch >= MEMORY_FROM and what == "both":
            peak = in_a_process(peak_of, self.case, built.contender.name)
        else:
            return {}
        mine = self.results.find(OURS, what=what, **self.case.columns()).get("peak_mib")
        return {"peak_mib": peak} | ({"ratio_memory": peak / mine} if mine else {})

    def _rates(self, row: dict) -> dict[str, float]:
        if row["B"] >= 4096:  # a smaller one's time is not that of its products
            self.took[(*_shape(row), row["contender"])] = row["B"], row["device_us"]
        if not self.rate or row["what"] != "both":
            return {}
        operations = (2 * row["K"] if row["kind"] == "assign" else 6 * row["B"]) * row["B"] * row["D"]
        rate = operations / row["device_us"] * 1e6
        return {"tflops": rate / 1e12, "rate_fraction": rate / self.rate}

    def _kernels(self, built: Built, what: str) -> dict[str, str]:
        try:
            names = self.clock.kernels(built.run(what))
        except Exception as error:  # the profiler is not on every machine
            return {"kernels": f"not counted: {short(error)}"}
        return {"kernels": f"{what} {len(names)}: {', '.join(names)}"}


def _shape(row: dict) -> tuple:
    return row["kind"], row["D"], row["K"], row["dtype"]


def elsewhere(case: Case, device: str, processor_time: bool) -> tuple[Timer, dict]:
    """Timer and errors of ours, in the process that imports another checkout."""
    bench = Bench(Results(Path(), {}, BEFORE, on_gpu=False), clock_of(device, processor_time=processor_time))
    bench.start(case)
    built, found, problem = bench.build(KINDS[case.kind][OURS])
    if problem:
        raise RuntimeError(f"parity failed: {problem}")
    bench.truth = bench.checked_views = None
    bench.clock.release()
    return built.timer("both", "device", bench.clock), found


def peak_of(case: Case, name: str) -> float:
    """MiB of a call on a CPU above inputs and their gradients, in a process of its own."""
    clock, contender = Clock(), KINDS[case.kind][name]
    small = replace(case, batch=64)
    Built(contender, small, parity.data_of(small, clock.device)).run()()  # libraries and threads are there
    views = parity.data_of(case, clock.device)
    return clock.peak_mib(Built(contender, case, views).run(), sum(z.nbytes for z in views[:2]))


# --- what is measured --------------------------------------------------------------------------------------


def items(
    cases: Sequence[Case], names: Sequence[str] | None = None, whats: tuple[str, ...] = BOTH
) -> Iterator[Item]:
    """Every contender in every case, by default all there are."""
    for case in cases:
        for name in rivals(case.kind) if names is None else names:
            yield case, name, whats


def kinds_of(what: str) -> tuple[str, ...]:
    """Kinds of cases that a question with sizes is about."""
    return ("step", "plain") if what == "large" else (what,)


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
    three = (OURS, "eager", "published")
    yield from items(headline, (OURS, "eager"), ALL)
    yield None, "training step", ()
    yield from items(plain, (OURS, "eager"), ALL)
    yield from items(headline, ("published", "torch.compile"), ALL)
    yield from items(plain, ("sentence-transformers", "linear_cross_entropy"), ALL)
    for dtype in (BF16, FP32):
        yield from items([Case("step", batch, dtype=dtype) for batch in (256, 1024, 128, 64)], three, ALL)
    shapes = {"dtype": FP32, "precision": "high"}, {"dtype": FP16}, {"dim": 384}, {"dim": 1024}
    for shape in (*shapes, {"clusters": 96}, {"clusters": 512}):
        yield from items([Case("step", 512, **shape)], three, ALL)
    for dtype in (BF16, FP32):
        yield from items([Case("step", batch, dtype=dtype) for batch in (2048, 4096)], three, ALL)
    yield from items(headline[:1], ("clusterns backend=torch",))
    yield from items(plain, ("torch.compile",))
    yield from items([Case("plain", batch) for batch in (2048, 128, 4096)], (OURS, "eager"))
    yield from items([Case("step", batch) for batch in (256, 2048, 1024, 128)], ("torch.compile",))
    # Their kernels are unknown to us: last, since a fault in one ends the run.
    yield from items(plain, ("Liger", "cut-cross-entropy", "Inf-CL"))


def large_design() -> Iterator[Item]:
    """On a GPU: how near to the matrix rate, in how much memory, and where do the regimes cross?"""
    batches = [4096 * 2**each for each in range(7)]
    steps, plain = ([Case(kind, batch) for batch in batches] for kind in ("step", "plain"))
    for pair in zip(steps, plain, strict=True):
        yield from items(pair, (OURS, "eager"))
    yield Case("step", 2**20), "clusterns 2 GiB workspace", BOTH
    crossing = [Case("step", batch) for batch in (512, 1024, 2048, 4096, 8192)]
    yield from items(crossing, ("clusterns whole", "clusterns in chunks"))
    yield from items([Case("assign", 10**6, clusters=1024)])
    for step, bare in zip(steps, plain, strict=True):
        yield from items([step], ("torch.compile", "clusterns backend=torch"))
        yield from items([bare], rivals("plain")[2:])


def design(wanted: argparse.Namespace) -> list[Item]:
    """What to measure, each once."""
    on_gpu, what = wanted.device == "cuda", wanted.what
    if wanted.batch:
        found = chosen(wanted)
    elif on_gpu and what in ("step", "large"):
        found = step_design() if what == "step" else large_design()
    elif what == "assign":
        found = items([Case(what, 10**6, clusters=1024) if on_gpu else Case(what, 10**5, 384, 1000, FP32)])
    elif what in ("k-means", "evaluate"):
        found = items([case for case in corpus.CASES if case.kind.startswith(what)])
    elif what == "large":
        found = items([Case(kind, 32768, 256, dtype=FP32) for kind in ("objective", "plain")])
    else:
        found = items([Case(what, *size, dtype=FP32) for size in ((256, 768), (64, 384))])
    once: dict[tuple[Case | None, str], tuple[str, ...]] = {}
    for case, name, whats in found:
        once.setdefault((case, name), whats)
    return [(case, name, whats) for (case, name), whats in once.items()]


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


# Questions of files of their own: sizes unless others are given, and no time budget.
OWN_SIZES: dict[str, dict[str, object]] = {
    "exactness": {"batch": [64, 300, 1024, 4096], "dtype": list(DTYPES)},
    "training": {"batch": [128, 256, 1024, 4096], "dim": [384], "clusters": 64, "rounds": 3, "steps": 15},
    "data": {"batch": [256], "rounds": 3, "steps": 60},
}


def command_line(what: str | None) -> argparse.Namespace:
    """What is wanted; a script that is one question names it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    if what is None:
        sized = ["step", "objective", "plain", "large", "assign", "k-means", "evaluate"]
        add("what", choices=[*sized, *OWN_SIZES])
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, help="time budget, default 480, for exactness, training and data none")
    add("--output", type=Path, help="folder, default bench/results/gpu, on a CPU runs/bench or bench/results")
    add("--batch", type=int, nargs="+", help="rows B; training: of the trainers, then of the memory")
    add("--dim", type=int, nargs="+", help="D, default 768; training: width of the encoder")
    add("--clusters", type=int, help="K, default 128")
    add("--dtype", choices=list(DTYPES), nargs="+", help="default float32")
    add("--precision", choices=["highest", "high", "medium"], default="highest")
    add("--contenders", nargs="*", help="beside ours, default eager (and before)")
    add("--before", type=Path, help="another checkout of this package to measure beside this one")
    add("--rounds", type=int, help="most rounds of a comparison")
    add("--layers", type=int, default=6, help="training: of the encoder, default %(default)s")
    add("--steps", type=int, help="training, data: steps or batches that are timed")
    add("--rows", type=int, default=50_000, help="data: default %(default)s")
    add("--processor-time", action="store_true", help="no wall clock: for a CPU that others keep busy")
    add("--list", action="store_true", help="print what would be measured, and end")
    add("--arithmetic", action="store_true", help="large: print expected figures and end")
    wanted = parser.parse_args(namespace=argparse.Namespace(what=what))
    if wanted.batch and wanted.what in ("k-means", "evaluate"):
        parser.error(f"--batch: expected with another question, {wanted.what} has its own sizes")
    known = {name: None for kind in kinds_of(wanted.what) for name in KINDS.get(kind, {})} | {BEFORE: None}
    unknown = [name for name in wanted.contenders or [] if name not in known]
    if unknown:
        parser.error(f"--contenders: expected of {', '.join(known)}, got {', '.join(unknown)}")
    own = OWN_SIZES.get(wanted.what, {})
    sizes = {"dim": [768], "clusters": 128, "dtype": ["float32"], **own}
    for name, value in {"seconds": math.inf if own else 480.0, **sizes}.items():
        if getattr(wanted, name) is None:
            setattr(wanted, name, value)
    return wanted


def stages_of(wanted: argparse.Namespace, results: Results, clock: Clock, deadline: float) -> list[Stage]:
    """All there is to do, by name."""
    if wanted.what in OWN_SIZES:
        return import_module(wanted.what).stages(wanted, results, clock)
    large = wanted.what in ("large", "assign")
    bench = Bench(results, clock, deadline, large=large, before=wanted.before)
    stages: list[Stage] = [("matrix rate", bench.matrix_rate)] if large else []
    for case, name, whats in design(wanted):
        if case is None:
            from training import measure_added

            stages.append((name, partial(measure_added, results, clock)))
        else:
            stages.append((f"{name} {case}", partial(bench.measure, case, name, whats)))
    return stages


def main(what: str | None = None) -> int:
    """Measure, write, print."""
    wanted = command_line(what)
    deadline = time.monotonic() + wanted.seconds
    if wanted.arithmetic:
        print(arithmetic())
        return 0
    on_gpu, large = wanted.device == "cuda", wanted.what in ("large", "assign")
    settings = {"rounds": 7, "seconds": 0.3} if large else {"rounds": 25, "seconds": 0.6}
    if not on_gpu:
        settings = {"rounds": 200, "seconds": 4.0, "block_seconds": 5e-3}
    settings["rounds"] = wanted.rounds or settings["rounds"]
    named = Clock() if wanted.list else None  # a list of what a GPU would do needs none
    clock = named or clock_of(wanted.device, processor_time=wanted.processor_time, **settings)
    folder = RESULTS if wanted.what in OWN_SIZES else ROOT / "runs" / "bench"
    folder = wanted.output or (RESULTS / "gpu" if on_gpu else folder)
    found = {} if wanted.list else machine() | {"timed with": clock.label}
    columns = import_module("exactness").COLUMNS if wanted.what == "exactness" else ()
    results = Results(folder, found, wanted.what, on_gpu=on_gpu, columns=columns)
    stages = stages_of(wanted, results, clock, deadline)
    if wanted.list:
        print("\n".join(name for name, _ in stages))
        return 0
    well = run_all(stages, results, deadline)
    results.summary()
    results.draw()  # last: it takes seconds, which an interrupt may not leave
    return 0 if well and results.ours_are_right() else 1


if __name__ == "__main__":
    sys.exit(main())
