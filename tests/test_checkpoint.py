"""Checkpoints: whole or not at all, at most so many, one line for each that is not ours; and going on."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from small_files import cases
from torch import nn
from train_problems import command, log_of, refused, run, save_tiny_model, summary_of, write_place

from clusterns.cli import main
from clusterns.train import Run
from clusterns.training.checkpoint import Checkpoints, _size_and_crc
from clusterns.training.run_folder import LOG

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")

RUN = "--max-steps 8 --checkpoint-steps 2 --keep-checkpoints 2"
LAST = "step-00000008"


def module(seed: int = 0, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, width)


def write(checkpoints: Checkpoints, step: int, *, seed: int = 0) -> Path:
    output = checkpoints.output
    (output / LOG).write_text("{}\n" * step)
    (output / "model").mkdir(exist_ok=True)
    (output / "model" / "weights").write_text(f"best at {step}")
    return checkpoints.save(
        step,
        modules={"encoder": module(seed)},
        training={"random": torch.get_rng_state(), "values": (1, None, {"a": 2.5})},
        progress={"settings": {"seed": 42}},
        log=output / LOG,
        best=[output / "model" / "weights"],
    )


def edit(folder: Path, **facts: object) -> None:
    """Change what progress.json says; None takes a fact away."""
    path = folder / "progress.json"
    changed = {**json.loads(path.read_text()), **facts}
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, keep=2)


def test_log_and_best_model_go_back(checkpoints, tmp_path):
    """The checkpoint's own log stays when that goes on."""
    folder = write(checkpoints, 3)
    read, log, weights = checkpoints.read(folder, LOG), tmp_path / LOG, tmp_path / "model" / "weights"
    assert read.training["values"] == (1, None, {"a": 2.5})
    weights.unlink()  # and not the link to it
    for path in (log, weights):
        path.write_text("of step 9")
    for _ in range(2):  # a second time where nothing is to be done
        checkpoints.restore_files(read, log)
        assert (log.read_text(), weights.read_text()) == ("{}\n" * 3, "best at 3")
    log.write_text("of step 4")
    assert (folder / LOG).read_text() == "{}\n" * 3
    assert list(tmp_path.rglob(".*")) == []


def test_at_most_so_many_and_the_newest_last(checkpoints):
    for step in (2, 10, 9, 100):
        write(checkpoints, step)
    assert [path.name for path in checkpoints.all()] == ["step-00000010", "step-00000100"]
    (checkpoints.folder / ".clusterns-killed00").mkdir()  # what a killed process left half written
    assert write(checkpoints, 100, seed=3) == checkpoints.last()  # in the place of the one of that step
    assert len(list(checkpoints.folder.iterdir())) == 2


FOREIGN, CHANGED = "expected a checkpoint of clusterns train, got", "expected the file as it was written"
# What is done to a file of a checkpoint: its first bytes replaced, or other facts in it, or it is taken away.
DAMAGE = [
    ("progress.json", None, f"{FOREIGN} none"),
    ("progress.json", {"format": "other"}, f"{FOREIGN} another progress.json"),
    ("progress.json", {"version": 99}, "expected checkpoint version 1, got 99"),
    ("training.pt", b"x", f"training.pt: {CHANGED}"),
    ("modules.safetensors", b"x", f"{CHANGED}.*; delete that folder to resume from the one before"),
]


@cases("name change message", DAMAGE)
def test_damaged_and_foreign(checkpoints, name, change, message):
    folder = write(checkpoints, 3)
    if isinstance(change, dict):
        edit(folder, **change)
    elif change:
        (folder / name).write_bytes(change + (folder / name).read_bytes()[len(change) :])
    else:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=f"step-00000003.*{message}") as caught:
        checkpoints.read(folder, LOG)
    assert "\n" not in str(caught.value)


def test_pickles_that_run_code_are_refused(checkpoints):
    """Also with a matching checksum: training.pt is read with weights_only."""
    folder = write(checkpoints, 3)
    torch.save({"optimizer": print}, folder / "training.pt")
    files = json.loads((folder / "progress.json").read_text())["files"]
    edit(folder, files={**files, "training.pt": _size_and_crc(folder / "training.pt")})
    with pytest.raises(ValueError, match="expected a whole checkpoint, got: Weights only load failed"):
        checkpoints.read(folder, LOG)


def test_full_disk_leaves_the_last_good_one(checkpoints):
    """A disk with room for 100 bytes in a file: what goes beyond fails in the write itself."""
    first = write(checkpoints, 3)
    before, log = contents(first), checkpoints.output / LOG
    log.write_text("{}\n" * 4)
    modules = {"encoder": nn.Linear(200, 200)}
    training = {"large": torch.zeros(1000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            OSError, match="step 4: cannot write a checkpoint in .*last good one is .*3"
        ) as got:
            checkpoints.save(4, modules=modules, training=training, progress={}, log=log, best=[])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(got.value)
    assert list(checkpoints.folder.iterdir()) == checkpoints.all() == [first]
    assert contents(first) == before
    checkpoints.read(first, LOG)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With an output folder that has two checkpoints, and a model and files that it is not of."""
    root = write_place(tmp_path_factory.mktemp("checkpoints"))
    run(root, root / "run", RUN)
    save_tiny_model(root / "others" / "MODEL", pooling="mean", std=0.3)
    text = (root / "sentences.txt").read_text()
    (root / "others" / "FEWER.txt").write_text("\n".join(text.splitlines()[:-10]))
    (root / "others" / "OTHER.txt").write_text(text.replace("cat", "dog"))
    return root


@pytest.fixture
def resumed(place, tmp_path):
    """A copy of it, and the command that goes on with it."""
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run", command(place, tmp_path / "run", f"{RUN} --resume")


@cases(
    "facts more message",
    [
        ({}, "--learning-rate 2e-3", f"--learning-rate: expected 0.001 as in .*{LAST}.* got 0.002"),
        ({}, "--max-steps 5", f"--max-steps: expected at least the 8 steps of .*{LAST}, got 5"),
        ({"processes": 2}, "--max-steps 9", "--nproc-per-node: expected 2 processes as in"),
        ({"evaluations_without_gain": 3}, "--max-steps 9", "--patience: expected 0 or more than 3, as the t"),
        ({}, "--model MODEL", f"--model: expected what .*{LAST} began with, got another, "),
        ({}, "--train-file FEWER.txt", "--train-file: expected the 390 rows of .* got 380"),
        ({}, "--train-file OTHER.txt", "--train-file: expected the 390 rows of .* got other ones"),
    ],
)
def test_what_would_change_the_run_is_refused(place, resumed, capsys, monkeypatch, facts, more, message):
    output, given = resumed
    edit(output / "checkpoints" / LAST, **facts)
    before = (output / LOG).read_bytes()
    monkeypatch.chdir(place / "others")
    assert main([*given, *more.split()]) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err.splitlines()[-1])
    assert "going on" not in said.out
    assert "from here on" not in said.out
    assert (output / LOG).read_bytes() == before


def test_what_changes_nothing_may_change(place, resumed, tmp_path, capsys, monkeypatch):
    """The same files by other names, fewer checkpoints, and no summary: the checkpoints are all it needs."""
    output, given = resumed
    (output / "training.json").unlink()
    shutil.rmtree(output / "checkpoints" / LAST)
    shutil.copy(place / "sentences.txt", tmp_path / "moved.txt")
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    given += [
        "--model",
        "./model",
        "--train-file",
        "~/moved.txt",
        "--log-steps",
        "2",
        "--report-to",
        "tensorboard",
    ]
    given += ["--num-workers", "1", "--keep-checkpoints", "1", "--checkpoint-steps", "3"]
    given += ["--backend", "reference", "--mini-batch-size", "16"]
    assert main(given) == 0
    assert "--backend is 'reference' from here on, was 'auto'" in capsys.readouterr().out
    assert [record["step"] for record in log_of(output) if "loss" in record] == [*range(1, 7), 8]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000006"]
    assert summary_of(output)["finished"]


def test_a_run_that_has_ended_goes_on_for_longer(place, tmp_path, capsys, monkeypatch):
    """At the rates of a run of that length, from the last checkpoint on."""
    output, short = tmp_path / "run", "--checkpoint-steps 5 --resume"
    assert len(run(place, output, short)) == 12
    capsys.readouterr()
    assert main(command(place, output, short)) == 0
    assert "ended already" in capsys.readouterr().out
    used, whole = [], Run.train_step

    def train_step(self, *, watched):
        used.append(self.optimizer.param_groups[0]["lr"])
        return whole(self, watched=watched)

    monkeypatch.setattr(Run, "train_step", train_step)
    rates = [record["learning_rate"] for record in run(place, output, f"{short} --epochs 2")]
    assert "going on after step 10" in capsys.readouterr().out
    before, after = ([1e-3 * (1 - step / total) for step in range(total + 1)] for total in (12, 24))
    assert used == pytest.approx(after[10:24])
    assert rates == pytest.approx(before[1:11] + after[11:])  # of the step after each
    assert summary_of(output)["finished"]
    assert summary_of(output)["settings"]["epochs"] == 2


def test_a_new_run_in_the_folder_forgets_the_old_one(resumed, capsys, monkeypatch):
    """From its beginning on: what fails before leaves all, what fails later leaves no other model."""
    output, given = resumed
    more = "--overwrite-output-dir --max-steps 3 --checkpoint-steps 3".split()
    given.remove("--resume")
    (output / "report.html").write_text("of the user")
    before = contents(output)
    refused(capsys, [*given, *more, "--sts-dir", "/absent"])
    refused(capsys, [*given, *more, "--batch-size", "1000"])
    assert contents(output) == before
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", lambda *_, **__: int("diverged"))
        assert "diverged" in refused(capsys, [*given, *more])
    old = "checkpoints, model.safetensors, head.safetensors, loss.safetensors, clusterns.json, training.png"
    old += ", README.md"
    assert not any((output / name).exists() for name in old.split(", "))
    assert not summary_of(output)["finished"]
    for _ in range(2):
        assert main([*given, *more]) == 0
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert (output / "report.html").read_text() == "of the user"
    assert f"{output}: removed of an earlier training: {old}\n" in capsys.readouterr().out
