"""Texts with the classes that people gave them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .columns import BLANK, USUAL_LABELS, USUAL_SENTENCES, Asked, LeftOut, Tally, column, named
from .readers import TEXT, Table, only_text
from .sources import open_source, source_name, warn_of_loss, with_progress

# Rows from which labels are to be fewer than half of them: else they are the texts.
_ROWS = 10


class LabelledTexts(NamedTuple):
    """N texts, their class ids (N,) from 0 on, the classes' names by id, and in a line what was read."""

    texts: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    account: str = ""


def load_labelled_texts(
    source: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
) -> LabelledTexts:
    """Read texts and their labels from a file or hub dataset; a label may be any word or number.

    Args:
        source, delimiter, header: as of `load_rows`, but that a .txt is parted by tabs.
        text_column, label_column: names, or numbers from 1. None takes the usual
            names, else of two columns the first as label and the second as text.

    White space in a text becomes single spaces. Rows without label or text are left out, which `account` and,
    above 2 %, a warning say. Raises ValueError in one line for columns that nothing tells, fewer than two
    rows, a single class, or labels that are as many as the texts; and what `load_rows` raises.
    """
    source = source_name(source)
    if delimiter is None and Path(source).suffix.lower() == ".txt":
        delimiter = "tab"
    asked = Asked(None if text_column is None else (text_column,), label_column)
    table, _ = open_source(source, delimiter, header, asked)
    label, text = _label_and_text(source, table, label_column, text_column)
    labels, texts, left_out = [], [], Tally()
    for number, values in with_progress(source, table).read([label, text]):
        values = tuple(map(only_text, values))
        for name, value in zip((label, text), values, strict=True):
            if isinstance(value, (list, dict)):
                kind, place = type(value).__name__, f"{table.unit} {number}"
                raise ValueError(f"{source}, {place}: expected a label or text in {name!r}, got a {kind}")
        cells = ["" if value is None else " ".join(str(value).split()) for value in values]
        if all(cells):
            labels.append(cells[0])
            texts.append(cells[1])
        else:
            left_out.add(LeftOut(f"{BLANK}{text if cells[0] else label}", f"{table.unit} {number}"))
    if len(texts) < 2:
        raise ValueError(f"{source}: expected at least two labelled texts, got {len(texts)}")
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"{source}: expected at least two classes in {label!r}, got only {classes[0]!r}")
    if len(classes) > (len(texts) / 2 if len(texts) >= _ROWS else len(texts) - 1):
        got = f"{len(classes):,} different ones in {len(texts):,} rows"
        raise ValueError(
            f"{source}: expected labels that texts share in column {label!r}, got {got}; "
            f"--label-column {text} --text-columns {label} swaps the two"
        )
    ids = {name: index for index, name in enumerate(classes)}
    account = f"{source}: {table.shape}; {label!r} as labels, {text!r} as texts; {len(texts):,} rows of "
    account += f"{len(classes):,} classes" + (f"; left out: {left_out}" if left_out else "")
    warn_of_loss(source, left_out, len(texts), ())
    return LabelledTexts(texts, np.array([ids[name] for name in labels]), classes, account)


def _label_and_text(source: str, table: Table, label: str | None, text: str | None) -> tuple[str, str]:
    """The columns named, else the usual ones, else the first two."""
    names = list(table.kinds)
    label = None if label is None else column(source, table, label)
    text = None if text is None else column(source, table, text)
    if label is not None and label == text:
        raise ValueError(f"--label-column: expected another column of {source} than the texts, got {label!r}")
    usual = [name for name in names if name.casefold() in USUAL_LABELS and name != text]
    if label is None and (len(usual) == 1 or len(names) == 2):
        texts = [text] if text is not None else [name for name in names if table.kinds[name] == TEXT]
        alone = [name for name in names if len(texts) == 1 and name not in texts]
        label = (usual or alone or names)[0]
    others = [name for name in names if name not in (label, text) and table.kinds[name] == TEXT]
    if text is None and label is not None:
        known = [name for name in others if name.casefold() in USUAL_SENTENCES]
        text = known[0] if known else others[0] if len(others) == 1 else None
    if label is None or text is None:
        missing = "--label-column" if label is None else "--text-columns"
        wanted = (
            "expected a label and a text in each line, got" if len(names) == 1 else "expected a name, as of"
        )
        raise ValueError(f"{source}: {wanted} {', '.join(names)} ({table.shape}); {missing} names the column")
    return label, named(source, table, [text])[0]
