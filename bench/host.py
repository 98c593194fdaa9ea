"""What a step costs the host: everything but the GPU's work, with stand-ins for the compiled kernels.

    python bench/run.py host [--batch 512 --dim 768] [--before ../old]

On CPU tensors, so allocations and autograd are those of a CPU. Of a training step with clustering active and
of plain InfoNCE, forward and backward; launches and allocations are counted.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from contenders import DTYPES, OURS, Built, Case, make_views
from harness import BEFORE
from measure import Clock, Elsewhere, Timer
from report import ROOT, Results

import clusterns

KERNELS = "similarity centroid_update objective gradient".split()
LAUNCHERS = "cosine_launchers objective_launchers".split()


class Compiled:
    """In place of a compiled kernel: takes a launch either way, does nothing."""

    function = packed_metadata = None

    def __init__(self, launches: list[str], name: str):
        self.launches, self.name = launches, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run

    def run(self, *arguments: Any) -> None:
        """Nothing runs."""
        self.launches.append(self.name)


class Kernel:
    """In place of a kernel that is yet to be compiled."""

    def __init__(self, kernel: Any, launches: list[str]):
        self.kernel, self.compiled = kernel, Compiled(launches, kernel.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values, **arguments: self.compiled

    def warmup(self, *values: Any, **arguments: Any) -> Compiled:
        """Nothing is compiled."""
        return self.compiled


def stand_in() -> list[str]:
    """Put stand-ins in the place of all kernels of a step, for good; returns the names of what is launched."""
    launches: list[str] = []
    target = import_module("clusterns.kernels.target")
    target.why_not = lambda *tensors: None
    target._override = target.Target("cuda", 90)
    kernels: dict[str, Kernel] = {}
    for module in map(import_module, (f"clusterns.kernels.{name}" for name in (*KERNELS, *LAUNCHERS))):
        for name, value in vars(module).items():
            if name.endswith("_kernel") and hasattr(value, "arg_names"):
                setattr(module, name, kernels.setdefault(name, Kernel(value, launches)))
    return launches


def timer_of(kind: str, batch: int, dim: int) -> tuple[Timer, dict[str, Any]]:
    """Timer of ours, and its launches and allocations, in a process for itself."""
    launches, case = stand_in(), Case(kind, batch, dim, dtype=DTYPES["bfloat16"])
    views = make_views(case, torch.device("cpu"))
    if kind == "step":
        loss = clusterns.ClusterNSLoss(dim, case.clusters, backend="triton", false_negatives="bml")
        loss.start_from(views.centers)
        call = lambda: loss(*views[:2])  # noqa: E731
    else:
        call = lambda: clusterns.info_nce(*views[:2], backend="triton")  # noqa: E731
    upstream = torch.ones(())

    def run() -> None:
        torch.autograd.grad(call(), views[:2], upstream)

    run()
    launches.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = [event.name for event in profile.events()]
    counted = {"launches": len(launches), "allocations": sum(name in ALLOCATIONS for name in names)}
    clock = Clock()

    def forgetful(run: Any = run) -> None:
        run()
        launches.clear()

    return clock.timer(forgetful), counted


ALLOCATIONS = {"aten::empty", "aten::empty_strided"}
