"""What a step costs the host: everything but the GPU's work, with stand-ins for the compiled kernels.

    python bench/run.py host [--batch 512 --dim 768] [--before ../old]

On CPU tensors, so allocations (which a C library keeps) and autograd are those of a CPU. Forward and backward
of a training step with clustering active and of plain InfoNCE; launches and allocations are counted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported: interpreted ones are not compiled
# Of the processes that measure: keep what is freed, as a GPU's allocator does, and never ask the system.
os.environ |= {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}

import torch
from contenders import BF16, OURS, Case, make_views, our_loss
from harness import BEFORE
from measure import Clock, Elsewhere, Timer
from report import ROOT, Results, output

import clusterns

MODULES = "similarity centroid_update objective gradient cosine_launchers objective_launchers".split()


class Compiled:
    """In place of a compiled kernel: counts a launch, and nothing runs."""

    def __init__(self, name: str, launches: list[str]):
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.launches.append(self.name)


class Kernel:
    """In place of a kernel, which either way of compiling it gives a stand-in."""

    def __init__(self, kernel: Any, launches: list[str]):
        self.kernel, self.compiled = kernel, Compiled(kernel.__name__, launches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        return self.warmup

    def warmup(self, *arguments: Any, **more: Any) -> Compiled:
        """Nothing is compiled."""
        return self.compiled


def put_stand_ins() -> list[str]:
    """Replace the kernels of a step, for good; returns the list in which each launch leaves a name."""
    launches: list[str] = []
    target = import_module("clusterns.kernels.target")
    target.why_not = lambda *tensors: None
    target._override = target.Target("cuda", 90)
    kernels: dict[str, Kernel] = {}
    for module in map(import_module, (f"clusterns.kernels.{name}" for name in MODULES)):
        for name, value in vars(module).items():
            if name.endswith("_kernel") and hasattr(value, "arg_names"):
                setattr(module, name, kernels.setdefault(name, Kernel(value, launches)))
    return launches


def timer_of(case: Case) -> tuple[Timer, dict[str, int]]:
    """Timer of ours, and its launches and allocations, in a process for itself."""
    torch.set_num_threads(1)
    launches, views = put_stand_ins(), make_views(case, torch.device("cpu"))
    upstream = torch.ones(())
    if case.kind == "step":
        loss = our_loss(case.dim, case.clusters, views.centers, backend="triton")
    else:
        loss = partial(clusterns.info_nce, backend="triton")

    def run() -> None:
        launches.clear()
        torch.autograd.grad(loss(*views[:2]), views[:2], upstream)

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    made = [event for event in profile.events() if event.name in ("aten::empty", "aten::empty_strided")]
    return Clock().timer(run), {"launches": len(launches), "allocations": len(made)}


def measure(results: Results, clock: Clock, before: Any, case: Case) -> None:
    """Rows of ours, and of another checkout beside it."""
    sides: list[Elsewhere] = []
    try:
        for checkout in filter(None, (ROOT, before)):
            sides.append(Elsewhere(checkout, timer_of, case))  # noqa: PERF401
        times = clock.samples(sides)
        for name, side, own in zip((OURS, BEFORE), sides, times, strict=False):
            ratios = sorted(theirs / ours for theirs, ours in zip(own, times[0], strict=True))
            row = {"host_us": sorted(own)[len(own) // 2], "host_us_fastest": min(own), **side.found}
            if name == BEFORE:
                fastest = min(own) / min(times[0])
                row |= {"ratio_host": ratios[len(ratios) // 2], "ratio_host_fastest": fastest}
                row["note"] = f"commit {output('git', 'describe', '--always', '--dirty', folder=before)}"
            results.add({"contender": name, **case.columns(), "status": "ok", "note": "", **row})
    finally:
        for side in sides:
            side.close()


def stages(wanted: argparse.Namespace, results: Results, clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do: a case a stage."""
    cases = [
        Case(kind, batch, dim, wanted.clusters, BF16)
        for dim in wanted.dim
        for batch in wanted.batch
        for kind in ("step", "plain")
    ]
    return [(f"host {case}", partial(measure, results, clock, wanted.before, case)) for case in cases]
