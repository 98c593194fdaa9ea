"""How kernels are launched: what is compiled anew and what is not, the arguments' order.

No GPU is needed: the launches are recorded, or a stand-in takes the compiled kernel's place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("triton")
from clusterns.kernels import (
    assignment,
    centroid_update,
    cluster_sums,
    cosine_launchers,
    gradient,
    launch,
    objective,
    objective_launchers,
    plan,
    similarity,
)
from clusterns.kernels.target import Target, assume

KERNELS = {
    assignment: assignment.assignment_kernel,
    cluster_sums: cluster_sums.member_sums_kernel,
    centroid_update: centroid_update.centroid_update_kernel,
    gradient: gradient.gradient_kernel,
    objective: objective.objective_kernel,
    similarity: similarity.cosine_kernel,
}
BATCH_SIZES = {"num_rows", "num_columns", "num_negatives", "num_centroids", "num_counters", "num_tiles"}


def record(batch, dtype=torch.float32, dim=24):
    """The launches of a loss and its gradient on tensors without storage."""
    x = torch.empty(batch, dim, dtype=dtype, device="meta")
    with launch.recording() as launches:
        objective_launchers.forward_steps(*(x, x), *[None] * 5, False, False, True, "", "keep")
        objective_launchers.backward_steps(x[0, 0], x, x, None, None, 0, (True, True, False))
    return launches


@pytest.mark.parametrize("module", KERNELS, ids=lambda module: module.__name__.split(".")[-1])
def test_batch_sizes_are_not_specialised(module):
    """A new batch size must not compile again, so no kernel may see it as a constant or its divisors."""
    assert set(KERNELS[module].arg_names) & BATCH_SIZES == set(module.BATCH_SIZES)


def test_tiles_change_with_the_batch_only_once():
    for dtype in (torch.float32, torch.bfloat16):
        shapes = {
            tuple(str(each.tiles) for each in record(batch, dtype))
            for batch in (1, 64, 255, 256, 512, 1023, 1024, 2048, 4096)
        }
        assert len(shapes) == 2


class Compiled:
    """In place of what Triton compiles; remembers how it was launched."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel:
    """In place of a kernel: compiles to `Compiled` and counts how often."""

    def __init__(self, kernel):
        self.__name__, self.arg_names = kernel.__name__, kernel.arg_names
        batch = set(self.arg_names) & BATCH_SIZES
        self.params = [
            type("Parameter", (), {"name": name, "do_not_specialize": name in batch})()
            for name in self.arg_names
        ]
        self.compilations = 0
        self.compiled = Compiled()

    def warmup(self, *arguments, grid, num_warps, num_stages, **options):
        assert len(arguments) == len(self.arg_names)
        self.compilations += 1
        return self.compiled


@pytest.fixture
def stand_in(monkeypatch):
    """Launch as on a GPU, with stand-ins for the kernels."""
    kernel = Kernel(similarity.cosine_kernel)
    monkeypatch.setattr(cosine_launchers, "cosine_kernel", kernel)
    monkeypatch.setattr(launch, "_parameters", {})
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with assume(Target("cuda", 90)):
        yield kernel


def rows(count, dim=32, dtype=torch.float32):
    return torch.zeros(count, dim, dtype=dtype, device=DEVICE)


def test_a_new_batch_size_compiles_nothing(stand_in):
    for count in (64, 1, 63, 100, 512, 1023):
        cosine_launchers.compare(rows(count), rows(count))
    assert stand_in.compilations == 1
    assert len(stand_in.compiled.launched) == 6
    grid, arguments = stand_in.compiled.launched[-1]
    assert grid == (16 * 32, 1, 1)
    named = dict(zip(stand_in.arg_names, arguments, strict=True))
    assert named["num_rows"] == 1023
    assert named["dim"] == 32
    assert named["HAS_Y"] is True
    assert named["BLOCK_M"] == 64


def test_what_changes_the_code_compiles_again(stand_in):
    cosine_launchers.compare(rows(64), rows(64))
    different = [
        lambda: cosine_launchers.compare(rows(64, dtype=torch.bfloat16), rows(64, dtype=torch.bfloat16)),
        lambda: cosine_launchers.compare(rows(64, 33)[:, :32], rows(64)),  # row stride
        lambda: cosine_launchers.compare(rows(65).view(-1)[1:2049].view(64, 32), rows(64)),  # alignment
        lambda: cosine_launchers.compare(rows(64, 30), rows(64, 30)),
        lambda: cosine_launchers.compare(rows(64), rows(64), rows(8)),
        lambda: cosine_launchers.compare(rows(64), rows(64), temperature=torch.ones((), device=DEVICE)),
        lambda: cosine_launchers.compare(rows(2048), rows(2048)),  # the large tiles
    ]
    for number, call in enumerate(different):
        for _ in range(2):
            call()
        assert stand_in.compilations == 2 + number
    torch.set_float32_matmul_precision("high")
    try:
        cosine_launchers.compare(rows(64), rows(64))
        assert stand_in.compilations == 2 + len(different)
    finally:
        torch.set_float32_matmul_precision("highest")


def without_interpreter(worker):
    """What a script of `support` prints, a JSON document a line."""
    code = Path(__file__).parent / "support" / f"{worker}.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(code)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


def test_the_cache_distinguishes_all_that_triton_does():
    """Random arguments: wherever Triton would compile other code, our key differs too."""
    lines = without_interpreter("specialization_worker")
    for counted in lines:  # NVIDIA, then AMD
        assert counted["pairs_that_differ_for_triton"] > 1000
        assert counted["missed"] == 0
        assert counted["pairs_alike"] > 1000  # and it is no finer than need be for a change of batch
        assert counted["recompiled_for_a_batch"] == 0
    assert len(lines) == 2


def test_a_step_goes_through_tritons_own_compiler():
    """With a driver that launches nothing: the compiled kernels take a plan's addresses, and overlap."""
    (found,) = without_interpreter("stub_driver_worker")
    first, second = found["launches"][:5], found["launches"][5:]
    kernels = [name.removesuffix("_kernel") for name, *_ in first]
    assert kernels == ["cosine", "centroid_update", "cosine", "objective", "gradient"]
    for (name, grid, addresses, overlaps), again in zip(first, second, strict=True):
        assert [name, grid, overlaps] == [again[0], again[1], True]
        assert len(addresses) == len(again[2])
        assert all(isinstance(address, int) and address % 16 == 0 for address in addresses)
    assert first[0][2][:2] == second[0][2][:2] == found["views"]


def plan_of(*options, rows=40, dim=16, dtype=torch.float32, **more):
    x = torch.randn(rows, dim, device=DEVICE).to(dtype)
    given = (x, x + 1, None, torch.randn(6, dim, device=DEVICE), None, None, None)
    return plan.plan_of(objective_launchers.forward_steps, given, options), given


def test_a_plan_is_made_once_for_what_it_depends_on(monkeypatch):
    monkeypatch.setattr(plan, "plans", {})
    options = (True, True, True, "sum", "bml")
    first = plan_of(*options)[0]
    assert plan_of(*options)[0] is first
    others = [
        plan_of(*options, rows=41)[0],
        plan_of(*options, dim=17)[0],
        plan_of(*options, dtype=torch.bfloat16)[0],
        plan_of(True, True, False, "sum", "bml")[0],
        plan_of(True, True, True, "mean", "bml")[0],
    ]
    x = torch.randn(41, 16, device=DEVICE).view(-1)[1:641].view(40, 16)  # not aligned to 16 bytes
    given = (x, x, None, torch.randn(6, 16, device=DEVICE), None, None, None)
    others.append(plan.plan_of(objective_launchers.forward_steps, given, options))
    assert len({id(each) for each in (first, *others)}) == 7
    assert len(plan.plans) == 7
    for rows in range(1, 300):
        plan_of(*options, rows=rows)
    assert len(plan.plans) <= 256  # batches of any size do not fill the memory


def test_a_plan_puts_addresses_and_numbers_in_their_places(monkeypatch):
    """What a compiled kernel gets are the addresses of what the interpreter is given as tensors."""
    kernels = {}
    for module in (cosine_launchers, objective_launchers):
        for name in ("cosine_kernel", "centroid_update_kernel", "objective_kernel"):
            if hasattr(module, name):
                kernels[name] = Kernel(getattr(module, name))
                monkeypatch.setattr(module, name, kernels[name])
    monkeypatch.setattr(plan, "plans", {})
    with assume(Target("cuda", 90)):
        made, given = plan_of(True, True, True, "sum", "bml", dtype=torch.bfloat16)
        workspace = torch.empty(made.length, dtype=torch.uint8, device=DEVICE)
        tensors = (*given, torch.empty((), device=DEVICE), torch.empty(8, device=DEVICE), workspace)
        numbers = plan.Numbers(0.07, 0.1, 0.2, 0.3, 0.4, 0.5)
        made.run(tensors, numbers)
    seen = set()
    for step, places in zip(made.recorded, made._places, strict=True):
        kernel = kernels[step.kernel.__name__]
        named = dict(zip(kernel.arg_names, kernel.compiled.launched.pop(0)[1], strict=True))
        for name, place in places.items():
            view = place.view(tensors)
            assert named[name] == view.data_ptr(), name
            if place.source == len(tensors) - 1:  # within the workspace, and nothing lies over another
                assert 0 <= place.offset <= made.length - view.numel() * view.itemsize
            seen.add(name)
        for name, value in zip(numbers._fields, numbers, strict=True):
            if step.arguments.get(name) is plan.LATER:
                assert named[name] == value
                seen.add(name)
    assert {"cosines_ptr", "weights_ptr", "updated_ptr", "loss_ptr", *numbers._fields} <= seen
