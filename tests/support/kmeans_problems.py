"""Points and a plain float64 oracle for the tests of k-means."""

from __future__ import annotations

import numpy as np
import torch

from clusterns.kmeans_steps import Rows


def blobs(rows=200, dim=17, groups=5, *, seed=0, spread=0.7, dtype=np.float64):
    """Points of any length around directions of their own."""
    random = np.random.default_rng(seed)
    centers = random.standard_normal((groups, dim))
    points = centers[random.integers(groups, size=rows)] + spread * random.standard_normal((rows, dim))
    return (points * random.uniform(0.1, 5, (rows, 1))).astype(dtype)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-8)


def oracle(x, centers, max_iter, weight=None, gap=1e-9):
    """Spherical Lloyd, one formula a line, until no label changes; empty clusters are not expected.

    Nor is a point whose two best centres are within `gap`: there rounding would choose.
    """
    x, c, labels, iterations = unit(x), unit(centers), None, 0
    weight = np.ones(len(x)) if weight is None else weight
    for _ in range(max_iter):
        iterations += 1
        before, labels = labels, (x @ c.T).argmax(axis=1)
        best = np.sort(x @ c.T, axis=1)[x.any(axis=1), -2:]
        assert len(c) == 1 or (best[:, 1] - best[:, 0] > gap).all()
        members = (labels == np.arange(len(c))[:, None]) * weight
        assert (members.sum(axis=1) > 0).all()
        c = unit(members @ x)
        if before is not None and (before == labels).all():
            break
    cosines = x @ c.T
    return c, cosines.argmax(axis=1), ((1 - cosines.max(axis=1)) * weight).sum(), iterations


def rows_of(x, weight=None):
    x = torch.as_tensor(x)
    weight = None if weight is None else torch.as_tensor(weight)
    return Rows(x, weight, x.dtype, torch.device("cpu"))
