"""What clustering makes of sentences: their centroid, hard negative and false negatives, as for the loss.

Cosines throughout. The hard negative of a sentence is the runner-up centroid, its false negatives are the
other sentences of its cluster (Deng et al., Findings of ACL 2023, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import nearest_centroids
from ..objective.norms import unit_rows
from .geometry import mean_cosine

# Pairs drawn for each histogram.
DRAWN_PAIRS = 200_000


@dataclass(frozen=True)
class ClusterView:
    """N sentences among K centroids; u and c are the normalised rows.

    Attributes:
        sentences: N distinct texts.
        unit: u, (N, D).
        centroids: c, (K, D).
        source: where the centroids come from, in words.
        nearest, runner_up: ids of the two nearest centroids, (N,).
        nearest_cosines, runner_up_cosines: cosines with them, (N,).

    """

    sentences: list[str]
    unit: Tensor
    centroids: Tensor
    source: str
    nearest: Tensor
    runner_up: Tensor
    nearest_cosines: Tensor
    runner_up_cosines: Tensor

    @property
    def sizes(self) -> list[int]:
        """Sentences of each cluster, K numbers."""
        return torch.bincount(self.nearest, minlength=len(self.centroids)).tolist()

    def members(self, cluster: int) -> Tensor:
        """Rows of the sentences of a cluster."""
        return (self.nearest == cluster).nonzero().flatten()

    def closest_to_centroid(self, cluster: int, count: int) -> list[tuple[int, float]]:
        """Rows of a cluster's sentences nearest its centroid, with their cosines."""
        members = self.members(cluster)
        best = self.nearest_cosines[members].topk(min(count, len(members)))
        return list(zip(members[best.indices].tolist(), best.values.tolist(), strict=True))

    def example(self, row: int, count: int) -> Example:
        """One sentence with its hard negative and its nearest false negatives, at most `count` each."""
        cosines = self.unit @ self.unit[row]
        mates = self.members(int(self.nearest[row]))
        mates = mates[mates != row]
        best = cosines[mates].topk(min(count, len(mates)))
        beside = self.closest_to_centroid(int(self.runner_up[row]), count)
        return Example(
            row=row,
            cluster=int(self.nearest[row]),
            cluster_cosine=float(self.nearest_cosines[row]),
            hard_negative=int(self.runner_up[row]),
            hard_negative_cosine=float(self.runner_up_cosines[row]),
            # A centroid is no sentence: those nearest it say what it stands for.
            hard_negative_sentences=[(other, float(cosines[other])) for other, _ in beside],
            false_negatives=list(zip(mates[best.indices].tolist(), best.values.tolist(), strict=True)),
            mates=len(mates),
        )

    def examples(self, number: int, count: int, seed: int) -> list[Example]:
        """A random sample of sentences, in order, of those with cluster-mates where there are any."""
        sizes = torch.tensor(self.sizes)
        rows = (sizes[self.nearest] > 1).nonzero().flatten()
        rows = rows if len(rows) else torch.arange(len(self.sentences))
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:number]
        return [self.example(row, count) for row in rows[chosen].sort().values.tolist()]

    def cosine_samples(self, seed: int) -> dict[str, NDArray[Any]]:
        """Cosines with the own and the hard-negative centroid, of drawn cluster-mates and of drawn pairs."""
        random = np.random.default_rng(seed)
        count = len(self.sentences)
        first = random.integers(count, size=DRAWN_PAIRS)
        second = (first + random.integers(1, count, size=DRAWN_PAIRS)) % count  # never a row with itself
        return {
            "own centroid": self.nearest_cosines.numpy(),
            "hard-negative centroid": self.runner_up_cosines.numpy(),
            "cluster-mates": self._pair_cosines(*self._draw_mates(random)),
            "all pairs": self._pair_cosines(first, second),
        }

    def _draw_mates(self, random: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows of pairs of one cluster: every such pair has the same chance."""
        order = np.argsort(self.nearest.numpy(), kind="stable")
        sizes = np.array(self.sizes)
        pairs = sizes * (sizes - 1.0)
        if not pairs.any():
            return order[:0], order[:0]
        starts = np.cumsum(sizes) - sizes
        cluster = random.choice(len(sizes), size=DRAWN_PAIRS, p=pairs / pairs.sum())
        first = random.integers(sizes[cluster])
        second = (first + 1 + random.integers(sizes[cluster] - 1)) % sizes[cluster]
        return order[starts[cluster] + first], order[starts[cluster] + second]

    def _pair_cosines(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
        rows = [torch.from_numpy(side).split(8192) for side in (first, second)]
        found = [(self.unit[a] * self.unit[b]).sum(dim=1).numpy() for a, b in zip(*rows, strict=True)]
        return np.concatenate(found) if found else np.zeros(0)

    def facts(self) -> dict[str, float]:
        """Numbers that a healthy run is judged by: mean cosines, and how full the clusters are."""
        sizes = np.array(self.sizes)
        share = sizes / sizes.sum()
        entropy = -float((share[share > 0] * np.log(share[share > 0])).sum()) / np.log(len(sizes))
        sums = torch.zeros_like(self.centroids).index_add_(0, self.nearest, self.unit)
        pairs = float((sizes * (sizes - 1.0)).sum())
        mates = float(sums.square().sum() - self.unit.square().sum()) / pairs if pairs else None
        return {
            "mean cosine with the own centroid": float(self.nearest_cosines.mean()),
            "mean cosine with the hard-negative centroid": float(self.runner_up_cosines.mean()),
            **({} if mates is None else {"mean cosine of cluster-mates": mates}),
            "mean cosine of all pairs": mean_cosine(self.unit),
            "mean cosine between centroids": mean_cosine(self.centroids),
            "share of sentences with a cluster-mate": float((sizes[self.nearest.numpy()] > 1).mean()),
            "empty clusters": int((sizes == 0).sum()),
            "share of the largest cluster": float(share.max()),
            "entropy of the cluster sizes (1: all equal)": entropy,
        }


@dataclass(frozen=True)
class Example:
    """A sentence's row, its clusters, and other sentences as (row, cosine with it)."""

    row: int
    cluster: int
    cluster_cosine: float
    hard_negative: int
    hard_negative_cosine: float
    hard_negative_sentences: list[tuple[int, float]]
    false_negatives: list[tuple[int, float]]
    mates: int


def view_clusters(sentences: list[str], embeddings: Tensor, centroids: Tensor, source: str) -> ClusterView:
    """Assign N distinct sentences, embeddings (N, D), to centroids (K ≥ 2, D); neither need be normalised.

    Raises ValueError for fewer than two sentences or centroids, or embeddings that are not finite.
    """
    if len(sentences) < 2 or len(centroids) < 2:
        raise ValueError(
            f"sentences: expected at least two, and two centroids, got {len(sentences)} and {len(centroids)}"
        )
    broken = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if broken:
        raise ValueError(f"sentences: expected finite embeddings, got {broken} with NaN or infinity")
    unit, _ = unit_rows(embeddings.float(), torch.float32)
    centers, _ = unit_rows(centroids.float(), torch.float32)
    found = nearest_centroids(unit, centers)
    return ClusterView(
        sentences=sentences,
        unit=unit,
        centroids=centers,
        source=source,
        nearest=found.nearest,
        runner_up=found.runner_up,
        nearest_cosines=found.nearest_cosine,
        runner_up_cosines=found.runner_up_cosine,
    )


def plane(unit: Tensor, method: str, seed: int) -> NDArray[Any]:
    """Places in two dimensions, (N, 2), for normalised rows (N ≥ 2, D): by "tsne" or "pca".

    t-SNE keeps neighbours together, and its distances between groups say nothing; below 10 sentences it is
    the principal components all the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = unit.numpy()
    if method == "pca" or len(points) < 10:
        places = PCA(2, random_state=seed).fit_transform(points) if min(points.shape) >= 2 else points
        return np.asarray(places[:, :2])
    perplexity = min(30.0, (len(points) - 1) / 3)
    init = "pca" if points.shape[1] >= 2 else "random"
    return TSNE(2, perplexity=perplexity, init=init, random_state=seed).fit_transform(points)
