"""Files of scored pairs, labelled texts, or queries with passages: which kind one is, and its rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..checks import check_choice
from .columns import (
    BLANK,
    NO_NUMBER,
    TWICE,
    USUAL_LABELS,
    USUAL_PAIRS,
    USUAL_SENTENCES,
    Asked,
    LeftOut,
    Tally,
    column,
    looks_like_label,
    named,
    words_of,
)
from .judged import KINDS, Judged, LabelledTexts, Queries, ScoredPairs
from .readers import TEXT, Table, is_number, only_text, quoted
from .sources import open_source, source_name, warn_of_loss, with_progress

# The columns of each kind, by names that are usual.
COLUMNS = {"pairs": "sentence1,sentence2,score", "labels": "text,label", "queries": "query,passage"}
# Texts that are compared, if a score stands beside them.
_PAIRS = (
    *(names[:2] for names in USUAL_PAIRS),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
)
# Without a score, these of USUAL_PAIRS are a query and what it is to find.
_FOUND = (("sent0", "sent1"), ("anchor", "positive"), ("query", "positive"))
_QUERIES = {"query", "question", "anchor"}
_PASSAGES = {"passage", "answer", "positive", "document", "response"}
# Of USUAL_LABELS, what no class is called.
_SCORES = set("score scores gold_score similarity similarity_score relatedness relatedness_score".split())
# Rows from which labels are to be fewer than half of them: else they are the texts.
_ROWS = 10
# Where it is, and its cells.
_Row = tuple[str, list[str]]


def load_judged(
    source: str | os.PathLike[str],
    *,
    kind: str | None = None,
    columns: Sequence[str] | str | None = None,
    corpus: str | os.PathLike[str] | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    of: str = "data",
) -> Judged:
    """Read what models are judged by from a file or hub dataset.

    Args:
        source, delimiter, header: as of `load_rows`, but that a .txt is parted by tabs.
        kind: "pairs", two texts and a number a row; "labels", a text and its class, any word or number; or
            "queries", a query and a passage that answers it, in several rows where there are several. None
            finds it out by the columns.
        columns: names, or numbers from 1, in a list or joined by commas: first, second, score; text, label;
            or query, passage. None takes the usual names, and of two columns the one that looks like labels.
        corpus: of queries, a file of more passages to choose from; the other kinds make no use of it.
        of: the flag in messages: --data-kind, --data-columns.

    White space in a text becomes single spaces. Rows without a text, label or number, and queries that are
    their own passage, are left out, which `account` and, above 2 %, a warning say. A score is kept as it is.

    Raises ValueError in one line for a kind or columns that nothing tells, and for rows that judge no model:
    none, a single class, labels that are as many as the texts, scores that are no numbers or all equal, a
    single passage; and what `load_rows` raises.
    """
    source = source_name(source)
    if kind is not None:
        check_choice(f"--{of}-kind", kind, KINDS)
    asked = (
        None if columns is None else words_of(columns) if isinstance(columns, str) else [*map(str, columns)]
    )
    if delimiter is None and Path(source).suffix.lower() == ".txt":
        delimiter = "tab"
    try:
        table, _ = open_source(source, delimiter, header, Asked(None if asked is None else tuple(asked)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--{of}: {error}") from error
    kind, names = _chosen(source, table, kind, asked, of)
    left_out = Tally()
    rows = list(_rows(source, table, names, left_out))
    read_rows = len(rows) + _count(left_out)
    read: Judged
    if kind == "pairs":
        read = _pairs(source, names, rows, left_out)
    elif kind == "labels":
        read = _labels(source, names, rows, of)
    else:
        read = _queries(source, names, rows, left_out, corpus)
    warn_of_loss(source, left_out, read_rows - _count(left_out), ())
    unused = [name for name in table.kinds if name not in names]
    account = f"{source}: {table.shape}; {read.account}" + (f"; left out: {left_out}" if left_out else "")
    account += f"; not used: {quoted(unused)}" if unused else ""
    return replace(read, account=account)


def _chosen(
    source: str, table: Table, kind: str | None, asked: list[str] | None, of: str
) -> tuple[str, list[str]]:
    """The kind and its columns, in the order of COLUMNS."""
    wanted = list(COLUMNS.values()) if kind is None else [COLUMNS[kind]]
    if asked is not None:
        names = [column(source, table, name) for name in asked]
        if len(names) not in [len(words_of(each)) for each in wanted] or len(set(names)) < len(names):
            raise ValueError(f"--{of}-columns: expected {' or '.join(wanted)}, got {','.join(asked)}")
        if kind is None:
            likely = [table.kinds[name] != TEXT or looks_like_label(table, name) for name in names]
            kind = "pairs" if len(names) == 3 else "labels" if likely[1] else "queries"
            if kind == "queries" and likely[0]:  # labels before their texts, or a query in many rows
                raise _untold(source, table, of)
        return kind, _with_texts(source, table, kind, names)
    finders = {"pairs": _pair_columns, "queries": _query_columns, "labels": _label_columns}
    for each, find in finders.items():
        if kind in (each, None) and (found := find(table, kind is not None)):
            return each, _with_texts(source, table, each, found)
    if kind is not None:
        got = f"{', '.join(table.kinds)} ({table.shape})"
        raise ValueError(f"{source}: expected {wanted[0]}, got {got}; --{of}-columns names the columns")
    raise _untold(source, table, of)


def _untold(source: str, table: Table, of: str) -> ValueError:
    return ValueError(
        f"{source}: expected scored pairs, labelled texts or queries, got {', '.join(table.kinds)} "
        f"({table.shape}); --{of}-kind ({', '.join(KINDS)}) or --{of}-columns "
        f"({' or '.join(COLUMNS.values())}) tells which"
    )


def _with_texts(source: str, table: Table, kind: str, names: list[str]) -> list[str]:
    """The columns, of which the texts must hold text."""
    named(source, table, names[: 1 if kind == "labels" else 2])
    return names


def _pair_columns(table: Table, is_asked: bool) -> list[str] | None:
    """Two texts, and the only column beside them that is called as scores are, or looks like them."""
    usual = _usual(table, _PAIRS)
    texts = usual or [name for name in _texts(table) if name.casefold() not in USUAL_LABELS]
    others = [name for name in table.kinds if name not in texts]
    known = USUAL_LABELS if usual or is_asked else _SCORES
    scores = [name for name in others if name.casefold() in known]
    scores = [name for name in scores if any(_numbers(table, name))] or scores
    if not scores:
        scores = [name for name in others if looks_like_label(table, name) and any(_numbers(table, name))]
        if not usual and not is_asked:  # whole numbers may be classes, of texts with a title
            scores = [
                name
                for name in scores
                if name.isdecimal() and not all(map(float.is_integer, _numbers(table, name)))
            ]
    return [*texts, *scores] if len(texts) == 2 and len(scores) == 1 else None


def _query_columns(table: Table, is_asked: bool) -> list[str] | None:
    """Two texts by their names; beside a label, which may say that they do not belong, only if asked for."""
    if not is_asked and any(name.casefold() in USUAL_LABELS for name in table.kinds):
        return None
    known = [[name for name in table.kinds if name.casefold() in names] for names in (_QUERIES, _PASSAGES)]
    if all(len(names) == 1 for names in known):
        return [names[0] for names in known]
    texts = _texts(table)
    return _usual(table, _PAIRS if is_asked else _FOUND) or (texts if is_asked and len(texts) == 2 else None)


def _label_columns(table: Table, is_asked: bool) -> list[str] | None:
    """A text, and the column beside it that is called as labels are, or of two looks like them."""
    names, texts = list(table.kinds), _texts(table)
    labels = [name for name in names if name.casefold() in USUAL_LABELS]
    if len(names) == 2 and len(labels) != 1:
        labels = [name for name in names if name not in texts]
        if len(labels) != 1:
            labels = [name for name in names if looks_like_label(table, name)]
            labels = labels[:1] or names[: int(is_asked)]
    texts = [name for name in texts if name not in labels]
    known = [name for name in texts if name.casefold() in USUAL_SENTENCES]
    text = known[:1] or (texts if len(texts) == 1 else [])
    return [*text, *labels] if text and len(labels) == 1 else None


def _count(left_out: Tally) -> int:
    return sum(count for count, _ in left_out.values())


def _usual(table: Table, pairs: Sequence[tuple[str, ...]]) -> list[str]:
    by_name = {name.casefold(): name for name in table.kinds}
    return next(([by_name[name] for name in names] for names in pairs if {*names} <= by_name.keys()), [])


def _texts(table: Table) -> list[str]:
    return [name for name, kind in table.kinds.items() if kind == TEXT]


def _numbers(table: Table, name: str) -> list[float]:
    """Those of the first rows."""
    return [float(value) for (value,) in table.sample([name]) if value is not None and is_number(str(value))]


def _rows(source: str, table: Table, names: Sequence[str], left_out: Tally) -> Iterator[_Row]:
    """Where each row is, and its cells in these columns; adds up rows with a blank one."""
    for number, values in with_progress(source, table).read(names):
        place, cells = f"{table.unit} {number}", []
        for name, value in zip(names, map(only_text, values), strict=True):
            if isinstance(value, (list, dict)):
                got = type(value).__name__
                raise ValueError(f"{source}, {place}: expected one text in {name!r}, got a {got}")
            cells.append("" if value is None else " ".join(str(value).split()))
        if all(cells):
            yield place, cells
        else:
            left_out.add(LeftOut(f"{BLANK}{names[cells.index('')]}", place))


def _pairs(source: str, names: list[str], rows: list[_Row], left_out: Tally) -> ScoredPairs:
    first, second, scores, other = [], [], [], ""
    for place, (one, two, score) in rows:
        if is_number(score):
            first.append(one)
            second.append(two)
            scores.append(float(score))
        else:
            other = other or score
            left_out.add(LeftOut(f"{NO_NUMBER}{names[2]}", place))
    if not scores and other:
        raise ValueError(f"{source}: expected numbers in column {names[2]!r}, got {other!r}")
    if (lost := left_out.get(f"{NO_NUMBER}{names[2]}", (0, []))[0]) > len(scores):
        raise ValueError(
            f"{source}: expected numbers in column {names[2]!r}, as 4.75, got {other!r} and the like in "
            f"{lost:,} of {lost + len(scores):,} rows"
        )
    if len(scores) < 2:
        raise ValueError(f"{source}: expected at least two scored pairs, got {len(scores)}")
    if len(set(scores)) < 2:
        raise ValueError(f"{source}: expected scores that differ in {names[2]!r}, got only {scores[0]:g}")
    account = f"{quoted(names[:2])} with {names[2]!r} from {min(scores):g} to {max(scores):g}"
    return ScoredPairs(first, second, scores, f"{account}; {len(scores):,} scored pairs")


def _labels(source: str, names: list[str], rows: list[_Row], of: str) -> LabelledTexts:
    text, label = names
    texts, labels = [], []
    for _, cells in rows:
        texts.append(cells[0])
        labels.append(cells[1])
    if len(texts) < 2:
        raise ValueError(f"{source}: expected at least two labelled texts, got {len(texts)}")
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"{source}: expected at least two classes in {label!r}, got only {classes[0]!r}")
    if len(classes) > (len(texts) / 2 if len(texts) >= _ROWS else len(texts) - 1):
        got = f"{len(classes):,} different ones in {len(texts):,} rows"
        raise ValueError(
            f"{source}: expected labels that texts share in column {label!r}, got {got}; "
            f"--{of}-columns {label},{text} swaps the two"
        )
    ids = {name: index for index, name in enumerate(classes)}
    account = f"{label!r} as labels, {text!r} as texts; {len(texts):,} rows of {len(classes):,} classes"
    return LabelledTexts(texts, [ids[name] for name in labels], classes, account)


def _queries(
    source: str,
    names: list[str],
    rows: list[_Row],
    left_out: Tally,
    corpus: str | os.PathLike[str] | None,
) -> Queries:
    passages: dict[str, int] = {}
    relevant: dict[str, dict[int, None]] = {}
    for place, (query, passage) in rows:
        if query == passage:  # any model finds it
            left_out.add(LeftOut(TWICE, place))
            continue
        relevant.setdefault(query, {})[passages.setdefault(passage, len(passages))] = None
    if not relevant:
        got = f", left out: {left_out}" if left_out else ""
        raise ValueError(f"{source}: expected a query and its passage in some row, got none{got}")
    account = f"{names[0]!r} as queries, {names[1]!r} as passages; {len(relevant):,} queries, "
    account += f"{len(passages):,} passages"
    if corpus is not None:
        before, told = len(passages), _add_corpus(passages, source_name(corpus))
        account += f" and {len(passages) - before:,} more of {told}"
    if len(passages) < 2:
        raise ValueError(f"{source}: expected at least two passages to choose from, got one")
    both = sum(query in passages for query in relevant)
    account += f"; {both:,} of the queries are passages too, none is compared with itself" if both else ""
    return Queries([*relevant], [*passages], [[*places] for places in relevant.values()], account)


def _add_corpus(passages: dict[str, int], source: str) -> str:
    """Number the texts of a file that are not passages yet; returns what was read."""
    table, _ = open_source(source, None, None, Asked())
    texts, left_out = _texts(table), Tally()
    known = [name for name in texts if name.casefold() in _PASSAGES | {*USUAL_SENTENCES}]
    chosen = known if len(known) == 1 else texts
    if len(chosen) != 1:
        raise ValueError(
            f"{source}: expected one column of texts, or one called text or passage, got "
            f"{', '.join(table.kinds)} ({table.shape})"
        )
    count = 0
    for _, (text,) in _rows(source, table, chosen, left_out):
        passages.setdefault(text, len(passages))
        count += 1
    if not count:
        raise ValueError(f"{source}: expected passages in {chosen[0]!r}, got none")
    warn_of_loss(source, left_out, count, ())
    read = f"{table.shape}; {chosen[0]!r}" + (f"; left out: {left_out}" if left_out else "")
    return f"{source} ({read})"
