"""What a step costs beside its rivals, on a CPU or a GPU: parity first, then time and memory, in one run.

    python bench/run.py step --batch 256 --dim 768       a whole training step, ours beside eager torch
    python bench/run.py objective --batch 64 --dim 384   the objective for given centroids
    python bench/run.py step --batch 256 64 16384 --before ../old    beside another checkout of this package
    python bench/run.py plain | large | assign | training [--device cuda --seconds 480 --output DIR]

Without sizes a question has its own list, the most important figures first, ours and eager before any other
(--list prints it). Every row is on disk as soon as it is measured; what does not fit the budget, or comes
after an interrupt, is listed as skipped. A row that fails says so and the run goes on. Status 1: a
row of ours failed.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import parity
import torch
from measure import Captured, Clock, Elsewhere, Run, Timer, available_bytes, clock_of, in_a_process, spread
from report import RESULTS, ROOT, Results, machine, output, short
from rivals import KINDS, OURS, Built, Case, Contender, make_views

BEFORE = "before"  # ours from another checkout
CHECKED_AT_MOST = {"cpu": 4096, "cuda": 2**18}  # rows at which parity is asked
CALL_SECONDS = {
    "cpu": 120.0,
    "cuda": 12.0,
}  # a call that would take longer, judged by another batch, is left out
ALL, BOTH = ("both", "forward", "backward"), ("both",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"float32": FP32, "bfloat16": BF16, "float16": FP16}
Item = tuple[Case | None, str, tuple[str, ...]]  # no case: the training step of BERT-base


class LostDevice(RuntimeError):
    """The device answers no more; whatever would come next would fail too."""


class Side:
    """A built contender, with what can be timed of it, made once."""

    def __init__(self, contender: Contender, built: Built, clock: Clock):
        self.contender, self.built, self.clock = contender, built, clock
        self._runs: dict[str, Run] = {}
        self._graphs: dict[str, Captured | str] = {}

    def run(self, what: str) -> Run:
        """The "forward", the "backward" or "both"."""
        if what not in self._runs:
            self._runs[what] = self.built.make(what)
        return self._runs[what]

    def graph(self, what: str) -> Captured | str:
        """The captured run, or why there is none."""
        if what not in self._graphs:
            self._graphs[what] = self.contender.no_graph or self._capture(what)
        return self._graphs[what]

    def _capture(self, what: str) -> Captured | str:
        try:
            return self.clock.capture(lambda: self.built.make(what))
        except Exception as error:  # a rival may do anything while it is captured
            with contextlib.suppress(RuntimeError):  # the broken capture reports itself once more
                self.clock.synchronize()
            return f"not captured: {short(error)}"

    def timer(self, what: str, view: str) -> Timer | None:
        """A timer of a run as the "device" or the "host" sees it, or of its "graph" where there is one."""
        if view == "host":
            return self.clock.host_timer(self.run(what))
        if view == "device" or self.contender.own_graphs:
            return self.clock.timer(self.run(what))
        graph = self.graph(what)
        return self.clock.timer(graph.replay) if isinstance(graph, Captured) else None


class Bench:
    """Measures contenders of one case at a time against ours in that case."""

    def __init__(self, results: Results, clock: Clock, wanted: argparse.Namespace, deadline: float):
        self.results, self.clock, self.deadline = results, clock, deadline
        self.before, self.memory, self.large = (
            wanted.before,
            wanted.memory,
            wanted.what in ("large", "assign"),
        )
        self.case: Case | None = None
        self.rate: float | None = None  # operations a second
        self.took: dict[tuple[str, str], tuple[int, float]] = {}  # (kind, contender): B, microseconds

    def matrix_rate(self) -> None:
        """The best rate of matrix products in bfloat16 (on a CPU float32), which fractions refer to."""
        on_gpu = self.clock.device.type == "cuda"
        dtype, shapes = (BF16, ((8192, 768, 65536), (8192, 8192, 8192))) if on_gpu else (FP32, ((1024,) * 3,))
        rates = {shape: self.clock.matrix_rate(*shape, dtype) for shape in shapes}
        self.rate = max(rates.values())
        listed = ", ".join(f"{'x'.join(map(str, each))} {rate / 1e12:.3g}" for each, rate in rates.items())
        self.results.machine["matrix rate"] = (
            f"TFLOP/s of torch.mm by (M, L, N): {listed}; fractions use the largest"
        )
        print(self.results.machine["matrix rate"])

    def start(self, case: Case) -> None:
        """Make the views and the truth, which on many rows is that of the first of them."""
        if self.case == case:
            return
        self.forget()
        torch.set_float32_matmul_precision(case.precision)
        self.views = make_views(case, self.clock.device)
        self.checked = replace(case, batch=min(case.batch, CHECKED_AT_MOST[self.clock.device.type]))
        self.checked_views = (
            self.views if case == self.checked else make_views(self.checked, self.clock.device)
        )
        self.truth = parity.expected(self.checked, self.checked_views)
        self.clock.release()
        self.case = case

    def forget(self) -> None:
        """Give back what the case before holds."""
        self.case = self.views = self.checked_views = self.truth = None
        self.ours: Side | None = None  # what the others' times are compared with
        self.ours_tried = False
        self.clock.release()

    def measure(self, case: Case, name: str, whats: Sequence[str]) -> None:
        """Add the rows of one contender; one row that says why where it cannot be measured."""
        base = {"contender": name, "what": "both", **case.columns()}
        contender = KINDS[case.kind][OURS if name == BEFORE else name]
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
            self.results.add({**base, "status": "out of memory"})
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
        device = self.clock.device.type
        needs = contender.matrices * case.batch**2 * case.dtype.itemsize
        if device == "cpu" and 1.3 * needs > available_bytes():
            return f"needs about {needs / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are available"
        batch, before = self.took.get((case.kind, contender.name), (case.batch, 0.0))
        seconds = 1e-6 * before * (case.batch / batch) ** 2
        limit = min(CALL_SECONDS[device], max(0.0, self.deadline - time.monotonic()) / 3)
        return f"a call would take about {seconds:.0f} s" if seconds > limit else ""

    def _check(self, built: Built, run: Run) -> tuple[dict, str]:
        """Errors of a run on the rows that are checked, and what is wrong with them."""
        if self.truth is None:
            return {}, ""
        built.reset()
        answer = run()
        self.clock.synchronize()
        found = parity.errors(self.checked, answer, built, self.truth)
        built.reset()
        return found, parity.failure(self.checked, found)

    def _side(self, contender: Contender) -> tuple[Side, dict, str]:
        """A contender, built and checked."""
        if self.checked == self.case:
            side = Side(contender, contender.build(self.case, self.views), self.clock)
            return side, *self._check(side.built, side.run("both"))
        checked = contender.build(self.checked, self.checked_views)
        found, problem = self._check(checked, checked.make("both"))
        found["checked_rows"] = self.checked.batch
        del checked
        return Side(contender, contender.build(self.case, self.views), self.clock), found, problem

    def _prepare_ours(self) -> None:
        """Our side for a case whose own rows are there already; none if it is wrong."""
        if not self.ours_tried and OURS in KINDS[self.case.kind]:
            self.ours_tried = True
            with contextlib.suppress(Exception):  # our own row says what is wrong with it
                side, _, problem = self._side(KINDS[self.case.kind][OURS])
                self.ours = None if problem else side

    def _measure(self, base: dict, contender: Contender, whats: Sequence[str]) -> None:
        side, found, problem = self._side(contender)
        if problem:
            self.results.add({**base, **found, "status": "parity failed", "note": problem})
            return
        if contender.name == OURS:
            self.ours, self.ours_tried = side, True
        else:
            self._prepare_ours()
        on_gpu = self.clock.device.type == "cuda"
        for what in whats:
            row = {**base, **found, "what": what, "status": "ok", "note": ""}
            if what == "backward" and contender.no_backward_alone:
                self.results.add({**row, "status": "left out", "note": contender.no_backward_alone})
                continue
            for view in ("device", "host", "graph") if on_gpu and not self.large else ("device",):
                row |= self._times(side, what, view)
            row |= self._memory(side, what) | self._rates(row)
            if contender.name == OURS and on_gpu:
                row |= self._kernels(side, what)
            self.results.add(row)

    def _times(self, side: Side, what: str, view: str) -> dict[str, object]:
        note: dict[str, object] = {}
        timer = side.timer(what, view)
        if view == "graph" and side.contender.own_graphs:
            note = {"graph_note": "launched as ever: it replays graphs of its own"}
        elif view == "graph" and timer is None:
            return {"graph_note": side.graph(what)}
        elif view == "graph" and what == "both" and self.checked == self.case:
            captured = side.graph(what)  # a graph may be wrong where the launched run is right

            def replay() -> tuple:
                captured.replay()
                return captured.result

            replayed, problem = self._check(side.built, replay)
            note["graph_gradient_error"] = replayed.get("gradient_error")
            if problem:
                return {**note, "graph_note": f"parity of the replay failed: {problem}"}
        ours = None if self.ours is None or self.ours is side else self.ours.timer(what, view)
        return note | self._compare(timer, ours, view)

    def _compare(self, timer: Timer, ours: Timer | None, view: str) -> dict[str, object]:
        """Spread of the times, and of theirs over ours in rounds."""
        theirs, *mine = self.clock.samples([timer] if ours is None else [timer, ours])
        found = {"rounds": len(theirs), **columns(f"{view}_us", theirs)}
        for ours in mine:
            found |= columns(f"ratio_{view}", [a / b for a, b in zip(theirs, ours, strict=True)])
            found[f"ratio_{view}_fastest"] = min(theirs) / min(ours)
        return found

    def _measure_before(self, base: dict, case: Case) -> None:
        """Ours from another checkout beside ours from this one, each in a process of its own."""
        sides = []
        where = self.clock.device.type, self.clock.now is time.process_time
        try:
            for checkout in (self.before, ROOT):
                sides.append(Elsewhere(checkout, elsewhere, case, *where))  # noqa: PERF401
            found = sides[0].found
            commit = output("git", "describe", "--always", "--dirty", folder=self.before)
            row = {**base, **found, "commit": commit, "status": "ok", "note": f"commit {commit}"}
            self.results.add(row | self._compare(*sides, "device"))
        finally:
            for side in sides:
                side.close()

    def _memory(self, side: Side, what: str) -> dict[str, float]:
        # What a backward frees was there before it began; a contender's own graphs hold theirs for good.
        if what == "backward" or side.contender.own_graphs:
            return {}
        if self.clock.device.type == "cuda":
            held = sum(z.nbytes for z in self.views[:2]) if what == "both" else 0
            peak = self.clock.peak_mib(side.run(what), held)
        elif self.memory and what == "both":
            peak = in_a_process(peak_of, self.case, side.contender.name)
        else:
            return {}
        mine = self.results.find(OURS, what=what, **self.case.columns()).get("peak_mib")
        return {"peak_mib": peak} | ({"ratio_memory": peak / mine} if mine else {})

    def _rates(self, row: dict) -> dict[str, float]:
        if not self.rate or row["what"] != "both":
            return {}
        assign = row["kind"] == "assign"
        operations = (2 * row["K"] if assign else 6 * row["B"]) * row["B"] * row["D"]
        self.took[row["kind"], row["contender"]] = row["B"], row["device_us"]
        rate = operations / row["device_us"] * 1e6
        return {
            "tflops": rate / 1e12, "rate_fraction": rate / self.rate, "floor_us": operations / self.rate * 1e6
        }  # fmt: skip

    def _kernels(self, side: Side, what: str) -> dict[str, str]:
        try:
            names = self.clock.kernels(side.run(what))
        except Exception as error:  # the profiler is not on every machine
            return {"kernels": f"not counted: {short(error)}"}
        return {"kernels": f"{what} {len(names)}: {', '.join(names)}"}


def columns(name: str, samples: Sequence[float]) -> dict[str, float]:
    """A spread as columns of a row."""
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), spread(samples), strict=True))


def elsewhere(case: Case, device: str, processor_time: bool) -> tuple[Timer, dict]:
    """Timer and errors of ours, in the process that imports another checkout."""
    clock = clock_of(device, processor_time=processor_time)
    wanted = argparse.Namespace(before=None, memory=False, what=case.kind)
    bench = Bench(None, clock, wanted, 0.0)
    bench.start(case)
    side, found, problem = bench._side(KINDS[case.kind][OURS])
    if problem:
        raise RuntimeError(f"parity failed: {problem}")
    bench.truth = bench.checked_views = None
    clock.release()
    return side.timer("both", "device"), found


def peak_of(case: Case, name: str) -> float:
    """MiB of a call on a CPU above inputs and their gradients, in a process of its own."""
    contender, clock = KINDS[case.kind][name], Clock()
    small = replace(case, batch=64)
    contender.build(small, make_views(small, clock.device)).make("both")()  # libraries and threads are there
    views = make_views(case, clock.device)
    return clock.peak_mib(contender.build(case, views).make("both"), sum(z.nbytes for z in views[:2]))


# --- what is measured --------------------------------------------------------------------------------------


def items(cases: Sequence[Case], names: Sequence[str], whats: tuple[str, ...] = BOTH) -> Iterator[Item]:
    """Every contender in every case."""
    for case in cases:
        for name in names:
            yield case, name, whats


def chosen(wanted: argparse.Namespace) -> Iterator[Item]:
    """The sizes of the command line."""
    default = ["eager", *([BEFORE] if wanted.before else [])]
    names = [OURS, *(default if wanted.contenders is None else wanted.contenders)]
    for dtype in wanted.dtype:
        for dim in wanted.dim:
            sizes = [(wanted.what, batch, dim, wanted.clusters, DTYPES[dtype]) for batch in wanted.batch]
            yield from items([Case(*each, wanted.precision) for each in sizes], names, tuple(wanted.parts))


def step_design() -> Iterator[Item]:
    """On a GPU: small batches, the most important first."""
    headline, plain = ([Case(kind, 512, dtype=dtype) for dtype in (BF16, FP32)] for kind in ("step", "plain"))
    rivals = ("eager", "published")
    yield from items(headline, (OURS, "eager"), ALL)
    yield None, "training step", ()
    yield from items(plain, (OURS, "eager"), ALL)
    yield from items(headline, ("published", "torch.compile"), ALL)
    yield from items(plain, ("sentence-transformers", "linear_cross_entropy"), ALL)
    for dtype in (BF16, FP32):
        yield from items(
            [Case("step", each, dtype=dtype) for each in (256, 1024, 128, 64)], (OURS, *rivals), ALL
        )
    others: list[dict[str, Any]] = [{"dtype": FP32, "precision": "high"}, {"dtype": FP16}]
    others += [{"dim": 384}, {"dim": 1024}, {"clusters": 96}, {"clusters": 512}]
    yield from items([Case("step", 512, **each) for each in others], (OURS, *rivals), ALL)
    for dtype in (BF16, FP32):
        yield from items([Case("step", each, dtype=dtype) for each in (2048, 4096)], (OURS, *rivals), ALL)
    yield from items(headline[:1], ("torch.compile reduce-overhead", "clusterns backend=torch"))
    yield from items(plain, ("torch.compile",))
    yield from items([Case("plain", batch) for batch in (2048, 128, 4096)], (OURS, "eager"))
    yield from items([Case("step", batch) for batch in (256, 2048, 1024, 128)], ("torch.compile",))
    # Their kernels are unknown to us: last, since a fault in one ends the run.
    yield from items(plain, ("pytorch-metric-learning", "Liger", "cut-cross-entropy", "Inf-CL"))


def large_design(on_gpu: bool) -> Iterator[Item]:
    """How near to the matrix rate is a large batch, in how much memory, and where do the regimes cross?"""
    if not on_gpu:
        for kind in ("objective", "plain"):
            names = [name for name in KINDS[kind] if name not in ("published", "torch.compile")]
            yield from items([Case(kind, batch, 256, dtype=FP32) for batch in (16384, 32768)], names)
        return
    batches = [4096 * 2**each for each in range(7)]
    steps, plain, other = (
        [Case(kind, batch) for batch in batches] for kind in ("step", "plain", "other loss")
    )
    for pair in zip(steps, plain, strict=True):
        yield from items(pair, (OURS, "eager"))
    yield Case("step", 2**20), "clusterns 2 GiB workspace", BOTH
    crossing = [Case("step", batch) for batch in (512, 1024, 2048, 4096, 8192)]
    yield from items(crossing, ("clusterns whole", "clusterns in chunks"))
    yield from assign_design(on_gpu)
    for step, bare, sigmoid in zip(steps, plain, other, strict=True):
        yield from items([step], ("torch.compile", "clusterns backend=torch"))
        yield from items([bare], list(KINDS["plain"])[2:])
        yield from items([sigmoid], list(KINDS["other loss"]))


def assign_design(on_gpu: bool) -> Iterator[Item]:
    """Nearest centroid of many points."""
    case = Case("assign", 10**6, clusters=1024) if on_gpu else Case("assign", 10**5, 384, 1000, FP32)
    yield from items([case], list(KINDS["assign"]))


def design(wanted: argparse.Namespace) -> list[Item]:
    """What to measure, each once."""
    on_gpu, what = wanted.device == "cuda", wanted.what
    if what == "training":
        found: Iterator[Item] = iter([(None, "training step", ())])
    elif wanted.batch:
        found = chosen(wanted)
    elif what in ("large", "assign"):
        found = large_design(on_gpu) if what == "large" else assign_design(on_gpu)
    elif what == "step" and on_gpu:
        found = step_design()
    else:
        cases = [Case(what, batch, dim, dtype=FP32) for batch, dim in ((256, 768), (64, 384))]
        found = items(cases, list(KINDS[what]))
    once: dict[tuple[Case | None, str], tuple[str, ...]] = {}
    for case, name, whats in found:
        once.setdefault((case, name), whats)
    return [(case, name, whats) for (case, name), whats in once.items()]


def arithmetic(workspace: int = 2**28, dim: int = 768, clusters: int = 128) -> str:
    """Floor of time, traffic of the weights E and memory of a large batch, from sizes alone."""
    rates = {"989 (datasheet)": 989e12, "750": 750e12, "600": 600e12}
    head = ["B", "operations", *(f"ms at {name}" for name in rates), "rows/chunk", "MiB of E", "MiB above"]
    table = [head]
    for batch, limit in [*((4096 * 2**each, workspace) for each in range(7)), (2**20, 8 * workspace)]:
        row_bytes = 28 * dim + 2 * batch + 4 * clusters + 4 * (batch // 128)
        rows = min(batch, max(1, limit // row_bytes))
        rows -= rows % 128 if rows > 128 else 0
        operations = 6 * batch**2 * dim
        times = [f"{operations / rate * 1e3:.2f}" for rate in rates.values()]
        memory = [f"{2 * rows * batch / 2**20:.0f}", f"{(rows * row_bytes + 4 * batch * dim) / 2**20:.0f}"]
        table.append([f"{batch:,}", f"{operations:.2e}", *times, f"{rows:,}", *memory])
    return "\n".join(
        [
            f"ARITHMETIC, NOT MEASURED: bf16, D={dim}, K={clusters}; 6·B²·D over a rate in TFLOP/s (H100)",
            *(" ".join(f"{cell:>22}" for cell in row) for row in table),
            "E: written once a chunk, read twice. Above inputs and gradients: a chunk and a float32 (B, D).",
        ]
    )


def run_all(todo: list[tuple[str, Callable[[], None]]], results: Results, deadline: float) -> bool:
    """Measure until the deadline or an interrupt, and skip the rest by name.

    Returns whether the device is still there.
    """
    ends = (signal.SIGINT, signal.SIGTERM)
    for each in ends:  # a shell may have handed INT down as ignored
        signal.signal(each, signal.default_int_handler)
    reason, alive = "time budget", True
    try:
        while todo and time.monotonic() < deadline:
            todo[0][1]()
            todo.pop(0)
    except KeyboardInterrupt:
        reason = "interrupted"
    except LostDevice as error:
        reason, alive = f"the device was lost: {error}", False
        todo.pop(0)
    for each in ends:  # the report is short
        signal.signal(each, signal.SIG_IGN)
    results.skip([name for name, _ in todo], reason)
    return alive


def command_line() -> argparse.Namespace:
    """What is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "objective", "plain", "large", "assign", "training"])
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="time budget, default %(default)s")
    parser.add_argument(
        "--output", type=Path, help="folder, default bench/results on a GPU, runs/bench on a CPU"
    )
    parser.add_argument("--batch", type=int, nargs="*", default=[], help="rows B, one or more")
    parser.add_argument(
        "--dim", type=int, nargs="*", default=[768], help="D, one or more, default %(default)s"
    )
    parser.add_argument("--clusters", type=int, default=128, help="K, default %(default)s")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="*", default=["float32"])
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    parser.add_argument("--parts", choices=list(ALL), nargs="*", default=["both"])
    parser.add_argument("--contenders", nargs="*", help="beside ours, default: eager (and before)")
    parser.add_argument(
        "--before", type=Path, help="another checkout of this package to measure beside this one"
    )
    parser.add_argument(
        "--memory", action="store_true", help="peak memory too (on a CPU it takes a process each)"
    )
    parser.add_argument("--rounds", type=int, help="most rounds of a comparison")
    parser.add_argument(
        "--processor-time", action="store_true", help="not the wall clock: for a CPU that others keep busy"
    )
    parser.add_argument("--list", action="store_true", help="print what would be measured, and end")
    parser.add_argument("--arithmetic", action="store_true", help="large: print expected figures and end")
    wanted = parser.parse_args()
    known = {*KINDS.get(wanted.what, {}), BEFORE}
    if wanted.contenders and not known >= set(wanted.contenders):
        parser.error(f"--contenders: expected of {', '.join(known)}, got {', '.join(wanted.contenders)}")
    wanted.memory |= wanted.what == "large"
    return wanted


def main() -> int:
    """Measure, write, print."""
    wanted = command_line()
    deadline = time.monotonic() + wanted.seconds
    if wanted.arithmetic:
        print(arithmetic())
        return 0
    todo = design(wanted)
    if wanted.list:
        print("\n".join(f"{name} {case or ''} {' '.join(whats)}" for case, name, whats in todo))
        return 0
    on_gpu = wanted.device == "cuda"
    settings = (
        {"rounds": 25, "seconds": 0.6} if on_gpu else {"block_seconds": 5e-3, "rounds": 200, "seconds": 4.0}
    )
    if wanted.what == "large" and on_gpu:
        settings = {"rounds": 7, "seconds": 0.3}
    clock = clock_of(
        wanted.device,
        **settings | ({"rounds": wanted.rounds} if wanted.rounds else {}),
        processor_time=wanted.processor_time,
    )
    folder = wanted.output or (RESULTS / "gpu" if on_gpu else ROOT / "runs" / "bench")
    results = Results(folder, machine() | {"timed with": clock.label}, wanted.what, on_gpu=on_gpu)
    bench = Bench(results, clock, wanted, deadline)
    stages: list[tuple[str, Callable[[], None]]] = [("matrix rate", bench.matrix_rate)] if bench.large else []
    for case, name, whats in todo:
        if case is None:
            from training import measure_added

            stages.append((name, partial(measure_added, results, clock)))
        else:
            stages.append((f"{name} {case}", partial(bench.measure, case, name, whats)))
    alive = run_all(stages, results, deadline)
    results.summary()
    results.draw()  # last: it takes seconds, which an interrupt may not leave
    return 0 if alive and (results.ours_are_right() or wanted.what == "training") else 1


if __name__ == "__main__":
    sys.exit(main())
