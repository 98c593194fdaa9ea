"""Processes killed before every change they make on the disk: what is there is whole, and nothing stays."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import forked
import pytest
from matplotlib.figure import Figure
from tiny import write_sts_folder
from train_problems import assert_ends_alike, command, run, write_place

from clusterns.cli import main
from clusterns.files import sweep

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")
# What Python reports before it changes the file system; os.replace is a rename too.
CHANGES = {f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "link", "chmod", "truncate")}
SHORT = (
    "STS --resume --max-steps 2 --eval-steps 2 --patience 0 --checkpoint-steps 1 --keep-checkpoints 1 "
    "--batch-size 8"
)
# With all that a checkpoint may hold, into a second epoch.
LONG = (
    "STS --resume --max-steps 10 --eval-steps 4 --patience 0 --checkpoint-steps 3 --keep-checkpoints 2 "
    "--log-steps 2 --accumulation-steps 2 --mlm-weight 0.1 --learn-temperature --centroid-update adamw "
    "--warmup-steps 4 --prompt bert --denoise trained"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = write_place(tmp_path_factory.mktemp("killed"))
    write_sts_folder(root / "test")
    return root


def command_to_die(
    given: list[str], folder: Path, kill_at: int, kept: Path | None, cache: Path, count: Path
) -> None:
    """In a process of its own; says how many changes of the disk there were.

    Pictures are small text files here: drawing takes most of the time, and touches no file.
    """
    os.environ["CLUSTERNS_CACHE"] = str(cache)
    Figure.savefig = lambda self, target, **_: (
        target.write("<svg>") if hasattr(target, "write") else Path(target).write_text("", encoding="utf-8")
    )
    changes, copying = 0, False

    def watch(event: str, details: tuple) -> None:
        nonlocal changes, copying
        writes = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)  # path, mode, flags
        if copying or not (writes or event in CHANGES):
            return
        changes += 1
        if kept is not None:
            copying = True
            shutil.copytree(folder, kept / str(changes))
            copying = False
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    assert main(given) == 0
    count.write_text(str(changes), encoding="utf-8")


@pytest.fixture
def start(tmp_path):
    """Runs a command that dies before change `kill_at`; else returns how many it made.

    `kept` is for copies of the folder before each of them: a killed process leaves just that, and one run is
    enough to have it all.
    """

    def run(given: list[str], folder: Path, kill_at: int = 0, kept: Path | None = None) -> int:
        count = tmp_path / "count"
        cache = (folder if given[0] == "report" else tmp_path) / "rows"
        process = forked.start(command_to_die, given, folder, kill_at, kept, cache, count)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
        return 0 if kill_at else int(count.read_text(encoding="utf-8"))

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def visible(folder: Path) -> frozenset:
    """What a start goes on from: names, and what is in the tensors."""
    shown = [name for name in files(folder) if ".clusterns-" not in name]
    return frozenset((name, (folder / name).read_bytes() if "tensors" in name else b"") for name in shown)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.startswith(".clusterns-")]


def test_training_killed_before_every_change(place, start, tmp_path):
    """The next start clears what is left, goes on, and ends as the run that was not killed."""
    whole, kept, parts = (tmp_path / name for name in ("whole", "kept", "parts"))
    whole.mkdir()
    changes = start(command(place, whole, SHORT), whole, kept=kept)
    assert changes > 80
    seen: set[frozenset] = set()
    for kill_at in range(1, 1 + changes):
        (kept / str(kill_at)).rename(parts)
        assert len(leftovers(parts)) <= 1
        if (state := visible(parts)) in seen:  # that a start goes on from it has been seen
            for folder in (parts, parts / "checkpoints"):
                sweep(folder)
            assert not leftovers(parts)
        else:
            run(place, parts, SHORT)
            assert_ends_alike(parts, whole)
        seen.add(state)
        shutil.rmtree(parts, ignore_errors=True)
    assert sorted(os.listdir(tmp_path)) == ["count", "kept", "rows", "whole"]


def test_training_killed_again_and_again(place, start, tmp_path):
    """Each start killed somewhat later than the one before it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = start(command(place, whole, LONG), whole)
    for part in (5, 3):
        start(command(place, parts, LONG), parts, changes // part)
    run(place, parts, LONG)
    assert_ends_alike(parts, whole)


COMMANDS = {
    "evaluate": "{0}/model --sts-dir {0}/test --resamples 0 --json {1}/a --markdown {1}/b --figure {1}/c.png",
    # And the cache of rows, which is in that folder too.
    "report": "{0}/model --sentences {0}/sentences.txt --output {1}/page.html --map pca",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_written_files_killed_before_every_change(name, place, start, tmp_path):
    """In an empty folder, and from what a kill half way has left."""
    folder = tmp_path / "folder"
    folder.mkdir()
    given = [name, *COMMANDS[name].format(place, folder).split()]
    ends = []
    for kept in (tmp_path / "first", tmp_path / "second"):
        changes = start(given, folder, kept=kept)
        assert changes >= 20
        assert not leftovers(folder)
        ends.append(files(folder))
        contents = {file: (folder / file).read_bytes() for file in ends[0] if not file.startswith("rows/")}
        for state in kept.iterdir():
            assert len(leftovers(state)) <= len(ends)  # of each kill one
            for file, content in contents.items():
                assert not (state / file).exists() or (state / file).read_bytes() == content
        shutil.rmtree(folder)
        (kept / str(changes // 2)).rename(folder)
    assert ends[0] == ends[1]
