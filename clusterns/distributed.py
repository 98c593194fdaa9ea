"""One batch over several ranks, on `torch.distributed` alone.

Each rank owns its rows: it computes their part of the loss, all of the gradient of its anchors, and a part
of the gradient of every positive, which goes back to the rank that owns that.

    gather="all"    every rank receives all positives and explicit negatives once: one sweep, 6·B²·D/W
                    operations a rank, (B+N)·D memory
    gather="ring"   blocks of positives travel from rank to rank, the next one while the present one is
                    computed on; the gradients travel with them. No rank ever holds more than two blocks of
                    positives and two of gradients, at 8·B²·D/W operations: Z must be known first

Sums over ranks are taken in the order of the ranks, so that all of them get the same bits. Every rank returns
the loss of the whole batch, and the gradient of its own rows times the number of ranks:
DistributedDataParallel divides by that number, and the parameters get the gradient of a single process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .normalization import compute_dtype, inverse_norms, unit_rows, without_autocast
from .sweep import (
    Block,
    Clusters,
    Found,
    Phase,
    Rows,
    combine,
    count_hard_negatives,
    make_sweeper,
)

if TYPE_CHECKING:
    from .options import Options

GATHERS = ("all", "ring")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Ranks:
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
        gather: str,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        refused: Exception | None = None,
        device: torch.device | None = None,
    ):
        self.group, self.gather = group, gather
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = anchors.device if device is None else device
        keeps_graph = torch.is_grad_enabled()
        wants = [
            isinstance(z, Tensor) and z.requires_grad and keeps_graph
            for z in (anchors, positives, negatives, temperature)
        ]
        facts = [0] * 10
        if refused is None:
            dtypes = [
                _DTYPES.index(z.dtype) if z is not None else -1 for z in (anchors, positives, negatives)
            ]
            rows = len(negatives) if negatives is not None else 0
            facts = [1, len(anchors), rows, anchors.shape[1], *dtypes]
            facts += [sum(want << bit for bit, want in enumerate(wants)), 0, 0]
        mine = torch.tensor(facts, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=group)
        if refused is not None:
            raise refused
        table: list[list[int]] = torch.stack(every).tolist()
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
        self.rows = [row[1] for row in table]
        self.negative_rows = [row[2] for row in table] if negatives is not None else None
        together = 0
        for row in table:
            together |= row[7]
        wanted = [bool(together >> bit & 1) for bit in range(4)]
        self.needs = (wanted[0], wanted[1], wanted[2], wanted[3])

    @property
    def batch(self) -> int:
        """B, rows over all ranks."""
        return sum(self.rows)

    @property
    def first(self) -> int:
        """Place of this rank's first row in the batch."""
        return sum(self.rows[: self.rank])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each."""
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(every, tensor.contiguous(), group=self.group)
        total = every[0]
        for part in every[1:]:
            total = total + part
        return total

    def concatenate(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """All ranks' rows, in rank order; `counts` says how many each has."""
        whole = tensor.new_empty((sum(counts), *tensor.shape[1:]))
        parts = list(whole.split(counts))
        parts[self.rank].copy_(tensor)
        works = [
            dist.broadcast(part, dist.get_global_rank(self.group, rank), group=self.group, async_op=True)
            for rank, part in enumerate(parts)
            if len(part)
        ]
        for work in works:
            work.wait()
        return whole

    def sweep(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        clusters: Clusters,
        options: Options,
        needs: tuple[bool, bool, bool, bool],
        backend: str,
    ) -> Found:
        """`sweep.sweep_alone` for a batch that the ranks share; every rank calls it."""
        counts = count_hard_negatives(clusters)
        counts = self.sum(counts) if counts is not None else None
        tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
        anchors, positives = anchors.detach().contiguous(), positives.detach().contiguous()
        negatives = negatives.detach().contiguous() if negatives is not None else None
        rows = Rows(anchors, positives, tau, clusters, counts, self.batch, options, self.needs)
        ids = self.concatenate(clusters.ids, self.rows) if clusters.ids is not None else None
        sweeper = make_sweeper(backend, rows, negatives)
        run = self._sweep_all if self.gather == "all" else self._sweep_ring
        of_positives, of_negatives = run(sweeper, positives, negatives, ids)
        of_temperature = sweeper.temperature_gradient()
        of_anchors = sweeper.anchor_gradient()

        sums = torch.cat([sweeper.sums(), *sweeper.directions()])
        parts = self.sum(sums).split([3, *(len(side) for side in sweeper.directions())])
        found: list[Tensor | None] = [of_anchors]
        for need, z, gradient in (
            (needs[1], positives, of_positives),
            (needs[2], negatives, of_negatives),
        ):
            found.append(_project(z, gradient) if need and z is not None else None)
        # Back to the gradient of a single process under an average over ranks; τ's is whole on each.
        gradients = [None if g is None else g * self.size for g in found]
        if of_temperature is not None:
            of_temperature = self.sum(of_temperature.reshape(1)).reshape(())
        gradients = [g if need else None for g, need in zip(gradients, needs, strict=False)]
        return Found(*combine(rows, *parts), (*gradients, of_temperature if needs[3] else None))

    def _sweep_all(
        self, sweeper: Any, positives: Tensor, negatives: Tensor | None, ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """One sweep over everything; gradients are summed up at the owners."""
        whole = self.concatenate(positives, self.rows)
        whole_negatives = None
        if negatives is not None:
            assert self.negative_rows is not None
            whole_negatives = self.concatenate(negatives, self.negative_rows)
        columns = sweeper.sweep(Block(whole, whole_negatives, ids, self.first), Phase.BOTH)
        of_positives, of_negatives = columns.unprojected()
        return (
            self._return_rows(of_positives, self.rows),
            self._return_rows(of_negatives, self.negative_rows),
        )

    def _return_rows(self, parts: Tensor | None, counts: list[int] | None) -> Tensor | None:
        """Sum over the ranks of the rows (total, D) that this rank owns."""
        if parts is None:
            return None
        assert counts is not None
        pieces = [piece.contiguous() for piece in parts.split(counts)]
        works = [
            dist.reduce(piece, dist.get_global_rank(self.group, rank), group=self.group, async_op=True)
            for rank, piece in enumerate(pieces)
            if len(piece)
        ]
        for work in works:
            work.wait()
        return pieces[self.rank]

    def _sweep_ring(
        self, sweeper: Any, positives: Tensor, negatives: Tensor | None, ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Twice around: totals of the rows, then gradients, which travel with their block."""
        if self.size == 1:
            columns = sweeper.sweep(Block(positives, negatives, ids, 0), Phase.BOTH)
            return columns.unprojected()
        all_ids = ids.split(self.rows) if ids is not None else None
        home = [positives] if negatives is None else [positives, negatives]

        def columns_of(owner: int, held: list[Tensor]) -> Block:
            own = 0 if owner == self.rank else None
            others = held[1] if len(held) > 1 else None
            return Block(held[0], others, all_ids[owner] if all_ids is not None else None, own)

        def travel(phase: Phase):
            """Sweep over block after block while the next is on its way."""
            held = home
            for step in range(self.size):
                owner = (self.rank - step) % self.size
                coming = self._pass_on(held, (owner - 1) % self.size) if step + 1 < self.size else None
                yield owner, sweeper.sweep(columns_of(owner, held), phase)
                if coming is not None:
                    held = coming.wait()

        for _ in travel(Phase.TOTALS):
            pass
        if not any(self.needs):
            return None, None
        on_the_way: _Exchange | None = None
        wanted: list[bool] = []
        for owner, columns in travel(Phase.GRADIENTS):
            found = columns.unprojected()
            wanted = [part is not None for part in found]
            mine = [part for part in found if part is not None]
            if on_the_way is not None:
                mine = [before + part for before, part in zip(on_the_way.wait(), mine, strict=True)]
            if mine:  # on to where the block goes next; after the last step that is its owner
                on_the_way = self._pass_on(mine, (owner - 1) % self.size, wanted)
        back = iter(on_the_way.wait() if on_the_way is not None else [])
        of_positives, of_negatives = (next(back) if want else None for want in wanted)
        return of_positives, of_negatives

    def _pass_on(self, held: list[Tensor], owner: int, wanted: list[bool] | None = None) -> _Exchange:
        """Send to the next rank, and receive from the one before what belongs to `owner`."""
        counts = [self.rows[owner]]
        if self.negative_rows is not None:
            counts.append(self.negative_rows[owner])
        if wanted is not None:
            counts = [count for count, want in zip(counts, wanted, strict=False) if want]
        coming = [z.new_empty((count, z.shape[1])) for z, count in zip(held, counts, strict=True)]
        following, before = (
            dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1)
        )
        operations = [
            dist.P2POp(dist.isend, z.contiguous(), following, self.group) for z in held if len(z)
        ] + [dist.P2POp(dist.irecv, z, before, self.group) for z in coming if len(z)]
        works = dist.batch_isend_irecv(operations)
        return _Exchange(operations, works, coming)


class _Exchange:
    """Blocks on their way; what is sent stays alive until it has arrived."""

    def __init__(self, operations: list[dist.P2POp], works: list[Any], coming: list[Tensor]):
        self.operations, self.works, self.coming = operations, works, coming

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.operations = []
        return self.coming


def _describe(name: str, value: int) -> str:
    if name == "dtype":
        return str(_DTYPES[value]).removeprefix("torch.")
    if name == "negatives":
        return "none" if value < 0 else f"some of {_DTYPES[value]}"
    return str(value)


def _project(z: Tensor, gradient: Tensor | None) -> Tensor | None:
    """g − u (u·g) for the unit rows u of z (rows, D), in place on g."""
    if gradient is None:
        return None
    unit, _ = unit_rows(z, gradient.dtype)
    return gradient.addcmul_(unit, (unit * gradient).sum(dim=1, keepdim=True), value=-1)


def seed_together(anchors: Tensor, positives: Tensor, num_clusters: int, ranks: Ranks) -> Tensor:
    """Pick K sentences of the whole batch as centroids, as `functional.seed_centroids`; returns (K, D).

    All ranks take the random first pick of rank 0. A pick costs one small collective call and never waits
    for the device.
    """
    dtype = compute_dtype(anchors, positives)
    first = torch.randint(ranks.batch, (1,)).to(anchors.device)
    dist.broadcast(first, src=dist.get_global_rank(ranks.group, 0), group=ranks.group)
    raw = anchors.to(dtype)
    scale = inverse_norms(raw)[:, None]
    p, _ = unit_rows(positives, dtype)
    places = torch.arange(ranks.first, ranks.first + len(raw), device=raw.device)
    chosen = torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
    # The first pick is the one whose place it is: every rank's candidate but one scores infinity.
    score = (places != first).to(dtype)
    centroids = raw.new_empty((num_clusters, raw.shape[1]))
    for cluster in range(num_clusters):
        best = score.argmin(dim=0, keepdim=True)
        candidate = torch.cat([score[best], raw[best][0], raw[best][0] * scale[best][0]])
        every = [torch.empty_like(candidate) for _ in range(ranks.size)]
        dist.all_gather(every, candidate, group=ranks.group)
        table = torch.stack(every)  # (W, 1 + 2D)
        winner = table[:, 0].argmin(dim=0, keepdim=True)  # the lowest rank of equals, so the lowest index
        _, centroid, unit = table[winner][0].split([1, raw.shape[1], raw.shape[1]])
        centroids[cluster] = centroid
        chosen[best] |= winner == ranks.rank
        with without_autocast(raw.device):
            score = torch.mv(p, unit)
        score.masked_fill_(chosen, torch.inf)
    return centroids
