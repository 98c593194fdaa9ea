"""`SphericalKMeans` as users meet it: what comes in, memory, determinism, scikit-learn's own checks."""

from __future__ import annotations

import os
import sys
import warnings

import numpy as np
import pytest
import torch
from compare import assert_close_to_truth
from kmeans_problems import blobs, oracle
from largest import LargestTensor
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import check_estimator

import clusterns
from clusterns import SphericalKMeans, functional, kmeans_steps
from clusterns.objective import operators

LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "backwards": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": lambda x: np.frombuffer(x.tobytes(), dtype=x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, recwarn):
    x = blobs(120, 7, 4)
    expected = SphericalKMeans(np.int64(4), init=x[:4], tol=np.float32(1e-4)).fit(x)
    found = SphericalKMeans(4, init=x[:4]).fit(LAYOUTS[layout](x))
    assert_array_equal(found.labels_, expected.labels_)
    assert_allclose(found.cluster_centers_, expected.cluster_centers_, atol=1e-12)
    assert not recwarn


def fit_as_the_oracle(x):
    """Six clusters of a tensor with the first rows as centres, checked."""
    c, labels, inertia, _ = oracle(x.double().numpy(), x[:6].double().numpy(), 100, gap=1e-5)
    found = SphericalKMeans(6, init=x[:6], tol=0).fit(x.clone().requires_grad_())
    assert_array_equal(found.labels_, labels)
    assert_close_to_truth(found.cluster_centers_, torch.from_numpy(c))
    assert found.inertia_ == pytest.approx(inertia, rel=1e-5)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_come_back_as_tensors(dtype):
    x = torch.from_numpy(blobs(300, 33, 6)).to(dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    found = fit_as_the_oracle(x)
    results = [found.cluster_centers_, found.transform(x), found.labels_, found.predict(x)]
    assert [tensor.dtype for tensor in results] == [computed] * 2 + [torch.int64] * 2
    assert not any(tensor.requires_grad for tensor in results)
    with torch.autocast("cpu", torch.bfloat16):  # which must not round the products
        assert torch.equal(clone(found).fit(x).cluster_centers_, found.cluster_centers_)


@pytest.mark.parametrize("batch_size", [None, 256])
def test_same_bits_every_time(batch_size):
    x = blobs(2000, 24, 10, spread=1.5, dtype=np.float32)
    weight = np.random.default_rng(0).random(2000)

    def fit(points, seed=3):
        model = SphericalKMeans(10, batch_size=batch_size, max_iter=10, random_state=seed)
        return model.fit(points, sample_weight=weight)

    one, again, other = fit(x), fit(x), fit(x, seed=4)
    for name in ("cluster_centers_", "labels_"):
        assert getattr(one, name).tobytes() == getattr(again, name).tobytes()
        assert getattr(one, name).tobytes() != getattr(other, name).tobytes()
    assert one.inertia_ == again.inertia_


@pytest.mark.parametrize(("layout", "dtype"), [("C", np.float32), ("Fortran", np.float16)])
def test_memory_stays_within_the_workspace(monkeypatch, layout, dtype):
    """Nothing of the size of the points (n×D) or of all cosines (n×K) is ever made."""
    rows, dim, clusters = 2000, 64, 50
    x = LAYOUTS[layout](blobs(rows, dim, clusters, dtype=dtype))
    workspace = 100_000
    monkeypatch.setattr(kmeans_steps, "WORKSPACE_BYTES", workspace)
    with LargestTensor() as largest:
        model = SphericalKMeans(clusters, init=x[:clusters], max_iter=5).fit(x)
        model.predict(x)
        SphericalKMeans(clusters, init_size=200, batch_size=200, max_iter=1, random_state=0).fit(x)
    per_row = 8 * rows
    assert per_row <= largest.seen <= max(workspace, per_row) < 4 * rows * clusters < 4 * rows * dim
    monkeypatch.undo()
    whole = SphericalKMeans(clusters, init=x[:clusters], max_iter=5).fit(x)
    assert_allclose(model.cluster_centers_, whole.cluster_centers_, atol=1e-5)  # small chunks change nothing
    assert whole.cluster_centers_.dtype == np.float32  # half precision is not widened to float64


# --- bad input ---------------------------------------------------------------------------------------------


X = blobs(20, 3, 2)
NAN = np.where(np.arange(60).reshape(20, 3) == 22, np.nan, X)
LARGE = (3e38 * X / abs(X).max()).astype(np.float32)


@pytest.mark.parametrize(
    ("arguments", "x", "message"),
    [
        ({"n_clusters": 21}, X, "n_clusters: expected at most n_samples=20, got 21"),
        ({"tol": -1}, X, "tol: expected a finite number at least 0, got -1"),
        ({"init": X[:3]}, X, r"init: expected .* centres of shape \(2, 3\), got shape \(3, 3\)"),
        ({}, NAN, "X: expected finite values, got NaN or inf in row 7"),
        ({}, LARGE, "X: expected rows whose norm fits float32, got a larger"),
        ({}, 0 * X, "X: expected a row that is not zero and has a weight above 0, got none"),
    ],
)
def test_bad_input(arguments, x, message):
    model = SphericalKMeans(**{"n_clusters": 2, **arguments})
    for method in (model.fit, model.partial_fit):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            method(x)
        assert "\n" not in str(caught.value)


def test_bad_weights_and_features():
    for weight, message in (
        (np.ones(19), r"sample_weight: expected shape \(20,\), got \(19,\)"),
        (-np.ones(20), "sample_weight: expected finite numbers of at least 0, got others"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            SphericalKMeans(2).fit(X, sample_weight=weight)
    model = SphericalKMeans(2).fit(torch.from_numpy(X))
    for method in (model.predict, model.transform, model.score, model.partial_fit):
        with pytest.raises(ValueError, match="X: expected 3 features, got 2"):
            method(torch.ones(4, 2))
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


def test_without_scikit_learn_it_is_named(monkeypatch):
    monkeypatch.delitem(vars(clusterns), "SphericalKMeans", raising=False)
    monkeypatch.setitem(sys.modules, "clusterns.spherical_kmeans", None)
    with pytest.raises(ImportError, match=r"expected scikit-learn .*pip install .clusterns.cluster."):
        clusterns.SphericalKMeans  # noqa: B018


# --- the kernel --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is for CPU tensors")
def test_on_the_triton_kernel(monkeypatch):
    x = torch.from_numpy(blobs(90, 17, 6)).half()
    x[40] = 0
    calls = []

    def nearest_centroids(points, centers):
        calls.append(points.dtype)
        return functional.NearestCentroids(*operators.nearest_centroids(points, centers))

    monkeypatch.setattr(kmeans_steps, "uses_kernel", lambda points, centers: True)
    monkeypatch.setattr(kmeans_steps, "nearest_centroids", nearest_centroids)
    fit_as_the_oracle(x)
    assert set(calls) == {torch.float16}
    assert len(calls) > 2
