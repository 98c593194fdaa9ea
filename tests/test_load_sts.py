"""Reading the STS folders: every set, the oddities of the files, and what is wrong with a malformed one."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from small_files import cases, refuses
from tiny import ROWS, write_sts_folder

from clusterns.evaluation import sts, sts_hub
from clusterns.evaluation.sts import SUBSETS, TABLES, load_sts, load_sts_subsets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sts_folder(tmp_path / "sts")


@pytest.mark.parametrize("name", [*SUBSETS, *TABLES])
def test_load_every_set(name: str, folder: Path) -> None:
    subsets = SUBSETS.get(name, [""])
    found = load_sts(folder, name)
    assert found.first == [a for a, _, _ in ROWS] * len(subsets)
    assert found.second == [b for _, b, _ in ROWS] * len(subsets)
    assert found.scores == [3.5, 0.0, 5.0, 1.2] * len(subsets)
    assert list(load_sts_subsets(folder, name)) == list(subsets)


def test_oddities_of_the_sts_files(folder: Path) -> None:
    place = folder / "STS" / "STS16-en-test"
    (place / "STS.input.headlines.txt").write_bytes(
        b'"one quote\ttwo\tsource\tsource\n'  # four columns, and a quotation mark never closed
        b"three\n"  # ragged, but without a score
        b"caf\xc3\xa9 \xe2\x80\xa8  x\t  five \r\n"  # a Unicode line separator, spaces, CRLF
        b"\tnothing before"  # an empty sentence, and no newline at the end
    )
    (place / "STS.gs.headlines.txt").write_bytes(b"4\n\n2.5\r\n0\n")
    pairs = load_sts_subsets(folder, "STS16")["headlines"]
    assert pairs == (['"one quote', "café x", ""], ["two", "five", "nothing before"], [4.0, 2.5, 0.0])
    assert load_sts(folder, "STS16").unscored == 1
    # STS-B has nine columns in places, and a blank line is no pair.
    (folder / "STS" / "STSBenchmark" / "sts-dev.csv").write_bytes(
        b'g\tf\ty\t1\t4.5\the said "no\tshe said no"\tlicence\tsource\r\n'
        b"g\tf\ty\t2\t\ta\tb\n\ng\tf\ty\t3\t1\tc\td\n"
    )
    pairs = load_sts(folder, "STSBenchmark-dev")
    assert pairs == (['he said "no', "c"], ['she said no"', "d"], [4.5, 1.0])


@pytest.mark.parametrize("name", [*SUBSETS, *TABLES])
def test_pair_counts_of_the_real_sets(name: str, shared: Path) -> None:
    for place in ("sts", "sts_raw"):
        pairs = load_sts(shared / "data" / place, name)
        assert len(pairs.first) == len(pairs.second) == len(pairs.scores) == sts.PUBLISHED_PAIRS[name]
        assert all(0 <= score <= 5 for score in pairs.scores)
        assert all((*pairs.first, *pairs.second))


IMAGES = "STS/STS14-en-test/STS.gs.images.txt"
TRIAL = "SICK/SICK_trial.txt"


@cases(
    "name file content words",
    [
        ("STS14", IMAGES, b"1\n2\n3\n", "images.txt: expected 4 lines as"),
        ("STS14", IMAGES, b"1\n2\n5.01\n4\n", "images.txt, line 3: expected a gold score from 0 to 5, got"),
        ("SICK-R-dev", TRIAL, b"1\ta\xff\tb\t2\n", "expected UTF-8 text, got byte 3"),
    ],
)
def test_malformed_files(name: str, file: str, content: bytes, words: str, folder: Path) -> None:
    (folder / file).write_bytes(content)
    refuses(folder, words, load=partial(load_sts, name=name))


def test_missing_folder_file_and_name(folder: Path) -> None:
    (folder / "STS" / "STS15-en-test" / "STS.gs.belief.txt").unlink()
    for source, words in ((folder / "absent", "sts_dir: expected a folder"), (folder, "STS.gs.belief.txt")):
        refuses(source, words, kind=FileNotFoundError, load=partial(load_sts, name="STS15"))
    for source in (folder, "hub:mteb"):
        with pytest.raises(ValueError, match=r"^name: expected one of STS12, .*, got 'STS17'$"):
            load_sts(source, "STS17")


def test_senteval_archive_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive as the hub's cache would have it, with files of another task."""
    path = tmp_path / "snapshots" / "abc123" / "senteval.tar"
    path.parent.mkdir(parents=True)
    (tmp_path / "other").write_text("a review")
    with tarfile.open(path, "w") as tar:
        for name in ("STS", "SICK"):
            tar.add(folder / name, f"downstream/{name}")
        tar.add(tmp_path / "other", "downstream/MR/mr.txt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    for _ in range(2):  # unpacked, then found unpacked
        for name in ("STS12", "STSBenchmark-dev", "SICK-R-test"):
            assert load_sts("hub:senteval", name) == load_sts(folder, name)
        path.write_bytes(b"no longer read")
    unpacked = tmp_path / "home" / "clusterns" / "senteval-abc123"
    assert sorted(path.name for path in unpacked.iterdir()) == ["SICK", "STS"]


def test_mteb_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"sentence1": ["a  b", "c"], "sentence2": ["d", "e"], "score": [1.5, 5], "year": ["x", "y"]}
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in sts.sets_of("hub:mteb"):
        assert load_sts("hub:mteb", name) == (["a b", "c"], ["d", "e"], [1.5, 5.0])
    assert asked == [place for name, place in sts_hub.MTEB_DATASETS.items() if name != "STSBenchmark-train"]
    assert ("mteb/stsbenchmark-sts", "validation") in asked
    del rows["score"]
    with pytest.raises(ValueError, match=r"^mteb/sts12-sts: expected the columns .* got sentence1"):
        load_sts("hub:mteb", "STS12")


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    for source, what in (("hub:mteb", "mteb/sts12-sts"), ("hub:senteval", "hub:senteval")):
        with pytest.raises(FileNotFoundError, match=rf"^sts_dir: expected {what} .*give a folder[^\n]*$"):
            load_sts(source, "STS12")
