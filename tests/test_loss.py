"""The module: when clustering starts, what it keeps, what survives."""

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import torch
from compare import assert_close_to_truth
from conftest import embeddings

import clusterns
from clusterns import CachedClusterNSLoss, ClusterNSLoss, reference

UPDATES = ["sum", "mean", "replace", "adamw"]


def batches(count, batch=40, dim=12, dtype=torch.float32):
    return [embeddings(batch, dim, dtype=dtype, seed=seed) for seed in range(count)]


def started(num_clusters=6, dim=12, dtype=torch.float32, **arguments):
    """A loss whose clustering is active, seeded from one batch."""
    loss_fn = ClusterNSLoss(dim, num_clusters, start_cosine=1.0, **arguments)
    loss_fn(*embeddings(40, dim, dtype=dtype, seed=99))
    assert loss_fn.clustering_active
    return loss_fn


def test_start_rule():
    """Plain InfoNCE until the mean cosine falls to σ, on that step too, then clustering for good."""
    close = torch.ones(20, 12) + 0.1 * torch.randn(20, 12)
    spread = embeddings(20, 12, groups=20, dtype=torch.float32)
    loss_fn = ClusterNSLoss(12, 4, start_cosine=0.5)
    for views, active_after in (((close, close), False), (spread, True)):
        loss = loss_fn(*views)
        assert_close_to_truth(loss, clusterns.info_nce(*views), condition=24)
        assert loss_fn.clustering_active == active_after == bool(loss_fn.initialized)
        assert "nearest_cosine" not in loss_fn.last
    loss = loss_fn(close, close)
    assert loss_fn.clustering_active
    assert loss > clusterns.info_nce(close, close)  # hard negatives now stand in the denominator
    assert 0 <= loss_fn.last["with_mates"] <= 1


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centroids_follow_the_reference(update, dtype):
    loss_fn = started(centroid_update=update, centroid_momentum=0.05, dtype=dtype)
    expected = loss_fn.centroids.double().clone()
    parameter = torch.nn.Parameter(expected.clone())
    for anchors, positives in batches(4, dtype=dtype):
        points = anchors.detach().double()
        near, _ = reference.nearest_and_runner_up(points, expected)
        if update == "adamw":
            # The authors' optimiser, with its eps before the bias correction, which matters at this size.
            error = (parameter[near] - points).square().mean()
            (grad,) = torch.autograd.grad(error, parameter)
            moments = getattr(parameter, "moments", (0.0, 0.0, 0))
            step = moments[2] + 1
            first = 0.9 * moments[0] + 0.1 * grad
            second = 0.999 * moments[1] + 0.001 * grad**2
            size = 0.05 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            parameter.data -= size * first / (second.sqrt() + 1e-6)
            parameter.moments = (first, second, step)
            expected = parameter.data.clone()
        else:
            momentum = 1.0 if update == "replace" else 0.05
            expected = reference.update_centroids(expected, points, near, momentum, update)
        loss_fn(anchors, positives)
        # AdamW divides by the root of a second moment, which is near 0 at first.
        assert_close_to_truth(loss_fn.centroids, expected, condition=40)
        assert loss_fn.centroids.dtype == dtype


def test_assign_then_update_then_reassign():
    """The loss of a step sees the centroids *after* their update."""
    loss_fn = started(centroid_momentum=0.5)
    (anchors, positives), *_ = batches(1)
    loss = loss_fn(anchors, positives)
    again = clusterns.info_nce(
        anchors, positives, centroids=loss_fn.centroids, false_negatives="bml", bml_weight=1e-4
    )
    assert_close_to_truth(loss, again, condition=24)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_agree_over_a_run(backend):
    losses = [started(dtype=torch.float64, backend=name) for name in ("auto", backend)]
    losses[1].load_state_dict(losses[0].state_dict())
    for anchors, positives in batches(3, dtype=torch.float64):
        assert_close_to_truth(losses[0](anchors, positives), losses[1](anchors, positives), condition=24)
    assert losses[0].last.keys() == losses[1].last.keys()


def test_last_is_detached_and_complete():
    loss_fn = started()
    (anchors, positives), *_ = batches(1)
    loss = loss_fn(anchors, positives)
    terms = {"loss", "info_nce", "bml", "mean_cosine", "positive_cosine"}
    clustered = {"nearest_cosine", "hard_negative_cosine", "with_mates"}
    assert set(loss_fn.last) == terms | clustered
    assert all(value.ndim == 0 and not value.requires_grad for value in loss_fn.last.values())
    assert_close_to_truth(loss_fn.last["loss"], loss.detach(), condition=24)
    matrix = clusterns.cosine_similarity_matrix(anchors, positives)
    assert_close_to_truth(loss_fn.last["mean_cosine"], matrix.mean().detach(), condition=24)
    assert_close_to_truth(loss_fn.last["positive_cosine"], matrix.diagonal().mean().detach(), condition=24)
    assert loss_fn.last["nearest_cosine"] > loss_fn.last["hard_negative_cosine"]


def test_small_batch_waits_with_one_warning():
    loss_fn = ClusterNSLoss(12, 64, start_cosine=1.0)
    small = embeddings(40, 12, dtype=torch.float32)
    with pytest.warns(UserWarning, match="batch of 40 cannot seed num_clusters=64"):
        loss_fn(*small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(*small)
    assert not loss_fn.clustering_active
    loss_fn(*embeddings(64, 12, dtype=torch.float32))
    assert loss_fn.clustering_active
    loss_fn(*small)  # once seeded any batch will do
    loss_fn(*(view[:1] for view in small))


def warned(make, *batches):
    """What each call of the loss warns of, in turn, and where."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_fn = make()
        for views in batches:
            loss_fn(*views)
            texts.append([str(warning.message) for warning in caught])
            assert all(warning.filename == __file__ for warning in caught)
            caught.clear()
    return texts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_views_that_are_the_same_are_told_at_the_first_step(dtype):
    views = [z.detach().to(dtype) for z in embeddings(8, 12, seed=0)]
    same = (views[0], views[0] * 2)
    line = "the two views of every sentence are the same.* no dropout .*hidden_dropout_prob=0.1.*give pairs"
    first, second = warned(lambda: ClusterNSLoss(12, 2), same, same)
    assert len(first) == 1
    assert re.match(line, first[0])
    assert not second
    # One row that differs, however little of it, is enough; and later steps are not looked at.
    other = views[0].clone()
    other[0] += 0.1 * views[1][0]
    assert warned(lambda: ClusterNSLoss(12, 2), (views[0], other), same) == [[], []]
    assert warned(lambda: ClusterNSLoss(12, 2).eval(), same) == [[]]
    cached = warned(lambda: CachedClusterNSLoss(12, 2), (torch.nn.Linear(12, 12, dtype=dtype), *same[:1] * 2))
    assert len(cached[0]) == 1
    assert re.match(line, cached[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the two views of every sentence")
        ClusterNSLoss(12, 2)(*same)


def test_a_batch_of_one_is_told_once():
    plain = lambda: ClusterNSLoss(12, 0, hard_negatives=False)  # noqa: E731
    one, many = (embeddings(rows, 12, dtype=torch.float32) for rows in (1, 8))
    line = "a batch of one has no negatives, its loss is always 0; .* drop_last=True"
    found = warned(plain, many, one, one)
    assert [len(texts) for texts in found] == [0, 1, 0]
    assert re.match(line, found[1][0])
    assert warned(plain, (*one, many[0])) == [[]]
    assert warned(lambda: plain().eval(), one) == [[]]
    assert warned(started, one) == [[]]  # a centroid is a negative
    assert re.match(line, warned(lambda: started(hard_negatives=False), one)[0][0])


def test_steps_without_gradient_are_told():
    views = embeddings(8, 12, dtype=torch.float32)
    with torch.no_grad():
        found = warned(lambda: ClusterNSLoss(12, 2), views, views)
        assert warned(lambda: ClusterNSLoss(12, 2).eval(), views) == [[]]
    assert [len(texts) for texts in found] == [1, 0]
    assert re.match(r"training: a step without gradient moves the centroids .*\.eval\(\)", found[0][0])


def test_temperatures_that_are_meant_otherwise():
    for temperature in (20, 20.0, torch.tensor(20.0), torch.nn.Parameter(torch.tensor(20.0))):
        with pytest.warns(UserWarning, match="temperature: 20 looks like the scale .* temperature=0.05$"):
            CachedClusterNSLoss(12, 2, temperature=temperature)
    tau = torch.tensor(0.05, requires_grad=True)
    with pytest.warns(UserWarning, match="temperature: .* becomes a buffer, .* pass torch.nn.Parameter"):
        ClusterNSLoss(12, 2, temperature=tau)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for good in (1.0, 0.05, torch.tensor(0.05), torch.nn.Parameter(torch.tensor(0.05))):
            ClusterNSLoss(12, 2, temperature=good)


def test_ranks_that_share_nothing_are_told(monkeypatch):
    views = embeddings(8, 12, dtype=torch.float32)
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    words = "each of the 2 ranks sees its own rows only; to share one batch pass "
    cure = ClusterNSLoss.lone_ranks_cure
    assert warned(lambda: ClusterNSLoss(12, 2), views, views) == [[words + cure], []]
    monkeypatch.setattr(ClusterNSLoss, "lone_ranks_cure", "it on")
    assert warned(lambda: ClusterNSLoss(12, 2), views) == [[words + "it on"]]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)  # the first one says it for all
    assert warned(lambda: ClusterNSLoss(12, 2), views) == [[]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("update", UPDATES)
def test_non_finite_rows_do_not_poison_the_centroids(bad, update):
    clean, dirty = started(centroid_update=update), started(centroid_update=update)
    dirty.load_state_dict(clean.state_dict())
    (anchors, positives), *_ = batches(1)
    spoiled = anchors.detach().clone()
    spoiled[3, 2] = bad
    loss = dirty(spoiled, positives)
    assert not loss.isfinite()  # mixed precision must see it and skip the step
    assert dirty.centroids.isfinite().all()
    rest = torch.arange(40) != 3
    clean(anchors[rest], positives[rest])
    assert_close_to_truth(dirty.centroids, clean.centroids, condition=24)


def test_non_finite_batch_does_not_seed():
    loss_fn = ClusterNSLoss(12, 4, start_cosine=1.0)
    (anchors, positives), *_ = batches(1)
    with torch.no_grad():
        anchors[0, 0] = float("nan")
    loss_fn(anchors, positives)
    assert not loss_fn.clustering_active


def test_evaluation_mode_changes_nothing():
    loss_fn = started()
    before = copy.deepcopy(loss_fn.state_dict())
    loss_fn.eval()
    loss_fn(*batches(1)[0])
    assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())
    fresh = ClusterNSLoss(12, 4, start_cosine=1.0).eval()
    fresh(*batches(1)[0])
    assert not fresh.clustering_active


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("how", ["state_dict", "assign", "deepcopy", "save"])
def test_a_run_goes_on_as_if_never_interrupted(update, how):
    whole = started(centroid_update=update)
    data = batches(4)
    for views in data[:2]:
        whole(*views)
    if how == "deepcopy":
        resumed = copy.deepcopy(whole)
    else:
        state = whole.state_dict()
        if how == "save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        resumed = ClusterNSLoss(12, 6, start_cosine=1.0, centroid_update=update)
        resumed.load_state_dict({k: v.clone() for k, v in state.items()}, assign=how == "assign")
    assert resumed.clustering_active
    for views in data[2:]:
        assert_close_to_truth(resumed(*views), whole(*views), condition=24)
    for name, value in whole.state_dict().items():
        assert_close_to_truth(resumed.state_dict()[name].float(), value.float(), condition=24, what=name)


def test_loading_a_started_state_into_a_used_loss():
    """The host's idea of `initialized` follows the buffer, however it was written."""
    fresh = ClusterNSLoss(12, 6)
    fresh(*(torch.ones(8, 12) for _ in range(2)))
    assert not fresh.clustering_active
    fresh.load_state_dict(started().state_dict())
    assert fresh.clustering_active
    fresh.initialized.fill_(False)
    assert not fresh.clustering_active
    fresh.initialized = torch.tensor(True)
    assert fresh.clustering_active


def test_double_state_keeps_its_precision():
    double = started(dtype=torch.float64)
    assert double.centroids.dtype == torch.float64
    restored = ClusterNSLoss(12, 6)
    restored.load_state_dict(double.state_dict())
    assert torch.equal(restored.centroids, double.centroids)


@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16()]
)
def test_centroids_stay_float32(convert):
    """At γ = 1e-4 the decay would round away in half precision."""
    loss_fn = started(centroid_momentum=1e-4)
    before = loss_fn.centroids.clone()
    convert(loss_fn)
    assert loss_fn.centroids.dtype == torch.float32
    assert torch.equal(loss_fn.centroids, before)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(*(z.bfloat16() for z in batches(1)[0]))
    assert loss.dtype == torch.float32
    assert loss_fn.centroids.dtype == torch.float32
    assert not torch.equal(loss_fn.centroids, before)


def test_no_clusters_is_plain_info_nce():
    loss_fn = ClusterNSLoss(12, 0, hard_negatives=False, start_cosine=1.0)
    for views in batches(2):
        assert_close_to_truth(loss_fn(*views), clusterns.info_nce(*views), condition=24)
    assert not loss_fn.clustering_active
    assert loss_fn.centroids.shape == (0, 12)


def test_one_cluster_without_hard_negatives():
    loss_fn = ClusterNSLoss(12, 1, hard_negatives=False, start_cosine=1.0, bml_weight=0.5)
    (views, again) = batches(2)
    loss_fn(*views)
    loss = loss_fn(*again)
    assert loss_fn.last["with_mates"] == 1
    assert_close_to_truth(loss, loss_fn.last["info_nce"] + 0.5 * loss_fn.last["bml"], condition=24)


def test_user_negatives_reach_the_loss_and_get_gradient():
    loss_fn = started()
    (anchors, positives), (negatives, _) = batches(2)
    with_negatives = copy.deepcopy(loss_fn)(anchors, positives, negatives)
    with_negatives.backward()
    assert negatives.grad.abs().sum() > 0
    assert with_negatives > loss_fn(anchors, positives)


def test_learnable_temperature():
    temperature = torch.nn.Parameter(torch.tensor(0.07))
    loss_fn = ClusterNSLoss(12, 6, temperature=temperature, start_cosine=1.0)
    assert [name for name, _ in loss_fn.named_parameters()] == ["temperature"]
    for views in batches(2):
        loss_fn.zero_grad()
        loss_fn(*views).backward()
    assert temperature.grad.abs() > 0


def test_active_step_never_asks_the_device():
    """On the meta device every read of a value raises, so what passes here cannot wait for a GPU."""
    for update in UPDATES:
        loss_fn = started(centroid_update=update, hard_negative_weight=0.5).to("meta")
        views = [z.detach().to("meta").requires_grad_() for z in batches(1)[0]]
        loss = loss_fn(*views)
        loss.backward()
        assert views[0].grad.shape == (40, 12)
        assert loss_fn.centroids.device.type == "meta"
    with pytest.raises(RuntimeError):  # the check can fail: before the start the rule does read a value
        ClusterNSLoss(12, 6).to("meta")(*views)


def test_repr_names_the_settings():
    text = repr(ClusterNSLoss(12, 6, centroid_update="mean"))
    assert "embedding_dim=12, num_clusters=6" in text
    assert "centroid_update='mean'" in text
