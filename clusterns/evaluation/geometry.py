"""Where embeddings lie on the sphere: alignment, uniformity and anisotropy, each after L2 normalisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the pairwise distances held at a time.
UNIFORMITY_ROWS = 1024


def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> float:
    """Mean distance to the power alpha between paired rows, (N, D) each, after L2 normalisation.

    Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity
    on the Hypersphere". Raises ValueError for shapes that differ or hold no pair, and for NaN or infinity.
    """
    if x.ndim != 2 or x.shape != y.shape or len(x) < 1:
        raise ValueError(f"x, y: expected two (N ≥ 1, D) tensors, got {tuple(x.shape)} and {tuple(y.shape)}")
    distances = (_unit(x, least=1) - _unit(y, least=1)).norm(dim=1)
    return float(distances.pow(alpha).mean())


def uniformity(x: Tensor, t: float = 2) -> float:
    """Log of the mean of exp(-t · squared distance) over all pairs of rows of x (N, D), L2-normalised.

    Wang & Isola 2020, as `alignment`. Takes rows × N memory, not N × N. Raises ValueError below two rows.
    """
    unit = _unit(x)
    parts = []
    for start in range(0, len(unit), UNIFORMITY_ROWS):
        exponents = 2 * t * (unit[start : start + UNIFORMITY_ROWS] @ unit.T - 1)
        exponents.diagonal(offset=start).fill_(-math.inf)  # no row is a pair with itself
        parts.append(exponents.logsumexp(dim=(0, 1)))
    return float(torch.stack(parts).logsumexp(dim=0)) - math.log(len(unit) * (len(unit) - 1))


def mean_cosine(x: Tensor) -> float:
    """Mean cosine between two different rows of x (N, D): what random pairs have on average.

    Over all pairs, not a sample: (‖Σ u‖² − Σ ‖u‖²) / (N (N − 1)) with the normalised rows u. Ethayarajh 2019,
    "How Contextual are Contextualized Word Representations?", calls it anisotropy. Raises ValueError below
    two rows.
    """
    unit = _unit(x)
    together = unit.sum(dim=0).square().sum() - unit.square().sum()
    return float(together) / (len(unit) * (len(unit) - 1))


def first_component_share(x: Tensor) -> float:
    """Share of the variance of the rows of x (N, D), normalised, that their first principal component has.

    0 for rows that are all equal. Raises ValueError below two rows.
    """
    unit = _unit(x)
    centred = unit - unit.mean(dim=0)
    covariance = centred.T @ centred if unit.shape[1] <= len(unit) else centred @ centred.T
    total = float(covariance.trace())
    if total <= 1e-12 * len(unit):  # rounding, no variance
        return 0.0
    return float(torch.linalg.eigvalsh(covariance)[-1]) / total


def _unit(x: Tensor, least: int = 2) -> Tensor:
    """Rows normalised, in float64; ValueError for fewer than `least`, and for NaN or infinity."""
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"x: expected an (N ≥ 2, D) tensor, got {tuple(x.shape)}")
    broken = int((~torch.isfinite(x).all(dim=1)).sum())
    if broken:
        raise ValueError(f"x: expected finite embeddings, got {broken} rows with NaN or infinity")
    return F.normalize(x.double(), dim=1)
