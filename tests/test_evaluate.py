"""`clusterns evaluate`: figures, comparison, files, and errors that leave out one result."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, make_encoder, write_sts_folder

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.evaluate import evaluate
from clusterns.evaluation.correlation import spearman
from clusterns.evaluation.geometry import mean_cosine, uniformity
from clusterns.evaluation.sts import SEVEN, SHORT_NAMES, SUBSETS, load_sts, load_sts_subsets
from clusterns.evaluation.tables import report

SEVEN_SHORT = [SHORT_NAMES.get(name, name) for name in SEVEN]
QUICK = {"resamples": 0, "cluster_seeds": 1, "progress": False}


def write_varied_sts(root: Path) -> None:
    """All sets, nine pairs in a file, four in FNWN, and twelve in STS-B, which share a sentence."""
    write_sts_folder(root)
    generator = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(2, 7)))

    for path in sorted(root.rglob("STS.input.*")):
        count = 4 if "FNWN" in path.name else 9
        path.write_text("".join(f"{sentence()}\t{sentence()}\n" for _ in range(count)))
        gold = "".join(f"{score / 5}\n" for score in generator.integers(0, 26, count))
        path.with_name(path.name.replace("input", "gs")).write_text(gold)
    for path in sorted((root / "STS" / "STSBenchmark").iterdir()):
        scores = generator.permutation(12) / 11 * 5
        path.write_text("".join(f"g\tf\ty\t1\t{score}\ta cat sat\t{sentence()}\n" for score in scores))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models, all STS sets and labelled texts, which no test changes."""
    root = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("one", "two")):
        make_encoder(seed=seed, pooling="mean").save(root / name)
    write_varied_sts(root / "sts")
    lines = (f"{word}\ta {word} {other}\n" for word in WORDS[1:4] for other in [*WORDS[4:9], "zzz"])
    (root / "animals.tsv").write_text("".join(lines))
    generator = np.random.default_rng(1)
    pairs = ([" ".join(generator.choice(WORDS, 4)) for _ in range(2)] for _ in range(40))
    rows = [f"{first},{second},{index % 7 - 3}\n" for index, (first, second) in enumerate(pairs)]
    (root / "likeness.csv").write_text("".join(["text1,text2,similarity\n", *rows]))
    rows = [f"{row.rpartition(',')[0]}\n" for row in rows]
    (root / "found.csv").write_text("".join(["query,passage\n", *rows]))
    return root


@pytest.fixture(scope="module")
def models(place: Path) -> list[str]:
    return [str(place / "one"), str(place / "two")]


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    """The sets, to be changed."""
    return shutil.copytree(place / "sts", tmp_path / "sts")


@pytest.fixture(scope="module")
def results(place: Path, models: list[str]) -> dict:
    """What one command writes, with what it prints as "printed"."""
    out = place / "out"
    out.mkdir()
    (out / "a.json").write_text("old")
    files = ["--json", str(out / "a.json"), "--markdown", str(out / "a.md"), "--figure", str(out / "a.png")]
    own = [str(place / "likeness.csv"), str(place / "found.csv")]
    data = ["--sts-dir", str(place / "sts"), "--data", str(place / "animals.tsv"), *own]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["evaluate", *models, *data, "--cluster-seeds", "2", "--resamples", "200", *files]) == 0
    return {**json.loads((out / "a.json").read_text()), "printed": printed.getvalue()}


def test_one_command_writes_json_markdown_and_figure(results: dict, place: Path) -> None:
    out = place / "out"
    assert sorted(path.name for path in out.iterdir()) == ["a.json", "a.md", "a.png"]
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "a.md").read_text(encoding="utf-8")
    assert markdown == report(results) + "\n"
    assert results["printed"] == report(results, details=False) + "\n"
    assert "two − one" in markdown
    first = results["models"][0]
    row = next(line for line in markdown.splitlines() if line.startswith("| one "))
    figures = [*(first["sts"][name] for name in SEVEN_SHORT), first["avg"]]
    assert row.split()[3:-1:2] == [f"{figure['spearman']:.2f}" for figure in figures]
    assert (results["errors"], results["settings"]["resamples"]) == ([], 200)
    for model, label in zip(results["models"], ("one", "two"), strict=True):
        assert (model["label"], model["pooling"], model["max_length"]) == (label, "mean", 24)
        assert model["data"]["animals"]["seeds"] == [42, 43]
    # Each set is short of its published pairs, and says so.
    assert "STS12: 45 scored pairs, the published set has 3,108" in results["notes"]


def test_figures_are_those_of_their_definitions(results: dict, models: list[str], place: Path) -> None:
    model, folder = results["models"][0], place / "sts"
    encoder = SentenceEncoder.from_pretrained(models[0], max_length=24)

    def figure(pairs) -> float:
        return spearman("x", encoder.encode(pairs.first), encoder.encode(pairs.second), pairs.scores)

    assert list(model["sts"]) == [*SEVEN_SHORT, "STS-B-dev", "SICK-R-dev"]
    for name, short in zip(SEVEN, SEVEN_SHORT, strict=True):
        assert model["sts"][short]["spearman"] == pytest.approx(figure(load_sts(folder, name)))
        assert ("subsets" in model["sts"][short]) == (name in SUBSETS)
    found, parts = model["sts"]["STS13"], load_sts_subsets(folder, "STS13")
    values = {name: figure(pairs) for name, pairs in parts.items()}
    assert {name: part["spearman"] for name, part in found["subsets"].items()} == pytest.approx(values)
    assert [part["pairs"] for part in found["subsets"].values()] == [4, 9, 9]
    assert found["mean"]["spearman"] == pytest.approx(np.mean(list(values.values())))
    weighted = np.average(list(values.values()), weights=[4, 9, 9])
    assert found["weighted_mean"]["spearman"] == pytest.approx(weighted)
    sevens = [model["sts"][short] for short in SEVEN_SHORT]
    assert model["avg"]["spearman"] == pytest.approx(np.mean([part["spearman"] for part in sevens]))
    assert all(part["low"] <= part["high"] for part in (*sevens, model["avg"], found["mean"]))
    # The average's interval is narrower than that of the sets it is made of.
    assert model["avg"]["high"] - model["avg"]["low"] < min(part["high"] - part["low"] for part in sevens)
    # The weighted mean's interval is made of the same shares: none of its bounds is the plain one's.
    assert found["weighted_mean"]["low"] != found["mean"]["low"]
    dev = load_sts(folder, "STSBenchmark-dev")
    distinct = encoder.encode(sorted({*dev.first, *dev.second}))
    expected = {"uniformity": uniformity(distinct), "mean_cosine": mean_cosine(distinct)}
    assert {name: model["geometry"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert model["geometry"]["sentences"] == len(distinct)


def test_models_are_compared_on_the_same_pairs(results: dict) -> None:
    (comparison,) = results["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("one", "two")
    assert list(comparison["sets"])[9:] == ["avg", "animals", "likeness", "found"]
    for name, found in comparison["sets"].items():
        models = ({**model["sts"], "avg": model["avg"], **model["data"]}[name] for model in results["models"])
        first, second = (figure[found["figure"]] for figure in models)
        if name == "animals":
            first, second = first["mean"], second["mean"]
        assert found["difference"] == pytest.approx(second - first)
        assert found["low"] <= found["high"]
        assert 2 / 201 <= found["p_floor"] < 2 / 150  # a resample may have no correlation
        assert found["p_floor"] <= found["p_value"] <= 1


def test_data_of_each_kind_is_in_json_and_tables(results: dict, place: Path) -> None:
    animals, likeness, found = (
        results["models"][0]["data"][name] for name in ("animals", "likeness", "found")
    )
    assert [each["kind"] for each in (animals, likeness, found)] == ["labels", "pairs", "queries"]
    assert (likeness["pairs"], found["queries"]) == (40, 40)
    for each, value in (
        (animals, animals["accuracy"]["mean"]),
        (likeness, likeness["spearman"]),
        (found, found["mrr_at_10"]),
    ):
        assert each["low"] <= value <= each["high"]
    markdown = report(results)
    for title, value in (
        ("Clustering: animals", animals["accuracy"]["mean"]),
        ("Scored pairs: likeness", likeness["spearman"]),
        ("Queries: found", found["ndcg_at_10"]),
    ):
        section = markdown.split(f"## {title}, × 100")[1].split("##")[0]
        assert f" {value:.2f} " in section
    for model in (again := copy.deepcopy(results))["models"]:
        model["data"]["more"] = model["data"]["found"]
    section = report(again).split("## Queries, nDCG@10 × 100")[1].split("##")[0]
    assert section.count(f" {found['ndcg_at_10']:.2f} ") == 3  # of both sets, and their average
    assert f"{place / 'likeness.csv'}: csv parted by comma, header; 'text1', 'text2' with" in markdown


def test_the_table_prints_no_p_value_below_what_its_resamples_tell(results: dict) -> None:
    for resamples, p_value, said in (
        (1000, 2 / 1001, "(p < 0.002)"),
        (20, 2 / 21, "(p < 0.096)"),
        (50_000, 2 / 50_001, "(p < 4e-05)"),
        (1000, 4 / 1001, "(p 0.004)"),
    ):
        (comparison,) = copy.deepcopy(results["comparisons"])
        comparison["sets"]["avg"] |= {"p_value": p_value, "p_floor": 2 / (resamples + 1)}
        assert said in report({**results, "comparisons": [comparison]})


def test_what_cannot_be_evaluated_is_left_out_and_the_rest_is_written(
    models: list[str], place: Path, folder: Path, tmp_path: Path, capsys
) -> None:
    """One of everything that is wrong, and still all other results."""
    wrong = {
        "unlabelled.tsv": "1\ta cat\na dog\n",
        "sts/STS/STS14-en-test/STS.gs.images.txt": "1\n5.5\n" + "3\n" * 7,
        "sts/SICK/SICK_trial.txt": "1\ta cat\ta dog\t3.5\n",
        "sts/STS/STS16-en-test/STS.gs.answer-answer.txt": "3\n" * 9,
    }
    for name, content in wrong.items():
        (tmp_path / name).write_text(content)
    dev = folder / "STS" / "STSBenchmark" / "sts-dev.csv"  # scored from 0 to 1: nothing is above 4
    dev.write_text(
        "".join(f"g\tf\ty\t1\t{i / 12}\ta cat sat\ta {word}\n" for i, word in enumerate(WORDS[:12]))
    )
    encoder = SentenceEncoder.from_pretrained(models[1])
    with torch.no_grad():
        encoder.transformer.embeddings.LayerNorm.weight[0] = math.nan
    encoder.save(tmp_path / "broken")
    names = [models[0], str(tmp_path / "absent"), str(tmp_path / "broken")]
    texts = [str(tmp_path / "unlabelled.tsv"), str(place / "animals.tsv")]
    options = ["--sts-dir", str(folder), "--resamples", "20", "--cluster-seeds", "1"]
    files = ["--json", str(tmp_path / "a.json"), "--data", *texts]
    assert main(["evaluate", *names, *options, *files]) == 2
    results = json.loads((tmp_path / "a.json").read_text())
    model, broken = results["models"]
    assert list(model["sts"]) == [*SEVEN_SHORT[:2], *SEVEN_SHORT[3:], "STS-B-dev"]
    assert model["avg"] is None
    assert list(model["data"]) == ["animals"]
    geometry = model["geometry"]
    assert (geometry.pop("alignment"), geometry.pop("alike_pairs")) == (None, 0)
    assert all(math.isfinite(value) for value in geometry.values())
    assert "STS-B-dev: no pair is scored above 4, so there is no alignment" in results["notes"]
    assert (broken["sts"], broken["data"], broken["geometry"]) == ({}, {}, {})
    # One sub-set has no correlation: the others and all pairs together have, their mean has not.
    assert "answer-answer" not in model["sts"]["STS16"]["subsets"]
    assert len(model["sts"]["STS16"]["subsets"]) == 4
    assert "mean" not in model["sts"]["STS16"]
    expected = [
        "images.txt, line 2: expected a gold score from 0 to 5, got '5.5'",
        "unlabelled.tsv, line 2: expected a well-formed tsv file parted by tab, 2 fields as in",
        "one, STS16 answer-answer: expected cosines and gold scores that vary, got 9 pairs",
        "one, SICK-R-dev: expected cosines and gold scores that vary, got 1 pairs",
        "absent: model: expected a folder or a hub name",
        "broken, STS-B-dev: expected finite embeddings, got 12 pairs with NaN or infinity",
        "broken, animals: expected finite embeddings, got 18 texts with NaN or infinity",
    ]
    lines = capsys.readouterr().err.splitlines()
    for words in expected:
        assert any(words in line for line in results["errors"]), words
        assert any(line.startswith("clusterns: error: ") and words in line for line in lines), words
    # The broken model has one line more for each of the sets.
    assert len(results["errors"]) == len(expected) + 7
    assert results["comparisons"] == []
    assert "## Left out" in report(results)


def test_refusals_before_any_model_is_loaded(models: list[str], place: Path, tmp_path: Path, capsys) -> None:
    file = str(place / "animals.tsv")
    same = ["--data-columns", "2,2"]
    for options, words in (
        (["--data", file, "--json", file], "--json: expected a file that this command does not read"),
        (["--data", file, *same], "evaluate: expected data to evaluate on, got none"),
        (
            ["--data", file, "--data-corpus", file],
            "--data-corpus: expected queries in --data, got labels in a",
        ),
        (
            ["--sts-dir", file, "--data-kind", "labels"],
            "--data-kind: expected --data, whose files it is about",
        ),
        ([], "evaluate: expected --sts-dir or --data, got neither"),
        (["--sts-dir", str(tmp_path / "absent")], "evaluate: expected data to evaluate on, got none"),
    ):
        assert main(["evaluate", "absent/model", *options]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_pooling_for_each_model_and_labels_that_tell_them_apart(models, place, tmp_path) -> None:
    one, two, other = *models, str(tmp_path / "other" / "one")
    shutil.copytree(one, other)
    sts = {**QUICK, "sts_dir": place / "sts", "sets": ["STS-B"], "resamples": 50}
    results = evaluate([one, one, two, other, one], pooling=["auto", "cls", "cls", "auto", "auto"], **sts)
    found = [(model["label"], model["pooling"]) for model in results["models"]]
    assert found == [(f"{one} (auto)", "mean"), (f"{one} (cls)", "cls"), ("two", "cls"), (other, "mean")]
    figures = [model["sts"]["STS-B"]["spearman"] for model in results["models"]]
    alone = evaluate(models, pooling="cls", **sts)
    assert figures[1:3] == [model["sts"]["STS-B"]["spearman"] for model in alone["models"]]
    assert figures[0] != figures[1]
    (same,) = (c for c in results["comparisons"] if (c["first"], c["second"]) == (f"{one} (auto)", other))
    assert same["sets"]["STS-B"]["p_value"] == 1
