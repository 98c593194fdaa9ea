"""One line that names the argument, what was expected and what came; the same from module and function."""

from __future__ import annotations

import pytest
import torch

from clusterns import (
    CachedClusterNSLoss,
    ClusterNSLoss,
    cosine_similarity_matrix,
    info_nce,
    nearest_centroids,
    seed_centroids,
)

GOOD = torch.randn(4, 3)

EMBEDDINGS = [
    (torch.randn(4), GOOD, r"anchors: expected 2 dimensions \(rows, dim\), got shape \(4,\)"),
    (torch.randn(2, 2, 3), GOOD, r"anchors: expected 2 dimensions .* got shape \(2, 2, 3\)"),
    (torch.zeros(0, 3), torch.zeros(0, 3), r"anchors: expected at least one row .* got shape \(0, 3\)"),
    (torch.ones(4, 3, dtype=torch.int64), GOOD, r"anchors: expected float16, .* got torch.int64"),
    (torch.ones(4, 3, dtype=torch.complex64), GOOD, r"anchors: expected float16, .* got torch.complex64"),
    ([[1.0, 2.0, 3.0]], GOOD, r"anchors: expected a tensor .* got list"),
    (GOOD, GOOD.to_sparse(), r"positives: expected a dense tensor, got one of layout torch.sparse_coo"),
    (GOOD, torch.randn(5, 3), r"positives: expected shape \(4, 3\) to match anchors, got \(5, 3\)"),
    (GOOD, torch.randn(4, 2), r"positives: expected shape \(4, 3\) to match anchors, got \(4, 2\)"),
    (GOOD, torch.empty(4, 3, device="meta"), r"positives: expected device cpu to match anchors, got meta"),
]


@pytest.mark.parametrize(("anchors", "positives", "message"), EMBEDDINGS)
def test_embeddings(anchors, positives, message):
    for call in (info_nce, ClusterNSLoss(3, 2)):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            call(anchors, positives)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 1}, "num_clusters: expected at least 2 with hard_negatives=True.*got 1"),
        ({"num_clusters": 0}, "num_clusters: expected at least 2 with hard_negatives=True.*got 0"),
        ({"num_clusters": -1}, "num_clusters: expected at least 0, got -1"),
        ({"num_clusters": 2.5}, "num_clusters: expected an integer, got float 2.5"),
        ({"embedding_dim": 0}, "embedding_dim: expected at least 1, got 0"),
        (
            {"embedding_dim": torch.zeros(9, 9)},
            r"embedding_dim: expected an integer, got Tensor tensor.{,70}$",
        ),
        ({"temperature": 0}, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": -0.05}, "temperature: expected a finite number above 0, got -0.05"),
        ({"temperature": float("nan")}, "temperature: expected a finite number above 0, got nan"),
        ({"temperature": float("inf")}, "temperature: expected a finite number above 0, got inf"),
        ({"temperature": torch.tensor(-1.0)}, "temperature: expected a finite number above 0, got -1.0"),
        ({"temperature": torch.ones(2)}, r"temperature: expected a number or a 0-dim .* got shape \(2,\)"),
        ({"temperature": "warm"}, "temperature: expected a finite number above 0, got str 'warm'"),
        ({"start_cosine": float("nan")}, "start_cosine: expected a finite number at least -1 .* got nan"),
        ({"start_cosine": 5}, "start_cosine: expected a finite number at least -1 and at most 1, got 5"),
        ({"start_cosine": -2}, "start_cosine: expected a finite number at least -1 and at most 1, got -2"),
        (
            {"centroid_momentum": 0},
            "centroid_momentum: expected a finite number above 0 and at most 1, got 0",
        ),
        ({"centroid_momentum": 1.5}, "centroid_momentum: .* at most 1, got 1.5"),
        ({"centroid_update": "median"}, "centroid_update: expected one of 'sum', .* got 'median'"),
        ({"false_negatives": "drop"}, "false_negatives: expected one of 'bml', .* got 'drop'"),
        ({"backend": "numpy"}, "backend: expected one of 'auto', .* got 'numpy'"),
        ({"hard_negative_weight": float("inf")}, "hard_negative_weight: expected a finite number, got inf"),
        ({"bml_weight": -1}, "bml_weight: expected a finite number at least 0, got -1"),
        ({"bml_alpha": None}, "bml_alpha: expected a finite number, got NoneType None"),
        ({"bml_beta": float("nan")}, "bml_beta: expected a finite number, got nan"),
    ],
)
def test_settings(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        ClusterNSLoss(**{"embedding_dim": 3, **arguments})
    assert "\n" not in str(caught.value)


def test_the_loss_of_another_library_is_named():
    model = torch.nn.Linear(3, 3)
    line = "clusterns.sentence_transformers.ClusterNSLoss$"
    for make in (ClusterNSLoss, CachedClusterNSLoss):
        with pytest.raises(
            TypeError, match=rf"^embedding_dim: expected an integer, got the model Linear; .*{line}"
        ):
            make(model)
    with pytest.raises(TypeError, match=rf"^anchors: expected a tensor .* got features; .*{line}"):
        ClusterNSLoss(3, 2)([{"input_ids": GOOD}], None)


def test_loss_of_other_width_or_device():
    loss = ClusterNSLoss(5, 2)
    with pytest.raises(ValueError, match=r"anchors: expected embedding_dim 5, got shape \(4, 3\)"):
        loss(GOOD, GOOD)
    with pytest.raises(ValueError, match="anchors: expected the device of the loss, cpu, got meta"):
        loss(torch.empty(4, 5, device="meta"), torch.empty(4, 5, device="meta"))


@pytest.mark.parametrize("learned", [True, False])
def test_temperature_on_another_device(learned):
    tau = torch.empty((), device="meta")
    settings = {"temperature": torch.nn.Parameter(tau) if learned else tau}
    calls = [
        *(ClusterNSLoss(3, 2, backend=word, **settings) for word in ("auto", "torch", "reference")),
        ClusterNSLoss(3, 0, hard_negatives=False, **settings).eval(),
        lambda a, p: CachedClusterNSLoss(3, 2, **settings)(torch.nn.Linear(3, 3), a, p),
        lambda a, p: info_nce(a, p, **settings),
        lambda a, p: cosine_similarity_matrix(a, p, **settings),
    ]
    calls[0].start_from(GOOD[:2])
    line = r"temperature: expected the device of (anchors|a), cpu, got meta; move it, .* \.to\(device\)"
    for call in calls:
        with pytest.raises(ValueError, match=line) as caught:
            call(GOOD, GOOD)
        assert "\n" not in str(caught.value)


def test_stateless_arguments():
    ids = torch.zeros(4, dtype=torch.int64)
    bad = [
        ({"cluster_ids": ids[:3]}, r"cluster_ids: expected shape \(4,\), got \(3,\)"),
        ({"cluster_ids": ids.float()}, "cluster_ids: expected int64 or int32, got torch.float32"),
        ({"cluster_ids": [0, 0, 0, 0]}, r"cluster_ids: expected an integer tensor .* got list"),
        (
            {"hard_negative_ids": ids},
            "hard_negative_ids: expected together with centroids, got centroids=None",
        ),
        (
            {"centroids": torch.randn(2, 4)},
            r"centroids: expected shape \(rows, 3\) to match anchors, got \(2, 4\)",
        ),
        ({"negatives": torch.randn(2, 4)}, r"negatives: expected shape \(rows, 3\) to match anchors"),
        (
            {"centroids": GOOD[:1], "hard_negative_ids": ids - 1},
            r"hard_negative_ids: expected ids in \[0, 1\), got -1",
        ),
        (
            {"centroids": GOOD[:2], "hard_negative_ids": ids + 2},
            r"hard_negative_ids: expected ids in \[0, 2\), got 2",
        ),
        ({"workspace_bytes": 0}, "workspace_bytes: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
    ]
    for arguments, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            info_nce(GOOD, GOOD, **arguments)
    with pytest.raises(ValueError, match="num_clusters: expected at most the batch size 4 at seeding, got 5"):
        seed_centroids(GOOD, GOOD, 5)
    with pytest.raises(ValueError, match=r"first: expected an index in \[0, 4\), got 4"):
        seed_centroids(GOOD, GOOD, 2, first=4)
    with pytest.raises(ValueError, match="centroids: expected at least one row"):
        nearest_centroids(GOOD, torch.zeros(0, 3))
