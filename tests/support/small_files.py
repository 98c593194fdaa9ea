"""Tables of cases, small files to read, and what it is to be refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusterns.corpus.sources import load_rows


def cases(names: str, rows: list[tuple]) -> pytest.MarkDecorator:
    """A table of cases, each called by its number."""
    return pytest.mark.parametrize(names.split(), rows, ids=itertools.count())


def write(folder: Path, name: str, content: object) -> Path:
    """A file of text or bytes as they are, or of anything else as json."""
    path = folder / name
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content, indent=2)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refuses(
    source: Any,
    *parts: str,
    kind: type[Exception] = ValueError,
    load: Callable[..., object] = load_rows,
    **options: Any,
) -> None:
    """Reading ends with one line that has all the parts and, but where an argument is wrong, the source."""
    with pytest.raises(kind) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts if kind is TypeError else (str(source), *parts):
        assert part in message
