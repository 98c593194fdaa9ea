"""What every way to compute the objective promises: torch, Triton, and both in row chunks.

On a GPU Triton's kernels run there, else in its interpreter. What one way alone promises is in test_chunked,
test_fused and test_large.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from compare import assert_close_to_truth
from conftest import DEVICE
from objective_problems import assert_exact, exact, fix_clusters, gradients, problem

from clusterns import chunked, info_nce

WAYS = {
    "torch": {"backend": "torch"},
    "torch in cluster order": {"backend": "torch", "workspace_bytes": 3_000},
    "triton": {"backend": "triton"},
    "triton in chunks": {"backend": "triton", "workspace_bytes": 1},
}


@pytest.fixture(params=WAYS)
def how(request, monkeypatch):
    """The arguments of a way to compute the objective."""
    if "triton" in request.param:
        large = pytest.importorskip("clusterns.large")
        rows_of_a_chunk = lambda self, *_: 66 if len(self.anchors) > 66 else -(-len(self.anchors) // 3)  # noqa: E731
        monkeypatch.setattr(large.Sweeper, "_rows_of_a_chunk", rows_of_a_chunk)
    if "order" in request.param:
        monkeypatch.setattr(chunked, "_SORTED_BATCH", 1)
    return WAYS[request.param]


BML = {"false_negatives": "bml"}

# Batch, dimension, clusters, explicit negatives: on both sides of the borders of tiles (64 rows, 32 or 64
# columns, 32 or 64 dimensions, 32 clusters), with every kind of column missing once.
SHAPES = [
    (1, 2, 0, 0), (1, 3, 1, 1), (2, 90, 2, 0), (3, 8, 3, 2), (17, 16, 5, 3), (33, 17, 0, 40), (63, 31, 4, 0),
    (64, 64, 32, 32), (65, 33, 33, 17), (70, 65, 5, 0), (66, 20, 40, 2), (40, 70, 1, 33), (68, 33, 3, 1),
]  # fmt: skip
NUMBERS = itertools.product(
    [0.01, 0.024, 0.025, 0.05, 0.5, 3.0],  # τ
    [0.0, 0.7, -3.0, 25.0],  # w
    [(0.1, 0.3), (0.0, 0.2), (-0.2, 0.1), (0.25, -0.1)],
    ["bml", "exclude", "keep"],
)
CASES = list(zip(itertools.cycle(SHAPES), itertools.islice(NUMBERS, 6, None, 13)))  # a sample of the numbers


@pytest.mark.parametrize(("shape", "numbers"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_agrees_with_the_reference(how, shape, numbers):
    anchors, positives, arguments = problem(*shape, seed=sum(shape))
    temperature, weight, (alpha, beta), mode = numbers
    arguments.update(false_negatives=mode, temperature=temperature, hard_negative_weight=weight)
    arguments.update(bml_alpha=alpha, bml_beta=beta)
    fix_clusters(anchors, arguments)
    run = gradients(anchors, positives, arguments, upstream=-1.7, **how)
    assert_exact(run, exact(anchors, positives, arguments, upstream=-1.7), temperature)


SUBSETS = [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (0, 3), (1, 2), (2, 3)]


def test_partial_gradients(how):
    """What nobody needs is left out; the others stay as they are."""
    anchors, positives, arguments = problem(20, 8, 4, 3)
    fix_clusters(anchors, arguments)
    arguments.update(BML, temperature=torch.tensor(0.05, device=DEVICE, requires_grad=True))
    truth = exact(anchors, positives, arguments)[1]
    tensors = [anchors, positives, arguments["negatives"], arguments["temperature"]]
    for wanted in SUBSETS:
        a, p, n, t = leaves = [z.detach().clone().requires_grad_(i in wanted) for i, z in enumerate(tensors)]
        info_nce(a, p, **{**arguments, "negatives": n, "temperature": t}, **how).backward()
        for index, (leaf, true) in enumerate(zip(leaves, truth, strict=True)):
            assert (leaf.grad is not None) == (index in wanted), wanted
            if leaf.grad is not None:
                assert_close_to_truth(leaf.grad, true, condition=24, what=f"{index} of {wanted}")


@pytest.mark.parametrize(
    ("tau", "dtype"),
    [(0.05, torch.float32), (0.01, torch.float32), (0.03, torch.float64), (0.03, torch.float16)],
)
def test_learned_temperature(how, tau, dtype):
    anchors, positives, arguments = problem(35, 12, 6, 4)
    fix_clusters(anchors, arguments)
    arguments.update(BML, temperature=torch.tensor(tau, dtype=dtype, device=DEVICE, requires_grad=True))
    run = gradients(anchors, positives, arguments, 2.5, **how)
    assert run[1][-1].dtype == dtype
    assert_exact(run, exact(anchors, positives, arguments, 2.5), tau)


def test_centroids_get_no_gradient(how):
    anchors, positives, arguments = problem()
    arguments["centroids"].requires_grad_()
    info_nce(anchors, positives, **BML, **how, **arguments).backward()
    assert arguments["centroids"].grad is None
    assert anchors.grad is not None


def test_no_gradient_wanted(how):
    anchors, positives, arguments = problem()
    arguments.update(BML)
    fix_clusters(anchors, arguments)
    with torch.no_grad():
        quiet = info_nce(anchors, positives, **how, **arguments)
    assert not quiet.requires_grad
    assert_close_to_truth(quiet, exact(anchors, positives, arguments)[0].loss, condition=24)


def test_strided_inputs_and_int32_ids(how):
    anchors, positives, arguments = problem(20, 6)
    arguments.update(BML)
    fix_clusters(anchors, arguments)
    truth = exact(anchors, positives, arguments)
    wide = torch.zeros(20, 12, device=DEVICE)
    wide[:, ::2] = anchors.detach()
    rows = torch.full((40, 8), float("nan"), device=DEVICE)
    rows[::2, :6] = positives.detach()
    for name in ("cluster_ids", "hard_negative_ids"):
        arguments[name] = arguments[name].int()
    arguments["centroids"] = arguments["centroids"].T.contiguous().T
    for views in (
        (wide[:, ::2], rows[::2, :6]),
        [z.detach().T.contiguous().T for z in (anchors, positives)],
    ):
        a, p = (z.requires_grad_() for z in views)
        assert_exact(gradients(a, p, arguments, **how), truth)


def test_mixed_dtypes(how):
    anchors, positives, arguments = problem(20, 6, 4, 3)
    fix_clusters(anchors, arguments)
    mixed = positives.detach().bfloat16().requires_grad_()
    arguments["negatives"] = arguments["negatives"].detach().half().requires_grad_()
    run = gradients(anchors, mixed, arguments, **how)
    assert [g.dtype for g in run[1]] == [torch.float32, torch.bfloat16, torch.float16]
    assert_exact(run, exact(anchors, mixed, arguments))


def surrounded(z):
    """The same numbers inside a larger storage whose other cells are poison."""
    poison = float("nan") if z.is_floating_point() else 10**6
    around = torch.full((z.numel() + 8192,), poison, dtype=z.dtype, device=z.device)
    inside = around[4096 : 4096 + z.numel()].view(z.shape)
    inside.copy_(z.detach())
    return inside.requires_grad_(z.requires_grad)


@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
@pytest.mark.parametrize("shape", [(45, 19, 6, 4), (2, 8, 2, 1), (66, 33, 33, 34)])
def test_reads_stay_inside_the_inputs_and_every_cell_is_written(
    nan_filled_memory, how, false_negatives, shape
):
    anchors, positives, arguments = problem(*shape)
    arguments["false_negatives"] = false_negatives
    fix_clusters(anchors, arguments)
    guarded = {name: surrounded(z) if torch.is_tensor(z) else z for name, z in arguments.items()}
    run = gradients(surrounded(anchors), surrounded(positives), guarded, **how)
    assert_exact(run, exact(anchors, positives, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(how, dtype):
    """Also under autocast, which must not round the products."""
    anchors, positives, arguments = problem(34, 17, 5, 3, dtype=dtype)
    one, other = (gradients(anchors, positives, arguments, **BML, **how) for _ in range(2))
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = gradients(anchors, positives, arguments, **BML, **how)
    for again in (other, cast):
        assert torch.equal(again[0].loss, one[0].loss)
        assert all(torch.equal(x, y) for x, y in zip(again[1], one[1], strict=True))


def test_zero_rows_are_harmless(how):
    anchors, positives, arguments = problem(10, 6, 3, 4)
    with torch.no_grad():
        for z, row in ((anchors, 2), (positives, 2), (positives, 5), (arguments["negatives"], 1)):
            z[row] = 0
        arguments["centroids"][0] = 0
    run = gradients(anchors, positives, arguments, **BML, **how)
    assert not run[1][0][2].any()
    assert not run[1][1][5].any()
    assert_exact(run, exact(anchors, positives, arguments, **BML))
    for dtype in (torch.float32, torch.float16):  # not even one row with a direction
        nothing = torch.zeros(6, 4, dtype=dtype, device=DEVICE, requires_grad=True)
        loss = info_nce(nothing, nothing * 1, centroids=torch.ones(3, 4, device=DEVICE), **how)
        loss.backward()
        assert loss.isfinite()
        assert not nothing.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_show_in_the_loss(how, bad):
    """Mixed precision finds overflow by looking for it: the loss must not hide it."""
    anchors, positives, _ = problem(8, 4, 0)
    with torch.no_grad():
        anchors[3, 1] = bad
    assert not info_nce(anchors, positives, **how).isfinite()


def test_one_sentence_without_negatives_costs_nothing(how):
    anchors, positives, _ = problem(1, 4, 0)
    loss = info_nce(anchors, positives, **how)
    loss.backward()
    assert loss == 0
    assert not anchors.grad.any()


def test_loss_may_be_changed_in_place(how):
    anchors, positives, _ = problem(8, 4, 0)
    loss = info_nce(anchors, positives, **how)
    loss /= 2
    loss.backward()
    assert_close_to_truth(anchors.grad, exact(anchors, positives, {}, 0.5)[1][0], condition=24)


def test_second_derivative_is_refused(how):
    anchors, positives, _ = problem(6, 4, 0)
    loss = info_nce(anchors, positives, **how)
    line = "^create_graph: expected False, got True; only backend='reference' is twice differentiable"
    with pytest.raises(RuntimeError, match=line):
        torch.autograd.grad(loss, anchors, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"^backend: expected 'reference' within torch.func .*got '(torch|triton)"
    ):
        torch.func.grad(lambda z: info_nce(z, positives, **how))(anchors.detach())


# --- precision ---------------------------------------------------------------------------------------------


def rounding_of(how, dtype):
    """Weights are bfloat16 where Triton sweeps over half precision."""
    in_chunks = how["backend"] == "triton" and "workspace_bytes" in how
    return torch.finfo(torch.bfloat16).eps if in_chunks and dtype.itemsize == 2 else 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
def test_half_precision_is_accumulated_in_float32(how, dtype, false_negatives):
    anchors, positives, arguments = problem(66, 20, 4, 2, dtype=dtype)
    arguments["centroids"] = arguments["centroids"].float() * 1.001  # float32 centroids stay float32
    arguments.update(false_negatives=false_negatives, hard_negative_weight=0.4, temperature=0.01)
    fix_clusters(anchors, arguments)
    run = gradients(anchors, positives, arguments, **how)
    assert run[0].loss.dtype == torch.float32
    assert [g.dtype for g in run[1]] == [dtype] * 3
    assert_exact(run, exact(anchors, positives, arguments), 0.01, rounding=rounding_of(how, dtype))


def test_loss_scale_saves_float16_gradients(how):
    """The gradient is scaled before it is rounded to float16, so a loss scale works."""
    anchors, positives, _ = problem(64, 32, 0, dtype=torch.float16)
    scale = 2.0**12
    loss = info_nce(anchors, positives, temperature=1.0, **how) * 1e-4 * scale
    grad = torch.autograd.grad(loss, anchors)[0]
    truth = exact(anchors, positives, {"temperature": 1.0}, 1e-4 * scale)[1][0]
    assert_close_to_truth(grad, truth, rounding=rounding_of(how, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 8, 300])
def test_narrow_and_wide(how, dim, dtype):
    anchors, positives, arguments = problem(20, dim, 5, 3, dtype=dtype)
    arguments.update(BML, centroids=arguments["centroids"].float())
    fix_clusters(anchors, arguments)
    terms, grads = gradients(anchors, positives, arguments, **how)
    truth = exact(anchors, positives, arguments)
    if dim == 1:  # a direction cannot change: no gradient but rounding
        assert all(gradient.isfinite().all() for gradient in grads)
        grads, truth = [], (truth[0], [])
    assert_exact((terms, grads), truth, rounding=rounding_of(how, dtype))


def test_well_separated_batches_keep_their_small_gradients(how):
    """Where the positive takes nearly all the weight, loss and gradient are tiny, not rounding noise."""
    anchors = torch.eye(32, 40, device=DEVICE) + 0.01 * torch.randn(32, 40, device=DEVICE)
    positives = anchors + 0.01 * torch.randn(32, 40, device=DEVICE)
    views = [z.detach().clone().requires_grad_() for z in (anchors, positives)]
    run, truth = gradients(*views, {}, **how), exact(*views, {})
    assert 0 < truth[0].loss < 1e-6
    assert_exact(run, truth)
    assert_close_to_truth(run[0].loss, truth[0].loss, condition=24)


def test_very_negative_weight_of_the_own_centroid(how):
    """A centroid used once has e^w in its sentence's denominator, also where that underflows."""
    anchors, positives, arguments = problem(8, 6, 8)
    with torch.no_grad():
        arguments["centroids"].copy_(anchors)
        positives.copy_(-anchors + 0.5 * torch.randn_like(anchors))
    ids = torch.arange(8, device=DEVICE)
    arguments.update(hard_negative_weight=-95.0, temperature=0.02, hard_negative_ids=ids, cluster_ids=ids)
    run = gradients(anchors, positives, arguments, **how)
    assert_exact(run, exact(anchors, positives, arguments), 0.02, condition=95)
