"""`torch.compile` on the CPU: loss, gradients and centroids are those of the eager loss, in every state."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import embeddings

from clusterns import ClusterNSLoss, cosine_similarity_matrix, nearest_centroids
from clusterns.functional import objective
from clusterns.objective.problem import Batch

DIM, CLUSTERS = 32, 4
TOLERANCE = 2e-5  # of the norm in float64, for float32

COMPILERS = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
COMPILES = any(map(shutil.which, COMPILERS)) and Path(sysconfig.get_path("include"), "Python.h").exists()
inductor = pytest.mark.skipif(not COMPILES, reason="inductor needs a C++ compiler and Python.h")


@pytest.fixture(autouse=True)
def _compiles_afresh(one_thread):
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):  # else it starts a pool of processes
        yield
    torch._dynamo.reset()


def loss_in(state: str, dtype: torch.dtype, learned: bool, **settings) -> ClusterNSLoss:
    """A loss before the start of clustering, on the step of it, after it, evaluating, or without clusters."""
    tau = torch.nn.Parameter(torch.tensor(0.05, dtype=dtype)) if learned else 0.05
    settings |= {"hard_negatives": state != "none", "start_cosine": -1.0 if state == "before" else 1.0}
    settings |= {"temperature": tau, "centroid_momentum": 0.1, "bml_weight": 0.3}
    loss_fn = ClusterNSLoss(DIM, 0 if state == "none" else CLUSTERS, **settings)
    if state in ("active", "eval"):
        loss_fn.start_from(embeddings(CLUSTERS, DIM, dtype=dtype, seed=9)[0].detach())
    return loss_fn.train(state != "eval")


def views_of(batch: int, negatives: int, dtype: torch.dtype) -> list[torch.Tensor]:
    views = list(embeddings(batch, DIM, dtype=dtype, seed=batch))
    return views + ([embeddings(negatives, DIM, dtype=dtype, seed=7)[0]] if negatives else [])


def step(function, loss_fn: ClusterNSLoss, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a step finds; another term is added, so that a loss without a gradient would go unnoticed."""
    torch.manual_seed(0)  # for the first pick of the centroids
    loss = function(*views)
    other = sum(view.square().mean() for view in views)
    found = dict(loss_fn.last) | {"loss": loss.detach(), "centroids": loss_fn.centroids.clone()}
    gradients = torch.autograd.grad(loss + other, (*views, *loss_fn.parameters()), allow_unused=True)
    return found | {f"gradient {place}": gradient for place, gradient in enumerate(gradients)}


@pytest.mark.parametrize(
    ("backend", "fullgraph", "state", "false_negatives", "batches", "more", "directions"),
    [
        ("aot_eager", True, "active", "bml", (8, 8, 5), True, "one"),
        ("eager", True, "active", "keep", (8, 5), True, "one"),
        ("aot_eager", True, "eval", "exclude", (8, 5), True, "both"),
        ("eager", True, "none", "keep", (8, 5), False, "both"),
        ("eager", False, "before", "bml", (8, 5), True, "one"),
        ("eager", False, "start", "exclude", (8, 8, 5), True, "both"),
        pytest.param("inductor", False, "start", "exclude", (8, 8, 5), False, "one", marks=inductor),
        # From its cache.
        pytest.param("inductor", True, "active", "exclude", (8,), False, "one", marks=inductor),
        pytest.param("inductor", True, "none", "keep", (8,), True, "one", marks=inductor),
    ],
)
def test_compiled_loss_is_the_eager_loss(
    backend, fullgraph, state, false_negatives, batches, more, directions
):
    """Compiled in float32 against eager in float64; `more`: with negatives and a learned temperature."""
    plain, loss_fn = (
        loss_in(state, dtype, more, false_negatives=false_negatives, directions=directions)
        for dtype in (torch.float64, torch.float32)
    )
    compiled = torch.compile(loss_fn, backend=backend, fullgraph=fullgraph)
    for batch in batches:
        expected = step(plain, plain, views_of(batch, 3 * more, torch.float64))
        found = step(compiled, loss_fn, views_of(batch, 3 * more, torch.float32))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] is not None, (name, "has no gradient")
            error = (found[name].double() - value).norm() / value.norm().clamp_min(1e-3)
            assert error <= TOLERANCE, (name, batch, float(error))
    assert loss_fn.clustering_active == plain.clustering_active == (state not in ("before", "none"))


@inductor
def test_reference_keeps_its_gradient():
    """All terms come back; where the margin loss is 0, loss and InfoNCE are one number."""
    views = views_of(8, 0, torch.float64)

    def terms(function):
        found = function(Batch(*views), "reference")
        return found[:5], torch.autograd.grad(found.loss, views)

    found = terms(torch.compile(objective, backend="inductor", fullgraph=True))
    assert [term.requires_grad for term in found[0]] == [True, False, False, False, False]
    torch.testing.assert_close(found, terms(objective), rtol=1e-9, atol=1e-9)


def test_functions():
    anchors, positives = views_of(8, 0, torch.float64)

    def both(a, b):
        return cosine_similarity_matrix(a, b, 0.5), nearest_centroids(a, b[:3])

    found = torch.compile(both, backend="aot_eager", fullgraph=True)(anchors, positives)
    expected = both(anchors, positives)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(each[0].square().sum(), anchors)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_within_torch_func_only_the_reference_is_compiled():
    """The others have no formula there: the compiler took their gradient for 0."""
    anchors, positives = (view.detach() for view in views_of(8, 0, torch.float64))

    def gradient(word):
        loss = lambda z: objective(Batch(z, positives), word).loss  # noqa: E731
        return torch.func.grad(loss)(anchors)

    compiled = torch.compile(gradient, backend="aot_eager")
    torch.testing.assert_close(compiled("reference"), gradient("reference"))
    with pytest.raises(RuntimeError, match="backend: expected 'reference' within torch.func"):
        compiled("torch")


def test_whole_graph_before_the_start_is_refused_in_one_line():
    loss_fn = loss_in("before", torch.float32, False)
    anchors, positives = views_of(8, 0, torch.float32)
    compiled = torch.compile(loss_fn, backend="eager", fullgraph=True)
    line = "fullgraph: expected clustering_active, .* run the steps up to the start without fullgraph=True"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=line):
        compiled(anchors, positives)
    loss_fn.seed(anchors, positives)
    assert compiled(anchors, positives).requires_grad


@pytest.mark.parametrize(
    ("dtypes", "transposed", "learned"),
    [
        ((torch.float64, torch.float64, None), True, True),
        ((torch.float16, torch.bfloat16, torch.float32), True, False),
        ((torch.float32, torch.float32, torch.float64), False, True),
    ],
)
def test_operator_is_well_defined(dtypes, transposed, learned):
    a, p, n = (
        None if dtype is None else embeddings(6, DIM, seed=seed)[0].detach().to(dtype)
        for seed, dtype in enumerate(dtypes)
    )
    if transposed:
        a = a.T.contiguous().T
    ids, hard = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([1, 2, 0, 2, 1, 1])
    centroids = embeddings(3, DIM, seed=5)[0].detach().float()
    tau = torch.tensor(0.1) if learned else None
    options = (0.2, "bml", 0.3, 0.1, 0.3, 3000, "both" if learned else "one")
    needs = [True, True, n is not None, learned]
    torch.library.opcheck(
        torch.ops.clusterns.sweep.default, (a, p, n, 0.1, tau, ids, centroids, hard, *options, needs, "torch")
    )


def test_picks_of_the_seeding_are_not_compiled():
    """Each would be a few operations of the graph: with many clusters minutes of compilation for one step."""
    loss_fn = ClusterNSLoss(DIM, 60, start_cosine=1.0)
    torch._dynamo.utils.counters.clear()
    torch.compile(loss_fn, backend="eager")(*views_of(64, 0, torch.float32)).backward()
    assert loss_fn.clustering_active
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] < 60
