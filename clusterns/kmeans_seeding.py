"""First centres for spherical k-means: greedy k-means++ in cosine geometry, or rows at random."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .kmeans_steps import Rows
from .objective.norms import without_autocast

# Rows whose distances to the candidates are computed at a time.
_BLOCK_ROWS = 2**14


@torch.no_grad()
def k_means_plus_plus(
    rows: Rows, num_clusters: int, random: np.random.RandomState, report: Callable[[], None] | None = None
) -> Tensor:
    """Pick rows one by one, each with a chance in proportion to w (1 − cos) to the nearest one picked so far.

    1 − cos is half the squared distance of unit rows: it is k-means++ on the sphere. Of 2 + ⌊ln K⌋ rows
    drawn that way the one that lowers the sum of w (1 − cos) most is taken, as scikit-learn does.

    Returns:
        Indices (K,) int64. Rows come twice only where fewer than K differ.

    Source: Arthur & Vassilvitskii 2007, section 2.2.

    """
    trials = 2 + int(math.log(num_clusters))
    weight = rows.weight * rows.valid
    picked = _draw(weight, random.uniform(size=1), weight)
    nearest = torch.full((1, len(rows)), torch.inf, dtype=rows.dtype, device=rows.device)
    chosen = []
    for rank in range(num_clusters):
        if rank:
            picked = _draw(weight * nearest[0], random.uniform(size=trials), weight)
        distances, potential = _distances(rows, picked, nearest, weight)
        best = int(potential.argmin())
        nearest = distances[best : best + 1]
        chosen.append(picked[best])
        if report is not None:
            report()
    return torch.stack(chosen)


def _draw(chance: Tensor, where: np.ndarray, weight: Tensor) -> Tensor:
    """Indices at the places `where` in [0, 1) of the cumulated chances; of the weights if those vanish."""
    total = chance.cpu().double().cumsum(0)  # on a GPU the order of this sum is not fixed
    if not total[-1] > 0:
        total = weight.cpu().double().cumsum(0)
    found = torch.searchsorted(total, torch.from_numpy(where) * total[-1], right=True)
    last = torch.searchsorted(total, total[-1:])  # rounding must not lead past the last row with a chance
    return found.minimum(last).to(chance.device)


def _distances(rows: Rows, picked: Tensor, nearest: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """1 − cos to the nearest of those picked before and each candidate: (trials, n); and weighted sums."""
    candidates = rows.units(picked)
    distances = nearest.new_empty((len(picked), len(rows)))
    potential = torch.zeros(len(picked), dtype=torch.float64, device=rows.device)
    with without_autocast(rows.device):
        for part in rows.parts(_BLOCK_ROWS):
            block = (candidates @ rows.block(part).T).mul_(rows.scale[part]).neg_().add_(1).clamp_(min=0)
            distances[:, part] = block.minimum(nearest[:, part])
            potential += distances[:, part] @ weight[part]
    return distances, potential


def random_rows(rows: Rows, num_clusters: int, random: np.random.RandomState) -> Tensor:
    """Indices (K,) of rows drawn by weight; they come twice only where fewer than K have one."""
    weight = (rows.weight * rows.valid).double().cpu().numpy()
    count = min(num_clusters, int((weight > 0).sum()))
    drawn = random.choice(len(weight), count, replace=False, p=weight / weight.sum())
    return torch.from_numpy(np.resize(drawn, num_clusters)).to(rows.device)
