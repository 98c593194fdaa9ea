"""One line that names the argument, what was expected and what came; the same from module and function."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clusterns import (
    CachedClusterNSLoss,
    ClusterNSLoss,
    cosine_similarity_matrix,
    info_nce,
    seed_centroids,
)

GOOD, META = torch.randn(4, 3), torch.empty(4, 3, device="meta")
LOSS = ClusterNSLoss(3, 2)
IDS = torch.zeros(4, dtype=torch.int64)


def refused(message, call, *arguments, **settings):
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as caught:
        call(*arguments, **settings)
    assert "\n" not in str(caught.value)


EMBEDDINGS = [
    (GOOD.tolist(), GOOD, r"anchors: expected a tensor .* got list"),
    (GOOD, GOOD[:3], r"positives: expected shape \(4, 3\) to match anchors, got \(3, 3\)"),
    (GOOD, META, r"positives: expected device cpu to match anchors, got meta"),
]
SETTINGS = [
    ("num_clusters", 1, "0, or at least 2 with hard_negatives=True.*got 1"),
    ("num_clusters", 2.5, "an integer, got float 2.5"),
    ("embedding_dim", torch.nn.Linear(3, 3), r"an integer, got the model Linear; .*sentence_transformers.Cl"),
    ("temperature", 0, "a finite number above 0, got 0"),
    ("temperature", torch.ones(2), r"a number or a 0-dim .* got shape \(2,\)"),
    ("start_cosine", 5, "a finite number at least -1 and at most 1, got 5"),
    ("centroid_momentum", 0, "a finite number above 0 and at most 1, got 0"),
    ("centroid_update", "median", "one of 'sum', .* got 'median'"),
    ("false_negatives", "drop", "one of 'bml', .* got 'drop'"),
    ("backend", "numpy", "one of 'auto', .* got 'numpy'"),
    ("gather", "some", "one of 'all', 'ring', got 'some'"),
    ("bml_weight", -1, "a finite number at least 0, got -1"),
    ("directions", "two", "one of 'one', 'both', got 'two'"),
    ("workspace_bytes", 0, "at least 1, got 0"),
]


@pytest.mark.parametrize(("name", "value", "expected"), SETTINGS)
def test_settings(name, value, expected):
    for kind in (ClusterNSLoss, CachedClusterNSLoss):
        refused(f"{name}: expected {expected}", kind, **{"embedding_dim": 3, name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({n: v}, f"{n}: expected {line}") for n, v, line in SETTINGS if n in info_nce.__kwdefaults__),
        ({"cluster_ids": IDS[:3]}, r"cluster_ids: expected shape \(4,\), got \(3,\)"),
        ({"cluster_ids": IDS.float()}, "cluster_ids: expected int64 or int32, got torch.float32"),
        ({"hard_negative_ids": IDS}, "hard_negative_ids: expected together with centroids, got centroids=No"),
        ({"centroids": GOOD[:, :2]}, r"centroids: expected shape \(rows, 3\) to match anchors, got \(4, 2\)"),
        ({"centroids": GOOD[:1], "hard_negative_ids": IDS - 1}, r"hard_.*: expected ids in \[0, 1\), got -1"),
    ],
)
def test_arguments(arguments, message):
    """The checks stand before the choice of backend."""
    words = ("auto", "reference", "triton") if "backend" not in arguments else (arguments["backend"],)
    for word in words:
        refused(message, info_nce, GOOD, GOOD, **{**arguments, "backend": word})


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        *((call, pair, line) for *pair, line in EMBEDDINGS for call in (info_nce, LOSS)),
        (ClusterNSLoss(5, 2), (GOOD, GOOD), r"anchors: expected embedding_dim 5, got shape \(4, 3\)"),
        (LOSS, (META, META), "anchors: expected the device of the loss, cpu, got meta"),
        (LOSS, ([{"ids": GOOD}], None), "anchors: expected a tensor .* got features; the loss that takes"),
        (cosine_similarity_matrix, (GOOD, GOOD[:, :2]), r"b: expected shape \(rows, 3\)"),
        (seed_centroids, (GOOD, GOOD, 5), "num_clusters: expected at most the batch size 4 .*, got 5"),
        (partial(seed_centroids, first=4), (GOOD, GOOD, 2), r"first: expected an index in \[0, 4\), got 4"),
    ],
)
def test_calls(call, arguments, message):
    refused(message, call, *arguments)
