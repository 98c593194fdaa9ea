"""STS scores: against their definition, and against a known one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import ROWS, write_sts_folder

from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.geometry import uniformity
from clusterns.evaluation.sts import SEVEN, load_sts
from clusterns.evaluation.sts_scores import evaluate_sts, sts_dev

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
    evaluate_sts(encoder, folder, progress=False)
    assert encoder.calls == [DISTINCT]  # each distinct sentence once
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
        (Letters(math.nan), SEVEN, r"^STS12: expected finite embeddings, got 20 pairs with NaN or infinity$"),
        (Letters(0.0), SEVEN, vary),
        (Letters(0.3), SEVEN, vary),
        (Letters(), [], r"^tasks: expected at least one"),
        (Letters(), "STS12", r"^tasks: expected a list of strings, got one string 'STS12'"),
        (library, SEVEN, r"^encoder: expected .*, got a SentenceTransformer; wrap it, .*\(model\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            evaluate_sts(encoder, folder, tasks, progress=False)
    with pytest.raises(ValueError, match=r"^STSBenchmark-dev: expected finite embeddings"):
        sts_dev(Letters(math.inf), folder)


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


@pytest.mark.parametrize("wrong", [np.ones((7, 2)), torch.ones(7), torch.ones(6, 2), None])
def test_an_encoder_that_gives_no_row_a_sentence_is_named(wrong: object, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(Letters, "encode", lambda *_, **__: wrong)
    with pytest.raises(ValueError, match=r"^encoder: expected a tensor \(7, dim\) from encode, got \w+"):
        sts_dev(Letters(), folder)


def test_known_score_of_a_test_set(shared: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(shared / "data" / "models" / "all-MiniLM-L6-v2")
    found = evaluate_sts(encoder, shared / "data" / "sts", ["STS16"], progress=False)
    assert found["STS16"] == pytest.approx(78.99, abs=0.05)
