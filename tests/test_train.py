"""The loop on a tiny encoder: what it writes, when it stops, what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from test_docstrings import write_packages
from tiny import assert_close
from train_problems import (
    assert_trained_alike,
    flags,
    log_of,
    refused,
    save_tiny_model,
    sentences,
    write_dev,
)

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.training.figure import draw_run

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(sentences(300)) + "\n")
    return path


@pytest.fixture
def sts_dir(tmp_path):
    return write_dev(tmp_path / "sts")


def test_a_run_writes_what_it_says(tiny_model, train_file, sts_dir, tmp_path, capsys, monkeypatch):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr("clusterns.train.draw_run", draw_run)
    output = tmp_path / "run"
    more = ["--sts-dir", str(sts_dir), "--max-steps", "12", "--eval-steps", "4", "--patience", "0"]
    assert main(flags(tiny_model, train_file, output, *more)) == 0

    records = log_of(output)
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, 13))
    assert [record["step"] for record in records if "dev" in record] == [0, 4, 8, 12]
    assert [r["step"] for r in records if r.get("event") == "clustering starts"] == [1]
    assert "nearest_cosine" not in next(r for r in records if r["step"] == 1 and "loss" in r)
    assert "nearest_cosine" in next(r for r in records if r["step"] == 2 and "loss" in r)
    assert records[-1]["dev"].keys() == {"spearman", "alignment", "uniformity"}

    summary = json.loads((output / "training.json").read_text())
    assert summary["settings"]["num_clusters"] == 4
    best = max(records, key=lambda r: r.get("dev", {}).get("spearman", -100))
    assert summary["best_step"] == best["step"]
    assert summary["scores"]["after"] == best["dev"]
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "after" in printed
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    state = load_file(output / "loss.safetensors")
    assert state["centroids"].shape == (4, 32)
    assert sorted(path.name for path in output.glob(".*")) == []

    texts = sentences(10)
    ours = SentenceEncoder.from_pretrained(output).encode(texts)
    theirs = SentenceTransformer(str(output), device="cpu").encode(texts, convert_to_tensor=True)
    assert_close(theirs, ours)
    inputs = AutoTokenizer.from_pretrained(output)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(output).eval()(**inputs).last_hidden_state
    assert_close(ours, hidden[:, 0])


def test_training_learns(tiny_model, train_file, tmp_path):
    output = tmp_path / "run"
    more = ["--max-steps", "60", "--start-cosine", "0.6", "--learning-rate", "3e-3"]
    assert main(flags(tiny_model, train_file, output, *more)) == 0
    terms = [record for record in log_of(output) if "loss" in record]
    assert sum(r["info_nce"] for r in terms[-5:]) < 0.8 * sum(r["info_nce"] for r in terms[:5])


def test_same_seed_same_bits(tiny_model, train_file, tmp_path):
    for name in ("one", "two"):
        assert main(flags(tiny_model, train_file, tmp_path / name, "--max-steps", "5")) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    start = load_file(tiny_model / "model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in one.items())


def test_early_stop_keeps_the_best(tiny_model, train_file, sts_dir, tmp_path, monkeypatch):
    """A dev score that only falls ends the run after `patience` evaluations and keeps the first model."""
    import clusterns.training.task as module

    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(module, "sts_dev", lambda encoder, sts_dir: {"spearman": float(next(falling))})
    output = tmp_path / "run"
    more = ["--sts-dir", str(sts_dir), "--max-steps", "50", "--eval-steps", "2", "--patience", "3"]
    assert main(flags(tiny_model, train_file, output, *more)) == 0
    assert max(record["step"] for record in log_of(output)) == 6
    kept, start = (load_file(folder / "model.safetensors") for folder in (output, tiny_model))
    assert all(torch.equal(value, kept[name]) for name, value in start.items())


def test_simcse_baseline_never_clusters(tiny_model, train_file, tmp_path):
    output = tmp_path / "run"
    assert main(flags(tiny_model, train_file, output, "--max-steps", "3", "--num-clusters", "0")) == 0
    assert all("event" not in record for record in log_of(output))


def test_without_head(tiny_model, train_file, tmp_path):
    """There is none then, and the encoder learns something else."""
    for head in ("train", "none"):
        assert main(flags(tiny_model, train_file, tmp_path / head, "--max-steps", "3", "--head", head)) == 0
    start = load_file(tiny_model / "head.safetensors")
    assert not torch.equal(load_file(tmp_path / "train" / "head.safetensors")["weight"], start["weight"])
    assert not (tmp_path / "none" / "head.safetensors").exists()
    one, other = (load_file(tmp_path / head / "model.safetensors") for head in ("train", "none"))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_bf16_and_epochs(tiny_model, train_file, tmp_path):
    output = tmp_path / "run"
    assert main(flags(tiny_model, train_file, output, "--precision", "bf16", "--epochs", "2")) == 0
    assert max(record["step"] for record in log_of(output)) == 2 * (300 // 32)


def test_mini_batches_train_as_the_whole_batch_does(train_file, tmp_path):
    """Without dropout, whose masks depend on the order of the passes: the same run up to rounding."""
    still = save_tiny_model(tmp_path / "still", dropout=0.0, pooling="mean", std=0.2)
    longest = {}
    forward = SentenceEncoder.forward

    def watched(self, inputs, **options):
        if torch.is_grad_enabled():
            longest[name] = max(longest.get(name, 0), len(inputs["input_ids"]))
        return forward(self, inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentenceEncoder, "forward", watched)
        for name, more in {"whole": [], "parts": ["--mini-batch-size", "5"]}.items():
            assert main(flags(still, train_file, tmp_path / name, "--max-steps", "6", *more)) == 0
    assert longest == {"whole": 64, "parts": 5}
    whole, parts = (
        [record["loss"] for record in log_of(tmp_path / name) if "loss" in record] for name in longest
    )
    assert parts == pytest.approx(whole, rel=2e-4)
    assert len(whole) == 6
    assert_trained_alike(still, *(tmp_path / name for name in longest))
    one, other = (load_file(tmp_path / name / "loss.safetensors") for name in longest)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert_close(other[key], value, 1e-3)
    settings = [json.loads((tmp_path / name / "training.json").read_text())["settings"] for name in longest]
    assert [each["mini_batch_size"] for each in settings] == [None, 5]


def test_the_default_run_in_short(tmp_path, monkeypatch, capsys):
    """`clusterns train` with no model: documentation, its vocabulary and a new BERT, a few steps."""
    import clusterns.training.task as module

    corpus, packages = module.docstring_corpus, write_packages(tmp_path / "packages")
    monkeypatch.setattr(
        module, "docstring_corpus", lambda seed: corpus(roots=[packages], seed=seed, pairs=20)
    )
    output = tmp_path / "run"
    short = "--max-steps 20 --batch-size 32 --num-clusters 8 --eval-steps 20 --start-cosine 0.9".split()
    assert main(["train", "--output-dir", str(output), "--device", "cpu", *short]) == 0
    before, after = (record["dev"]["mrr"] for record in log_of(output) if "dev" in record)
    assert 0 < before < after
    settings = json.loads((output / "training.json").read_text())["settings"]
    assert (settings["pooling"], settings["learning_rate"], settings["batch_size"]) == ("mean", 1e-3, 32)
    printed = capsys.readouterr().out
    assert "clustering starts with 8 centroids" in printed
    assert "clusterns train --preset bert-base" in printed


def test_output_folder_is_guarded(tiny_model, train_file, tmp_path, capsys):
    from clusterns.files import holding

    output = tmp_path / "run"
    run = flags(tiny_model, train_file, output, "--max-steps", "1")
    assert main(run) == 0
    before = (output / "model.safetensors").read_bytes()
    assert "holds files; choose another or pass --overwrite-output-dir" in refused(capsys, run)
    assert (output / "model.safetensors").read_bytes() == before
    with holding(output / ".lock"):
        assert "in use by a running training" in refused(capsys, [*run, "--overwrite-output-dir"])
    assert main([*run, "--overwrite-output-dir"]) == 0
    assert "expected a folder, got the file" in refused(capsys, flags(tiny_model, train_file, train_file))
    for place, words in (
        (tiny_model, f"--output-dir: expected another folder than that of --model {tiny_model}, got"),
        ("~nosuchuser/x", "--output-dir: expected the home folder of a user that exists, got ~nosuchuser/x"),
        ("", "--output-dir: expected a path, got an empty one"),
        (tmp_path / "x" / ("y" * 300), "--output-dir: expected a folder that can be written to, got"),
    ):
        message = refused(capsys, flags(tiny_model, train_file, place, "--overwrite-output-dir"))
        assert words in message
        assert "Errno" not in message
    assert not (tmp_path / "x").exists()
    assert not os.path.exists("~nosuchuser")
    copy = output / "checkpoints" / "step-00000001" / "best"
    words = refused(capsys, flags(copy, train_file, output, "--overwrite-output-dir"))
    assert "--output-dir: expected another folder than that of --model" in words


def test_bad_files_and_settings(tiny_model, train_file, tmp_path, capsys):
    empty, blank, binary, few = (tmp_path / f"{name}.txt" for name in ("empty", "blank", "binary", "few"))
    empty.write_text("")
    blank.write_text("\n \n\t\n")
    binary.write_bytes(b"\x00\x01\xff" * 100)
    few.write_text("one short line\n\nanother short line\n")
    for path, words in (
        (tmp_path / "absent.txt", "absent"),
        (empty, "empty"),
        (blank, "blank"),
        (binary, "binary"),
    ):
        message = refused(capsys, flags(tiny_model, path, tmp_path / f"run-{words}"))
        assert path.name in message
    message = refused(capsys, flags(tiny_model, few, tmp_path / "run-few"))
    assert f"--batch-size: expected at most the 2 rows of {few}, got 32" in message
    assert "absent-model" in refused(capsys, flags(tmp_path / "absent-model", train_file, tmp_path / "run-a"))
    assert "temperature: expected a finite number above 0" in refused(
        capsys, flags(tiny_model, train_file, tmp_path / "run-t", "--temperature", "0")
    )
    assert "mini_batch_size: expected" in refused(
        capsys, flags(tiny_model, train_file, tmp_path / "run-m", "--mini-batch-size", "0")
    )
    assert "num_clusters: expected at least 2 with hard_negatives" in refused(
        capsys, flags(tiny_model, train_file, tmp_path / "run-k", "--num-clusters", "1")
    )
    for more, words in (
        ("--batch-size 1 --num-clusters 0", "batch_size: expected at least 2, got 1"),
        ("--batch-size 16 --num-clusters 32", "num_clusters: expected at most batch_size 16, of which the"),
        ("--seed 4294967296", "--seed: expected 0 to 4294967295, got 4294967296"),
        (
            "--learn-temperature --temperature 2",
            "expected a finite number at least 0.01 and at most 1, got 2.0",
        ),
        ("--accumulation-steps 10", "accumulation_steps: expected at most 9, the batches of 32 in 1 epochs"),
    ):
        given = flags(tiny_model, train_file, tmp_path / "run-n", *more.split())
        assert words in refused(capsys, given)
        assert not (tmp_path / "run-n").exists()
    assert "--device: expected a device of this machine, got 'toaster'" in refused(
        capsys, flags(tiny_model, train_file, tmp_path / "run-d", "--device", "toaster")
    )
    assert "sts-dev.csv" in refused(
        capsys, flags(tiny_model, train_file, tmp_path / "run-s", "--sts-dir", str(tmp_path))
    )


def test_the_plan_is_said(tiny_model, train_file, tmp_path, capsys):
    """Batches are accumulated across epochs: one step in all is a run."""
    more = "--epochs 2 --accumulation-steps 18 --warmup-steps 5 --no-tensorboard".split()
    assert main(flags(tiny_model, train_file, tmp_path / "run", *more)) == 0
    said = capsys.readouterr()
    words = (
        "plan: 9 batches of 32 an epoch, without 12 rows that fill none, 18 of them a step, "
        "1 steps by 2 epochs, warm-up of 5, 4 clusters"
    )
    assert words in said.out
    assert "warning: --warmup-steps 5: the learning rate rises to the last of 1 steps" in said.err
    assert f"{train_file}: txt, a sentence a line; 'text' as sentences; 300 rows, for example" in said.out
    assert [record["step"] for record in log_of(tmp_path / "run") if "loss" in record] == [1]


def test_rows_left_out_are_said_at_the_start(tiny_model, tmp_path, capsys):
    texts = sentences(300)
    pairs = [f"{a},{b if i % 3 else ''},{i % 2}" for i, (a, b) in enumerate(pairwise(texts))]
    (tmp_path / "pairs.csv").write_text("first,second,same\n" + "\n".join(pairs))
    more = ["--text-columns", "first,second", "--max-steps", "1", "--no-tensorboard"]
    given = flags(tiny_model, tmp_path / "pairs.csv", tmp_path / "run", *more)
    assert "only some by 'same' (0, 1)" in refused(capsys, given)
    assert main([*given, "--positive-label", "1", "--label-column", "same"]) == 0
    said = capsys.readouterr()
    assert "50 with a blank second (line 5; line 11)" in said.out
    assert "50 of 299 rows are left out" in said.err


def test_what_a_failed_start_leaves(tiny_model, train_file, sts_dir, tmp_path, capsys, monkeypatch):
    """Nothing, whether it fails at once, at the first evaluation or in the first step."""
    from clusterns.train import Run

    def fail(*_, **__):
        raise ValueError("expected to go on")

    more = ["--sts-dir", str(sts_dir), "--max-steps", "1"]
    for name in ("load_sts", "sts_dev"):
        with monkeypatch.context() as patch:
            patch.setattr(f"clusterns.training.task.{name}", fail)
            assert "expected to go on" in refused(
                capsys, flags(tiny_model, train_file, tmp_path / "a" / "b" / "c", *more)
            )
        assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", fail)
        assert "expected to go on" in refused(capsys, flags(tiny_model, train_file, tmp_path / "a", *more))
    assert list((tmp_path / "a").iterdir()) == []
    assert main(flags(tiny_model, train_file, tmp_path / "a", *more)) == 0


def test_an_output_folder_on_another_disk(tiny_model, train_file, tmp_path, monkeypatch):
    """Behind a link, and named from the home folder."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as disk:
        (tmp_path / "link").symlink_to(disk)
        monkeypatch.setenv("HOME", str(tmp_path))
        run = flags(tiny_model, train_file, "~/link", "--max-steps", "1", "--no-tensorboard")
        assert main(run) == 0
        assert os.path.isfile(f"{disk}/model.safetensors")
        assert (tmp_path / "link").is_symlink()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_an_output_folder_that_cannot_be_written(tiny_model, train_file, capsys):
    message = refused(capsys, flags(tiny_model, train_file, "/proc/run", "--max-steps", "1"))
    assert "--output-dir: expected a folder that can be written to, got /proc/run (" in message


def test_a_learning_rate_far_too_large(tiny_model, train_file, sts_dir, tmp_path, capsys):
    more = "--learning-rate 1e30 --max-steps 3 --eval-steps 1 --no-tensorboard".split()
    given = flags(tiny_model, train_file, tmp_path / "run", *more, "--sts-dir", str(sts_dir))
    message = refused(capsys, given)
    assert "step 1: " in message
    assert message.endswith("lower --learning-rate")


def test_loss_that_is_no_number_stops_the_run(tiny_model, train_file, tmp_path, capsys):
    with_nan = tmp_path / "nan-model"
    encoder = SentenceEncoder.from_pretrained(tiny_model)
    with torch.no_grad():
        next(encoder.transformer.parameters()).fill_(float("nan"))
    encoder.save(with_nan)
    message = refused(capsys, flags(with_nan, train_file, tmp_path / "run"))
    assert "step 1: expected a finite loss and gradient, got NaN or infinity; no model was saved" in message


def test_help_and_version(capsys):
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    assert "--bml-weight" in capsys.readouterr().out


def test_bad_command_lines_are_one_line(capsys):
    """A part of a flag is no flag."""
    for given, words in (
        ("train --batch 8", "unrecognized arguments: --batch 8"),
        ("train --batch-size many", "argument --batch-size: invalid int value: 'many'"),
        ("trian", "argument COMMAND: invalid choice: 'trian'"),
        ("report m --out page.html --sentences s.txt", "the following arguments are required: --output"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(given.split())
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"clusterns: error: {words}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
@pytest.mark.parametrize("given", ["train --show-config", "--version"])
def test_an_output_that_cannot_be_written(given, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(given.split()) == 2
        full.flush()  # as Python does at its end: there is nothing left to complain of
    line = "clusterns: error: the output cannot be written, got No space left on device\n"
    assert capsys.readouterr().err == line


def test_other_errors_of_the_system_have_no_number(capsys, monkeypatch):
    def fail(*_):
        raise OSError(36, "File name too long", "y.yaml")

    monkeypatch.setattr("clusterns.training.arguments.read_config", fail)
    assert refused(capsys, ["train"]) == "clusterns: error: y.yaml: File name too long"


def test_a_second_interrupt_does_not_disturb_the_clearing(monkeypatch, capsys):
    cleared = []

    def train(config):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleared.append(True)

    assert main(["train", "--show-config"]) == 0
    usual = signal.getsignal(signal.SIGINT)
    assert usual is signal.default_int_handler
    monkeypatch.setattr("clusterns.train.train", train)
    try:
        assert main(["train"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # to the end of the process
    finally:
        signal.signal(signal.SIGINT, usual)
    assert cleared
    assert capsys.readouterr().err == "clusterns: interrupted\n"


def test_a_locale_without_greek_letters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    assert b"--bml-weight" in sys.stdout.buffer.getvalue()
