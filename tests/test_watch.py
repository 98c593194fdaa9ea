"""Figures against their definitions, pair by pair, and warnings that come when they should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import embeddings
from tiny import assert_close

from clusterns import ClusterNSLoss, nearest_centroids
from clusterns.training.figure import draw_run
from clusterns.training.watch import EARLIEST_STEP, IN_A_ROW, Watch, measure, verdicts


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


# Near step 500 of RoBERTa-base, and just after seeding (Deng et al. 2023).
HEALTHY = {
    **{"positive_cosine": 0.83, "nearest_cosine": 0.21, "hard_negative_cosine": 0.16, "mean_cosine": 0.015},
    **{"mates_cosine": 0.075, "with_mates": 0.85, "largest_cluster": 0.06, "empty_clusters": 20},
}
SEEDED = {**HEALTHY, "nearest_cosine": 0.6, "mean_cosine": 0.3}


def look(watch: Watch, steps, **values) -> list[str]:
    values = HEALTHY | values
    return [name for step in steps for name, _ in watch.look(step, values)]


def test_collapse_is_told_once_and_only_if_it_lasts():
    loss_fn = ClusterNSLoss(4, 5)
    steps = range(EARLIEST_STEP, EARLIEST_STEP + 10)
    watch = Watch(loss_fn, 64)
    assert look(watch, steps) == []
    assert look(watch, range(IN_A_ROW - 1), largest_cluster=0.9, empty_clusters=4) == []
    assert look(watch, steps, largest_cluster=0.3, empty_clusters=0) == []
    assert look(watch, range(9), largest_cluster=0.9, empty_clusters=4) == ["clusters collapsed"]
    assert look(watch, range(EARLIEST_STEP), mean_cosine=0.79) == []
    assert look(watch, steps, mean_cosine=0.79) == ["embeddings collapsed"]
    resumed = Watch(loss_fn, 64)
    resumed.load_state_dict(watch.state_dict())
    assert look(resumed, steps, mean_cosine=0.79, largest_cluster=0.9, empty_clusters=4) == []


def test_clustering_that_never_started():
    watch = Watch(ClusterNSLoss(4, 5, start_cosine=0.4), 64)
    for step, cosine in ((5, 0.7), (10, 0.55), (15, 0.6)):
        look(watch, [step], mean_cosine=cosine)
    ((name, text),) = watch.end(20, HEALTHY)
    assert name == "clustering never started"
    assert "lowest mean cosine seen was 0.550, at step 10" in text
    assert "raise it above 0.55" in text
    started = ClusterNSLoss(4, 5)
    started.start_from(torch.randn(5, 4))
    for loss_fn in (started, ClusterNSLoss(4, 0)):
        watch = Watch(loss_fn, 64)
        look(watch, [5], mean_cosine=0.7)
        assert list(watch.end(20, HEALTHY)) == []


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        (SEEDED, []),
        ({"mean_cosine": 0.17}, ["centroids stale"]),
        ({"mean_cosine": 0.8, "nearest_cosine": 0.83}, ["embeddings collapsed"]),
        ({"mean_cosine": 0.85, "positive_cosine": 0.95, "nearest_cosine": 0.92}, ["embeddings crowded"]),
        ({"largest_cluster": 0.6}, ["clusters collapsed"]),
        ({"empty_clusters": 100}, ["clusters empty"]),
        ({"with_mates": 0.3}, ["too few mates"]),
    ],
)
def test_verdicts(changes, wrong):
    """At the end of a run, in the words of the report."""
    values = HEALTHY | changes
    assert [verdict.wrong for verdict in verdicts(values, 512, 128) if verdict.wrong] == wrong
    loss_fn = ClusterNSLoss(4, 128)
    loss_fn.start_from(torch.randn(128, 4))
    watch = Watch(loss_fn, 512)
    assert [name for name, _ in watch.end(EARLIEST_STEP, values)] == (wrong or ["healthy"])
    assert list(watch.end(EARLIEST_STEP - 1, values)) == []


def test_verdicts_without_clusters_and_of_a_small_batch():
    plain = {name: HEALTHY[name] for name in ("mean_cosine", "positive_cosine")}
    ((name, text),) = Watch(ClusterNSLoss(4, 0), 64).end(EARLIEST_STEP, plain)
    assert name == "healthy"
    assert "mean cosine 0.015" in text
    # A sentence is its own positive where there is no other view.
    assert [v.wrong for v in verdicts({"mean_cosine": 0.97}, 64, 0)] == ["embeddings collapsed"]
    # 64 rows cannot fill 128 clusters, and of two one holds half or more.
    assert not verdicts(HEALTHY | {"empty_clusters": 80}, 64, 128)[3].wrong
    assert not verdicts(HEALTHY | {"largest_cluster": 0.7, "empty_clusters": 0}, 64, 2)[2].wrong


def panels_of(monkeypatch, tmp_path, records) -> dict:
    """Of a picture: for each title its axes."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    draw_run(records, tmp_path / "run.png", "$mine", bml_weight=0.5)
    monkeypatch.undo()
    (figure,) = kept
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert figure.get_suptitle().startswith("$mine")
    plt.close(figure)
    return {axes.get_title(): axes for axes in figure.axes}


def test_a_picture_has_a_panel_for_all_that_there_is(monkeypatch, tmp_path):
    terms = {**HEALTHY, "loss": 1.0, "info_nce": 4.0, "learning_rate": 1e-4, "temperature": 0.05, "bml": 0.6}
    records = [{"step": 0, "dev": {"spearman": 1.0}}, {"step": 1, "event": "clustering starts"}]
    records += [{"step": 5, **terms}, {"step": 10, **terms, "info_nce": 0.2}]
    panels = panels_of(monkeypatch, tmp_path, records)
    expected = "loss: InfoNCE, dev spearman, loss: λ · BML, mean cosines, clusters, empty clusters"
    assert list(panels) == [*expected.split(", "), "learning rate", "temperature"]
    assert panels["loss: InfoNCE"].get_yscale() == "log"  # it falls more than tenfold
    assert panels["loss: λ · BML"].get_yscale() == "linear"
    assert panels["loss: λ · BML"].lines[0].get_ydata().tolist() == [0.3, 0.3]
    few = {"step": 5, "loss": 1.0, "info_nce": 1.0, "mean_cosine": 0.1, "positive_cosine": 0.9, "bml": 0.0}
    panels = panels_of(monkeypatch, tmp_path, [few])
    assert list(panels) == ["loss: InfoNCE", "mean cosines"]
    assert all(line.get_marker() == "o" for axes in panels.values() for line in axes.lines)
