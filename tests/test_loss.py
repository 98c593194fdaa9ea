"""The module: when clustering starts, what it keeps, what survives, what it warns of."""

from __future__ import annotations

import copy
import io
import re
import warnings
from functools import partial

import pytest
import torch
from compare import assert_close_to_truth
from conftest import embeddings

import clusterns
from clusterns import CachedClusterNSLoss, ClusterNSLoss, reference

UPDATES = ["sum", "mean", "replace", "adamw"]
views = partial(embeddings, dim=12, dtype=torch.float32)
plain = partial(ClusterNSLoss, 12, 0)


def started(num_clusters=6, dtype=torch.float32, **arguments):
    """A loss whose clustering is active, seeded from one batch."""
    loss_fn = ClusterNSLoss(12, num_clusters, start_cosine=1.0, **arguments)
    loss_fn(*views(40, dtype=dtype, seed=99))
    assert loss_fn.clustering_active
    return loss_fn


def test_start_rule():
    """Plain InfoNCE until the mean cosine falls to σ, on that step too, then clustering for good."""
    close = torch.ones(20, 12) + 0.1 * torch.randn(20, 12)
    loss_fn, never = ClusterNSLoss(12, 4, start_cosine=0.5), plain(start_cosine=1.0)
    for pair, active_after in (((close, close), False), (views(20, groups=20), True)):
        expected = clusterns.info_nce(*pair)
        assert_close_to_truth(loss_fn(*pair), expected, condition=24)
        assert_close_to_truth(never(*pair), expected, condition=24)
        assert loss_fn.clustering_active == active_after == bool(loss_fn.initialized)
        assert "nearest_cosine" not in loss_fn.last
    assert not never.clustering_active
    loss = loss_fn(close, close)
    assert loss_fn.clustering_active
    assert loss > clusterns.info_nce(close, close)  # hard negatives now stand in the denominator


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_follow_the_reference(update, dtype):
    """Centroids move, are assigned to, and the loss is that of the moved ones and the mined negatives."""
    loss_fn = started(centroid_update=update, centroid_momentum=0.05, dtype=dtype)
    expected = loss_fn.centroids.double().clone()
    first = second = 0.0
    for step in range(1, 5):
        anchors, positives = views(40, dtype=dtype, seed=step)
        negatives = views(7, dtype=dtype, seed=step + 50)[0]
        points = anchors.detach().double()
        near, _ = reference.nearest_and_runner_up(points, expected)
        if update == "adamw":
            # The authors' optimiser, with its eps before the bias correction, which matters at this size.
            parameter = expected.clone().requires_grad_()
            (grad,) = torch.autograd.grad((parameter[near] - points).square().mean(), parameter)
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            size = 0.05 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            expected = expected - size * first / (second.sqrt() + 1e-6)
        else:
            momentum = 1.0 if update == "replace" else 0.05
            expected = reference.update_centroids(expected, points, near, momentum, update)
        loss = loss_fn(anchors, positives, negatives)
        # AdamW divides by the root of a second moment, which is near 0 at first.
        assert_close_to_truth(loss_fn.centroids, expected, condition=40)
        assert loss_fn.centroids.dtype == loss.dtype == dtype
        wide, centroids = [z.double() for z in (anchors, positives, negatives)], loss_fn.centroids.double()
        settings = {"false_negatives": "bml", "bml_weight": 1e-4, "backend": "reference"}
        truth = clusterns.info_nce(*wide[:2], negatives=wide[2], centroids=centroids, **settings)
        assert_close_to_truth(loss, truth, condition=24)

    found = clusterns.nearest_centroids(wide[0], centroids)
    matrix = clusterns.cosine_similarity_matrix(*wide[:2]).detach()
    truths = {"loss": truth, "mean_cosine": matrix.mean(), "positive_cosine": matrix.diagonal().mean()}
    truths |= {"nearest_cosine": found.nearest_cosine.mean()}
    truths |= {"hard_negative_cosine": found.runner_up_cosine.mean()}
    truths |= {"with_mates": (found.nearest.bincount()[found.nearest] > 1).double().mean()}
    assert loss_fn.last.keys() == truths.keys() | {"info_nce", "bml"}
    assert all(value.ndim == 0 and not value.requires_grad for value in loss_fn.last.values())
    for name, value in truths.items():
        assert_close_to_truth(loss_fn.last[name], value, condition=24, what=name)


# --- warnings ----------------------------------------------------------------------------------------------


def warned(make, *batches):
    """What each call of the loss warns of, in turn, at this line."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_fn = make()
        for batch in batches:
            loss_fn(*batch)
            texts.append("".join(str(warning.message) for warning in caught))
            assert all(warning.filename == __file__ for warning in caught)
            caught.clear()
    return texts


ONE, FEW, MANY = views(1), views(8), views(64)
X = FEW[0].detach()
ALMOST = torch.cat([X[:1] + 0.1 * FEW[1][:1], X[1:]])  # one row differs
ALONE = "a batch of one has no negatives, its loss is always 0; .* drop_last=True"
SMALL = "clustering waits: a batch of 8 cannot seed num_clusters=64"
ALIKE = "the two views of every sentence are the same.* no dropout .*hidden_dropout_prob=0.1.*give pairs"
two = partial(ClusterNSLoss, 12, 2)
WARNED = {
    "one row": (plain, [FEW, ONE, ONE], ["", ALONE, ""]),
    "one row and a mined one": (plain, [(*ONE, X)], [""]),
    "one row and centroids": (started, [ONE], [""]),
    "one row and no centroids": (lambda: started(hard_negatives=False), [ONE], [ALONE]),
    "small": (partial(ClusterNSLoss, 12, 64, start_cosine=1.0), [FEW, FEW, MANY, FEW], [SMALL, "", "", ""]),
    "alike later": (two, [FEW, (X, X)], ["", ""]),
    "alike, cached": (partial(CachedClusterNSLoss, 12, 2), [(torch.nn.Linear(12, 12), X, X)], [ALIKE]),
}
for dtype in (torch.float64, torch.bfloat16):
    same, almost = [(X.to(dtype), other.to(dtype)) for other in (2 * X, ALMOST)]
    WARNED[f"alike, {dtype}"] = (two, [same, same], [ALIKE, ""])
    WARNED[f"almost alike, {dtype}"] = (two, [almost], [""])


@pytest.mark.parametrize("case", WARNED)
def test_warnings(case):
    make, batches, expected = WARNED[case]
    for text, line in zip(warned(make, *batches), expected, strict=True):
        assert re.fullmatch(line and f"{line}.*", text)


def test_steps_without_gradient_are_told():
    with torch.no_grad():
        told, later = warned(two, FEW, FEW)
    assert re.match(r"training: a step without gradient moves the centroids .*\.eval\(\)", told)
    assert later == ""


def test_temperatures_that_are_meant_otherwise():
    for temperature in (20, torch.nn.Parameter(torch.tensor(20.0))):
        with pytest.warns(UserWarning, match="temperature: 20 looks like the scale .* temperature=0.05$"):
            CachedClusterNSLoss(12, 2, temperature=temperature)
    with pytest.warns(UserWarning, match="temperature: .* becomes a buffer, .* pass torch.nn.Parameter"):
        two(temperature=torch.tensor(0.05, requires_grad=True))


def test_ranks_that_share_nothing_are_told(monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    words = "each of the 2 ranks sees its own rows only; to share one batch pass "
    assert warned(two, FEW, FEW) == [words + ClusterNSLoss.lone_ranks_cure, ""]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)  # the first one says it for all
    assert warned(two, FEW) == [""]


# --- what the centroids survive ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("update", ["mean", "adamw"])
def test_non_finite_rows_do_not_poison_the_centroids(bad, update):
    clean, dirty = started(centroid_update=update), started(centroid_update=update)
    dirty.load_state_dict(clean.state_dict())
    anchors, positives = (z.detach() for z in views(40))
    spoiled = anchors.clone()
    spoiled[3, 2] = bad
    assert not dirty(spoiled, positives).isfinite()  # mixed precision must see it and skip the step
    rest = torch.arange(40) != 3
    clean(anchors[rest], positives[rest])
    assert dirty.centroids.isfinite().all()
    assert_close_to_truth(dirty.centroids, clean.centroids, condition=24)
    fresh = two(start_cosine=1.0)
    fresh(spoiled, positives)
    assert not fresh.clustering_active  # and nothing is seeded from such a batch


def test_evaluation_mode_changes_nothing():
    loss_fn, fresh = started().eval(), two(start_cosine=1.0).eval()
    before = copy.deepcopy(loss_fn.state_dict())
    assert warned(lambda: loss_fn, ONE, (X, X)) == ["", ""]
    fresh(*FEW)
    assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())
    assert not fresh.clustering_active


@pytest.mark.parametrize(("update", "assign"), [*((update, False) for update in UPDATES), ("adamw", True)])
def test_a_run_goes_on_as_if_never_interrupted(update, assign):
    whole = started(centroid_update=update)
    whole(*views(40, seed=0))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = ClusterNSLoss(12, 6, centroid_update=update)
    resumed.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert resumed.clustering_active
    for seed in (1, 2):
        batch = views(40, seed=seed)
        assert_close_to_truth(resumed(*batch), whole(*batch), condition=24)
    for name, value in whole.state_dict().items():
        assert_close_to_truth(resumed.state_dict()[name].float(), value.float(), condition=24, what=name)


def test_loading_a_started_state_into_a_used_loss():
    """The host's idea of `initialized` follows the buffer, however it was written; float64 stays float64."""
    fresh, double = ClusterNSLoss(12, 6, start_cosine=-1.0), started(dtype=torch.float64)
    fresh(*FEW)
    fresh.load_state_dict(double.state_dict())
    assert fresh.clustering_active
    assert fresh.centroids.dtype == torch.float64
    fresh.initialized.fill_(False)
    assert not fresh.clustering_active


def test_centroids_stay_float32():
    """At γ = 1e-4 the decay would round away in half precision."""
    loss_fn = started(centroid_momentum=1e-4)
    before = loss_fn.centroids.clone()
    loss_fn.bfloat16()
    assert loss_fn.centroids.dtype == torch.float32
    assert torch.equal(loss_fn.centroids, before)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(*(z.bfloat16() for z in MANY))
    assert loss.dtype == loss_fn.centroids.dtype == torch.float32
    assert not torch.equal(loss_fn.centroids, before)


def test_active_step_never_asks_the_device():
    """On the meta device every read of a value raises, so what passes here cannot wait for a GPU."""
    batch = [z.detach().to("meta").requires_grad_() for z in MANY]
    for update in UPDATES:
        loss_fn = started(centroid_update=update, hard_negative_weight=0.5).to("meta")
        loss_fn(*batch).backward()
        assert batch[0].grad.shape == (64, 12)
        assert loss_fn.centroids.device.type == "meta"
    with pytest.raises(RuntimeError):  # the check can fail: before the start the rule does read a value
        two().to("meta")(*batch)


def test_the_first_pick_leaves_the_dropout_masks_alone():
    loss_fn, pair = ClusterNSLoss(12, 6, start_cosine=1.0), views(40)
    before = torch.get_rng_state()
    loss_fn(*pair)
    assert loss_fn.clustering_active
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("clusters", [0, 6])
def test_dimensions_are_told_apart(backend, clusters):
    """The second InfoNCE is the formula's, in value and gradient, whatever the first one is."""
    make = partial(started if clusters else ClusterNSLoss, *([clusters] if clusters else [12, 0]))
    without = make(backend=backend).eval()
    with_it = make(backend=backend, dimension_weight=0.5, dimension_temperature=0.3).eval()
    with_it.load_state_dict(without.state_dict())
    pair = [view.requires_grad_() for view in views(40)]
    wide = [view.detach().double().requires_grad_() for view in pair]
    expected = reference.dimension_info_nce(*wide, 0.3)
    across = with_it(*pair) - without(*pair)
    assert_close_to_truth(across, 0.5 * expected, condition=100)
    assert_close_to_truth(with_it.last["dimensions"], expected, condition=24)
    assert with_it.last["loss"] > with_it.last["info_nce"]
    for found, true in zip(
        torch.autograd.grad(across, pair), torch.autograd.grad(0.5 * expected, wide), strict=True
    ):
        assert (found - true).norm() < 1e-4 * true.norm()


def test_dimensions_in_parts_and_with_ranks():
    pair = views(40)
    whole = plain(dimension_weight=2.0)
    parts = CachedClusterNSLoss(12, 0, mini_batch_size=7, dimension_weight=2.0)
    inputs = [view.detach() for view in pair]
    assert_close_to_truth(parts(lambda x: x, *inputs), whole(*pair).detach(), condition=100)
    with pytest.raises(ValueError, match="dimension_weight: expected 0 with a process_group, got 2"):
        plain(dimension_weight=2.0, process_group=object())(*pair)
    with pytest.raises(ValueError, match="dimension_weight"):
        plain(dimension_weight=-1.0)
