"""One clock for the CPU and the GPU, and peak memory of either.

A sample is a block of calls that lasts about `block_seconds`, so that neither the resolution of an event nor
the start of an idle device shows. What is compared takes its blocks in turn, since a shared machine drifts:
every ratio is of two blocks of one round. Inputs are not rotated: in training the embeddings have just been
written, so they are in the cache there too.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
Timer = Callable[[int], float]  # calls in a block -> microseconds per call
PATIENCE = 1e7  # microseconds of a round from which the first one is all there is


def columns(name: str, samples: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile of samples as columns of a row."""
    ordered, last = sorted(samples), len(samples) - 1
    percentiles = {f"{name}_p{each}": ordered[round(each / 100 * last)] for each in (20, 80)}
    return {name: statistics.median(ordered), **percentiles}


class Clock:
    """CPU: wall clock, no graphs. Its figures are not GPU figures."""

    device = torch.device("cpu")

    def __init__(self, block_seconds: float = 2e-3, rounds: int = 25, seconds: float = 0.6):
        self.block_seconds, self.rounds, self.seconds = block_seconds, rounds, seconds

    def synchronize(self) -> None:
        """Wait for the device."""

    def timer(self, run: Run) -> Timer:
        """Microseconds per call, launched one after the other."""

        def block(calls: int) -> float:
            began = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - began) / calls * 1e6

        return block

    def samples(self, timers: Sequence[Timer]) -> list[list[float]]:
        """Samples of each, in rounds: blocks taken in turn, every other round backwards."""
        took = [self._warm_up(timer) for timer in timers]
        calls = [min(400, max(1, round(self.block_seconds * 1e6 / each))) for each in took]
        total = sum(count * each for count, each in zip(calls, took, strict=True))
        if total > PATIENCE:
            return [[each] for each in took]
        found: list[list[float]] = [[] for _ in timers]
        turns = list(zip(timers, calls, took, found, strict=True))
        for _ in range(min(self.rounds, max(5, int(self.seconds * 1e6 / total)))):
            for timer, count, each, into in turns:
                if each < 5e4:  # what the other left in the caches and the allocator is not its cost
                    timer(1)
                into.append(timer(count))
            turns.reverse()
        return found

    def _warm_up(self, timer: Timer, at_least: float = 3e4) -> float:
        """Run until clocks and caches have settled; returns microseconds per call."""
        calls, elapsed = 1, 0.0
        while True:
            each = timer(calls)
            elapsed += each * calls
            if elapsed > at_least:
                return each
            calls *= 2

    def peak_mib(self, run: Run, held_bytes: int = 0) -> float:
        """Peak memory of a run above what was there before it and what it leaves behind (`held_bytes`).

        On a CPU the highest resident set, which means something in a new process alone (Linux).
        """
        held = torch.ones(held_bytes // 4)
        before = _status_kib("VmRSS")
        del held
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        run()
        return (_status_kib("VmHWM") - before) / 1024

    def matrix_rate(self, rows: int, length: int, columns: int, dtype: torch.dtype) -> float:
        """Operations a second of one matrix product."""
        shapes = (rows, length), (length, columns), (rows, columns)
        a, b, out = (torch.randn(shape, device=self.device).to(dtype) for shape in shapes)
        times = self.samples([self.timer(lambda: torch.mm(a, b, out=out))])[0]
        return 2e6 * rows * length * columns / statistics.median(times)

    def release(self) -> None:
        """Give memory of finished contenders back."""
        gc.collect()


class CudaClock(Clock):
    """CUDA: device events, graphs, the allocator's statistics, the profiler.

    All work of the process moves to one side stream, where graphs are captured too: autograd runs a backward,
    and hands a gradient to its leaf, on the stream of the forward, and one that is not captured breaks it.
    """

    device = torch.device("cuda")

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def timer(self, run: Run) -> Timer:
        """Between events around a block of calls."""

        def block(calls: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) * 1e3 / calls

        return block

    def capture(self, run: Run) -> Run:
        """Warm up, then capture as a graph on the stream of everything else.

        The replay returns what it writes.
        """
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = run()

        def replay(held: Run = run) -> Any:  # what the graph reads must outlive it
            graph.replay()
            return result

        return replay

    def peak_mib(self, run: Run, held_bytes: int = 0) -> float:
        """From the allocator, so without what the driver and the kernels themselves hold."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - held_bytes) / 2**20

    def kernels(self, run: Run) -> list[str]:
        """Every kernel, copy and fill of one run that the profiler sees on the device, with its time."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        for _ in range(2):  # the first profile of a process may miss events
            with torch.profiler.profile(activities=activities) as profile:
                run()
                torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return [
            f"{event.name} {event.time_range.elapsed_us():.1f} us"
            for event in profile.events()
            if event.device_type == on_device and not getattr(event, "is_user_annotation", False)
        ]

    def release(self) -> None:
        """Give memory of finished contenders back."""
        gc.collect()
        torch.cuda.empty_cache()


def clock_of(device: str, **settings: Any) -> Clock:
    """The clock of a device; ends the program where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        print("No GPU is available here: nothing was measured. --device cpu measures on the CPU.")
        raise SystemExit(2)
    return CudaClock(**settings) if device == "cuda" else Clock(**settings)


# --- other processes ---------------------------------------------------------------------------------------


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own, where memory can be measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def available_bytes() -> int:
    """Memory that this machine can give now."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def limit_memory() -> None:
    """Fail with an error where memory runs out, before the system kills this process or another."""
    size = _status_kib("VmSize") * 1024 + int(0.9 * available_bytes())
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status: expected a line {field}")


class Elsewhere:
    """A timer in a process of its own, which imports the package from another checkout.

    `make(*arguments)` gives the timer there, and figures that come back as `found`.
    """

    def __init__(self, checkout: Path, make: Callable[..., tuple[Timer, dict]], *arguments: Any):
        self.site = tempfile.TemporaryDirectory(prefix="clusterns-")  # the package as it installs, by links
        package = Path(self.site.name) / "clusterns"
        package.mkdir()
        for path in (*(checkout / "clusterns").iterdir(), checkout / "kernels"):
            (package / path.name).symlink_to(path.resolve())
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        sys.path.insert(0, self.site.name)  # a process started now has it too
        try:
            self.found: dict = self.pool.submit(_make, make, *arguments).result()
        finally:
            sys.path.remove(self.site.name)

    def __call__(self, calls: int) -> float:
        """A block of calls."""
        return self.pool.submit(_block, calls).result()

    def close(self) -> None:
        """End the process."""
        self.pool.shutdown()
        self.site.cleanup()


_made: list[Timer] = []  # in that process


def _make(make: Callable[..., tuple[Timer, dict]], *arguments: Any) -> dict:
    timer, found = make(*arguments)
    _made.append(timer)
    return found


def _block(calls: int) -> float:
    return _made[0](calls)
