"""How a kernel is launched: tile shapes, precision of products, sweeps, a recorder to compile ahead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .target import interpreting, target_of

# Operations of one product from which trying several tile shapes pays; below, nothing is ever tried.
SWEEP_OPERATIONS = 2 * 2048 * 2048 * 768
# Rows from which the large tiles are used.
LARGE_BATCH = 1024


@dataclass(frozen=True)
class Tiles:
    """Tile shape and resources of one launch."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    def options(self, backend: str) -> dict[str, int]:
        """Launch options. Left alone, ptxas trades a few spilled registers for occupancy: not here."""
        most = {"maxnreg": min(255, 65536 // (32 * self.num_warps))} if backend == "cuda" else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **most}


class Launch(NamedTuple):
    """A kernel with everything it is called with; what `recording` collects."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tiles: Tiles


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches in place of running them; the tensors may then be on the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def padded(count: int) -> int:
    """Round up to a multiple of 16: row starts stay aligned and one compiled kernel serves every batch."""
    return -(-count // 16) * 16


def new_float32(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 on the device of another tensor."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def cdiv(count: int, block: int) -> int:
    """Number of blocks."""
    return -(-count // block)


def operations(x: Tensor, columns: int) -> int:
    """Operations of one product of x (B, D), as far as they count for a sweep: in half precision."""
    return 2 * x.shape[0] * columns * x.shape[1] if x.dtype.itemsize == 2 else 0


def product_constants(x: Tensor) -> dict[str, Any]:
    """How products are taken: constants of every kernel with one."""
    target = target_of(x.device)
    return {
        "PRECISION": target.precision(),
        "UPCAST": target.backend == "interpreter" and x.dtype.itemsize == 2,
    }


# Tile shapes to try for large work in half precision, per kernel, in addition to the chosen ones: those that
# compile without spills, which bench/audit.py checks. The block that a sum runs over stays, so that results
# differ at most in the last bits between them.
CANDIDATES = {
    "cosine_kernel": [
        Tiles({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in ((128, 128, 8, 4), (128, 64, 4, 3), (64, 128, 4, 4))
    ],
    "gradient_kernel": [
        Tiles({"BLOCK_M": 64, "BLOCK_D": d}, num_warps=8, num_stages=stages)
        for d, stages in ((256, 2), (64, 3))
    ],
}
# What the best shape depends on. Never the batch.
SWEEP_KEYS = {
    "cosine_kernel": ["dim", "HAS_NEGATIVES", "HAS_CENTROIDS", "PRECISION"],
    "gradient_kernel": [
        "dim",
        "NEED_X",
        "NEED_Y",
        "NEED_NEGATIVES",
        "HAS_HARD",
        "FALSE_NEGATIVES",
        "PRECISION",
    ],
}
_tuned: dict[tuple, Any] = {}


def _may_sweep() -> bool:
    """Whether another choice of tiles, which may change the last bit, is allowed.

    Not with several ranks: each would choose for itself, and centroids that all of them keep would part.
    """
    return (
        os.environ.get("CLUSTERNS_AUTOTUNE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


def _with_sweep(kernel: Any, tiles: Tiles, backend: str, device: int) -> Any:
    """Autotuned twin of a kernel for one device, its results kept on disk in Triton's cache."""
    name = kernel.__name__
    key = (name, tuple(tiles.blocks.items()), device)
    if key not in _tuned:
        configs = [
            triton.Config(dict(each.blocks), **each.options(backend))
            for each in (tiles, *(with_candidate(tiles, candidate) for candidate in CANDIDATES[name]))
        ]
        _tuned[key] = triton.autotune(configs=configs, key=SWEEP_KEYS[name], cache_results=True)(kernel)
    return _tuned[key]


def with_candidate(tiles: Tiles, candidate: Tiles) -> Tiles:
    """A tile shape of a sweep: the candidate's blocks in place of the chosen ones."""
    return Tiles({**tiles.blocks, **candidate.blocks}, candidate.num_warps, candidate.num_stages)


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    tiles: Tiles,
    work: int = 0,
) -> None:
    """Run a kernel on the device of its tensors; from `SWEEP_OPERATIONS` on with the fastest tile shape.

    `grid` gives the number of programs for a tile shape. arguments, constants and blocks stand in the order
    of the kernel's parameters. `work`, its operations, of 0 never sweeps: a launch that must not be repeated.
    """
    if _recorded is not None:
        _check(kernel, arguments, constants, tiles)
        _recorded.append(Launch(kernel, grid(tiles.blocks), arguments, constants, tiles))
        return
    device = next(iter(arguments.values())).device  # the first argument is a tensor, all are on its device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, constants, tiles, work)
        return
    if interpreting():
        kernel[grid(tiles.blocks)](**arguments, **constants, **tiles.blocks)
        return
    sweep = work >= SWEEP_OPERATIONS and _may_sweep()
    key = (
        kernel,
        device.index,
        sweep,
        tiles.num_warps,
        tiles.num_stages,
        *tiles.blocks.values(),
        *constants.values(),
        *_specialization(kernel, arguments),
    )
    known = _compiled.get(key)
    if known is None and sweep and torch.cuda.is_current_stream_capturing():
        launch(kernel, grid, arguments, constants, tiles)  # nothing can be timed now
        return
    if known is not None:
        compiled, blocks = known
        programs = grid(blocks)
        compiled[(*programs, 1, 1)[:3]](*arguments.values(), *constants.values(), *blocks.values())
        return
    _check(kernel, arguments, constants, tiles)
    backend, blocks = target_of(device).backend, dict(tiles.blocks)
    if sweep:
        tuned = _with_sweep(kernel, tiles, backend, device.index)
        compiled = tuned[grid](**arguments, **constants)
        blocks = {name: tuned.best_config.kwargs[name] for name in blocks}
    else:
        compiled = kernel[grid(blocks)](**arguments, **constants, **blocks, **tiles.options(backend))
    _compiled[key] = compiled, blocks


# Compiled kernels with their tile shapes, by all that they were compiled for. Triton keeps such a cache too,
# but looking into it takes longer than everything the GPU does for a small batch.
_compiled: dict[tuple, tuple[Any, dict[str, int]]] = {}
_unspecialized: dict[Any, frozenset[str]] = {}


def _check(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], tiles: Tiles) -> None:
    """What a launch by position relies on; looked at whenever a launch is new."""
    names = [*arguments, *constants, *tiles.blocks]
    assert names == list(kernel.arg_names), f"{kernel.__name__}: arguments out of order"
    devices = {value.device for value in arguments.values() if isinstance(value, Tensor)}
    assert len(devices) == 1, f"{kernel.__name__}: arguments on {devices}"


def _specialization(kernel: Any, arguments: dict[str, Any]) -> list[Any]:
    """What the compiled code depends on beyond its constants: types, alignment to 16, ones.

    At least as fine as Triton's own distinction, which a test checks.
    """
    unspecialized = _unspecialized.get(kernel)
    if unspecialized is None:
        names = (parameter.name for parameter in kernel.params if parameter.do_not_specialize)
        unspecialized = _unspecialized[kernel] = frozenset(names)
    # On AMD Triton makes 32-bit offsets of pointers into small storages.
    on_amd = torch.version.hip is not None
    found: list[Any] = []
    for name, value in arguments.items():
        kind = value.__class__
        if kind is int:
            wide = value >> 31
            found.append(wide if name in unspecialized else (wide, -1 if value == 1 else value & 15 == 0))
        elif value is None or kind is float:
            found.append(kind)
        else:
            found.append(value.dtype)
            found.append(value.data_ptr() & 15 == 0)
            if on_amd:
                found.append(value.untyped_storage().nbytes() < 2**31)
    return found
