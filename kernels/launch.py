"""How a kernel is launched: its parameters, a cache of compiled kernels, a recorder to compile ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .target import Target, target_of

# Rows from which the large tiles are used.
LARGE_BATCH = 2048


@dataclass(frozen=True)
class Tiles:
    """Tile shape and resources of one launch."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    def options(self, target: Target, dependent: bool) -> dict[str, int]:
        """Launch options. Left alone, ptxas trades a few spilled registers for occupancy: not here."""
        most = {"maxnreg": min(255, 65536 // (32 * self.num_warps))} if target.backend == "cuda" else {}
        early = {"launch_pdl": True} if dependent else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **most, **early}


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


def launch(
    kernel: Any, grid: Callable[[Mapping[str, int]], tuple[int, ...]], tiles: Tiles, **given: Any
) -> None:
    """Run a kernel on the device of its tensors; `grid` gives the number of programs for a tile shape.

    Its parameters are filled by name: `z_ptr` with the tensor z, `z_stride` with the stride of its rows,
    `HAS_Z` with whether it was given; UPCAST, WAIT_FOR_STORES, DEPENDENT, TEMPERATURE_POINTER and where it is
    not given PRECISION with what device and temperature call for; every other with the value given, else 0.
    """
    first = next(iter(given.values()))
    device = first.device
    if _recorded is None and device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tiles, **given)
        return
    target = target_of(device)
    given.setdefault("PRECISION", target.precision())
    given["WAIT_FOR_STORES"], given["DEPENDENT"] = target.waits_for_stores, target.overlaps_launches
    given["UPCAST"] = target.backend == "interpreter"
    given["TEMPERATURE_POINTER"] = isinstance(given.get("temperature"), Tensor)
    parameters = _parameters.get(kernel)
    if parameters is None:
        names = [name for name in kernel.arg_names if name not in tiles.blocks]
        parameters = _parameters[kernel] = [_parameter(name) for name in names]
    arguments: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name, kind, source in parameters:
        value = given[name] if name in given else given.get(source)
        if kind == "stride":
            value = value.stride(0) if value is not None else 0
        elif kind == "has" and name not in given:
            value = value is not None
        elif kind == "number" and value is None:
            value = 0
        (constants if name.isupper() else arguments)[name] = value
    programs = grid(tiles.blocks)
    if _recorded is not None:
        _check(kernel, arguments, constants, tiles, given)
        _recorded.append(Launch(kernel, programs, arguments, constants, tiles))
        return
    if target.backend == "interpreter":
        kernel[programs](**arguments, **constants, **tiles.blocks)
        return
    blocks, constant = tiles.blocks.values(), constants.values()
    resources = (tiles.num_warps, tiles.num_stages)
    key = (kernel, device.index, *resources, *blocks, *constant, *_specialization(kernel, arguments))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*programs, 1, 1)[:3]](*arguments.values(), *constant, *blocks)
        return
    _check(kernel, arguments, constants, tiles, given)
    options = tiles.options(target, constants.get("DEPENDENT", False))
    _compiled[key] = kernel[programs](**arguments, **constants, **tiles.blocks, **options)


def _parameter(name: str) -> tuple[str, str, str]:
    """A parameter's name, how it is filled, and from which of the values given."""
    for kind, ending in (("tensor", "_ptr"), ("stride", "_stride")):
        if name.endswith(ending):
            return name, kind, name.removesuffix(ending)
    if name.startswith("HAS_"):
        return name, "has", name.removeprefix("HAS_").lower()
    return name, "number", name


_AUTOMATIC = {"PRECISION", "WAIT_FOR_STORES", "DEPENDENT", "UPCAST", "TEMPERATURE_POINTER"}
_parameters: dict[Any, list[tuple[str, str, str]]] = {}
# Compiled kernels, by all that they were compiled for. Triton keeps such a cache too, but looking into it
# takes longer than everything the GPU does for a small batch.
_compiled: dict[tuple, Any] = {}
_unspecialized: dict[Any, frozenset[str]] = {}


def _check(
    kernel: Any,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    tiles: Tiles,
    given: dict[str, Any],
) -> None:
    """What a launch by name and position relies on; looked at whenever a launch is new."""
    names = [*arguments, *constants, *tiles.blocks]
    assert names == list(kernel.arg_names), f"{kernel.__name__}: parameters out of order"
    unused = (
        given.keys()
        - _AUTOMATIC
        - {word for name, _, source in _parameters[kernel] for word in (name, source)}
    )
    assert not unused, f"{kernel.__name__}: no parameters for {unused}"
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
