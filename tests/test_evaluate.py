"""The evaluation: its figures against their definitions and known scores, the table, the JSON."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import ROWS, make_encoder, write_sts_folder

from clusterns.encoder import SentenceEncoder
from clusterns.evaluate import (
    SEVEN,
    SHORT_NAMES,
    SUBSETS,
    alignment,
    evaluate_sts,
    format_table,
    load_sts,
    run,
    spearman,
    sts_dev,
    uniformity,
)

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


def test_a_perfect_encoder_and_its_reverse() -> None:
    angles = torch.tensor([0.1, 0.7, 1.3, 2.0])
    first, second = torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.stack([angles.cos(), angles.sin()], 1)
    assert spearman("x", first, second * 7, [5, 4, 2, 1]) == pytest.approx(100)
    assert spearman("x", first, second, [1, 2, 4, 5]) == pytest.approx(-100)


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


def test_alignment_and_uniformity_against_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
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
            monkeypatch.setattr("clusterns.evaluate.UNIFORMITY_ROWS", rows)
            assert uniformity(x, t) == pytest.approx(expected, rel=1e-9)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"^x: expected an \(N ≥ 2, D\) tensor, got \(1, 5\)$"):
        uniformity(x[:1])
    with pytest.raises(ValueError, match=r"^x, y: expected two"):
        alignment(x, y[:3])


def test_sts_dev(folder: Path) -> None:
    encoder = Letters()
    figures = sts_dev(encoder, folder)
    assert len(encoder.calls) == 1
    assert figures["spearman"] == evaluate_sts(encoder, folder, ["STSBenchmark-dev"], progress=False)["avg"]
    assert figures["alignment"] == pytest.approx(0, abs=1e-9)  # its one pair above 4 is an anagram
    assert figures["uniformity"] == pytest.approx(
        uniformity(encoder.encode(["aab", "abb", "cde", "h", "a b", "b a", "gh"])), rel=1e-9
    )


def test_format_table() -> None:
    rows = {
        "one": {"STS12": 1.005, "STSBenchmark-test": 70.0},
        "a longer name": {"STS12": 99.999, "avg": -3.0},
    }
    assert format_table(rows).splitlines() == [
        "| model         |  STS12 | STS-B |   avg |",
        "| :------------ | -----: | ----: | ----: |",
        f"| one           |   {1.005:.2f} | 70.00 |     - |",
        "| a longer name | 100.00 |     - | -3.00 |",
    ]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_encoder(pooling="mean", max_length=3).save(tmp_path / "model")
    return tmp_path / "model"


def test_run_prints_and_writes(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "figures.json"
    file.parent.mkdir()
    file.write_text("old")
    result = run(str(model), folder, json_file=file)
    assert json.loads(file.read_text()) == result
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"]
    assert (result["model"], result["pooling"]) == (str(model), "mean")
    called = {name: SHORT_NAMES.get(name, name) for name in (*SEVEN, "avg")}
    assert result["pairs"] == {called[name]: 4 * len(SUBSETS.get(name, [""])) for name in SEVEN}
    # The length it was trained with does not count, unless it is asked for.
    assert result["max_length"] == 24
    encoder = SentenceEncoder.from_pretrained(model, max_length=24)
    expected = evaluate_sts(encoder, folder, progress=False)
    assert {name: result[called[name]] for name in expected} == pytest.approx(expected)
    assert format_table({str(model): expected}) in capsys.readouterr().out
    short = run(str(model), folder, pooling="cls", max_length=3)
    assert (short["pooling"], short["max_length"]) == ("cls", 3)


def test_run_keeps_the_old_json_where_it_cannot_write(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"
    file.write_text("old")

    def fail(path: Path, value: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clusterns.evaluate.write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        run(str(model), folder, json_file=file)
    assert file.read_text() == "old"
    assert not list(tmp_path.glob(".figures*"))


def test_run_checks_before_it_loads_the_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^json_file: expected a file in a folder that exists"):
        run("absent/model", folder, json_file=tmp_path / "absent" / "figures.json")
    with pytest.raises(FileNotFoundError, match=r"^sts_dir: "):
        run("absent/model", tmp_path / "absent")


@needs_minilm
@pytest.mark.parametrize(("pooling", "known"), [("mean", 86.72), ("cls", 79.73)])
def test_known_scores_of_minilm(pooling: str, known: float) -> None:
    encoder = SentenceEncoder.from_pretrained(MINILM, pooling=pooling)
    assert sts_dev(encoder, STS)["spearman"] == pytest.approx(known, abs=0.05)
