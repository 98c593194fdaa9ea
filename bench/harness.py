"""Measures the contenders of one case at a time against ours in that case: parity, then time and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import corpus
import parity
import torch
from contenders import BF16, FP32, KINDS, LOSSES, OURS, Built, Case, Contender
from measure import Clock, Elsewhere, Timer, available_bytes, clock_of, columns, in_a_process
from report import ROOT, Results, output, short

BEFORE = "before"  # ours from another checkout
MEMORY_FROM = 16384  # rows from which a CPU's memory is measured, by a process for each


class LostDevice(RuntimeError):
    """The device answers no more; whatever would come next would fail too."""


class Bench:
    """Adds rows to the results, and knows ours in the case that was measured last."""

    def __init__(self, results: Results, clock: Clock, *, graphs: bool = False, before: Path | None = None):
        self.results, self.clock = results, clock
        self.graphs, self.before = graphs, before
        self.on_gpu = clock.device.type == "cuda"
        self.case: Case | None = None
        self.ours: Built | None = None  # what the others' times are compared with
        self.rate: float | None = None  # operations a second

    def matrix_rate(self) -> None:
        """The best rate of matrix products in bfloat16 (on a CPU float32), which fractions refer to."""
        shapes = [(8192, 768, 65536), (8192, 8192, 8192)] if self.on_gpu else [(1024, 1024, 1024)]
        rates = {each: self.clock.matrix_rate(*each, BF16 if self.on_gpu else FP32) for each in shapes}
        self.rate = max(rates.values())
        listed = ", ".join(f"{shape} {rate / 1e12:.3g}" for shape, rate in rates.items())
        self.results.machine["matrix rate"] = f"TFLOP/s of torch.mm by (M, L, N): {listed}"

    def start(self, case: Case) -> None:
        """Make the data and the truth."""
        if self.case == case:
            return
        self.case = self.ours = self.views = self.truth = None
        self.clock.release()
        torch.set_float32_matmul_precision(case.precision)
        self.judge = corpus if case.kind in corpus.OWN_KINDS else parity
        self.views = self.judge.data_of(case, self.clock.device)
        self.truth = self.judge.expected(case, self.views)
        self.clock.release()
        self.case = case

    def measure(self, case: Case, name: str) -> None:
        """Add the row of one contender; it says why where it cannot be measured."""
        base = {"contender": name, **case.columns()}
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
            row = self._before(case) if name == BEFORE else self._measured(contender)
            self.results.add({**base, "status": "ok", "note": "", **row})
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
        needs = contender.square * LOSSES.get(case.kind, 0) * case.batch**2 * case.dtype.itemsize
        if not self.on_gpu and 1.3 * needs > available_bytes():
            return f"needs about {needs / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are available"
        return ""

    def check(self, built: Built, run: Callable[[], object]) -> tuple[dict, str]:
        """Errors of a run, and what is wrong with them."""
        built.reset()
        answer = run()
        self.clock.synchronize()
        found = self.judge.check(self.case, answer, built, self.truth)
        built.reset()
        return found

    def build(self, contender: Contender) -> tuple[Built, dict, str]:
        """A contender, built and checked."""
        built = Built(contender, self.case, self.views)
        return built, *self.check(built, built.run)

    def _measured(self, contender: Contender) -> dict[str, object]:
        """Columns of a contender, timed only where parity holds."""
        built, row, problem = self.build(contender)
        if problem and not contender.other_loss:
            return {**row, "status": "parity failed", "note": problem}
        if contender.other_loss:
            row = {"note": "another loss"}
        if contender.name == OURS:
            self.ours = built
        elif self.ours is None:  # its own row came before another case
            mine, _, wrong = self.build(KINDS[self.case.kind][OURS])
            self.ours = None if wrong else mine
        row |= self._times(built, "device")
        if self.graphs:
            row |= self._graph_times(built)
        row |= self._memory(built)
        if self.case.dominant:
            balanced = self.results.find(contender.name, **replace(self.case, dominant=0.0).columns())
            if balanced:
                row["ratio_balanced"] = row["device_us"] / balanced["device_us"]
        if self.rate:
            rate = 6e6 * self.case.batch**2 * self.case.dim / row["device_us"]
            row |= {"tflops": rate / 1e12, "rate_fraction": rate / self.rate}
        if contender.name == OURS and self.on_gpu:
            row["kernels"] = self._kernels(built)
        return row

    def _graph_times(self, built: Built) -> dict[str, object]:
        captured = built.seen("graph", self.clock)
        if isinstance(captured, str):
            return {"graph_note": captured}
        found, problem = self.check(built, captured)  # a graph may be wrong alone
        if problem:
            return {"graph_note": f"parity of the replay failed: {problem}"}
        return {"graph_gradient_error": found.get("gradient_error"), **self._times(built, "graph")}

    def _times(self, built: Built, view: str) -> dict[str, object]:
        sides = [built] if self.ours in (None, built) else [built, self.ours]
        runs = [side.seen(view, self.clock) for side in sides]
        return self._compare([self.clock.timer(run) for run in runs if callable(run)], view)

    def _compare(self, timers: list[Timer], view: str) -> dict[str, object]:
        """Spread of the times of the first, and of theirs over ours in rounds."""
        theirs, *mine = self.clock.samples(timers)
        found = {"rounds": len(theirs), **columns(f"{view}_us", theirs)}
        for each in mine:
            found |= columns(f"ratio_{view}", [a / b for a, b in zip(theirs, each, strict=True)])
            found[f"ratio_{view}_fastest"] = min(theirs) / min(each)
        return found

    def _before(self, case: Case) -> dict[str, object]:
        """Ours from another checkout beside ours from this one, each in a process of its own."""
        sides: list[Elsewhere] = []
        try:
            for checkout in (self.before, ROOT):
                sides.append(Elsewhere(checkout, elsewhere, case, self.clock.device.type))  # noqa: PERF401
            commit = output("git", "describe", "--always", "--dirty", folder=self.before)
            return {**sides[0].found, "note": f"commit {commit}", **self._compare(sides, "device")}
        finally:
            for side in sides:
                side.close()

    def _memory(self, built: Built) -> dict[str, float]:
        if self.on_gpu:
            held = sum(z.nbytes for z in self.views.leaves()) if self.case.is_loss else 0
            peak = self.clock.peak_mib(built.run, held)
        elif self.case.is_loss and self.case.batch >= MEMORY_FROM:
            peak = in_a_process(peak_of, self.case, built.contender.name)
        else:
            return {}
        mine = self.results.find(OURS, **self.case.columns()).get("peak_mib")
        return {"peak_mib": peak} | ({"ratio_memory": peak / mine} if mine else {})

    def _kernels(self, built: Built) -> str:
        try:
            names = self.clock.kernels(built.run)
        except Exception as error:  # the profiler is not on every machine
            return f"not counted: {short(error)}"
        return f"{len(names)}: {', '.join(names)}"


def elsewhere(case: Case, device: str) -> tuple[Timer, dict]:
    """Timer and errors of ours, in the process that imports another checkout."""
    bench = Bench(Results(Path(), {}, BEFORE, on_gpu=False), clock_of(device))
    bench.start(case)
    built, found, problem = bench.build(KINDS[case.kind][OURS])
    if problem:
        raise RuntimeError(f"parity failed: {problem}")
    bench.truth = None
    bench.clock.release()
    return bench.clock.timer(built.run), found


def peak_of(case: Case, name: str) -> float:
    """MiB of a call on a CPU above inputs and their gradients, in a process of its own."""
    clock, contender = Clock(), KINDS[case.kind][name]
    small = replace(case, batch=64)
    Built(contender, small, parity.data_of(small, clock.device)).run()  # libraries and threads are there
    views = parity.data_of(case, clock.device)
    return clock.peak_mib(Built(contender, case, views).run, sum(z.nbytes for z in views[:2]))
