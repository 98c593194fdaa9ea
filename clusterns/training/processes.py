"""The processes of one training run: this one alone, or the ranks that torchrun started."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .devices import choose_device

Value = TypeVar("Value")
# For the rank that evaluates. A rank that died is noticed by torchrun, at once.
WAIT = timedelta(hours=1)


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run. Every method but `say` is called by all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the one that evaluates, saves and logs."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share a batch; None for a process alone."""
        return dist.group.WORLD if self.size > 1 else None

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_first:
            print(text, flush=True)

    def of_first(self, value: Value) -> Value:
        """What the first process has; the others wait for it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def of_all(self, value: Any) -> list[Any]:
        """What each process has, in the order of the ranks."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks of a tensor of one shape on all of them."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def rows_of_all(self, rows: Tensor) -> Tensor:
        """The ranks' rows (b, D), one after the other; b may differ by rank."""
        if self.size == 1:
            return rows
        counts = self.of_all(len(rows))
        padded = rows.new_zeros((max(counts), rows.shape[1]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def part_random_states(self, seed: int) -> None:
        """After weights that are the same on all ranks: let each draw its own dropout."""
        if self.rank:
            state = np.random.SeedSequence((seed, self.rank)).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(state) >> 1)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks during the backward pass."""
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # No buffer changes in training. torch 2.13 has a new name for leaving them alone.
        names = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        keywords: dict[str, Any] = {sync: False}
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **keywords)


def freeze_unused(encoder: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Freeze parameters that these inputs give no gradient, as Longformer's for global attention.

    DistributedDataParallel would wait for it. Random numbers and mode are as before.
    """
    training, device = encoder.training, next(encoder.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        encoder.train()(inputs).square().sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    encoder.zero_grad(set_to_none=True)
    encoder.train(training)


@contextlib.contextmanager
def joined(device_name: str) -> Iterator[Processes]:
    """Meet the ranks that torchrun started, where it did; gloo on the CPU, nccl on CUDA devices.

    A process group that the caller has set up is used as it is.

    A rank that fails ends its process, and torchrun the others; no rank waits for one that is gone.

    Raises ValueError for a device that is not there, and ConnectionError where other ranks died.
    """
    size, rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"))
    )
    device = choose_device(device_name)
    if size == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda" and torch.device(device_name if device_name != "auto" else "cuda").index is None:
        place = int(os.environ.get("LOCAL_RANK", rank))
        if place >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: expected at most {torch.cuda.device_count()} processes, one for each "
                f"CUDA device of this machine, got local rank {place}"
            )
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    is_own = not dist.is_initialized()
    try:
        if not is_own:
            pass
        elif device.type == "cuda":
            dist.init_process_group("nccl", timeout=WAIT, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=WAIT)
        yield Processes(rank, size, device)
        dist.barrier()  # the first one still writes when the others are done
    except RuntimeError as error:
        # A peer's death shows as a plain RuntimeError of gloo, or one of torch.distributed's own kinds.
        if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Connection")):
            line = str(error).strip().splitlines()[0]
            raise ConnectionError(f"lost the other processes of the run ({line})") from error
        raise
    # Not after an error: destroying a group waits for calls that the others may never make.
    if is_own:
        dist.destroy_process_group()
