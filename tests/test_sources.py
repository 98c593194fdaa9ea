from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from forked import start
from huggingface_hub import constants

from clusterns.corpus import delimited
from clusterns.corpus.rows import RECORD_ROWS, UNUSED_SECONDS
from clusterns.corpus.sources import HUB_FILES, load_rows
from clusterns.data import batches


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CLUSTERNS_CACHE", str(folder))
    return folder


def entries(cache: Path) -> list[str]:
    return [entry.name for entry in cache.iterdir() if entry.is_dir()]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def fails(source: object, *parts: str, kind: type[Exception] = ValueError, **options: object) -> None:
    with pytest.raises(kind) as caught:
        load_rows(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(source), *parts):
        assert part in message


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    count = 2 * RECORD_ROWS + 3
    rows = load_rows(write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(count))))
    assert len(rows) == count
    assert list(rows) == [(f"line {i}",) for i in range(count)]
    assert rows[-1] == rows[count - 1] == (f"line {count - 1}",)
    assert rows[-count] == ("line 0",)
    for index in (count, -count - 1):
        with pytest.raises(IndexError):
            rows[index]
    exact = load_rows(tmp_path / "a.txt", limit=RECORD_ROWS)
    assert len(list(exact)) == RECORD_ROWS


def test_keys_are_equal_where_texts_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "sent0,sent1\na,b\nb,a\nc,c\n")
    rows = load_rows(path)
    (a, b), (b_again, a_again), (c, c_again) = rows.keys(pytest.importorskip("numpy").arange(3))
    assert (a, b, c) == (a_again, b_again, c_again)
    assert len({a, b, c}) == 3


def test_an_unchanged_file_is_parsed_once_and_an_edited_one_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.txt", "first\n")
    stamp = path.stat()
    first = load_rows(path)
    again = load_rows(path)
    assert again.folder == first.folder
    assert len(entries(cache)) == 1
    write(path, "other\n")  # as many bytes
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert list(load_rows(path)) == [("other",)]
    assert list(first) == [("first",)]
    path.unlink()
    fails(path, "there is none", kind=FileNotFoundError)


def test_arguments_do_not_share_an_entry(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.csv", "sent0,sent1\na,b\nc,d\n")
    for options in ({}, {"limit": 1}, {"columns": "sent1"}, {"columns": "sent1,sent0"}):
        load_rows(path, **options)
    assert len(entries(cache)) == 4
    tabs = write(tmp_path / "a.tsv", 'text\n"a"\n')
    commas = write(tmp_path / "b.csv", 'text\n"a"\n')
    assert (load_rows(tabs)[0], load_rows(commas)[0]) == (('"a"',), ("a",))


@pytest.mark.parametrize("file", ["texts.arrow", "keys.uint64", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "absent"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, cache: Path, file: str, damage: str) -> None:
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(100)))
    place = load_rows(path).folder / file
    if damage == "absent":
        place.unlink()
    else:
        place.write_bytes(place.read_bytes()[:-40])
    assert list(load_rows(path)) == [(f"line {i}",) for i in range(100)]


def test_a_failure_leaves_no_entry(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.csv", "text,n\n" + "a,1\n" * (2 * RECORD_ROWS) + "b\n")
    for _ in range(2):
        fails(path, f"line {2 * RECORD_ROWS + 2}:")
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_old_entries_are_removed_when_a_new_one_is_made(tmp_path: Path, cache: Path) -> None:
    old, used = (load_rows(write(tmp_path / f"{name}.txt", name)).folder for name in ("old", "used"))
    then = time.time() - UNUSED_SECONDS - 60
    for folder in (old, used):
        os.utime(folder, (then, then))
    inode = used.stat().st_ino
    (cache / "never-made.lock").touch()  # of a process that was killed
    load_rows(tmp_path / "used.txt")
    load_rows(write(tmp_path / "new.txt", "new"))
    assert not old.exists()
    assert used.stat().st_ino == inode
    assert not list(cache.glob("*.lock"))


def load_and_die(path: Path) -> None:
    """By SIGKILL, with some of the rows written and some not."""
    lines = delimited.lines_of

    def dying(path: Path, newline: bytes) -> Iterator[tuple[int, str]]:
        for number, line in lines(path, newline):
            if number > 2 * RECORD_ROWS:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number, line

    delimited.lines_of = dying
    load_rows(path)


def test_a_killed_process_leaves_the_cache_usable(tmp_path: Path, cache: Path) -> None:
    count = 3 * RECORD_ROWS
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(count)))
    process = start(load_and_die, path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(cache.glob(".*/files/texts.arrow")), "it was to be killed while writing"
    assert not entries(cache) or entries(cache)[0].startswith(".")
    assert len(load_rows(path)) == count


def load_and_tell(path: Path, place: Path) -> None:
    rows = load_rows(path)
    place.write_text(f"{len(rows)} {rows[-1][0]} {rows.folder}")


def test_processes_that_load_at_once_share_an_entry(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(50_000)))
    places = [tmp_path / name for name in ("one", "two")]
    processes = [start(load_and_tell, path, place) for place in places]
    for process in processes:
        process.join()
    (entry,) = entries(cache)
    assert [place.read_text() for place in places] == [f"50000 line 49999 {cache / entry}"] * 2


def own_memory() -> float:
    """Anonymous memory in MiB, the process's own: pages of a mapped file are the system's to drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def load_and_measure(small: Path, large: Path, place: Path) -> None:
    list(batches(load_rows(small), batch_size=10, tokenize=len, unique=False))
    before = own_memory()
    rows = load_rows(large)
    assert sum(batches(rows, batch_size=1000, tokenize=len)) == len(rows)
    assert str(rows.folder / "texts.arrow") in Path("/proc/self/maps").read_text()
    place.write_text(str(own_memory() - before))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    small = write(tmp_path / "small.txt", "a sentence\n" * 10)
    large = write(tmp_path / "large.txt", "".join(f"{i:.>200}\n" for i in range(200_000)))
    process = start(load_and_measure, small, large, tmp_path / "grown")
    process.join()
    assert process.exitcode == 0
    # The file has 38 MiB, a list of its sentences takes 54.
    assert float((tmp_path / "grown").read_text()) < 20


def test_rows_pickle_as_a_place(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(10_000))))
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    assert list(pickle.loads(pickled)) == list(rows)


def test_a_parquet_file_cut_short_or_damaged_inside(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[f"line {i}" for i in range(10_000)])
    whole = path.read_bytes()
    fails(write(path, whole[:-30]), "well-formed parquet")
    fails(write(path, whole[:4] + b"\xff" * 1000 + whole[1004:]), "well-formed parquet")


def test_missing_and_wrong_sources(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.txt", "none.csv", "./none", "some/folder/none.jsonl"):
        fails(missing, "there is none", kind=FileNotFoundError)
    fails(tmp_path, "folder")
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        load_rows("any.txt", limit=0)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a sentence\n")
    path.chmod(0)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:  # who may read everything
        own = [each for each in tmp_path.parents if each.name.startswith(("pytest-", "popen-"))]
        for folder in (tmp_path, *own):
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        fails(path, "readable file, got Permission denied", kind=PermissionError)
    finally:
        if root:
            os.seteuid(0)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "a sentence\n")
    occupied = write(tmp_path / "occupied", "a file, no folder")
    monkeypatch.setenv("CLUSTERNS_CACHE", str(occupied))
    with pytest.raises(OSError, match="CLUSTERNS_CACHE names another") as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{occupied}: expected a cache folder")


def test_a_full_disk_leaves_no_entry(tmp_path: Path, cache: Path) -> None:
    """By a limit on the size of files, which fails in the same calls."""
    resource = pytest.importorskip("resource", reason="limits of Unix")
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(100_000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match="File too large.* CLUSTERNS_CACHE names another") as caught:
            load_rows(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not entries(cache)
    assert len(load_rows(path)) == 100_000


def test_a_sentence_of_100_000_characters(tmp_path: Path) -> None:
    long = "word " * 20_000
    for name, content in (
        ("a.txt", f"{long}\nshort\n"),
        ("a.csv", f'text\n"{long}"\nshort\n'),
        ("a.jsonl", json.dumps({"text": long}) + '\n{"text": "short"}\n'),
    ):
        assert list(load_rows(write(tmp_path / name, content))) == [(long.strip(),), ("short",)]
    longer = "x" * 1_000_000  # beyond the csv module's own limit, which is as it was afterwards
    assert list(load_rows(write(tmp_path / "b.csv", f"text\n{longer}\n"))) == [(longer,)]
    import csv

    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize("name", ["wiki1m", "princeton-nlp/datasets-for-simcse", "ours/set:some/file.jsonl"])
def test_a_file_of_a_hub_repository_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    repository, file = HUB_FILES.get(name) or name.split(":")
    place = tmp_path / f"datasets--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc123")
    target = place / "snapshots" / "abc123" / file
    target.parent.mkdir(parents=True)
    target.write_text('{"text": "One two."}\n' if file.endswith("jsonl") else "One two.\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert list(load_rows(name)) == [("One two.",)]


def test_without_a_connection_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    url = "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse/resolve/main/"
    for name in ("wiki1m", "princeton-nlp/datasets-for-simcse"):
        fails(name, f"download {url}wiki1m_for_simcse.txt", kind=FileNotFoundError)
    fails("nli", f"{url}nli_for_simcse.csv", kind=FileNotFoundError)
    fails("nobody/no-such-dataset", "dataset on the hub", kind=FileNotFoundError)
    assert capfd.readouterr() == ("", "")


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.Dataset:
        asked.append((*arguments, options["split"]))
        texts = {"premise": ["a", " b "], "entailment": ["c", "d"], "n": [1, 2]}
        return datasets.Dataset.from_dict(texts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = load_rows("nobody/pairs")
    assert rows.columns == ("premise", "entailment")
    assert list(rows) == [("a", "c"), ("b", "d")]
    assert list(load_rows("nobody/pairs:some-configuration", columns="premise")) == [("a",), ("b",)]
    assert asked == [("nobody/pairs", None, "train"), ("nobody/pairs", "some-configuration", "train")]
    fails("nobody/pairs", "text in column 'n', got int64", columns="n")


def test_real_files(shared: Path) -> None:
    path = shared / "data" / "wiki_sentences.txt"
    lines = path.read_bytes().decode().split("\n")
    assert list(load_rows(path)) == [(line.strip(),) for line in lines if line.strip()]
    triplets = load_rows(shared / "data" / "snli_triplets.csv")
    assert (len(triplets), triplets.columns) == (27_195, ("sent0", "sent1", "hard_neg"))
    assert all(len(row) == 3 for row in triplets)
