"""k-means against a plain float64 oracle, and everything that a corpus or scikit-learn may bring along."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import normalized_mutual_info_score
from sklearn.utils.estimator_checks import check_estimator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clusterns import SphericalKMeans, functional, fused, kmeans_seeding, kmeans_steps
from clusterns.kmeans_steps import Clusters, Rows, assign, lloyd

CPU = torch.device("cpu")


def blobs(rows=200, dim=17, groups=5, *, seed=0, spread=0.7, dtype=np.float64):
    """Points of any length around directions of their own."""
    random = np.random.default_rng(seed)
    centers = random.standard_normal((groups, dim))
    points = centers[random.integers(groups, size=rows)] + spread * random.standard_normal((rows, dim))
    return (points * random.uniform(0.1, 5, (rows, 1))).astype(dtype)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-8)


def oracle(x, centers, max_iter, weight=None):
    """Spherical Lloyd, one formula a line, until no label changes; empty clusters are not expected."""
    x, c, labels, iterations = unit(x), unit(centers), None, 0
    weight = np.ones(len(x)) if weight is None else weight
    for _ in range(max_iter):
        iterations += 1
        before, labels = labels, (x @ c.T).argmax(axis=1)
        members = (labels == np.arange(len(c))[:, None]) * weight
        assert (members.sum(axis=1) > 0).all()
        c = unit(members @ x)
        if before is not None and (before == labels).all():
            break
    cosines = x @ c.T
    return c, cosines.argmax(axis=1), ((1 - cosines.max(axis=1)) * weight).sum(), iterations


def rows_of(x, weight=None):
    x = torch.as_tensor(x)
    weight = None if weight is None else torch.as_tensor(weight)
    return Rows(x, weight, x.dtype, CPU)


# --- the method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "dim", "clusters"), [(200, 17, 5), (60, 1, 2), (9, 4, 9), (50, 3, 1), (300, 2, 7), (1, 1, 1)]
)
def test_agrees_with_the_oracle(rows, dim, clusters):
    x = blobs(rows, dim, clusters, seed=3)
    start = x[np.sort(np.random.default_rng(0).choice(rows, clusters, replace=False))]
    if dim == 1:
        start = np.array([[-2.0], [3.0]])[:clusters] * np.sign(x[0])
    for max_iter in (1, 3, 100):
        c, labels, inertia, iterations = oracle(x, start, max_iter)
        found = SphericalKMeans(clusters, init=start, max_iter=max_iter, tol=0).fit(x)
        assert_array_equal(found.labels_, labels)
        assert_allclose(found.cluster_centers_, c, atol=1e-12)
        assert_allclose(found.inertia_, inertia, atol=1e-12 * rows)
        assert found.n_iter_ == iterations
        assert found.labels_.dtype == np.int64


LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "rows of more": lambda x: np.repeat(x, 2, axis=0)[::2],
    "columns of more": lambda x: np.repeat(x, 3, axis=1)[:, ::3],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": lambda x: np.frombuffer(x.tobytes(), dtype=x.dtype).reshape(x.shape),
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, recwarn):
    x = blobs(120, 7, 4)
    expected = SphericalKMeans(4, init=x[:4]).fit(x)
    found = SphericalKMeans(4, init=x[:4]).fit(LAYOUTS[layout](x))
    assert_array_equal(found.labels_, expected.labels_)
    assert_allclose(found.cluster_centers_, expected.cluster_centers_, atol=1e-12)
    assert not recwarn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_come_back_as_tensors(dtype):
    x = torch.from_numpy(blobs(300, 33, 6)).to(dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    c, labels, inertia, _ = oracle(x.double().numpy(), x[:6].double().numpy(), 100)
    found = SphericalKMeans(6, init=x[:6], tol=0).fit(x.requires_grad_())
    for tensor, wanted in (
        (found.cluster_centers_, computed),
        (found.labels_, torch.int64),
        (found.predict(x), torch.int64),
        (found.transform(x), computed),
    ):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == wanted
        assert not tensor.requires_grad
    assert_array_equal(found.labels_, labels)
    assert_allclose(found.cluster_centers_, c, atol=1e-6)
    assert found.inertia_ == pytest.approx(inertia, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # which must not round the products
        again = clone(found).fit(x)
    assert torch.equal(again.cluster_centers_, found.cluster_centers_)


def test_half_precision_arrays_are_not_widened_to_float64():
    found = SphericalKMeans(3, random_state=0).fit(blobs(dtype=np.float16))
    assert found.cluster_centers_.dtype == np.float32
    assert isinstance(found.cluster_centers_, np.ndarray)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    dim=st.integers(1, 20),
    data=st.data(),
    duplicates=st.booleans(),
    zeros=st.booleans(),
    weighted=st.booleans(),
    many=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 999),
)
def test_properties(rows, dim, data, duplicates, zeros, weighted, many, seed):
    """Inertia never rises; labels are the nearest centres, centres unit vectors, sums those of the labels."""
    random = np.random.default_rng(seed)
    x = blobs(rows, dim, 4, seed=seed)
    if duplicates:
        x = x[random.integers(max(1, rows // 3), size=rows)]
    if zeros:
        x[1:][random.random(rows - 1) < 0.3] = 0
    weight = random.integers(0, 4, rows).astype(float) if weighted else np.ones(rows)
    weight[0] = 1
    clusters = data.draw(st.integers(1, rows))
    inertias: list[float] = []
    every = rows_of(x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans_steps, "_MANY", many)
        state, _ = lloyd(every, every.units(torch.zeros(clusters).long()), 30, 0.0, inertias.append)
        assert max(np.diff(inertias), default=0) <= 1e-9 * weight.sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = SphericalKMeans(clusters, random_state=seed).fit(x, sample_weight=weight)
    assert_allclose(torch.linalg.vector_norm(state.centers, dim=1), 1)
    cosines = unit(x) @ found.cluster_centers_.T
    assert_allclose(np.linalg.norm(found.cluster_centers_, axis=1), 1)
    assert_allclose(cosines[np.arange(rows), found.labels_], cosines.max(axis=1), atol=1e-12)
    assert_allclose(found.inertia_, ((1 - cosines.max(axis=1)) * weight).sum(), atol=1e-9)
    assert_array_equal(found.labels_, found.predict(x))
    assert_allclose(found.transform(x), 1 - cosines, atol=1e-12)
    assert found.score(x, sample_weight=weight) == -found.inertia_


def test_ties_and_zero_rows_take_the_lowest_id():
    x = np.array([[0.0, 0.0], [1e-9, -1e-9], [1.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    model = SphericalKMeans(3, init=[[0, 1], [1, 0], [1, 0]], max_iter=1).fit(x)
    model.cluster_centers_ = np.array([[0, 1], [1, 0], [1, 0]])
    assert_array_equal(model.predict(x), [0, 0, 0, 0, 1])
    assert_allclose(model.transform(x)[:2], 1)
    later = assign(rows_of(x), torch.eye(2).double(), torch.tensor([1, 1, 1, 0, 0]))
    assert later.labels.tolist() == [1, 1, 1, 1, 0]  # what is no nearer takes nothing away
    assert (later.moved.tolist(), later.before.tolist()) == ([3], [0])


def test_zero_rows_pull_on_no_center():
    x = blobs(80, 5, 3)
    padded = np.concatenate([np.zeros((20, 5)), x])
    alone, beside = (SphericalKMeans(3, init=x[:3]).fit(z) for z in (x, padded))
    assert_allclose(beside.cluster_centers_, alone.cluster_centers_)
    assert beside.inertia_ == pytest.approx(alone.inertia_ + 20)
    assert (beside.labels_[:20] == 0).all()


def test_a_cluster_whose_sum_vanishes_keeps_its_center():
    found = SphericalKMeans(1, init=[[0.6, 0.8]]).fit([[1.0, 2.0], [-1.0, -2.0]])
    assert_allclose(found.cluster_centers_, [[0.6, 0.8]])
    assert found.inertia_ == 2


def test_moving_rows_is_summing_afresh(monkeypatch):
    x = blobs(500, 9, 6, dtype=np.float32)
    found = []
    for many, refresh in ((0.0, 1), (2.0, 10**6)):
        monkeypatch.setattr(kmeans_steps, "_MANY", many)
        monkeypatch.setattr(kmeans_steps, "_REFRESH", refresh)
        monkeypatch.setattr(kmeans_steps, "_SUMMED_ROWS", 2 if many else 10**6)
        rows = rows_of(x)
        state, iterations = lloyd(rows, rows.units(torch.arange(6)), 100, 0.0)
        assert iterations > 5
        found.append(state)
    assert torch.equal(found[0].members, found[1].members)
    assert_allclose(found[1].sums, found[0].sums, atol=1e-4)
    assert_allclose(found[1].centers, found[0].centers, atol=1e-6)


def test_tol_ends_a_run():
    x = blobs(2000, 8, 12, spread=1.5)
    runs = [SphericalKMeans(12, init=x[:12], tol=tol, max_iter=300).fit(x) for tol in (0, 1e-3, 0.5)]
    assert runs[0].n_iter_ > runs[1].n_iter_ > runs[2].n_iter_ == 2
    assert runs[0].inertia_ < runs[1].inertia_ < runs[2].inertia_


# --- empty clusters, duplicates, seeding -------------------------------------------------------------------


def test_an_empty_cluster_takes_the_farthest_point():
    angles = np.radians([0, 2, 4, 30, 90, 93])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    start = unit([[1, 0], [1, 0], [0, 1]])  # the second gets nothing
    rows = rows_of(x)
    state, assigned = Clusters(torch.from_numpy(start)), assign(rows, torch.from_numpy(start))
    state.add(rows, assigned.labels)
    assert state.members.tolist() == [4, 0, 2]
    assert state.refill(rows, assigned)
    assert assigned.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert state.members.tolist() == [3, 1, 2]
    assert_allclose(state.sums, [x[:3].sum(axis=0), x[3], x[4:].sum(axis=0)])
    assert_array_equal(SphericalKMeans(3, init=start).fit(x).labels_, [0, 0, 0, 1, 2, 2])


def test_refilling_leaves_alone_what_would_not_help():
    """Not the only member of a cluster, not a point equal to one just taken, not one without a weight."""
    x = np.array([[1.0, 0], [1, 0.01], [0.7, 0.7], [1.4, 1.4], [0, 1], [0, 1], [-1, 0.2], [-1, -0.1], [0, 0]])
    weight = np.array([1.0, 1, 1, 1, 1, 1, 1, 0, 1])
    rows = rows_of(x, weight)
    state = Clusters(torch.tensor([[1.0, 0], [0, -1], [0, -1], [0, 1], [-1, 0]]).double())
    assigned = assign(rows, state.centers)
    state.add(rows, assigned.labels)
    assert state.members.tolist() == [4, 0, 0, 2, 1]
    assert state.refill(rows, assigned)
    assert assigned.labels.tolist() == [0, 2, 1, 0, 3, 3, 4, 4, 0]


def test_fewer_distinct_points_than_clusters():
    x = np.repeat(blobs(3, 4, 3), 5, axis=0)
    for init in ("k-means++", "random"):
        with pytest.warns(
            ConvergenceWarning, match=r"distinct clusters \(3\) found smaller than n_clusters \(6\)"
        ):
            found = SphericalKMeans(6, init=init, random_state=0).fit(x)
        assert found.inertia_ == pytest.approx(0, abs=1e-12)
        assert_allclose(np.linalg.norm(found.cluster_centers_, axis=1), 1)


def test_seeding_picks_one_of_each_group():
    x = blobs(3000, 30, 12, spread=0.05)
    groups = SphericalKMeans(12, random_state=0).fit(x).labels_
    for seed in range(5):
        chosen = kmeans_seeding.k_means_plus_plus(rows_of(x), 12, np.random.RandomState(seed))
        assert len(set(groups[chosen])) == 12


def test_seeding_draws_by_weight_and_distance():
    chance = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    places = np.append(np.random.default_rng(0).random(20000), [0.0, 1 - 1e-17])
    drawn = kmeans_seeding._draw(chance, places, torch.ones(6))
    assert_allclose(torch.bincount(drawn, minlength=6) / 20002, chance, atol=0.02)
    assert set(drawn.tolist()) == {1, 3, 4}
    assert set(kmeans_seeding._draw(0 * chance, places, chance).tolist()) == {1, 3, 4}


def test_seeding_on_some_of_the_points():
    x = blobs(20_000, 6, 4, spread=0.2, dtype=np.float32)
    whole, some = (SphericalKMeans(4, init_size=size, random_state=0).fit(x) for size in (20_000, 50))
    assert some.inertia_ == pytest.approx(whole.inertia_, rel=1e-3)


def test_more_runs_are_no_worse():
    x = blobs(400, 3, 15, spread=0.5)
    once, often = (SphericalKMeans(15, init="random", n_init=n, random_state=0).fit(x) for n in (1, 8))
    assert often.inertia_ < once.inertia_
    assert_array_equal(often.labels_, often.predict(x))


# --- much data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_bits_every_time(batch_size, weighted):
    x = blobs(2000, 24, 10, spread=1.5, dtype=np.float32)
    weight = np.random.default_rng(0).random(2000) if weighted else None
    models = [
        SphericalKMeans(10, batch_size=batch_size, max_iter=10, random_state=seed).fit(
            x, sample_weight=weight
        )
        for seed in (3, 3, 4)
    ]
    assert models[0].cluster_centers_.tobytes() == models[1].cluster_centers_.tobytes()
    assert models[0].labels_.tobytes() == models[1].labels_.tobytes()
    assert models[0].inertia_ == models[1].inertia_
    assert models[0].cluster_centers_.tobytes() != models[2].cluster_centers_.tobytes()


@pytest.mark.parametrize("batch_size", [None, 500])
def test_memory_map(tmp_path, batch_size):
    x = blobs(3000, 16, 8, dtype=np.float32)
    np.save(tmp_path / "points.npy", x)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    one, other = (SphericalKMeans(8, batch_size=batch_size, random_state=0).fit(z) for z in (x, mapped))
    assert one.cluster_centers_.tobytes() == other.cluster_centers_.tobytes()
    assert_array_equal(one.labels_, other.predict(mapped))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("layout", ["C", "Fortran"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_memory_stays_within_the_workspace(monkeypatch, layout, dtype):
    """Nothing of the size of the points (n×D) or of all cosines (n×K) is ever made."""
    rows, dim, clusters = 5000, 64, 50
    x = LAYOUTS[layout](blobs(rows, dim, clusters, dtype=dtype))
    workspace = 100_000
    monkeypatch.setattr(kmeans_steps, "WORKSPACE_BYTES", workspace)
    with LargestTensor() as largest:
        model = SphericalKMeans(clusters, init=x[:clusters], max_iter=5).fit(x)
        model.predict(x)
        SphericalKMeans(clusters, init_size=200, batch_size=200, max_iter=1, random_state=0).fit(x)
    per_row = 8 * rows
    assert per_row <= largest.bytes <= max(workspace, per_row) < 4 * rows * clusters < 4 * rows * dim


def test_small_chunks_change_nothing(monkeypatch):
    x = blobs(700, 12, 9)
    whole = SphericalKMeans(9, random_state=0).fit(x)
    monkeypatch.setattr(kmeans_steps, "WORKSPACE_BYTES", 1500)
    chunks = SphericalKMeans(9, random_state=0).fit(x)
    assert_array_equal(chunks.labels_, whole.labels_)
    assert_allclose(chunks.cluster_centers_, whole.cluster_centers_, atol=1e-12)


def test_mini_batches_come_close():
    x = blobs(4000, 12, 10, spread=0.8, dtype=np.float32)
    lloyds = SphericalKMeans(10, random_state=0).fit(x)
    batches = SphericalKMeans(10, batch_size=200, random_state=0).fit(x)
    assert batches.inertia_ < 1.02 * lloyds.inertia_
    assert_array_equal(batches.labels_, batches.predict(x))


def test_partial_fit_is_the_direction_of_all_that_came():
    batches = [blobs(100, 6, 4, seed=seed)[:, :6] for seed in (5, 5, 5)]
    batches = [
        batch[order]
        for batch, order in zip(batches, ([*range(100)], [*range(60)], [*range(30, 100)]), strict=True)
    ]
    model = SphericalKMeans(4, init=batches[0][:4])
    c, sums = unit(batches[0][:4]), np.zeros((4, 6))
    for calls, batch in enumerate(batches, start=1):
        assert model.partial_fit(batch) is model
        labels = (unit(batch) @ c.T).argmax(axis=1)
        for label, row in zip(labels, unit(batch), strict=True):
            sums[label] += row
        c = unit(sums)
        assert_allclose(model.cluster_centers_, c, atol=1e-12)
        assert_array_equal(model.labels_, (unit(batch) @ c.T).argmax(axis=1))
        assert model.inertia_ == pytest.approx((1 - (unit(batch) @ c.T).max(axis=1)).sum())
        assert model.n_iter_ == calls


def test_partial_fit_seeds_refills_and_goes_on():
    x = blobs(600, 8, 5, spread=0.2)
    with pytest.raises(ValueError, match="n_clusters: expected at most n_samples=4, got 5"):
        SphericalKMeans(5).partial_fit(x[:4])
    streamed = SphericalKMeans(5, random_state=0)
    for start in range(0, 600, 100):
        streamed.partial_fit(x[start : start + 100])
    whole = SphericalKMeans(5, random_state=0).fit(x)
    assert_allclose((streamed.cluster_centers_ @ whole.cluster_centers_.T).max(axis=1), 1, atol=0.01)
    centers = whole.cluster_centers_.copy()
    whole.partial_fit(x[:1].astype(np.float32))  # fewer rows than clusters, another dtype
    assert_allclose(whole.cluster_centers_, centers, atol=0.01)
    assert (whole.cluster_centers_ != centers).any()
    empty = SphericalKMeans(2, init=[[1.0, 0], [-1, 0]]).partial_fit([[1.0, 0.1], [1, 0.2], [1, 0.6]])
    assert_array_equal(empty.labels_, [0, 0, 1])


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 10**6])
def test_a_weight_is_a_repetition(batch_size):
    x = blobs(150, 6, 4)
    weight = np.random.default_rng(1).integers(0, 4, 150)
    weight[:4] = 1
    arguments = {
        "n_clusters": 4,
        "init": x[:4],
        "batch_size": batch_size,
        "max_iter": 1 if batch_size else 100,
    }
    weighted = SphericalKMeans(**arguments).fit(x, sample_weight=weight)
    repeated = SphericalKMeans(**arguments).fit(np.repeat(x, weight, axis=0))
    assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, atol=1e-12)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_)
    as_tensor = SphericalKMeans(**arguments).fit(torch.from_numpy(x), sample_weight=torch.from_numpy(weight))
    assert_array_equal(as_tensor.labels_, weighted.labels_)
    unweighted = SphericalKMeans(**arguments).fit(x)
    assert abs(unweighted.cluster_centers_ - weighted.cluster_centers_).max() > 1e-3
    assert_allclose(clone(unweighted).fit(x, sample_weight=3).cluster_centers_, unweighted.cluster_centers_)


def test_seeds_have_a_weight():
    x, weight = blobs(300, 4, 6), np.zeros(300)
    weight[::50] = 1
    for init in ("k-means++", "random"):
        found = SphericalKMeans(6, init=init, random_state=0).fit(x, sample_weight=weight)
        assert found.inertia_ == pytest.approx(0, abs=1e-9)


# --- bad input ---------------------------------------------------------------------------------------------


X = blobs(20, 3, 2)
NAN, INFINITE = (np.where(np.arange(60).reshape(20, 3) == 22, value, X) for value in (np.nan, np.inf))


@pytest.mark.parametrize(
    ("arguments", "x", "message"),
    [
        ({"n_clusters": 0}, X, "n_clusters: expected at least 1, got 0"),
        ({"n_clusters": 2.0}, X, "n_clusters: expected an integer, got float 2.0"),
        ({"n_clusters": 21}, X, "n_clusters: expected at most n_samples=20, got 21"),
        ({"n_init": 0}, X, "n_init: expected at least 1, got 0"),
        ({"n_init": "often"}, X, "n_init: expected one of 'auto', got 'often'"),
        ({"max_iter": 0}, X, "max_iter: expected at least 1, got 0"),
        ({"tol": -1}, X, "tol: expected a finite number at least 0, got -1"),
        ({"batch_size": 0}, X, "batch_size: expected at least 1, got 0"),
        ({"init_size": True}, X, "init_size: expected an integer, got bool True"),
        ({"init": "best"}, X, r"init: expected one of 'k-means\+\+', 'random', got 'best'"),
        ({"init": X[:3]}, X, r"init: expected .* centres of shape \(2, 3\), got shape \(3, 3\)"),
        ({"init": max}, X, r"init: expected .* centres of shape \(2, 3\), got <built-in function max>"),
        ({"init": 0 * X[:2]}, X, "init: expected finite centres that are not zero, got others"),
        ({}, NAN, "X: expected finite values, got NaN or inf in row 7"),
        ({}, INFINITE, "X: expected finite values, got NaN or inf in row 7"),
        ({}, torch.from_numpy(NAN), "X: expected finite values, got NaN or inf in row 7"),
        (
            {},
            (3e38 * X / abs(X).max()).astype(np.float32),
            "X: expected rows whose norm fits float32, got a larger",
        ),
        ({}, 0 * X, "X: expected a row that is not zero and has a weight above 0, got none"),
        ({}, torch.ones(4), r"X: expected 2 dimensions \(rows, dim\), got shape \(4,\)"),
        ({}, torch.ones(4, 3).long(), "X: expected float16, bfloat16, float32 or float64, got torch.int64"),
    ],
)
def test_bad_input(arguments, x, message):
    model = SphericalKMeans(**{"n_clusters": 2, **arguments})
    for method in (model.fit, model.partial_fit):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            method(x)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(19), r"expected shape \(20,\), got \(19,\)"),
        (np.ones((20, 1)), r"expected shape \(20,\), got \(20, 1\)"),
        (-np.ones(20), "expected finite numbers of at least 0, got others"),
        (np.full(20, np.nan), "expected finite numbers of at least 0, got others"),
    ],
)
def test_bad_weights(weight, message):
    with pytest.raises(ValueError, match=f"sample_weight: {message}"):
        SphericalKMeans(2).fit(X, sample_weight=weight)
    with pytest.raises(ValueError, match="a weight above 0, got none"):
        SphericalKMeans(2).fit(X, sample_weight=np.zeros(20))


def test_prediction_wants_what_was_fitted():
    with pytest.raises(NotFittedError):
        SphericalKMeans().predict(X)
    model = SphericalKMeans(2).fit(torch.from_numpy(X))
    for method in (model.predict, model.transform, model.score, model.partial_fit):
        with pytest.raises(ValueError, match="X: expected 3 features, got 2"):
            method(torch.ones(4, 2))
        with pytest.raises(ValueError, match="X has 2 features"):
            method(np.ones((4, 2)))
    with pytest.raises(ValueError, match="NaN or inf in row 7"):
        model.predict(NAN)


# --- scikit-learn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 16}])
def test_scikit_learns_own_checks(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = check_estimator(
            SphericalKMeans(**arguments),
            expected_failed_checks={
                "check_sample_weight_equivalence_on_dense_data": "it shuffles the weighted rows but not the "
                "repeated ones, and seeding draws rows by their position; scikit-learn's KMeans fails it too"
            },
            on_skip=None,
        )
    assert {result["check_name"] for result in results if result["status"] != "passed"} <= {
        "check_sample_weight_equivalence_on_dense_data",
        "check_array_api_input",  # skipped, as we declare no array API
    }
    assert len(results) > 40


def test_clone_and_pickle():
    x = blobs(dtype=np.float32)
    model = SphericalKMeans(
        np.int64(4), tol=np.float32(1e-3), random_state=np.random.RandomState(0), verbose=0
    )
    assert clone(model).get_params()["tol"] == model.tol
    model.fit(x)
    loaded = pickle.loads(pickle.dumps(model))
    assert_array_equal(loaded.predict(x), model.labels_)
    for one in (loaded, model):
        one.partial_fit(x[:50])
    assert_array_equal(loaded.cluster_centers_, model.cluster_centers_)


def test_named_columns():
    frame = pd.DataFrame(blobs(50, 3, 2), columns=["a", "b", "c"])
    model = SphericalKMeans(2, random_state=0).set_output(transform="pandas").fit(frame)
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert list(model.transform(frame).columns) == ["sphericalkmeans0", "sphericalkmeans1"]
    model.fit(torch.from_numpy(frame.to_numpy()))
    assert not hasattr(model, "feature_names_in_")


def test_progress(capsys):
    SphericalKMeans(3, verbose=1, random_state=0).fit(X)
    shown = capsys.readouterr().err
    assert "k-means++: 100%" in shown
    assert "inertia=" in shown
    SphericalKMeans(3, random_state=0).fit(X)
    assert capsys.readouterr().err == ""


def test_import_needs_no_scikit_learn():
    code = (
        "import sys; sys.modules['sklearn'] = None; import clusterns; from clusterns import *; "
        "assert 'numpy' not in dir() and not hasattr(clusterns, 'KMeans')\n"
        "try: clusterns.SphericalKMeans\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("SphericalKMeans: expected scikit-learn 1.6 or newer, got: ")
    assert 'pip install "clusterns[cluster]"' in done.stdout
    loaded = "import sys, clusterns; print('sklearn' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True).strip() == "False"


# --- the kernel, real data ---------------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is for CPU tensors")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_the_triton_kernel(monkeypatch, dtype):
    x = torch.from_numpy(blobs(90, 17, 6)).to(dtype)
    x[40] = 0
    expected = SphericalKMeans(6, init=x[:6], tol=0).fit(x)
    calls = []

    def nearest_centroids(points, centers):
        calls.append(points.dtype)
        return functional.NearestCentroids(*fused.nearest_centroids(points, centers))

    monkeypatch.setattr(kmeans_steps, "uses_kernel", lambda points, centers: True)
    monkeypatch.setattr(kmeans_steps, "nearest_centroids", nearest_centroids)
    found = SphericalKMeans(6, init=x[:6], tol=0).fit(x)
    assert set(calls) == {dtype}
    assert len(calls) > 2
    assert_allclose(found.cluster_centers_, expected.cluster_centers_, atol=1e-5)
    assert found.inertia_ == pytest.approx(expected.inertia_, rel=1e-5)
    cosines = unit(x.double()) @ found.cluster_centers_.double().numpy().T
    gap = cosines.max(axis=1) - cosines[np.arange(90), found.labels_]
    assert gap.max() < 1e-6
    assert found.labels_[40] == 0


def test_news_headlines(shared):
    """Real text: classes found as well as by scikit-learn's k-means, at no worse an objective."""
    lines = (shared / "data/clustering/AgNews.tsv").read_text().splitlines()[:4000]
    labels, texts = zip(*(line.split("\t", 1) for line in lines), strict=True)
    x = (
        TfidfVectorizer(max_features=400, stop_words="english", dtype=np.float32)
        .fit_transform(texts)
        .toarray()
    )
    ours = SphericalKMeans(8, n_init=3, random_state=0).fit(x)
    theirs = KMeans(8, n_init=3, random_state=0).fit(unit(x))
    objective = (1 - (unit(x) @ unit(theirs.cluster_centers_).T).max(axis=1)).sum()
    assert ours.inertia_ < 1.02 * objective
    found, reached = (normalized_mutual_info_score(labels, m.labels_) for m in (ours, theirs))
    assert found > 0.9 * reached > 0.05
