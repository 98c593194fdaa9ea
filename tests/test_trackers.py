"""`--report-to`: what a run tells a tracker, that a resumed one goes on in the same run, and bad trackers."""

from __future__ import annotations

import sys
import types

import pytest
from train_problems import command, log_of, refused, run, write_place

from clusterns.train import Run

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")


class Tracked:
    """A run of the stand-in for a tracker."""

    def __init__(self, **given):
        self.given, self.points, self.is_over = given, [], False
        self.id, self.name = given.get("id", "made-up"), given.get("name") or "given"
        if given.get("resume") == "never":  # as trackio does where the name is taken
            self.name += "-2"

    def log(self, values, step):
        assert not self.is_over
        self.points += [(step, name, value) for name, value in values.items()]

    def finish(self):
        self.is_over = True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("trackers"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_tracker(place, tmp_path, monkeypatch, name):
    runs: list[Tracked] = []

    def init(**given):
        runs.append(Tracked(**given))
        return runs[-1]

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    output = tmp_path / "run"
    more = f"STS --eval-steps 2 --checkpoint-steps 2 --resume --report-to {name}"
    with monkeypatch.context() as patch:
        whole = Run.train_step

        def killed(self, *, watched):
            if self.step == 4:
                raise ValueError("killed")
            return whole(self, watched=watched)

        patch.setattr(Run, "train_step", killed)
        with pytest.raises(AssertionError):  # it ends with another status
            run(place, output, f"{more} --max-steps 5")
    run(place, output, f"{more} --max-steps 5")
    first, second = runs
    assert first.is_over
    assert second.is_over
    for each in runs:
        assert each.given["project"] == "clusterns"
        assert each.given["config"]["num_clusters"] == 4
    assert first.given["name"] == "run"
    assert second.given["resume"] == "allow"
    if name == "wandb":
        assert second.given["id"] == "made-up"
        assert "id" not in first.given
    else:
        assert second.given["name"] == "run-2"
    assert [step for step, tag, _ in first.points if tag == "loss/loss"] == [1, 2, 3]
    assert [step for step, tag, _ in second.points if tag == "loss/loss"] == [3, 4, 5]
    told = {(record["step"], record["loss"]) for record in log_of(output) if "loss" in record}
    assert {(step, value) for step, tag, value in second.points if tag == "loss/loss"} < told
    assert [step for step, tag, _ in second.points if tag == "dev/spearman"] == [4, 5]


def test_what_no_tracker_can_do_is_one_line(place, tmp_path, capsys, monkeypatch):
    """And known before an earlier training is removed."""
    output = tmp_path / "run"
    run(place, output, "--max-steps 1")
    again = "--max-steps 1 --overwrite-output-dir --report-to"
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    message = refused(capsys, command(place, output, f"{again} wandb"))
    assert "--report-to: expected the package wandb, got: " in message
    assert message.endswith("; pip install wandb, or --report-to none")
    assert (output / "model.safetensors").exists()

    def init(**given):
        raise RuntimeError("no login\nand more")  # as wandb.errors.UsageError is no error of the cli's

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    message = refused(capsys, command(place, output, f"{again} trackio"))
    assert "--report-to: expected trackio to begin a run, got: no login; --report-to none" in message
