"""Tables of json: objects one after the other, or one value that holds them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .readers import SAMPLED_ROWS, Cells, Reading, Table, kinds_of, lines_of, quoted

_WANTED = 'a list of objects as {"text": "..."}, or an object of columns as {"text": ["...", "..."]}'


def read_json(path: Path, newline: bytes, reading: Reading) -> Table:
    """The table of a .json or .jsonl file; raises ValueError in one line.

    Lines of values are read one by one. Anything else is read whole: a list, values that do not end with
    their line, an object that holds one list of objects, and the columns that pandas and datasets write.
    """
    reading.refuse_for(path)
    kind = path.suffix.lower().lstrip(".")
    full = ((number, line) for number, line in lines_of(path, newline) if line.strip())
    (_, first), second = next(full), next(full, None)
    if second is not None and _is_json(first):

        def values() -> Iterator[tuple[int, Any]]:
            for number, line in lines_of(path, newline):
                if line.strip():
                    try:
                        yield number, _DECODER.decode(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(
                            f"{path}, line {number}: expected a well-formed {kind} file, got {_why(error)}"
                        ) from error

        return _of_values(path, values, "line", f"{kind}, a value a line")
    found = _all_values(path, kind)
    rows, shape = _unfolded(path, found[0]) if len(found) == 1 else (found, "objects one by one")
    return _of_values(path, lambda: iter(enumerate(rows, 1)), "object", f"{kind}, {shape}")


def _of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object that has {twice!r} twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_of_pairs)


def _why(error: Exception) -> str:
    return "values nested too deep" if isinstance(error, RecursionError) else str(error)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _all_values(path: Path, kind: str) -> list[Any]:
    """The values of a file, whatever white space is between them."""
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes ({error.reason})") from error
    found, place = [], 0
    while place < len(text):
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", text.count("\n", 0, place) + 1)
            comma = " (a comma between values of a line each)" if text[place] == "," else ""
            raise ValueError(
                f"{path}, line {line}: expected a well-formed {kind} file, got {_why(error)}{comma}"
            ) from error
        found.append(value)
        place += len(text[place:]) - len(text[place:].lstrip())
    return found


def _unfolded(path: Path, value: Any) -> tuple[list[Any], str]:
    """The rows that one value holds, and its form in words."""
    if isinstance(value, list):
        return value, "a list"
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {_WANTED}, got {type(value).__name__}")
    objects = [name for name, part in value.items() if _is_list_of(dict, part)]
    parts = list(value.values())
    if len(objects) == 1:
        return value[objects[0]], f"the list {objects[0]!r}"
    if _is_list_of(list, value.get("data")) and isinstance(value.get("columns"), list):
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]], "pandas' split"
    if not any(isinstance(part, (dict, list)) for part in parts):
        return [value], "one object"
    if all(isinstance(part, list) for part in parts) and len(set(map(len, parts))) == 1 and not objects:
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)], "columns"
    if all(isinstance(part, dict) for part in parts) and len({tuple(part) for part in parts}) == 1:
        if all(map(str.isdigit, value)):
            return parts, "objects by number"
        if all(map(str.isdigit, parts[0])):
            return [{name: value[name][row] for name in value} for row in parts[0]], "columns"
    found = quoted(objects) if objects else quoted(value)
    what = "several lists of objects" if objects else "an object"
    raise ValueError(f"{path}: expected {_WANTED}, got {what}: {found}")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _of_values(path: Path, values: Callable[[], Iterator[tuple[int, Any]]], unit: str, shape: str) -> Table:
    """A table of objects, lists or texts; its columns are the names in the first ones, null in the others."""
    first = next(values(), (0, None))[1]
    kind = type(first) if isinstance(first, (list, str)) else dict
    if first is None:
        raise ValueError(f"{path}: expected sentences, got no rows")

    def checked() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, value in values():
            if not isinstance(value, kind):
                wanted = 'an object, as in {"text": "..."}' if kind is dict else f"a {kind.__name__}"
                got = type(value).__name__
                raise ValueError(f"{path}, {unit} {number}: expected {wanted}, got {got}")
            if isinstance(value, dict):
                yield number, value
            elif isinstance(value, list):
                yield number, {str(place): cell for place, cell in enumerate(value, 1)}
            else:
                yield number, {"text": value}

    def read(names: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        for number, value in checked():
            yield number, tuple(map(value.get, names))

    names = list(dict.fromkeys(name for _, value in islice(checked(), SAMPLED_ROWS) for name in value))
    sample = [values for _, values in islice(read(names), SAMPLED_ROWS)]
    return Table(kinds_of(names, sample), read, unit, shape)
