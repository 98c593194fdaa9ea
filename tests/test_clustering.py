"""Short-text clustering: the matching, the figures, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from clusterns.evaluation.clustering import clustering_accuracy, evaluate_clustering

pytest.importorskip("sklearn")


def blobs(rows: int = 60, classes: int = 3, spread: float = 0.05) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    noise = spread * torch.randn(rows, 8, generator=generator)
    return torch.eye(8)[labels] * 3 + noise, labels.numpy()


@pytest.mark.parametrize(("classes", "clusters"), [(3, 3), (4, 2), (2, 4)])
def test_accuracy_is_that_of_the_best_matching(classes: int, clusters: int) -> None:
    generator = np.random.default_rng(classes)
    for _ in range(20):
        labels, found = generator.integers(classes, size=25), generator.integers(clusters, size=25)
        # Every one-to-one map of clusters to classes; -1 is no class, for a cluster that is left over.
        targets = [*range(classes), *[-1] * max(0, clusters - classes)]
        best = max(
            np.mean(np.array(target)[found] == labels) for target in itertools.permutations(targets, clusters)
        )
        assert clustering_accuracy(labels, found) == pytest.approx(best)


NAMINGS = [
    lambda ids: [-1 if i == 0 else i for i in ids],
    lambda ids: np.array(ids) * 10**9 - 5,
    lambda ids: torch.tensor(ids) * 2**40,
    lambda ids: [f"class {i}" for i in ids],
    lambda ids: (["a", None, 7.5][i] for i in ids),
]


@pytest.mark.parametrize("name", NAMINGS)
def test_classes_and_clusters_may_be_called_anything(name) -> None:
    """Each is one of its own, and ids of 10**9 make no table of as many rows."""
    ids, found = [0, 0, 1, 1, 2, 2, 2], [2, 2, 0, 0, 1, 1, 0]
    assert clustering_accuracy(name(ids), name(found)) == pytest.approx(6 / 7)
    assert clustering_accuracy([0, 0, 1, 1], name([0, 0, 1, 1])) == 1.0
    assert clustering_accuracy(name([0, 0, 1, 1]), [1, 1, 0, 0]) == 1.0


@pytest.mark.parametrize("name", NAMINGS)
def test_all_measures_agree_on_what_a_class_is(name) -> None:
    embeddings, labels = blobs()
    figures = evaluate_clustering("x", embeddings, name(labels.tolist()), seeds=iter((0, 1)), starts=1)
    assert [figures[measure]["mean"] for measure in ("accuracy", "nmi", "ami")] == pytest.approx([100] * 3)
    assert (figures["classes"], figures["seeds"]) == (3, [0, 1])


@pytest.mark.parametrize(
    ("labels", "clusters", "words"),
    [
        ([], [], "^labels: expected a number or a word for each of at least one text, got none$"),
        ([1, 2], [1], "^clusters: expected 2 as of the labels, got 1$"),
        ([[1, 2]], [1, 2], r"^labels: expected a number or a word for each .*, got \[\[1, 2\]\]$"),
        ([1, 2], torch.ones(2, 2), r"^clusters: expected a number or a word for each .*, got \[\[1.0, "),
        (np.array(3), [3], "^labels: expected a number or a word for each .*, got 3$"),
        ("ab", [1, 2], "^labels: expected a number or a word for each .*, got one text$"),
        ([1.0, math.nan], [1, 2], "^labels: expected a number or a word for each .*, got NaN among them$"),
    ],
)
def test_what_is_no_list_of_classes(labels: object, clusters: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        clustering_accuracy(labels, clusters)


@pytest.mark.parametrize("algorithm", ["kmeans", "spherical"])
def test_separate_classes_are_found(algorithm: str) -> None:
    embeddings, labels = blobs()
    figures = evaluate_clustering("x", embeddings, labels, algorithm=algorithm, seeds=(0, 1))
    for measure in ("accuracy", "nmi", "ami"):
        assert figures[measure]["runs"] == pytest.approx([100, 100])
        assert (figures[measure]["mean"], figures[measure]["std"]) == (pytest.approx(100), pytest.approx(0))
    assert (figures["texts"], figures["classes"], figures["seeds"]) == (60, 3, [0, 1])


def test_kmeans_takes_the_embeddings_as_they_are_and_spherical_their_directions() -> None:
    """Two classes that differ in length only: by cosine there is nothing to find."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(80, 4, generator=generator).abs() + 2, dim=1)
    labels = np.arange(80) % 2
    embeddings = directions * torch.from_numpy(1.0 + 9 * labels)[:, None]
    plain = evaluate_clustering("x", embeddings, labels, seeds=[0])
    by_cosine = evaluate_clustering("x", embeddings, labels, seeds=[0], algorithm="spherical")
    assert plain["accuracy"]["mean"] == pytest.approx(100)
    assert by_cosine["accuracy"]["mean"] < 80
    assert plain["accuracy"]["std"] is None


def test_mean_and_spread_are_over_the_seeds() -> None:
    embeddings, labels = blobs(spread=2.5)
    figures = evaluate_clustering("x", embeddings, labels, seeds=range(4), starts=1)
    runs = figures["accuracy"]["runs"]
    assert len(set(runs)) > 1
    assert figures["accuracy"]["mean"] == pytest.approx(np.mean(runs))
    assert figures["accuracy"]["std"] == pytest.approx(np.std(runs, ddof=1))
    again = evaluate_clustering("x", embeddings, labels, seeds=range(4), starts=1)
    assert again["accuracy"]["runs"] == runs


def test_what_cannot_be_clustered() -> None:
    embeddings, labels = blobs()
    with pytest.raises(
        ValueError, match=r"^x: expected a label for each embedding, got 59 labels for .*\(60, 8\)$"
    ):
        evaluate_clustering("x", embeddings, labels[1:])
    with pytest.raises(ValueError, match=r"^x: expected at least two classes, got 1$"):
        evaluate_clustering("x", embeddings, labels * 0)
    embeddings[3, 2] = math.nan
    with pytest.raises(
        ValueError, match=r"^x: expected finite embeddings, got 1 texts with NaN or infinity$"
    ):
        evaluate_clustering("x", embeddings, labels)
    with pytest.raises(ValueError, match=r"^algorithm: expected one of 'kmeans', 'spherical', got 'dbscan'$"):
        evaluate_clustering("x", embeddings, labels, algorithm="dbscan")
    figures = evaluate_clustering("x", blobs()[0].numpy(), labels, seeds=[0], starts=1)
    assert figures["accuracy"]["mean"] == 100
    with pytest.raises(ValueError, match=r"^seeds: expected at least one, got none$"):
        evaluate_clustering("x", blobs()[0], labels, seeds=())
