"""What only a GPU can show: no wait in the steady state, CUDA graphs, real half-precision products.

The other kernel tests run there too, on the GPU instead of the interpreter.
"""

from __future__ import annotations

import pytest
import torch
from objective_problems import eager_half, errors, exact, fix_clusters, gradients, problem

from clusterns import ClusterNSLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def active_loss(dim, clusters, **arguments):
    loss_fn = ClusterNSLoss(dim, clusters, **arguments).cuda()
    loss_fn.start_from(torch.randn(clusters, dim))
    return loss_fn


def views(batch, dim, dtype=torch.float32, seed=0):
    return problem(batch, dim, 0, dtype=dtype, seed=seed)[:2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", ["sum", "mean", "replace", "adamw"])
def test_the_steady_state_never_waits(dtype, update):
    loss_fn = active_loss(96, 12, centroid_update=update)
    anchors, positives = views(128, 96, dtype)
    loss_fn(anchors, positives).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            anchors.grad = positives.grad = None
            loss_fn(anchors, positives).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss_fn.last["loss"].isfinite()


@pytest.mark.parametrize(
    ("dtype", "batch", "dim"), [*((dtype, 96, 64) for dtype in DTYPES), (torch.bfloat16, 2048, 768)]
)
def test_cuda_graph(dtype, batch, dim):
    """A captured step follows new data and moves the centroids as an eager one does."""
    captured, eager = active_loss(dim, 16), active_loss(dim, 16)
    eager.load_state_dict(captured.state_dict())
    start = {name: value.clone() for name, value in captured.state_dict().items()}
    anchors, positives = views(batch, dim, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(captured(anchors, positives), (anchors, positives))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured(anchors, positives)
        grads = torch.autograd.grad(loss, (anchors, positives))
    captured.load_state_dict(start)
    for seed in range(4):
        fresh = views(batch, dim, dtype, seed=seed + 1)
        with torch.no_grad():
            anchors.copy_(fresh[0])
            positives.copy_(fresh[1])
        graph.replay()
        expected = eager(*fresh)
        found, truth = (loss, *grads), (expected, *torch.autograd.grad(expected, fresh))
        assert all(map(torch.equal, (*found, captured.centroids), (*truth, eager.centroids)))


@pytest.mark.parametrize(
    ("dtype", "batch", "dim"), [*((dtype, 96, 64) for dtype in DTYPES), (torch.bfloat16, 2048, 768)]
)
@pytest.mark.parametrize("update", ["sum", "adamw"])
def test_capture(dtype, batch, dim, update, monkeypatch):
    """Loss, terms, gradients and centroids of the graphs are those of the launches, and stay the caller's."""
    captured, eager = (active_loss(dim, 16, centroid_update=update) for _ in range(2))
    captured.load_state_dict(eager.state_dict())
    captured.capture(*views(batch, dim, dtype))
    assert torch.equal(captured.centroids, eager.centroids)
    found = []
    for loss_fn in (captured, eager):
        for seed in range(4):
            fresh = views(batch, dim, dtype, seed=seed + 1)
            loss = loss_fn(*fresh)
            grads = torch.autograd.grad(loss * (1 + seed), fresh)
            found.append((loss, *grads, *loss_fn.last.values(), *(z.clone() for z in loss_fn.buffers())))
    assert captured._captured.number == 5  # with that of the capture: each was a replay
    for mine, theirs in zip(found[:4], found[4:], strict=True):
        assert all(map(torch.equal, mine, theirs))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured(*fresh)
    assert captured._captured.number == 5  # in a graph of the user's own the launches are recorded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim"), [(256, 768), (1500, 384), (2048, 1024), (300, 4096), (512, 8)])
def test_as_exact_as_plain_torch_at_real_sizes(dtype, batch, dim):
    anchors, positives, arguments = problem(batch, dim, 96, dtype=dtype)
    negatives = positives.detach()[:64].clone().requires_grad_()  # so near that they get a gradient
    arguments.update(negatives=negatives, false_negatives="bml", temperature=0.05)
    arguments["centroids"] = arguments["centroids"].float()
    fix_clusters(anchors, arguments)
    scale = 1024.0  # as for float16, which has no numbers as small as the gradients
    truth = exact(anchors, positives, arguments, scale)
    ours = errors(gradients(anchors, positives, arguments, scale, backend="triton"), truth)
    if dtype == torch.float32:
        eager = errors(gradients(anchors, positives, arguments, scale, backend="reference"), truth)
        assert (ours <= 4 * eager + torch.finfo(dtype).eps / 0.05).all(), (ours, eager)
    else:
        plain = exact(anchors, positives, {"temperature": 0.05}, scale)
        mine = gradients(anchors, positives, {"temperature": 0.05}, scale, backend="triton")
        theirs = torch.autograd.grad(eager_half(anchors, positives, 0.05) * scale, (anchors, positives))
        for x, y, true in zip(mine[1], theirs, plain[1], strict=True):
            assert (x.double() - true).norm() <= (y.double() - true).norm()
        assert (ours[5:] <= 4 * torch.finfo(dtype).eps).all(), ours


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_follows_the_matmul_precision(precision):
    anchors, positives, _ = problem(512, 768, 0)
    truth = exact(anchors, positives, {})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        runs = [gradients(anchors, positives, {}, backend=word) for word in ("triton", "reference")]
    finally:
        torch.set_float32_matmul_precision(before)
    ours, eager = (errors(run, truth) for run in runs)
    # A GPU cuts float32 factors to tf32, 10 bits, where another kernel may round them.
    rounding = torch.finfo(torch.float32).eps / 0.05 if precision == "highest" else 2**-9
    assert (ours <= 4 * eager + rounding).all(), (ours, eager)
    if precision != "highest":
        assert ours[5:].max() > 1e-5  # tf32 was used


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype):
    anchors, positives, arguments = problem(1000, 768, 128, 50, dtype=dtype)
    arguments["centroids"] = arguments["centroids"].float()
    arguments["false_negatives"] = "bml"
    runs = [gradients(anchors, positives, arguments, backend="triton") for _ in range(20)]
    for terms, grads in runs[1:]:
        assert all(map(torch.equal, (terms.loss, *grads), (runs[0][0].loss, *runs[0][1])))


def test_inductor_compiles_the_step_whole():
    plain, whole = active_loss(64, 16), active_loss(64, 16)
    whole.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    fast = torch.compile(whole, fullgraph=True)
    for batch in (96, 97):
        anchors, positives = views(batch, 64)
        mine, theirs = (
            torch.autograd.grad(f(anchors, positives), (anchors, positives)) for f in (fast, plain)
        )
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(plain.centroids, whole.centroids)
