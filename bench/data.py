"""How many sentences a second does the data path give alone, and how long would a device wait for it?

Every contender makes batches of token ids of the same rows, shuffled, with the same tokenizer, and nobody
trains on them. "clusterns" is `batches` of a memory-mapped `load_rows`. "sentence-transformers" is the
DataLoader of its trainer, over a table in memory. "datasets.map" tokenises the whole set first, as SimCSE's
script does, and pads with DataCollatorWithPadding. No batch repeats a text with clusterns, unless it says so,
and with sentence-transformers where its sampler is "no_duplicates" or "no_duplicates_hashed". A row's views
are its text twice (sentences), or two neighbouring texts (pairs); clusterns tokenises a text once for its two
views.

Wait: the mean time a loop stands still for a batch when its step takes --step-ms and no processor, as
a GPU's does. The first batch is apart: starting workers, shuffling, and what a sampler does beforehand.
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
from pathlib import Path

import datasets
import torch
from report import RESULTS, machine, version, write_json
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding
from transformers.utils import logging as transformers_logging

from clusterns.corpus.docstrings import docstring_corpus
from clusterns.corpus.sources import load_rows
from clusterns.data import batches
from clusterns.models.views import ViewTokenizer
from clusterns.training.scratch import small_bert, train_tokenizer

Row = tuple[str, ...]
Loader = Callable[[], Iterable]


def corpus(kind: str, count: int) -> list[Row]:
    """Rows of documentation sentences, or of pairs of neighbours; over again where there are too few."""
    found = docstring_corpus(seed=0)
    rows = [(text,) for text in found.sentences] if kind == "sentences" else list(found.neighbours)
    if len(rows) < count:
        print(f"{kind}: {len(rows):,} rows are there", file=sys.stderr)
    return rows[:count]


def contenders(rows: list[Row], size: int, max_length: int, folder: Path) -> dict[str, Loader]:
    """What to make a loader of one epoch by, by name."""
    tokenizer = train_tokenizer([text for row in rows for text in row], max_length=max_length)
    path = folder / "rows.jsonl"
    lines = [json.dumps(dict(zip(("a", "b"), row, strict=False))) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    stored = load_rows(path, columns=["a", "b"][: len(rows[0])])
    tokenize = ViewTokenizer(tokenizer, max_length=max_length)

    def ours(workers: int, unique: bool) -> Loader:
        return lambda: batches(stored, batch_size=size, tokenize=tokenize, num_workers=workers, unique=unique)

    made: dict[str, Loader] = {}
    for workers in (0, 1, 2):
        made[f"clusterns, {workers} workers"] = ours(workers, True)
    made["clusterns, 0 workers, not unique"] = ours(0, False)
    for workers in (0, 2):
        for sampler in ("batch_sampler", "no_duplicates", "no_duplicates_hashed"):
            name = f"sentence-transformers, {workers} workers, {sampler}"
            made[name] = trainer_loader(rows, tokenizer, size, max_length, workers, sampler, folder)
    if len(rows[0]) == 1:
        made["datasets.map, 0 workers"] = mapped(rows, tokenizer, size, max_length)
    return made


def trainer_loader(
    rows: list[Row], tokenizer, size: int, max_length: int, workers: int, sampler: str, folder: Path
) -> Loader:
    """The training DataLoader of sentence-transformers' trainer."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    place = folder / "encoder"
    if not place.exists():
        small_bert(tokenizer, seed=0, layers=1, hidden_size=32).save_pretrained(place)
        tokenizer.save_pretrained(place)
    transformer = Transformer(str(place), max_seq_length=max_length)
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu"
    )
    views = {"anchor": [row[0] for row in rows], "positive": [row[-1] for row in rows]}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(folder / "trainer"),
            per_device_train_batch_size=size,
            batch_sampler=sampler,
            dataloader_num_workers=workers,
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_dict(views),
        loss=MultipleNegativesRankingLoss(model),
    )
    return trainer.get_train_dataloader


def mapped(rows: list[Row], tokenizer, size: int, max_length: int) -> Loader:
    """Tokenise all, then pad batch by batch; both views of a batch are the same ids."""

    def loader() -> Iterable:
        table = datasets.Dataset.from_dict({"text": [row[0] for row in rows]})
        table = table.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length),
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


def waits(make: Loader, step_seconds: float, steps: int) -> tuple[float, float]:
    """Seconds until the first batch, and mean seconds for each of the `steps` after it."""
    start = time.perf_counter()
    iterator = iter(make())
    next(iterator)
    first, waited = time.perf_counter() - start, []
    for _ in range(steps):
        time.sleep(step_seconds)
        start = time.perf_counter()
        if next(iterator, None) is None:
            break
        waited.append(time.perf_counter() - start)
    return first, statistics.mean(waited)


def measure(kind: str, wanted: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All contenders on one kind of rows."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLUSTERNS_CACHE"] = str(Path(folder) / "cache")
        rows = corpus(kind, wanted.rows)
        made = contenders(rows, wanted.batch_size, wanted.max_length, Path(folder))
        epochs: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for _ in tqdm(range(wanted.rounds), desc=f"rounds of {kind}", file=sys.stderr):
            for name, make in made.items():  # in turn, so that a machine's slow minute hits all alike
                epochs[name].append(whole_epoch(make, wanted.batch_size))
        for name, make in tqdm(made.items(), desc=f"waits of {kind}", file=sys.stderr):
            speeds = [speed for speed, _ in epochs[name]]
            first, wait = waits(make, wanted.step_ms / 1000, wanted.steps)
            found[name] = {
                "rows": len(rows),
                "rows_per_second": statistics.median(speeds),
                "slowest_round": min(speeds),
                "fastest_round": max(speeds),
                "processor_us_per_row": statistics.median(processor for _, processor in epochs[name]),
                "first_batch_ms": first * 1e3,
                "wait_ms": wait * 1e3,
            }
    return found


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "data.json", help="JSON, default %(default)s"
    )
    parser.add_argument("--kinds", nargs="+", choices=["sentences", "pairs"], default=["sentences", "pairs"])
    sizes = {"rows": 50_000, "batch-size": 256, "max-length": 32, "rounds": 3, "step-ms": 20, "steps": 60}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    wanted = parser.parse_args()
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found = machine()
    found["load_average"] = os.getloadavg()[0]  # well above 0 the machine was busy with something else
    found |= {name: version(name) for name in ("tokenizers", "datasets")}
    settings = {name: str(value) for name, value in vars(wanted).items()}
    results: dict[str, dict] = {"machine": found, "settings": settings, "kinds": {}}
    for kind in wanted.kinds:
        results["kinds"][kind] = rows = measure(kind, wanted)
        write_json(wanted.output, results)
        print(f"\n{kind:52} {'rows/s':>8} {'(rounds)':>18} {'CPU/row':>11} {'first batch':>13} {'wait':>10}")
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["rows_per_second"]):
            span = f"{row['slowest_round']:,.0f}–{row['fastest_round']:,.0f}"
            times = f"{row['processor_us_per_row']:>8.0f} µs {row['first_batch_ms']:>10.0f} ms"
            print(f"{name:52} {row['rows_per_second']:>8,.0f} {span:>18} {times} {row['wait_ms']:>7.2f} ms")
    print(f"\nwritten to {wanted.output}")


if __name__ == "__main__":
    main()
