"""Batches of an epoch: their order, no text twice in one, ranks, resumed passes and worker processes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_files import write

from clusterns.corpus.rows import Row, Rows
from clusterns.corpus.sources import load_rows
from clusterns.data import CHARACTERS_PER_TOKEN, batches


def distinct(count: int) -> list[Row]:
    return [(f"line {i}",) for i in range(count)]


def repetitive(count: int, texts: int, columns: int = 1, seed: int = 0) -> list[Row]:
    draws = np.random.default_rng(seed).integers(0, texts, (count, columns))
    return [tuple(f"text {i}" for i in row) for row in draws]


def epoch_of(rows: list[Row] | Rows, size: int, **options: object) -> list[list[Row]]:
    return list(batches(rows, batch_size=size, tokenize=list, **options))  # type: ignore[arg-type]


def on_disk(folder: Path, rows: list[Row]) -> Rows:
    lines = (json.dumps(dict(zip("abc", row, strict=False))) + "\n" for row in rows)
    return load_rows(write(folder, "rows.jsonl", "".join(lines)), columns=list("abc")[: len(rows[0])])


def assert_unique(batch: list[Row]) -> None:
    counts = Counter(text.strip() for row in batch for text in set(row))
    assert max(counts.values()) == 1


@pytest.mark.parametrize("unique", [True, False])
def test_the_order_is_torchs_permutation_in_whole_batches_each_time(unique: bool) -> None:
    state = int(np.random.SeedSequence((3, 2)).generate_state(1, np.uint64)[0])
    order = torch.randperm(67, generator=torch.Generator().manual_seed(state))[:64].tolist()
    loader = batches(distinct(67), batch_size=8, tokenize=list, seed=3, epoch=2, unique=unique)
    for _ in range(2):
        epoch = list(loader)
        assert [len(batch) for batch in epoch] == [8] * 8
        assert [row for batch in epoch for row in batch] == [(f"line {i}",) for i in order]
    if not unique:
        assert epoch_of([("same",)] * 8, 4, unique=False) == [[("same",)] * 4] * 2


def test_few_rows_are_left_out_and_fingerprints_do_as_texts_do(tmp_path: Path) -> None:
    """So nothing hangs on the order of a set of texts, which each process has in another one."""
    rows = repetitive(2000, 300, 2)
    loader = batches(rows, batch_size=16, tokenize=list)
    epoch = list(loader)
    assert len(epoch) > 115
    assert loader.deferred > 50
    assert epoch_of(on_disk(tmp_path, rows), 16) == epoch


def test_a_row_that_waits_comes_in_the_next_batch_that_lacks_its_text() -> None:
    """Worked by hand on the order that seed and epoch give."""
    texts = ["x", "x", "x", "x", "a", "b", "c", "d", "e", "f"]
    order = [row for batch in epoch_of(distinct(10), 10) for row in batch]
    rows: list[Row] = [("",)] * 10
    for number, (text, (line,)) in enumerate(zip(texts, order, strict=True)):
        rows[int(line.split()[1])] = (text, f"positive {number}")
    loader = batches(rows, batch_size=2, tokenize=list)
    pairs = [(0, 4), (1, 5), (2, 6), (3, 7), (8, 9)]
    assert list(loader) == [[(texts[i], f"positive {i}") for i in pair] for pair in pairs]
    assert loader.deferred == 3


def test_equal_texts_within_a_row_and_white_space() -> None:
    epoch = epoch_of([("a", "a"), ("b ", "c"), (" b", "d"), ("e", "f")], 2)
    assert any(("a", "a") in batch for batch in epoch)
    assert not any({("b ", "c"), (" b", "d")} <= set(batch) for batch in epoch)


@settings(max_examples=60)
@given(*map(st.integers, (8, 8, 1, 1, 0), (120, 60, 3, 3, 1000)), st.data())
def test_start_and_ranks_give_parts_of_the_same_epoch(count, texts, columns, half, seed, data) -> None:
    size = 2 * half
    rows = repetitive(count, texts, columns, seed)
    whole = batches(rows, batch_size=size, tokenize=list, seed=seed)
    try:
        epoch: list[list[Row]] = list(whole)  # type: ignore[arg-type]
    except ValueError:
        assert len({text for row in rows for text in row}) < 3 * size * columns  # a batch may truly not exist
        return
    for batch in epoch:
        assert len(batch) == size
        assert_unique(batch)
    assert not Counter(row for batch in epoch for row in batch) - Counter(rows)  # each row once
    assert whole.left_out == count - size * len(epoch)
    start = data.draw(st.integers(0, len(epoch) + 1))
    resumed = batches(rows, batch_size=size, tokenize=list, seed=seed, start=start)
    assert list(resumed) == epoch[start:]
    assert (resumed.deferred, resumed.left_out) == (whole.deferred, whole.left_out)
    shares = [epoch_of(rows, size, seed=seed, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == epoch


@pytest.mark.parametrize(("num_workers", "start"), [(0, 5), (1, 0), (2, 0), (2, 3)])
def test_workers_and_start_change_neither_batches_nor_counts(tmp_path, num_workers: int, start: int) -> None:
    """However far ahead the workers are, the rows deferred are those of the batches seen."""
    rows = on_disk(tmp_path, repetitive(400, 150, 2))

    def passing(**options: int) -> list[tuple]:
        loader = batches(rows, batch_size=8, tokenize=list, seed=1, **options)
        return [(batch, loader.deferred) for batch in loader]

    whole = passing()
    assert whole[-1][1] > whole[0][1]
    before = torch.get_rng_state()
    assert passing(num_workers=num_workers, prefetch_factor=3, start=start) == whole[start:]
    assert torch.equal(before, torch.get_rng_state())


def test_a_long_text_is_cut_before_it_is_tokenized() -> None:
    class Lengths:
        max_length = 32

        def __call__(self, rows: list[Row]) -> list[list[int]]:
            return sorted([len(text) for text in row] for row in rows)

    rows = [("short", "s"), ("long " * 20_000, "l")]
    assert list(batches(rows, batch_size=2, tokenize=Lengths())) == [[[5, 1], [32 * CHARACTERS_PER_TOKEN, 1]]]
    assert list(batches(rows, batch_size=2, tokenize=lambda rows: max(map(len, dict(rows))))) == [51_200]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_tokenize_raises_arrives_in_one_line(num_workers: int) -> None:
    def tokenize(rows: list[Row]) -> None:
        raise ValueError("template: expected a slot for the sentence")

    with pytest.raises(ValueError, match=r"^template: expected a slot for the sentence$"):
        list(batches(distinct(4), batch_size=2, tokenize=tokenize, num_workers=num_workers))
    line = r"^rows: expected at least batch_size 4 without a text in common, got 3 among 9; .* repeat them$"
    with pytest.raises(ValueError, match=line):
        epoch_of([(str(i % 3),) for i in range(9)], 4, num_workers=num_workers)


def test_bad_arguments() -> None:
    for options, message in (
        ({"batch_size": 5}, "rows: expected at least batch_size 5 of them, got 4"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, "rank: expected below world_size 2, got 2"),
        ({"batch_size": 3, "world_size": 2}, "batch_size: expected a multiple of the 2 processes, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(distinct(4), tokenize=list, **{"batch_size": 2, **options})  # type: ignore[arg-type]


def test_real_triplets(shared: Path) -> None:
    rows = load_rows(shared / "data" / "snli_triplets.csv")
    assert (len(rows), rows.columns) == (27_195, ("sent0", "sent1", "hard_neg"))
    loader = batches(rows, batch_size=256, tokenize=list)
    assert len(loader) == 106
    for batch in islice(loader, 20):
        assert_unique(batch)  # type: ignore[arg-type]
    assert 0 < loader.deferred < 1000
