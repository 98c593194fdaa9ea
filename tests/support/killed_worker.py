"""`clusterns` in a process of its own, which kills itself before its n-th change of the disk, or keeps what a
kill before each change would leave in a folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from matplotlib.figure import Figure

from clusterns.cli import main

# What Python reports before it changes the file system; os.replace is a rename too.
CHANGES = {f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "link", "chmod", "truncate")}


def run(
    arguments: list[str], folder: str, kill_at: int, count_file: str, cache: str, kept: str | None = None
) -> None:
    """The command; dies by SIGKILL before change `kill_at`, or writes how many there were.

    `kept`: a folder for copies of the folder as it is before each change, by their numbers.

    Pictures are small text files here: drawing takes most of the time, and touches no file.
    """
    os.environ["CLUSTERNS_CACHE"] = cache
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
            shutil.copytree(folder, os.path.join(kept, str(changes)))
            copying = False
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    status = main(arguments)
    Path(count_file).write_text(str(changes), encoding="utf-8")
    sys.stdout.flush()
    sys.exit(status)
