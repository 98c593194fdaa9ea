"""Correlations, their bootstrap and the paired test, against scipy and against what must come out."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from clusterns.evaluation.correlation import (
    bootstrap_correlations,
    correlation,
    interval,
    pair_cosines,
    paired_difference,
)

NAN = math.nan


def judged(pairs: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines that follow gold scores, which have ties, with noise."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 26, pairs) / 5
    return scores / 5 + noise * generator.standard_normal(pairs), scores


def test_cosines_equal_but_for_rounding_are_ties() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [1.0, 0.0, 0.0]])
    assert len(set(pair_cosines("x", x, x * 3).tolist())) == 1
    x[1, 0] = NAN
    with pytest.raises(
        ValueError, match=r"^x: expected finite embeddings, got 1 pairs with NaN or infinity$"
    ):
        pair_cosines("x", x, x)


@pytest.mark.parametrize(
    ("cosines", "scores", "words"),
    [
        ([0.1], [1.0], "cosines and gold scores that vary, got 1 pairs"),
        ([0.1, 0.1], [1.0, 2.0], "cosines and gold scores that vary, got 2 pairs whose cosines are all 0.1"),
        ([1, 2], [3, 3], "cosines and gold scores that vary, got 2 pairs whose gold scores are all 3"),
        ([1, 2, 3], [1, 2], r"as many gold scores as cosines, got \(2,\) and \(3,\)"),
        ([0.1, 0.2], [1.0, NAN], "finite cosines and gold scores, got NaN or inf"),
    ],
)
def test_no_correlation_is_an_error(cosines: list[float], scores: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^set: expected {words}"):
        correlation("set", cosines, scores)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=2, max_size=30))
def test_every_resample_is_scipys_spearman(rows: list[tuple[int, int]]) -> None:
    x, y = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    found = bootstrap_correlations("set", x, y, resamples=7, seed=3)
    drawn = np.random.default_rng([3, zlib.crc32(b"set")]).integers(len(x), size=(7, len(x)))
    for figure, row in zip(found, drawn, strict=True):
        if len(set(x[row])) < 2 or len(set(y[row])) < 2:
            assert math.isnan(figure)
        else:
            assert figure == pytest.approx(100 * spearmanr(x[row], y[row]).statistic, abs=1e-9)


def test_resamples_do_not_depend_on_how_many_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = judged(50, 0.2)
    whole = bootstrap_correlations("set", x, y, resamples=20)
    monkeypatch.setattr("clusterns.evaluation.correlation._CELLS", 150)
    np.testing.assert_allclose(bootstrap_correlations("set", x, y, resamples=20), whole, atol=1e-10)


def test_interval_holds_all_but_a_fortieth_at_each_end() -> None:
    assert interval(np.r_[NAN, np.arange(1001.0)]) == pytest.approx((25, 975))
    assert interval(np.array([NAN])) is interval(np.array([])) is None


def test_paired_difference_tells_a_better_model_from_an_equal_one() -> None:
    good, scores = judged(400, 0.1)
    worse = good + 0.2 * np.random.default_rng(1).standard_normal(400)
    drawn = [bootstrap_correlations("set", x, scores) for x in (worse, good)]
    value = correlation("set", good, scores) - correlation("set", worse, scores)
    found = paired_difference(value, *drawn)
    assert 0 < found.low < found.value < found.high
    assert found.p_value == pytest.approx(2 / 1001)
    assert paired_difference(0.0, drawn[0], drawn[0]) == (0, 0, 0, 1)
    assert paired_difference(0.0, np.array([NAN]), np.array([1.0])) is None
