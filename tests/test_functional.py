from __future__ import annotations

import functools

import pytest
import torch
from conftest import embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

import clusterns
from clusterns import functional, reference


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), dim=st.integers(1, 40), seed=st.integers(0, 99))
def test_cosine_similarity_matrix(rows, columns, dim, seed):
    a, b = embeddings(rows, dim, seed=seed)[0], embeddings(columns, dim, seed=seed + 1)[1]
    actual = clusterns.cosine_similarity_matrix(a, b, 0.1)
    expected = torch.stack([torch.nn.functional.cosine_similarity(row[None], b) for row in a]) / 0.1
    torch.testing.assert_close(actual, expected)


def test_cosine_similarity_matrix_gradients_and_dtypes():
    a, b = embeddings(5, 3)[0], embeddings(4, 3, seed=1)[0]
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clusterns.cosine_similarity_matrix, (a, b, temperature))
    with torch.autocast("cpu", torch.bfloat16):
        assert clusterns.cosine_similarity_matrix(a.half(), b.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"b: expected shape \(rows, 3\)"):
        clusterns.cosine_similarity_matrix(a, torch.zeros(2, 4, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 50), clusters=st.integers(1, 20), dim=st.integers(1, 24), seed=st.integers(0, 99))
def test_nearest_centroids(rows, clusters, dim, seed):
    points, centroids = embeddings(rows, dim, seed=seed)[0], embeddings(clusters, dim, seed=seed + 1)[0]
    found = clusterns.nearest_centroids(points, centroids)
    nearest, runner_up = reference.nearest_and_runner_up(points, centroids)
    cosines = reference.cosine_similarity_matrix(points, centroids).detach()
    # Equal cosines (D = 1 makes many) may differ in the last bit between the two ways to sum.
    torch.testing.assert_close(found.nearest_cosine, cosines.gather(1, nearest[:, None])[:, 0])
    torch.testing.assert_close(found.nearest_cosine, cosines.gather(1, found.nearest[:, None])[:, 0])
    assert found.nearest.dtype == torch.int64
    assert not found.nearest_cosine.requires_grad
    if clusters == 1:
        assert (found.runner_up == -1).all()
        assert (found.runner_up_cosine == -torch.inf).all()
    else:
        assert (found.runner_up != found.nearest).all()
        torch.testing.assert_close(found.runner_up_cosine, cosines.gather(1, runner_up[:, None])[:, 0])
        torch.testing.assert_close(found.runner_up_cosine, cosines.gather(1, found.runner_up[:, None])[:, 0])


def test_nearest_centroids_takes_the_lowest_id_of_equals():
    points = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    centroids = torch.tensor([[0.0, 3.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
    found = clusterns.nearest_centroids(points, centroids)
    assert found.nearest.tolist() == [1, 1]
    assert found.runner_up.tolist() == [2, 2]


def test_nearest_centroids_when_every_cosine_is_negative():
    """A padded column that scored 0 would win here (flash-kmeans #16)."""
    points = torch.ones(70, 5)
    centroids = -torch.rand(3, 5) - 0.1
    found = clusterns.nearest_centroids(points, centroids)
    assert found.nearest.max() < 3
    assert found.runner_up.max() < 3
    assert (found.nearest_cosine < 0).all()


def test_nearest_centroids_in_chunks(monkeypatch):
    points, centroids = embeddings(100, 8)[0], embeddings(7, 8, seed=1)[0]
    whole = clusterns.nearest_centroids(points, centroids)
    monkeypatch.setattr(functional, "WORKSPACE_BYTES", 1000)
    for one, other in zip(whole, clusterns.nearest_centroids(points, centroids), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 30), dim=st.integers(2, 20), data=st.data(), seed=st.integers(0, 99))
def test_seed_centroids(batch, dim, data, seed):
    anchors, positives = embeddings(batch, dim, seed=seed)
    clusters = data.draw(st.integers(1, batch))
    first = data.draw(st.integers(0, batch - 1))
    centroids, indices = clusterns.seed_centroids(anchors, positives, clusters, first=first)
    expected, expected_indices = reference.seed_centroids(anchors, positives, clusters, first)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(centroids, expected)
    assert len(set(indices.tolist())) == clusters


def test_seed_centroids_draws_the_first_at_random():
    anchors, positives = embeddings(50, 6)
    firsts = {
        clusterns.seed_centroids(anchors, positives, 3, generator=torch.Generator().manual_seed(seed))[1][
            0
        ].item()
        for seed in range(20)
    }
    assert len(firsts) > 5
    same = [
        clusterns.seed_centroids(anchors, positives, 3, generator=torch.Generator().manual_seed(7))[1]
        for _ in range(2)
    ]
    assert torch.equal(*same)


def test_plain_info_nce_is_cross_entropy():
    anchors, positives = embeddings(20, 8)
    logits = torch.nn.functional.normalize(anchors) @ torch.nn.functional.normalize(positives).T / 0.07
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(20))
    torch.testing.assert_close(clusterns.info_nce(anchors, positives, temperature=0.07), expected)


def test_explicit_negatives_stand_beside_the_centroids():
    """The published code lets centroids silently replace a user's third column."""
    anchors, positives = embeddings(10, 6)
    negatives, centroids = embeddings(10, 6, seed=3)[0], embeddings(4, 6, seed=4)[0].detach()
    both, neither = (
        clusterns.info_nce(anchors, positives, negatives=n, centroids=c)
        for n, c in ((negatives, centroids), (None, None))
    )
    only_negatives = clusterns.info_nce(anchors, positives, negatives=negatives)
    only_centroids = clusterns.info_nce(anchors, positives, centroids=centroids)
    assert neither < only_negatives < both
    assert neither < only_centroids < both
    # Every anchor sees all negatives: the same as longer in-batch columns.
    logits = reference.unit(anchors) @ reference.unit(torch.cat([positives, negatives])).T / 0.05
    torch.testing.assert_close(only_negatives, torch.nn.functional.cross_entropy(logits, torch.arange(10)))


def test_labels_stay_on_the_positives():
    """Anchors equal to their positives must give a loss near zero whatever else stands in the columns."""
    anchors = torch.eye(16)
    loss = clusterns.info_nce(anchors, anchors.clone(), negatives=-torch.eye(16), temperature=0.02)
    assert loss < 1e-6


def test_large_temperature_limit():
    anchors, positives = embeddings(32, 8)
    loss = clusterns.info_nce(anchors, positives, temperature=1e6)
    torch.testing.assert_close(loss, torch.tensor(32.0, dtype=torch.float64).log(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_temperature_stays_finite(dtype):
    anchors, positives = embeddings(32, 8, dtype=dtype)
    loss = clusterns.info_nce(anchors, positives, temperature=1e-4)
    loss.backward()
    assert loss.isfinite()
    assert anchors.grad.isfinite().all()


def test_reference_differentiates_and_batches_as_one_likes():
    """Twice, in forward mode, within `torch.func` and over many batches; the others refuse."""
    centroids = embeddings(3, 5, seed=3)[0].detach()
    arguments = {"centroids": centroids, "false_negatives": "bml", "bml_weight": 0.3, "backend": "reference"}
    anchors, positives = embeddings(6, 5)
    loss = functools.partial(clusterns.info_nce, **arguments)
    assert torch.autograd.gradgradcheck(loss, (anchors, positives))
    (expected,) = torch.autograd.grad(clusterns.info_nce(anchors, positives, centroids=centroids), anchors)
    plain = functools.partial(clusterns.info_nce, centroids=centroids, backend="reference")
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(plain)(anchors.detach(), positives.detach()), expected)
    many = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    each = torch.stack([loss(*pair) for pair in many])
    torch.testing.assert_close(torch.func.vmap(loss)(many[:, 0], many[:, 1]), each)
    with pytest.raises(RuntimeError, match="backend: expected 'reference' within torch.func .*, got 'torch'"):
        torch.func.vmap(clusterns.info_nce)(many[:, 0], many[:, 1])
    assert torch.autograd.gradgradcheck(clusterns.cosine_similarity_matrix, (anchors, positives))


def test_backends_named_and_refused():
    anchors, positives = embeddings(4, 3)
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto'.*got 'cuda'"):
        clusterns.info_nce(anchors, positives, backend="cuda")
    with pytest.raises(RuntimeError, match="backend: 'triton' cannot run"):
        clusterns.info_nce(anchors, positives, backend="triton")
