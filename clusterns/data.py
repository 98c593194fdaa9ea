"""From a file or a hub dataset to sentences, and from sentences to the batches of an epoch."""

from __future__ import annotations

import codecs
import glob
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from datasets.utils import are_progress_bars_disabled
from pandas.errors import ParserWarning
from torch.utils.data import DataLoader

# What each kind of file is read with. Tab-separated values have no quoting, so a lone quote is text; "NA"
# and "null" are words like any other.
_CSV: dict[str, Any] = {"encoding": "utf-8-sig", "index_col": False, "na_filter": False}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": 3}),
    ".json": ("json", {"encoding": "utf-8-sig"}),
    ".jsonl": ("json", {"encoding": "utf-8-sig"}),
}
# Columns that hold the sentence by convention, the most telling first.
USUAL_COLUMNS = ("text", "sentence", "sent0")
Text = TypeVar("Text")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def load_sentences(
    source: str | os.PathLike[str], *, column: str | None = None, limit: int | None = None
) -> list[str]:
    """The sentences of a text, csv, tsv, json or jsonl file, or of a hub dataset's train split.

    Args:
        source: a file, by its suffix: .txt (a sentence a line), .csv or .tsv (with a header line), .json or
            .jsonl (objects); or the name of a dataset on the hub.
        column: of the sentences; None takes the only column of strings, or the one that is called "text",
            "sentence" or "sent0".
        limit: sentences at most, from the beginning.

    The sentences come trimmed, in the file's order, without blank ones. A file is read anew each time.

    Raises FileNotFoundError where the file or the dataset is missing or the hub cannot be reached, and
    ValueError for a file that is a folder, empty, blank, not UTF-8 text or not of its suffix's format, a
    column that is missing or not one of strings, or a limit below 1; one line each.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 sentence, got {limit}")
    path = Path(source).expanduser()
    is_name = _HUB_NAME.fullmatch(str(source)) is not None and path.suffix.lower() not in _READERS
    if is_name and not path.exists():
        table = _load_hub(str(source))
    else:
        table = _load_file(path)
    if column is None:
        column = _sentence_column(table, source)
    elif column not in table.column_names:
        raise ValueError(f"{source}: expected a column {column!r}, got {_listing(table.column_names)}")
    elif not _is_text(table.features[column]):
        raise ValueError(f"{source}: expected strings in column {column!r}, got {table.features[column]}")

    sentences: list[str] = []
    for batch in table.select_columns(column).iter(batch_size=10_000):
        trimmed = (sentence.strip() for sentence in batch[column] if sentence is not None)
        sentences += filter(None, trimmed)
        if limit is not None and len(sentences) >= limit:
            return sentences[:limit]
    if not sentences:
        raise ValueError(f"{source}: expected sentences, got only blank ones")
    return sentences


def sentence_batches(
    sentences: Sequence[Text],
    *,
    batch_size: int,
    tokenize: Callable[[list[Text]], Any],
    seed: int = 0,
    epoch: int = 0,
    num_workers: int = 0,
) -> DataLoader:
    """One shuffled pass over the sentences, in whole batches; the few that do not fill one are left out.

    Args:
        sentences: N strings, or pairs of them.
        batch_size: sentences in a batch, B.
        tokenize: makes of a list of B sentences what the loader yields, such as a dict of tensors (B, T);
            with workers it must pickle.
        seed, epoch: together they fix the order, which another pass over the loader repeats.
        num_workers: processes that tokenise; 0 tokenises in this one.

    Returns a DataLoader of N // B batches. The global random state is left as it is.

    Raises ValueError for a batch_size, seed or epoch out of range, or fewer sentences than a batch.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if len(sentences) < batch_size:
        raise ValueError(
            f"sentences: expected at least batch_size {batch_size} of them, got {len(sentences)}"
        )
    # The two numbers are hashed together: their sum would make epoch 1 of seed 0 that of epoch 0 of seed 1.
    state = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state)
    order = torch.randperm(len(sentences), generator=generator)
    batches = order[: len(order) // batch_size * batch_size].view(-1, batch_size).tolist()
    return DataLoader(
        _Texts(sentences),
        batch_sampler=batches,
        collate_fn=tokenize,
        num_workers=num_workers,
        generator=generator,  # else the loader draws its workers' seed from the global random state
    )


class _Texts(torch.utils.data.Dataset[Text]):
    """A sequence as the data set that a DataLoader's types ask for."""

    def __init__(self, sentences: Sequence[Text]) -> None:
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> Text:
        return self.sentences[index]


def _load_file(path: Path) -> datasets.Dataset:
    _check_text(path)
    reader, options = _READERS[path.suffix.lower()]
    # A cache of its own for each call: the one in the home directory could serve an edited file stale.
    with tempfile.TemporaryDirectory(prefix="clusterns-") as cache, _quiet_datasets():
        try:
            return datasets.load_dataset(
                reader,
                data_files=glob.escape(str(path.absolute())),  # a path, not a pattern
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except (DatasetGenerationError, ParserWarning, ValueError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if "corresponds to no data" in str(cause):
                raise ValueError(f"{path}: expected sentences, got no rows") from error
            kind = path.suffix.lower().lstrip(".")
            raise ValueError(f"{path}: expected a well-formed {kind} file, got {_line(cause)}") from error


def _check_text(path: Path) -> None:
    """Raise in one line where a file is not there, of no known suffix, empty, or not UTF-8 text."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file of sentences, there is none")
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of sentences, got a folder")
    if path.suffix.lower() not in _READERS:
        got = repr(path.suffix) if path.suffix else "none"
        raise ValueError(f"{path}: expected a suffix of {_listing(_READERS)}, got {got}")
    decoder = codecs.getincrementaldecoder("utf-8")()
    blank = True
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            if b"\0" in chunk:
                raise ValueError(f"{path}: expected UTF-8 text, got a binary file")
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: expected UTF-8 text, got other bytes ({error.reason})") from error
            blank = blank and not chunk.strip()
        if file.tell() == 0:
            raise ValueError(f"{path}: expected sentences, got an empty file")
    if decoder.getstate()[0]:
        raise ValueError(f"{path}: expected UTF-8 text, got a character cut short at its end")
    if blank:
        raise ValueError(f"{path}: expected sentences, got only blank lines")


def _load_hub(name: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # not there or no connection; no such split or configuration
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{name}: expected a file that exists or a dataset on the hub with a train split, "
            f"got {_line(error)}"
        ) from error


def _sentence_column(table: datasets.Dataset, source: str | os.PathLike[str]) -> str:
    """The column of sentences where none was named."""
    columns = [name for name, feature in table.features.items() if _is_text(feature)]
    if len(columns) == 1:
        return columns[0]
    for name in USUAL_COLUMNS:
        if name in columns:
            return name
    found = _listing(f"{name} ({_kind(feature)})" for name, feature in table.features.items())
    raise ValueError(
        f"{source}: expected one column of strings, or one named {_listing(USUAL_COLUMNS)}; "
        f"name it with column, got {found}"
    )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _kind(feature: Any) -> str:
    if _is_text(feature):
        return "strings"
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _listing(names: Any) -> str:
    return ", ".join(names) or "none"


def _line(error: BaseException) -> str:
    """The type and the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without datasets' progress bars and log, and with pandas' doubts about a csv file as errors."""
    shown, level = not are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)
            yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
