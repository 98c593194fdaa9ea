"""Whole files and folders, leftovers of killed processes, and disks and folders that refuse."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from pathlib import Path

import forked
import pytest

from clusterns.files import (
    Read,
    check_outputs,
    check_room,
    check_writable,
    holding,
    replacing,
    staging,
    sweep,
)


def write_many(path: Path, count: int) -> None:
    for number in range(count):
        with replacing(path) as temporary:
            temporary.write_text(f"{number}\n" * 1000, encoding="utf-8")


def die_while_staging(folder: Path) -> None:
    with staging(folder) as place:
        (place / "half").write_text("half", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)


def stay_while_staging(folder: Path, fork: bool) -> None:
    with staging(folder) as place:
        worker = os.fork() if fork else -1  # as one that loads data, and outlives the one who holds the lock
        if worker:
            (place / "half").write_text(str(worker), encoding="utf-8")
        signal.pause()


def test_writers_of_one_folder_do_not_disturb_each_other(tmp_path):
    """Each sweeps before each write, while the others make, hold and remove their own."""
    writers = [forked.start(write_many, tmp_path / f"{number % 2}.txt", 25) for number in range(4)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == ["0.txt", "1.txt"]
    assert (tmp_path / "0.txt").read_text(encoding="utf-8") == "24\n" * 1000


def test_error_leaves_the_earlier_file(tmp_path):
    """That of a full disk, here of one, is one line with its name."""
    path = tmp_path / "a.json"
    path.write_text("earlier", encoding="utf-8")
    line = "^.*a.json: cannot write this file, got No space left on device$"
    with pytest.raises(OSError, match=line), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text(encoding="utf-8") == "earlier"
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OSError, match=r"^--output-dir: expected [\d,]+\.\d MB of room on the disk of"):
        check_room("--output-dir", tmp_path, 1 << 62)


def test_next_write_clears_what_a_killed_process_left(tmp_path):
    process = forked.start(die_while_staging, tmp_path)
    process.join()
    assert len(os.listdir(tmp_path)) == 1
    for early in ("", "lock"):  # killed before it had the lock, or before it wrote
        (tmp_path / f".clusterns-early{early}").mkdir()
        if early:
            (tmp_path / f".clusterns-early{early}" / early).touch()
    write_many(tmp_path / "a", 1)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a forked process")
@pytest.mark.parametrize("forks", [False, True])
def test_live_writer_is_left_alone_until_it_dies(forks, tmp_path):
    process = forked.start(stay_while_staging, tmp_path, forks)
    while not (written := [path for path in tmp_path.rglob("half") if path.read_text(encoding="utf-8")]):
        assert process.is_alive()
    worker = int(written[0].read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(tmp_path)
        assert written[0].exists()
        process.kill()
        process.join()
        sweep(tmp_path)
    assert not os.listdir(tmp_path)
    if forks:
        os.kill(worker, signal.SIGKILL)


def test_lock_is_exclusive_waits_a_while_and_leaves_nothing(tmp_path, monkeypatch):
    """As long as for the lock of a dead process on a network disk, which its server keeps."""
    monkeypatch.setattr("clusterns.files.SAY_AFTER", 0.1)
    monkeypatch.setattr("clusterns.files.WAIT_AT_MOST", 0.3)
    path = tmp_path / "lock"
    with holding(path) as is_held:
        assert is_held
        with pytest.raises(BlockingIOError), holding(path):
            pass
        words = "if there is none, remove"
        with pytest.warns(UserWarning, match=f"{path}: waiting for the process .* {words}"):  # noqa: SIM117
            with pytest.raises(BlockingIOError, match=words), holding(path, wait=True):
                pass
        assert path.exists()
    with holding(path):
        pass
    assert not os.listdir(tmp_path)


def test_links_stay_and_devices_are_written_to(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "a.json"
    link.symlink_to(tmp_path / "far" / "a.json")
    write_many(link, 1)
    assert link.is_symlink()
    assert (tmp_path / "far" / "a.json").read_text(encoding="utf-8") == "0\n" * 1000
    for device in ("/dev/stdout", "/dev/null"):
        check_writable("--json", device)
        with replacing(device) as path:
            path.write_text("to the terminal", encoding="utf-8")
    assert not Path("/dev/null").is_file()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_what_cannot_be_written_is_said_in_time(tmp_path):
    for path, kind, words in (
        ("/proc/a.json", OSError, "expected a file in a folder that can be written to, got /proc/a.json"),
        (tmp_path / "absent" / "a.json", FileNotFoundError, "expected a file in a folder that exists"),
        (tmp_path, IsADirectoryError, "expected a file, got the folder"),
        ("", ValueError, "expected a path, got an empty one$"),
    ):
        with pytest.raises(kind, match=f"^--json: {words}") as caught:
            check_writable("--json", path)
        assert ".clusterns-" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_what_is_read_is_not_written(tmp_path, monkeypatch):
    """By whatever name; what is beside it, an earlier output too, is."""
    monkeypatch.chdir(tmp_path)
    for name in "s.csv run/figures.json run/1_Pooling/config.json sts/STS/dev.csv".split():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for link, target in (("link.csv", "s.csv"), ("other", "run"), ("run/a.safetensors", "../s.csv")):
        Path(link).symlink_to(target)
    names = ("config*.json", "*.safetensors", "checkpoints")
    reads = [Read("model", "run", names), Read("--sts-dir", "sts", ["STS"]), Read("--sentences", "s.csv")]
    for path, what in (
        ("link.csv", "--sentences s.csv"),
        ("other/1_Pooling/config.json", "model run"),
        (tmp_path / "run" / "a.safetensors", "model run"),
    ):
        with pytest.raises(FileExistsError) as caught:
            check_outputs({"--csv": path}, reads)
        line = f"--csv: expected a file that this command does not read, got {path}, which is of {what}; "
        assert str(caught.value) == f"{line}choose another, as --csv OTHER{Path(path).suffix}"
    for path in ("run/figures.json", "sts/new.json", "t.csv"):
        assert check_outputs({"--csv": path, "--json": None}, reads) == {"--csv": Path(path)}
    words = r"^--csv: expected another file than --json, got link.csv for both$"
    with pytest.raises(ValueError, match=words):
        check_outputs({"--json": "s.csv", "--csv": "link.csv"})
