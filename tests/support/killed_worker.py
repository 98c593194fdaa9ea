"""`clusterns` in a process of its own, which kills itself before its n-th change of a folder, or keeps what
a kill before each change would leave there."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from matplotlib.figure import Figure

from clusterns.cli import main

# What Python reports before it changes the file system; os.replace is a rename too.
CHANGES = {f"os.{name}" for name in ("rename", "remove", "rmdir", "link", "chmod", "truncate")}


def run(
    arguments: list[str], folder: str, kill_at: int, count_file: str, cache: str, kept: str | None = None
) -> None:
    """The command; dies by SIGKILL before change `kill_at` of the folder, or writes how many there were.

    `kept`: a folder for copies of the folder as it is before each change, by their numbers.

    Pictures are small text files here: drawing takes most of the time, and touches no file.
    """
    os.environ["CLUSTERNS_CACHE"] = cache
    Figure.savefig = lambda self, target, **_: (
        target.write("<svg>") if hasattr(target, "write") else Path(target).write_text("", encoding="utf-8")
    )
    changes = 0

    def is_change(event: str, details: tuple) -> bool:
        if event == "open":  # path, mode, flags
            return bool(details[2] & (os.O_WRONLY | os.O_RDWR))
        if event == "os.mkdir":  # path, mode, descriptor of a folder
            return not os.path.isdir(details[0])
        return event in CHANGES

    def place(path: object, folder_descriptor: object) -> str:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if isinstance(folder_descriptor, int) and folder_descriptor >= 0 and not os.path.isabs(name):
            return os.path.join(os.readlink(f"/proc/self/fd/{folder_descriptor}"), name)  # as rmtree has it
        return name

    def watch(event: str, details: tuple) -> None:
        nonlocal changes
        if not is_change(event, details):
            return
        descriptor = None if event == "open" else details[-1]
        if any(f"{place(detail, descriptor)}/".startswith(f"{folder}/") for detail in details[:2]):
            changes += 1
            if kept is not None:
                shutil.copytree(folder, os.path.join(kept, str(changes)))
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    status = main(arguments)
    Path(count_file).write_text(str(changes), encoding="utf-8")
    sys.stdout.flush()
    sys.exit(status)
