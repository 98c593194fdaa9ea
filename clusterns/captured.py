"""A step whose launches are replayed as CUDA graphs; `ClusterNSLoss.capture` makes it.

A graph reads and writes the memory that it was captured with. So embeddings are copied in, results are copied
out, and between a forward and its backward no other step may use it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.target import target_of

Tensors = Sequence[Tensor | None]
Replay = tuple[Callable[[], None], Tensors]  # what runs a graph, and its outputs, the same tensors every time

# What `_key` is made of, in its order.
_NAMES = (
    *(f"{kind} of {name}" for name in ("anchors", "positives", "negatives") for kind in ("shape", "dtype")),
    *("device", "precision of products", "need of gradients"),
    *(f"storage of {name}" for name in ("centroids", "cluster_ids", "hard_negative_ids", "temperature")),
    *"temperature assignment hard_negatives for_gradients centroid_update centroid_momentum".split(),
    *"hard_negative_weight false_negatives bml_weight bml_alpha bml_beta".split(),
)


def record(device: torch.device, runs: Sequence[Callable[..., Tensors]]) -> list[Replay]:
    """Capture functions, each called with what the one before it returned: a graph each, in one pool.

    They run once before. Raises ValueError off a GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"anchors: expected a CUDA device to capture on, got {device}")
    found: list[Replay] = []
    outputs: Tensors = ()
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and loaded
            for run in runs:
                outputs = run(*outputs)
        torch.cuda.current_stream().wait_stream(side)
        pool, outputs = torch.cuda.graph_pool_handle(), ()
        for run in runs:
            graph = torch.cuda.CUDAGraph()
            # Another thread, as one that pins the next batch, may go on meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = run(*outputs)
            found.append((graph.replay, outputs))
    return found


class Captured:
    """The step of a loss for one kind of batch, recorded in the first `forward`; a copy of it is None.

    training: the mode of the loss, in which alone it is used.
    """

    def __init__(self, training: bool):
        self.training = training
        self.replays: list[Replay] = []  # of the forward, and of the backward if gradients are needed
        self.number = 0  # of the last replay of the forward
        self.waits: Callable[[], Replayed | None] = lambda: None  # for its backward
        self._differs: tuple[str, Any, Any] | None = None

    def __reduce__(self):
        return type(None), ()

    def forward(self, launchers: Any, given: Any, rest: Any, needs: list[bool]) -> Any:
        """Replay a step; None where it does not fit, or another one waits for its backward.

        launchers: of the forward and of the backward. given: arguments of the first: anchors (B, D),
        positives (B, D), negatives (N, D) or None, others. rest, needs: those of the second after τ.
        Returns a `Replayed`, and loss, 0-d, terms (8,) and workspace, which is not the caller's.
        """
        key = _key(given, needs)
        if not self.replays:
            self._record(launchers, given, rest, needs)
            self._key = key
        pairs = () if key == self._key else zip(_NAMES, key, self._key, strict=True)
        self._differs = next((each for each in pairs if each[1] != each[2]), None)
        if self._differs is not None or self.waits() is not None:
            return None
        if given[0].is_cuda and torch.cuda.is_current_stream_capturing():  # a graph of the user's own
            return None
        torch._foreach_copy_(self._embeddings, [z for z in given[:3] if z is not None])
        replay, (*found, workspace) = self.replays[0]
        replay()
        self.number += 1
        replayed = Replayed(self)
        if any(needs):
            self.waits = weakref.ref(replayed)
        return replayed, (*_copies(found), workspace)

    def _record(self, launchers: Any, given: Any, rest: Any, needs: list[bool]) -> None:
        static = [
            None if z is None else z.detach().clone(memory_format=torch.contiguous_format) for z in given[:3]
        ]
        others = [z.detach() if isinstance(z, Tensor) else z for z in given[3:]]
        upstream = torch.ones((), dtype=torch.float32, device=given[0].device)

        def forward() -> Tensors:
            return launchers[0](*static, *others)

        def backward(_loss: Tensor, _terms: Tensor, workspace: Tensor) -> Tensors:
            return launchers[1](upstream, *static, others[3], *rest, needs, workspace)

        self.replays = record(given[0].device, [forward, backward] if any(needs) else [forward])
        self._embeddings, self.upstream = [z for z in static if z is not None], upstream
        self._held = others  # their addresses are in the graph, nobody else may get them

    def say(self, backend: str, tell: Callable[[str, str], None]) -> None:
        """Tell what did not fit of the last batch, which `backend` has computed."""
        differs = self._differs if backend == "triton" else ("backend", backend, "triton")
        if differs is not None:
            text = "capture: the {} is {}, captured was {}; this step runs without the graph"
            tell(f"capture {differs[0]}", text.format(*differs))


class Replayed:
    """A replay of the forward. Whoever holds it may yet want the backward."""

    def __init__(self, step: Captured):
        self._step, self._number = step, step.number

    def backward(self, upstream: Tensor, *_rest: Any) -> Tensors:
        """All gradients, whatever of the launcher's arguments; RuntimeError if a later step overwrote it."""
        step = self._step
        if self._number != step.number:
            raise RuntimeError(
                "retain_graph: expected no later step of a captured loss before a backward is repeated, got "
                f"{step.number - self._number}, which overwrote its buffers"
            )
        replay, outputs = step.replays[1]
        step.upstream.copy_(upstream)
        replay()
        step.waits = lambda: None
        return _copies(outputs)


def _key(given: Any, needs: list[bool]) -> tuple[Any, ...]:
    """All that the launches depend on but the contents of tensors."""
    kinds = [kind for z in given[:3] for kind in ((None, None) if z is None else (tuple(z.shape), z.dtype))]
    places = [None if z is None else (z.data_ptr(), z.stride(), z.dtype) for z in given[3:7]]
    device = given[0].device
    return (*kinds, device, target_of(device).precision(), tuple(needs), *places, *given[7:])


def _copies(tensors: Tensors) -> list[Tensor | None]:
    """Copies for the caller: the next replay overwrites the originals."""
    found = [None if z is None else torch.empty_like(z) for z in tensors]
    torch._foreach_copy_([z for z in found if z is not None], [z for z in tensors if z is not None])
    return found
