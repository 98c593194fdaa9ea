"""Text files: a sentence a line, or values parted by a delimiter, with a header or without."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from .readers import SAMPLED_ROWS, TEXT, Cells, Reading, Table, is_number, kinds_of, lines_of, quoted

# By the words that name them. "none" takes a line whole.
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
NONE = "none"
_OWN = {".csv": ",", ".tsv": "\t", ".txt": NONE}
# Rows in which a delimiter that the suffix does not promise is no accident: of tabs, of others in a .txt.
_FEW, _MANY = 3, 20
# Characters of one field; beyond, a quote was never closed. Python's own limit is 131,072.
FIELD_CHARACTERS = 1 << 24
# Names that only a header has.
_HEADER_NAMES = set(
    """text texts sentence sentences sent0 sent1 hard_neg anchor positive negative query premise hypothesis
    entailment contradiction sentence1 sentence2 sentence_a sentence_b text1 text2 question question1
    question2 answer title body content document passage context headline line name label labels score scores
    gold gold_label category class target similarity is_duplicate id idx index number url date""".split()
)
Record = list[str]


def read_delimited(path: Path, newline: bytes, reading: Reading) -> Table:
    """The table of a .txt, .csv or .tsv file; raises ValueError in one line, see `load_rows`."""
    suffix = path.suffix.lower()
    own = _OWN[suffix]
    file = _File(path, newline)
    delimiter = file.stated or own
    if reading.delimiter is not None:
        delimiter = _named(reading.delimiter)
    elif not file.stated:
        delimiter = file.find_delimiter(own)
    kind = suffix.lstrip(".")
    if delimiter == own == NONE and not reading.header:
        return Table({"text": TEXT}, lambda names: file.lines(), "line", "txt, a sentence a line")
    is_quoted = delimiter != NONE and (delimiter != "\t" or file.is_quoted())
    records = partial(file.records, delimiter, is_quoted)
    sample = [record for _, record in islice(records(), SAMPLED_ROWS + 1)]
    if not sample:
        raise ValueError(f"{path}: expected sentences, got no rows")
    numbers = [str(place) for place in range(1, len(sample[0]) + 1)]
    cells = [cell.strip() or number for cell, number in zip(sample[0], numbers, strict=True)]
    header, doubt, wanted = reading.header, "", set(reading.names)
    if header is None and wanted and wanted <= set(cells):
        header = True
    if header is None:
        header = has_header(sample)
    by_number = bool(wanted) and wanted <= set(numbers)
    if header is None and by_number and suffix == ".txt":
        header = False
    if header is None:
        header = suffix != ".txt" and not by_number
        taken = f"the first line ({quoted(cells)}) is taken for a {'header' if header else 'row'}"
        doubt = f"{path}: {taken}; --header or --no-header (header=True or False) decides"
    width, names = len(cells), cells if header else numbers
    if len(set(names)) < width:
        raise ValueError(f"{path}, line 1: expected columns of different names, got {', '.join(names)}")

    def read(chosen: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        places = [names.index(name) for name in chosen]
        choose = itemgetter(*places) if len(places) > 1 else lambda record: (record[places[0]],)
        for number, record in islice(records(), int(header), None):
            if len(record) != width:
                raise ValueError(
                    f"{path}, line {number}: expected a well-formed {kind} file parted by "
                    f"{_word(delimiter)}, {width} fields as in its first line, got {len(record)}"
                )
            yield number, choose(record)

    shape = [f"{kind} parted by {_word(delimiter)}" if delimiter != NONE else f"{kind}, a sentence a line"]
    shape += ["as its first line says"] if file.stated else []
    shape += ["quoted"] if is_quoted and delimiter == "\t" else []
    shape.append(f"{'header' if header else 'no header'}{' in doubt' if doubt else ''}")
    kinds = kinds_of(names, [tuple(record) for record in sample[header:] if len(record) == width])
    return Table(kinds, read, "line", ", ".join(shape), doubt)


def _named(delimiter: str) -> str:
    """A delimiter by its word or itself."""
    found = {**DELIMITERS, "\\t": "\t", NONE: NONE}.get(delimiter, delimiter)
    if found != NONE and (len(found) != 1 or found in '"\r\n'):
        raise ValueError(
            f"delimiter: expected {', '.join(DELIMITERS)}, {NONE} or a character, got {delimiter!r}"
        )
    return found


def _word(delimiter: str) -> str:
    return next((word for word, sign in DELIMITERS.items() if sign == delimiter), repr(delimiter))


class _File:
    """Its lines and records."""

    def __init__(self, path: Path, newline: bytes) -> None:
        self.path, self.newline = path, newline
        # The delimiter of a first line as Excel writes it: sep=;
        first = next(lines_of(path, newline))[1].strip().strip('"')
        self.stated = first[4:] if first[:4].casefold() == "sep=" and len(first) == 5 else ""

    def lines(self) -> Iterator[tuple[int, Cells]]:
        """Those that are not blank."""
        return ((number, (line,)) for number, line in self.all_lines() if line.strip())

    def all_lines(self) -> Iterator[tuple[int, str]]:
        """Without one that states the delimiter."""
        return islice(lines_of(self.path, self.newline), bool(self.stated), None)

    def records(self, delimiter: str, is_quoted: bool) -> Iterator[tuple[int, Record]]:
        """Fields of each record, blank lines left out."""
        if delimiter == NONE:
            yield from ((number, [line.rstrip("\r\n")]) for number, (line,) in self.lines())
            return
        before = csv.field_size_limit(FIELD_CHARACTERS)
        source = (line for _, line in self.all_lines())
        skipped = int(bool(self.stated))
        ended = skipped  # line of the record before
        quoting: Any = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
        reader = csv.reader(source, strict=True, delimiter=delimiter, quoting=quoting)
        try:
            for record in reader:
                ended = reader.line_num + skipped
                if record:  # else a blank line
                    yield ended, record
        except csv.Error as error:
            kind, number = self.path.suffix.lower().lstrip("."), reader.line_num + skipped
            began = f" in what began in line {ended + 1}" if number > ended + 1 else ""
            raise ValueError(
                f"{self.path}, line {number}: expected a well-formed {kind} file parted by "
                f"{_word(delimiter)}, got {error}{began}"
            ) from error
        finally:
            csv.field_size_limit(before)

    def sample(self, delimiter: str, is_quoted: bool) -> list[Record]:
        """The first records, where all have equally many fields; else none."""
        try:
            sample = [record for _, record in islice(self.records(delimiter, is_quoted), SAMPLED_ROWS)]
        except ValueError:
            return []
        return sample if len(set(map(len, sample))) == 1 else []

    def is_quoted(self) -> bool:
        """Whether values between tabs are quoted as those between commas.

        Mostly they are not, and a quote is text. They are where a quoted one holds a delimiter, a line end
        or a doubled quote, or where all of them are quoted.
        """
        if not self.sample("\t", True):
            return False
        cells = [cell for record in self.sample("\t", False) for cell in record]
        within = [cell for cell in cells if len(cell) > 1 and cell[0] == cell[-1] == '"']
        return len(within) == len(cells) or any('""' in cell[1:-1] for cell in within)

    def find_delimiter(self, own: str) -> str:
        """What parts the first lines into equally many fields, two at least; else the suffix's own."""
        if own == NONE:
            self.refuse_json()
        parted = {}
        for sign in DELIMITERS.values():
            sample = self.sample(sign, sign != "\t" or self.is_quoted())
            if sample and len(sample[0]) > 1:
                parted[sign] = sample
        few = _MANY if own == NONE else _FEW
        plain = [
            sign
            for sign, sample in parted.items()
            if sign == own or len(sample) >= (_FEW if sign == "\t" else few) or has_header(sample)
        ]
        if own == NONE and plain:
            words = " or ".join(map(_word, plain))
            raise ValueError(
                f"{self.path}: could be a sentence a line, or {len(parted[plain[0]][0])} columns parted by "
                f"{words}; --delimiter {NONE} or --delimiter {_word(plain[0])} decides"
            )
        if len(plain) > 1:
            ways = " or ".join(f"{len(parted[sign][0])} columns parted by {_word(sign)}" for sign in plain)
            decide = " or ".join(f"--delimiter {_word(sign)}" for sign in plain)
            raise ValueError(f"{self.path}: could be {ways}; {decide} decides")
        return plain[0] if plain else own

    def refuse_json(self) -> None:
        """Raise ValueError for a .txt that is lines of json objects."""
        import json

        first = next(line for _, (line,) in self.lines()).strip()
        if first[0] in "{[":
            try:
                json.loads(first)
            except ValueError:
                return
            raise ValueError(
                f"{self.path}: could be sentences or json; a name that ends in .jsonl or .json, or "
                f"--delimiter {NONE} decides"
            )


def has_header(sample: Sequence[Record]) -> bool | None:
    """Whether the first record names the columns; None in doubt.

    It does where a cell is a usual name, or stands over numbers. It is a row where a cell is a number, comes
    again below itself, comes twice, or is a sentence: five words, 60 characters or a full stop.
    """
    cells, below = [cell.strip() for cell in sample[0]], list(zip(*sample[1:], strict=False))
    folded = [cell.casefold() for cell in cells]
    if _HEADER_NAMES & set(folded):
        return True
    numbers = cells[1:] if not cells[0] else cells  # of the columns, as pandas gives them, perhaps an index
    if numbers == [str(i) for i in range(len(numbers))] and not all(map(_is_numbers, below)):
        return True
    if len(set(cells)) < len(cells) or any(map(is_number, cells)):
        return False
    if any(map(_is_numbers, below)):
        return True
    if any(cell in map(str.strip, column) for cell, column in zip(cells, below, strict=False)):
        return False
    if any(len(c.split()) > 4 or len(c) > 60 or c.endswith((".", "?", "!", "。", "？", "！")) for c in cells):
        return False
    return None


def _is_numbers(column: Sequence[str]) -> bool:
    full = [*filter(str.strip, column)]
    return bool(full) and all(map(is_number, full))
