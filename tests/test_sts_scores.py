"""STS scores: against their definition, against known ones, and against sentence-transformers' evaluator."""

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
from clusterns.evaluation.correlation import spearman
from clusterns.evaluation.geometry import uniformity
from clusterns.evaluation.sts import SEVEN, load_sts
from clusterns.evaluation.sts_scores import evaluate_sts, sts_dev

SHARED = Path(__file__).resolve().parents[2] / "shared"
STS = SHARED / "data" / "sts"
MINILM = SHARED / "data" / "models" / "all-MiniLM-L6-v2"

needs_minilm = pytest.mark.skipif(
    not (STS.is_dir() and MINILM.is_dir()), reason="no STS data or all-MiniLM-L6-v2 in ../shared"
)


class Letters:
    """Embeds a sentence as its letter counts, and keeps a record of its calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(
        self, sentences: Sequence[str], *, batch_size: int = 64, progress: bool = False
    ) -> torch.Tensor:
        self.calls.append(list(sentences))
        return torch.tensor(
            [[1.0 + sentence.count(letter) for letter in "abcdefgh"] for sentence in sentences]
        )


class Fixed:
    """Gives every sentence the same vector."""

    def __init__(self, value: float) -> None:
        self.value = value

    def encode(
        self, sentences: Sequence[str], *, batch_size: int = 64, progress: bool = False
    ) -> torch.Tensor:
        return torch.full((len(sentences), 3), self.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sts_folder(tmp_path / "sts")


def test_figures_are_spearman_of_all_subsets_together(folder: Path) -> None:
    place = folder / "STS" / "STS13-en-test"
    (place / "STS.input.OnWN.txt").write_text("abc\tcba\nfgh\tabc\ndd\tde\n")
    (place / "STS.gs.OnWN.txt").write_text("2\n3\n5\n")
    encoder = Letters()
    figures = evaluate_sts(encoder, folder, progress=False)
    assert list(figures) == [*SEVEN, "avg"]
    for name in SEVEN:
        pairs = load_sts(folder, name)
        first, second = encoder.encode(pairs.first).double(), encoder.encode(pairs.second).double()
        cosines = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
        # Anagrams have the cosine 1 but for the last bits, and are ties.
        assert figures[name] == pytest.approx(
            100 * spearmanr(np.round(cosines.numpy(), 10), pairs.scores).statistic, abs=1e-9
        )
    assert figures["avg"] == pytest.approx(sum(figures[name] for name in SEVEN) / 7)
    assert figures["STS13"] != pytest.approx(figures["STS12"], abs=0.1)


def test_each_distinct_sentence_is_encoded_once(folder: Path) -> None:
    encoder = Letters()
    evaluate_sts(encoder, folder, progress=False)
    assert len(encoder.calls) == 1
    assert sorted(encoder.calls[0]) == sorted({sentence for a, b, _ in ROWS for sentence in (a, b)})


def test_undefined_figures_are_errors(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^STS12: expected finite embeddings, got 20 pairs with NaN or infinity$"
    ):
        evaluate_sts(Fixed(math.nan), folder, progress=False)
    with pytest.raises(ValueError, match=r"^STSBenchmark-dev: expected finite embeddings"):
        sts_dev(Fixed(math.inf), folder)
    for value in (0.0, 0.3):
        with pytest.raises(
            ValueError, match=r"^STS12: expected cosines and gold scores that vary, got 20 pairs"
        ):
            evaluate_sts(Fixed(value), folder, progress=False)
    with pytest.raises(ValueError, match=r"^x: expected cosines and gold scores that vary"):
        spearman("x", torch.eye(3), torch.eye(3).flip(0), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"^tasks: expected at least one"):
        evaluate_sts(Letters(), folder, tasks=[])
    with pytest.raises(ValueError, match=r"^tasks: expected a list of strings, got one string 'STS12'"):
        evaluate_sts(Letters(), folder, tasks="STS12")
    with pytest.raises(
        TypeError, match=r"^encoder: expected .*, got a SentenceTransformer; wrap it, .*\(model\)"
    ):
        evaluate_sts(type("SentenceTransformer", (), {})(), folder, progress=False)


def test_sts_dev(folder: Path) -> None:
    encoder = Letters()
    figures = sts_dev(encoder, folder)
    assert len(encoder.calls) == 1
    assert figures["spearman"] == evaluate_sts(encoder, folder, ["STSBenchmark-dev"], progress=False)["avg"]
    assert figures["alignment"] == pytest.approx(0, abs=1e-9)  # its one pair above 4 is an anagram
    assert figures["uniformity"] == pytest.approx(
        uniformity(encoder.encode(["aab", "abb", "cde", "h", "a b", "b a", "gh"])), rel=1e-9
    )


def test_a_dev_set_that_says_less_does_not_end_a_training(folder: Path) -> None:
    """Scores from 0 to 1 have no pair for alignment, and a collapsed encoder gets the worst score."""
    with pytest.warns(UserWarning, match=r"all cosines are 1, which scores -100: .* collapsed"):
        figures = sts_dev(Fixed(0.3), folder)
    assert figures["spearman"] == -100 < sts_dev(Letters(), folder)["spearman"]
    assert math.isfinite(figures["alignment"])
    assert math.isfinite(figures["uniformity"])
    path = next(folder.rglob("sts-dev.csv"))
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    rescale = lambda score: "\n".join("\t".join([*l[:4], score(l[4]), *l[5:]]) for l in lines) + "\n"  # noqa: E731, E741
    path.write_text(rescale(lambda score: str(float(score) / 5)))
    with pytest.warns(UserWarning, match=r"no pair is scored above 4 \(the highest score is 1\), .* 0 to 5"):
        figures = sts_dev(Letters(), folder)
    assert list(figures) == ["spearman", "uniformity"]
    path.write_text(rescale(lambda score: "3"))  # nothing to judge by, whatever the encoder
    with pytest.raises(ValueError, match=r"got 4 pairs whose gold scores are all 3, "):
        sts_dev(Letters(), folder)


@pytest.mark.parametrize("wrong", [np.ones((7, 2)), torch.ones(7), torch.ones(6, 2), None])
def test_an_encoder_that_gives_no_row_a_sentence_is_named(wrong: object, folder: Path) -> None:
    class Wrong(Letters):
        def encode(self, *_: object, **__: object) -> object:
            return wrong

    with pytest.raises(ValueError, match=r"^encoder: expected a tensor \(7, dim\) from encode, got \w+"):
        sts_dev(Wrong(), folder)


@needs_minilm
def test_known_score_of_a_test_set() -> None:
    encoder = SentenceEncoder.from_pretrained(MINILM)
    assert evaluate_sts(encoder, STS, ["STS16"], progress=False)["STS16"] == pytest.approx(78.99, abs=0.05)


@needs_minilm
def test_same_score_as_sentence_transformers_evaluator(tmp_path: Path) -> None:
    """On the same hundred pairs, by its own encoding, cosine and correlation."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    trial = (STS / "SICK" / "SICK_trial.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "SICK").mkdir()
    (tmp_path / "SICK" / "SICK_trial.txt").write_text("\n".join(trial[:101]) + "\n", encoding="utf-8")
    model = sentence_transformers.SentenceTransformer(str(MINILM), device="cpu")
    evaluator = EmbeddingSimilarityEvaluator(
        *load_sts(tmp_path, "SICK-R-dev")[:3], name="pairs", write_csv=False
    )
    theirs = 100 * evaluator(model)[evaluator.primary_metric]
    encoder = SentenceEncoder.from_pretrained(MINILM)
    ours = evaluate_sts(encoder, tmp_path, ["SICK-R-dev"], progress=False)["SICK-R-dev"]
    assert ours == pytest.approx(theirs, abs=0.01)
