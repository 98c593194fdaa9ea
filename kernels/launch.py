"""How a kernel is launched: its parameters, a cache of compiled kernels, a recorder for those who plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
    """A kernel with everything it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tiles: Tiles


class Operation(NamedTuple):
    """A function of tensors that stands between launches."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


_recorded: list[Launch | Operation] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Any]]:
    """Collect launches and operations in place of running them; tensors may then be on the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def recorded(steps: list[Any]) -> bool:
    """Whether somebody is recording, who then gets these."""
    if _recorded is not None:
        _recorded.extend(steps)
    return _recorded is not None


def padded(count: int) -> int:
    """Round up to a multiple of 16: row starts stay aligned and one compiled kernel serves every batch."""
    return -(-count // 16) * 16


def new_float32(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 on the device of another tensor."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def cdiv(count: int, block: int) -> int:
    """Number of blocks."""
    return -(-count // block)


def operate(function: Callable[..., Any], **tensors: Tensor) -> None:
    """Call a function of tensors, or record that."""
    if not recorded([Operation(function, tensors)]):
        function(**tensors)


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    tiles: Tiles,
    shared: Mapping[str, Any] | None = None,
    /,
    **given: Any,
) -> None:
    """Run a kernel on the device of its tensors; `grid` gives the number of programs for a tile shape.

    Its parameters are filled by name: `z_ptr` with the tensor z, `z_stride` with the stride of its rows,
    `HAS_Z` with whether it was given; UPCAST, WAIT_FOR_STORES, DEPENDENT, TEMPERATURE_POINTER and where it is
    not given PRECISION with what device and temperature call for; every other with the value given, else 0.
    `shared` is given too, to several kernels, each of which takes what it has a parameter for.
    """
    shared = shared or {}
    given = {**shared, **given}
    device = next(iter(given.values())).device
    target = target_of(device)
    given.setdefault("PRECISION", target.precision())
    given["WAIT_FOR_STORES"], given["DEPENDENT"] = target.waits_for_stores, target.overlaps_launches
    given["UPCAST"] = target.backend == "interpreter"
    given["TEMPERATURE_POINTER"] = isinstance(given.get("temperature"), Tensor)
    parameters = _parameters.get(kernel)
    if parameters is None:
        names = [name for name in kernel.arg_names if name not in tiles.blocks]
        order = [*(name for name in names if not name.isupper()), *filter(str.isupper, names), *tiles.blocks]
        assert order == list(kernel.arg_names), f"{kernel.__name__}: parameters out of order"
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
    this = Launch(kernel, grid(tiles.blocks), arguments, constants, tiles)
    if _recorded is not None:
        known = {word for name, _, source in parameters for word in (name, source)}
        unused = given.keys() - shared.keys() - _AUTOMATIC - known
        assert not unused, f"{kernel.__name__}: no parameters for {unused}"
        _recorded.append(this)
    else:
        run, fixed = runner(this, device)
        with on(device):
            run(*arguments.values(), *fixed)


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """The device that launches go to."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def runner(this: Launch, device: torch.device) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """What launches the compiled kernel, given its run-time arguments in order, and the constants after them.

    Addresses will do for tensors; alignment and the like must be those of the arguments of this launch.
    """
    kernel, programs, arguments, constants, tiles = this
    target = target_of(device)
    fixed = (*constants.values(), *tiles.blocks.values())
    if target.backend == "interpreter":
        return kernel[programs], fixed
    resources = (tiles.num_warps, tiles.num_stages)
    key = (kernel, device.index, *resources, *fixed, *_specialization(kernel, arguments))
    compiled = _compiled.get(key)
    if compiled is None:
        options = tiles.options(target, constants.get("DEPENDENT", False))
        with on(device):  # what has no storage yet will be aligned
            values = [z.dtype if isinstance(z, Tensor) and z.is_meta else z for z in arguments.values()]
            compiled = _compiled[key] = kernel.warmup(*values, *fixed, grid=programs, **options)
    return compiled[(*programs, 1, 1)[:3]], fixed


def _parameter(name: str) -> tuple[str, str, str]:
    """A parameter's name, how it is filled, and from which of the values given."""
    for kind, ending in (("tensor", "_ptr"), ("stride", "_stride")):
        if name.endswith(ending):
            return name, kind, name.removesuffix(ending)
    if name.endswith("_descriptor"):
        return name, "tensor", name
    if name.startswith("HAS_"):
        return name, "has", name.removeprefix("HAS_").lower()
    return name, "number", name


_AUTOMATIC = {"PRECISION", "WAIT_FOR_STORES", "DEPENDENT", "UPCAST", "TEMPERATURE_POINTER"}
_parameters: dict[Any, list[tuple[str, str, str]]] = {}
# Compiled kernels, by all that they were compiled for. Triton keeps such a cache too, but looking into it
# takes longer than everything the GPU does for a small batch.
_compiled: dict[tuple, Any] = {}
_unspecialized: dict[Any, frozenset[str]] = {}


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
        elif isinstance(value, TensorDescriptor):
            found.append((value.base.dtype, *value.block_shape))
        else:
            found.append(value.dtype)
            found.append(value.data_ptr() & 15 == 0)
            if on_amd:
                found.append(value.untyped_storage().nbytes() < 2**31)
    return found
