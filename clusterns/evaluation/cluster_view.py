"""What clustering makes of sentences: their centroid, hard negative and false negatives, as for the loss.

Cosines throughout. The hard negative of a sentence is the runner-up centroid, its false negatives are the
other sentences of its cluster (Deng et al., Findings of ACL 2023, section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
# Words of a name, and how many times as frequent as elsewhere a word must be to tell of a cluster.
NAME_WORDS, TELLING = 3, 3.0
# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Han; and marks inside words.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0dff"
_WORD = re.compile(rf"[{_UNSPACED}]+|(?:(?![{_UNSPACED}_])[\w{_MARKS}])+(?:['’](?!s\b)\w+)*")


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

    @cached_property
    def names(self) -> list[str]:
        """The most telling words of each cluster, K texts; "" where there is none."""
        return name_clusters(self.sentences, self.nearest.numpy(), len(self.centroids))

    def label(self, cluster: int) -> str:
        """Number and name of a cluster."""
        return f"{cluster} {self.names[cluster]}" if self.names[cluster] else f"cluster {cluster}"

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

    @cached_property
    def mates(self) -> list[int]:
        """How many others are in each sentence's cluster, N numbers."""
        return (torch.tensor(self.sizes)[self.nearest] - 1).tolist()

    def facts(self) -> dict[str, float]:
        """Figures that a healthy run is judged by, named as the log of a training names them."""
        sizes = np.array(self.sizes)
        share = sizes / sizes.sum()
        entropy = -float((share[share > 0] * np.log(share[share > 0])).sum()) / np.log(len(sizes))
        sums = torch.zeros_like(self.centroids).index_add_(0, self.nearest, self.unit)
        pairs = float((sizes * (sizes - 1.0)).sum())
        mates = float(sums.square().sum() - self.unit.square().sum()) / pairs if pairs else None
        return {
            "nearest_cosine": float(self.nearest_cosines.mean()),
            "hard_negative_cosine": float(self.runner_up_cosines.mean()),
            **({} if mates is None else {"mates_cosine": mates}),
            "mean_cosine": mean_cosine(self.unit),
            "centroids_cosine": mean_cosine(self.centroids),
            "with_mates": float((sizes[self.nearest.numpy()] > 1).mean()),
            "largest_cluster": float(share.max()),
            "empty_clusters": int((sizes == 0).sum()),
            "cluster_entropy": entropy + 0.0,  # no -0
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


def words_of(text: str) -> list[str]:
    """Words of a text in lower case; of a script without spaces all pairs of neighbouring characters."""
    found = []
    for word in _WORD.findall(text.lower()):
        if re.match(f"[{_UNSPACED}]", word):
            found += [word[at : at + 2] for at in range(max(1, len(word) - 1))]
        elif len(word) > 1 and not word.isnumeric():
            found.append(word)
    return found


def name_clusters(sentences: Sequence[str], ids: NDArray[Any], clusters: int) -> list[str]:
    """The most telling words of each cluster, K texts, by class-based TF-IDF over sentences (N) of ids (N,).

    As BERTopic has it (Grootendorst 2022, arXiv 2203.05794), each cluster one document, each word once a
    sentence. A word that other clusters use nearly as much tells nothing, in whatever language, nor does one
    of a single sentence among several. "" where no word is left.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    vectorizer = CountVectorizer(
        analyzer=lambda text: [word for word in words_of(text) if word not in ENGLISH_STOP_WORDS], binary=True
    )
    try:
        found = vectorizer.fit_transform(sentences)  # (N, W)
    except ValueError:  # no word in any
        return [""] * clusters
    words = vectorizer.get_feature_names_out()
    members = csr_matrix((np.ones(len(ids)), (ids, np.arange(len(ids)))), (clusters, len(ids)))
    counts, sizes = members @ found, np.bincount(ids, minlength=clusters)  # (K, W), (K,)
    totals = np.asarray(counts.sum(axis=0)).ravel()
    rarity = np.log(1 + totals.sum() / clusters / totals)
    names = []
    for row, size in zip(counts, sizes, strict=True):
        share = row.sum() / totals.sum()
        # In a cluster of half of all words none is more than twice as frequent as it is in all.
        least = min(TELLING, share**-0.5) if share else 1.0
        telling = (row.data > 1) | (size == 1)
        telling &= row.data >= least * share * totals[row.indices]
        score = np.where(telling, row.data * rarity[row.indices], 0.0)
        order = [row.indices[at] for at in np.argsort(-score, kind="stable") if score[at] > 0]
        names.append(", ".join(_apart(words[order])))
    return names


def _apart(words: Iterable[str]) -> list[str]:
    """The first words, without what cuts a longer one of a script without spaces in pairs."""
    chosen: list[str] = []
    for word in words:
        cuts = re.match(f"[{_UNSPACED}]", word) and any(set(word) & set(other) for other in chosen)
        if not cuts:
            chosen.append(word)
        if len(chosen) == NAME_WORDS:
            break
    return chosen


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
