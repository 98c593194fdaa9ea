"""`CachedClusterNSLoss`: batches too large for the encoder's memory, by gradient caching.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021. The
loss needs all embeddings of a batch at once, the encoder does not: it runs over mini-batches without a graph,
the loss gives the gradient of every embedding, and in the backward pass each mini-batch is encoded once more,
with a graph and the same random numbers, and takes its gradient from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .checks import check_count, check_embeddings, under_functorch
from .loss import ClusterNSLoss

# What `encode` takes: a tensor (rows, ...), or a dict, tuple or list of such, nested as one likes.
Inputs = Tensor | Mapping[str, Any] | Sequence[Any]
NoSync = Callable[[], contextlib.AbstractContextManager]


class CachedClusterNSLoss(ClusterNSLoss):
    """`ClusterNSLoss` of a whole batch whose encoder holds the activations of one mini-batch at a time.

    It takes the encoder and its inputs in place of embeddings:

    >>> loss_fn = CachedClusterNSLoss(768, 128, mini_batch_size=32)
    >>> loss = loss_fn(encoder, inputs, inputs)  # two dropout views of each sentence
    >>> loss.backward()  # encodes again, mini-batch by mini-batch

    Loss, clustering state, and the gradients that `loss.backward()` adds to every `.grad` are those of
    `ClusterNSLoss` on the concatenated mini-batches; a step costs one more forward pass of the encoder.

    What differs from a whole batch: layers that look at several rows (BatchNorm) see a mini-batch, and see it
    twice, so running statistics move twice a step. Hooks on parameters run once per mini-batch.
    `torch.autograd.grad` does not reach the encoder's parameters, and there are no second derivatives.

    Args:
        embedding_dim, num_clusters, settings: as in `ClusterNSLoss`. The state dict is the same too, so
            checkpoints of the two interchange.
        mini_batch_size: rows that `encode` gets at a time, ≥ 1; the last rows of an input may be fewer.

    """

    def __init__(
        self, embedding_dim: int, num_clusters: int = 128, *, mini_batch_size: int = 32, **settings: Any
    ):
        super().__init__(embedding_dim, num_clusters, **settings)
        check_count("mini_batch_size", mini_batch_size, at_least=1)
        self.mini_batch_size = mini_batch_size

    def forward(  # type: ignore[override]
        self,
        encode: Callable[[Any], Tensor],
        anchors: Inputs,
        positives: Inputs,
        negatives: Inputs | None = None,
        *,
        no_sync: NoSync | None = None,
    ) -> Tensor:
        """Loss of one batch, 0-d float32 (float64 for float64 embeddings).

        Args:
            encode: maps b ≤ `mini_batch_size` rows of an input to embeddings (b, D), raw. It is called again
                in the backward pass and must then do the same: mode and weights unchanged, random numbers
                from torch's generators of the CPU and of the devices of inputs and loss. These are replayed
                and afterwards stand where they stood; autocast is as it was in this call.
            anchors: inputs of the B first views: a tensor (B, ...), or a dict, tuple or list of such. A
                mini-batch has the same form. They require no gradient, and stay unchanged until backward.
            positives: inputs of the B second views. The same object as `anchors` is encoded twice, with
                dropout of its own each time.
            negatives: inputs of N mined hard negatives, seen by every anchor beside the centroids.
            no_sync: under DistributedDataParallel the module's `no_sync`, within which all mini-batches but
                the last are encoded again, so that the gradients are averaged once; it is found where
                `encode` is that module itself. Without it they are averaged after each mini-batch, which is
                slower and needs as many mini-batches on every rank.

        Raises:
            TypeError, ValueError: one line that names the argument, what was expected and what came.
            RuntimeError: in backward, where the embeddings turn out to require no gradient, or with
                `create_graph=True`.

        """
        if under_functorch():
            raise RuntimeError(
                "encode: expected ClusterNSLoss(backend='reference') within torch.func, got "
                "CachedClusterNSLoss, which is for loss.backward()"
            )
        if not callable(encode):
            raise TypeError(
                f"encode: expected a function of inputs, got {type(encode).__name__}; "
                "ClusterNSLoss is the one that takes embeddings"
            )
        tensors: list[Tensor] = []
        parts = [_part("anchors", anchors, tensors), _part("positives", positives, tensors)]
        if parts[1].rows != parts[0].rows:
            raise ValueError(
                f"positives: expected {parts[0].rows} rows to match anchors, got {parts[1].rows}"
            )
        if negatives is not None:
            parts.append(_part("negatives", negatives, tensors))
        if no_sync is None:
            no_sync = (
                encode.no_sync if isinstance(encode, DistributedDataParallel) else contextlib.nullcontext
            )
        devices = {tensor.device for tensor in tensors} | {self.centroids.device}
        encoding = _Encoding(encode, parts, self.mini_batch_size, devices, _autocast_states(devices), no_sync)
        # An input that requires a gradient, so that the embeddings do; the inputs themselves never do.
        trigger = torch.empty(0, requires_grad=True)
        return super().forward(*_Encode.apply(trigger, encoding, *tensors))

    def extra_repr(self) -> str:
        """Settings shown by `print(loss)`."""
        return f"{super().extra_repr()}, mini_batch_size={self.mini_batch_size}"


class _Encode(torch.autograd.Function):
    """From inputs to embeddings without a graph; the backward pass encodes again with one."""

    @staticmethod
    def forward(ctx, trigger: Tensor, encoding: _Encoding, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.encoding = encoding
        ctx.save_for_backward(*tensors)  # which notices a change of the inputs before backward
        return encoding.encode_all(tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: expected False, as CachedClusterNSLoss has no second derivatives, got True"
            )
        ctx.encoding.backpropagate(ctx.saved_tensors, gradients)
        return None, None, *(None for _ in ctx.saved_tensors)


@dataclass
class _Part:
    """One argument: its form, with the place in the list of all tensors for each tensor, and its rows."""

    form: Any
    rows: int


@dataclass
class _Encoding:
    """How one batch was encoded, with all that it takes to do the same again."""

    encode: Callable[[Any], Tensor]
    parts: list[_Part]
    mini_batch_size: int
    devices: set[torch.device]
    autocast_states: list[tuple[str, bool, torch.dtype]]
    no_sync: NoSync
    random_states: list[_RandomState] = field(default_factory=list)

    def mini_batches(self) -> list[tuple[int, slice]]:
        """Number of the part, and rows, of each mini-batch."""
        return [
            (number, slice(start, min(start + self.mini_batch_size, part.rows)))
            for number, part in enumerate(self.parts)
            for start in range(0, part.rows, self.mini_batch_size)
        ]

    def encode_all(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Embeddings (rows, D) of each part, without a graph."""
        embeddings: list[list[Tensor]] = [[] for _ in self.parts]
        for number, rows in self.mini_batches():
            self.random_states.append(_RandomState(self.devices))
            embeddings[number].append(self.encode_rows(tensors, number, rows))
        return tuple(torch.cat(rows) for rows in embeddings)

    def backpropagate(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Encode again and backpropagate the gradients of the embeddings (rows, D) of each part."""
        replays = list(zip(self.mini_batches(), self.random_states, strict=True))
        present = _RandomState(self.devices)
        try:
            for (number, rows), random_state in replays:
                last = random_state is self.random_states[-1]
                random_state.restore()
                with contextlib.nullcontext() if last else self.no_sync():
                    with torch.enable_grad():
                        embeddings = self.encode_rows(tensors, number, rows)
                    if not embeddings.requires_grad:
                        raise RuntimeError(
                            "encode: expected embeddings that require a gradient when encoding again in "
                            "backward, got none; are all parameters frozen, or does it run under no_grad?"
                        )
                    torch.autograd.backward(embeddings, gradients[number][rows])
        finally:
            present.restore()

    def encode_rows(self, tensors: Sequence[Tensor], number: int, rows: slice) -> Tensor:
        """Embeddings (b, D) of one mini-batch, under the autocast of the first pass."""
        with contextlib.ExitStack() as stack:
            for device_type, enabled, dtype in self.autocast_states:
                # Without its cache: a weight cast in the pass without a graph would be one without gradient.
                stack.enter_context(
                    torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
            embeddings = self.encode(_take(self.parts[number].form, tensors, rows))
        count = rows.stop - rows.start
        check_embeddings("encode", embeddings)
        if len(embeddings) != count:
            raise ValueError(f"encode: expected {count} embeddings for {count} rows, got {len(embeddings)}")
        if embeddings.device not in self.devices:
            # Its random numbers could not be replayed.
            raise ValueError(
                "encode: expected embeddings on the device of the loss or of the inputs, "
                f"got {embeddings.device}; move the loss with .to(device)"
            )
        return embeddings


class _RandomState:
    """State of torch's generator of the CPU and of those of some devices."""

    def __init__(self, devices: set[torch.device]):
        self.cpu = torch.get_rng_state()
        self.others = [
            (device, torch.get_device_module(device).get_rng_state(*_which(device)))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def restore(self) -> None:
        """Set the generators to it."""
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that names a device to its random functions; there is one mps device, and none there."""
    return () if device.type == "mps" else (device,)


def _autocast_states(devices: set[torch.device]) -> list[tuple[str, bool, torch.dtype]]:
    """Type, whether autocast is on, and its dtype, for the CPU and the types of the devices."""
    types = sorted({"cpu"} | {device.type for device in devices})
    return [
        (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
        for name in types
        if torch.amp.is_autocast_available(name)
    ]


def _part(name: str, value: Inputs, tensors: list[Tensor]) -> _Part:
    """Append the tensors of one argument to the list of all, and check that they have rows in common."""
    before = len(tensors)
    form = _form(name, value, tensors)
    counts = [len(tensor) for tensor in tensors[before:]]
    if not counts or 0 in counts:
        raise ValueError(f"{name}: expected tensors of at least one row, got none")
    if len(set(counts)) > 1:
        raise ValueError(f"{name}: expected tensors of equally many rows, got {counts}")
    return _Part(form, counts[0])


def _form(name: str, value: Inputs, tensors: list[Tensor]) -> Any:
    """The nesting of dicts, tuples and lists, with its place in `tensors` for each tensor."""
    if isinstance(value, Tensor):
        if value.ndim == 0:
            raise ValueError(f"{name}: expected tensors of shape (rows, ...), got a 0-dim one")
        if value.requires_grad:
            raise ValueError(
                f"{name}: expected inputs that require no gradient, got a tensor that does; "
                "what makes it belongs into encode"
            )
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, Mapping):
        return {key: _form(name, part, tensors) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_form(name, part, tensors) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    raise TypeError(f"{name}: expected a tensor, or a dict or tuple of tensors, got {type(value).__name__}")


def _take(form: Any, tensors: Sequence[Tensor], rows: slice) -> Any:
    """Some rows of the tensors, in the form they came in."""
    if isinstance(form, int):
        return tensors[form][rows]
    if isinstance(form, dict):
        return {key: _take(part, tensors, rows) for key, part in form.items()}
    parts = [_take(part, tensors, rows) for part in form]
    return tuple(parts) if isinstance(form, tuple) else parts
