"""The kernels that find cosines, clusters and sums, against the reference.

On a GPU where there is one, else the same code in Triton's interpreter; that multiplies bfloat16 wrongly, so
the kernels widen the operands there, and real bfloat16 products are tested on a GPU alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compare import assert_close_to_truth, assert_ids_within_rounding
from conftest import DEVICE
from objective_problems import problem

from clusterns import functional, reference
from clusterns.objective import operators

pytest.importorskip("triton")
from clusterns.kernels import chunk_launchers, cosine_launchers, launch
from clusterns.kernels.target import Target

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On both sides of the borders of tiles: 64 or 32 rows and columns, 32 clusters, 32 or 64 dimensions.
SIZES = [(1, 1, 2), (1, 40, 70), (70, 1, 3), (17, 5, 33), (64, 32, 64), (65, 33, 32), (33, 66, 65)]


def each_size(function):
    """With every size one dtype, and with the last of them all."""
    cases = [(*size, DTYPES[place % 3]) for place, size in enumerate(SIZES)]
    cases += [(*SIZES[-1], dtype) for dtype in DTYPES if (*SIZES[-1], dtype) not in cases]
    return pytest.mark.parametrize(("rows", "columns", "dim", "dtype"), cases)(function)


def points(rows, dim, dtype=torch.float32, seed=0):
    return problem(rows, dim, 0, dtype=dtype, seed=seed)[0].detach()


def counters(rows, clusters):
    return cosine_launchers.new_counters(torch.empty(rows, 0, device=DEVICE), clusters).zero_()


def inverse(x):
    return 1 / x.float().norm(dim=1)


def assert_assigned(x, c, ids, found, error=1e-6):
    """The ids (2, rows) are of the two best within `error`, and their cosines `found` (2, rows) nearly so.

    Matrix units round sums towards zero, all cosines of a row alike.
    """
    cosines = reference.cosine_similarity_matrix(x.double(), c.double())
    for each, cosine in zip(ids[: len(c)], found, strict=False):
        assert_ids_within_rounding(each, cosines, error)
        assert (cosine - cosines.gather(1, each[:, None])[:, 0]).abs().max() <= 4 * error
        cosines = cosines.scatter(1, each[:, None], -torch.inf)
    if len(c) == 1:
        assert (ids[1] == -1).all()
        assert (found[1] == -torch.inf).all()


@pytest.mark.parametrize("explicit", [0, 1, 34])
@each_size
def test_cosines(rows, columns, dim, dtype, explicit):
    x, y, n = (points(count, dim, dtype, seed) for seed, count in enumerate((rows, columns, explicit)))
    found, x_inverse, y_inverse, _, _ = cosine_launchers.compare(x, y, n if explicit else None)
    first = launch.padded(columns)
    for z, cosines, inverse in (
        (y, found[:, :columns], y_inverse[:columns]),
        (n, found[:, first : first + explicit], y_inverse[first : first + explicit]),
    ):
        if len(z):
            assert_close_to_truth(cosines, reference.cosine_similarity_matrix(x.double(), z.double()))
            assert_close_to_truth(inverse, 1 / z.double().norm(dim=1))
    assert_close_to_truth(x_inverse, 1 / x.double().norm(dim=1))


@each_size
def test_assignment(rows, columns, dim, dtype):
    x, c = points(rows, dim, dtype), points(columns, dim, seed=1)
    counted = counters(rows, columns)
    found = cosine_launchers.assign(x, c, counted, inverse(x), keep_cosines=True)
    assert_close_to_truth(
        found.cosines[:, :columns], reference.cosine_similarity_matrix(x.double(), c.double())
    )
    ids = (found.nearest, found.runner_up)
    assert_assigned(x, c, ids, (found.nearest_cosine, found.runner_up_cosine))
    step = launch.padded(columns)
    for each, count in zip(ids, (counted[:columns], counted[step : step + columns]), strict=True):
        assert torch.equal(count.long(), each[each >= 0].bincount(minlength=columns))


def test_the_lowest_id_wins_a_tie_within_and_across_tiles():
    x = torch.tensor([[1.0, 0.0], [0.0, -2.0]], device=DEVICE)
    for clusters in (5, 40, 70, 100):
        c = torch.tensor([[0.0, 3.0]], device=DEVICE).repeat(clusters, 1)
        for equal in ((1, clusters - 1), (2, 3), (clusters - 2, clusters - 1)):
            tied = c.clone()
            tied[list(equal)] = torch.tensor([2.0, 0.0], device=DEVICE)
            nearest, runner_up, *_ = operators.nearest_centroids(x, tied)
            assert (nearest[0], runner_up[0]) == equal
            # Both of the second point's best are at right angles to it.
            assert (nearest[1], runner_up[1]) == equal
        nearest, runner_up, *_ = operators.nearest_centroids(x, c)
        assert nearest.tolist() == [0, 0]
        assert runner_up.tolist() == [1, 1]
        # The second best of one tile ties with the best of the one before.
        c[[2, -1]], c[-2] = torch.tensor([1.0, 1.0], device=DEVICE), torch.tensor([2.0, 0.0], device=DEVICE)
        nearest, runner_up, *_ = operators.nearest_centroids(x, c)
        assert (nearest[0], runner_up[0]) == (clusters - 2, 2)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("clusters", [1, 2, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_assignment_of_many_points(dtype, clusters, many, monkeypatch):
    """With either tiles, on both sides of their borders; rows and columns that are not neighbours."""
    if many:
        monkeypatch.setattr(cosine_launchers, "_MANY_POINTS", 1)
    for rows, dim in ((1, 33), (64, 32), (129, 65)):
        x, c = points(2 * rows, dim, dtype), points(clusters, dim + 1, seed=1)
        for z in (x[::2], x[:rows].T.contiguous().T, x[:rows, : dim - 1]):
            near, runner_up, *found = operators.nearest_centroids(z, c[:, : z.shape[1]])
            error = 2**-18 if dtype == torch.bfloat16 else 1e-6  # of 16 bits of a centroid, few dimensions
            assert_assigned(z, c[:, : z.shape[1]], (near, runner_up), found, error)
            assert near.dtype == runner_up.dtype == torch.int64


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize(("dtype", "error"), zip(DTYPES, (1e-6, 2e-6, 1e-6), strict=True))
def test_the_choice_between_close_centroids(dtype, error, spread):
    """Two terms of a centroid lose next to nothing, however close the cosines are."""
    dim, center = 768, points(1, 768, seed=2)
    c = center + spread * points(140, dim, seed=1)
    x = torch.cat([points(60, dim), center + 0.1 * points(70, dim)]).to(dtype)
    near, runner_up, *found = operators.nearest_centroids(x, c)
    assert_assigned(x, c, (near, runner_up), found, error)


def sums_of(x, ids, clusters):
    total = torch.zeros(clusters, x.shape[1], dtype=torch.float64, device=DEVICE)
    return total.index_add_(0, ids, x.double())


@each_size
def test_cluster_sums(rows, columns, dim, dtype):
    x, c = points(rows, dim, dtype), points(columns, dim, seed=1)
    near = operators.nearest_centroids(x, c)[0]
    counts, sums = operators.cluster_sums(x, c)
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts.long(), near.bincount(minlength=columns))
    assert_close_to_truth(sums, sums_of(x, near, columns))


@pytest.mark.parametrize(("rows", "dim"), [(255, 11), (256, 11), (257, 11), (300, 257)])
def test_sums_of_clusters_of_any_size(rows, dim):
    """Over the borders of chunks: one with most of the points, some with one, some with none."""
    home = torch.full((rows,), 4, device=DEVICE)
    home[[0, 7, 90, 130, 250]] = torch.tensor([0, 5, 5, 2, 9], device=DEVICE)
    c = torch.eye(11, dim, device=DEVICE)
    for own in (home, home.flip(0), torch.full_like(home, 4), torch.arange(rows, device=DEVICE) % 11):
        x = c[own] + 0.01 * points(rows, dim)
        counts, sums = operators.cluster_sums(x, c)
        assert torch.equal(counts.long(), own.bincount(minlength=11))
        assert_close_to_truth(sums, sums_of(x, own, 11))
        again = operators.cluster_sums(x, c)
        assert torch.equal(again[1], sums)


def test_sums_leave_out_rows_without_a_direction():
    x, c = points(300, 8), points(5, 8, seed=1)
    bad = [0, 11, 12, 299]
    x[bad[0]], x[bad[1], 3], x[bad[2], 0], x[bad[3]] = 0, float("nan"), -float("inf"), 1e-10
    keep = torch.tensor([row for row in range(300) if row not in bad], device=DEVICE)
    near = operators.nearest_centroids(x, c)[0]
    counts, sums = operators.cluster_sums(x, c)
    assert torch.equal(counts.long(), near[keep].bincount(minlength=5))
    assert_close_to_truth(sums, sums_of(x[keep], near[keep], 5))
    counts, sums = operators.cluster_sums(x[bad], c)
    assert not counts.any()
    assert not sums.any()


@pytest.mark.parametrize("clusters", [3, 33, 40])
def test_an_id_beyond_the_clusters_never_wins(clusters):
    """A padded column that scored 0 would win where all true cosines are negative (flash-kmeans #16)."""
    x = torch.ones(70, 5, device=DEVICE)
    c = -torch.rand(clusters, 5, device=DEVICE) - 0.1
    nearest, runner_up, cosine, second = operators.nearest_centroids(x, c)
    assert nearest.max() < clusters
    assert runner_up.max() < clusters
    assert (cosine < 0).all()
    assert (second < 0).all()


def test_what_stands_twice_agrees():
    """Device code cannot import the reference, nor the torch side the kernels before Triton is there."""
    from clusterns.kernels import objective, tiles

    assert tiles.SHORTEST_NORM.value == reference.SHORTEST_NORM
    assert functional.ObjectiveTerms._fields[1:] == objective.TERMS[:7]
    assert objective.TERMS[7:] == ("temperature_gradient",)


def test_rows_without_a_direction_get_valid_ids():
    x = points(20, 6)
    x[3], x[5, 2], x[7, 1] = 0, float("nan"), float("inf")
    for clusters in (1, 2, 40):
        c = points(clusters, 6, seed=1)
        x[4] = 1e-10 * c[-1]
        nearest, runner_up, cosine, second = operators.nearest_centroids(x, c)
        assert nearest.min() >= 0
        assert nearest.max() < clusters
        if clusters == 1:
            assert (runner_up == -1).all()
            continue
        assert runner_up.min() >= 0
        assert runner_up.max() < clusters
        for row in (3, 4):
            assert (nearest[row], runner_up[row], cosine[row], second[row]) == (0, 1, 0, 0)


def test_a_centroid_without_a_direction():
    """Zero has cosine 0 with everything; what is not finite is nobody's nearest."""
    x, c = points(70, 6).abs(), -points(40, 6, seed=1).abs()
    c[2], c[5], c[6, 1], c[39, 3] = 0, 1e-10, float("nan"), float("inf")
    nearest, runner_up, cosine, second = operators.nearest_centroids(x, c)
    assert (nearest == 2).all()
    assert (runner_up == 5).all()
    assert not cosine.any()
    assert not second.any()


@pytest.mark.parametrize(("statistic", "momentum"), [("sum", 0.3), ("mean", 1e-4), ("mean", 1.0)])
@each_size
def test_update(rows, columns, dim, dtype, statistic, momentum):
    x, c = points(rows, dim, dtype), points(columns, dim, seed=1)
    near = cosine_launchers.assign(x, c, counters(rows, columns), inverse(x)).nearest
    _, x_inverse, _, cosine, ids = cosine_launchers.compare(x, x, None, c)
    moved = c.clone()
    copy = cosine_launchers.update(x, x_inverse, cosine, ids, moved, statistic, momentum)
    expected = reference.update_centroids(c.double(), x.double(), near, momentum, statistic)
    assert_close_to_truth(moved, expected)
    assert_close_to_truth(copy, moved, rounding=2**-8)


def test_update_leaves_out_rows_without_a_direction():
    x, c = points(30, 8), points(4, 8, seed=1)
    clean, dirty = c.clone(), c.clone()
    spoiled = x.clone()
    spoiled[2], spoiled[11, 3], spoiled[12, 0] = 0, float("nan"), -float("inf")
    keep = torch.tensor([i for i in range(30) if i not in (2, 11, 12)], device=DEVICE)
    for z, centroids in ((x[keep], clean), (spoiled, dirty)):
        _, inverse, _, cosine, ids = cosine_launchers.compare(z, z, None, centroids)
        cosine_launchers.update(z, inverse, cosine, ids, centroids, "mean", 0.5)
    assert_close_to_truth(dirty, clean)


@pytest.mark.parametrize("learned", [False, True])
@each_size
def test_similarity_matrix_and_its_gradients(rows, columns, dim, dtype, learned):
    a, b = (points(n, dim, dtype, seed).requires_grad_() for seed, n in enumerate((rows, columns)))
    tau = torch.tensor(0.3, device=DEVICE, requires_grad=True) if learned else 0.3
    upstream = torch.randn(columns, rows, device=DEVICE).T  # not contiguous
    actual = operators.cosine_similarity_matrix(a, b, tau)
    assert actual.dtype == torch.float32
    assert actual.shape == (rows, columns)
    wanted = [a, b] + ([tau] if learned else [])
    grads = torch.autograd.grad(actual, wanted, upstream)
    wide = [z.detach().double().requires_grad_() for z in wanted]
    expected = reference.cosine_similarity_matrix(*wide[:2]) / (wide[2] if learned else 0.3)
    assert_close_to_truth(actual, expected)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert_close_to_truth(mine, theirs, condition=20)


def test_a_similarity_matrix_may_be_changed_in_place():
    for columns in (16, 20):
        a, b, _ = problem(20, 8, 0)
        b = b.detach()[:columns]
        matrix = operators.cosine_similarity_matrix(a, b, 0.5)
        assert matrix.is_contiguous()
        matrix.mul_(2.0)
        matrix.sum().backward()
        assert b.grad is None
        wide = a.detach().double().requires_grad_()
        truth = torch.autograd.grad(reference.cosine_similarity_matrix(wide, b.double()).sum() * 4, wide)[0]
        assert_close_to_truth(a.grad, truth, condition=20)


def test_newer_setting_of_tf32(monkeypatch):
    """torch's older getter raises where only `fp32_precision` has been set."""

    def raises():
        raise RuntimeError("mixed settings")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    for setting, precision in (("tf32", "tf32"), ("ieee", "tf32x3")):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=setting))
        assert Target("cuda", 90).precision() == precision


def test_slopes_on_weights_are_kept_on_average():
    """A sixteenth of a last digit is added to each of 8 · 4,096 weights: a sixteenth of them gets a whole."""
    rows, columns, digit = 8, 4096, 2.0**-7
    up = torch.arange(columns).expand(rows, -1) % 4 > 0  # slope 1, the last bit; else −1, the sign
    before = 1 + 2 * digit
    weights = torch.where(up, before + digit, -before).to(DEVICE, torch.bfloat16)
    one, zero = torch.ones(rows, device=DEVICE), torch.zeros(rows, device=DEVICE)
    views = {"x": one[:, None].expand(-1, 16), "y": one.expand(columns, -1)}
    chunk_launchers.settle(
        views, positive=zero, log_others=zero, reference=one, low=zero.long(),
        high=(columns * one).long(), margins=torch.zeros(3, rows, device=DEVICE), most_mates=16,
        weights=weights, y_inverse=torch.ones(columns, device=DEVICE), row_scale=torch.empty_like(one),
        own_weight=torch.empty_like(one), temperature=1.0, batch=1.0, slope_scale=digit / 16,
    )  # fmt: skip
    added = (weights.float().cpu() - before) / (digit / 16)
    assert set(added[up].tolist()) == {0.0, 16.0}
    assert set(added[~up].tolist()) == {0.0, -16.0}
    assert abs(added[up].mean() - 1) < 0.15
    assert abs(added[~up].mean() + 1) < 0.15
