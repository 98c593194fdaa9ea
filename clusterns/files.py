"""What is written appears whole or not at all; what a killed process leaves of it goes with the next write.

Everything is written in a hidden folder inside the folder that it is for, hence on the same disk, and moved
to its place at the end. Its writer holds a lock in there, which ends with the process: a hidden folder that
nobody holds is a leftover, and `sweep` removes it. Each write sweeps its folder first, and a start those that
it will write to.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_PREFIX, _LOCK, _FILES = ".clusterns-", "lock", "files"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what a disk says that has none
# Seconds of waiting for another process after which it is said, and after which it ends.
SAY_AFTER, WAIT_AT_MOST = 10.0, 600.0
_held: set[int] = set()  # descriptors of this process


def _let_go() -> None:
    """In a forked process, as a worker that loads data: it would hold them for longer than its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def holding(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock among processes, a file that is there only meanwhile; a killed process holds it no longer.

    Yields whether it is held: a disk may have no locks. Raises BlockingIOError where another holds it, where
    it is to wait after ten minutes, of which a warning tells; and FileNotFoundError for a missing folder.
    """
    began, is_said = time.monotonic(), False
    while (found := _lock(path)) is None and wait and time.monotonic() - began < WAIT_AT_MOST:
        if not is_said and time.monotonic() - began > SAY_AFTER:
            text = f"{path}: waiting for the process that holds this file; if there is none, remove the file"
            warnings.warn(text, stacklevel=3)
            is_said = True
        time.sleep(0.05)
    if found is None:
        raise BlockingIOError(errno.EAGAIN, "held by another process; if there is none, remove it", str(path))
    descriptor, is_held = found
    try:
        yield is_held
    finally:
        if descriptor in _held:
            with suppress(OSError):  # of Windows, which removes no open file
                path.unlink()
            _release(descriptor)
            if sys.platform == "win32":
                path.unlink(missing_ok=True)


def _lock(path: Path) -> tuple[int, bool] | None:
    """Descriptor of the lock, and whether the disk has locks; None where another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    is_held = True
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        is_held = False
        if error.errno not in _NO_LOCKS:
            _release(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):  # Windows says the latter
                return None
            raise
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor, is_held
    _release(descriptor)  # of a file that its holder has removed since it was opened: no other would see it
    return _lock(path)


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


@contextmanager
def staging(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder, hidden inside `folder`, that goes at the end with what was not moved out of it.

    Raises OSError where `folder` is missing or cannot be written to.
    """
    sweep(folder)
    with ExitStack() as stack:
        held = False
        while not held:
            hidden = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            # A sweep may come before the lock, and take it for a leftover.
            with suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(holding(hidden / _LOCK))
                held = True
        try:
            place = hidden / _FILES
            place.mkdir()
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            stack.close()
            with suppress(OSError):  # a sweep is at it
                hidden.rmdir()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path of the same name, and move it to `path` at the end.

    An error or a kill in between leaves an earlier file at `path` as it was. A link stays one, its file is
    replaced; what is no file, as /dev/stdout, is written to. Raises OSError in one line where that fails.
    """
    target = expanded(path)
    try:
        if _is_device(target):
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder, target.name)
                target.write_bytes(Path(folder, target.name).read_bytes())
            return
        target = target.resolve()
        with staging(target.parent) as place:
            yield place / target.name
            os.replace(place / target.name, target)
    except OSError as error:
        raise type(error)(f"{path}: cannot write this file, got {error.strerror or error}") from error


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes have left in `folder`, but nothing that a live one is writing.

    A leftover that cannot be removed, as another user's, is warned of in one line.
    """
    for hidden in Path(folder).glob(f"{_PREFIX}*"):
        try:
            with holding(hidden / _LOCK) as is_held:
                if not is_held:
                    raise OSError(errno.ENOLCK, "this disk has no locks")
                if (hidden / _FILES).exists():
                    shutil.rmtree(hidden / _FILES)
            hidden.rmdir()
        except (BlockingIOError, FileNotFoundError):
            continue  # a live process writes there, or another one has swept it
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # a writer that was about to begin has begun
                text = f"cannot remove what a killed process may have left ({error.strerror}); it stays"
                warnings.warn(f"{hidden}: {text}", stacklevel=2)


def is_staged(path: Path) -> bool:
    """Whether it is such a hidden folder."""
    return path.name.startswith(_PREFIX)


def check_room(name: str, folder: Path, needed: int) -> None:
    """Require so many bytes on the disk of a folder, before the work whose result goes there."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = (
            f"{name}: expected {needed / 1e6:,.1f} MB of room on the disk of {folder}, got {free / 1e6:,.1f}"
        )
        raise OSError(text)


def _is_device(path: Path) -> bool:
    """Whether it is there and no file: a pipe, a terminal, whatever /dev has."""
    return path.exists() and (not path.is_file() or path.absolute().parent == Path("/dev"))


class Read(NamedTuple):
    """What a command reads: a file, or the files and folders of a folder that have such names."""

    flag: str
    path: str | os.PathLike[str]
    names: Iterable[str] = ()

    def holds(self, target: Path) -> bool:
        """Whether the file of that path is, or would be, read."""
        place = Path(self.path)
        if not place.is_dir():  # a file, or a name of the hub
            return place.exists() and target.exists() and target.samefile(place)
        folder = Path(os.path.realpath(place))
        # A file of the folder may be a link, to another one or to what is elsewhere.
        reals = (Path(os.path.realpath(target)), Path(os.path.realpath(target.parent), target.name))
        parts = [part for real in reals if folder in real.parents for part in real.relative_to(folder).parts]
        return any(fnmatch(part, name) for part in parts for name in self.names)


def check_outputs(
    files: Mapping[str, str | os.PathLike[str] | None], reads: Iterable[Read] = ()
) -> dict[str, Path]:
    """Require, before the work that they are for, that files can be written; returns their paths by flag.

    Each is a file of its own, where one is given, and none is read by the same command.
    """
    reads = [one._replace(path=expanded(one.path, one.flag)) for one in reads]
    found: dict[str, Path] = {}
    for name, path in files.items():
        if path is None:
            continue
        target = check_writable(name, path)
        for one in reads:
            if one.holds(target):
                raise FileExistsError(
                    f"{name}: expected a file that this command does not read, got {target}, which is of "
                    f"{one.flag} {one.path}; choose another, as {name} OTHER{target.suffix}"
                )
        for other, earlier in found.items():
            if os.path.realpath(target) == os.path.realpath(earlier):
                raise ValueError(f"{name}: expected another file than {other}, got {target} for both")
        found[name] = target
    return found


def write_results(
    results: Any,
    text: str,
    draw: Callable[[Path], None],
    files: Mapping[str, str | os.PathLike[str] | None],
) -> None:
    """Write results as --json, the text as --markdown, a drawing as --figure, where `files` names a file."""
    content = {"--json": json.dumps(results, indent=2, allow_nan=False), "--markdown": text}
    for name, file in files.items():
        if file is None:
            continue
        with replacing(file) as path:
            if name == "--figure":
                draw(path)
            else:
                path.write_text(content[name] + "\n", encoding="utf-8")


def check_writable(name: str, path: str | os.PathLike[str]) -> Path:
    """Require that a file can be written at `path`; returns it with the home folder in place of ~."""
    target = expanded(path, name)
    place = Path(os.path.realpath(target))
    try:
        if place.is_dir():
            raise IsADirectoryError(f"{name}: expected a file, got the folder {path}")
        if _is_device(target):
            return target
        if not place.parent.is_dir():
            raise FileNotFoundError(f"{name}: expected a file in a folder that exists, got {path}")
        with staging(place.parent), suppress(FileNotFoundError):
            place.stat()  # says where the name is too long
    except OSError as error:
        if error.strerror is None:  # one of these lines
            raise
        raise type(error)(
            f"{name}: expected a file in a folder that can be written to, got {path} ({error.strerror})"
        ) from error
    return target


def expanded(path: str | os.PathLike[str], name: str = "path") -> Path:
    """A path of the user, with the home folder in place of ~; ValueError for an empty one or no such user."""
    if not os.fspath(path):
        raise ValueError(f"{name}: expected a path, got an empty one")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}: expected the home folder of a user that exists, got {path}") from error
