"""Where rows come from and where they are kept: files, the hub, and a cache that any process may leave."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from small_files import refuses, write

from clusterns.corpus.rows import RECORD_ROWS
from clusterns.corpus.sources import HUB_FILES, load_rows
from clusterns.data import batches


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CLUSTERNS_CACHE", str(folder))
    return folder


def entries(cache: Path) -> list[str]:
    return [entry.name for entry in cache.iterdir() if entry.is_dir()]


def write_lines(folder: Path, count: int) -> Path:
    return write(folder, "a.txt", "".join(f"line {i}\n" for i in range(count)))


def test_rows_are_a_sequence_that_pickles_as_a_place(tmp_path: Path) -> None:
    count = 2 * RECORD_ROWS + 3
    rows = load_rows(write_lines(tmp_path, count))
    assert len(rows) == count
    assert list(rows) == [(f"line {i}",) for i in range(count)]
    assert rows[-1] == rows[count - 1] == (f"line {count - 1}",)
    for index in (count, -count - 1):
        with pytest.raises(IndexError):
            rows[index]
    assert len(list(load_rows(tmp_path / "a.txt", limit=RECORD_ROWS))) == RECORD_ROWS
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    assert list(pickle.loads(pickled)) == list(rows)


def test_an_unchanged_file_is_parsed_once_and_an_edited_one_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, "a.txt", "first\n")
    stamp = path.stat()
    first = load_rows(path)
    assert load_rows(path).folder == first.folder
    assert len(entries(cache)) == 1
    write(tmp_path, "a.txt", "other\n")  # as many bytes
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert list(load_rows(path)) == [("other",)]
    assert list(first) == [("first",)]


def test_arguments_do_not_share_an_entry(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, "a.csv", "sent0,sent1\na,b\nc,d\n")
    for options in ({}, {"limit": 1}, {"columns": "sent1"}, {"columns": "sent1,sent0"}):
        load_rows(path, **options)
    assert len(entries(cache)) == 4


@pytest.mark.parametrize("file", ["texts.arrow", "keys.uint64", "about.json"])
@pytest.mark.parametrize("kept", [-40, None], ids=["cut", "absent"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, cache: Path, file: str, kept: int | None) -> None:
    path = write_lines(tmp_path, 100)
    place = load_rows(path).folder / file
    content = place.read_bytes()
    place.unlink()
    if kept:
        place.write_bytes(content[:kept])
    assert list(load_rows(path)) == [(f"line {i}",) for i in range(100)]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The file has 29 MiB, and so has a list of its sentences."""
    path = write(tmp_path, "large.txt", "".join(f"{i:.>1500}\n" for i in range(20_000)))
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    rows = load_rows(path)
    assert sum(batches(rows, batch_size=1000, tokenize=len)) == len(rows)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most + pyarrow.total_allocated_bytes() - before < 15 * 2**20


@pytest.mark.parametrize("name", ["wiki1m", "princeton-nlp/datasets-for-simcse", "ours/set:some/file.jsonl"])
def test_a_file_of_a_hub_repository_from_the_hubs_cache(tmp_path: Path, monkeypatch, name: str) -> None:
    repository, file = HUB_FILES.get(name) or name.split(":")
    place = tmp_path / f"datasets--{repository.replace('/', '--')}"
    target = place / "snapshots" / "abc123" / file
    for folder in (place / "refs", target.parent):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text("abc123")
    target.write_text('{"text": "One two."}\n' if file.endswith("jsonl") else "One two.\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert list(load_rows(name)) == [("One two.",)]


def test_without_a_connection_one_line_says_what_to_do(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    url = "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse/resolve/main/"
    refuses("wiki1m", f"download {url}wiki1m_for_simcse.txt", kind=FileNotFoundError)
    refuses("nobody/no-such-dataset", "dataset on the hub", kind=FileNotFoundError)
    assert capfd.readouterr() == ("", "")


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.Dataset:
        asked.append((*arguments, options["split"]))
        return datasets.Dataset.from_dict({"premise": ["a", " b "], "entailment": ["c", "d"], "n": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = load_rows("nobody/pairs")
    assert rows.columns == ("premise", "entailment")
    assert list(rows) == [("a", "c"), ("b", "d")]
    assert list(load_rows("nobody/pairs:some-configuration", columns="premise")) == [("a",), ("b",)]
    assert asked == [("nobody/pairs", None, "train"), ("nobody/pairs", "some-configuration", "train")]
    refuses("nobody/pairs", "text in column 'n', got int64", columns="n")
