"""How exact the Triton path is: against float64, beside plain torch in its dtype, and at the extremes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from objective_problems import eager_half, errors, exact, fix_clusters, gradients, problem

from clusterns import info_nce

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 8, 1000, 4096])
def test_narrow_and_wide(dim, dtype):
    anchors, positives, arguments = problem(20, dim, 5, 3, dtype=dtype)
    arguments["centroids"] = arguments["centroids"].float()
    arguments["false_negatives"] = "bml"
    fix_clusters(anchors, arguments)
    run = gradients(anchors, positives, arguments, backend="triton")
    found = errors(run, exact(anchors, positives, arguments))
    assert (found[:5] < 1e-5).all(), found
    if dim > 1:  # in one dimension a direction cannot change: no gradient but rounding
        assert (found[5:] < (1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)).all(), found


@pytest.mark.parametrize("batch", [2, 31, 96])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_float32_is_as_exact_as_plain_torch(batch, temperature):
    """Error against float64 at most that of plain torch in float32, plus a small tolerance."""
    anchors, positives, arguments = problem(batch, 48, 6, 3, seed=batch)
    arguments.update(false_negatives="bml", temperature=temperature)
    fix_clusters(anchors, arguments)
    truth = exact(anchors, positives, arguments)
    ours, eager = (
        errors(gradients(anchors, positives, arguments, backend=backend), truth)
        for backend in ("triton", "reference")
    )
    tolerance = torch.finfo(torch.float32).eps / temperature
    assert (ours <= eager + tolerance).all(), (ours, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_half_precision_is_more_exact_than_plain_torch(dtype, temperature):
    anchors, positives, _ = problem(96, 40, 0, dtype=dtype)
    truth = exact(anchors, positives, {"temperature": temperature})
    ours = gradients(anchors, positives, {"temperature": temperature}, backend="triton")
    loss = eager_half(anchors, positives, temperature)
    eager = torch.autograd.grad(loss, (anchors, positives))
    assert ours[0].loss.dtype == torch.float32
    assert abs(ours[0].loss.double() - truth[0].loss) <= abs(loss.double() - truth[0].loss) + 1e-6
    for mine, theirs, true in zip(ours[1], eager, truth[1], strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= (theirs.double() - true).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
def test_half_precision_with_every_part(dtype, false_negatives):
    anchors, positives, arguments = problem(70, 40, 12, 9, dtype=dtype)
    arguments["centroids"] = arguments["centroids"].float() * 1.001  # float32 centroids stay float32
    arguments.update(false_negatives=false_negatives, hard_negative_weight=0.4)
    fix_clusters(anchors, arguments)
    found = errors(
        gradients(anchors, positives, arguments, backend="triton"), exact(anchors, positives, arguments)
    )
    assert (found[:5] <= 1e-5).all(), found
    # The interpreter truncates where a GPU rounds: twice the error.
    assert (found[5:] <= 4 * torch.finfo(dtype).eps).all(), found


def test_float16_gradients_of_rows_of_very_different_length():
    """Weights are folded with 1/‖z‖: neither a short nor a long row may overflow or vanish."""
    anchors, positives, arguments = problem(64, 32, 6, 5, dtype=torch.float32)
    with torch.no_grad():
        for z in (anchors, positives, arguments["negatives"]):
            z.div_(z.norm(dim=1, keepdim=True)).mul_(torch.logspace(-2, 2, len(z), device=DEVICE)[:, None])
    anchors, positives = (z.detach().half().requires_grad_() for z in (anchors, positives))
    arguments["negatives"] = arguments["negatives"].detach().half().requires_grad_()
    fix_clusters(anchors, arguments)
    arguments["false_negatives"] = "bml"
    run = gradients(anchors, positives, arguments, 1024.0, backend="triton")
    truth = exact(anchors, positives, arguments, 1024.0)
    for mine, true in zip(run[1], truth[1], strict=True):
        row_error = (mine.double() - true).norm(dim=1) / true.norm(dim=1)
        assert row_error.max() < 0.01


def test_loss_scale_saves_float16_gradients():
    anchors, positives, _ = problem(64, 32, 0, dtype=torch.float16)
    scale = 2.0**12
    loss = info_nce(anchors, positives, temperature=1.0, backend="triton") * 1e-4 * scale
    grad = torch.autograd.grad(loss, anchors)[0]
    truth = exact(anchors, positives, {"temperature": 1.0}, 1e-4)[1][0]
    torch.testing.assert_close(grad.double() / scale, truth, rtol=5e-3, atol=1e-9)


def test_well_separated_batches_keep_their_small_gradients():
    """Where the positive takes nearly all the weight, loss and gradient are tiny, not rounding noise."""
    anchors = torch.eye(32, 40, device=DEVICE) + 0.01 * torch.randn(32, 40, device=DEVICE)
    positives = anchors + 0.01 * torch.randn(32, 40, device=DEVICE)
    views = [z.detach().clone().requires_grad_() for z in (anchors, positives)]
    run = gradients(*views, {"temperature": 0.05}, backend="triton")
    truth = exact(*views, {"temperature": 0.05})
    assert truth[0].loss < 1e-6
    torch.testing.assert_close(run[0].loss.double(), truth[0].loss, rtol=1e-4, atol=0)
    assert (errors(run, truth)[5:] < 1e-4).all()


def test_one_tiny_row_does_not_spoil_float16_gradients():
    anchors, positives, arguments = problem(40, 32, 6, dtype=torch.float16)
    with torch.no_grad():
        positives[3] = 1e-6
    arguments["centroids"] = arguments["centroids"].float()
    fix_clusters(anchors, arguments)
    arguments["false_negatives"] = "bml"
    mine = gradients(anchors, positives, arguments, backend="triton")[1][0]
    true = exact(anchors, positives, arguments)[1][0]
    assert ((mine.double() - true).norm(dim=1) / true.norm(dim=1)).median() < 2e-3


def test_very_negative_weight_of_the_own_centroid():
    """A centroid used once has e^w in its sentence's denominator, also where that underflows."""
    anchors, positives, arguments = problem(8, 6, 8)
    with torch.no_grad():
        arguments["centroids"].copy_(anchors)
        positives.copy_(-anchors + 0.5 * torch.randn_like(anchors))
    arguments.update(hard_negative_weight=-95.0, temperature=0.02)
    arguments["hard_negative_ids"] = torch.arange(8, device=DEVICE)
    arguments["cluster_ids"] = torch.arange(8, device=DEVICE)
    found = errors(
        gradients(anchors, positives, arguments, backend="triton"), exact(anchors, positives, arguments)
    )
    assert (found < 1e-4).all(), found


def test_newer_setting_of_tf32(monkeypatch):
    """torch's older getter raises where only `fp32_precision` has been set."""
    from clusterns.kernels.target import Target

    def raises():
        raise RuntimeError("mixed settings")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    for setting, precision in (("tf32", "tf32"), ("ieee", "tf32x3")):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=setting))
        assert Target("cuda", 90).precision() == precision
