"""Which columns of a table are texts, and which rows are pairs: a label is never taken for granted."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .readers import NUMBERS, TEXT, Table, is_number, only_text, quoted

# Names of columns by convention, the most telling first: pairs, perhaps with a hard negative, then sentences.
USUAL_PAIRS = (
    ("sent0", "sent1", "hard_neg"),
    ("anchor", "positive", "negative"),
    ("query", "positive", "negative"),
    ("premise", "entailment", "contradiction"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
)
USUAL_SENTENCES = ("text", "sentence", "sent0")
# Beside two texts they say how alike the two are; beside one, what it is about.
USUAL_LABELS = set(
    """label labels score scores gold gold_label gold_score similarity similarity_score is_duplicate duplicate
    relatedness relatedness_score entailment_judgment category class target rating""".split()
)
# These say neither.
_KEYS = set(
    """id idx index pair_id pairid pid qid qid1 qid2 uid guid number line row source split genre lang language
    dataset domain url date""".split()
)
# Different values that a column of texts has at most, where it looks like a label; and rows for each.
_CLASSES, _ROWS_A_CLASS = 20, 3
ANY = "any"
# Before the name of a column, reasons to leave out a row.
BLANK, NO_NUMBER = "with a blank ", "without a number in "
_YES_AND_NO = {"true": "1", "false": "0"}


class Asked(NamedTuple):
    """What the user says of the columns; None finds out or refuses."""

    texts: tuple[str, ...] | None = None
    label: str | None = None
    # Labels of the rows to take, by commas, or "any".
    positive: str | None = None
    min_score: float | None = None
    # A row's first text alone is wanted, not a pair.
    sentences: bool = False


class LeftOut(NamedTuple):
    """Why a row is no row of texts, and where it is."""

    reason: str
    place: str


class Tally(dict[str, tuple[int, list[str]]]):
    """For each reason the number of rows left out, and where the first two are."""

    def add(self, row: LeftOut) -> None:
        """Count one."""
        count, where = self.get(row.reason, (0, []))
        self[row.reason] = (count + 1, where if len(where) > 1 else [*where, row.place])

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {why} ({'; '.join(where)})" for why, (count, where) in self.items())


class Columns(NamedTuple):
    """The columns to read, and which rows to keep."""

    source: str
    texts: tuple[str, ...]
    unused: tuple[str, ...] = ()
    label: str | None = None
    positive: str | None = None
    min_score: float | None = None

    @property
    def words(self) -> str:
        """What they are used as."""
        first, *others = map(repr, self.texts)
        said = [first + (" as sentences" if not others else f" and {others[0]} as pairs")]
        said += [f"{others[1]} as hard negatives"] if len(others) > 1 else []
        if self.min_score is not None:
            said.append(f"rows with {self.label!r} of {self.min_score:g} or more")
        elif self.positive not in (None, ANY):
            said.append(f"rows with {self.label!r} {self.positive}")
        return ", ".join(said + ([f"not used: {quoted(self.unused)}"] if self.unused else []))

    def rows(self, table: Table) -> Iterator[tuple[str, ...] | LeftOut]:
        """Trimmed texts of each row that is kept; ValueError where a value is no text."""
        wanted = set(map(_word, words_of(self.positive or "")))
        filtered = self.label is not None and self.positive != ANY
        for number, values in table.read([*self.texts, *([self.label] if self.label else [])]):
            place = f"{table.unit} {number}"
            if filtered and (reason := self.refusal(values[-1], wanted)):
                yield LeftOut(reason, f"{place}: {values[-1]!r}")
                continue
            texts = []
            for name, value in zip(self.texts, map(only_text, values), strict=False):
                if value is not None and not isinstance(value, str):
                    got = type(value).__name__
                    raise ValueError(f"{self.source}, {place}: expected text in column {name!r}, got {got}")
                if not value or not (text := value.strip()):
                    yield LeftOut(f"{BLANK}{name}", place)
                    break
                texts.append(text)
            else:
                yield tuple(texts)

    def refusal(self, value: Any, wanted: set[str]) -> str | None:
        """Why a row of this label is left out, or None."""
        if self.min_score is None:
            return None if _word(value) in wanted else f"with {self.label} other than {self.positive}"
        if not is_number(str(value)):
            return f"{NO_NUMBER}{self.label}"
        return None if float(value) >= self.min_score else f"with {self.label} below {self.min_score:g}"


def words_of(text: str) -> list[str]:
    """What stands between commas, quoted where it holds one."""
    return [word.strip() for word in next(csv.reader([text], skipinitialspace=True), [])]


def _word(value: Any) -> str:
    """A label as a word that is the same for 1, 1.0, "1" and true."""
    text = str(value).strip().casefold()
    text = _YES_AND_NO.get(text, text)
    return f"{float(text):g}" if is_number(text) else text


def choose(source: str, table: Table, asked: Asked) -> Columns:
    """The columns named, else those that are usual; ValueError, naming the columns, where nothing tells."""
    texts = named(source, table, asked.texts) if asked.texts is not None else _usual(source, table, asked)
    if asked.sentences:
        texts = texts[:1]
    others = [name for name in table.kinds if name not in texts]
    if asked.label is not None:
        if asked.label not in others:
            raise ValueError(
                f"--label-column: expected one of {quoted(others) or 'none'}, the other columns of {source}, "
                f"got {asked.label!r}"
            )
        labels = [asked.label]
    else:
        labels = [name for name in others if looks_like_label(table, name, of_texts=asked.texts is None)]
        labels = [name for name in labels if name.casefold() in USUAL_LABELS] or labels
    found = Columns(source, tuple(texts), tuple(name for name in others if name not in labels))
    if asked.positive is None and asked.min_score is None:
        if len(texts) > 1 and labels:
            values = list(dict.fromkeys(str(row[0]) for row in table.sample(labels[:1])))
            some = ", ".join(values[:3]) + (" ..." if len(values) > 3 else "")
            raise ValueError(
                f"{source}: {quoted(texts)} could all be pairs, or only some by {labels[0]!r} ({some}); "
                f"--positive-label LABEL or --min-score NUMBER takes those, --positive-label {ANY} all"
            )
        return found._replace(unused=tuple(others))
    if asked.positive is not None and asked.min_score is not None:
        raise ValueError("--min-score: expected none with --positive-label, got both")
    if len(labels) != 1 and asked.positive != ANY:
        raise ValueError(
            f"--label-column: expected the column of {source} that --positive-label or --min-score is about, "
            f"got {quoted(labels) or 'none that looks like one among ' + quoted(others)}"
        )
    if asked.positive == ANY:
        return found._replace(unused=tuple(others), positive=ANY)
    return found._replace(label=labels[0], positive=asked.positive, min_score=asked.min_score)


def looks_like_label(table: Table, name: str, *, of_texts: bool) -> bool:
    """Whether a column says of a row what it is, by its name or its values; of texts, by few values."""
    folded = name.casefold()
    if folded in USUAL_LABELS | _KEYS:
        return folded in USUAL_LABELS
    values = [value for (value,) in table.sample([name]) if value is not None and value != ""]
    distinct = set(map(str, values))
    if len(distinct) < 2:
        return False
    if table.kinds[name] == TEXT:
        return of_texts and len(distinct) <= min(_CLASSES, len(values) // _ROWS_A_CLASS)
    if not all(is_number(str(value)) for value in values) and not isinstance(values[0], bool):
        return False
    whole = all(is_number(text) and float(text).is_integer() for text in distinct)
    return not whole or len(distinct) < len(values)  # whole numbers that are all different are keys


def named(source: str, table: Table, names: Sequence[str]) -> list[str]:
    """Columns that must be there, and hold text."""
    for name in names:
        if name not in table.kinds:
            found = ", ".join(table.kinds)
            raise ValueError(f"{source}: expected a column {name!r}, got {found} ({table.shape})")
        if table.kinds[name] not in (TEXT, NUMBERS):
            raise ValueError(f"{source}: expected text in column {name!r}, got {table.kinds[name]}")
    return list(names)


def _usual(source: str, table: Table, asked: Asked) -> list[str]:
    by_name = {name.casefold(): name for name in table.kinds}
    labels = {asked.label, *(by_name[name] for name in USUAL_LABELS & by_name.keys())}
    texts = [name for name, kind in table.kinds.items() if kind == TEXT]
    sentences = [name for name in texts if name not in labels]
    chosen = []
    for names in USUAL_PAIRS:
        if set(names[:2]) <= by_name.keys():
            chosen = [by_name[name] for name in names if name in by_name]
            break
    if not chosen:
        chosen = [by_name[name] for name in USUAL_SENTENCES if name in by_name][:1]
    if not chosen and len(sentences) == 1:
        chosen = sentences
    for name in chosen:
        if table.kinds[name] != TEXT:
            others = [other for other in chosen if other != name] or texts
            instead = f"; --text-columns {','.join(others)} leaves it out" if others else ""
            raise ValueError(
                f"{source}: expected one text in each row of {name!r}, got {table.kinds[name]}{instead}"
            )
    if not chosen:
        found = ", ".join(f"{name} ({kind})" for name, kind in table.kinds.items()) or "none"
        raise ValueError(
            f"{source}: expected one column of text or columns with usual names; name one to three with "
            f"--text-columns (columns), got {found} ({table.shape})"
        )
    return chosen
