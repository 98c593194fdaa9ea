"""Whose columns the rows of a process meet: its own, or those of ranks on `torch.distributed` alone.

Each rank owns its rows: it computes their part of the loss, all of the gradient of its anchors, and a part
of the gradient of every positive, which goes back to the rank that owns that.

    Alone    one process, one block of columns
    All      gather="all": every rank receives all positives and explicit negatives once: one block,
             6·B²·D/W operations a rank (8·B²·D/W with directions="both"), (B+N)·D memory
    Ring     gather="ring": blocks of positives travel from rank to rank, the next one while the present one
             is computed on; the gradients travel one block behind them, and home when all is computed. A rank
             that computes holds two blocks of positives and three of gradients (leaving, coming, present).
             8·B²·D/W operations, as Z must be known first

Z just adds up over blocks of columns, and so do both gradients once Z is known; the way through the
normalisation is linear, so it is taken before what is added up travels. Sums over ranks are taken in the
order of the ranks, so that all of them get the same bits. Every rank returns the loss of the whole batch,
and the gradient of its own rows times the number of ranks: DistributedDataParallel divides by that number,
and the parameters get the gradient of a single process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import FLOATING
from .norms import compute_dtype, inverse_norms, unit_rows, without_autocast
from .problem import Block, Needs

GATHERS = ("all", "ring")
Gradients = tuple[Tensor | None, Tensor | None]  # of positives and explicit negatives, where wanted


class Alone:
    """A process that holds the whole batch of `batch` rows."""

    size, rank, first, one_block = 1, 0, 0, True

    def __init__(self, batch: int, needs: Needs = (False, False, False, False)):
        self.batch, self.needs = batch, needs
        self._found: Gradients = (None, None)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each."""
        return tensor

    def from_first(self, tensor: Tensor) -> Tensor:
        """What rank 0 has."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """What each rank has, (W, ...)."""
        return tensor[None]

    def blocks(self, home: Block) -> Iterator[Block]:
        """The blocks of columns, of which `home` has this process's positives; the own one first."""
        yield home

    def give(self, of_positives: Tensor | None, of_negatives: Tensor | None) -> None:
        """Hand in the gradients of the last block's columns."""
        self._found = (of_positives, of_negatives)

    def take(self) -> Gradients:
        """Gradients of this process's positives and explicit negatives; once."""
        return self._found


class Ranks(Alone):
    """The ranks that share one batch, and how many rows each of them holds.

    Building it is a collective call. It reads the other ranks' row counts, and so waits for the device.

    A gradient is computed for all ranks if one of them wants it.

    Raises `ValueError` on every rank if the ranks do not agree (dtype, D, with or without negatives), and on
    the others if one rank was given `refused`, the error its own input made. That input may be anything, so
    `device` says where the collective call takes place; by default where the anchors are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        refused: Exception | None = None,
        device: torch.device | None = None,
    ):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        facts = [0] * 8
        if refused is None:
            inputs, keeps_graph = (anchors, positives, negatives), torch.is_grad_enabled()
            dtypes = [FLOATING.index(z.dtype) if z is not None else -1 for z in inputs]
            wants = [isinstance(z, Tensor) and z.requires_grad for z in (*inputs, temperature)]
            rows = len(negatives) if negatives is not None else 0
            facts = [1, len(anchors), rows, anchors.shape[1], *dtypes]
            facts.append(sum((want and keeps_graph) << bit for bit, want in enumerate(wants)))
        every = self.gather(torch.tensor(facts, device=anchors.device if device is None else device))
        if refused is not None:
            raise refused
        table: list[list[int]] = every.tolist()
        bad = [rank for rank, row in enumerate(table) if not row[0]]
        if bad:
            raise ValueError(
                f"anchors: expected valid input on every rank, rank {bad[0]} has refused its own"
            )
        for name, column in (("embedding dimension", 3), ("dtype", 4), ("dtype", 5), ("negatives", 6)):
            values = [row[column] for row in table]
            if len(set(values)) > 1:
                what = [_describe(name, value) for value in values]
                raise ValueError(f"anchors: expected the same {name} on every rank, got {', '.join(what)}")
        self.rows, self.negative_rows = [row[1] for row in table], [row[2] for row in table]
        first, second, third, fourth = (any(row[7] >> bit & 1 for row in table) for bit in range(4))
        super().__init__(sum(self.rows), (first, second, third, fourth))
        self.first = sum(self.rows[: self.rank])
        self._ids: Tensor | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each."""
        first, *rest = self.gather(tensor).unbind()
        for part in rest:
            first = first + part
        return first

    def from_first(self, tensor: Tensor) -> Tensor:
        """What rank 0 has."""
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, 0), group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """What each rank has, (W, ...)."""
        every = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather(list(every.unbind()), tensor.contiguous(), group=self.group)
        return every

    def concatenate(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """All ranks' rows, in rank order; `counts` says how many each has."""
        whole = tensor.new_empty((sum(counts), *tensor.shape[1:]))
        parts = list(whole.split(counts))
        parts[self.rank].copy_(tensor)
        self._of_each(dist.broadcast, parts)
        return whole

    def _of_each(self, collective: Any, parts: list[Tensor]) -> None:
        """Run a collective that has a source or a destination on the part of each rank."""
        works = [
            collective(part, dist.get_global_rank(self.group, rank), group=self.group, async_op=True)
            for rank, part in enumerate(parts)
            if len(part)
        ]
        for work in works:
            work.wait()

    def _all_ids(self, home: Block) -> Tensor | None:
        if self._ids is None and home.cluster_ids is not None:
            self._ids = self.concatenate(home.cluster_ids, self.rows)
        return self._ids


class All(Ranks):
    """Every rank sees all columns at once."""

    _everything: Block | None = None

    def blocks(self, home: Block) -> Iterator[Block]:
        """Everything, which is kept for a second round."""
        if self._everything is None:
            positives, negatives = self.concatenate(home.positives, self.rows), home.negatives
            if negatives is not None:
                negatives = self.concatenate(negatives, self.negative_rows)
            self._everything = Block(positives, negatives, self._all_ids(home), 0, self.first)
        yield self._everything

    def give(self, of_positives: Tensor | None, of_negatives: Tensor | None) -> None:
        """Add the gradients up at the owners of the columns."""
        self._found = (
            self._at_owners(of_positives, self.rows),
            self._at_owners(of_negatives, self.negative_rows),
        )

    def _at_owners(self, gradient: Tensor | None, counts: list[int]) -> Tensor | None:
        if gradient is None:
            return None
        parts = [part.contiguous() for part in gradient.split(counts)]
        self._of_each(dist.reduce, parts)
        return parts[self.rank]


class Ring(Ranks):
    """Blocks of columns go around among two or more ranks, twice: for totals, then for gradients."""

    one_block = False

    def blocks(self, home: Block) -> Iterator[Block]:
        """Block after block, while the next is on its way."""
        ids = self._all_ids(home)
        ids_of = [None] * self.size if ids is None else ids.split(self.rows)
        held = [home.positives] if home.negatives is None else [home.positives, home.negatives]
        self._on_the_way: _Exchange | None = None
        for step in range(self.size):
            self._owner = owner = (self.rank - step) % self.size
            coming = self._pass_on(held, [True, True]) if step + 1 < self.size else None
            negatives = held[1] if len(held) > 1 else None
            own = 0 if owner == self.rank else None
            yield Block(held[0], negatives, ids_of[owner], sum(self.rows[:owner]), own)
            if coming is not None:
                held = coming.wait()

    def give(self, of_positives: Tensor | None, of_negatives: Tensor | None) -> None:
        """Add what came with the block, and send it on with it; from the last rank to its owner."""
        self._wanted = [of_positives is not None, of_negatives is not None]
        mine = [part for part in (of_positives, of_negatives) if part is not None]
        if self._on_the_way is not None:
            self._on_the_way.add_to(mine)
        self._on_the_way = self._pass_on(mine, self._wanted)

    def take(self) -> Gradients:
        """Wait for the gradients that come back."""
        if self._on_the_way is None:
            return None, None
        back = iter(self._on_the_way.wait())
        of_positives, of_negatives = (next(back) if want else None for want in self._wanted)
        return of_positives, of_negatives

    def _pass_on(self, held: list[Tensor], which: list[bool]) -> _Exchange:
        """Send what belongs to the present owner to the next rank, and receive what the one before has."""
        before_owner = (self._owner - 1) % self.size
        counts = [
            each[before_owner]
            for each, one in zip((self.rows, self.negative_rows), which, strict=True)
            if one
        ]
        coming = [z.new_empty((count, z.shape[1])) for z, count in zip(held, counts, strict=False)]
        following, before = (
            dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1)
        )
        operations = [
            dist.P2POp(dist.isend, z.contiguous(), following, self.group) for z in held if len(z)
        ] + [dist.P2POp(dist.irecv, z, before, self.group) for z in coming if len(z)]
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Exchange(operations, works, coming)


class _Exchange:
    """Blocks on their way; what is sent stays alive until it has arrived."""

    def __init__(self, operations: list[dist.P2POp], works: list[Any], coming: list[Tensor]):
        self.operations, self.works, self.coming = operations, works, coming

    def wait(self) -> list[Tensor]:
        """What has come; once, as nothing is kept."""
        coming = self.coming
        for work in self.works:
            work.wait()
        self.operations, self.works, self.coming = [], [], []
        return coming

    def add_to(self, parts: list[Tensor]) -> None:
        """Add what has come, in place."""
        for part, came in zip(parts, self.wait(), strict=True):
            part.add_(came)


def meet(group: dist.ProcessGroup, gather: str, *arguments: Any) -> Ranks:
    """`All` or `Ring` for the arguments of `Ranks`; a collective call."""
    return (Ring if gather == "ring" and dist.get_world_size(group) > 1 else All)(group, *arguments)


def _describe(name: str, value: int) -> str:
    if name == "dtype":
        return str(FLOATING[value]).removeprefix("torch.")
    if name == "negatives":
        return "none" if value < 0 else f"some of {FLOATING[value]}"
    return str(value)


@torch.no_grad()
def seeding_chain(
    anchors: Tensor, positives: Tensor, num_clusters: int, first: int, ranks: Alone
) -> tuple[Tensor, Tensor]:
    """Pick K sentences of the batch, each the one least similar to the pick before it (method step 2).

    The rows are those of this process; of several ranks the first pick of rank 0 counts. A pick costs one
    small collective call there, and never waits for the device. Returns the raw anchors (K, D) in the dtype
    of the computation, and their places in the batch, (K,) int64.
    """
    dtype, device = compute_dtype(anchors, positives), anchors.device
    raw = anchors.detach().to(dtype)
    scale, (p, _) = inverse_norms(raw)[:, None], unit_rows(positives, dtype)
    places = torch.arange(ranks.first, ranks.first + len(raw), device=device)
    chosen = torch.zeros(len(raw), dtype=torch.bool, device=device)
    # The first pick is the one whose place it is: every candidate but one scores infinity.
    score = (places != ranks.from_first(torch.tensor([first], device=device))).to(dtype)
    picks = raw.new_empty((num_clusters, 2 + 2 * raw.shape[1]))
    for cluster in range(num_clusters):
        best = score.argmin(dim=0, keepdim=True)
        row = raw.index_select(0, best)[0]
        candidates = ranks.gather(torch.cat([score[best], places[best], row, row * scale[best][0]]))  # (W, ·)
        winner = candidates[:, 0].argmin(
            dim=0, keepdim=True
        )  # the lowest rank of equals, so the lowest place
        picks[cluster] = candidates.index_select(0, winner)[0]
        chosen[best] |= winner == ranks.rank
        with without_autocast(device):
            score = torch.mv(p, picks[cluster, 2 + raw.shape[1] :]).masked_fill_(chosen, torch.inf)
    return picks[:, 2 : 2 + raw.shape[1]].contiguous(), picks[:, 1].long()
