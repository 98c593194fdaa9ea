"""From a file or the name of a hub dataset to rows of text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash
from tqdm.auto import tqdm

from ..checks import check_count
from .readers import NUMBERS, READERS, TEXT, Table, arrow_kinds, fingerprint, open_table
from .rows import Row, Rows, cached_rows

# Of the cache's entries: another number where the same file would give other rows.
_VERSION = 1
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
# Beside two texts they say how alike the two are: not all are pairs then.
_LABELS = {"label", "labels", "score", "scores", "gold_label", "similarity"}
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
) -> Rows:
    """The rows of a file or of a hub dataset's train split, as a memory-mapped sequence of tuples of strings.

    A row of one text is a sentence whose two views differ by dropout, of two a pair, of three a pair and its
    hard negative. Texts come without surrounding white space, rows in the source's order; a row with a blank
    text is dropped and counted in `Rows.dropped`. Peak memory does not grow with the source (a .json list
    excepted, which is read whole; jsonl is not): the rows are written to an Arrow file in `cache_folder()`
    once, and read from there. The file's bytes and the arguments are its name, so an edited source is read
    anew and an unchanged one is not parsed twice.

    Args:
        source: a file, by its suffix: .txt (a sentence a line), .csv or .tsv (with a header line), .json or
            .jsonl (objects), .parquet. Or a hub dataset as NAME, NAME:CONFIGURATION or NAME:FILE. "wiki1m"
            is the million sentences of Wikipedia that SimCSE and ClusterNS train on, "nli" SimCSE's triplets.
        columns: one to three names, in a list or joined by commas. None takes the only column of text, else
            the usual names: sent0, sent1, hard_neg; anchor, positive, negative; sentence1, sentence2; text;
            sentence, and a few more.
        limit: rows at most, from the beginning.

    Raises FileNotFoundError where the file or dataset is missing or the hub cannot be reached; OSError where
    the file cannot be read or the cache not written; ValueError for a folder, an unknown suffix, a file that
    is empty, blank, not UTF-8 or not of its suffix's format (with the line), a column that is missing or not
    of text, columns that nothing tells, or a limit below 1. One line each.
    """
    if limit is not None:
        check_count("limit", limit, at_least=1)
    if isinstance(columns, str):
        columns = columns.split(",")
    if columns is not None:
        columns = [name.strip() for name in columns]
        if not 1 <= len(columns) <= 3:
            raise ValueError(f"columns: expected one to three, got {len(columns)}")
    table, digest = _open(str(source))
    names = _choose(str(source), table, columns)
    key = "-".join([f"v{_VERSION}", digest, *names, str(limit)])
    return cached_rows(
        xxhash.xxh3_128_hexdigest(key.encode()),
        str(source),
        names,
        lambda: _trimmed(str(source), table, names),
        limit,
    )


def _open(source: str) -> tuple[Table, str]:
    """The table, and what names its content."""
    path = Path(source).expanduser()
    match = _HUB_NAME.fullmatch(source)
    exists = os.path.lexists(path)
    if match and not exists:
        name, part = match.groups()
        if source in HUB_FILES:
            path = _hub_file(source, *HUB_FILES[source])
        elif part and Path(part).suffix.lower() in READERS:
            path = _hub_file(source, name, part)
        elif path.suffix.lower() not in READERS:
            return _hub_table(name, part)
    if not path.exists():
        raise FileNotFoundError(f"{source}: expected a file of sentences, there is none")
    if path.is_dir():
        raise ValueError(f"{source}: expected a file of sentences, got a folder")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{source}: expected a suffix of {', '.join(READERS)}, got {path.suffix or 'none'}")
    try:
        digest = fingerprint(path)
    except OSError as error:
        raise type(error)(f"{source}: expected a readable file, got {error.strerror or error}") from error
    return open_table(path), f"{path.suffix.lower()}-{digest}"


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

    return Table(arrow_kinds(dataset.features.arrow_schema), read), dataset._fingerprint


def _reach(repository: str) -> None:
    """One quick question: the downloads' own attempts take half a minute to fail, with a dozen messages."""
    from huggingface_hub import HfApi

    HfApi().repo_info(repository, repo_type="dataset", timeout=10)


def _first_line(error: BaseException) -> str:
    """The type and the first line of an error's message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _choose(source: str, table: Table, columns: Sequence[str] | None) -> list[str]:
    """The columns named, else those that are usual."""
    if columns is not None:
        for name in columns:
            if name not in table.kinds:
                raise ValueError(f"{source}: expected a column {name!r}, got {', '.join(table.kinds)}")
            if table.kinds[name] not in (TEXT, NUMBERS):
                raise ValueError(f"{source}: expected text in column {name!r}, got {table.kinds[name]}")
        return list(columns)
    texts = [name for name, kind in table.kinds.items() if kind == TEXT]
    if len(texts) == 1:
        return texts
    for names in USUAL_PAIRS:
        if set(names[:2]) <= set(texts) and not _LABELS & {name.lower() for name in table.kinds}:
            return [name for name in names if name in texts]
    for name in USUAL_SENTENCES:
        if name in texts and not any(name in names and set(names[:2]) <= set(texts) for names in USUAL_PAIRS):
            return [name]
    found = ", ".join(f"{name} ({kind})" for name, kind in table.kinds.items()) or "none"
    raise ValueError(
        f"{source}: expected one column of text or columns with usual names; name one to three with columns, "
        f"got {found}"
    )


def _trimmed(source: str, table: Table, names: Sequence[str]) -> Iterator[Row | None]:
    """Rows as `write_rows` takes them."""
    rows = tqdm(
        table.read(names),
        desc=f"reading {Path(source).name}",
        unit=" rows",
        delay=2,
        mininterval=1,
        leave=False,
    )
    for number, values in rows:
        texts = []
        for name, value in zip(names, values, strict=True):
            if value is not None and not isinstance(value, str):
                raise ValueError(
                    f"{source}, {table.unit} {number}: expected text in column {name!r}, "
                    f"got {type(value).__name__}"
                )
            if value and (text := value.strip()):
                texts.append(text)
        yield tuple(texts) if len(texts) == len(names) else None
