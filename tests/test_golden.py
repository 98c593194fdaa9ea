"""The recorded runs of the published loss, step by step, on every backend that runs here."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from compare import ROOM
from conftest import DEVICE

from clusterns import ClusterNSLoss, nearest_centroids
from clusterns.reference import false_negatives_of
from clusterns.rules import Mates

CASES = range(9)
NAMES = {"temperature": "tau", "start_cosine": "start", "centroid_momentum": "lr", "hard_negatives": "hard"}
NAMES |= {"hard_negative_weight": "w", "bml_weight": "lam", "bml_alpha": "alpha", "bml_beta": "beta"}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def loss_for(meta, backend):
    update = "replace" if meta["optim"] == "kmeans" else "mean" if meta["mean"] else "sum"
    settings = {name: meta[key] for name, key in NAMES.items()}
    return ClusterNSLoss(meta["D"], meta["K"], centroid_update=update, backend=backend, **settings)


def assert_close(actual, expected, tolerance, what):
    expected, actual = torch.as_tensor(expected), actual.detach().double().cpu()
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.1e} above {tolerance:.0e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("torch", torch.float64),
        ("torch", torch.float32),
        pytest.param("triton", torch.float32, marks=needs_triton),
    ],
    ids=["reference-float64", "torch-float64", "torch-float32", "triton-float32"],
)
def test_recorded_run(shared, case, backend, dtype, monkeypatch):
    with np.load(shared / "golden" / f"case{case}.npz") as archive:
        arrays = dict(archive)
    meta = {name[5:]: value.item() for name, value in arrays.items() if name.startswith("meta_")}
    device = DEVICE if backend == "triton" else "cpu"
    loss_fn = loss_for(meta, backend).to(device)
    double = dtype == torch.float64
    # A rounded logit 1/τ; some runs were recorded through numbers with fewer digits.
    tolerance = 1e-9 if double else ROOM * torch.finfo(dtype).eps * (4 + 1 / meta["tau"])
    seed = loss_fn.seed
    monkeypatch.setattr(loss_fn, "seed", lambda *views, first=None: seed(*views, first=meta["first_index"]))
    clustered_steps = 0
    for step in range(meta["T"]):
        wide = torch.tensor(arrays[f"z1_{step}"])
        z1, z2 = (
            torch.tensor(arrays[f"{name}_{step}"], dtype=dtype, device=device).requires_grad_()
            for name in ("z1", "z2")
        )
        active = bool(arrays[f"active_{step}"])
        assert loss_fn.clustering_active == active
        loss = loss_fn(z1, z2)
        loss.backward()
        assert loss.dtype == dtype
        assert bool(loss_fn.initialized) == bool(arrays[f"initialized_{step}"])
        if active:
            clustered_steps += 1
            assigned = nearest_centroids(z1, loss_fn.centroids)  # no two cosines are within 1e-5
            _, mask = false_negatives_of(Mates(), wide @ wide.T, assigned.nearest.cpu())
            assert torch.equal(mask, torch.tensor(arrays[f"false_negatives_{step}"]))
            if meta["hard"]:
                assert torch.equal(assigned.runner_up.cpu(), torch.tensor(arrays[f"runner_up_{step}"]))
        found = {"loss": loss, "grad1": z1.grad, "grad2": z2.grad, "centroids": loss_fn.centroids}
        found |= {name: loss_fn.last[name] for name in ("info_nce", "bml", "mean_cosine")}
        for name, value in found.items():
            assert_close(value, arrays[f"{name}_{step}"], tolerance, name)
    assert clustered_steps >= 2
