"""What every way to compute the objective promises: torch, Triton, and both in row chunks.

On a GPU Triton's kernels run there, else in its interpreter.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from compare import assert_close_to_truth
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_problems import OPTIONS, assert_exact, exact, fix_clusters, gradients, problem, terms_of, widen

from clusterns import ClusterNSLoss, info_nce, reference
from clusterns.functional import ObjectiveTerms
from clusterns.objective import torch_products
from clusterns.objective.problem import Batch, Clusters, Options
from clusterns.objective.sweep import sweep
from clusterns.rules import CloseMates, Decision, GuidedMargin

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
        pytest.importorskip("triton")
        from clusterns.objective.triton_products import TritonProducts

        def a_third(self, *_):
            rows = len(self.anchors)
            return 66 if rows > 66 else -(-rows // 3)

        monkeypatch.setattr(TritonProducts, "_chunk", a_third)
    if "order" in request.param:
        monkeypatch.setattr(torch_products, "_SORTED_BATCH", 1)
        # And as on a GPU, where to count the pairs that are held would be to wait.
        monkeypatch.setattr(torch_products, "_FEW", 10**9)
    return WAYS.get(request.param, {"backend": request.param})


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


@pytest.mark.parametrize(
    ("false_negatives", "shape"),
    [
        ("bml", (45, 19, 6, 4)), ("bml", (2, 8, 2, 1)), ("bml", (66, 33, 33, 34)),
        ("exclude", (45, 19, 6, 4)), ("keep", (2, 8, 2, 1)),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize(
    ("dtype", "false_negatives"),
    [(torch.float16, "bml"), (torch.bfloat16, "bml"), (torch.float16, "exclude"), (torch.bfloat16, "keep")],
)
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


# --- one way alone -----------------------------------------------------------------------------------------

DOUBLE = {"dtype": torch.float64}


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.tuples(st.integers(1, 40), st.integers(1, 33), st.integers(0, 9), st.integers(0, 7)),
    st.sampled_from(["bml", "exclude", "keep"]),
    st.sampled_from([(1, 1), (3000, 1024), (2**20, 1024), (3000, 1)]),
)
def test_torch_in_float64(data, shape, false_negatives, sizes):
    anchors, positives, arguments = problem(*shape, seed=data.draw(st.integers(0, 1000)), **DOUBLE)
    fix_clusters(anchors, arguments)
    arguments["directions"] = data.draw(st.sampled_from(["one", "both"]))
    temperature = data.draw(st.sampled_from([0.01, 0.024, 0.025, 0.05, 0.5, 3.0]))
    margins = data.draw(st.sampled_from([(0.1, 0.3), (0.0, 0.2), (-0.2, 0.1), (0.25, -0.1)]))
    arguments.update(bml_alpha=margins[0], bml_beta=margins[1], temperature=temperature)
    arguments.update(hard_negative_weight=data.draw(st.sampled_from([0.0, 0.7, -3.0, 25.0])))
    arguments.update(false_negatives=false_negatives, workspace_bytes=sizes[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_products, "_SORTED_BATCH", sizes[1])
        run = gradients(anchors, positives, arguments, -1.7, backend="torch")
    # By size of a number, not by norm of what may all but vanish.
    truth = gradients(anchors, positives, arguments, -1.7, backend="reference")
    for one, other in zip((*run[0][:5], *run[1]), (*truth[0][:5], *truth[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9 * max(1.0, 0.05 / temperature))


@pytest.mark.parametrize("false_negatives", ["bml", "exclude", "keep"])
def test_gradcheck(false_negatives):
    anchors, positives, arguments = problem(9, 4, 3, 5, **DOUBLE)
    temperature = torch.tensor(0.3, device=DEVICE, requires_grad=True, **DOUBLE)
    arguments.update(false_negatives=false_negatives, hard_negative_weight=0.4)
    negatives = arguments.pop("negatives")
    # The clusters are fixed: a finite difference across a change of cluster would mean nothing.
    fix_clusters(anchors, arguments)

    def loss(a, p, n, t):
        return info_nce(a, p, negatives=n, temperature=t, backend="torch", **arguments)

    assert torch.autograd.gradcheck(loss, (anchors, positives, negatives, temperature))


@pytest.mark.parametrize("directions", ["one", "both"])
def test_never_builds_a_square_matrix(directions):
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
    anchors, positives, arguments = problem(batch, dim, 3)
    ids = torch.zeros(batch, dtype=torch.int64, device=DEVICE)  # the worst case: all mates
    arguments.update(cluster_ids=ids, false_negatives="bml", backend="torch", workspace_bytes=workspace)
    arguments["directions"] = directions
    with Largest() as largest:
        info_nce(anchors, positives, **arguments).backward()
    assert largest.numbers <= max(workspace // 4, 2 * batch * dim)


def test_whole_batches_keep_no_more_than_the_cosines():
    """The backward holds on to the size of the cosines, a row for every few of theirs, and vectors."""
    pytest.importorskip("triton")
    anchors, positives, arguments = problem(128, 8, 16, 40)
    held = 0

    def pack(tensor):
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        info_nce(anchors, positives, false_negatives="bml", backend="triton", **arguments)
    cosines = 4 * 128 * (128 + 40 + 16)
    inputs = sum(z.numel() * 4 for z in (anchors, positives, arguments["negatives"], arguments["centroids"]))
    assert cosines < held <= cosines * 1.25 + inputs + 4 * 128 * 40
    from clusterns.kernels import objective_launchers, target

    x, centroids = (torch.empty(rows, 8, device="meta") for rows in (4096, 16))
    with target.assume(target.Target("cuda", 90)):  # "meta" is no GPU
        length = objective_launchers.workspace_length(
            (x, x, None, centroids, *[None] * 3), (True, True, True, "", "bml")
        )
    assert 4 * 4096 * 4096 < length <= 4 * (4096 * (4096 + 16) * (1 + 1 / 8) + 4096 * 20)


def test_float16_gradients_of_rows_of_very_different_length():
    """Weights are folded with 1/‖z‖: neither a short nor a long row may overflow or vanish."""
    pytest.importorskip("triton")
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
        assert ((mine.double() - true).norm(dim=1) / true.norm(dim=1)).max() < 0.01
    with torch.no_grad():  # nor may one tiny row spoil the others
        positives[3] = 1e-6
    mine, true = (f(anchors, positives, arguments)[1][0].double() for f in (gradients_on_triton, exact))
    assert ((mine - true).norm(dim=1) / true.norm(dim=1)).median() < 2e-3


def gradients_on_triton(*arguments):
    return gradients(*arguments, backend="triton")


def margins_found(rows, dim, clusters, temperature):
    """What the margin loss adds to the gradient of the anchors, and what it should."""
    pytest.importorskip("triton")
    anchors, positives, _ = problem(rows, dim, 0, dtype=torch.float16)
    clusters = Clusters(torch.arange(rows, device=DEVICE) % clusters)
    more = {**OPTIONS, "bml_weight": 1e-2}
    found, truth = [], []
    for mode in ("bml", "keep"):
        options = Options(false_negatives=mode, workspace_bytes=15_000, **more)
        needs, views = (True, False, False, False), (anchors.detach(), positives.detach())
        result = sweep(Batch(*views, None, temperature, clusters, options), needs, "triton-chunked")
        found.append(result.gradients[0].double())  # of float16 in float32, to be rounded when it is scaled
        fixed = {"cluster_ids": clusters.ids, "false_negatives": mode, "temperature": temperature, **more}
        truth.append(exact(anchors, positives, fixed)[1][0])
    pull = truth[0] - truth[1]
    assert pull.norm() < 0.1 * truth[0].norm()
    return found[0] - found[1], pull


def test_margins_are_not_lost_in_half_precision():
    """λ/B² beside E/Z: were the slopes added to the bfloat16 weights, they would round away."""
    found, pull = margins_found(64, 32, 8, 0.05)
    assert (found - pull).norm() <= 0.01 * pull.norm()


def test_margins_of_a_cluster_of_all_are_not_lost():
    """There they are added to the weights, of whose last digit they are a part: on average they are kept."""
    found, pull = margins_found(128, 8, 1, 1.0)
    kept = (found * pull).sum() / pull.square().sum()
    assert abs(kept - 1) < 0.05


@pytest.mark.parametrize("how", ["triton in chunks"], indirect=True)
def test_margins_of_many_columns_and_few_rows(how, monkeypatch):
    """A chunk meets three clusters: more tiles of columns than programs, and programs share a row's mates."""
    from clusterns.objective.triton_products import TritonProducts

    monkeypatch.setattr(TritonProducts, "_chunk", lambda *_: 60)
    anchors, positives, arguments = problem(400, 8, 8)
    fix_clusters(anchors, arguments)
    arguments.update(BML, cluster_ids=torch.arange(400, device=DEVICE) % 8, bml_weight=20.0)
    assert_exact(gradients(anchors, positives, arguments, **how), exact(anchors, positives, arguments))


def test_the_workspace_decides_the_chunks(monkeypatch):
    pytest.importorskip("triton")
    from clusterns.objective import triton_products

    anchors, positives, arguments = problem(70, 24, 5)
    seen, true_weigh = [], triton_products.launchers.weigh

    def weigh(mode, chunk, **more):
        seen.append((mode, len(chunk["x"])))
        return true_weigh(mode, chunk, **more)

    monkeypatch.setattr(triton_products.launchers, "weigh", weigh)
    gradients(anchors, positives, arguments, backend="triton", workspace_bytes=15_000)
    assert {mode for mode, _ in seen} == {"weights"}
    assert max(rows for _, rows in seen) * 70 * 4 < 15_000
    seen.clear()
    with torch.no_grad():
        terms_of(anchors, positives, **arguments, backend="triton", workspace_bytes=15_000)
    assert {mode for mode, _ in seen} == {"totals"}  # no weights are written for nobody


# --- rules for false negatives -----------------------------------------------------------------------------


def by_hand(pairs):
    """Near mates are held, far mates are out, and so is one pair that this function itself knows."""
    near = pairs.cosines > 0.6
    i, j = pairs.places
    known = (i == 3) & (j == 7)
    return Decision(out=(pairs.same_cluster & ~near) | known, held=pairs.same_cluster & near)


@pytest.mark.parametrize(
    ("rule", "directions"),
    [
        *((each, "one") for each in (CloseMates(), CloseMates("exclude"), GuidedMargin(0.1), by_hand)),
        *((each, "both") for each in (CloseMates("exclude"), GuidedMargin(0.1))),
    ],
    ids=lambda rule: getattr(rule, "__name__", str(rule)),
)
def test_rules(how, rule, directions, recwarn):
    anchors, positives, arguments = problem(66, 20, 6, 3, **DOUBLE)
    fix_clusters(anchors, arguments)
    arguments.update(false_negatives=rule, bml_weight=5.0, directions=directions)
    if how["backend"] == "triton":  # float64 is refused there; the torch path serves, which is said
        anchors, positives = (z.detach().float().requires_grad_() for z in (anchors, positives))
        arguments.update({name: arguments[name].detach().float() for name in ("centroids", "negatives")})
        arguments["negatives"].requires_grad_()
    run, truth = gradients(anchors, positives, arguments, **how), exact(anchors, positives, arguments)
    assert_exact(run, truth)
    for word in ("bml", "exclude", "keep"):  # and it is none of the three
        other = exact(anchors, positives, {**arguments, "false_negatives": word})
        assert (truth[1][0] - other[1][0]).norm() > 1e-4 * truth[1][0].norm()


# --- both directions ---------------------------------------------------------------------------------------

BOTH_DIRECTIONS = pytest.mark.parametrize(
    "how", ["torch", "torch in cluster order", "reference", "triton in chunks"], indirect=True
)


def in_both_directions(anchors, positives, arguments, out=None, held=None):
    """Terms and gradients in float64 by cross-entropies; `out` and `held`: (B, B) bool."""
    cross_entropy, unit = torch.nn.functional.cross_entropy, reference.unit
    wide = widen({"anchors": anchors, "positives": positives, **arguments})
    a, p = unit(wide["anchors"]), unit(wide["positives"])
    S, tau, labels = a @ p.T, wide["temperature"], torch.arange(len(a), device=DEVICE)
    logits = S / tau if out is None else (S / tau).masked_fill(out, -torch.inf)
    columns = [logits]
    if "negatives" in wide:
        columns.append(a @ unit(wide["negatives"]).T / tau)
    if "hard_negative_ids" in wide:
        hard = a @ unit(wide["centroids"])[wide["hard_negative_ids"]].T / tau
        own = torch.eye(len(a), dtype=S.dtype, device=DEVICE)
        columns.append(hard + wide.get("hard_negative_weight", 0.0) * own)
    info_nce = (cross_entropy(torch.cat(columns, dim=1), labels) + cross_entropy(logits.T, labels)) / 2
    bml = S.new_zeros(())
    if held is not None:
        delta = (S - S.diagonal()[:, None]) * held
        bml = ((delta + OPTIONS["bml_alpha"]).relu() + (-delta - OPTIONS["bml_beta"]).relu()).mean()
    loss = info_nce + arguments["bml_weight"] * bml
    leaves = [each for each in wide.values() if torch.is_tensor(each) and each.requires_grad]
    terms = ObjectiveTerms(loss, info_nce, bml, S.mean(), S.diagonal().mean())
    return terms, torch.autograd.grad(loss, leaves)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("false_negatives", ["keep", "exclude", "bml", by_hand])
@pytest.mark.parametrize(
    ("shape", "tau", "weight", "learned"),
    [
        ((1, 3, 0, 0), 0.05, 0.0, False),
        ((1, 3, 2, 2), 0.5, 0.7, True),
        ((33, 17, 5, 3), 0.05, 0.7, False),
        ((66, 20, 6, 0), 0.05, -0.7, True),
        ((70, 33, 3, 40), 0.005, 0.0, False),
        ((40, 8, 4, 5), 0.005, 0.7, True),
    ],
)
def test_both_directions(how, shape, tau, weight, learned, false_negatives):
    """The mean of both cross-entropies, with every kind of column and pair."""
    if how["backend"] == "triton" and (false_negatives not in ("exclude", "bml") or shape[0] in (1, 66)):
        pytest.skip("a rule is torch's, and the interpreter slow")
    dtype = torch.float32 if how["backend"] == "triton" else torch.float64
    anchors, positives, arguments = problem(*shape, dtype=dtype)
    fix_clusters(anchors, arguments)
    cosines = reference.cosine_similarity_matrix(anchors.detach().double(), positives.detach().double())
    out = held = None
    if "cluster_ids" in arguments and false_negatives != "keep":
        arguments["false_negatives"] = false_negatives
        ids = arguments["cluster_ids"]
        mates = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool, device=DEVICE)
        out, held = (mates if false_negatives == word else None for word in ("exclude", "bml"))
        if false_negatives is by_hand:
            out, held = mates & (cosines <= 0.6), mates & (cosines > 0.6)
            out[3:4, 7:8] = True
    arguments.update(temperature=tau, hard_negative_weight=weight)
    if learned:
        arguments["temperature"] = torch.tensor(tau, dtype=dtype, device=DEVICE, requires_grad=True)
    truth = in_both_directions(anchors, positives, arguments, out, held)
    assert_exact(gradients(anchors, positives, arguments, directions="both", **how), truth, tau)
    with torch.no_grad():
        quiet = terms_of(anchors, positives, **arguments, directions="both", **how).loss
    assert_close_to_truth(quiet, truth[0].loss, condition=4 + 1 / tau, least=1.0)


@BOTH_DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_directions_in_lower_precision(how, dtype):
    """Also each gradient alone, with rows that are zero, and with one that is no numbers."""
    if how["backend"] == "triton" and dtype == torch.float32:
        pytest.skip("as above, and the interpreter is slow")
    anchors, positives, arguments = problem(66, 20, 4, 2, dtype=dtype)
    arguments.update(BML, centroids=arguments["centroids"].float(), temperature=0.02)
    with torch.no_grad():
        anchors[2], positives[5] = 0, 0
    fix_clusters(anchors, arguments)
    ids = arguments["cluster_ids"]
    mates = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool, device=DEVICE)
    truth = in_both_directions(anchors, positives, arguments, held=mates)
    views = (anchors, positives, arguments["negatives"])
    run = gradients(anchors, positives, arguments, directions="both", **how)
    assert_exact(run, truth, 0.02, rounding=rounding_of(how, dtype))
    for wanted, true in enumerate(truth[1]):
        leaves = [z.detach().requires_grad_(place == wanted) for place, z in enumerate(views)]
        info_nce(*leaves[:2], **{**arguments, "negatives": leaves[2]}, directions="both", **how).backward()
        assert [leaf.grad is not None for leaf in leaves] == [place == wanted for place in range(3)]
        more = {"rounding": rounding_of(how, dtype), "dtype": torch.float32}
        assert_close_to_truth(leaves[wanted].grad, true, condition=54, **more)
    with torch.no_grad():
        anchors[3, 1] = torch.inf
    assert not info_nce(anchors, positives, directions="both", **how).isfinite()


def test_rules_decide_as_they_say():
    anchors, positives, arguments = problem(30, 6, 4, **DOUBLE)
    fix_clusters(anchors, arguments)
    a, p, c = (z / z.norm(dim=1, keepdim=True) for z in (anchors, positives, arguments["centroids"]))
    S, ids = a @ p.T, arguments["cluster_ids"]
    others = ~torch.eye(30, dtype=torch.bool, device=DEVICE)
    own_centroid = (a * c[ids]).sum(1, keepdim=True)
    guided = (S.diagonal()[:, None] - 0.1 < S) & others
    close = (ids[:, None] == ids) & (own_centroid < S) & others
    for rule, out in ((GuidedMargin(0.1), guided), (CloseMates("exclude"), close)):
        assert 0 < out.sum() < others.sum()
        logits = (S / 0.05).masked_fill(out, -torch.inf)
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(30, device=DEVICE))
        for backend in ("torch", "reference"):
            clusters = Clusters(ids, nearest_cosine=own_centroid[:, 0])
            batch = Batch(anchors, positives, None, 0.05, clusters, Options(false_negatives=rule))
            found = sweep(batch, (False,) * 4, "torch")
            torch.testing.assert_close(found.loss, expected)
            if not isinstance(rule, CloseMates):
                found = info_nce(anchors, positives, false_negatives=rule, backend=backend)
                torch.testing.assert_close(found, expected)
    with pytest.raises(
        ValueError, match=r"^centroids: expected those of the clusters for this rule, got None"
    ):
        info_nce(anchors, positives, cluster_ids=ids, false_negatives=CloseMates())
    nothing = r"^false_negatives: expected clusters beside a rule .* got none for CloseMates"
    with pytest.raises(ValueError, match=nothing):
        info_nce(anchors, positives, false_negatives=CloseMates())
    with pytest.raises(ValueError, match=nothing):
        ClusterNSLoss(6, 0, false_negatives=CloseMates())
    ClusterNSLoss(6, 0, false_negatives=GuidedMargin())
    if DEVICE == "cpu":  # on a GPU nobody looks, which would be to wait
        arguments["cluster_ids"] = ids * 0 + 9
        with pytest.raises(ValueError, match=r"^cluster_ids: expected ids in \[0, 4\), got 9"):
            info_nce(anchors, positives, **arguments, false_negatives=CloseMates())
    with pytest.raises(ValueError, match=r"^false_negatives: expected one of .* or a function of"):
        info_nce(anchors, positives, false_negatives="drop")


def test_a_compiler_leaves_a_rule_to_python():
    anchors, positives, arguments = problem(20, 6, 4, **DOUBLE)
    fix_clusters(anchors, arguments)
    arguments.update(false_negatives=CloseMates(), backend="torch", bml_weight=5.0)
    found = [
        torch.autograd.grad(function(anchors, positives, **arguments), (anchors, positives))
        for function in (info_nce, torch.compile(info_nce, backend="aot_eager"))
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_rules_may_broadcast_and_use_autograd():
    anchors, positives, _ = problem(12, 5, 0, **DOUBLE)
    threshold = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def rule(pairs):
        with torch.enable_grad():
            (threshold - pairs.cosines.mean()).square().backward()
        return None, pairs.positive < threshold  # (R, 1)

    rule.needs_clusters = False
    more = {"false_negatives": rule, "bml_weight": 9.0}
    found = [info_nce(anchors, positives, backend=each, **more) for each in ("torch", "reference")]
    torch.testing.assert_close(*found)
    assert threshold.grad is not None
    for bad, error, words in (
        (lambda _: 3, TypeError, "expected a rule that gives a Decision, got 3"),
        (lambda pairs: (pairs.cosines, None), TypeError, "out as bool for .* got torch.float64"),
        (lambda pairs: (None, pairs.cosines[:5] > 2), ValueError, r"held as bool for .* got shape \(5, 12\)"),
    ):
        bad.needs_clusters = False
        with pytest.raises(error, match=f"^false_negatives: .*{words}"):
            info_nce(anchors, positives, false_negatives=bad, backend="torch")
