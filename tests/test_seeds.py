"""Trainings over several seeds: starting them, and comparing groups of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from clusterns.cli import main
from clusterns.compare import compare, detectable, metric, report
from clusterns.training import seeds
from clusterns.training.arguments import read_config, show_config
from clusterns.training.config import TrainConfig, to_dict

SCORES = {"a": {1: 70.0, 2: 71.5, 3: 69.0}, "b": {1: 71.0, 2: 72.0, 3: 70.5, 9: 60.0}}


def write_run(folder, seed, score, dev="d", rows=5, finished=True, **settings):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").touch()
    config = TrainConfig(model="m", train_file="t.txt", seed=seed, output_dir=str(folder), **settings)
    data = {"train_file": [rows, "x"], "model": "m", "dev": dev}
    scores = {"before": {"spearman": 1.0}, "after": {"spearman": score, "uniformity": -1.0}}
    summary = {"finished": finished, "settings": to_dict(config), "scores": scores, "data": data}
    (folder / "training.json").write_text(json.dumps(summary))


@pytest.fixture
def groups(tmp_path):
    for group, scores in SCORES.items():
        for seed, score in scores.items():
            rate = {"learning_rate": 1e-4} if group == "b" else {}
            write_run(tmp_path / group / f"seed-{seed}", seed, score, **rate)
    return tmp_path


def test_comparison(groups, capsys):
    files = {name: groups / f"out.{name}" for name in ("json", "md", "png")}
    given = ["--json", files["json"], "--markdown", files["md"], "--figure", files["png"]]
    assert main(["compare", *map(str, [groups / "a", groups / "b", *given])]) == 0
    printed = capsys.readouterr().out
    assert printed == files["md"].read_text(encoding="utf-8")
    assert "70.17 ± 1.26" in printed
    results = json.loads(files["json"].read_text())
    metric = results["metrics"]["dev spearman"]
    [difference] = metric["differences"]
    shared = [[SCORES[group][seed] for seed in (1, 2, 3)] for group in "ba"]
    expected = ttest_rel(*shared)
    interval = expected.confidence_interval(0.95)
    assert difference["seeds"] == [1, 2, 3]
    assert difference["p_value"] == pytest.approx(expected.pvalue)
    assert (difference["low"], difference["high"]) == pytest.approx((interval.low, interval.high))
    assert difference["detectable"] == pytest.approx(detectable(difference["std"], 3))
    assert metric["groups"]["b"]["seeds"]["9"] == 60.0
    assert results["differing"] == {"--learning-rate": {"a": 5e-5, "b": 1e-4}}
    assert files["png"].stat().st_size > 5000


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_what_is_detectable_is_found_by_four_experiments_of_five(count):
    drawn = np.random.default_rng(0).normal(detectable(2.0, count), 2.0, (20_000, count))
    assert (ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.02)


def test_p_values_are_corrected_for_all_groups():
    noise = {seed: (seed * 7 % 5) / 10 for seed in range(6)}
    groups = {"first": dict.fromkeys(noise, 0.0)}
    for name, shift in (("one", 0.5), ("two", 0.05), ("three", 0.2), ("same", None)):
        groups[name] = {seed: 0.0 if shift is None else value - 0.2 + shift for seed, value in noise.items()}
    found = {each["second"]: each for each in metric(groups)["differences"]}
    one, two, three = (found[name]["p_value"] for name in ("one", "two", "three"))
    assert one < three < two
    # Holm: the least times as many as there are, and none below one before it.
    expected = [3 * one, max(3 * one, 2 * three), max(3 * one, 2 * three, two)]
    assert [found[name]["p_holm"] for name in ("one", "three", "two")] == pytest.approx(expected)
    assert found["same"]["p_value"] is None
    # Of two like ones the second may not seem surer than the first.
    both = metric(
        {**groups, "two": {s: 1.001 * v for s, v in groups["one"].items()}, "three": groups["first"]}
    )
    firm = [each["p_holm"] for each in both["differences"][:2]]
    assert firm == pytest.approx([2 * min(each["p_value"] for each in both["differences"][:2])] * 2)
    text = report(
        {"groups": groups, "metrics": {"dev": metric(groups)}, "differing": {}, "never_clustered": {}}
    )
    assert "p (Holm)" in text


def test_runs_named_one_by_one_and_one_seed(groups):
    results = compare([groups / "a" / "seed-1", groups / "a" / "seed-1", groups / "b" / "seed-1"])
    [difference] = results["metrics"]["dev spearman"]["differences"]
    assert (difference["mean"], difference["std"], difference["p_value"]) == (1.0, None, None)


def test_scores_of_an_evaluation(groups):
    models = [
        {"model": str(groups / group / f"seed-{seed}"), "sts": {"STS12": {"spearman": score / 2}}}
        for group, scores in SCORES.items()
        for seed, score in scores.items()
    ]
    for model in models:
        model |= {"avg": None, "data": {}}
    (groups / "scores.json").write_text(json.dumps({"models": models}))
    results = compare([groups / "a", groups / "b"], groups / "scores.json")
    assert list(results["metrics"]) == ["STS12"]
    assert results["metrics"]["STS12"]["groups"]["a"]["seeds"] == {1: 35.0, 2: 35.75, 3: 34.5}


def test_clustering_that_never_started_is_said(groups, capsys):
    summary = groups / "b" / "seed-1" / "training.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "clustered": False}))
    assert main(["compare", str(groups / "a"), str(groups / "b")]) == 0
    assert "b: clustering never started in 1 of 4 runs, which are plain SimCSE." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "expected another seed than"),
        ({"bml_beta": 0.4}, "got another --bml-beta: 0.4, not 0.5"),
        ({"rows": 6}, "got another content of --train-file"),
        ({"finished": False}, "expected a training that has ended"),
    ],
)
def test_runs_that_are_no_group(groups, change, words, capsys):
    write_run(groups / "a" / "seed-4", **{"seed": 4, "score": 1.0, **change})
    assert main(["compare", str(groups / "a")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_groups_judged_by_different_data(groups):
    write_run(groups / "c" / "seed-2", 2, 1.0, dev="other")
    with pytest.raises(ValueError, match="expected to be judged by the dev data of"):
        compare([groups / "a", groups / "c"])


def test_what_compare_reads_is_not_written(groups, capsys):
    (groups / "scores.json").write_text("{}")
    for given in (["--scores", "scores.json", "--json", "scores.json"], ["--json", "a/seed-1/training.json"]):
        arguments = ["compare", "a", *given]
        arguments = [
            word if word[0] == "-" or word == "compare" else str(groups / word) for word in arguments
        ]
        assert main(arguments) == 2
        assert "--json: expected a file that this command does not read" in capsys.readouterr().err


def test_runs_without_scores_or_without_a_common_seed(groups):
    write_run(groups / "c" / "seed-7", 7, float("nan"))
    with pytest.raises(ValueError, match="seed-7: expected a number as dev spearman, got nan"):
        compare([groups / "c"])
    write_run(groups / "d" / "seed-8", 8, 1.0, dev="other", sts_dir="s")
    write_run(groups / "e" / "seed-9", 9, 1.0, sts_dir="s")
    with pytest.raises(ValueError, match="expected to be judged by the dev data of"):
        compare([groups / "d", groups / "e"])
    summary = groups / "e" / "seed-9" / "training.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "scores": {"after": {}}}))
    with pytest.raises(ValueError, match="RUN: expected runs with dev scores, got none"):
        compare([groups / "e"])


@pytest.mark.parametrize("name", ["nothing", "."])
def test_no_runs(tmp_path, name):
    with pytest.raises((ValueError, OSError), match="RUN: expected the output folder of a training"):
        compare([tmp_path / name])


def start_instead(monkeypatch, tmp_path, code):
    """Run a short program in place of the training; it gets the file of settings."""

    def start(command, **given):
        file = command[command.index("--config") + 1]
        return popen([sys.executable, "-c", code, file, str(tmp_path)], **given)

    popen = seeds.subprocess.Popen
    monkeypatch.setattr(seeds.subprocess, "Popen", start)


NOTES = """import os, pathlib, shutil, sys
place = pathlib.Path(sys.argv[2])
(place / os.environ["CUDA_VISIBLE_DEVICES"]).touch()
shutil.copy(sys.argv[1], place)
"""


LATE = """time.sleep(20)
(place / "not stopped").touch()
"""


def test_a_process_for_each_seed(monkeypatch, tmp_path):
    start_instead(monkeypatch, tmp_path, NOTES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(seeds.torch.cuda, "device_count", lambda: 2)
    config = TrainConfig.from_settings({"output_dir": str(tmp_path / "runs"), "seed": 7, "bml_beta": 0.4})
    folders = seeds.train_seeds(config, 3)
    assert [folder.name for folder in folders] == ["seed-7", "seed-8", "seed-9"]
    assert (tmp_path / "2").exists()
    assert (tmp_path / "5").exists()
    assert all((tmp_path / "runs" / f"{folder.name}.log").is_file() for folder in folders)
    parser_given = type("Given", (), {"config": str(tmp_path / "8.yaml")})()
    again = read_config(parser_given)
    assert show_config(again) == (tmp_path / "8.yaml").read_text(encoding="utf-8")
    expected = to_dict(config) | {"seed": 8, "output_dir": str(folders[1])}
    assert to_dict(again) == expected


def test_a_seed_that_fails_ends_the_others(monkeypatch, tmp_path):
    start_instead(monkeypatch, tmp_path, "import sys; sys.exit(3)")
    config = TrainConfig.from_settings({"output_dir": str(tmp_path / "runs"), "device": "cpu"})
    with pytest.raises(ValueError, match="seed-42: expected a training that ends well, got exit status 3"):
        seeds.train_seeds(config, 2)


def test_a_stop_ends_the_runs_too(monkeypatch, tmp_path):
    """And an occupied folder is known before the first run starts."""
    write_run(tmp_path / "runs" / "seed-43", 43, 1.0)
    config = TrainConfig.from_settings({"output_dir": str(tmp_path / "runs"), "device": "cpu"})
    start_instead(monkeypatch, tmp_path, NOTES.replace("import", "import time,", 1) + LATE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "x")
    with pytest.raises(FileExistsError, match="seed-43 holds files"):
        seeds.train_seeds(config, 2)
    assert not (tmp_path / "x").exists()

    def stop():
        while not (tmp_path / "42.yaml").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        seeds.train_seeds(config, 1)
    assert not (tmp_path / "not stopped").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["seed-43"]


def test_what_seeds_exclude(tmp_path, monkeypatch):
    config = TrainConfig.from_settings({"output_dir": str(tmp_path), "push_to_hub": "a/b"})
    with pytest.raises(ValueError, match="--push-to-hub: expected none with --seeds"):
        seeds.train_seeds(config, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--seeds: expected one process"):
        seeds.train_seeds(config, 2)
    assert os.listdir(tmp_path) == []
