"""One contender in one case: parity, then device, graph and host time beside ours, then memory."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_contenders import CONTENDERS, OURS, Built, Case, Contender, Views, make_views
from gpu_parity import Expected, errors, expected, failure, tolerance
from gpu_results import Results
from gpu_timing import Captured, CudaStopwatch, Run, Spread, Stopwatch, paired_ratio, spread
from machine import machine

Stage = tuple[str, Callable[[], None]]  # a name and its work


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """Command line of a GPU benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu")
    made.add_argument("--seconds", type=float, default=seconds, help="time budget")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return made


def prepare(
    wanted: argparse.Namespace, suffix: str, on_gpu: dict[str, Any], on_cpu: dict[str, Any]
) -> tuple[Stopwatch, Results]:
    """A stopwatch with these settings, and results in the folder wanted."""
    cuda = wanted.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("No GPU is available here: nothing was measured. --device cpu runs the machinery on the CPU.")
        raise SystemExit(2)
    if not cuda:
        print("CPU run: it checks the machinery at tiny sizes. These are not GPU figures.")
    watch = CudaStopwatch(**on_gpu) if cuda else Stopwatch(**on_cpu)
    found = machine(gpu=True) | {"timed with": watch.label}
    return watch, Results(wanted.output, found, on_gpu=cuda, suffix=suffix)


def run_all(todo: list[Stage], results: Results, deadline: float) -> bool:
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


class LostDevice(RuntimeError):
    """The device answers no more; whatever would come next would fail too."""


class Side:
    """A built contender with its forward, its backward and both as runs, and as graphs once captured."""

    def __init__(self, contender: Contender, case: Case, views: Views, watch: Stopwatch):
        self.contender, self.watch = contender, watch
        self.built: Built = contender.build(case, views)
        self._runs: dict[str, Run] = {}
        self._graphs: dict[str, Captured | str] = {}

    def make(self, what: str) -> Run:
        """Prepare a run; for the backward that is a forward of its own."""
        if what == "forward":
            return self.built.loss
        if what == "both":
            return self.built.step
        loss = self.built.loss()
        return lambda: self.built.gradients(loss, keep=True)

    def run(self, what: str) -> Run:
        """Return the run, prepared once."""
        if what not in self._runs:
            self._runs[what] = self.make(what)
        return self._runs[what]

    def graph(self, what: str) -> Captured | str:
        """Return the captured run, or why there is none."""
        if what not in self._graphs:
            self._graphs[what] = self.contender.no_graph or self._capture(what)
        return self._graphs[what]

    def _capture(self, what: str) -> Captured | str:
        try:
            return self.watch.capture(lambda: self.make(what))
        except Exception as error:  # a rival may do anything while it is captured
            with contextlib.suppress(RuntimeError):  # the broken capture reports itself once more
                self.watch.synchronize()
            return f"not captured: {short(error)}"


class Bench:
    """Measures contenders of one case at a time against ours in that case."""

    def __init__(self, results: Results, watch: Stopwatch):
        self.results, self.watch = results, watch
        self.case: Case | None = None

    def start(self, case: Case) -> None:
        """Make the views and the reference's answer."""
        self.case = None
        self.ours: Side | None = None  # what the others' times are compared with
        self.ours_tried = False
        self.watch.release()
        torch.set_float32_matmul_precision(case.precision)
        self.views = make_views(case, self.watch.device)
        self.truth: Expected = expected(case, self.views)
        self.watch.release()
        self.case = case

    def _prepare_ours(self) -> None:
        """Our side for a case whose own rows are there already; none if it is wrong."""
        if not self.ours_tried:
            self.ours_tried = True
            with contextlib.suppress(Exception):  # our own row says what is wrong with it
                side = Side(CONTENDERS[self.case.kind][OURS], self.case, self.views, self.watch)
                _, problem = self._parity(side, side.built.step)
                self.ours = None if problem else side

    def measure(
        self, case: Case, name: str, whats: tuple[str, ...] = ("both", "forward", "backward")
    ) -> None:
        """Add the rows of one contender; one row that says why where it cannot be measured."""
        contender = CONTENDERS[case.kind][name]
        base = {"contender": name, "what": "both", **case.columns()}
        reason = contender.unavailable(case)
        if reason:
            status = reason if reason == "not installed" else "left out"
            self.results.add({**base, "status": status, "note": reason})
            return
        side = None
        try:
            if self.case != case:
                self.start(case)
            if name != OURS:
                self._prepare_ours()
            side = Side(contender, case, self.views, self.watch)
            self._measure(base, side, whats)
        except torch.OutOfMemoryError:
            self.results.add({**base, "status": "out of memory"})
        except LostDevice:
            raise
        except Exception as error:  # a rival that fails must not end the run
            self.results.add({**base, "status": "failed", "note": short(error)})
        finally:
            if "compile" in name:
                torch._dynamo.reset()
            side = None  # its memory is not the next one's
            try:
                self.watch.release()
                self.watch.synchronize()
            except RuntimeError as error:
                raise LostDevice(short(error)) from error

    def _measure(self, base: dict, side: Side, whats: tuple[str, ...]) -> None:
        found, problem = self._parity(side, side.built.step)
        if problem:
            self.results.add({**base, **found, "status": "parity failed", "note": problem})
            return
        if base["contender"] == OURS:
            self.ours, self.ours_tried = side, True
        for what in whats:
            row = {**base, **found, "what": what, "status": "ok", "note": ""}
            if what == "backward" and side.contender.no_backward_alone:
                self.results.add({**row, "status": "left out", "note": side.contender.no_backward_alone})
                continue
            row |= self._times(side, what, "device") | self._times(side, what, "host")
            row |= self._graph_times(side, what)
            row |= self._memory(side, what)
            if side.contender.name == OURS:
                row |= self._kernels(side, what)
            elif row.get("peak_mib"):
                mine = self.results.find(OURS, what=what, **self.case.columns())
                if mine and mine.get("peak_mib"):
                    row["ratio_memory"] = row["peak_mib"] / mine["peak_mib"]
            self.results.add(row)

    def _parity(self, side: Side, run: Callable[[], tuple]) -> tuple[dict[str, float], str]:
        side.built.reset()
        answer = run()
        self.watch.synchronize()
        found = errors(answer, side.built, self.truth)
        side.built.reset()
        return found, failure(found, tolerance(self.case))

    def _pair(
        self, side: Side, run: Run, ours: Run | None, host: bool = False
    ) -> tuple[Spread, float | None]:
        """Time a run, and its ratio to ours in blocks taken in turn."""
        if side.contender.name == OURS or ours is None:
            return spread(self.watch.samples([run], host)[0]), None
        theirs, mine = self.watch.samples([run, ours], host)
        return spread(theirs), paired_ratio(theirs, mine)

    def _times(self, side: Side, what: str, view: str) -> dict[str, float | None]:
        ours = self.ours.run(what) if self.ours else None
        return columns(view, *self._pair(side, side.run(what), ours, host=view == "host"))

    def _graph_times(self, side: Side, what: str) -> dict[str, object]:
        ours = self.ours.graph(what) if self.ours else None
        ours = ours.replay if isinstance(ours, Captured) else None
        if side.contender.own_graphs:
            times = columns("graph", *self._pair(side, side.run(what), ours))
            return {**times, "graph_note": "launched as ever: it replays graphs of its own"}
        captured = side.graph(what)
        if isinstance(captured, str):
            return {"graph_note": captured}
        found = {}
        if what == "both":  # a graph may be wrong where the launched run is right

            def replay() -> tuple:
                captured.replay()
                return captured.result

            replayed, problem = self._parity(side, replay)
            found["graph_gradient_error"] = replayed["gradient_error"]
            if problem:
                return {**found, "graph_note": f"parity of the replay failed: {problem}"}
        return found | columns("graph", *self._pair(side, captured.replay, ours))

    def _memory(self, side: Side, what: str) -> dict[str, float | None]:
        # What a backward frees was there before it began; a contender's own graphs hold theirs for good.
        if what == "backward" or side.contender.own_graphs:
            return {}
        gradients = sum(z.nbytes for z in self.views[:2]) if what == "both" else 0
        return {"peak_mib": self.watch.peak_mib(side.run(what), gradients)}

    def _kernels(self, side: Side, what: str) -> dict[str, str]:
        try:
            names = self.watch.kernels(side.run(what))
        except Exception as error:  # the profiler is not on every machine
            return {"kernels": f"not counted: {short(error)}"}
        return {} if names is None else {"kernels": f"{what} {len(names)}: {', '.join(names)}"}


def columns(view: str, times: Spread, ratio: float | None) -> dict[str, float | None]:
    """A spread and a ratio as columns of a row."""
    found = dict(zip((f"{view}_us", f"{view}_us_p20", f"{view}_us_p80"), times, strict=True))
    return found if ratio is None else {**found, f"ratio_{view}": ratio}


def short(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"
