"""The kernels that find cosines, clusters and sums, against the reference.

On a GPU where there is one, else the same code in Triton's interpreter; that multiplies bfloat16 wrongly, so
the kernels widen the operands there, and real bfloat16 products are tested on a GPU alone.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterns import fused, reference

pytest.importorskip("triton")
from clusterns.kernels import cosine_launchers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def points(rows, dim, dtype=torch.float32, seed=0):
    return embeddings(rows, dim, dtype=torch.float64, seed=seed)[0].detach().to(DEVICE, dtype)


def counters(rows, clusters):
    return torch.zeros(cosine_launchers.num_counters(rows, clusters), dtype=torch.int32, device=DEVICE)


def assert_valid_choice(cosines, ids, found, tolerance):
    """The id's cosine is the one given, and no better one was missed: ids may differ where cosines tie."""
    torch.testing.assert_close(cosines.gather(1, ids[:, None])[:, 0].float(), found, atol=tolerance, rtol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    explicit=st.integers(0, 20),
    dim=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_cosines(rows, columns, explicit, dim, dtype, seed):
    x, y, n = (points(count, dim, dtype, seed + i) for i, count in enumerate((rows, columns, explicit)))
    found, x_inverse, y_inverse, _, _ = cosine_launchers.compare(x, y, n if explicit else None)
    first = cosine_launchers.padded(columns)
    expected = reference.cosine_similarity_matrix(x.double(), y.double())
    torch.testing.assert_close(found[:, :columns].double(), expected, atol=2e-6, rtol=0)
    if explicit:
        expected = reference.cosine_similarity_matrix(x.double(), n.double())
        torch.testing.assert_close(found[:, first : first + explicit].double(), expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(y_inverse[first : first + explicit], 1 / n.float().norm(dim=1))
    torch.testing.assert_close(x_inverse, 1 / x.float().norm(dim=1))
    torch.testing.assert_close(y_inverse[:columns], 1 / y.float().norm(dim=1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    clusters=st.integers(1, 100),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_assignment(rows, clusters, dim, dtype, seed):
    x, c = points(rows, dim, dtype, seed), points(clusters, dim, seed=seed + 1)
    counted = counters(rows, clusters)
    found = cosine_launchers.assign(x, c, counted, keep_cosines=True)
    cosines = reference.cosine_similarity_matrix(x.double(), c.double())
    torch.testing.assert_close(found.cosines[:, :clusters].double(), cosines, atol=2e-6, rtol=0)
    best = cosines.topk(min(2, clusters)).values.float()
    torch.testing.assert_close(found.nearest_cosine, best[:, 0], atol=2e-6, rtol=0)
    assert_valid_choice(cosines, found.nearest, found.nearest_cosine, 2e-6)
    step = cosine_launchers.padded(clusters)
    assert torch.equal(counted[:clusters].long(), found.nearest.bincount(minlength=clusters))
    if clusters > 1:
        torch.testing.assert_close(found.runner_up_cosine, best[:, 1], atol=2e-6, rtol=0)
        assert_valid_choice(cosines, found.runner_up, found.runner_up_cosine, 2e-6)
        assert (found.runner_up != found.nearest).all()
        uses = counted[step : step + clusters].long()
        assert torch.equal(uses, found.runner_up.bincount(minlength=clusters))
    else:
        assert (found.runner_up == -1).all()
        assert (found.runner_up_cosine == -torch.inf).all()
        assert not counted[step : step + clusters].any()


def test_the_lowest_id_wins_a_tie_within_and_across_tiles():
    x = torch.tensor([[1.0, 0.0], [0.0, -2.0]], device=DEVICE)
    for clusters in (5, 40, 70, 100):
        c = torch.tensor([[0.0, 3.0]], device=DEVICE).repeat(clusters, 1)
        for equal in ((1, clusters - 1), (2, 3), (clusters - 2, clusters - 1)):
            tied = c.clone()
            tied[list(equal)] = torch.tensor([2.0, 0.0], device=DEVICE)
            nearest, runner_up, *_ = fused.nearest_centroids(x, tied)
            assert (nearest[0], runner_up[0]) == equal
            # Both of the second point's best are at right angles to it.
            assert (nearest[1], runner_up[1]) == equal
        nearest, runner_up, *_ = fused.nearest_centroids(x, c)
        assert nearest.tolist() == [0, 0]
        assert runner_up.tolist() == [1, 1]


def test_assignment_in_row_chunks(monkeypatch):
    from clusterns import operators

    x, c = points(100, 8), points(40, 8, seed=1)
    whole = fused.nearest_centroids(x, c)
    sums = fused.cluster_sums(x, c)
    monkeypatch.setattr(operators, "WORKSPACE_BYTES", 33 * cosine_launchers.partial_bytes(40))
    for one, other in zip(whole, fused.nearest_centroids(x, c), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(sums, fused.cluster_sums(x, c), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clusters", [3, 33, 40])
def test_an_id_beyond_the_clusters_never_wins(clusters):
    """A padded column that scored 0 would win where all true cosines are negative (flash-kmeans #16)."""
    x = torch.ones(70, 5, device=DEVICE)
    c = -torch.rand(clusters, 5, device=DEVICE) - 0.1
    nearest, runner_up, cosine, second = fused.nearest_centroids(x, c)
    assert nearest.max() < clusters
    assert runner_up.max() < clusters
    assert (cosine < 0).all()
    assert (second < 0).all()


def test_what_stands_twice_agrees():
    """Device code cannot import the reference, nor the torch side the kernels before Triton is there."""
    from clusterns.kernels import objective, tiles

    assert tiles.SHORTEST_NORM.value == reference.SHORTEST_NORM
    assert fused.Terms._fields[1:] == objective.TERMS[:7]
    assert objective.TERMS[7:] == ("temperature_gradient",)


def test_rows_without_a_direction_get_valid_ids():
    x = points(20, 6)
    x[3], x[5, 2], x[7, 1] = 0, float("nan"), float("inf")
    nearest, runner_up, cosine, _ = fused.nearest_centroids(x, points(40, 6, seed=1))
    for ids in (nearest, runner_up):
        assert ids.min() >= 0
        assert ids.max() < 40
    assert cosine[3] == 0
    assert nearest[3] == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 90),
    clusters=st.integers(1, 70),
    dim=st.integers(1, 50),
    statistic=st.sampled_from(["sum", "mean", "sums"]),
    momentum=st.sampled_from([1e-4, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_update(rows, clusters, dim, statistic, momentum, dtype, seed):
    x, c = points(rows, dim, dtype, seed), points(clusters, dim, seed=seed + 1)
    found = cosine_launchers.assign(x, c, counters(rows, clusters))
    _, x_inverse, _, cosine, ids = cosine_launchers.compare(x, x, None, c)
    moved = c.clone()
    counts, result = cosine_launchers.update(x, x_inverse, cosine, ids, moved, statistic, momentum)
    near = found.nearest
    if statistic == "sums":
        assert torch.equal(moved, c)
        assert torch.equal(counts.long(), near.bincount(minlength=clusters))
        expected = torch.zeros(clusters, dim, dtype=torch.float64, device=DEVICE)
        expected.index_add_(0, near, x.double())
    else:
        expected = reference.update_centroids(c.double(), x.double(), near, momentum, statistic)
        assert torch.equal(moved, result)
    scale = 1e-6 * max(1.0, float(x.float().abs().sum(dim=0).max()))
    torch.testing.assert_close(result.double(), expected, atol=scale, rtol=1e-6)


def test_update_leaves_out_rows_without_a_direction():
    x, c = points(30, 8), points(4, 8, seed=1)
    clean, dirty = c.clone(), c.clone()
    spoiled = x.clone()
    spoiled[2], spoiled[11, 3], spoiled[12, 0] = 0, float("nan"), -float("inf")
    keep = torch.tensor([i for i in range(30) if i not in (2, 11, 12)], device=DEVICE)
    for z, centroids in ((x[keep], clean), (spoiled, dirty)):
        _, inverse, _, cosine, ids = cosine_launchers.compare(z, z, None, centroids)
        cosine_launchers.update(z, inverse, cosine, ids, centroids, "mean", 0.5)
    torch.testing.assert_close(dirty, clean)


def test_cluster_sums_for_adamw():
    x, c = points(50, 9), points(6, 9, seed=1)
    counts, sums = fused.cluster_sums(x, c)
    near, _ = reference.nearest_and_runner_up(x.double(), c.double())
    assert torch.equal(counts.long(), near.bincount(minlength=6))
    torch.testing.assert_close(sums, torch.zeros_like(sums).index_add_(0, near, x))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 50),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    learned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_similarity_matrix_and_its_gradients(rows, columns, dim, dtype, learned, seed):
    a, b = (points(n, dim, dtype, seed + n).requires_grad_() for n in (rows, columns))
    tau = torch.tensor(0.3, device=DEVICE, requires_grad=True) if learned else 0.3
    upstream = torch.randn(columns, rows, device=DEVICE).T  # not contiguous
    actual = fused.cosine_similarity_matrix(a, b, tau)
    assert actual.dtype == torch.float32
    assert actual.shape == (rows, columns)
    wanted = [a, b] + ([tau] if learned else [])
    grads = torch.autograd.grad(actual, wanted, upstream)
    wide = [z.detach().double().requires_grad_() for z in wanted]
    expected = reference.cosine_similarity_matrix(*wide[:2]) / (wide[2] if learned else 0.3)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6 / 0.3, rtol=0)
    # A unit vector in one dimension has no gradient: what is left is rounding, of this size.
    size = float(upstream.norm()) / 0.3
    for mine, theirs in zip(grads, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        inverse = (
            1.0
            if theirs.ndim == 0
            else float(1 / min(a.detach().norm(dim=1).min(), b.detach().norm(dim=1).min()))
        )
        rounding = max(torch.finfo(mine.dtype).eps, 2e-6)
        torch.testing.assert_close(mine.double(), theirs, rtol=2 * rounding, atol=rounding * size * inverse)


@pytest.mark.parametrize("wanted", [(0,), (1,)])
def test_similarity_partial_gradients(wanted):
    views = [points(20, 8, seed=i).requires_grad_(i in wanted) for i in range(2)]
    fused.cosine_similarity_matrix(*views, 0.5).square().sum().backward()
    whole = [v.detach().clone().requires_grad_() for v in views]
    fused.cosine_similarity_matrix(*whole, 0.5).square().sum().backward()
    for index in range(2):
        if index in wanted:
            torch.testing.assert_close(views[index].grad, whole[index].grad)
        else:
            assert views[index].grad is None


def test_three_tf32_products_are_as_exact_as_float32():
    """ "highest" takes each float32 product as three tf32 ones on NVIDIA. Emulated: the sums are float32."""

    def tf32(z):  # 10 bits of mantissa, rounded to nearest
        bits = z.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    errors = {"three": [], "float32": [], "one": []}
    for seed in range(20):
        a, b = (torch.nn.functional.normalize(points(64, 768, seed=seed + s).cpu()) for s in (0, 50))
        exact = a.double() @ b.double().T
        (a_high, a_low), (b_high, b_low) = ((tf32(z), tf32(z - tf32(z))) for z in (a, b))
        three = a_low @ b_high.T + a_high @ b_low.T + a_high @ b_high.T
        for name, product in (("three", three), ("float32", a @ b.T), ("one", a_high @ b_high.T)):
            errors[name].append((product.double() - exact).abs().max())
    worst = {name: float(torch.stack(found).max()) for name, found in errors.items()}
    assert worst["three"] <= 2 * worst["float32"]
    assert worst["one"] > 50 * worst["float32"]
