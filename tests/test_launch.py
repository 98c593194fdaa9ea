"""How kernels are launched: what is compiled anew and what is not, sweeps, the arguments' order.

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
from clusterns import operators
from clusterns.kernels import (
    centroid_update,
    cosine_launchers,
    gradient,
    launch,
    objective,
    objective_launchers,
    similarity,
    similarity_gradient,
)
from clusterns.kernels.target import Target, assume

KERNELS = {
    centroid_update: centroid_update.centroid_update_kernel,
    gradient: gradient.gradient_kernel,
    objective: objective.objective_kernel,
    similarity: similarity.cosine_kernel,
    similarity_gradient: similarity_gradient.similarity_gradient_kernel,
}
BATCH_SIZES = {"num_rows", "num_columns", "num_negatives", "num_centroids", "num_counters", "num_tiles"}
BATCH_SIZES |= {"cosine_blocks", "centroid_blocks"}


def record(batch, dtype=torch.float32, dim=24):
    """The launches of a loss and its gradient on tensors without storage."""
    x = torch.empty(batch, dim, dtype=dtype, device="meta")
    counters = torch.empty(64, dtype=torch.int32, device="meta")
    numbers = objective_launchers.Numbers(0.05, 0.0, 0.0, 0.0, 0.0, "keep")
    with launch.recording() as launches:
        cosines, x_inverse, y_inverse, _, _ = cosine_launchers.compare(x, x)
        loss, _, state = objective_launchers.evaluate(cosines, 0, counters, numbers)
        objective_launchers.differentiate(
            loss, x, x, None, cosines, x_inverse, y_inverse, state, counters, numbers, (True, True, False)
        )
    return launches


def test_arguments_stand_in_the_order_of_the_parameters():
    """A compiled kernel is launched by position. `recording` checks it; the audit records every launch."""
    for each in record(8):
        names = [*each.arguments, *each.constants, *each.tiles.blocks]
        assert names == list(each.kernel.arg_names)


@pytest.mark.parametrize("module", KERNELS, ids=lambda module: module.__name__.split(".")[-1])
def test_batch_sizes_are_not_specialised(module):
    """A new batch size must not compile again, so no kernel may see it as a constant or its divisors."""
    assert set(KERNELS[module].arg_names) & BATCH_SIZES == set(module.BATCH_SIZES)


def test_nothing_is_keyed_by_the_batch():
    assert not BATCH_SIZES & {key for keys in launch.SWEEP_KEYS.values() for key in keys}
    for kernel in KERNELS.values():
        assert set(launch.SWEEP_KEYS.get(kernel.__name__, [])) <= set(kernel.arg_names)


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

    def __getitem__(self, grid):
        def run(**arguments):
            assert list(arguments)[: len(self.arg_names)] == self.arg_names
            self.compilations += 1
            return self.compiled

        return run


@pytest.fixture
def stand_in(monkeypatch):
    """Launch as on a GPU, with stand-ins for the kernels."""
    kernel = Kernel(similarity.cosine_kernel)
    monkeypatch.setattr(cosine_launchers, "cosine_kernel", kernel)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_may_sweep", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with assume(Target("cuda", 90)):
        yield kernel


def rows(count, dim=32, dtype=torch.float32):
    return torch.zeros(count, dim, dtype=dtype, device=DEVICE)


def test_a_new_batch_size_compiles_nothing(stand_in):
    for count in (64, 1, 63, 100, 512, 1023):
        cosine_launchers.compare(rows(count), rows(count))
    assert stand_in.compilations == 1
    assert len(stand_in.compiled.launched) == 5
    grid, arguments = stand_in.compiled.launched[-1]
    assert grid == (16 * 32, 1, 1)
    named = dict(zip(stand_in.arg_names, arguments, strict=True))
    assert named["num_rows"] == 1023
    assert named["dim"] == 32
    assert named["HAS_COLUMNS"] is True
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


def half(count):
    return rows(count, dtype=torch.bfloat16)


def test_large_work_is_swept_once_and_small_is_not(stand_in, monkeypatch):
    swept = []

    class Tuned:
        best_config = type("Config", (), {"kwargs": {
            "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": 32, "BLOCK_K_D": 32
        }})  # fmt: skip

        def __getitem__(self, grid):
            return lambda **arguments: stand_in.compiled

    monkeypatch.setattr(
        launch, "_with_sweep", lambda kernel, tiles, backend, device: swept.append(kernel.__name__) or Tuned()
    )
    cosine_launchers.compare(half(512), half(512))
    assert not swept
    monkeypatch.setattr(launch, "SWEEP_OPERATIONS", 1)
    cosine_launchers.compare(rows(512), rows(512))  # float32: no other shape does without spills
    assert not swept
    for _ in range(2):
        cosine_launchers.compare(half(512), half(512))
    assert swept == ["cosine_kernel"]
    grid, arguments = stand_in.compiled.launched[-1]
    assert grid == (4 * 8, 1, 1)  # the shape that won
    assert dict(zip(stand_in.arg_names, arguments, strict=True))["BLOCK_M"] == 128
    # A launch that counts must run once.
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    cosine_launchers.assign(half(512), rows(4), counters)
    assert swept == ["cosine_kernel"]


def test_a_capture_uses_what_won_before_but_times_nothing(stand_in, monkeypatch):
    swept = []
    monkeypatch.setattr(launch, "SWEEP_OPERATIONS", 1)

    class Tuned:
        best_config = type("Config", (), {"kwargs": {
            "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": 32, "BLOCK_K_D": 32
        }})  # fmt: skip

        def __getitem__(self, grid):
            return lambda **arguments: swept.append(1) or stand_in.compiled

    monkeypatch.setattr(launch, "_with_sweep", lambda kernel, tiles, backend, device: Tuned())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):  # not known yet: compiled with the chosen tiles, then launched
        cosine_launchers.compare(half(512), half(512))
    assert not swept
    assert stand_in.compilations == 1
    assert stand_in.compiled.launched[-1][0] == (8 * 16, 1, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cosine_launchers.compare(half(512), half(512))
    assert len(swept) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cosine_launchers.compare(half(512), half(512))
    assert len(swept) == 1
    assert stand_in.compiled.launched[-1][0] == (4 * 8, 1, 1)


def test_no_sweep_where_bits_must_not_change(monkeypatch):
    assert launch._may_sweep()
    monkeypatch.setenv("CLUSTERNS_AUTOTUNE", "0")
    assert not launch._may_sweep()
    monkeypatch.delenv("CLUSTERNS_AUTOTUNE")
    with monkeypatch.context() as patch:  # ranks would choose for themselves
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert not launch._may_sweep()
    assert launch._may_sweep()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not launch._may_sweep()


def test_the_cache_distinguishes_all_that_triton_does():
    """Random arguments: wherever Triton would compile other code, our key differs too."""
    code = Path(__file__).parent / "support" / "specialization_worker.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(code)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    for counted in map(json.loads, done.stdout.splitlines()):  # NVIDIA, then AMD
        assert counted["pairs_that_differ_for_triton"] > 1000
        assert counted["missed"] == 0
        assert counted["pairs_alike"] > 1000  # and it is no finer than need be for a change of batch
        assert counted["recompiled_for_a_batch"] == 0
    assert len(done.stdout.splitlines()) == 2


def test_fakes_have_the_shapes_and_device_of_the_real():
    """The operators' own code on tensors without storage against what compilation sees."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, n, c = meta(20, 8), meta(20, 8), meta(3, 8), meta(5, 8)
    ids = meta(20, dtype=torch.int64)
    numbers = (0.05, None, 0.2, "bml", 0.3, 0.1, 0.3)
    compared = torch.ops.clusterns.compare(x, y, n, c, True, True, None, "sum", 0.1)
    cosines, x_inverse, y_inverse, counters, *_, centroid_cosines, centroid_inverse, updated = compared
    samples = [
        (operators._compare, "compare", (x, y, n, c, True, True, None, "sum", 0.1)),
        (operators._compare, "compare", (x, y, None, c, True, False, None, "", 0.0)),
        (operators._compare, "compare", (x, y, None, None, False, False, None, "", 0.0)),
        (
            operators._evaluate,
            "evaluate",
            (cosines, 3, counters, 5, centroid_cosines, ids, ids, ids, x_inverse, x_inverse, *numbers),
        ),
        *(
            (
                operators._differentiate,
                "differentiate",
                (meta(), x, y, n, cosines, x_inverse, y_inverse, meta(4, 20), counters, updated,
                 centroid_cosines, centroid_inverse, ids, ids, 5, *needs, *numbers),
            )
            for needs in ((True, True, True), (False, True, False), (True, False, True))
        ),
        (operators._similarity, "similarity", (x, n, 0.3, None)),
        (
            operators._similarity_backward,
            "similarity_backward",
            (meta(20, 3), x, n, meta(20, 16), x_inverse, meta(16), 0.3, None, True, False),
        ),
        (operators._assign, "assign", (x, c)),
        (operators._cluster_sums, "cluster_sums", (x, c)),
    ]  # fmt: skip
    for real, name, arguments in samples:
        with launch.recording() as launches:
            found = real(*arguments)
        assert launches
        expected = getattr(torch.ops.clusterns, name)(*arguments)
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.stride(), one.dtype, one.device) == (
                other.shape,
                other.stride(),
                other.dtype,
                other.device,
            ), name


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.__name__)
def test_sweeps_cover_only_kernels_that_may_run_twice(kernel):
    candidates = launch.CANDIDATES.get(kernel.__name__, [])
    assert bool(candidates) == (kernel.__name__ in ("cosine_kernel", "gradient_kernel"))
    # The block that a sum runs over stays, whatever shape wins.
    summed = {"cosine_kernel": "BLOCK_D", "gradient_kernel": "BLOCK_N"}.get(kernel.__name__)
    assert all(summed not in tiles.blocks for tiles in candidates)
