"""One batch over several ranks, on `torch.distributed` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .centroids import OnlineKMeans


def gather_rows(tensors: Sequence[Tensor | None], group: dist.ProcessGroup) -> list[Any]:
    """Concatenate each tensor (rows, D) over the ranks, in rank order; ranks may hold different row counts.

    Every rank then computes the same loss of the whole batch. The backward hands each rank the gradient of
    its own rows times the number of ranks, because DistributedDataParallel divides by that number: the
    parameters get the gradient of a single process.
    """
    present = [0 if tensor is None else len(tensor) for tensor in tensors]
    device = next(tensor.device for tensor in tensors if tensor is not None)
    mine = torch.tensor(present, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    counts = torch.stack(every).tolist()  # [rank][tensor]
    gathered: list[Any] = []
    for position, tensor in enumerate(tensors):
        rows = [rank[position] for rank in counts]
        if tensor is None:
            if any(rows):
                raise ValueError(f"gather_rows: tensor {position} is None here but given on another rank")
            gathered.append(None)
        else:
            gathered.append(_GatherRows.apply(tensor, rows, group))
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        ctx.world_size = len(rows)
        longest = max(rows)
        padded = tensor.new_zeros((longest, tensor.shape[1]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[ctx.own] * ctx.world_size, None, None


def seed_together(
    clustering: OnlineKMeans, anchors: Tensor, positives: Tensor, group: dist.ProcessGroup | None
) -> None:
    """Seed the centroids; with several ranks all take the random first pick of rank 0."""
    first = None
    if group is not None:
        pick = torch.randint(len(anchors), (1,)).to(anchors.device)
        dist.broadcast(pick, src=dist.get_global_rank(group, 0), group=group)
        first = int(pick)
    clustering.seed(anchors, positives, first=first)
