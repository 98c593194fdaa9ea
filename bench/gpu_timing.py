"""Stopwatches: device events and CUDA graphs on a GPU, the wall clock on a CPU.

A sample is a block of calls that lasts about `BLOCK_SECONDS`, so that neither the resolution of an event nor
the start of an idle device shows; runs that are compared take their blocks in turn. Inputs are not rotated:
in training the embeddings have just been written, so they are in the cache there too.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile of the samples, in microseconds per call."""

    median: float
    p20: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    """Summarise samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of theirs over ours, sample by sample: they were taken in turn."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


class Captured(NamedTuple):
    """A captured run: its replay, and the tensors that a replay writes."""

    replay: Run
    result: Any


class Stopwatch:
    """CPU: wall clock, no graphs, no device memory. Its figures are not GPU figures."""

    device = torch.device("cpu")
    label = "CPU wall clock"

    def __init__(self, block_seconds: float = 2e-3, rounds: int = 25, seconds: float = 0.6):
        self.block_seconds, self.rounds, self.seconds = block_seconds, rounds, seconds

    def synchronize(self) -> None:
        """Wait for the device."""

    def block(self, run: Run, calls: int) -> float:
        """Microseconds per call of a block of calls, on the device."""
        return self.host_block(run, calls)

    def host_block(self, run: Run, calls: int) -> float:
        """Microseconds per call as the host sees it, waiting for the device after each."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
            self.synchronize()
        return (time.perf_counter() - began) / calls * 1e6

    def samples(self, runs: Sequence[Run], host: bool = False) -> list[list[float]]:
        """Samples of each run, blocks taken in turn."""
        calls, total = [], 0.0
        for run in runs:
            each = self._warm_up(run)
            calls.append(min(400, max(1, round(self.block_seconds / each))))
            total += calls[-1] * each
        rounds = min(self.rounds, max(5, int(self.seconds / total)))
        block = self.host_block if host else self.block
        found: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, count, into in zip(runs, calls, found, strict=True):
                into.append(block(run, count))
        return found

    def _warm_up(self, run: Run, at_least: float = 0.03) -> float:
        """Run until clocks and caches have settled; returns seconds per call."""
        self.synchronize()
        began, calls = time.perf_counter(), 0
        while True:
            run()
            calls += 1
            if calls % 10 == 0 or time.perf_counter() - began > at_least:
                self.synchronize()
                elapsed = time.perf_counter() - began
                if elapsed > at_least:
                    return elapsed / calls

    def capture(self, make: Callable[[], Run]) -> Captured:
        """Capture a run as a graph; `make` prepares the run."""
        raise RuntimeError("the CPU has no graphs")

    def peak_mib(self, run: Run, gradient_bytes: int) -> float | None:
        """Peak memory of a run above what was there before it and the gradients it returns."""
        return None

    def kernels(self, run: Run) -> list[str] | None:
        """Names of what one run launches on the device."""
        return None

    def release(self) -> None:
        """Give memory of finished contenders back."""
        gc.collect()


class CudaStopwatch(Stopwatch):
    """CUDA: device events, graphs, the allocator's statistics, the profiler.

    All work of the process moves to one side stream, where graphs are captured too: autograd runs a backward,
    and hands a gradient to its leaf, on the stream of the forward, and one that is not captured breaks it.
    """

    device = torch.device("cuda")
    label = "CUDA events"

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def block(self, run: Run, calls: int) -> float:
        """Microseconds between events around a block of calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    def capture(self, make: Callable[[], Run]) -> Captured:
        """Warm up, then capture on the stream of everything else."""
        run = make()
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = run()

        def replay(held: Run = run) -> None:  # what the graph reads must outlive it
            graph.replay()

        return Captured(replay, result)

    def peak_mib(self, run: Run, gradient_bytes: int) -> float:
        """From the allocator, so without what the driver and the kernels themselves hold."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - gradient_bytes) / 2**20

    def kernels(self, run: Run) -> list[str]:
        """Every kernel, copy and fill that the profiler sees on the device."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        for _ in range(2):  # the first profile of a process may miss events
            with torch.profiler.profile(activities=activities) as profile:
                run()
                torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return [
            event.name
            for event in profile.events()
            if event.device_type == on_device and not getattr(event, "is_user_annotation", False)
        ]

    def release(self) -> None:
        """Give memory of finished contenders back."""
        gc.collect()
        torch.cuda.empty_cache()
