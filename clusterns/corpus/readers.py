"""Files of text as tables: names of the columns, and rows one after another, never a whole file in memory."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import xxhash

# What a column holds, as far as the first rows say; anything else is the name of a type.
TEXT, NUMBERS = "text", "numbers"
SAMPLED_ROWS = 1000
# Characters of one field of a csv file; beyond, a quote was never closed. Python's own limit is 131,072.
FIELD_CHARACTERS = 1 << 24
Cells = tuple[Any, ...]
# From names of columns to the rows' numbers, counted as an error should count, and values.
Read = Callable[[Sequence[str]], Iterator[tuple[int, Cells]]]


@dataclass
class Table:
    """A source of rows."""

    # What each column holds, by its name.
    kinds: dict[str, str]
    read: Read
    # What the numbers count: "line" or "row".
    unit: str = "row"


def open_table(path: Path) -> Table:
    """The table in a file whose suffix is one of `READERS`; raises ValueError, OSError with one line."""
    return READERS[path.suffix.lower()](path)


def fingerprint(path: Path) -> str:
    """Of the file's bytes; raises ValueError where they cannot be sentences: none, blank, no text."""
    binary = path.suffix.lower() == ".parquet"
    digest, blank = xxhash.xxh3_128(), True
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if not binary and b"\0" in chunk:
                raise ValueError(f"{path}: expected UTF-8 text, got a binary file")
            blank = blank and not chunk.strip()
        if file.tell() == 0:
            raise ValueError(f"{path}: expected sentences, got an empty file")
    if blank:
        raise ValueError(f"{path}: expected sentences, got only blank lines")
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and lines with their ends; only a newline ends one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: expected UTF-8 text, got other bytes ({error.reason})"
                ) from error
            yield number, text


def _text(path: Path) -> Table:
    def read(names: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        for number, line in _lines(path):
            yield number, (line,)

    return Table({"text": TEXT}, read, "line")


def _csv(path: Path, **dialect: Any) -> Table:
    kind = path.suffix.lower().lstrip(".")

    def records() -> Iterator[tuple[int, list[str]]]:
        before = csv.field_size_limit(FIELD_CHARACTERS)
        reader = csv.reader((line for _, line in _lines(path)), strict=True, **dialect)
        try:
            for record in reader:
                if record:  # else a blank line
                    yield reader.line_num, record
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: expected a well-formed {kind} file, got {error}"
            ) from error
        finally:
            csv.field_size_limit(before)

    header = next(records())[1]
    if len(set(header)) < len(header):
        raise ValueError(f"{path}, line 1: expected columns of different names, got {', '.join(header)}")

    def read(names: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        places = [header.index(name) for name in names]
        choose = itemgetter(*places) if len(places) > 1 else lambda record: (record[places[0]],)
        for number, record in islice(records(), 1, None):
            if len(record) != len(header):
                raise ValueError(
                    f"{path}, line {number}: expected a well-formed {kind} file, {len(header)} fields as in "
                    f"its header, got {len(record)}"
                )
            yield number, choose(record)

    return Table(_sampled(header, read), read, "line")


def _json_lines(path: Path) -> Table:
    def objects() -> Iterator[tuple[int, Any]]:
        for number, line in _lines(path):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: expected a well-formed jsonl file, got {error}"
                    ) from error

    return _of_objects(path, objects, "line")


def _json(path: Path) -> Table:
    """A list of objects, read whole; or lines of them, which some call json."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes ({error.reason})") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _json_lines(path)
        raise ValueError(f"{path}: expected a well-formed json file, got {error}") from error
    if isinstance(value, dict):
        return _json_lines(path)
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected a list of objects, got {type(value).__name__}")
    return _of_objects(path, lambda: iter(enumerate(value, 1)), "object")


def _of_objects(path: Path, objects: Callable[[], Iterator[tuple[int, Any]]], unit: str) -> Table:
    """A table of json objects, whose columns are the names in the first; what another lacks is null."""

    def checked() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, value in objects():
            if not isinstance(value, dict):
                raise ValueError(
                    f'{path}, {unit} {number}: expected an object, as in {{"text": "..."}}, '
                    f"got {type(value).__name__}"
                )
            yield number, value

    def read(names: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        for number, value in checked():
            yield number, tuple(value.get(name) for name in names)

    first = next(checked(), None)
    if first is None:
        raise ValueError(f"{path}: expected sentences, got no rows")
    return Table(_sampled(list(first[1]), read), read, unit)


def _sampled(
    names: list[str], read: Callable[[Sequence[str]], Iterator[tuple[int, Cells]]]
) -> dict[str, str]:
    """What the columns hold, by the first rows."""
    sample = [values for _, values in islice(read(names), SAMPLED_ROWS)]
    kinds = {}
    for place, name in enumerate(names):
        values = [row[place] for row in sample if row[place] is not None]
        others = [type(value).__name__ for value in values if not isinstance(value, str)]
        if others:
            kinds[name] = others[0]
        elif values and all(map(_is_number, values)):
            kinds[name] = NUMBERS
        else:
            kinds[name] = TEXT
    return kinds


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _parquet(path: Path) -> Table:
    @contextlib.contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: expected a well-formed parquet file, got {reason}") from error

    with explained(), pyarrow.parquet.ParquetFile(path) as file:
        kinds = arrow_kinds(file.schema_arrow)

    def read(names: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        number = 0
        with explained(), pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=SAMPLED_ROWS, columns=list(names)):
                columns = [batch.column(name).to_pylist() for name in names]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, values

    return Table(kinds, read)


def arrow_kinds(schema: pyarrow.Schema) -> dict[str, str]:
    """What the columns of an Arrow schema hold."""
    types = pyarrow.types
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return {
        field.name: TEXT if any(is_text(field.type) for is_text in texts) else str(field.type)
        for field in schema
    }


READERS: dict[str, Callable[[Path], Table]] = {
    ".txt": _text,
    ".csv": _csv,
    # Tab-separated values have no quoting, so a lone quote is text.
    ".tsv": lambda path: _csv(path, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
