"""The torch path alone, in float64; what it shares with the others is in test_contract."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_problems import fix_clusters, gradients, problem

from clusterns import chunked, info_nce

DOUBLE = {"dtype": torch.float64}


def assert_agree(one, other, tolerance=1e-10):
    for name in one[0]._fields:
        torch.testing.assert_close(
            getattr(one[0], name), getattr(other[0], name), rtol=tolerance, atol=tolerance
        )
    for mine, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    dim=st.integers(1, 33),
    clusters=st.integers(0, 9),
    negatives=st.integers(0, 7),
    false_negatives=st.sampled_from(["bml", "exclude", "keep"]),
    temperature=st.sampled_from([0.01, 0.024, 0.025, 0.05, 0.5, 3.0]),
    weight=st.sampled_from([0.0, 0.7, -3.0, 25.0]),
    margins=st.sampled_from([(0.1, 0.3), (0.0, 0.2), (-0.2, 0.1), (0.25, -0.1)]),
    workspace=st.sampled_from([1, 3000, 2**20]),
    sorted_batch=st.sampled_from([1, 1024]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(
    batch,
    dim,
    clusters,
    negatives,
    false_negatives,
    temperature,
    weight,
    margins,
    workspace,
    sorted_batch,
    seed,
):
    anchors, positives, arguments = problem(batch, dim, clusters, negatives, seed=seed, **DOUBLE)
    fix_clusters(anchors, arguments)
    arguments.update(false_negatives=false_negatives, temperature=temperature, hard_negative_weight=weight)
    arguments.update(bml_alpha=margins[0], bml_beta=margins[1])
    expected = gradients(anchors, positives, arguments, upstream=-1.7, backend="reference")
    with mock.patch.object(chunked, "_SORTED_BATCH", sorted_batch):
        actual = gradients(
            anchors, positives, arguments, upstream=-1.7, backend="torch", workspace_bytes=workspace
        )
    scale = max(1.0, 0.05 / temperature)
    assert_agree(actual, expected, tolerance=1e-10 * scale)


@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
def test_gradcheck(false_negatives):
    anchors, positives, arguments = problem(9, 4, 3, 5, **DOUBLE)
    temperature = torch.tensor(0.3, device=DEVICE, requires_grad=True, **DOUBLE)
    arguments.update(false_negatives=false_negatives, hard_negative_weight=0.4)
    negatives = arguments.pop("negatives")
    # The clusters are fixed: a finite difference across a change of cluster would mean nothing.
    fix_clusters(anchors, arguments)

    def loss(a, p, n, t):
        return info_nce(a, p, negatives=n, temperature=t, backend="torch", **arguments)

    assert torch.autograd.gradcheck(loss, (anchors, positives, negatives, temperature))


def test_order_of_the_sentences_does_not_matter():
    anchors, positives, arguments = problem(50, 10, 6, **DOUBLE)
    arguments.update(false_negatives="bml", backend="torch")
    order = torch.randperm(50, device=DEVICE)
    terms, grads = gradients(anchors, positives, arguments)
    views = [z.detach()[order].requires_grad_() for z in (anchors, positives)]
    assert_agree(gradients(*views, arguments), (terms, [gradient[order] for gradient in grads]))


def test_never_builds_a_square_matrix():
    """No tensor of the sweep is larger than the workspace allows, whatever the clusters look like."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result) and not result._is_view():
                self.numbers = max(self.numbers, result.numel())
            return result

    batch, dim, workspace = 2048, 16, 2**18
    anchors, positives, arguments = problem(batch, dim, 3)
    ids = torch.zeros(batch, dtype=torch.int64, device=DEVICE)  # the worst case: all mates
    arguments.update(cluster_ids=ids, false_negatives="bml", backend="torch", workspace_bytes=workspace)
    with Largest() as largest:
        info_nce(anchors, positives, **arguments).backward()
    assert largest.numbers <= max(workspace // 4, 2 * batch * dim)
