"""The Triton sweep over a large batch against the reference: values, gradients, chunks, precision.

On a GPU where there is one, else the same kernels in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from objective_problems import errors, exact, fix_clusters, gradients, problem

from clusterns import ClusterNSLoss, info_nce, large
from clusterns.functional import objective

pytest.importorskip("triton")

# Shrinking a failure in the interpreter takes many minutes.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
CHUNKED = {"backend": "triton", "workspace_bytes": 15_000}  # too small for the cosines of 64 rows
CHUNKED_SMALL = {"backend": "triton", "workspace_bytes": 1_500}


@settings(max_examples=14, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(
    batch=st.integers(1, 70),
    dim=st.integers(2, 90),
    clusters=st.integers(0, 40),
    negatives=st.integers(0, 9),
    false_negatives=st.sampled_from(["bml", "exclude", "keep"]),
    temperature=st.sampled_from([0.01, 0.024, 0.025, 0.05, 0.5, 3.0]),
    weight=st.sampled_from([0.0, 0.7, -3.0, 25.0]),
    margins=st.sampled_from([(0.1, 0.3), (0.0, 0.2), (-0.2, 0.1), (0.25, -0.1)]),
    workspace=st.sampled_from([1, 3000, 100_000]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(
    batch, dim, clusters, negatives, false_negatives, temperature, weight, margins, workspace, seed
):
    batch = min(batch, 5) if workspace == 1 else batch  # one row a chunk
    anchors, positives, arguments = problem(batch, dim, clusters, negatives, seed=seed)
    arguments.update(false_negatives=false_negatives, temperature=temperature, hard_negative_weight=weight)
    arguments.update(bml_alpha=margins[0], bml_beta=margins[1])
    fix_clusters(anchors, arguments)
    truth = exact(anchors, positives, arguments, upstream=-1.7)
    run = gradients(
        anchors,
        positives,
        arguments,
        upstream=-1.7,
        backend="triton",
        workspace_bytes=min(workspace, 4 * batch**2 - 1) or 1,
    )
    # A rounded logit 1/τ moves its exponential by this; the margin loss jumps where Δ meets a margin.
    tolerance = 4 * torch.finfo(torch.float32).eps * (20 + 1 / temperature)
    assert (errors(run, truth)[:5] <= tolerance).all(), errors(run, truth)
    assert (errors(run, truth)[5:] <= 5 * tolerance + 1e-6).all(), errors(run, truth)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)])
def test_partial_gradients(wanted):
    """A product whose gradient nobody needs is skipped; the others stay as they are."""
    anchors, positives, arguments = problem(20, 8, 4, 3)
    arguments["false_negatives"] = "bml"
    temperature = torch.tensor(0.05, device=DEVICE)

    def run(required):
        tensors = [anchors, positives, arguments["negatives"], temperature]
        leaves = [t.detach().clone().requires_grad_(i in required) for i, t in enumerate(tensors)]
        a, p, n, t = leaves
        info_nce(a, p, **CHUNKED_SMALL, **{**arguments, "negatives": n, "temperature": t}).backward()
        return [leaf.grad for leaf in leaves]

    some, every = run(wanted), run((0, 1, 2, 3))
    for position in range(4):
        if position in wanted:
            torch.testing.assert_close(some[position], every[position], rtol=1e-5, atol=1e-8)
        else:
            assert some[position] is None


@pytest.mark.parametrize("tau", [0.05, 0.01])
def test_learned_temperature(tau):
    anchors, positives, arguments = problem(30, 9, 4, 3)
    fix_clusters(anchors, arguments)
    found = []
    for width, more in ((torch.float64, {"backend": "reference"}), (torch.float32, CHUNKED_SMALL)):
        views = [z.detach().to(width) for z in (anchors, positives)]
        temperature = torch.tensor(tau, dtype=width, device=DEVICE, requires_grad=True)
        numbers = {
            k: v.to(width) if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
        loss = info_nce(*views, temperature=temperature, false_negatives="bml", **numbers, **more)
        found.append((loss.item(), torch.autograd.grad(loss, temperature)[0].item()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_eager(dtype):
    anchors, positives, _ = problem(90, 48, 0, dtype=dtype)
    truth = exact(anchors, positives, {})
    ours = gradients(anchors, positives, {}, **CHUNKED)
    a, p = (torch.nn.functional.normalize(z, dim=1) for z in (anchors, positives))
    theirs = torch.nn.functional.cross_entropy(a @ p.T / 0.05, torch.arange(len(a), device=DEVICE))
    grads = torch.autograd.grad(theirs, (anchors, positives))
    assert abs(ours[0].loss.item() - truth[0].loss.item()) < 1e-5  # cosines are exact, sums are float32
    for mine, eager, exactly in zip(ours[1], grads, truth[1], strict=True):
        assert mine.dtype == dtype
        norm = exactly.norm()
        assert (mine.double() - exactly).norm() / norm <= (eager.double() - exactly).norm() / norm + 1e-3


def test_margins_are_not_lost_in_half_precision():
    """λ/B² beside E/Z: were the slopes added to the bfloat16 weights, they would round away."""
    anchors, positives, arguments = problem(64, 32, 3, dtype=torch.bfloat16)
    fix_clusters(anchors, arguments)
    arguments.update(bml_weight=1e-2, false_negatives="bml")
    kept = gradients(anchors, positives, {**arguments, "false_negatives": "keep"}, **CHUNKED)[1]
    sweeps = gradients(anchors.float(), positives.float(), arguments, **CHUNKED)[1]
    plain = gradients(
        anchors.float(), positives.float(), {**arguments, "false_negatives": "keep"}, **CHUNKED
    )[1]
    pull = (
        exact(anchors, positives, arguments)[1][0]
        - exact(anchors, positives, {**arguments, "false_negatives": "keep"})[1][0]
    )
    found = (sweeps[0] - plain[0]).double()
    assert (found - pull).norm() <= 0.01 * pull.norm()
    assert kept[0].dtype == torch.bfloat16


def test_same_bits_every_time():
    anchors, positives, arguments = problem(70, 24, 5, 4, dtype=torch.bfloat16)
    arguments["false_negatives"] = "bml"
    one, other = (gradients(anchors, positives, arguments, **CHUNKED) for _ in range(2))
    assert torch.equal(one[0].loss, other[0].loss)
    assert all(torch.equal(g, h) for g, h in zip(one[1], other[1], strict=True))


def test_the_workspace_decides_the_chunks(monkeypatch):
    anchors, positives, arguments = problem(70, 24, 5)
    seen = []
    true_weigh = large.launchers.weigh

    def weigh(mode, x, *rest, **more):
        seen.append((mode, len(x)))
        return true_weigh(mode, x, *rest, **more)

    monkeypatch.setattr(large.launchers, "weigh", weigh)
    gradients(anchors, positives, arguments, backend="triton", workspace_bytes=15_000)
    assert {mode for mode, _ in seen} == {"weights"}
    assert max(rows for _, rows in seen) * 70 * 4 < 15_000
    seen.clear()
    with torch.no_grad():
        objective(anchors, positives, **arguments, backend="triton", workspace_bytes=15_000)
    assert {mode for mode, _ in seen} == {"totals"}  # no weights are written for nobody


def test_unwritten_memory_does_not_show(monkeypatch):
    anchors, positives, arguments = problem(37, 20, 5, 3)
    arguments["false_negatives"] = "bml"
    clean = gradients(anchors, positives, arguments, **CHUNKED_SMALL)
    true_empty = torch.empty

    def poisoned(*shape, **more):
        tensor = true_empty(*shape, **more)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(large.torch, "empty", poisoned)
    again = gradients(anchors, positives, arguments, **CHUNKED_SMALL)
    assert torch.equal(clean[0].loss, again[0].loss)
    assert all(torch.equal(g, h) for g, h in zip(clean[1], again[1], strict=True))


def test_module_trains_the_same_in_chunks():
    """Assignment, update and loss of the module take the sweep when the workspace is small."""
    results = []
    for more in ({"backend": "torch"}, {"backend": "triton", "workspace_bytes": 6_000}):
        torch.manual_seed(0)
        loss_fn = ClusterNSLoss(12, 6, start_cosine=1.0, bml_weight=0.1, **more).to(DEVICE)
        for step in range(3):
            anchors, positives, _ = problem(50, 12, 0, seed=step)
            torch.manual_seed(step)
            loss = loss_fn(anchors, positives)
        loss.backward()
        results.append((loss.detach(), anchors.grad, loss_fn.centroids, loss_fn.last["with_mates"]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
