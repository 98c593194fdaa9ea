"""Cosines, assignment, seeding and plain InfoNCE against formulas of a line."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

import clusterns
from clusterns import functional, reference

SMALL = {"dim": st.integers(1, 24), "seed": st.integers(0, 99)}


def test_cosine_similarity_matrix():
    a, b = embeddings(5, 3)[0], embeddings(4, 3, seed=1)[0]
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.nn.functional.cosine_similarity(row[None], b) for row in a]) / 0.5
    torch.testing.assert_close(clusterns.cosine_similarity_matrix(a, b, temperature), expected)
    assert torch.autograd.gradcheck(clusterns.cosine_similarity_matrix, (a, b, temperature))
    with torch.autocast("cpu", torch.bfloat16):
        assert clusterns.cosine_similarity_matrix(a.half(), b.half()).dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 50), clusters=st.integers(1, 20), workspace=st.sampled_from([1000, 2**20]), **SMALL
)
def test_nearest_centroids(rows, clusters, workspace, dim, seed):
    points, centroids = embeddings(rows, dim, seed=seed)[0], embeddings(clusters, dim, seed=seed + 1)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "WORKSPACE_BYTES", workspace)
        found = clusterns.nearest_centroids(points, centroids)
    cosines = reference.cosine_similarity_matrix(points, centroids).detach()
    # Equal cosines (D = 1 makes many) may differ in the last bit between the two ways to sum.
    best = cosines.topk(min(2, clusters)).values.T
    torch.testing.assert_close(found.nearest_cosine, best[0])
    torch.testing.assert_close(cosines.gather(1, found.nearest[:, None])[:, 0], best[0])
    assert found.nearest.dtype == torch.int64
    assert not found.nearest_cosine.requires_grad
    if clusters == 1:
        assert (found.runner_up == -1).all()
        assert (found.runner_up_cosine == -torch.inf).all()
    else:
        assert (found.runner_up != found.nearest).all()
        torch.testing.assert_close(found.runner_up_cosine, best[1])
        torch.testing.assert_close(cosines.gather(1, found.runner_up[:, None])[:, 0], best[1])


def test_nearest_centroids_takes_the_lowest_id_of_equals():
    points = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    centroids = torch.tensor([[0.0, 3.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
    found = clusterns.nearest_centroids(points, centroids)
    assert found.nearest.tolist() == [1, 1]
    assert found.runner_up.tolist() == [2, 2]


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 30), data=st.data(), **SMALL)
def test_seed_centroids(batch, dim, data, seed):
    anchors, positives = embeddings(batch, dim + 1, seed=seed)
    clusters, first = data.draw(st.integers(1, batch)), data.draw(st.integers(0, batch - 1))
    found = clusterns.seed_centroids(anchors, positives, clusters, first=first)
    expected = reference.seed_centroids(anchors, positives, clusters, first)
    assert all(map(torch.equal, found, expected))
    assert len(set(found[1].tolist())) == clusters


@pytest.mark.parametrize("temperature", [1e-4, 0.07, 1e6])
def test_info_nce_is_cross_entropy_over_all_columns(temperature):
    """The published code lets centroids silently replace a user's third column."""
    anchors, positives = embeddings(16, 8)
    negatives, centroids = embeddings(5, 8, seed=3)[0], embeddings(4, 8, seed=4)[0].detach()
    hard = centroids[clusterns.nearest_centroids(anchors, centroids).runner_up]
    for more, columns in (
        ({}, []),
        ({"negatives": negatives}, [negatives]),
        ({"centroids": centroids}, [hard]),
        ({"negatives": negatives, "centroids": centroids}, [negatives, hard]),
    ):
        logits = reference.unit(anchors) @ reference.unit(torch.cat([positives, *columns])).T / temperature
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(16))
        for backend in ("torch", "reference"):
            loss = clusterns.info_nce(anchors, positives, temperature=temperature, backend=backend, **more)
            torch.testing.assert_close(loss, expected)


def test_reference_differentiates_and_batches_as_one_likes():
    """Twice, in forward mode, within `torch.func` and over many batches; the others refuse."""
    centroids = embeddings(3, 5, seed=3)[0].detach()
    plain = functools.partial(clusterns.info_nce, centroids=centroids, backend="reference")
    loss = functools.partial(plain, false_negatives="bml", bml_weight=0.3)
    anchors, positives = embeddings(6, 5)
    assert torch.autograd.gradgradcheck(loss, (anchors, positives))
    (expected,) = torch.autograd.grad(clusterns.info_nce(anchors, positives, centroids=centroids), anchors)
    for transform in (torch.func.grad, torch.func.jacfwd):
        torch.testing.assert_close(transform(plain)(anchors.detach(), positives.detach()), expected)
    many = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    each = torch.stack([loss(*pair) for pair in many])
    torch.testing.assert_close(torch.func.vmap(loss)(many[:, 0], many[:, 1]), each)
    module = clusterns.ClusterNSLoss(5, 3, backend="reference")
    with pytest.raises(RuntimeError, match="training: expected eval mode within torch.func"):
        torch.func.vmap(module)(many[:, 0], many[:, 1])
