"""Spearman correlations, and how sure figures are: bootstrap intervals, and a paired test of two models.

The bootstrap draws scored pairs, texts or queries with replacement. Rank correlations of many resamples at
once need no sorting: a resample is a count of each pair, and cumulated counts are ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr
from torch import Tensor

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
# Counts held at a time by the bootstrap, about 100 MB with all that is made of them.
_CELLS = 2_000_000


def pair_cosines(name: str, first: Tensor, second: Tensor) -> Floats:
    """Cosines (N,) of paired rows, (N, D) each; `name` is for the ValueError where there are NaN or infinity.

    Rounded, so that cosines equal but for their last bits (identical sentences) are ties, not noise.
    """
    cosines = F.cosine_similarity(first.double(), second.double()).round(decimals=12)
    if not bool(torch.isfinite(cosines).all()):
        count = int((~torch.isfinite(cosines)).sum())
        raise ValueError(f"{name}: expected finite embeddings, got {count} pairs with NaN or infinity")
    return cosines.numpy()


def check_finite(name: str, embeddings: Tensor) -> None:
    """Require embeddings (N, D) without NaN and infinity."""
    broken = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if broken:
        raise ValueError(f"{name}: expected finite embeddings, got {broken} texts with NaN or infinity")


def correlation(name: str, cosines: ArrayLike, scores: ArrayLike) -> float:
    """Spearman correlation × 100 between N cosines and N gold scores; average ranks for ties.

    `name` is for the message of the ValueError raised where there is none: fewer than two pairs, or all
    cosines or all gold scores equal, or one of them not finite.
    """
    x, y = np.asarray(cosines, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{name}: expected as many gold scores as cosines, got {y.shape} and {x.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"{name}: expected finite cosines and gold scores, got NaN or infinity")
    if len(x) < 2:
        raise ValueError(f"{name}: expected cosines and gold scores that vary, got {len(x)} pairs")
    for what, values in (("gold scores", y), ("cosines", x)):
        if (values == values[0]).all():
            raise ValueError(
                f"{name}: expected cosines and gold scores that vary, got {len(x)} pairs whose {what} are "
                f"all {values[0]:g}, which have no Spearman correlation"
            )
    return 100 * float(spearmanr(x, y).statistic)


def spearman(name: str, first: Tensor, second: Tensor, scores: Sequence[float]) -> float:
    """Spearman correlation × 100 between the cosines of paired rows, (N, D) each, and N gold scores.

    Raises ValueError, with `name`, as `pair_cosines` and `correlation` do.
    """
    return correlation(name, pair_cosines(name, first, second), scores)


def bootstrap_correlations(
    name: str, cosines: ArrayLike, scores: ArrayLike, resamples: int = 1000, seed: int = 42
) -> Floats:
    """Spearman × 100 of bootstrap resamples of N scored pairs, (resamples,); NaN where one has none.

    Seed, `name` and N alone decide which pairs are drawn, so two models' figures on one set are paired, and
    those of two sets are independent.
    """
    x, y = (_groups(np.asarray(values, dtype=np.float64)) for values in (cosines, scores))
    drawn = [_resampled(x, y, counts) for counts in _draws(name, len(x.group), resamples, seed)]
    return 100 * np.concatenate([np.empty(0), *drawn])


def bootstrap_means(name: str, values: ArrayLike, resamples: int = 1000, seed: int = 42) -> Floats:
    """Mean × 100 of bootstrap resamples of N values, (resamples,), drawn as those of correlations are.

    Of the values (M, N) of M runs each resample draws runs too, those of two models independently.
    """
    runs = np.atleast_2d(np.asarray(values, dtype=np.float64))
    generator = np.random.default_rng([seed, zlib.crc32(runs.tobytes())])
    shares = generator.multinomial(len(runs), [1 / len(runs)] * len(runs), size=resamples) / len(runs)
    means = [counts @ runs.T / runs.shape[1] for counts in _draws(name, runs.shape[1], resamples, seed)]
    return 100 * (shares * np.concatenate([np.empty((0, len(runs))), *means])).sum(axis=1)


def _draws(name: str, size: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of `size` is in each resample, in parts (R, size)."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    step = max(1, _CELLS // size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


class _Groups(NamedTuple):
    """N values as groups of equal ones: the order that sorts, where each group begins, each value's group."""

    order: NDArray[np.intp]
    starts: NDArray[np.intp]
    group: NDArray[np.intp]


def _groups(values: Floats) -> _Groups:
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]]
    group = np.empty(len(values), dtype=np.intp)
    group[order] = np.cumsum(new) - 1
    return _Groups(order, np.flatnonzero(new), group)


def _resampled(x: _Groups, y: _Groups, counts: Floats) -> Floats:
    """Spearman of resamples that hold pair i counts[r, i] times, (R, N) → (R,)."""
    centred = []
    for groups in (x, y):
        sizes = np.add.reduceat(counts[:, groups.order], groups.starts, axis=1)
        # Rank of a group: those below it, and the middle of its own; over all pairs the mean is (N + 1)/2.
        ranks = np.cumsum(sizes, axis=1) - sizes / 2 - counts.shape[1] / 2
        centred.append(ranks[:, groups.group])
    a, b = centred
    weighted = counts * a
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weighted * b).sum(1) / np.sqrt((weighted * a).sum(1) * (counts * b * b).sum(1))


class Interval(NamedTuple):
    """Bounds of a percentile bootstrap interval."""

    low: float
    high: float


def interval(figures: Floats, confidence: float = CONFIDENCE) -> Interval | None:
    """Percentile interval of bootstrap figures (R,); None where none is a number."""
    known = figures[np.isfinite(figures)]
    if not len(known):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(float(low), float(high))


class Difference(NamedTuple):
    """Second minus first model, the bootstrap interval, the two-sided p-value and the least it can be."""

    value: float
    low: float
    high: float
    p_value: float
    p_floor: float


def paired_difference(value: float, first: Floats, second: Floats) -> Difference | None:
    """Test a difference of two models by their figures on the same resamples, (R,) each.

    `value` is the difference on the pairs themselves. p is twice the share of resamples, with one added to
    both counts, in which the difference does not have the sign of most (Efron & Tibshirani 1993, ch. 15-16):
    2/(R + 1) at least, which says no more than that p is below it. None where no resample has a figure.
    """
    differences = second - first
    differences = differences[np.isfinite(differences)]
    bounds = interval(differences)
    if bounds is None:
        return None
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    floor = min(1.0, 2 / (len(differences) + 1))
    p_value = min(1.0, floor * (min(below, above) + 1))
    return Difference(value, bounds.low, bounds.high, p_value, floor)
