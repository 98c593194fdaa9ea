"""What a step launches, worked out once for its shapes, dtypes, alignments and options, and then repeated.

The launchers run on tensors without storage while they are recorded. What they make gets its place in one
workspace; compiled kernels, grids and all arguments but addresses and a few numbers are kept. A later step
allocates the workspace, puts addresses and numbers in and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch, Operation, on, recorded, recording, runner
from .target import assume, target_of

Tensors = Sequence[Tensor | None]
Record = Callable[..., tuple[Tensors, Sequence[Tensor]]]
_ALIGNMENT = 256  # bytes
_MOST = 256  # plans that are kept


# In the place of a number while a plan is made.
LATER = float("nan")


class Numbers(NamedTuple):
    """What may change from one step to the next, by the names of the kernels' parameters."""

    temperature: float | Tensor = LATER
    hard_negative_weight: float = LATER
    bml_weight: float = LATER
    alpha: float = LATER
    beta: float = LATER
    momentum: float = LATER


class _Place(NamedTuple):
    """Where an argument lies: so many bytes into one of the tensors that a plan is run with."""

    source: int
    offset: Any
    like: Tensor

    def view(self, tensors: Tensors) -> Tensor:
        """The argument itself."""
        source, like = tensors[self.source], self.like
        assert source is not None
        if not self.offset and source.dtype == like.dtype and source.shape == like.shape:
            return source
        start = source.storage_offset() * source.itemsize + self.offset
        flat = torch.empty(0, dtype=like.dtype, device=source.device)
        return flat.set_(source.untyped_storage(), start // like.itemsize, like.shape, like.stride())


class _Step(NamedTuple):
    """A launch or an operation that is ready, but for what differs from one run to the next."""

    function: Callable[..., Any]
    arguments: list[Any]
    places: list[tuple[int, _Place]]  # by their position among the arguments
    numbers: list[tuple[int, int]]  # likewise; which of the `Numbers`
    by_address: bool  # for a compiled kernel, else tensors


class Plan:
    """The launches of `record(*given, *options)`, which returns its outputs, then what stays for later.

    It is run with tensors like `given`, such outputs, and a workspace of `length` bytes, in which what stays
    lies first, in its order: another plan finds it there.
    """

    def __init__(self, record: Record, given: Tensors, options: Sequence[Any]):
        metas = [
            None if z is None else torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device="meta")
            for z in given
        ]
        with assume(target_of(given[0].device)), recording() as self.recorded:  # type: ignore[union-attr]
            outputs, kept = record(*metas, *options)
        known = [*metas, *outputs]
        self._starts = {_storage(z): (source, 0) for source, z in enumerate(known) if z is not None}
        self._workspace = len(known)
        self.length: Any = 0  # while a compiler traces, of symbols
        for each in kept:
            self._place(each)
        self._places = [
            {name: self._place(z) for name, z in each.arguments.items() if isinstance(z, Tensor)}
            for each in self.recorded
        ]
        self._steps: list[_Step] | None = None

    def _place(self, tensor: Tensor) -> _Place:
        """Where a tensor lies, from its first mention on."""
        storage = _storage(tensor)
        if storage not in self._starts:
            self._starts[storage] = (self._workspace, self.length)
            size = tensor.untyped_storage().nbytes()
            self.length += -(-size // _ALIGNMENT) * _ALIGNMENT
        source, start = self._starts[storage]
        return _Place(source, start + tensor.storage_offset() * tensor.itemsize, tensor)

    def run(self, tensors: Tensors, numbers: Sequence[float]) -> None:
        """Launch it all; numbers: the first of the `Numbers`, as many as are used."""
        if recorded(self.recorded):
            return
        device = tensors[0].device  # type: ignore[union-attr]
        if self._steps is None:
            each_with_places = zip(self.recorded, self._places, strict=True)
            self._steps = [self._step(*both, tensors) for both in each_with_places]
        addresses = [0 if z is None else z.data_ptr() for z in tensors]
        with on(device):
            for function, template, places, later, by_address in self._steps:
                arguments = template.copy()
                for position, place in places:
                    if by_address:
                        arguments[position] = addresses[place[0]] + place[1]
                    else:
                        arguments[position] = place.view(tensors)
                for position, which in later:
                    arguments[position] = numbers[which]
                function(*arguments)

    def _step(self, each: Launch | Operation, places: dict[str, _Place], tensors: Tensors) -> _Step:
        """Compile a launch, for tensors from outside whose addresses are as these are aligned."""
        device = tensors[0].device  # type: ignore[union-attr]
        arguments, fixed = each.arguments, ()
        if isinstance(each, Operation):
            function = each.function
        else:
            outside = {name: p.view(tensors) for name, p in places.items() if p.source != self._workspace}
            function, fixed = runner(each._replace(arguments={**arguments, **outside}), device)
        names = list(arguments)
        later = [
            (names.index(name), which)
            for which, name in enumerate(Numbers._fields)
            if arguments.get(name) is LATER
        ]
        return _Step(
            function,
            [*arguments.values(), *fixed],
            [(names.index(name), place) for name, place in places.items()],
            later,
            isinstance(each, Launch) and target_of(device).backend != "interpreter",
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _kind(tensor: Tensor | None) -> Any:
    """What a plan depends on of a tensor."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() & 15


plans: dict[tuple, Plan] = {}


def plan_of(record: Record, given: Tensors, options: tuple[Any, ...]) -> Plan:
    """The plan for such tensors, the first of which says the device, and options."""
    device = given[0].device  # type: ignore[union-attr]
    target = target_of(device)
    key = (record, device, target, target.precision(), options, *map(_kind, given))
    found = plans.get(key)
    if found is None:
        if len(plans) >= _MOST:
            plans.clear()
        found = plans[key] = Plan(record, given, options)
    return found
