"""The method of `SphericalKMeans` against a plain float64 oracle: steps, seeding, empty clusters, weights."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kmeans_problems import blobs, oracle, rows_of, unit
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from clusterns import SphericalKMeans, kmeans_seeding, kmeans_steps
from clusterns.kmeans_steps import Clusters, assign, lloyd

# --- the method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "dim", "clusters"), [(200, 17, 5), (60, 1, 2), (9, 4, 9), (50, 3, 1), (300, 2, 7), (1, 1, 1)]
)
def test_agrees_with_the_oracle(rows, dim, clusters):
    x = blobs(rows, dim, clusters, seed=3)
    start = x[np.sort(np.random.default_rng(0).choice(rows, clusters, replace=False))]
    if dim == 1:
        start = np.array([[-2.0], [3.0]])[:clusters] * np.sign(x[0])
    x = np.concatenate([x, np.zeros((3, dim))])  # which pull on no centre
    weight = np.random.default_rng(1).integers(1, 4, rows + 3)
    for max_iter in (1, 3, 100):
        c, labels, inertia, iterations = oracle(x, start, max_iter, weight)
        found = SphericalKMeans(clusters, init=start, max_iter=max_iter, tol=0).fit(x, sample_weight=weight)
        assert_array_equal(found.labels_, labels)
        assert_allclose(found.cluster_centers_, c, atol=1e-12)
        assert_allclose(found.inertia_, inertia, atol=1e-12 * rows)
        assert found.n_iter_ == iterations


@settings(max_examples=40, deadline=None)
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
    assert_allclose(found.transform(x), 1 - cosines, atol=1e-12)
    assert found.score(x, sample_weight=weight) == pytest.approx(-found.inertia_, abs=1e-9)


def test_ties_and_zero_rows_take_the_lowest_id():
    x = np.array([[0.0, 0.0], [1e-9, -1e-9], [1.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    model = SphericalKMeans(3, init=[[0, 1], [1, 0], [1, 0]], max_iter=1).fit(x)
    model.cluster_centers_ = np.array([[0, 1], [1, 0], [1, 0]])
    assert_array_equal(model.predict(x), [0, 0, 0, 0, 1])
    assert_allclose(model.transform(x)[:2], 1)


def test_a_cluster_whose_sum_vanishes_keeps_its_center():
    found = SphericalKMeans(1, init=[[0.6, 0.8]]).fit([[1.0, 2.0], [-1.0, -2.0]])
    assert_allclose(found.cluster_centers_, [[0.6, 0.8]])
    assert found.inertia_ == 2


def test_the_best_run_counts():
    x = blobs(1500, 8, 12, spread=1.5)
    random = np.random.RandomState(0)
    each = [SphericalKMeans(12, init="random", n_init=1, random_state=random).fit(x) for _ in range(6)]
    best = SphericalKMeans(12, init="random", n_init=6, random_state=0).fit(x)
    assert best.inertia_ == pytest.approx(min(run.inertia_ for run in each))
    assert_array_equal(best.labels_, best.predict(x))


# --- empty clusters, duplicates, seeding -------------------------------------------------------------------


def test_empty_clusters_take_the_farthest_points():
    """Not the only member of a cluster, nor a point equal to one just taken, nor one without a weight."""
    x = np.array([[1.0, 0], [1, 0.01], [0.7, 0.7], [1.4, 1.4], [0, 1], [0, 1], [-1, 0.2], [-1, -0.1], [0, 0]])
    weight = np.array([1.0, 1, 1, 1, 1, 1, 1, 0, 1])
    rows = rows_of(x, weight)
    state = Clusters(torch.tensor([[1.0, 0], [0, -1], [0, -1], [0, 1], [-1, 0]]).double())
    assigned = assign(rows, state.centers)
    state.add(rows, assigned.labels)
    assert state.members.tolist() == [4, 0, 0, 2, 1]
    assert state.refill(rows, assigned)
    assert assigned.labels.tolist() == [0, 2, 1, 0, 3, 3, 4, 4, 0]
    afresh = Clusters(state.centers)
    afresh.add(rows, assigned.labels)
    assert torch.equal(state.members, afresh.members)
    assert_allclose(state.sums, afresh.sums, atol=1e-12)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_seeds_differ_and_have_a_weight(init):
    weight = np.zeros(300)
    weight[::50] = 1
    found = SphericalKMeans(6, init=init, random_state=0).fit(blobs(300, 4, 6), sample_weight=weight)
    assert found.inertia_ == pytest.approx(0, abs=1e-9)
    words = r"distinct clusters \(3\) found smaller than n_clusters \(6\)"
    with pytest.warns(ConvergenceWarning, match=words):
        found = SphericalKMeans(6, init=init, random_state=0).fit(np.repeat(blobs(3, 4, 3), 5, axis=0))
    assert found.inertia_ == pytest.approx(0, abs=1e-12)
    assert_allclose(np.linalg.norm(found.cluster_centers_, axis=1), 1)


def test_seeding_picks_one_of_each_group():
    x = blobs(1000, 30, 12, spread=0.05)
    groups = SphericalKMeans(12, random_state=0).fit(x).labels_
    for seed in range(5):
        chosen = kmeans_seeding.k_means_plus_plus(rows_of(x), 12, np.random.RandomState(seed))
        assert len(set(groups[chosen])) == 12


@pytest.mark.parametrize(
    ("groups", "spread", "more"), [(4, 0.2, {"init_size": 50}), (10, 0.8, {"batch_size": 200})]
)
def test_less_work_comes_close(groups, spread, more):
    """Seeding on some of the points; mini-batches."""
    x = blobs(4000, 12, groups, spread=spread)
    found, lloyds = (SphericalKMeans(groups, random_state=0, **each).fit(x) for each in (more, {}))
    assert found.inertia_ < 1.02 * lloyds.inertia_
    assert_array_equal(found.labels_, found.predict(x))


# --- much data ---------------------------------------------------------------------------------------------


def test_partial_fit_is_the_direction_of_all_that_came():
    x = blobs(100, 6, 4, seed=5)
    batches = [x, x[:60], x[30:]]
    model = SphericalKMeans(4, init=batches[0][:4])
    c, sums = unit(batches[0][:4]), np.zeros((4, 6))
    for calls, batch in enumerate(map(unit, batches), start=1):
        assert model.partial_fit(batches[calls - 1]) is model
        np.add.at(sums, (batch @ c.T).argmax(axis=1), batch)
        c = unit(sums)
        assert_allclose(model.cluster_centers_, c, atol=1e-12)
        assert_array_equal(model.labels_, (batch @ c.T).argmax(axis=1))
        assert model.inertia_ == pytest.approx((1 - (batch @ c.T).max(axis=1)).sum())
        assert model.n_iter_ == calls
    seeded = SphericalKMeans(4, random_state=0).fit(x)  # goes on from there: fewer rows, another dtype
    centers = seeded.cluster_centers_.copy()
    seeded.partial_fit(x[:1].astype(np.float32))
    assert_allclose(seeded.cluster_centers_, centers, atol=0.1)
    assert (seeded.cluster_centers_ != centers).any()
    empty = SphericalKMeans(2, init=[[1.0, 0], [-1, 0]]).partial_fit([[1.0, 0.1], [1, 0.2], [1, 0.6]])
    assert_array_equal(empty.labels_, [0, 0, 1])


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 10**6])
def test_a_weight_is_a_repetition(batch_size):
    x = blobs(150, 6, 4)
    weight = np.random.default_rng(1).integers(0, 4, 150)
    weight[:4] = 1
    model = SphericalKMeans(4, init=x[:4], batch_size=batch_size, max_iter=1 if batch_size else 100)
    weighted = clone(model).fit(x, sample_weight=weight)
    repeated = clone(model).fit(np.repeat(x, weight, axis=0))
    assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, atol=1e-12)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_)
    as_tensor = clone(model).fit(torch.from_numpy(x), sample_weight=torch.from_numpy(weight))
    assert_array_equal(as_tensor.labels_, weighted.labels_)
    assert abs(clone(model).fit(x).cluster_centers_ - weighted.cluster_centers_).max() > 1e-3
