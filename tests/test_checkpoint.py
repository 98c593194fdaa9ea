"""Checkpoints: whole or not at all, at most so many, and one line for each that is not ours."""

from __future__ import annotations

import json
import re
import resource
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from train_problems import flags, log_of, refused, save_tiny_model, sentences

from clusterns.cli import main
from clusterns.train import Run
from clusterns.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")

RUN = "--max-steps 8 --checkpoint-steps 2 --keep-checkpoints 2 --no-tensorboard".split()


def module(seed: int = 0, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, width)


def write(checkpoints: Checkpoints, step: int, *, seed: int = 0, width: int = 3) -> Path:
    output = checkpoints.output
    (output / "log.jsonl").write_text("{}\n" * step)
    (output / "model").mkdir(exist_ok=True)
    (output / "model" / "weights").write_text(f"best at {step}")
    return checkpoints.save(
        step,
        modules={"encoder": module(seed, width)},
        training={"random": torch.get_rng_state(), "values": (1, None, {"a": 2.5})},
        progress={"settings": {"seed": 42}},
        log=output / "log.jsonl",
        best=[output / "model" / "weights"],
    )


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, keep=2)


def test_what_is_written_is_read(checkpoints, tmp_path):
    folder = write(checkpoints, 3, seed=1)
    state = torch.get_rng_state()
    read = checkpoints.read(folder, "log.jsonl")
    assert read.progress["step"] == 3
    assert torch.equal(read.training["random"], state)
    assert read.training["values"] == (1, None, {"a": 2.5})
    other = module(seed=2)
    read.load_modules({"encoder": other})
    assert all(torch.equal(value, module(1).state_dict()[name]) for name, value in other.state_dict().items())

    # What came after it in log and model goes back; the checkpoint's own log stays when that goes on.
    (tmp_path / "log.jsonl").write_text("{}\n" * 9)
    (tmp_path / "model" / "weights").unlink()
    (tmp_path / "model" / "weights").write_text("best at 9")
    for _ in range(2):  # a second time where nothing is to be done
        checkpoints.restore_files(read, tmp_path / "log.jsonl")
        assert (tmp_path / "log.jsonl").read_text() == "{}\n" * 3
        assert (tmp_path / "model" / "weights").read_text() == "best at 3"
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("more")
    assert (folder / "log.jsonl").read_text() == "{}\n" * 3
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


def test_tensors_of_two_names(checkpoints, tmp_path):
    """As the bias of an MLM head, which safetensors alone refuses."""
    tied = nn.ModuleDict({"one": module(), "other": module()})
    tied["other"].bias = tied["one"].bias
    (tmp_path / "log.jsonl").write_text("")
    arguments = {"training": {}, "progress": {"settings": {}}, "log": tmp_path / "log.jsonl", "best": []}
    folder = checkpoints.save(1, modules={"tied": tied}, **arguments)
    fresh = nn.ModuleDict({"one": module(5), "other": module(6)})
    fresh["other"].bias = fresh["one"].bias
    checkpoints.read(folder, "log.jsonl").load_modules({"tied": fresh})
    assert torch.equal(fresh["other"].bias, tied["one"].bias)


def test_at_most_so_many_and_the_newest_last(checkpoints):
    for step in (2, 10, 9, 100):
        write(checkpoints, step)
    assert [path.name for path in checkpoints.all()] == ["step-00000010", "step-00000100"]
    assert checkpoints.last() == checkpoints.all()[-1]
    assert write(checkpoints, 100, seed=3) == checkpoints.last()  # in the place of the one of that step
    assert len(checkpoints.all()) == 2
    (checkpoints.folder / ".clusterns-killed00").mkdir()  # what a killed process left half written
    assert checkpoints.last().name == "step-00000100"
    write(checkpoints, 100)
    assert len(list(checkpoints.folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "progress.json").unlink(), "expected a checkpoint of clusterns train, got none"),
        (
            lambda f: (f / "progress.json").write_text("{"),
            "expected a checkpoint of clusterns train, got none",
        ),
        (lambda f: (f / "progress.json").write_text('{"step": 3}'), "got another progress.json"),
        (lambda f: drop(f, "settings"), "progress.json: expected step, settings and files, got others"),
        (lambda f: edit(f, version=99), "expected checkpoint version 1, got 99"),
        (
            lambda f: (f / "training.pt").unlink(),
            "training.pt: expected a whole checkpoint, got none of this",
        ),
        (
            lambda f: cut(f / "modules.safetensors"),
            "modules.safetensors: expected the file as it was written",
        ),
        (
            lambda f: flip(f / "modules.safetensors"),
            "modules.safetensors: expected the file as it was written",
        ),
        (lambda f: flip(f / "training.pt"), "training.pt: expected the file as it was written"),
        (lambda f: cut(f / "log.jsonl"), "log.jsonl: expected the file as it was written"),
    ],
)
def test_damaged_and_foreign(checkpoints, damage, message):
    folder = write(checkpoints, 3)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.read(folder, "log.jsonl")
    assert "\n" not in str(caught.value)
    assert "step-00000003" in str(caught.value)


def edit(folder: Path, **facts) -> None:
    path = folder / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def drop(folder: Path, name: str) -> None:
    path = folder / "progress.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name})
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_pickles_that_run_code_are_refused(checkpoints):
    """Also with a matching checksum: training.pt is read with weights_only."""
    folder = write(checkpoints, 3)
    torch.save({"optimizer": print}, folder / "training.pt")
    from clusterns.training.checkpoint import _size_and_crc

    files = json.loads((folder / "progress.json").read_text())["files"]
    edit(folder, files={**files, "training.pt": _size_and_crc(folder / "training.pt")})
    with pytest.raises(ValueError, match="expected a whole checkpoint, got: Weights only load failed"):
        checkpoints.read(folder, "log.jsonl")


def test_other_dimensions(checkpoints):
    read = checkpoints.read(write(checkpoints, 3), "log.jsonl")
    with pytest.raises(
        ValueError, match=r"expected encoder.bias of shape \(5,\) for this model and loss, got"
    ):
        read.load_modules({"encoder": module(width=5)})
    with pytest.raises(
        ValueError, match="expected head.bias of shape .3,. for this model and loss, got none"
    ):
        read.load_modules({"encoder": module(), "head": module()})


@pytest.fixture
def full_disk():
    """A disk with room for 1 KiB in a file: what goes beyond fails in the write itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(limit: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if limit is None else limit, before[1]))

    yield fill
    fill(None)


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_full_disk_leaves_the_last_good_one(checkpoints, full_disk, room):
    first = write(checkpoints, 3)
    content = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    (checkpoints.output / "log.jsonl").write_text("{}\n" * 4)
    full_disk(room)
    with pytest.raises(
        OSError, match="step 4: cannot write a checkpoint in .*the last good one is .*00003"
    ) as got:
        checkpoints.save(
            4,
            modules={"encoder": module() if room == 1000 else nn.Linear(200, 200)},
            training={"large": torch.zeros(1000)},
            progress={},
            log=checkpoints.output / "log.jsonl",
            best=[],
        )
    full_disk(None)
    assert "\n" not in str(got.value)
    assert checkpoints.all() == [first]
    assert list(checkpoints.folder.iterdir()) == [first]
    assert {path: path.read_bytes() for path in content} == content
    checkpoints.read(first, "log.jsonl")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """An output folder with two checkpoints, of a run that was stopped before its end."""
    root = tmp_path_factory.mktemp("interrupted")
    save_tiny_model(root / "model")
    (root / "sentences.txt").write_text("\n".join(sentences(300)) + "\n")
    assert main(flags(root / "model", root / "sentences.txt", root / "run", *RUN)) == 0
    summary = json.loads((root / "run" / "training.json").read_text())
    (root / "run" / "training.json").write_text(json.dumps({**summary, "finished": False}))
    return root


@pytest.fixture
def resumed(interrupted, tmp_path):
    """A copy of it, and the command that goes on with it."""
    shutil.copytree(interrupted / "run", tmp_path / "run")
    given = flags(interrupted / "model", interrupted / "sentences.txt", tmp_path / "run", *RUN, "--resume")
    return tmp_path / "run", given


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--learning-rate 2e-3", "--learning-rate: expected 0.001 as in .*step-00000008.* got 0.002"),
        ("--num-clusters 5", "--num-clusters: expected 4 as in"),
        ("--max-steps 5", "--max-steps: expected at least the 8 steps of .*step-00000008, got 5"),
        ("--eval-steps 2", "--eval-steps: expected 125 as in"),
        ("--pooling mean", "--pooling: expected None as in .* got 'mean'"),
        ("--no-hard-negatives", "--hard-negatives: expected True as in .* got False"),
    ],
)
def test_changed_settings_are_refused(resumed, capsys, more, message):
    output, given = resumed
    before = (output / "log.jsonl").read_bytes()
    assert main([*given, *more.split()]) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err.splitlines()[-1])
    assert "going on" not in said.out
    assert "from here on" not in said.out
    assert (output / "log.jsonl").read_bytes() == before


def test_another_number_of_processes(resumed, capsys):
    output, given = resumed
    edit(output / "checkpoints" / "step-00000008", processes=2)
    assert "--nproc-per-node: expected 2 processes as in" in refused(capsys, given)


def test_settings_that_change_nothing_may_change(resumed, capsys):
    """And a folder that was moved is the same run; keeping fewer checkpoints too."""
    output, given = resumed
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    more = ["--num-workers", "1", "--keep-checkpoints", "1", "--checkpoint-steps", "3", "--tensorboard"]
    more += ["--backend", "reference", "--mini-batch-size", "16"]
    assert main([*given, *more]) == 0
    assert "--backend is 'reference' from here on, was 'auto'" in capsys.readouterr().out
    assert [record["step"] for record in log_of(output) if "loss" in record] == list(range(1, 9))
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000006"]
    assert json.loads((output / "training.json").read_text())["finished"]
    assert main([*given, *more]) == 0  # ended already


def test_the_same_files_by_other_names(interrupted, resumed, monkeypatch):
    """And without the summary: the checkpoints are all that a run goes on from."""
    output, given = resumed
    (output / "training.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    monkeypatch.chdir(interrupted)
    shutil.copy("sentences.txt", output.parent / "moved.txt")
    there = dict(pairwise(given))
    moved = [{there["--model"]: "./model", there["--train-file"]: "~/moved.txt"}.get(x, x) for x in given]
    monkeypatch.setenv("HOME", str(output.parent))
    assert main([*moved, "--log-steps", "2"]) == 0
    assert [record["step"] for record in log_of(output) if "loss" in record] == [*range(1, 7), 8]


def rates(output: Path) -> list[float]:
    return [record["learning_rate"] for record in log_of(output) if "loss" in record]


@pytest.mark.parametrize("longer", ["--max-steps 12", "--epochs 2"])
def test_a_run_that_has_ended_goes_on_for_longer(interrupted, tmp_path, capsys, monkeypatch, longer):
    """At the rates of a run of that length, from the last checkpoint on."""
    place, output = interrupted, tmp_path / "run"
    short = "--checkpoint-steps 3 --no-tensorboard --resume".split()
    short += ["--max-steps", "8"] if "--max-steps" in longer else []
    given = flags(place / "model", place / "sentences.txt", output, *short)
    assert main(given) == 0
    first = rates(output)
    steps = len(first)
    capsys.readouterr()
    assert main(given) == 0
    assert "ended already" in capsys.readouterr().out
    used, whole = [], Run.train_step

    def train_step(self, *, watched):
        used.append(self.optimizer.param_groups[0]["lr"])
        return whole(self, watched=watched)

    monkeypatch.setattr(Run, "train_step", train_step)
    assert main([*given, *longer.split()]) == 0
    said = capsys.readouterr().out
    kept = steps - steps % 3
    assert f"going on after step {kept}" in said
    total = 12 if "--max-steps" in longer else 2 * steps
    peak = 1e-3
    expected = [peak * (1 - step / steps) for step in range(1, kept + 1)]
    expected += [peak * (1 - step / total) for step in range(kept + 1, total + 1)]
    assert rates(output) == pytest.approx(expected)  # of the step after each
    assert used == pytest.approx([peak * (1 - step / total) for step in range(kept, total)])
    summary = json.loads((output / "training.json").read_text())
    assert summary["finished"]
    assert summary["settings"]["max_steps" if "--max" in longer else "epochs"] == int(longer.split()[1])


def test_a_run_that_has_ended_and_cannot_go_on(interrupted, tmp_path, capsys):
    place, output = interrupted, tmp_path / "run"
    given = flags(place / "model", place / "sentences.txt", output, *RUN, "--resume")
    given += ["--checkpoint-steps", "100"]
    assert main(given) == 0
    assert "--checkpoint-steps 100: none of the 8 steps is saved" in capsys.readouterr().err
    message = refused(capsys, [*given, "--max-steps", "9"])
    assert (
        f"--max-steps: expected 8 as in {output}, whose training has ended and left no checkpoint" in message
    )
    assert "--model: expected" in refused(capsys, [*given, "--model", "/nope"])
    assert main(given) == 0


def test_a_run_that_has_stopped_early(resumed, capsys):
    output, given = resumed
    summary = json.loads((output / "training.json").read_text())
    (output / "training.json").write_text(json.dumps({**summary, "finished": True}))
    edit(output / "checkpoints" / "step-00000008", evaluations_without_gain=3)
    message = refused(capsys, [*given, "--max-steps", "9"])
    assert "--patience: expected 0 or more than 3, as the training in" in message
    assert main([*given, "--max-steps", "9", "--patience", "0"]) == 0


def test_damage_is_named_and_the_one_before_serves(resumed, capsys):
    output, given = resumed
    flip(output / "checkpoints" / "step-00000008" / "modules.safetensors")
    message = refused(capsys, given)
    assert "step-00000008/modules.safetensors: expected the file as it was written" in message
    assert "delete that folder to resume from the one before it" in message
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    assert main(given) == 0
    assert "going on after step 6" in capsys.readouterr().out


def test_other_model_and_other_data(interrupted, resumed, tmp_path, capsys):
    _, given = resumed
    wider = tmp_path / "wider"
    shutil.copytree(interrupted / "model", wider)
    weights = load_file(wider / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    save_file({**weights, name: torch.cat([weights[name], weights[name]])}, wider / "model.safetensors")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "vocab_size": 2 * config["vocab_size"]}))
    kept = (interrupted / "model").rename(tmp_path / "kept")
    wider.rename(interrupted / "model")
    message = refused(capsys, given)
    assert re.search("--model: expected what .*step-00000008 began with, got another, ", message)
    shutil.rmtree(interrupted / "model")
    kept.rename(interrupted / "model")
    file = interrupted / "sentences.txt"
    text = file.read_text()
    file.write_text("\n".join(text.splitlines()[:-10]))
    assert "--train-file: expected the 300 rows of" in refused(capsys, given)
    file.write_text(text.replace("cat", "dog"))
    assert refused(capsys, given).endswith("got other ones")
    file.write_text(text)


def test_resume_of_nothing(interrupted, tmp_path, capsys):
    """In a new folder it begins; in one of other files it does not."""
    given = flags(interrupted / "model", interrupted / "sentences.txt", tmp_path / "new", *RUN, "--resume")
    assert main(given) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    given[given.index(str(tmp_path / "new"))] = str(tmp_path / "other")
    assert "--resume: expected the output folder of a training" in refused(capsys, given)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"


def test_a_new_run_in_the_folder_forgets_the_old_one(resumed, capsys, monkeypatch):
    """From its beginning on: what fails before leaves all, what fails later leaves no other model."""
    output, given = resumed
    more = "--overwrite-output-dir --max-steps 3 --checkpoint-steps 3".split()
    assert "--resume: expected no --overwrite-output-dir with it" in refused(capsys, [*given, *more])
    given.remove("--resume")
    (output / "report.html").write_text("of the user")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    refused(capsys, [*given, *more, "--sts-dir", "/absent"])
    refused(capsys, [*given, *more, "--batch-size", "1000"])
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", lambda *_, **__: int("diverged"))
        assert "diverged" in refused(capsys, [*given, *more])
    old = "checkpoints, model.safetensors, head.safetensors, loss.safetensors, clusterns.json, training.png"
    assert not any((output / name).exists() for name in old.split(", "))
    assert not json.loads((output / "training.json").read_text())["finished"]
    assert main([*given, *more]) == 0
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert (output / "report.html").read_text() == "of the user"
    assert main([*given, *more]) == 0
    assert f"{output}: removed of an earlier training: {old}\n" in capsys.readouterr().out
