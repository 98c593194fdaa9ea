"""How many sentences a second does the data path give alone, and how long would a device wait for it?

Every contender makes batches of token ids of the same rows, shuffled, with the same tokenizer, and nobody
trains on them. "clusterns" is `batches` of a memory-mapped `load_rows`. "sentence-transformers" is the
DataLoader of its trainer, over a table in memory. "datasets.map" tokenises the whole set first, as SimCSE's
script does, and pads with DataCollatorWithPadding. No batch repeats a text with clusterns, unless it says so,
and with sentence-transformers where its sampler is "no_duplicates" or "no_duplicates_hashed". A row's views
are its text twice (sentences), or two neighbouring texts (pairs); clusterns tokenises a text once for its two
views.

Wait: the mean time a loop stands still for a batch when its step takes 20 ms and no processor, as a GPU's
does. The first batch is apart: starting workers, shuffling, and what a sampler does beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import datasets
import torch
from measure import Clock, columns
from report import Results, version
from training import LENGTH, trainer_of
from transformers import DataCollatorWithPadding
from transformers.utils import logging as transformers_logging

from clusterns.corpus.docstrings import docstring_corpus
from clusterns.corpus.sources import load_rows
from clusterns.data import batches
from clusterns.models.views import ViewTokenizer
from clusterns.training.scratch import small_bert, train_tokenizer

Row = tuple[str, ...]
Loader = Callable[[], Iterable]
STEP_SECONDS = 0.02


def contenders(kind: str, count: int, size: int, folder: Path) -> tuple[int, dict[str, Loader]]:
    """How many rows there are, and by name what makes a loader of one epoch.

    Rows are documentation sentences, or pairs of neighbours.
    """
    found = docstring_corpus(seed=0)
    rows: list[Row] = [(text,) for text in found.sentences] if kind == "sentences" else [*found.neighbours]
    rows = rows[:count]
    tokenizer = train_tokenizer([text for row in rows for text in row], max_length=LENGTH)
    path = folder / "rows.jsonl"
    lines = [json.dumps(dict(zip(("a", "b"), row, strict=False))) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    stored = load_rows(path, columns=["a", "b"][: len(rows[0])])
    tokenize = ViewTokenizer(tokenizer, max_length=LENGTH)

    def ours(workers: int, unique: bool) -> Loader:
        return lambda: batches(stored, batch_size=size, tokenize=tokenize, num_workers=workers, unique=unique)

    encoder = folder / "encoder"
    small_bert(tokenizer, seed=0, layers=1, hidden_size=32).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    views = {"anchor": [row[0] for row in rows], "positive": [row[-1] for row in rows]}
    settings = {"use_cpu": True, "dataloader_drop_last": True, "dataloader_pin_memory": False}
    made: dict[str, Loader] = {}
    for workers in (0, 1, 2):
        made[f"clusterns, {workers} workers"] = ours(workers, True)
    made["clusterns, 0 workers, not unique"] = ours(0, False)
    for workers in (0, 2):
        for sampler in ("batch_sampler", "no_duplicates", "no_duplicates_hashed"):
            more = {**settings, "batch_sampler": sampler, "dataloader_num_workers": workers}
            trainer = trainer_of(encoder, views, size, folder, **more)
            made[f"sentence-transformers, {workers} workers, {sampler}"] = trainer.get_train_dataloader
    if len(rows[0]) == 1:
        made["datasets.map, 0 workers"] = mapped(rows, tokenizer, size)
    return len(rows), made


def mapped(rows: list[Row], tokenizer, size: int) -> Loader:
    """Tokenise all, then pad batch by batch; both views of a batch are the same ids."""

    def loader() -> Iterable:
        table = datasets.Dataset.from_dict({"text": [row[0] for row in rows]})
        table = table.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=LENGTH),
            batched=True,
            remove_columns=["text"],
        )
        return torch.utils.data.DataLoader(
            table, size, shuffle=True, drop_last=True, collate_fn=DataCollatorWithPadding(tokenizer)
        )

    return loader


def whole_epoch(make: Loader, size: int) -> tuple[float, float]:
    """Rows a second from nothing to the last batch, and processor time of a row in µs, workers' included."""
    before, start = sum(os.times()[:4]), time.perf_counter()
    count = size * sum(1 for _ in make())
    seconds = time.perf_counter() - start
    return count / seconds, (sum(os.times()[:4]) - before) / count * 1e6


def waits(make: Loader, steps: int) -> tuple[float, float]:
    """Seconds until the first batch, and mean seconds for each of the `steps` after it."""
    start = time.perf_counter()
    iterator = iter(make())
    next(iterator)
    first, waited = time.perf_counter() - start, []
    for _ in range(steps):
        time.sleep(STEP_SECONDS)
        start = time.perf_counter()
        if next(iterator, None) is None:
            break
        waited.append(time.perf_counter() - start)
    return first, statistics.mean(waited)


def measure(kind: str, wanted: argparse.Namespace, results: Results) -> None:
    """All contenders on one kind of rows."""
    size = wanted.batch[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLUSTERNS_CACHE"] = str(Path(folder) / "cache")
        count, made = contenders(kind, wanted.rows, size, Path(folder))
        base = {"kind": kind, "what": "epoch", "B": size, "D": 0, "K": 0, "dtype": "ids"}
        base |= {"rows": count, "rounds": wanted.rounds, "status": "ok", "note": ""}
        rows = {name: {"contender": name, **base} for name in made}
        epochs: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for name, make in list(made.items()) * wanted.rounds:  # a machine's slow minute hits all alike
            epochs[name].append(whole_epoch(make, size))
            speeds, processor = zip(*epochs[name], strict=True)
            rows[name] |= columns("rows_per_second", speeds)
            rows[name]["processor_us_per_row"] = statistics.median(processor)
            results.keep([rows[name]])
        for name, make in made.items():
            first, wait = waits(make, wanted.steps)
            rows[name] |= {"first_batch_ms": first * 1e3, "wait_ms": wait * 1e3}
            results.add(rows[name])


def stages(wanted: argparse.Namespace, results: Results, _clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do."""
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results.machine["load_average"] = os.getloadavg()[0]  # well above 0: busy with something else
    results.machine |= {name: version(name) for name in ("tokenizers", "datasets")}
    return [(kind, partial(measure, kind, wanted, results)) for kind in ("sentences", "pairs")]


if __name__ == "__main__":
    from run import main

    sys.exit(main("data"))
