"""Which backend a word means, and what is said where Triton cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from compare import assert_close_to_truth
from conftest import DEVICE

from clusterns import ClusterNSLoss, backend, info_nce
from clusterns.backend import choose_backend
from clusterns.kernels import target
from clusterns.objective.problem import Options
from clusterns.rules import CloseMates

X = torch.randn(8, 4)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_torch_on_the_cpu():
    assert choose_backend("auto", X, X) == "torch"
    assert choose_backend("torch", X, X) == "torch"
    assert choose_backend("reference", X, X) == "reference"


def test_unknown_word():
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto'.*got 'cuda'"):
        info_nce(X, X, backend="cuda")
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto'.*got 'numpy'"):
        ClusterNSLoss(4, 2, backend="numpy")


def refused(match, call):
    with pytest.raises(RuntimeError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_triton_says_why_not(no_interpreter, monkeypatch):
    start = "backend: 'triton' cannot run, "
    if not torch.cuda.is_available():
        for call in (lambda: info_nce(X, X, backend="triton"), lambda: ClusterNSLoss(4, 2, backend="triton")):
            refused(start + "no GPU is available; use 'auto' or 'torch'", call)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(start + "the tensors are on cpu; move them to a GPU", lambda: info_nce(X, X, backend="triton"))
    monkeypatch.setattr(target, "_INSTALLED", False)
    for call in (lambda: info_nce(X, X, backend="triton"), lambda: ClusterNSLoss(4, 2, backend="triton")):
        refused(start + r"Triton is not installed; pip install triton", call)
    monkeypatch.setenv("CLUSTERNS_DISABLE_TRITON", "1")
    refused(
        start + "it is switched off by CLUSTERNS_DISABLE_TRITON=1",
        lambda: ClusterNSLoss(4, 2, backend="triton"),
    )


def test_dtype_is_named():
    wide = X.to(DEVICE).double()
    refused("float64 is not supported; convert to float32", lambda: info_nce(wide, wide, backend="triton"))


def test_triton_goes_by_size():
    x = X.to(DEVICE)
    assert choose_backend("triton", x, x) == "triton"
    assert choose_backend("triton", x, x, options=Options(workspace_bytes=4 * 8 * 8 - 1)) == "triton-chunked"
    assert choose_backend("triton", x, x, shared=True) == "triton-chunked"
    chunked = info_nce(x, x, backend="triton", workspace_bytes=1)
    assert_close_to_truth(chunked, info_nce(x.double(), x.double(), backend="reference"), condition=24)


def test_old_triton_is_named(monkeypatch):
    monkeypatch.setattr(target, "_VERSION", (3, 2))
    assert "Triton 3.2 is installed, 3.6 is needed" in (target.why_not(None) or "")


def test_old_gpus_are_named(no_interpreter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(target, "capability", lambda device: (7, 5))
    reason = target.why_not(torch.device("cuda", 0), torch.float32)
    assert "compute capability 7.5, 8.0 is needed" in reason


def test_the_switch_reaches_a_new_process():
    code = (
        "import torch, clusterns; x = torch.randn(4, 3); print(float(clusterns.info_nce(x, x)) >= 0)\n"
        "try: clusterns.info_nce(x, x, backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {**os.environ, "CLUSTERNS_DISABLE_TRITON": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd="/"
    )
    assert done.stdout.startswith("True\nbackend: 'triton' cannot run, it is switched off")


def test_bad_input_meets_the_same_words():
    """The checks stand before the choice of backend."""
    good = torch.randn(4, 3, device=DEVICE)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    bad = [
        ((good[0], good), {}),
        ((good, good[:3]), {}),
        ((good, good[:, :2]), {}),
        ((good.long(), good), {}),
        ((good, good), {"negatives": good[:, :2]}),
        ((good, good), {"centroids": good[:, :2]}),
        ((good, good), {"cluster_ids": ids[:3]}),
        ((good, good), {"cluster_ids": ids.float()}),
        ((good, good), {"hard_negative_ids": ids}),
        ((good, good), {"temperature": 0.0}),
        ((good, good), {"temperature": torch.ones(2, device=DEVICE)}),
        ((good, good), {"false_negatives": "drop"}),
        ((good, good), {"bml_weight": -1.0}),
        ((good, good), {"hard_negative_weight": float("nan")}),
    ]
    for views, arguments in bad:
        messages = set()
        for word in ("torch", "triton"):
            with pytest.raises((TypeError, ValueError)) as caught:
                info_nce(*views, backend=word, **arguments)
            messages.add(str(caught.value))
        assert len(messages) == 1, messages


def test_larger_batches_are_swept_in_chunks(monkeypatch):
    """ "auto" keeps within the workspace: the cosines are held where they fit, and swept where not."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(backend, "why_not", lambda *tensors: None)
    assert choose_backend("auto", X, X) == "triton"
    assert choose_backend("auto", X, X, options=Options(workspace_bytes=255)) == "triton-chunked"
    monkeypatch.setattr(backend, "why_not", lambda *tensors: "no")
    assert choose_backend("auto", X, X, options=Options(workspace_bytes=255)) == "torch"


def test_a_rule_is_served_by_torch_which_is_said_once(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(backend, "why_not", lambda *tensors: None)
    monkeypatch.setattr(backend, "_told", set())
    options = Options(false_negatives=CloseMates())
    with pytest.warns(UserWarning, match="the rule CloseMates is computed in torch"):
        assert choose_backend("auto", X, X, options=options) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("triton", X, X, options=options) == "torch"
    assert choose_backend("triton", X, X) == "triton"
