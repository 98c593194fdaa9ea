"""Which columns of a table are texts, and which rows are pairs: a label is never taken for granted."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from .readers import DATES, NUMBERS, SAMPLED_ROWS, TEXT, Table, is_number, only_text, quoted

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
    dataset domain url date time timestamp""".split()
)
# Characters of a label that is a word, at most.
_LABEL_CHARACTERS = 30
ANY = "any"
# Before the name of a column, reasons to leave out a row.
BLANK, NO_NUMBER = "with a blank ", "without a number in "
# What is odd in a row that is kept.
LINE_ENDS, NOTHING, TWICE = "with a line end within", "that read NaN, NULL or the like", "with one text twice"
_NOTHING = {"nan", "null", "none", "n/a", "<na>", "#n/a"}
_YES_AND_NO = {"true": "1", "false": "0"}
_COMMAS = "parted by comma, no header"
# White space that str.strip leaves.
_UNSEEN = "\u200b\u2060\ufeff"


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

    def rows(self, table: Table, odd: Tally) -> Iterator[tuple[str, ...] | LeftOut]:
        """Trimmed texts of the rows to keep; adds what is odd in them. ValueError for what is no text."""
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
                if not value or not (text := value.strip().strip(_UNSEEN).strip()):
                    yield LeftOut(f"{BLANK}{name}", place)
                    break
                texts.append(text)
            else:
                for reason in _oddities(texts):
                    odd.add(LeftOut(reason, place))
                yield tuple(texts)

    def refusal(self, value: Any, wanted: set[str]) -> str | None:
        """Why a row of this label is left out, or None."""
        if self.min_score is None:
            return None if _word(value) in wanted else f"with {self.label} other than {self.positive}"
        if value is None or not is_number(str(value)):
            return f"{NO_NUMBER}{self.label}"
        return None if float(value) >= self.min_score else f"with {self.label} below {self.min_score:g}"


def _oddities(texts: Sequence[str]) -> Iterator[str]:
    if any("\n" in text or "\r" in text for text in texts):
        yield LINE_ENDS
    if any(len(text) < 5 and text.casefold() in _NOTHING for text in texts):
        yield NOTHING
    if len(texts) > 1 and len(set(texts)) < len(texts):
        yield TWICE


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
    label = None if asked.label is None else column(source, table, asked.label)
    if asked.texts is not None:
        texts = named(source, table, asked.texts)
    else:
        texts = _usual(source, table, label)
    if asked.sentences:
        texts = texts[:1]
    others = [name for name in table.kinds if name not in texts]
    if label in texts:
        raise ValueError(f"--label-column: expected a column of {source} beside the texts, got {label!r}")
    if len(texts) == 1 and asked.positive is None and asked.min_score is None:
        return Columns(source, tuple(texts), tuple(others))
    labels = [label] if label is not None else [name for name in others if looks_like_label(table, name)]
    labels = [name for name in labels if name.casefold() in USUAL_LABELS] or labels
    found = Columns(source, tuple(texts), tuple(name for name in others if name not in labels))
    if asked.positive is None and asked.min_score is None:
        if labels:
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
        found_ones = f"{quoted(labels)}, which all look like it" if labels else "none that looks like it"
        raise ValueError(
            f"--label-column: expected the column of {source} that --positive-label or --min-score is about, "
            f"one of {quoted(others) or 'none'}, got {found_ones}"
        )
    if asked.positive == ANY:
        return found._replace(unused=tuple(others), positive=ANY)
    return found._replace(label=labels[0], positive=asked.positive, min_score=asked.min_score)


def looks_like_label(table: Table, name: str) -> bool:
    """Whether a column says of a row what it is, by its name or its values.

    Words do that come again, numbers that are not whole, and whole ones that come again: else they are keys.
    """
    folded = name.casefold()
    if folded in USUAL_LABELS | _KEYS:
        return folded in USUAL_LABELS
    values = [str(value) for (value,) in table.sample([name]) if value is not None and value != ""]
    if len(values) == SAMPLED_ROWS and len(set(values)) == 1:  # the rows may be in the order of their labels
        others = (str(value) for _, (value,) in table.read([name]) if value is not None and value != "")
        values += islice((value for value in others if value != values[0]), SAMPLED_ROWS)
    distinct = set(values)
    if len(distinct) < 2 or any(len(value) > _LABEL_CHARACTERS for value in distinct):
        return False
    comes_again = len(distinct) < len(values)
    numbers = [value.strip().rstrip("%").replace(",", ".") for value in distinct]  # of whatever country
    if all(map(is_number, numbers)):
        return comes_again or not all(float(number).is_integer() for number in numbers) or "%" in values[0]
    few = len(distinct) <= max(3, len(values) // 2)
    return comes_again and few and table.kinds[name] != DATES


def column(source: str, table: Table, name: str) -> str:
    """The column of a name, whatever its case and Unicode form, or of a number from 1."""
    if name in table.kinds:
        return name
    folded = {_folded(known): known for known in table.kinds}
    if _folded(name) in folded:
        return folded[_folded(name)]
    if name.isdecimal() and 1 <= int(name) <= len(table.kinds):
        return list(table.kinds)[int(name) - 1]
    raise ValueError(f"{source}: expected a column {name!r}, got {', '.join(table.kinds)} ({table.shape})")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def named(source: str, table: Table, names: Sequence[str]) -> list[str]:
    """Columns that must be there, and hold text."""
    found = [column(source, table, name) for name in names]
    for name in found:
        if table.kinds[name] not in (TEXT, NUMBERS, DATES):
            raise ValueError(f"{source}: expected text in column {name!r}, got {table.kinds[name]}")
    return found


def _usual(source: str, table: Table, label: str | None) -> list[str]:
    by_name = {name.casefold(): name for name in table.kinds}
    labels = {label, *(by_name[name] for name in USUAL_LABELS & by_name.keys())}
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
            where, got = f"{table.unit} {_first_other(table, name)}", table.kinds[name]
            raise ValueError(
                f"{source}, {where}: expected one text in each row of {name!r}, got {got}{instead}"
            )
    if not chosen:
        found = ", ".join(f"{name} ({kind})" for name, kind in table.kinds.items()) or "none"
        raise ValueError(
            f"{source}: expected one column of text or columns with usual names; name one to three with "
            f"--text-columns (columns), got {found} ({table.shape})"
            + ("; --delimiter none takes a sentence a line" if _COMMAS in table.shape else "")
        )
    return chosen


def _first_other(table: Table, name: str) -> int:
    """The number of the first row whose value is no text."""
    rows = table.read([name])
    return next(n for n, (value,) in rows if not isinstance(only_text(value), (str, type(None))))
