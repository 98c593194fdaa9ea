"""Which backend a word means, and what is said where Triton cannot run."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from conftest import DEVICE

from clusterns import ClusterNSLoss, backend, info_nce
from clusterns.backend import choose_backend
from clusterns.kernels import target
from clusterns.objective.problem import Options
from clusterns.rules import CloseMates

X = torch.randn(8, 4)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(backend, "why_not", lambda *tensors: None)
    monkeypatch.setattr(backend, "_told", set())


def test_words():
    """ "auto" is torch on the CPU, also while the interpreter is on."""
    found = [choose_backend(word, X, X) for word in ("auto", "torch", "reference")]
    assert found == ["torch", "torch", "reference"]


@pytest.mark.parametrize("word", ["auto", "triton"])
def test_triton_goes_by_size(as_on_a_gpu, word, monkeypatch):
    """It keeps within the workspace: the cosines are held where they fit, and swept where not."""
    assert choose_backend(word, X, X) == "triton"
    chunked = Options(workspace_bytes=4 * 8 * 8 - 1), Options(directions="both")
    for more in ({"shared": True}, *({"options": options} for options in chunked)):
        assert choose_backend(word, X, X, **more) == "triton-chunked"
    monkeypatch.setattr(backend, "why_not", lambda *tensors: "no")
    assert choose_backend("auto", X, X) == "torch"


def test_a_rule_is_served_by_torch_which_is_said_once(as_on_a_gpu):
    rule = Options(false_negatives=CloseMates())
    with pytest.warns(UserWarning, match="the rule CloseMates is computed in torch"):
        assert choose_backend("auto", X, X, options=rule) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("triton", X, X, options=rule) == "torch"


def refused(reason, *calls):
    for call in calls:
        with pytest.raises(RuntimeError, match=f"^backend: 'triton' cannot run, {reason}"):
            call(backend="triton")


def test_triton_says_why_not(monkeypatch):
    def loss(**settings):
        return ClusterNSLoss(4, 2, **settings)

    def function(x=X, **settings):
        return info_nce(x, x, **settings)

    wide = partial(function, X.to(DEVICE).double())
    refused(".*float64 is not supported; convert to float32", wide)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        refused("no GPU is available; use 'auto' or 'torch'", loss, function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused("the tensors are on cpu; move them to a GPU", function)
    monkeypatch.setattr(target, "_VERSION", (3, 2))
    refused("Triton 3.2 is installed, 3.6 is needed", loss)
    monkeypatch.setattr(target, "_INSTALLED", False)
    refused("Triton is not installed; pip install triton", loss, function)
    monkeypatch.setenv("CLUSTERNS_DISABLE_TRITON", "1")
    refused("it is switched off by CLUSTERNS_DISABLE_TRITON=1", loss, function)
