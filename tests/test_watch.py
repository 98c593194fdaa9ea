"""Figures against their definitions, pair by pair, and warnings that come when they should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import embeddings
from tiny import assert_close

from clusterns import ClusterNSLoss, nearest_centroids
from clusterns.training.watch import EARLIEST_STEP, IN_A_ROW, Watch, measure


@pytest.mark.parametrize(("batch", "with_negatives"), [(17, True), (300, False)])
def test_measure_is_what_it_says(batch, with_negatives):
    z1, z2 = (z.detach() for z in embeddings(batch, 12, groups=3, dtype=torch.float32))
    negatives = torch.randn(9, 12) if with_negatives else None
    loss_fn = ClusterNSLoss(12, 5, start_cosine=1.0)
    for _ in range(3):
        loss_fn(z1, z2)
    found = measure(z1, z2, negatives, loss_fn=loss_fn, clustered=True)

    a, p, c = (F.normalize(z.double(), dim=1) for z in (z1, z2, loss_fn.centroids))
    similarity, to_centroids = a @ p.T, a @ c.T
    near, runner_up = (ids.long() for ids in nearest_centroids(z1, loss_fn.centroids)[:2])
    # The ids are those of the largest cosines, or of ties but for rounding.
    assert_close(to_centroids.gather(1, torch.stack([near, runner_up], 1)), to_centroids.topk(2).values)
    mates = (near[:, None] == near) & ~torch.eye(batch, dtype=torch.bool)
    sizes = torch.bincount(near, minlength=5).double()
    occupied = sizes[sizes > 0] / batch
    between = (c @ c.T)[~torch.eye(5, dtype=torch.bool)]
    expected = {
        "mates_cosine": similarity[mates].mean(),
        "centroids_cosine": between.mean(),
        "empty_clusters": (sizes == 0).sum(),
        "largest_cluster": sizes.max() / batch,
        "cluster_entropy": -(occupied * occupied.log()).sum() / math.log(5),
    }
    perplexities = []
    rows = min(batch, 256)
    for i in (row * batch // rows for row in range(rows)):
        parts = [similarity[i, torch.arange(batch) != i], to_centroids[i, runner_up]]
        if negatives is not None:
            parts.append(F.normalize(negatives.double(), dim=1) @ a[i])
        share = (torch.cat(parts) / 0.05).softmax(dim=0)
        perplexities.append(torch.exp(-(share * share.log()).sum()))
    expected["effective_negatives"] = torch.stack(perplexities).mean()
    expected = {name: float(value) for name, value in expected.items()}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        expected, rel=1e-3, abs=1e-4
    )


def look(watch: Watch, steps, **values) -> list[str]:
    values = {"mean_cosine": 0.1, "positive_cosine": 0.9, **values}
    return [name for step in steps for name, _ in watch.look(step, values)]


def test_collapse_is_told_once_and_only_if_it_lasts():
    loss_fn = ClusterNSLoss(4, 5)
    steps = range(EARLIEST_STEP, EARLIEST_STEP + 10)
    watch = Watch(loss_fn)
    assert look(watch, steps) == []
    assert look(watch, range(IN_A_ROW - 1), largest_cluster=0.9, empty_clusters=4) == []
    assert look(watch, steps, largest_cluster=0.3, empty_clusters=0) == []
    assert look(watch, range(9), largest_cluster=0.9, empty_clusters=4) == ["clusters collapsed"]
    assert look(watch, range(EARLIEST_STEP), mean_cosine=0.89) == []
    assert look(watch, steps, mean_cosine=0.89) == ["embeddings collapsed"]
    resumed = Watch(loss_fn)
    resumed.load_state_dict(watch.state_dict())
    assert look(resumed, steps, mean_cosine=0.89, largest_cluster=0.9, empty_clusters=4) == []


def test_clustering_that_never_started():
    watch = Watch(ClusterNSLoss(4, 5, start_cosine=0.4))
    for step, cosine in ((5, 0.7), (10, 0.55), (15, 0.6)):
        look(watch, [step], mean_cosine=cosine)
    ((name, text),) = watch.end(20)
    assert name == "clustering never started"
    assert "lowest mean cosine seen was 0.550, at step 10" in text
    assert "raise it above 0.55" in text
    started = ClusterNSLoss(4, 5)
    started.start_from(torch.randn(5, 4))
    for loss_fn in (started, ClusterNSLoss(4, 0)):
        watch = Watch(loss_fn)
        look(watch, [5], mean_cosine=0.7)
        assert list(watch.end(20)) == []
