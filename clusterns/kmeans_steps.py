"""The steps of spherical k-means: assignment, sums, refilling of empty clusters, and the two loops over them.

Points are taken as they come and never normalised or copied whole: for the nearest centre the length of a
row does not matter, and in the sums 1/‖x‖ goes in as a weight. One iteration over n points of size D:

    assignment    one product per block of rows and its row maximum; the n×K cosines never exist
    sums          only rows that changed their cluster move between the sums (K×D, float64); when many did,
                  and every so often against drift, all are summed afresh

Everything adds up in a fixed order, also on a GPU, so that the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .backend import why_not
from .functional import nearest_centroids
from .objective.norms import inverse_norms, without_autocast
from .objective.problem import WORKSPACE_BYTES

# Cosines of a block on the CPU: enough for a fast product, few enough that the maximum finds them in cache.
_BLOCK_BYTES = 16 * 2**20
_BLOCK_ROWS = 8192

# Rows added up in the compute dtype before they go into the float64 sums.
_SUMMED_ROWS = 2**14

# All rows are summed afresh when more than this share of them moved, and in every so many iterations.
_MANY = 0.25
_REFRESH = 32

# What earlier epochs of mini-batches count in a new one. On sentence embeddings 0.03 to 0.25 did about
# equally well, and much better than 1, which never gets over the first, badly assigned batches.
_PAST = 0.1

Report = Callable[[float], None]


class Rows:
    """Points (n, D) of any floating dtype, stride and device, with weights (n,) and 1/‖x‖ as `scale` (n,).

    A row without a direction (‖x‖ ≤ 1e-8) has scale 0: its cosines are 0, and it pulls on no centre.
    Raises `ValueError` for values that are not finite and for norms that the compute dtype cannot hold.
    """

    def __init__(
        self,
        data: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        scale: Tensor | None = None,
    ):
        self.data, self.dtype, self.device = data.detach(), dtype, device
        if weight is None:
            weight = torch.ones(len(data), dtype=dtype, device=device)
        self.weight = weight.to(device, dtype)
        self.scale = self._measure() if scale is None else scale

    def __len__(self) -> int:
        return len(self.data)

    @property
    def valid(self) -> Tensor:
        """Rows (n,) that pull on the centres: they have a direction and a weight."""
        return (self.scale > 0).logical_and_(self.weight > 0)

    def parts(self, rows: int) -> Iterator[slice]:
        """Split into slices of at most so many rows, a copy of which stays within the workspace."""
        rows = self.at_most(rows)
        for start in range(0, len(self.data), rows):
            yield slice(start, min(start + rows, len(self.data)))

    def at_most(self, rows: int) -> int:
        """Return that many rows, or as many as fit half the workspace when copied."""
        return max(1, min(rows, WORKSPACE_BYTES // (2 * self.data.shape[1] * self.dtype.itemsize)))

    def raw(self, part: slice | Tensor) -> Tensor:
        """Rows in the dtype they came in, on the device of the computation."""
        if isinstance(part, Tensor):
            return self.data.index_select(0, part.to(self.data.device)).to(self.device)
        return self.data[part].to(self.device)

    def block(self, part: slice | Tensor) -> Tensor:
        """Rows in the compute dtype, contiguous, not normalised."""
        return self.raw(part).to(self.dtype).contiguous()

    def units(self, index: Tensor) -> Tensor:
        """Unit rows, copied."""
        return self.block(index) * self.scale[index, None]

    def subset(self, index: Tensor) -> Rows:
        """Copy of some of the rows."""
        return Rows(self.block(index), self.weight[index], self.dtype, self.device, self.scale[index])

    def _measure(self) -> Tensor:
        scale = torch.empty(len(self.data), dtype=self.dtype, device=self.device)
        for part in self.parts(_SUMMED_ROWS):
            block = self.block(part)
            scale[part] = inverse_norms(block)
            if not bool((scale[part] > 0).all()):  # zero rows, and what an infinite or undefined norm leaves
                _check_finite(block, part.start)
        return scale


def _check_finite(block: Tensor, first: int) -> None:
    dtype = str(block.dtype).removeprefix("torch.")
    for good, expected, came in (
        (block.isfinite().all(dim=1), "finite values", "NaN or inf"),
        (
            torch.linalg.vector_norm(block, dim=1).isfinite(),
            f"rows whose norm fits {dtype}",
            "a larger one",
        ),
    ):
        if not bool(good.all()):
            row = first + int((~good).nonzero()[0, 0])
            raise ValueError(f"X: expected {expected}, got {came} in row {row}")


class Assigned(NamedTuple):
    """Nearest centre of each row: ids (n,) int64 and cosines (n,), and the rows that moved and from where."""

    labels: Tensor
    cosines: Tensor
    moved: Tensor
    before: Tensor

    def inertia(self, rows: Rows) -> float:
        """Σ w (1 − cos), summed in float64."""
        return float(torch.dot((1 - self.cosines).double(), rows.weight.double()))


@torch.no_grad()
def assign(rows: Rows, centers: Tensor, labels: Tensor | None = None) -> Assigned:
    """Nearest of the unit centres (K, D) for each row.

    Without labels the lowest id wins a tie. Labels (n,) are brought up to date in place, and a row stays
    where it is unless another centre is nearer: one maximum without its position settles most rows.
    """
    first = labels is None
    if labels is None:
        labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    cosines = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
    moved, before = [labels[:0]], [labels[:0]]
    buffer = centers.new_empty(0)
    parts: Iterable[slice] = rows.parts(_block_rows(len(centers), rows))
    if uses_kernel(rows.data, centers):  # which keeps no cosines, and nothing is copied
        parts = [slice(0, len(rows))]
    with without_autocast(rows.device):
        for part in parts:
            raw, old, scale = rows.raw(part), labels[part], rows.scale[part]
            if uses_kernel(raw, centers):
                found = nearest_centroids(raw, centers)
                cosines[part] = found.nearest_cosine
                nearest = found.nearest.masked_fill(scale == 0, 0)
                lost = (nearest != old).nonzero()[:, 0]
                new = nearest[lost]
            else:
                block = raw.to(rows.dtype)
                if not buffer.numel():
                    buffer = centers.new_empty((len(block), len(centers)))
                products = torch.mm(block, centers.T, out=buffer[: len(block)])
                if first:
                    best, nearest = products.max(dim=1)  # the first of equals
                    lost = nearest.masked_fill_(scale == 0, 0).nonzero()[:, 0]
                    new = nearest[lost]
                else:
                    best = products.amax(dim=1)
                    beaten = products.gather(1, old[:, None])[:, 0] < best
                    lost = beaten.logical_and_(scale > 0).nonzero()[:, 0]
                    new = products[lost].max(dim=1).indices  # faster than argmax
                torch.mul(best, scale, out=cosines[part])
            if not first:
                moved.append(lost + part.start)
                before.append(old[lost])
            old[lost] = new
    return Assigned(labels, cosines.clamp_(-1, 1), torch.cat(moved), torch.cat(before))


def uses_kernel(points: Tensor, centers: Tensor) -> bool:
    """Whether the Triton assignment kernel takes these."""
    return points.is_cuda and why_not(points, centers) is None


def _block_rows(clusters: int, rows: Rows) -> int:
    on_cpu = rows.device.type == "cpu"
    cosines = min(_BLOCK_BYTES, WORKSPACE_BYTES // 2) if on_cpu else WORKSPACE_BYTES // 2
    count = max(1, cosines // (clusters * rows.dtype.itemsize))
    return min(count, _BLOCK_ROWS) if on_cpu else count


class Clusters:
    """Unit centres (K, D), and what they are the directions of.

    Attributes:
        centers: (K, D) in the compute dtype.
        sums: (K, D) float64, weighted sums of the unit rows of each cluster.
        members: (K,) int64, how many rows are in them.

    """

    def __init__(self, centers: Tensor, sums: Tensor | None = None, members: Tensor | None = None):
        self.centers = centers
        self.sums = torch.zeros_like(centers, dtype=torch.float64) if sums is None else sums
        if members is None:
            members = torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
        self.members = members

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compute in this dtype on this device from now on."""
        self.centers = self.centers.to(device, dtype)
        self.sums, self.members = self.sums.to(device), self.members.to(device)

    def clear(self) -> None:
        """Forget all members; the centres stay."""
        self.sums.zero_()
        self.members.zero_()

    def add(self, rows: Rows, labels: Tensor) -> None:
        """Add all rows to the clusters that labels (n,) names."""
        for part in rows.parts(self._summed_rows()):
            self._add(rows.block(part), (rows.weight * rows.scale)[part], labels[part])
        self.members += torch.bincount(labels[rows.valid], minlength=len(self.members))

    def move(self, rows: Rows, moved: Tensor, before: Tensor, labels: Tensor) -> None:
        """Take the moved rows out of the clusters they were in before and add them to those they are in."""
        after, valid = labels[moved], rows.valid[moved]
        size = rows.at_most(self._summed_rows())
        for index, old, new in zip(*(ids.split(size) for ids in (moved, before, after)), strict=True):
            share = rows.weight[index] * rows.scale[index]
            self._add(rows.block(index), torch.cat([share, -share]), torch.cat([new, old]))
        for ids, sign in ((after, 1), (before, -1)):
            self.members += sign * torch.bincount(ids[valid], minlength=len(self.members))
        self.sums[self.members == 0] = 0.0

    def _summed_rows(self) -> int:
        return max(_SUMMED_ROWS, 8 * len(self.members))  # a K×D result for each

    def _add(self, block: Tensor, share: Tensor, ids: Tensor) -> None:
        """Add share times the block's rows to the sums that ids names; both may go round the block twice."""
        order = ids.argsort(stable=True)
        count = torch.bincount(ids, minlength=len(self.members))
        first = count.cumsum(0) - count
        # Each sum runs over its rows in their order; index_add_ would do so on the CPU only.
        self.sums += embedding_bag(
            order % len(block), block, first, mode="sum", per_sample_weights=share[order]
        )

    def refill(self, rows: Rows, assigned: Assigned) -> bool:
        """Give each empty cluster the row that is farthest from its centre; says whether any was given.

        Rows that lie on their centre, that are all their cluster has, or that are equal to one just taken
        would not help. The labels are brought up to date.
        """
        empty = (self.members == 0).nonzero()[:, 0].tolist()
        if not empty:
            return False
        near = 1 - 8 * torch.finfo(rows.dtype).eps
        far = assigned.cosines.masked_fill(~rows.valid, torch.inf)
        candidates = far.argsort(stable=True)[: 8 * len(empty) + 1024]
        members, taken = self.members.tolist(), 0
        units = rows.block(candidates[:0]).new_empty((len(empty), rows.data.shape[1]))
        for row, cosine, home in zip(
            candidates.tolist(), far[candidates].tolist(), assigned.labels[candidates].tolist(), strict=True
        ):
            if taken == len(empty) or cosine > near:
                break
            unit = rows.units(candidates.new_tensor([row]))[0]
            if members[home] < 2 or bool((units[:taken] @ unit > near).any()):
                continue
            pull = unit.double() * rows.weight[row].double()
            self.sums[home] -= pull
            self.sums[empty[taken]] = pull
            members[home], members[empty[taken]] = members[home] - 1, 1
            assigned.labels[row] = empty[taken]
            units[taken] = unit
            taken += 1
        self.members = self.members.new_tensor(members)
        return taken > 0

    def turn(self) -> None:
        """Turn each centre into the direction of its sum; one whose sum vanishes stays."""
        norm = torch.linalg.vector_norm(self.sums, dim=1, keepdim=True)
        self.centers = torch.where(norm > 0, self.sums / norm, self.centers.double()).to(self.centers.dtype)

    @torch.no_grad()
    def learn(self, batch: Rows) -> Assigned:
        """One mini-batch step: each centre becomes the direction of all that was ever assigned to it."""
        assigned = assign(batch, self.centers)
        self.add(batch, assigned.labels)
        self.refill(batch, assigned)
        self.turn()
        return assigned


@torch.no_grad()
def lloyd(
    rows: Rows, centers: Tensor, max_iter: int, tol: float, report: Report | None = None
) -> tuple[Clusters, int]:
    """Lloyd's iterations from unit centres (K, D), until no label changes; returns the number of them too.

    They also end once one lowers the inertia by no more than the share `tol` of it. `report` gets the inertia
    of the centres before each.
    """
    clusters, labels, previous, iteration = Clusters(centers), None, torch.inf, 0
    for iteration in range(1, max_iter + 1):
        assigned = assign(rows, clusters.centers, labels)
        inertia = assigned.inertia(rows)
        if report is not None:
            report(inertia)
        if labels is None or len(assigned.moved) > _MANY * len(rows) or iteration % _REFRESH == 0:
            clusters.clear()
            clusters.add(rows, assigned.labels)
        elif len(assigned.moved):
            clusters.move(rows, assigned.moved, assigned.before, assigned.labels)
        refilled = clusters.refill(rows, assigned)
        clusters.turn()
        unchanged = labels is not None and not len(assigned.moved)
        if not refilled and (unchanged or (tol > 0 and previous - inertia <= tol * inertia)):
            break
        labels, previous = assigned.labels, inertia
    return clusters, iteration


def mini_batches(
    rows: Rows,
    centers: Tensor,
    max_iter: int,
    tol: float,
    batch_size: int,
    random: np.random.RandomState,
    report: Report | None = None,
) -> tuple[Clusters, int]:
    """Epochs of mini-batch steps, each over all rows in a random order; ends like `lloyd`, by `tol`.

    Each row counts with the centres as they were when its batch came.
    """
    clusters, previous, epoch = Clusters(centers), 0.0, 0
    for epoch in range(1, max_iter + 1):
        inertia = 0.0
        clusters.sums *= _PAST
        for index in torch.from_numpy(random.permutation(len(rows))).split(batch_size):
            batch = rows.subset(index.sort().values.to(rows.device))  # ascending, for a file on a disc
            inertia += clusters.learn(batch).inertia(batch)
        if report is not None:
            report(inertia)
        if epoch > 1 and previous - inertia <= tol * inertia:
            break
        previous = inertia
    return clusters, epoch
