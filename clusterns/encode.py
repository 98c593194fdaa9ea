"""`clusterns encode`: the embedding of every text of a file, in the file's order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_choice, check_count, warn
from .corpus.columns import Asked, LeftOut, Tally, choose
from .corpus.readers import Cells, Table
from .corpus.sources import column_names, open_source, source_name, with_progress
from .evaluation.evaluated_model import PRECISIONS, load_model
from .files import Read, check_outputs, check_room, expanded, replacing
from .models.folder import MODEL_FILES

# Batches that are sorted by length together: enough that padding is negligible, few enough for a lively bar.
_SORTED_BATCHES = 32
_BY_LINE = "a sentence a line"  # of a table's shape
Parts = Iterator[tuple[list[str], Tensor]]


def encode_file(
    model: str | os.PathLike[str],
    file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text_columns: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    progress: bool = True,
) -> None:
    """Encode the N texts of a file; row i of the output is row i of the file, repeated texts included.

    A row without a text, and a blank line between those of a file with a sentence a line, is encoded as the
    empty text, which a warning says: no row is left out. Memory grows neither with N nor with the file (json
    that is no object a line excepted). The output is written whole or not at all.

    Args:
        model: folder or hub name, see `load_model`; its vectors are those of sentence-transformers, of length
            1 where its files say so.
        file: file or hub dataset, see `load_rows`.
        output: .npy, float32 (N, D); or .parquet, with the columns text and embedding, D float32 each.
        text_columns: the column of the texts; None takes the first that `load_rows` takes.
        delimiter, header: see `load_rows`.
        pooling: None takes the one that the model's files state.
        max_length: tokens of a text; None takes what the model's files state.
        batch_size: texts that are encoded at a time.
        precision: "fp32", or "bf16" for autocast to it.
        progress: show a bar.

    Raises ValueError or OSError in one line for bad input, another suffix, embeddings that are not finite,
    a file that changes meanwhile, and a full disk.
    """
    target = check_outputs({"--output": output}, (Read("MODEL", model, MODEL_FILES), Read("FILE", file)))
    path = target["--output"]
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"--output: expected a name that ends in {' or '.join(WRITERS)}, got {output}")
    check_count("--batch-size", batch_size, at_least=1)
    check_choice("--precision", precision, PRECISIONS)
    columns = column_names(text_columns)
    if columns is not None and len(columns) > 1:
        raise ValueError(f"--text-columns: expected one column, got {len(columns)}: {text_columns}")
    source = source_name(file)
    asked = Asked(columns, sentences=True)
    at_first = _state(source)
    table = _with_blank_lines(open_source(source, delimiter, header, asked)[0])
    chosen = choose(source, table, asked)
    odd, blank, count = Tally(), Tally(), 0
    for row in chosen.rows(with_progress(source, table), odd):
        count += 1
        if isinstance(row, LeftOut):
            blank.add(row)
    among = f", among them {odd}" if odd else ""
    print(f"{source}: {table.shape}; {chosen.words}; {count:,} rows{among}", flush=True)
    without = sum(number for number, _ in blank.values())
    if without == count:
        raise ValueError(f"{source}: expected texts, got {blank or 'no rows'}")
    if blank:
        warn(f"{source}: of {count:,} rows {blank} are encoded as the empty text")

    loaded = load_model(model, pooling=pooling, max_length=max_length, truncate=True)
    dtype: dict[str, Any] = {"dtype": torch.bfloat16} if precision == "bf16" else {}

    def parts() -> Parts:
        rows = chosen.rows(table, Tally())
        texts = ("" if isinstance(row, LeftOut) else row[0] for row in rows)
        done = 0
        with tqdm(total=count, desc="encode", unit="text", disable=not progress) as bar:
            while some := list(islice(texts, _SORTED_BATCHES * batch_size)):
                vectors = loaded.encoder.encode(some, batch_size=batch_size, **dtype)
                finite = vectors.isfinite().all(dim=1)
                if not finite.all():
                    row = done + int(finite.int().argmin()) + 1
                    raise ValueError(f"model: expected finite embeddings, got NaN or infinity in row {row:,}")
                yield some, F.normalize(vectors, dim=1) if loaded.normalized else vectors
                done += len(some)
                bar.update(len(some))
        if done != count or _state(source) != at_first:
            raise ValueError(f"{source}: expected a file that stays as it is meanwhile, got another one")

    encoded = parts()
    first = next(encoded)
    width = first[1].shape[1]
    check_room("--output", path.parent, 4 * count * width)
    with replacing(path) as place:
        WRITERS[path.suffix.lower()](place, chain([first], encoded), (count, width))
    print(f"{count:,} rows of {width} numbers: {path}")


def _state(source: str) -> tuple[int, int] | None:
    """What tells that a file has changed; None of a hub dataset."""
    path = expanded(source)
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


def _with_blank_lines(table: Table) -> Table:
    """Of a file with a sentence a line the blank ones too, which its reader passes over; but for the last."""
    if _BY_LINE not in table.shape:
        return table

    def read(names: Sequence[str]) -> Iterator[tuple[int, Cells]]:
        # The rows begin with line 1, or with the first that has a text behind a header.
        due = None if ", header" in table.shape else 2 if "as its first line says" in table.shape else 1
        for number, values in table.read(names):
            yield from ((blank, ("",)) for blank in range(due or number, number))
            yield number, values
            due = number + 1

    return replace(table, read=read)


def _write_npy(path: Path, parts: Parts, shape: tuple[int, int]) -> None:
    """Write them one after the other, as numpy.load reads them."""
    with path.open("wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for _, vectors in parts:
            file.write(np.ascontiguousarray(vectors, "<f4").data)


def _write_parquet(path: Path, parts: Parts, shape: tuple[int, int]) -> None:
    """The same with the texts, in row groups."""
    import pyarrow
    from pyarrow import parquet

    embedding = pyarrow.list_(pyarrow.float32(), shape[1])
    schema = pyarrow.schema([("text", pyarrow.string()), ("embedding", embedding)])
    # A dictionary would be for numbers that come again.
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for texts, vectors in parts:
            flat = pyarrow.array(vectors.numpy().reshape(-1))
            columns = [texts, pyarrow.FixedSizeListArray.from_arrays(flat, shape[1])]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


WRITERS: dict[str, Callable[[Path, Parts, tuple[int, int]], None]] = {
    ".npy": _write_npy,
    ".parquet": _write_parquet,
}
