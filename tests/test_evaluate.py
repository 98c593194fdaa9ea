"""`clusterns evaluate`: figures, comparison, files, and errors that leave out one result."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SENTENCES, WORDS, make_encoder, write_sts_folder

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.evaluate import evaluate
from clusterns.evaluation.correlation import spearman
from clusterns.evaluation.geometry import mean_cosine, uniformity
from clusterns.evaluation.sts import SEVEN, SHORT_NAMES, SUBSETS, load_sts, load_sts_subsets
from clusterns.evaluation.tables import format_table, report

SEVEN_SHORT = [SHORT_NAMES.get(name, name) for name in SEVEN]


def varied_sts_folder(root: Path) -> Path:
    """All sets, with pairs of their own in each file."""
    write_sts_folder(root)
    generator = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(2, 7)))

    for path in sorted(root.rglob("STS.input.*")):
        path.write_text("".join(f"{sentence()}\t{sentence()}\n" for _ in range(9)))
        gold = "".join(f"{score / 5}\n" for score in generator.integers(0, 26, 9))
        path.with_name(path.name.replace("input", "gs")).write_text(gold)
    for path in sorted((root / "STS" / "STSBenchmark").iterdir()):
        rows = zip((sentence() for _ in range(12)), generator.permutation(12) / 11 * 5, strict=True)
        path.write_text("".join(f"g\tf\ty\t1\t{score}\t{first}\t{sentence()}\n" for first, score in rows))
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return varied_sts_folder(tmp_path / "sts")


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    for seed, name in enumerate(("one", "two")):
        make_encoder(seed=seed, pooling="mean").save(tmp_path / name)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "animals.tsv"
    path.write_text("".join(f"{word}\ta {word} {other}\n" for word in WORDS[1:4] for other in WORDS[4:10]))
    return path


def test_one_command_writes_json_markdown_and_figure(
    models: list[str], folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.json").write_text("old")
    files = ["--json", str(out / "a.json"), "--markdown", str(out / "a.md"), "--figure", str(out / "a.png")]
    options = ["--sts-dir", str(folder), "--clustering", str(texts), "--cluster-seeds", "2"]
    assert main(["evaluate", *models, *options, "--resamples", "50", *files]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.json", "a.md", "a.png"]
    results = json.loads((out / "a.json").read_text())
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "a.md").read_text(encoding="utf-8")
    assert markdown == report(results) + "\n"
    printed = capsys.readouterr().out
    assert printed == report(results, details=False) + "\n"
    assert "STS12 weighted mean" in markdown
    assert "STS12 weighted mean" not in printed

    assert [model["label"] for model in results["models"]] == ["one", "two"]
    assert (results["errors"], results["settings"]["resamples"]) == ([], 50)
    for model in results["models"]:
        assert (model["pooling"], model["max_length"], model["library"]) == ("mean", 24, "clusterns")
        assert list(model["sts"]) == [*SEVEN_SHORT, "STS-B-dev", "SICK-R-dev"]
        assert model["clustering"]["animals"]["seeds"] == [42, 43]
        for figures in (*model["sts"].values(), model["avg"]):
            assert figures["low"] <= figures["high"]
    # Each set is short of its published pairs, and says so.
    assert "STS12: 45 scored pairs, the published set has 3,108" in results["notes"]


def test_figures_are_those_of_their_definitions(models: list[str], folder: Path) -> None:
    results = evaluate(models[:1], sts_dir=folder, resamples=0, progress=False)
    (model,) = results["models"]
    encoder = SentenceEncoder.from_pretrained(models[0], max_length=24)

    def figure(pairs) -> float:
        return spearman("x", encoder.encode(pairs.first), encoder.encode(pairs.second), pairs.scores)

    for name, short in zip(SEVEN, SEVEN_SHORT, strict=True):
        found = model["sts"][short]
        assert found["spearman"] == pytest.approx(figure(load_sts(folder, name)))
        assert (found["low"], found["high"]) == (None, None)
        assert ("subsets" in found) == (name in SUBSETS)
    parts = load_sts_subsets(folder, "STS13")
    values = {name: figure(pairs) for name, pairs in parts.items()}
    found = model["sts"]["STS13"]
    assert {name: part["spearman"] for name, part in found["subsets"].items()} == pytest.approx(values)
    assert found["mean"]["spearman"] == pytest.approx(np.mean(list(values.values())))
    sevens = [model["sts"][short]["spearman"] for short in SEVEN_SHORT]
    assert model["avg"]["spearman"] == pytest.approx(np.mean(sevens))
    dev = load_sts(folder, "STSBenchmark-dev")
    distinct = encoder.encode(sorted({*dev.first, *dev.second}))
    assert model["geometry"]["uniformity"] == pytest.approx(uniformity(distinct), rel=1e-6)
    assert model["geometry"]["mean_cosine"] == pytest.approx(mean_cosine(distinct), rel=1e-6)
    assert model["geometry"]["sentences"] == len(distinct)
    assert results["comparisons"] == []


def test_a_dev_set_scored_from_0_to_1_lacks_the_alignment_alone(models: list[str], folder: Path) -> None:
    path = folder / "STS" / "STSBenchmark" / "sts-dev.csv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    path.write_text("".join("\t".join([*r[:4], str(float(r[4]) / 5), *r[5:]]) + "\n" for r in rows))
    results = evaluate(models[:1], sts_dir=folder, sets=["STS-B-dev"], resamples=0, progress=False)
    geometry = results["models"][0]["geometry"]
    assert (geometry.pop("alignment"), geometry.pop("alike_pairs")) == (None, 0)
    assert all(math.isfinite(value) for value in geometry.values())
    assert list(geometry) == ["sentences", "uniformity", "mean_cosine", "first_component_share"]
    assert results["errors"] == []
    assert "STS-B-dev: no pair is scored above 4, so there is no alignment" in results["notes"]


def test_weighted_mean_goes_by_the_pairs_of_the_sub_sets(models: list[str], folder: Path) -> None:
    place = folder / "STS" / "STS13-en-test"
    for kind in ("input", "gs"):  # four pairs of FNWN stay
        lines = (place / f"STS.{kind}.FNWN.txt").read_text().splitlines(keepends=True)
        (place / f"STS.{kind}.FNWN.txt").write_text("".join(lines[:4]))
    results = evaluate(models[:1], sts_dir=folder, sets=["STS13"], resamples=20, progress=False)
    found = results["models"][0]["sts"]["STS13"]
    parts = found["subsets"].values()
    assert [part["pairs"] for part in parts] == [4, 9, 9]
    weighted = sum(part["pairs"] * part["spearman"] for part in parts) / 22
    assert found["weighted_mean"]["spearman"] == pytest.approx(weighted)
    assert found["mean"]["spearman"] != pytest.approx(weighted)
    assert results["models"][0]["avg"] is None
    assert results["models"][0]["geometry"] == {}


def test_models_are_compared_on_the_same_pairs(models: list[str], folder: Path) -> None:
    results = evaluate(models, sts_dir=folder, resamples=200, progress=False)
    one, two = results["models"]
    (comparison,) = results["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("one", "two")
    assert list(comparison["sets"]) == [*SEVEN_SHORT, "STS-B-dev", "SICK-R-dev", "avg"]
    for name, found in comparison["sets"].items():
        first, second = (m["avg"] if name == "avg" else m["sts"][name] for m in (one, two))
        assert found["difference"] == pytest.approx(second["spearman"] - first["spearman"])
        assert found["low"] <= found["high"]
        assert 0 < found["p_value"] <= 1
    table = report(results)
    assert "two − one" in table
    # The average's interval is narrower than that of the sets it is made of.
    widths = [one["sts"][name]["high"] - one["sts"][name]["low"] for name in SEVEN_SHORT]
    assert one["avg"]["high"] - one["avg"]["low"] < min(widths)


def test_half_precision_reaches_the_encoder(
    models: list[str], folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, asked = SentenceEncoder.encode, []

    def recording(self: SentenceEncoder, sentences: list[str], **settings: object) -> torch.Tensor:
        asked.append(settings.get("dtype"))
        return encode(self, sentences, **settings)

    monkeypatch.setattr(SentenceEncoder, "encode", recording)
    settings = {"sts_dir": folder, "clustering": [texts], "cluster_seeds": 1, "progress": False}
    for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        asked.clear()
        results = evaluate(models[:1], precision=precision, resamples=0, **settings)
        assert asked == [dtype, dtype]
        assert results["settings"]["precision"] == precision
        assert results["errors"] == []
    with pytest.raises(ValueError, match=r"^precision: expected one of 'fp32', 'bf16', got 'int8'$"):
        evaluate(models[:1], precision="int8", **settings)


def test_what_cannot_be_evaluated_is_left_out_and_the_rest_is_written(
    models: list[str], folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of everything that is wrong, and still all other results."""
    (tmp_path / "single.tsv").write_text("1\ta cat\n1\ta dog\n")
    (tmp_path / "unlabelled.tsv").write_text("1\ta cat\na dog\n")
    shutil.copytree(models[1], tmp_path / "no-tokenizer")
    (tmp_path / "no-tokenizer" / "tokenizer.json").unlink()
    (folder / "STS" / "STS12-en-test" / "STS.input.MSRvid.txt").write_text("a\tb\nragged\n" + "a\tb\n" * 7)
    (folder / "STS" / "STS14-en-test" / "STS.gs.images.txt").write_text("1\n5.5\n" + "3\n" * 7)
    one_line = folder / "SICK" / "SICK_trial.txt"
    one_line.write_text("1\ta cat\ta dog\t3.5\n")
    answers = folder / "STS" / "STS16-en-test" / "STS.gs.answer-answer.txt"
    answers.write_text("3\n" * 9)
    json_file = tmp_path / "figures.json"
    clustering = [str(tmp_path / "single.tsv"), str(tmp_path / "unlabelled.tsv"), str(texts)]
    names = [models[0], str(tmp_path / "no-tokenizer"), str(tmp_path / "absent")]
    options = ["--sts-dir", str(folder), "--resamples", "20", "--cluster-seeds", "1"]
    files = ["--json", str(json_file), "--clustering", *clustering]
    status = main(["evaluate", *names, *options, *files])
    assert status == 2
    results = json.loads(json_file.read_text())
    (model,) = results["models"]
    assert list(model["sts"]) == ["STS13", "STS15", "STS16", "STS-B", "SICK-R", "STS-B-dev"]
    assert model["avg"] is None
    assert list(model["clustering"]) == ["animals"]
    # One sub-set has no correlation: the others and all pairs together have, their mean has not.
    assert "answer-answer" not in model["sts"]["STS16"]["subsets"]
    assert len(model["sts"]["STS16"]["subsets"]) == 4
    assert "mean" not in model["sts"]["STS16"]
    expected = [
        "MSRvid.txt, line 2: expected at least 2 columns between tabs, got 1",
        "images.txt, line 2: expected a gold score from 0 to 5, got '5.5'",
        "single.tsv: expected at least two classes in '1', got only '1'",
        "unlabelled.tsv, line 2: expected a well-formed tsv file parted by tab, 2 fields as in",
        "one, STS16 answer-answer: expected cosines and gold scores that vary, got 9 pairs",
        "one, SICK-R-dev: expected cosines and gold scores that vary, got 1 pairs",
        "no-tokenizer: model: expected tokenizer",
        "absent: model: expected a folder or a hub name",
    ]
    lines = capsys.readouterr().err.splitlines()
    for words in expected:
        assert any(words in line for line in results["errors"]), words
        assert any(line.startswith("clusterns: error: ") and words in line for line in lines), words
    assert len(results["errors"]) == len(expected)
    assert "## Left out" in report(results)


def test_embeddings_with_nan_leave_the_other_model(
    models: list[str], folder: Path, texts: Path, tmp_path: Path
) -> None:
    encoder = SentenceEncoder.from_pretrained(models[1])
    with torch.no_grad():
        encoder.transformer.embeddings.LayerNorm.weight[0] = math.nan
    encoder.save(tmp_path / "broken")
    results = evaluate(
        [str(tmp_path / "broken"), models[0]],
        sts_dir=folder,
        sets=["STS-B", "STS-B-dev"],
        clustering=[texts],
        cluster_seeds=1,
        progress=False,
    )
    broken, whole = results["models"]
    assert (broken["sts"], broken["clustering"], broken["geometry"]) == ({}, {}, {})
    assert list(whole["sts"]) == ["STS-B", "STS-B-dev"]
    assert results["errors"] == [
        "broken, STS-B: expected finite embeddings, got 12 pairs with NaN or infinity",
        "broken, STS-B-dev: expected finite embeddings, got 12 pairs with NaN or infinity",
        "broken, animals: expected finite embeddings, got 18 texts with NaN or infinity",
    ]
    assert results["comparisons"] == []
    json.dumps(results, allow_nan=False)


def test_refusals_before_any_model_is_loaded(
    models: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sts = ["--sts-dir", str(folder)]
    file = str(tmp_path / "texts.tsv")
    Path(file).write_text("1\ta cat\n2\ta dog\n")
    dev = str(folder / "STS" / "STSBenchmark" / "sts-dev.csv")
    for options, words in (
        (
            ["--clustering", file, "--json", file],
            f"--json: expected a file that this command does not read, got {file}",
        ),
        ([*sts, "--markdown", dev], f"got {dev}, which is of --sts-dir {folder}; choose another"),
        ([models[0], *sts, "--json", f"{models[0]}/config.json"], f"which is of model {models[0]}; choose"),
        ([*sts, "--json", "a.json", "--markdown", "a.json"], "--markdown: expected another file than --json"),
        ([*sts, "--figure", "a.xyz"], "--figure: expected a suffix of"),
        ([*sts, "--figure", "a"], ", got none"),
        ([*sts, "--json", ""], "--json: expected a path, got an empty one"),
        (["--sts-dir", ""], "--sts-dir: expected a path, got an empty one"),
        (["~nosuchuser/x", *sts], "model: expected the home folder of a user that exists, got ~nosuchuser/x"),
        ([*sts, "--seed", "5000000000"], "--seed: expected 0 to 4294967291, got 5000000000"),
        (
            ["--clustering", file, "--text-columns", "2", "--label-column", "2"],
            "--label-column: expected another than --text-columns, got '2' for both",
        ),
        ([], "evaluate: expected --sts-dir or --clustering, got neither"),
        ([*sts, "--json", str(tmp_path / "absent" / "a.json")], "--json: expected a file in a folder that"),
        ([*sts, "--figure", str(tmp_path)], "--figure: expected a file, got the folder"),
        ([*sts, "--resamples", "-1"], "resamples: expected at least 0, got -1"),
        ([*sts, "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (
            ["--sts-dir", str(tmp_path / "absent")],
            "evaluate: expected data to evaluate on, got none",
        ),
        ([*sts, "--sts-sets", "STS17"], "evaluate: expected data to evaluate on, got none"),
    ):
        assert main(["evaluate", "absent/model", *options]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_old_files_stay_where_new_ones_cannot_be_written(
    models: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"
    file.write_text("old")

    def full_disk(path: Path, text: str, **kwargs: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert main(["evaluate", models[0], "--sts-dir", str(folder), "--json", str(file)]) == 2
    assert file.read_bytes() == b"old"
    assert not list(tmp_path.glob(".figures*"))


def test_labels_tell_models_apart(tmp_path: Path, folder: Path, models: list[str]) -> None:
    shutil.copytree(models[0], tmp_path / "other" / "one")
    both = [models[0], str(tmp_path / "other" / "one"), models[0]]
    results = evaluate(both, sts_dir=folder, sets=["STS-B"], resamples=50, progress=False)
    assert [model["label"] for model in results["models"]] == both[:2]
    assert results["comparisons"][0]["sets"]["STS-B"]["p_value"] == 1


def test_a_pooling_for_each_model(
    models: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sts = {"sts_dir": folder, "sets": ["STS-B"], "resamples": 0, "progress": False}
    twice = [models[0], models[0], models[1]]
    results = evaluate(twice, pooling=["auto", "cls", "cls"], **sts)
    found = [(model["label"], model["pooling"]) for model in results["models"]]
    assert found == [("one (auto)", "mean"), ("one (cls)", "cls"), ("two", "cls")]
    figures = [model["sts"]["STS-B"]["spearman"] for model in results["models"]]
    alone = evaluate(models, pooling="cls", **sts)
    assert figures[1:] == [model["sts"]["STS-B"]["spearman"] for model in alone["models"]]
    assert figures[0] != figures[1]
    options = ["--sts-dir", str(folder), "--sts-sets", "STS-B", "--resamples", "0"]
    assert main(["evaluate", *models, *options, "--pooling", "auto,cls"]) == 0
    assert main(["evaluate", *models, *options, "--pooling", "auto,cls,cls"]) == 2
    assert "pooling: expected one for all or one for each of 2 models, got 3" in capsys.readouterr().err


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


def test_sentences_without_known_words_do_not_stop_anything(models: list[str], tmp_path: Path) -> None:
    path = tmp_path / "odd.tsv"
    path.write_text("".join(f"{i % 2}\t{text or 'zzz'}\n" for i, text in enumerate(SENTENCES)))
    results = evaluate(models[:1], clustering=[path], cluster_seeds=1, progress=False)
    assert results["errors"] == []
    assert results["models"][0]["sts"] == {}
    assert "Clustering, accuracy" in report(results)
