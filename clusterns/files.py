"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, and move it there at the end.

    An error in between leaves an earlier file at `path` as it was, and nothing beside it.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder_of(name: str, path: str | os.PathLike[str] | None) -> None:
    """Require that a file could be written at `path`, where one is given: its folder exists."""
    if path is None:
        return
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: expected a file in a folder that exists, got {path}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got the folder {path}")
