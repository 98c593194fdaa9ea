"""From a file or the name of a hub dataset to rows of text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import xxhash
from tqdm.auto import tqdm

from ..checks import check_count, check_number, warn
from ..files import expanded
from .columns import BLANK, LINE_ENDS, NO_NUMBER, Asked, Tally, choose, words_of
from .delimited import read_delimited
from .objects import read_json
from .readers import Reading, Table, arrow_table, look_through, read_parquet
from .rows import Rows, cached_rows

READERS: dict[str, Callable[[Path, bytes, Reading], Table]] = {
    ".txt": read_delimited,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": read_parquet,
}

# Of the cache's entries: another number where the same file would give other rows.
_VERSION = 3
# A larger share of rows left out is a warning.
_SHARE = 0.02
# Short names of files in hub datasets that hold several, and what a name without a file means.
_SIMCSE = "princeton-nlp/datasets-for-simcse"
HUB_FILES = {
    "wiki1m": (_SIMCSE, "wiki1m_for_simcse.txt"),
    "nli": (_SIMCSE, "nli_for_simcse.csv"),
    _SIMCSE: (_SIMCSE, "wiki1m_for_simcse.txt"),
}
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::([\w./-]+))?")


def load_rows(
    source: str | os.PathLike[str],
    *,
    columns: Sequence[str] | str | None = None,
    limit: int | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    label_column: str | None = None,
    positive_label: str | None = None,
    min_score: float | None = None,
) -> Rows:
    """The rows of a file or of a hub dataset's train split, as a memory-mapped sequence of tuples of strings.

    A row of one text is a sentence whose two views differ by dropout, of two a pair, of three a pair and its
    hard negative. Texts come without surrounding white space, rows in the source's order. What was read, and
    what was left out why, is `Rows.account`; more than 2 % left out is a warning too. docs/data.md shows all
    shapes of file. Peak memory does not grow with the source (json that is no object a line excepted, which
    is read whole): the rows are written to an Arrow file in `cache_folder()` once, and read from there. The
    file's bytes and the arguments are its name, so an edited source is read anew and an unchanged one is not
    parsed twice.

    Args:
        source: a file, by its suffix: .txt (a sentence a line), .csv or .tsv, .json or .jsonl, .parquet. Or a
            hub dataset as NAME, NAME:CONFIGURATION or NAME:FILE. "wiki1m" is the million sentences of
            Wikipedia that SimCSE and ClusterNS train on, "nli" SimCSE's triplets.
        columns: one to three names, in a list or joined by commas, in any case; or numbers from 1. None
            takes the only column of text, else the usual names: sent0, sent1, hard_neg; anchor, positive,
            negative; sentence1, sentence2; text; sentence, and a few more.
        limit: rows at most, from the beginning.
        delimiter: "comma", "semicolon", "tab", "bar", a character, or "none" for a sentence a line; None
            finds it out.
        header: whether the first line names the columns; None finds it out.
        label_column: what `positive_label` or `min_score` is about; None takes the one that looks like it.
        positive_label: labels, joined by commas, of the rows to take; "any" takes all, whatever the label.
        min_score: the least score of the rows to take.

    Raises FileNotFoundError where the file or dataset is missing or the hub cannot be reached; OSError where
    the file cannot be read or the cache not written; ValueError for a folder, an unknown suffix, a file that
    is empty, blank, not UTF-8 or not of its suffix's format (with the line), or that could be read in two
    ways, a column that is missing or not of text, columns that nothing tells, pairs beside a label or score
    without a word on it, or a limit below 1. One line each.
    """
    if limit is not None:
        check_count("limit", limit, at_least=1)
    if min_score is not None:
        check_number("min_score", min_score)
    for name, value, kind in (
        *(("delimiter", delimiter, str), ("header", header, bool)),
        *(("label_column", label_column, (str, int)), ("positive_label", positive_label, (str, int, float))),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: expected a word, got {type(value).__name__} {value!r}")
    label, positive = (None if value is None else str(value) for value in (label_column, positive_label))
    asked = Asked(column_names(columns), label, positive, min_score)
    return read_rows(source, asked, delimiter=delimiter, header=header, limit=limit)


def column_names(columns: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """One to three names; of a string those between commas, quoted where they hold one."""
    if columns is None:
        return None
    if not isinstance(columns, (str, list, tuple)):
        raise TypeError(f"columns: expected names in a list or joined by commas, got {columns!r}")
    names = tuple(words_of(columns) if isinstance(columns, str) else (str(name).strip() for name in columns))
    if not 1 <= len(names) <= 3:
        raise ValueError(f"columns: expected one to three, got {len(names)}")
    return names


def read_rows(
    source: str | os.PathLike[str],
    asked: Asked,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    limit: int | None = None,
) -> Rows:
    """`load_rows` of what is asked of the columns."""
    source = source_name(source)
    table, digest = open_source(source, delimiter, header, asked)
    chosen = choose(source, table, asked)
    key = "\0".join(map(str, [f"v{_VERSION}", digest, table.shape, *chosen[1:], limit]))
    found = cached_rows(
        xxhash.xxh3_128_hexdigest(key.encode()),
        source,
        chosen.texts,
        lambda odd: chosen.rows(with_progress(source, table), odd),
        limit,
    )
    first = f", the first {limit:,} rows at most" if limit is not None else ""
    found.read_as = f"{source}: {table.shape}{first}; {chosen.words}"
    warn_of_loss(source, found.left_out, len(found), chosen.texts)
    warn_of_oddities(source, found, is_quoted=table.shape.startswith(("csv", "tsv")))
    return found


def source_name(source: str | os.PathLike[str]) -> str:
    """As a string; TypeError or ValueError for what is no name of a file or dataset."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: expected the name of a file or dataset, got {type(source).__name__}")
    name = str(os.fspath(source))
    if not name.strip() or "://" in name:
        got = "an address, which is not read: download it" if name.strip() else "an empty name"
        raise ValueError(f"{name or 'source'}: expected a file or the name of a dataset, got {got}")
    return name


def warn_of_oddities(source: str, rows: Rows, *, is_quoted: bool) -> None:
    """Warn where many rows are odd, or a few hold line ends that a quote may have taken in."""
    most = _SHARE * len(rows)
    for reason, (count, where) in rows.odd.items():
        is_few = is_quoted and count <= max(1, most)
        if is_few if reason == LINE_ENDS else count > most:
            closing = "; was a quote never closed?" if reason == LINE_ENDS else ""
            text = f"{source}: {count:,} of {len(rows):,} are rows {reason} ({'; '.join(where)}){closing}"
            warn(text)


def warn_of_loss(source: str, left_out: Tally, kept: int, columns: Sequence[str]) -> None:
    """Warn where more than a small share of the rows of a source is left out without having been asked."""
    lost = Tally((why, each) for why, each in left_out.items() if why.startswith((BLANK, NO_NUMBER)))
    count, total = sum(each[0] for each in lost.values()), kept + sum(each[0] for each in left_out.values())
    if count > _SHARE * total:
        full = [name for name in columns if BLANK + name not in lost]
        cure = f"; --text-columns {','.join(full)} takes them" if full and len(full) < len(columns) else ""
        warn(f"{source}: {count:,} of {total:,} rows are left out, {lost}{cure}")


def with_progress(source: str, table: Table) -> Table:
    """The table with a bar where reading it takes long."""

    def read(names: Sequence[str]) -> Iterator[tuple[int, tuple]]:
        rows, name = table.read(names), Path(source).name
        yield from tqdm(rows, f"reading {name}", unit=" rows", delay=2, mininterval=1, leave=False)

    return replace(table, read=read)


def open_source(source: str, delimiter: str | None, header: bool | None, asked: Asked) -> tuple[Table, str]:
    """The table, and what names its content."""
    path = expanded(source, "source")
    match = _HUB_NAME.fullmatch(source)
    exists = os.path.lexists(path)
    names = tuple(name for name in (*(asked.texts or ()), asked.label) if name is not None)
    reading = Reading(delimiter, header, names)
    if match and not exists:
        name, part = match.groups()
        if source in HUB_FILES:
            path = _hub_file(source, *HUB_FILES[source])
        elif part and Path(part).suffix.lower() in READERS:
            path = _hub_file(source, name, part)
        elif path.suffix.lower() not in READERS:
            reading.refuse_for(path)
            return _hub_table(name, part)
    if not os.path.exists(path):  # which a circle of links does not
        what = "a link that leads nowhere" if os.path.lexists(path) else "there is none"
        raise FileNotFoundError(f"{source}: expected a file of sentences, {what}")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or device, which is read twice: save it as a file"
        raise ValueError(f"{source}: expected a file of sentences, got {what}")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{source}: expected a suffix of {', '.join(READERS)}, got {path.suffix or 'none'}")
    try:
        content = look_through(path)
    except OSError as error:
        raise type(error)(f"{source}: expected a readable file, got {error.strerror or error}") from error
    table = READERS[path.suffix.lower()](path, content.newline, reading)
    if table.doubt:
        warn(table.doubt)
    return table, f"{path.suffix.lower()}-{content.fingerprint}"


def _hub_file(source: str, repository: str, file: str) -> Path:
    """A file of a hub dataset's repository, from the cache where it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(repository, file, repo_type="dataset", local_files_only=True))
        _reach(repository)
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # of the hub, of its client, of what that uses to connect
        raise FileNotFoundError(
            f"{source}: expected {file} of {repository} in the cache or a reachable hub, got "
            f"{_first_line(error)}; without a connection download "
            f"https://huggingface.co/datasets/{repository}/resolve/main/{file} and give its path instead"
        ) from error


def _hub_table(name: str, configuration: str | None) -> tuple[Table, str]:
    """The train split of a hub dataset, and what names its content."""
    import datasets

    try:
        if not datasets.config.HF_HUB_OFFLINE:
            _reach(name)
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: expected a file that exists or a dataset on the hub, got {_first_line(error)}; without "
            "a connection HF_HUB_OFFLINE=1 takes a cached dataset"
        ) from error
    try:
        dataset = datasets.load_dataset(name, configuration, split="train")
    except (OSError, ValueError) as error:  # not in the cache; no such split or configuration
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{name}: expected a file that exists or a dataset on the hub with a train split, "
            f"got {_first_line(error)}"
        ) from error

    def read(names: Sequence[str]) -> Iterator[tuple[int, tuple]]:
        number = 0
        for batch in dataset.select_columns(list(names)).iter(batch_size=1000):
            for values in zip(*(batch[column] for column in names), strict=True):
                number += 1
                yield number, values

    return arrow_table(dataset.features.arrow_schema, read, "hub dataset"), dataset._fingerprint


def _reach(repository: str) -> None:
    """One quick question: the downloads' own attempts take half a minute to fail, with a dozen messages."""
    from huggingface_hub import HfApi

    HfApi().repo_info(repository, repo_type="dataset", timeout=10)


def _first_line(error: BaseException) -> str:
    """The type and the first line of an error's message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
