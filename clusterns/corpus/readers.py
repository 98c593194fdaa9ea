"""Files as tables: names of columns, and rows one after another, never a whole file in memory.

What a file says of itself is read and said in `Table.shape`; what could be read in two ways is refused with
both ways and the argument that decides.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import xxhash

# What a column holds, as far as the first rows say; anything else is the name of a type.
TEXT, NUMBERS, DATES = "text", "numbers", "dates"
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}([ T][\d:.+Z-]*)?")
SAMPLED_ROWS = 1000
Cells = tuple[Any, ...]
# From names of columns to the rows' numbers, counted as an error should count, and values.
Read = Callable[[Sequence[str]], Iterator[tuple[int, Cells]]]


class Reading(NamedTuple):
    """How to read a file of delimited values, where it does not say so itself; None finds out."""

    delimiter: str | None = None
    header: bool | None = None
    # Names that the user expects in a header.
    names: tuple[str, ...] = ()

    def refuse_for(self, path: Path) -> None:
        """Raise ValueError where either is given for a file that has neither."""
        for flag, value in (("--delimiter", self.delimiter), ("--header", self.header)):
            if value is not None:
                raise ValueError(f"{flag}: expected nothing for {path}, which has none, got {value!r}")


@dataclass
class Table:
    """A source of rows."""

    # What each column holds, by its name.
    kinds: dict[str, str]
    read: Read
    # What the numbers count: "line" or "row".
    unit: str = "row"
    # Format, delimiter and header, in words.
    shape: str = ""
    # What of that was taken in doubt, for a warning.
    doubt: str = ""

    def sample(self, names: Sequence[str]) -> list[Cells]:
        """The values of the first rows."""
        return [values for _, values in islice(self.read(names), SAMPLED_ROWS)]


def quoted(names: Iterable[str]) -> str:
    """Names of columns, in words."""
    return ", ".join(f"{name!r}" for name in names)


# What other files begin with.
_OTHERS = {
    b"PK\x03\x04": "a zip file, as an Excel workbook is one: save it as CSV UTF-8, or unpack it",
    b"\x1f\x8b": "a gzip file: unpack it",
    b"\xff\xfe": "UTF-16: save it as UTF-8, in Excel as CSV UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"PAR1": "a parquet file: its name should end in .parquet",
}


class Content(NamedTuple):
    """Of a file's bytes: what tells them from others, and what ends a line."""

    fingerprint: str
    newline: bytes


def look_through(path: Path) -> Content:
    """Read all bytes once; raises ValueError where they cannot be sentences: none, blank, no text."""
    binary = path.suffix.lower() == ".parquet"
    digest, is_first, blank, newlines, returns = xxhash.xxh3_128(), True, True, False, False
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if binary:
                continue
            for start, kind in _OTHERS.items():
                if is_first and chunk.startswith(start):
                    raise ValueError(f"{path}: expected UTF-8 text, got {kind}")
            is_first = False
            if b"\0" in chunk:
                raise ValueError(f"{path}: expected UTF-8 text, got a binary file")
            blank = blank and not chunk.removeprefix(b"\xef\xbb\xbf").strip()
            newlines, returns = newlines or b"\n" in chunk, returns or b"\r" in chunk
        if file.tell() == 0:
            raise ValueError(f"{path}: expected sentences, got an empty file")
    if blank and not binary:
        raise ValueError(f"{path}: expected sentences, got only blank lines")
    return Content(digest.hexdigest(), b"\r" if returns and not newlines else b"\n")


def lines_of(path: Path, newline: bytes = b"\n") -> Iterator[tuple[int, str]]:
    """Numbers from 1 and lines with their ends; nothing else ends one, as CR in the files of old Macs."""
    with path.open("rb") as file:
        for number, line in enumerate(file if newline == b"\n" else _parts(file, newline), 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: expected UTF-8 text, got other bytes ({error.reason}); save it "
                    "as UTF-8, in Excel as CSV UTF-8"
                ) from error
            yield number, text


def _parts(file: Any, newline: bytes) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(1 << 20):
        *whole, rest = (rest + chunk).split(newline)
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest


def kinds_of(names: Sequence[str], sample: Sequence[Cells]) -> dict[str, str]:
    """What the columns hold, by the first rows."""
    kinds = {}
    for place, name in enumerate(names):
        values = [only_text(row[place]) for row in sample if row[place] is not None]
        others = [value for value in values if not isinstance(value, str)]
        if others:
            kinds[name] = _kind(others)
        elif values and all(map(is_number, values)):
            kinds[name] = NUMBERS
        elif values and all(_DATE.fullmatch(value.strip()) for value in values if value):
            kinds[name] = DATES
        else:
            kinds[name] = TEXT
    return kinds


def _kind(values: Sequence[Any]) -> str:
    if all(isinstance(value, list) for value in values):
        return f"lists of up to {max(map(len, values))}"
    return type(values[0]).__name__


def only_text(value: Any) -> Any:
    """The text of a list of one; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def is_number(text: str) -> bool:
    """Whether a cell is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_parquet(path: Path, newline: bytes, reading: Reading) -> Table:
    """A table of a parquet file."""
    reading.refuse_for(path)

    @contextlib.contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: expected a well-formed parquet file, got {reason}") from error

    with explained(), pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow

    def read(names: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        number = 0
        with explained(), pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=SAMPLED_ROWS, columns=list(names)):
                columns = [batch.column(name).to_pylist() for name in names]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, values

    return arrow_table(schema, read, "parquet")


def arrow_table(schema: pyarrow.Schema, read: Read, shape: str) -> Table:
    """A table by an Arrow schema: categories of text are text, and so are lists of one text."""
    types = pyarrow.types
    table = Table({}, read, shape=shape)
    for field in schema:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            table.kinds[field.name] = TEXT
        elif types.is_list(kind) or types.is_large_list(kind):
            table.kinds[field.name] = kinds_of([field.name], table.sample([field.name]))[field.name]
        else:
            table.kinds[field.name] = str(field.type)
    return table
