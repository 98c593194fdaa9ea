"""The Triton path of the objective against the reference: values, gradients, shapes, dtypes, compilation.

On a GPU where there is one, else the same kernels in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_problems import errors, exact, fix_clusters, gradients, problem

from clusterns import info_nce

pytest.importorskip("triton")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 70),
    dim=st.integers(2, 90),
    clusters=st.integers(0, 40),
    negatives=st.integers(0, 20),
    false_negatives=st.sampled_from(["bml", "exclude", "keep"]),
    temperature=st.sampled_from([0.01, 0.024, 0.025, 0.05, 0.5, 3.0]),
    weight=st.sampled_from([0.0, 0.7, -3.0, 25.0]),
    margins=st.sampled_from([(0.1, 0.3), (0.0, 0.2), (-0.2, 0.1), (0.25, -0.1)]),
    assigned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(
    batch, dim, clusters, negatives, false_negatives, temperature, weight, margins, assigned, seed
):
    anchors, positives, arguments = problem(batch, dim, clusters, negatives, seed=seed)
    arguments.update(false_negatives=false_negatives, temperature=temperature, hard_negative_weight=weight)
    arguments.update(bml_alpha=margins[0], bml_beta=margins[1])
    if not assigned:
        fix_clusters(anchors, arguments)
    truth = exact(anchors, positives, arguments, upstream=-1.7)
    run = gradients(anchors, positives, arguments, upstream=-1.7, backend="triton")
    # A rounded logit 1/τ moves its exponential by this; the margin loss jumps where Δ meets a margin.
    tolerance = 4 * torch.finfo(torch.float32).eps * (20 + 1 / temperature)
    assert (errors(run, truth)[:5] <= tolerance).all(), errors(run, truth)
    assert (errors(run, truth)[5:] <= 5 * tolerance + 1e-6).all(), errors(run, truth)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (3,), (2, 3), (0, 1)])
def test_partial_gradients(wanted):
    anchors, positives, arguments = problem(20, 8, 4, 3)
    temperature = torch.tensor(0.05, device=DEVICE)
    arguments["false_negatives"] = "bml"

    def run(required):
        tensors = [anchors, positives, arguments["negatives"], temperature]
        leaves = [t.detach().clone().requires_grad_(i in required) for i, t in enumerate(tensors)]
        a, p, n, t = leaves
        info_nce(a, p, backend="triton", **{**arguments, "negatives": n, "temperature": t}).backward()
        return [leaf.grad for leaf in leaves]

    whole, part = run((0, 1, 2, 3)), run(wanted)
    for index in range(4):
        if index in wanted:
            assert torch.equal(part[index], whole[index])
        else:
            assert part[index] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_learned_temperature(dtype):
    anchors, positives, arguments = problem(40, 12, 6, 4)
    fix_clusters(anchors, arguments)
    arguments["temperature"] = torch.tensor(0.03, dtype=dtype, device=DEVICE, requires_grad=True)
    arguments["false_negatives"] = "bml"
    run = gradients(anchors, positives, arguments, 2.5, backend="triton")
    assert run[1][-1].dtype == dtype
    found = errors(run, exact(anchors, positives, arguments, 2.5))
    assert (found <= (2e-5 if dtype != torch.float16 else 1e-3)).all(), found


def test_centroids_get_no_gradient():
    anchors, positives, arguments = problem()
    arguments["centroids"].requires_grad_()
    info_nce(anchors, positives, false_negatives="bml", backend="triton", **arguments).backward()
    assert arguments["centroids"].grad is None
    assert anchors.grad is not None


def test_no_gradient_wanted():
    anchors, positives, arguments = problem()
    with torch.no_grad():
        quiet = info_nce(anchors, positives, false_negatives="bml", backend="triton", **arguments)
    assert not quiet.requires_grad
    assert torch.equal(
        quiet, info_nce(anchors, positives, false_negatives="bml", backend="triton", **arguments).detach()
    )


def test_non_contiguous_inputs_and_int32_ids():
    anchors, positives, arguments = problem(20, 6)
    fix_clusters(anchors, arguments)
    expected = gradients(anchors, positives, arguments, false_negatives="bml", backend="triton")
    wide = torch.zeros(20, 12, device=DEVICE)
    wide[:, ::2] = anchors.detach()
    rows = torch.full((40, 8), float("nan"), device=DEVICE)
    rows[::2, :6] = positives.detach()
    for name in ("cluster_ids", "hard_negative_ids"):
        arguments[name] = arguments[name].int()
    arguments["centroids"] = arguments["centroids"].T.contiguous().T
    for a, p in (
        (wide[:, ::2], rows[::2, :6]),
        (anchors.detach().T.contiguous().T, positives.detach().T.contiguous().T),
    ):
        a.requires_grad_(), p.requires_grad_()
        terms, grads = gradients(a, p, arguments, false_negatives="bml", backend="triton")
        assert torch.equal(terms.loss, expected[0].loss)
        for mine, theirs in zip(grads, expected[1], strict=True):
            assert torch.equal(mine, theirs)


def test_mixed_dtypes():
    anchors, positives, arguments = problem(20, 6, 4, 3)
    mixed = positives.detach().bfloat16().requires_grad_()
    arguments["negatives"] = arguments["negatives"].detach().half().requires_grad_()
    run = gradients(anchors, mixed, arguments, backend="triton")
    assert [g.dtype for g in run[1]] == [torch.float32, torch.bfloat16, torch.float16]
    assert (errors(run, exact(anchors, mixed, arguments))[:5] < 1e-5).all()


def surrounded(z, poison):
    """The same numbers inside a larger storage whose other cells are poison."""
    around = torch.full((z.numel() + 8192,), poison, dtype=z.dtype, device=z.device)
    inside = around[4096 : 4096 + z.numel()].view(z.shape)
    inside.copy_(z.detach())
    return inside.requires_grad_(z.requires_grad)


@pytest.mark.parametrize(
    ("batch", "dim", "clusters", "negatives"), [(45, 19, 6, 4), (1, 3, 1, 1), (70, 80, 33, 40)]
)
def test_reads_stay_inside_the_inputs(batch, dim, clusters, negatives):
    anchors, positives, arguments = problem(batch, dim, clusters, negatives)
    fix_clusters(anchors, arguments)
    plain = gradients(anchors, positives, arguments, false_negatives="bml", backend="triton")
    guarded = {
        name: surrounded(value, float("nan") if value.is_floating_point() else 10**6)
        if torch.is_tensor(value)
        else value
        for name, value in arguments.items()
    }
    views = [surrounded(z, float("nan")) for z in (anchors, positives)]
    run = gradients(*views, guarded, false_negatives="bml", backend="triton")
    assert torch.equal(run[0].loss, plain[0].loss)
    assert all(torch.equal(x, y) for x, y in zip(run[1], plain[1], strict=True))


@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
@pytest.mark.parametrize(
    ("batch", "dim", "clusters", "negatives"), [(45, 19, 6, 4), (1, 8, 2, 1), (64, 64, 32, 32)]
)
def test_every_cell_is_written(nan_filled_memory, false_negatives, batch, dim, clusters, negatives):
    anchors, positives, arguments = problem(batch, dim, clusters, negatives)
    terms, grads = gradients(anchors, positives, arguments, false_negatives=false_negatives, backend="triton")
    assert all(term.isfinite() for term in terms)
    assert all(gradient.isfinite().all() for gradient in grads)


def test_same_bits_every_time():
    anchors, positives, arguments = problem(100, 64, 12, 7)
    runs = [
        gradients(anchors, positives, arguments, false_negatives="bml", backend="triton") for _ in range(3)
    ]
    for terms, grads in runs[1:]:
        assert torch.equal(terms.loss, runs[0][0].loss)
        assert all(torch.equal(x, y) for x, y in zip(grads, runs[0][1], strict=True))


def test_zero_rows_are_harmless():
    anchors, positives, arguments = problem(10, 6, 3, 4)
    with torch.no_grad():
        anchors[2] = 0
        positives[2] = 0
        positives[5] = 0
        arguments["negatives"][1] = 0
        arguments["centroids"][0] = 0
    run = gradients(anchors, positives, arguments, false_negatives="bml", backend="triton")
    assert not run[1][0][2].any()
    assert not run[1][1][5].any()
    truth = exact(anchors, positives, arguments, false_negatives="bml")
    assert (errors(run, truth) < 1e-5).all()
    for dtype in (torch.float32, torch.float16):  # not even one row with a direction
        nothing = torch.zeros(6, 4, dtype=dtype, device=DEVICE, requires_grad=True)
        loss = info_nce(nothing, nothing * 1, centroids=torch.ones(3, 4, device=DEVICE), backend="triton")
        loss.backward()
        assert loss.isfinite()
        assert not nothing.grad.any()


def test_non_finite_rows_show_in_the_loss():
    for bad in (float("nan"), float("inf")):
        anchors, positives, _ = problem(8, 4, 0)
        with torch.no_grad():
            anchors[3, 1] = bad
        assert not info_nce(anchors, positives, backend="triton").isfinite()


def test_one_sentence_without_negatives_costs_nothing():
    anchors, positives, _ = problem(1, 4, 0)
    loss = info_nce(anchors, positives, backend="triton")
    loss.backward()
    assert loss == 0
    assert not anchors.grad.any()


def test_loss_may_be_changed_in_place():
    anchors, positives, _ = problem(8, 4, 0)
    loss = info_nce(anchors, positives, backend="triton")
    loss /= 2
    loss.backward()
    whole = torch.autograd.grad(info_nce(anchors, positives, backend="triton"), anchors)[0]
    torch.testing.assert_close(anchors.grad, whole / 2)


def test_second_derivative_is_refused():
    anchors, positives, _ = problem(6, 4, 0)
    loss = info_nce(anchors, positives, backend="triton").square()
    (grad,) = torch.autograd.grad(loss, anchors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_changes_nothing():
    anchors, positives, arguments = problem(30, 16)
    expected = gradients(anchors, positives, arguments, false_negatives="bml", backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = gradients(anchors, positives, arguments, false_negatives="bml", backend="triton")
    assert torch.equal(actual[0].loss, expected[0].loss)
    assert all(torch.equal(x, y) for x, y in zip(actual[1], expected[1], strict=True))


def test_keeps_no_more_than_the_workspace():
    """What the backward holds on to is the cosines, as `fused.cosine_bytes` says, and vectors."""
    from clusterns import fused

    anchors, positives, arguments = problem(256, 8, 16, 40)
    held = 0

    def pack(tensor):
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        info_nce(anchors, positives, false_negatives="bml", backend="triton", **arguments)
    cosines = fused.cosine_bytes(anchors, arguments["negatives"], arguments["centroids"])
    inputs = sum(z.numel() * 4 for z in (anchors, positives, arguments["negatives"], arguments["centroids"]))
    vectors = 4 * 256 * 20
    assert cosines < held <= cosines * 1.1 + inputs + vectors


def test_a_similarity_matrix_may_be_changed_in_place():
    from clusterns import fused

    for columns in (16, 20):
        a, b, _ = problem(20, 8, 0)
        b = b.detach()[:columns]
        matrix = fused.cosine_similarity_matrix(a, b, 0.5)
        assert matrix.is_contiguous()
        matrix.mul_(2.0)
        matrix.sum().backward()
        expected = torch.autograd.grad(fused.cosine_similarity_matrix(a, b, 0.5).sum() * 2, a)[0]
        torch.testing.assert_close(a.grad, expected)
