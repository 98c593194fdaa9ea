"""The Triton path alone: what it keeps and its extremes; what it shares with the others is in test_contract.

On a GPU where there is one, else the same kernels in Triton's interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compare import assert_close_to_truth
from conftest import DEVICE
from objective_problems import exact, fix_clusters, gradients, problem

from clusterns import fused, info_nce, reference

pytest.importorskip("triton")


def test_keeps_no_more_than_the_workspace():
    """What the backward holds on to is the cosines, as `fused.cosine_bytes` says, and vectors."""
    anchors, positives, arguments = problem(128, 8, 16, 40)
    held = 0

    def pack(tensor):
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        info_nce(anchors, positives, false_negatives="bml", backend="triton", **arguments)
    cosines = fused.cosine_bytes(anchors, arguments["negatives"], arguments["centroids"])
    inputs = sum(z.numel() * 4 for z in (anchors, positives, arguments["negatives"], arguments["centroids"]))
    vectors = 4 * 128 * 20
    assert cosines < held <= cosines * 1.1 + inputs + vectors


def test_a_similarity_matrix_may_be_changed_in_place():
    for columns in (16, 20):
        a, b, _ = problem(20, 8, 0)
        b = b.detach()[:columns]
        matrix = fused.cosine_similarity_matrix(a, b, 0.5)
        assert matrix.is_contiguous()
        matrix.mul_(2.0)
        matrix.sum().backward()
        wide = a.detach().double().requires_grad_()
        truth = torch.autograd.grad(reference.cosine_similarity_matrix(wide, b.double()).sum() * 4, wide)[0]
        assert_close_to_truth(a.grad, truth, condition=20)


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


def test_newer_setting_of_tf32(monkeypatch):
    """torch's older getter raises where only `fp32_precision` has been set."""
    from clusterns.kernels.target import Target

    def raises():
        raise RuntimeError("mixed settings")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    for setting, precision in (("tf32", "tf32"), ("ieee", "tf32x3")):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=setting))
        assert Target("cuda", 90).precision() == precision
