"""The torch path against the reference: values, gradients, shapes, dtypes, memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from conftest import embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterns import chunked, info_nce, nearest_centroids
from clusterns.functional import objective

OPTIONS = {"bml_weight": 0.3, "bml_alpha": 0.1, "bml_beta": 0.3}


def problem(batch=33, dim=17, clusters=5, negatives=0, dtype=torch.float64, seed=0):
    anchors, positives = embeddings(batch, dim, dtype=dtype, seed=seed)
    arguments = dict(OPTIONS)
    if clusters:
        arguments["centroids"] = embeddings(clusters, dim, dtype=dtype, seed=seed + 1)[0].detach()
    if negatives:
        arguments["negatives"] = embeddings(negatives, dim, dtype=dtype, seed=seed + 2)[0]
    return anchors, positives, arguments


def gradients(anchors, positives, arguments, upstream=1.0, **more):
    wanted = [anchors, positives]
    wanted += [
        value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    terms = objective(anchors, positives, **arguments, **more)
    return terms, torch.autograd.grad(terms.loss * upstream, wanted)


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
    anchors, positives, arguments = problem(batch, dim, clusters, negatives, seed=seed)
    arguments.update(false_negatives=false_negatives, temperature=temperature, hard_negative_weight=weight)
    arguments.update(bml_alpha=margins[0], bml_beta=margins[1])
    expected = gradients(anchors, positives, arguments, upstream=-1.7, backend="reference")
    with mock.patch.object(chunked, "_SORTED_BATCH", sorted_batch):
        actual = gradients(anchors, positives, arguments, upstream=-1.7, workspace_bytes=workspace)
    scale = max(1.0, 0.05 / temperature)
    assert_agree(actual, expected, tolerance=1e-10 * scale)


@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
def test_gradcheck(false_negatives):
    anchors, positives, arguments = problem(9, 4, 3, 5)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    arguments["false_negatives"] = false_negatives
    arguments["hard_negative_weight"] = 0.4
    negatives = arguments.pop("negatives")

    # The clusters are fixed: a finite difference across a change of cluster would mean nothing.
    assigned = nearest_centroids(anchors, arguments["centroids"])
    arguments.update(cluster_ids=assigned.nearest, hard_negative_ids=assigned.runner_up)

    def loss(a, p, n, t):
        return info_nce(a, p, negatives=n, temperature=t, **arguments)

    assert torch.autograd.gradcheck(loss, (anchors, positives, negatives, temperature))


def test_centroids_get_no_gradient():
    anchors, positives, arguments = problem()
    arguments["centroids"].requires_grad_()
    info_nce(anchors, positives, false_negatives="bml", **arguments).backward()
    assert arguments["centroids"].grad is None
    assert anchors.grad is not None


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (3,), (2, 3)])
def test_partial_gradients(wanted):
    anchors, positives, arguments = problem(12, 8, 4, 3)
    temperature = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    arguments["false_negatives"] = "bml"

    def inputs(required):
        tensors = [anchors, positives, arguments["negatives"], temperature]
        return [t.detach().clone().requires_grad_(i in required) for i, t in enumerate(tensors)]

    def run(required):
        a, p, n, t = leaves = inputs(required)
        info_nce(a, p, **{**arguments, "negatives": n, "temperature": t}).backward()
        return [leaf.grad for leaf in leaves]

    whole, part = run((0, 1, 2, 3)), run(wanted)
    for index in range(4):
        if index in wanted:
            torch.testing.assert_close(part[index], whole[index])
        else:
            assert part[index] is None


def test_no_gradient_wanted():
    anchors, positives, arguments = problem()
    with torch.no_grad():
        quiet = info_nce(anchors, positives, false_negatives="bml", **arguments)
    assert not quiet.requires_grad
    torch.testing.assert_close(
        quiet, info_nce(anchors, positives, false_negatives="bml", **arguments).detach()
    )


def test_non_contiguous_inputs():
    anchors, positives, arguments = problem(20, 6)
    wide = torch.zeros(20, 12, dtype=torch.float64)
    wide[:, ::2] = anchors.detach()
    strided = wide[:, ::2].requires_grad_()
    columns = positives.detach().T.contiguous().T.requires_grad_()
    expected = gradients(anchors, positives, arguments, false_negatives="bml")
    assert_agree(gradients(strided, columns, arguments, false_negatives="bml"), expected)


@pytest.mark.parametrize("sorted_batch", [1, 1024])
@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
def test_every_cell_is_written(nan_filled_memory, monkeypatch, false_negatives, sorted_batch):
    monkeypatch.setattr(chunked, "_SORTED_BATCH", sorted_batch)
    anchors, positives, arguments = problem(45, 19, 6, 4, dtype=torch.float32)
    terms, grads = gradients(
        anchors, positives, arguments, false_negatives=false_negatives, workspace_bytes=4000
    )
    assert all(term.isfinite() for term in terms)
    assert all(gradient.isfinite().all() for gradient in grads)


@pytest.mark.parametrize("sorted_batch", [1, 1024])
def test_same_bits_every_time(monkeypatch, sorted_batch):
    monkeypatch.setattr(chunked, "_SORTED_BATCH", sorted_batch)
    anchors, positives, arguments = problem(300, 64, 12, 7, dtype=torch.float32)
    runs = [gradients(anchors, positives, arguments, false_negatives="bml") for _ in range(3)]
    for terms, grads in runs[1:]:
        assert torch.equal(terms.loss, runs[0][0].loss)
        assert all(torch.equal(x, y) for x, y in zip(grads, runs[0][1], strict=True))


def test_order_of_the_sentences_does_not_matter():
    anchors, positives, arguments = problem(50, 10, 6)
    order = torch.randperm(50)
    terms, (grad_a, grad_p) = gradients(anchors, positives, arguments, false_negatives="bml")
    shuffled = gradients(
        anchors.detach()[order].requires_grad_(),
        positives.detach()[order].requires_grad_(),
        arguments,
        false_negatives="bml",
    )
    assert_agree(shuffled, (terms, (grad_a[order], grad_p[order])))


@pytest.mark.parametrize("batch", [2, 31, 256])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_float32_is_as_exact_as_plain_torch(batch, temperature):
    """Error against float64 at most that of plain torch in float32, plus a small tolerance."""
    anchors, positives, arguments = problem(batch, 48, 6, 3, dtype=torch.float32, seed=batch)
    arguments.update(false_negatives="bml", temperature=temperature)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
        for name, value in arguments.items()
    }
    exact = gradients(*(z.detach().double().requires_grad_() for z in (anchors, positives)), wide)
    eager = gradients(anchors, positives, arguments, backend="reference")
    ours = gradients(anchors, positives, arguments)

    def errors(run):
        values = [(run[0].loss.double() - exact[0].loss).abs() / exact[0].loss.abs().clamp_min(1e-12)]
        values += [(x.double() - y).norm() / y.norm() for x, y in zip(run[1], exact[1], strict=True)]
        return torch.stack([value.detach() for value in values])

    # A logit of size 1/τ rounded to float32 moves its exponential by this much, in either formula.
    tolerance = torch.finfo(torch.float32).eps / temperature
    assert (errors(ours) <= errors(eager) + tolerance).all(), (errors(ours), errors(eager))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype):
    anchors, positives, arguments = problem(40, 24, 5, dtype=dtype)
    terms, grads = gradients(anchors, positives, arguments, false_negatives="bml")
    wide = {k: v.float() if torch.is_tensor(v) else v for k, v in arguments.items()}
    single = (anchors.detach().float().requires_grad_(), positives.detach().float().requires_grad_())
    expected, expected_grads = gradients(*single, wide, false_negatives="bml")
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss, expected.loss)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs.to(dtype))


def test_loss_scale_saves_float16_gradients():
    """The gradient is scaled before it is rounded to float16, so a loss scale works."""
    anchors, positives, _ = problem(64, 32, dtype=torch.float16)
    single = [z.detach().float().requires_grad_() for z in (anchors, positives)]
    scale = 2.0**12
    grad = torch.autograd.grad(info_nce(anchors, positives, temperature=1.0) * 1e-4 * scale, anchors)[0]
    expected = torch.autograd.grad(info_nce(*single, temperature=1.0) * 1e-4, single[0])[0]
    torch.testing.assert_close(grad.float() / scale, expected, rtol=2e-3, atol=1e-9)


def test_autocast_changes_nothing():
    anchors, positives, arguments = problem(30, 16, dtype=torch.float32)
    expected = gradients(anchors, positives, arguments, false_negatives="bml")
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(anchors, positives, arguments, false_negatives="bml")
    assert torch.equal(actual[0].loss, expected[0].loss)
    assert all(torch.equal(x, y) for x, y in zip(actual[1], expected[1], strict=True))


def test_zero_rows_are_harmless():
    anchors, positives, arguments = problem(10, 6, 3, 4)
    with torch.no_grad():
        anchors[2] = 0
        positives[2] = 0
        positives[5] = 0
        arguments["negatives"][1] = 0
        arguments["centroids"][0] = 0
    for backend in ("torch", "reference"):
        terms, grads = gradients(anchors, positives, arguments, false_negatives="bml", backend=backend)
        assert terms.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in grads)
        assert not grads[0][2].any()
        assert not grads[1][5].any()
    assert_agree(
        gradients(anchors, positives, arguments, false_negatives="bml"),
        gradients(anchors, positives, arguments, false_negatives="bml", backend="reference"),
    )


def test_non_finite_rows_show_in_the_loss():
    """Mixed precision finds overflow by looking for it: the loss must not hide it."""
    for bad in (float("nan"), float("inf")):
        anchors, positives, _ = problem(8, 4)
        with torch.no_grad():
            anchors[3, 1] = bad
        assert not info_nce(anchors, positives).isfinite()


def test_one_sentence_without_negatives_costs_nothing():
    anchors, positives, _ = problem(1, 4)
    loss = info_nce(anchors, positives)
    loss.backward()
    assert loss == 0
    assert not anchors.grad.any()


def test_second_derivative_is_refused():
    anchors, positives, _ = problem(6, 4)
    (grad,) = torch.autograd.grad(info_nce(anchors, positives).square(), anchors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
    anchors, positives, arguments = problem(batch, dim, 3, dtype=torch.float32)
    arguments["cluster_ids"] = torch.zeros(batch, dtype=torch.int64)  # the worst case: all mates
    with Largest() as largest:
        info_nce(anchors, positives, false_negatives="bml", workspace_bytes=workspace, **arguments).backward()
    assert largest.numbers <= max(workspace // 4, 2 * batch * dim)
