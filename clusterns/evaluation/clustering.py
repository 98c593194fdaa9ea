"""Short-text clustering: k-means on embeddings, judged by the classes that people gave the texts.

Accuracy under the best one-to-one matching of clusters and classes (the Hungarian method), normalised mutual
information (arithmetic mean of the entropies) and adjusted mutual information. The paper's protocol is
scikit-learn's k-means on the embeddings as they are, K the number of classes, best of ten starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_choice, check_count, in_short
from .correlation import check_finite

# "kmeans" is scikit-learn's, "spherical" our SphericalKMeans, which goes by cosine.
ALGORITHMS = ("kmeans", "spherical")
MEASURES = ("accuracy", "nmi", "ami")
# Starts of each k-means, of which the one of lowest inertia counts: scikit-learn's default at the time.
STARTS = 10


def clustering_accuracy(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Share of N texts whose cluster is matched to their class, under the best one-to-one matching.

    Classes and clusters are numbers or words, (N,) each; each that occurs is one of its own, -1 too. Raises
    ValueError for none, for as many of the one as not of the other, and for what is not (N,).
    """
    label_ids, cluster_ids = _count_up("labels", labels), _count_up("clusters", clusters)
    if len(label_ids) != len(cluster_ids):
        raise ValueError(f"clusters: expected {len(label_ids)} as of the labels, got {len(cluster_ids)}")
    return float(_matched(label_ids, cluster_ids).mean())


def _matched(label_ids: NDArray[np.int64], cluster_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each text's cluster is matched to its class, (N,)."""
    table = np.zeros((cluster_ids.max() + 1, label_ids.max() + 1), dtype=np.int64)
    np.add.at(table, (cluster_ids, label_ids), 1)
    clusters, classes = linear_sum_assignment(table, maximize=True)
    match = np.full(len(table), -1)
    match[clusters] = classes
    return match[cluster_ids] == label_ids


def _count_up(name: str, classes: Any) -> NDArray[np.int64]:
    """Ids from 0 on, (N,), in place of whatever the classes are called."""
    wanted = f"{name}: expected a number or a word for each of at least one text"
    if isinstance(classes, (np.ndarray, Tensor)):
        classes = classes.tolist()
    if isinstance(classes, (str, bytes)):
        raise ValueError(f"{wanted}, got one text")
    try:
        found = list(classes)
        place = {value: number for number, value in enumerate(dict.fromkeys(found))}
        ids = np.array([place[value] for value in found], dtype=np.int64)
    except TypeError as error:  # it cannot be walked through, or a row of it is no id
        raise ValueError(f"{wanted}, got {in_short(classes)}") from error
    if not len(ids) or any(value != value for value in place):
        raise ValueError(f"{wanted}, got {'none' if not len(ids) else 'NaN among them'}")
    return ids


def evaluate_clustering(
    name: str,
    embeddings: Tensor | NDArray[Any],
    labels: Sequence[int] | Sequence[str] | NDArray[Any],
    *,
    algorithm: str = "kmeans",
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    starts: int = STARTS,
    progress: bool = False,
) -> tuple[dict[str, Any], NDArray[Any]]:
    """Cluster embeddings (N, D) into as many clusters as there are classes, once for each seed.

    Args:
        name: of the set, for messages and the progress bar.
        embeddings: as the model gives them; "kmeans" takes them as they are, "spherical" goes by cosine.
        labels: the classes (N,), as `clustering_accuracy` takes them.
        algorithm: "kmeans", scikit-learn's KMeans, or "spherical", `clusterns.SphericalKMeans`.
        seeds: of the runs; each is the best of `starts` k-means++ starts by inertia.
        starts: see seeds.
        progress: show a bar.

    Returns two. A dict of texts, classes, algorithm, starts, seeds, and for each of accuracy, nmi and ami
    (× 100) its mean, its standard deviation over the seeds (with n − 1; None for one seed) and the runs'
    values. And whether each of the M runs matches the cluster of each text to its class, (M, N).

    Raises ValueError for embeddings that are not one row a label or not finite, or a single class.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_count("starts", starts, at_least=1)
    classes, seeds, embeddings = _count_up("labels", labels), list(seeds), torch.as_tensor(embeddings)
    if embeddings.ndim != 2 or len(embeddings) != len(classes):
        raise ValueError(
            f"{name}: expected a label for each embedding, got {len(classes)} labels for embeddings of shape "
            f"{tuple(embeddings.shape)}"
        )
    check_finite(name, embeddings)
    count = int(classes.max()) + 1
    if count < 2:
        raise ValueError(f"{name}: expected at least two classes, got {count}")
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")

    points = embeddings.float().cpu().numpy()
    runs: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    correct = []
    for seed in tqdm(seeds, desc=f"cluster {name}", unit="run", disable=not progress):
        clusters = _count_up("clusters", _cluster(points, count, algorithm, seed, starts))
        correct.append(_matched(classes, clusters))
        for measure, value in _judge(classes, clusters).items():
            runs[measure].append(100 * value)
    figures = {
        "texts": len(classes),
        "classes": count,
        "algorithm": algorithm,
        "starts": starts,
        "seeds": seeds,
        **{
            measure: {
                "mean": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "runs": values,
            }
            for measure, values in runs.items()
        },
    }
    return figures, np.stack(correct)


def _cluster(points: NDArray[np.float32], count: int, algorithm: str, seed: int, starts: int) -> NDArray[Any]:
    """Cluster id of each point (N, D)."""
    try:
        from sklearn.cluster import KMeans

        from ..spherical_kmeans import SphericalKMeans
    except ImportError as error:
        raise ImportError(
            f'clustering: expected scikit-learn 1.6 or newer, got: {error}; pip install "clusterns[evaluate]"'
        ) from error
    kind = KMeans if algorithm == "kmeans" else SphericalKMeans
    return kind(count, n_init=starts, random_state=seed).fit(points).labels_


def _judge(labels: NDArray[np.int64], clusters: NDArray[Any]) -> dict[str, float]:
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    return {
        "accuracy": clustering_accuracy(labels, clusters),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
    }
