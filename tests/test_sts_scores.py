"""STS scores, correlations with their bootstrap and test, and geometry, each against its definition."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny import ROWS, write_sts_folder

from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.correlation import (
    bootstrap_correlations,
    correlation,
    interval,
    paired_difference,
)
from clusterns.evaluation.geometry import alignment, first_component_share, mean_cosine, uniformity
from clusterns.evaluation.sts import SEVEN, load_sts
from clusterns.evaluation.sts_scores import evaluate_sts, sts_dev

NAN = math.nan
DISTINCT = sorted({sentence for a, b, _ in ROWS for sentence in (a, b)})


class Letters:
    """Embeds a sentence as its letter counts, or all as one value, and keeps a record of its calls."""

    def __init__(self, value: float | None = None) -> None:
        self.value, self.calls = value, []

    def encode(self, sentences: Sequence[str], **_: object) -> torch.Tensor:
        self.calls.append(sorted(sentences))
        if self.value is not None:
            return torch.full((len(sentences), 3), self.value)
        return torch.tensor(
            [[1.0 + sentence.count(letter) for letter in "abcdefgh"] for sentence in sentences]
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sts_folder(tmp_path / "sts")


def test_figures_are_spearman_of_all_subsets_together(folder: Path) -> None:
    encoder = Letters()
    place = folder / "STS" / "STS13-en-test"
    (place / "STS.input.OnWN.txt").write_text("abc\tcba\nfgh\tabc\ndd\tde\n")
    (place / "STS.gs.OnWN.txt").write_text("2\n3\n5\n")
    figures = evaluate_sts(encoder, folder, progress=False)
    assert list(figures) == [*SEVEN, "avg"]
    for name in SEVEN:
        pairs = load_sts(folder, name)
        first, second = encoder.encode(pairs.first).double(), encoder.encode(pairs.second).double()
        cosines = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
        # Anagrams have the cosine 1 but for the last bits, and are ties.
        expected = 100 * spearmanr(np.round(cosines.numpy(), 10), pairs.scores).statistic
        assert figures[name] == pytest.approx(expected, abs=1e-9)
    assert figures["avg"] == pytest.approx(sum(figures[name] for name in SEVEN) / 7)
    assert figures["STS13"] != pytest.approx(figures["STS12"], abs=0.1)


def test_undefined_figures_are_errors(folder: Path) -> None:
    library = type("SentenceTransformer", (), {})()
    vary = r"^STS12: expected cosines and gold scores that vary, got 20 pairs"
    for encoder, tasks, words in (
        (Letters(NAN), SEVEN, r"^STS12: expected finite embeddings, got 20 pairs with NaN or infinity$"),
        (Letters(0.3), SEVEN, vary),
        (library, SEVEN, r"^encoder: expected .*, got a SentenceTransformer; wrap it, .*\(model\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            evaluate_sts(encoder, folder, tasks, progress=False)
    with pytest.raises(ValueError, match=r"^STSBenchmark-dev: expected finite embeddings"):
        sts_dev(Letters(math.inf), folder)
    for cosines, scores, words in (
        ([1, 2, 3], [1, 2], r"as many gold scores as cosines, got \(2,\) and \(3,\)"),
        ([0.1, 0.2], [1.0, NAN], "finite cosines and gold scores, got NaN or inf"),
    ):
        with pytest.raises(ValueError, match=rf"^set: expected {words}"):
            correlation("set", cosines, scores)


def test_sts_dev(folder: Path) -> None:
    encoder = Letters()
    figures = sts_dev(encoder, folder)
    assert encoder.calls == [DISTINCT]
    assert figures["spearman"] == evaluate_sts(encoder, folder, ["STSBenchmark-dev"], progress=False)["avg"]
    assert figures["alignment"] == pytest.approx(0, abs=1e-9)  # its one pair above 4 is an anagram
    assert figures["uniformity"] == pytest.approx(uniformity(encoder.encode(DISTINCT)), rel=1e-9)


def test_a_dev_set_that_says_less_does_not_end_a_training(folder: Path) -> None:
    """Scores from 0 to 1 have no pair for alignment, and a collapsed encoder gets the worst score."""
    with pytest.warns(UserWarning, match=r"all cosines are 1, which scores -100: .* collapsed"):
        figures = sts_dev(Letters(0.3), folder)
    assert figures["spearman"] == -100 < sts_dev(Letters(), folder)["spearman"]
    assert math.isfinite(figures["alignment"])
    assert math.isfinite(figures["uniformity"])
    path = next(folder.rglob("sts-dev.csv"))
    path.write_text("".join(f"g\tf\ty\t1\t{float(score) / 5}\t{a}\t{b}\n" for a, b, score in ROWS))
    with pytest.warns(UserWarning, match=r"no pair is scored above 4 \(the highest score is 1\), .* 0 to 5"):
        figures = sts_dev(Letters(), folder)
    assert list(figures) == ["spearman", "uniformity"]
    path.write_text("".join(f"g\tf\ty\t1\t3\t{a}\t{b}\n" for a, b, _ in ROWS))
    for encoder in (Letters(), Letters(0.3)):  # nothing to judge by, whatever the encoder
        with pytest.raises(ValueError, match=r"got 4 pairs whose gold scores are all 3, "):
            sts_dev(encoder, folder)


@pytest.mark.parametrize("wrong", [np.ones((7, 2)), torch.ones(6, 2)])
def test_an_encoder_that_gives_no_row_a_sentence_is_named(wrong: object, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(Letters, "encode", lambda *_, **__: wrong)
    with pytest.raises(ValueError, match=r"^encoder: expected a tensor \(7, dim\) from encode, got \w+"):
        sts_dev(Letters(), folder)


def test_known_score_of_a_test_set(shared: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(shared / "data" / "models" / "all-MiniLM-L6-v2")
    found = evaluate_sts(encoder, shared / "data" / "sts", ["STS16"], progress=False)
    assert found["STS16"] == pytest.approx(78.99, abs=0.05)


def judged(pairs: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines that follow gold scores, which have ties, with noise."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 26, pairs) / 5
    return scores / 5 + noise * generator.standard_normal(pairs), scores


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=2, max_size=30))
def test_every_resample_is_scipys_spearman(rows: list[tuple[int, int]]) -> None:
    x, y = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clusterns.evaluation.correlation._CELLS", 3 * len(x))  # three resamples at a time
        found = bootstrap_correlations("set", x, y, resamples=7, seed=3)
    drawn = np.random.default_rng([3, zlib.crc32(b"set")]).integers(len(x), size=(7, len(x)))
    for figure, row in zip(found, drawn, strict=True):
        if len(set(x[row])) < 2 or len(set(y[row])) < 2:
            assert math.isnan(figure)
        else:
            assert figure == pytest.approx(100 * spearmanr(x[row], y[row]).statistic, abs=1e-9)


def test_paired_difference_tells_a_better_model_from_an_equal_one() -> None:
    good, scores = judged(400, 0.1)
    worse = good + 0.2 * np.random.default_rng(1).standard_normal(400)
    drawn = [bootstrap_correlations("set", x, scores) for x in (worse, good)]
    value = correlation("set", good, scores) - correlation("set", worse, scores)
    found = paired_difference(value, *drawn)
    assert 0 < found.low < found.value < found.high
    assert found.p_value == found.p_floor == pytest.approx(2 / 1001)
    assert paired_difference(0.0, drawn[0], drawn[0])[:4] == (0, 0, 0, 1)
    assert paired_difference(0.0, np.array([NAN]), np.array([1.0])) is None
    # An interval leaves out a fortieth at each end.
    assert interval(np.r_[NAN, np.arange(1001.0)]) == pytest.approx((25, 975))


def test_geometry_against_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(11, 5), torch.randn(11, 5)
    unit_x, unit_y = ([row / row.norm() for row in rows.double()] for rows in (x, y))
    for alpha in (1, 2, 3):
        expected = sum(float((a - b).norm()) ** alpha for a, b in zip(unit_x, unit_y, strict=True)) / 11
        assert alignment(x, y, alpha) == pytest.approx(expected, rel=1e-9)
    for t in (0.5, 2, 2000):
        kernel = [-t * float((a - b).square().sum()) for a, b in itertools.combinations(unit_x, 2)]
        largest = max(kernel)
        expected = largest + math.log(sum(math.exp(k - largest) for k in kernel) / 55)
        for rows in (1, 4, 11, 1024):
            monkeypatch.setattr("clusterns.evaluation.geometry.UNIFORMITY_ROWS", rows)
            assert uniformity(x, t) == pytest.approx(expected, rel=1e-9)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-9)
    cosines = [float(a @ b) for a, b in itertools.combinations(unit_x, 2)]
    assert mean_cosine(x) == pytest.approx(sum(cosines) / 55, rel=1e-9)


@pytest.mark.parametrize("shape", [(40, 6), (5, 12)])
def test_first_component_share_is_that_of_a_principal_component_analysis(shape: tuple[int, int]) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = torch.randn(shape) * torch.arange(1, shape[1] + 1)
    unit = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    expected = decomposition.PCA().fit(unit).explained_variance_ratio_[0]
    assert first_component_share(x) == pytest.approx(expected, rel=1e-9)
