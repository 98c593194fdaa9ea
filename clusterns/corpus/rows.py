"""Rows of text on disk, mapped into memory: a corpus of any size takes next to none of a process's own."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import xxhash
from huggingface_hub import constants

from ..files import expanded, holding, staging, sweep
from .columns import LeftOut, Tally

# Rows of an Arrow record batch; each but the last has exactly as many, so that a row is found by division.
RECORD_ROWS = 4096
# An entry of the cache that nobody opened for so long is removed.
UNUSED_SECONDS = 30 * 86_400
_TEXTS, _KEYS, _ABOUT = "texts.arrow", "keys.uint64", "about.json"
Row = tuple[str, ...]


class Rows(Sequence[Row]):
    """Rows of one to three texts, read from a memory-mapped file one by one as they are asked for.

    `rows[i]` is a tuple of strings, without surrounding white space and none of them blank. It pickles as the
    place of its files, for the workers of a DataLoader. Arrow's format; what the process holds besides is a
    small object for each 4,096 rows it has looked at.

    Args:
        folder: as `write_rows` made it; raises ValueError or OSError where it is damaged.
        read_as: what the source was read as, in words.

    Attributes:
        columns: names of the columns that the texts come from, C.
        left_out: for each reason to leave out rows of the source their number, and where the first two are.
        odd: the same for what is odd in rows that are kept.
        dropped: rows left out, for whatever reason.
        account: in a line what was read, as what, how many rows there are, and how many were left out why.
    """

    def __init__(self, folder: Path, read_as: str = "") -> None:
        self.folder, self.read_as = folder, read_as
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        self.columns: tuple[str, ...] = tuple(about["columns"])
        self.left_out, self.odd = Tally(about["left_out"]), Tally(about["odd"])
        self._length: int = about["rows"]
        self._file = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / _TEXTS)))
        if self._file.num_record_batches != -(-self._length // RECORD_ROWS):
            raise ValueError(f"{folder}: expected {self._length} rows, got another number of record batches")
        self._records: dict[int, list[pyarrow.Array]] = {}
        self._keys = np.memmap(folder / _KEYS, np.uint64, "r", shape=(self._length, len(self.columns)))

    @property
    def dropped(self) -> int:
        """See the class."""
        return sum(count for count, _ in self.left_out.values())

    @property
    def account(self) -> str:
        """See the class."""
        parts = [self.read_as, f"{self._length:,} row{'s' * (self._length > 1)}"]
        parts[1] += f", among them {self.odd}" if self.odd else ""
        return "; ".join(parts + ([f"left out: {self.left_out}"] if self.left_out else []))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"index: expected below {self._length} rows, got {index}")
        record, place = divmod(index % self._length, RECORD_ROWS)
        columns = self._records.get(record)
        if columns is None:
            columns = self._records[record] = self._file.get_batch(record).columns
        return tuple(column[place].as_py() for column in columns)

    def keys(self, indices: np.ndarray) -> list[list[int]]:
        """A 64-bit fingerprint of each text of the rows (n,): n lists of C, equal where the texts are."""
        return self._keys[indices].tolist()

    def __reduce__(self) -> tuple[type[Rows], tuple[Path, str]]:
        return Rows, (self.folder, self.read_as)


def cache_folder() -> Path:
    """Where the files of `Rows` are kept: $CLUSTERNS_CACHE, else clusterns/rows in the Hugging Face cache."""
    named = os.environ.get("CLUSTERNS_CACHE")
    return (
        expanded(named, "CLUSTERNS_CACHE").absolute()
        if named
        else Path(constants.HF_HOME) / "clusterns" / "rows"
    )


def cached_rows(
    key: str,
    source: str,
    columns: Sequence[str],
    rows: Callable[[Tally], Iterator[Row | LeftOut]],
    limit: int | None,
) -> Rows:
    """The rows kept under a key, which says all about their content; made where there are none.

    Processes that ask at the same time wait for the one that makes them, and an entry appears whole or not
    at all. Arguments as of `write_rows`; raises ValueError for no rows, OSError where they cannot be kept.
    """
    folder = cache_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        with holding(Path(f"{folder}.lock"), wait=True):
            if folder.is_dir():
                try:
                    os.utime(folder)
                    return Rows(folder)
                except (OSError, ValueError, KeyError):  # damaged, as by a power cut
                    shutil.rmtree(folder)
            _remove_old(folder.parent)
            return write_rows(folder, source, columns, rows, limit)
    except OSError as error:
        if error.filename is None or str(folder.parent) in str(error.filename):
            raise type(error)(
                f"{folder.parent}: expected a cache folder to write to, got {error.strerror or error}; "
                "CLUSTERNS_CACHE names another"
            ) from error
        raise


def write_rows(
    folder: Path,
    source: str,
    columns: Sequence[str],
    rows: Callable[[Tally], Iterator[Row | LeftOut]],
    limit: int | None,
) -> Rows:
    """Write rows in the folder of `folder` and move them there whole.

    Args:
        folder: does not exist yet; its parent does.
        source: named in errors.
        columns: names of the C texts of a row.
        rows: gives tuples of C trimmed texts, or why a row is left out; adds to a tally what is odd.
        limit: rows at most; what follows is not read.

    Raises ValueError where there are none.
    """
    written = 0
    left_out, odd = Tally(), Tally()

    def present() -> Iterator[Row]:
        for row in rows(odd):
            if isinstance(row, LeftOut):
                left_out.add(row)
            else:
                yield row

    remaining = islice(present(), limit)
    schema = pyarrow.schema([(str(number), pyarrow.large_string()) for number in range(len(columns))])
    with staging(folder.parent) as place:
        with (
            (place / _KEYS).open("wb") as keys,
            pyarrow.OSFile(str(place / _TEXTS), "wb") as texts,
            pyarrow.ipc.new_file(texts, schema) as records,
        ):
            while record := list(islice(remaining, RECORD_ROWS)):
                try:
                    fingerprints = [[_key(text) for text in row] for row in record]
                except UnicodeEncodeError as error:  # json can spell them
                    raise ValueError(f"{source}: expected text, got a lone surrogate in it") from error
                keys.write(np.array(fingerprints, np.uint64).tobytes())
                arrays = [
                    pyarrow.array(column, pyarrow.large_string()) for column in zip(*record, strict=True)
                ]
                records.write_batch(pyarrow.record_batch(arrays, schema=schema))
                written += len(record)
        if not written:
            got = f"none, left out: {left_out}" if left_out else "no rows"
            raise ValueError(f"{source}: expected sentences, got {got}")
        about = {"columns": list(columns), "rows": written, "left_out": left_out, "odd": odd}
        about["source"] = source
        (place / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for file in place.iterdir():  # a power cut leaves whole files or no entry
            with file.open("rb+") as written_file:
                os.fsync(written_file.fileno())
        try:
            place.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same content
                raise
    return Rows(folder)


def _key(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _remove_old(cache: Path) -> None:
    """Remove entries long unused, unless in use, and locks of entries that a killed process never made."""

    def is_unused(entry: Path) -> bool:
        return entry.is_dir() and time.time() - entry.stat().st_mtime > UNUSED_SECONDS

    for entry in {path.with_suffix("") for path in cache.glob("[!.]*")}:
        with suppress(OSError):  # one that is held among them
            if is_unused(entry) or not entry.exists():
                with holding(Path(f"{entry}.lock")):  # which removes it at the end
                    if is_unused(entry):
                        shutil.rmtree(entry, ignore_errors=True)
