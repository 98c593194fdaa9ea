"""Short-text clustering: the matching, the figures, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from clusterns.evaluation.clustering import clustering_accuracy, evaluate_clustering

pytest.importorskip("sklearn")


def blobs(spread: float = 0.05) -> tuple[torch.Tensor, np.ndarray]:
    """Sixty embeddings around three places."""
    labels = torch.arange(60) % 3
    return torch.eye(8)[labels] * 3 + spread * torch.randn(60, 8), labels.numpy()


@pytest.mark.parametrize(("classes", "clusters"), [(3, 3), (4, 2), (2, 4)])
def test_accuracy_is_that_of_the_best_matching(classes: int, clusters: int) -> None:
    generator = np.random.default_rng(classes)
    for _ in range(20):
        labels, found = generator.integers(classes, size=25), generator.integers(clusters, size=25)
        # Every one-to-one map of clusters to classes; -1 is no class, for a cluster that is left over.
        targets = [*range(classes), *[-1] * max(0, clusters - classes)]
        maps = itertools.permutations(targets, clusters)
        best = max(np.mean(np.array(target)[found] == labels) for target in maps)
        assert clustering_accuracy(labels, found) == pytest.approx(best)


@pytest.mark.parametrize("names", [["a", None, 7.5], [-1, 2**40, 2]])
def test_classes_and_clusters_may_be_called_anything(names: list) -> None:
    """Each is one of its own, and ids of 2**40 make no table of as many rows."""

    def name(ids: list[int]) -> list:
        return [names[i] for i in ids]

    ids, found = [0, 0, 1, 1, 2, 2, 2], [2, 2, 0, 0, 1, 1, 0]
    assert clustering_accuracy(name(ids), name(found)) == pytest.approx(6 / 7)


def test_kmeans_takes_the_embeddings_as_they_are_and_spherical_their_directions() -> None:
    """Two classes that differ in length only: by cosine there is nothing to find."""
    directions = torch.nn.functional.normalize(torch.randn(80, 4).abs() + 2, dim=1)
    labels = np.arange(80) % 2
    embeddings = directions * torch.from_numpy(1.0 + 9 * labels)[:, None]
    plain, _ = evaluate_clustering("x", embeddings, labels, seeds=[0])
    by_cosine, _ = evaluate_clustering("x", embeddings, labels, seeds=[0], algorithm="spherical")
    assert plain["accuracy"]["mean"] == pytest.approx(100)
    assert by_cosine["accuracy"]["mean"] < 80
    assert plain["accuracy"]["std"] is None


def test_mean_and_spread_are_over_the_seeds() -> None:
    embeddings, labels = blobs(spread=2.5)
    figures, correct = evaluate_clustering("x", embeddings, labels, seeds=range(4), starts=1)
    runs = figures["accuracy"]["runs"]
    assert len(set(runs)) > 1
    assert figures["accuracy"]["mean"] == pytest.approx(np.mean(runs))
    assert figures["accuracy"]["std"] == pytest.approx(np.std(runs, ddof=1))
    assert 100 * correct.mean() == pytest.approx(figures["accuracy"]["mean"])
    assert (100 * correct.mean(axis=1)).tolist() == pytest.approx(runs)
    assert evaluate_clustering("x", embeddings, labels, seeds=range(4), starts=1)[0] == figures


def test_what_cannot_be_clustered() -> None:
    embeddings, labels = blobs()
    for settings, words in (
        ({"labels": range(59)}, r"^x: expected a label for each embedding, got 59 labels for .*\(60, 8\)$"),
        ({"labels": [0] * 60}, r"^x: expected at least two classes, got 1$"),
        ({"labels": [1.0, math.nan]}, "^labels: expected a number or a word .*, got NaN among them$"),
        ({"embeddings": torch.eye(60).log()}, r"^x: expected finite embeddings, got 60 texts with NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_clustering("x", **{"embeddings": embeddings, "labels": labels, **settings})
