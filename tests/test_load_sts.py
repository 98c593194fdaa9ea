"""Reading the STS folders: every set, the oddities of the files, and what is wrong with a malformed one."""

from __future__ import annotations

import tarfile
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from tiny import ROWS, write_sts_folder

from clusterns.evaluation.sts import MTEB_DATASETS, SUBSETS, TABLES, load_sts, load_sts_subsets, sets_of

SHARED = Path(__file__).resolve().parents[2] / "shared"
STS, STS_RAW = SHARED / "data" / "sts", SHARED / "data" / "sts_raw"
PAIRS = {
    **{"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186},
    **{"STSBenchmark-train": 5749, "STSBenchmark-dev": 1500, "STSBenchmark-test": 1379},
    **{"SICK-R-train": 4500, "SICK-R-dev": 500, "SICK-R-test": 4927},
}

needs_sts = pytest.mark.skipif(not (STS.is_dir() and STS_RAW.is_dir()), reason="no STS data in ../shared")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sts_folder(tmp_path / "sts")


@pytest.mark.parametrize("name", [*SUBSETS, *TABLES])
def test_load_every_set(name: str, folder: Path) -> None:
    pairs = load_sts(folder, name)
    times = len(SUBSETS.get(name, [""]))
    assert pairs.first == [a for a, _, _ in ROWS] * times
    assert pairs.second == [b for _, b, _ in ROWS] * times
    assert pairs.scores == [3.5, 0.0, 5.0, 1.2] * times


def test_files_outside_the_protocol_are_not_read(folder: Path) -> None:
    for name, subset in (("STS12", "ALL"), ("STS13", "SMT")):
        for kind in ("input", "gs"):
            (folder / "STS" / f"{name}-en-test" / f"STS.{kind}.{subset}.txt").write_text("broken")
        assert len(load_sts(folder, name).scores) == 4 * len(SUBSETS[name])


def test_oddities_of_the_sts_files(folder: Path) -> None:
    place = folder / "STS" / "STS16-en-test"
    (place / "STS.input.headlines.txt").write_bytes(
        b'"one quote\ttwo\tsource\tsource\n'  # four columns, and a quotation mark never closed
        b"three\n"  # ragged, but without a score
        b"caf\xc3\xa9 \xe2\x80\xa8  x\t  five \r\n"  # a Unicode line separator, spaces, CRLF
        b"\tnothing before"  # an empty sentence, and no newline at the end
    )
    (place / "STS.gs.headlines.txt").write_bytes(b"4\n\n2.5\r\n0\n")
    for subset in SUBSETS["STS16"]:
        if subset != "headlines":
            (place / f"STS.input.{subset}.txt").write_text("")
            (place / f"STS.gs.{subset}.txt").write_text("")
    pairs = load_sts(folder, "STS16")
    assert pairs.first == ['"one quote', "café x", ""]
    assert pairs.second == ["two", "five", "nothing before"]
    assert pairs.scores == [4.0, 2.5, 0.0]


def test_sts_benchmark_takes_nine_columns_quotes_and_empty_scores(folder: Path) -> None:
    path = folder / "STS" / "STSBenchmark" / "sts-dev.csv"
    path.write_bytes(
        b'g\tf\ty\t1\t4.5\the said "no\tshe said no"\tlicence\tsource\r\n'
        b"g\tf\ty\t2\t\ta\tb\n\ng\tf\ty\t3\t1\tc\td\n"
    )
    pairs = load_sts(folder, "STSBenchmark-dev")
    assert pairs == (['he said "no', "c"], ['she said no"', "d"], [4.5, 1.0])


@needs_sts
@pytest.mark.parametrize("name", PAIRS)
def test_pair_counts_of_the_real_sets(name: str) -> None:
    for place in (STS, STS_RAW):
        pairs = load_sts(place, name)
        assert len(pairs.first) == len(pairs.second) == len(pairs.scores) == PAIRS[name]
        assert all(0 <= score <= 5 for score in pairs.scores)
        assert all(pairs.first)
        assert all(pairs.second)


@pytest.mark.parametrize(
    ("file", "content", "name", "words"),
    [
        (
            "STS/STS14-en-test/STS.gs.images.txt",
            b"1\n2\n3\n",
            "STS14",
            r"images.txt: expected 4 lines .* got 3$",
        ),
        ("STS/STS14-en-test/STS.gs.images.txt", b"1\nx\n3\n4\n", "STS14", r"images.txt, line 2: .* got 'x'$"),
        (
            "STS/STS14-en-test/STS.gs.images.txt",
            b"1\n2\n5.01\n4\n",
            "STS14",
            r"images.txt, line 3: expected a gold score from 0 to 5, got '5.01'$",
        ),
        ("SICK/SICK_trial.txt", b"1\ta\tb\t-1\n", "SICK-R-dev", r"line 1: .* from 0 to 5, got '-1'$"),
        (
            "STS/STS14-en-test/STS.gs.images.txt",
            b"1\nnan\n3\n4\n",
            "STS14",
            r"images.txt, line 2: .* got 'nan'$",
        ),
        (
            "STS/STS12-en-test/STS.input.MSRvid.txt",
            b"a\tb\nc\nd\te\nf\tg\n",
            "STS12",
            r"STS.input.MSRvid.txt, line 2: expected at least 2 columns between tabs, got 1$",
        ),
        (
            "STS/STSBenchmark/sts-test.csv",
            b"g\tf\ty\t1\t4.5\ta\tb\ng\tf\ty\t1\t4.5\ta b\n",
            "STSBenchmark-test",
            r"sts-test.csv, line 2: expected at least 7 columns between tabs, got 6$",
        ),
        (
            "SICK/SICK_trial.txt",
            b"1\ta\tb\n",
            "SICK-R-dev",
            r"SICK_trial.txt, line 1: .* at least 4 .* got 3$",
        ),
        (
            "SICK/SICK_train.txt",
            b"1\ta\tb\tmuch\n",
            "SICK-R-train",
            r"SICK_train.txt, line 1: .* got 'much'$",
        ),
        ("SICK/SICK_train.txt", b"1\ta\xff\tb\t2\n", "SICK-R-train", r"expected UTF-8 text, got byte 3"),
    ],
)
def test_malformed_files(file: str, content: bytes, name: str, words: str, folder: Path) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_sts(folder, name)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_folder_file_and_name(folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^sts_dir: expected a folder in SentEval's layout, got .*absent$"
    ):
        load_sts(folder / "absent", "STS12")
    for file, name in (
        ("STS/STS15-en-test/STS.gs.belief.txt", "STS15"),
        ("STS/STS15-en-test/STS.input.belief.txt", "STS15"),
        ("SICK/SICK_test_annotated.txt", "SICK-R-test"),
    ):
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=Path(file).name):
            load_sts(folder, name)
    with pytest.raises(ValueError, match=r"^name: expected one of STS12, .*, got 'STS17'$"):
        load_sts(folder, "STS17")


def test_sub_sets_are_told_apart(folder: Path) -> None:
    place = folder / "STS" / "STS13-en-test"
    (place / "STS.input.OnWN.txt").write_text("x\ty\n")
    (place / "STS.gs.OnWN.txt").write_text("2\n")
    parts = load_sts_subsets(folder, "STS13")
    assert list(parts) == list(SUBSETS["STS13"])
    assert parts["OnWN"] == (["x"], ["y"], [2.0])
    assert len(load_sts(folder, "STS13").scores) == 9
    assert list(load_sts_subsets(folder, "SICK-R-test")) == [""]


@pytest.fixture
def archive(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SentEval's archive as the hub's cache would have it, with files of another task."""
    path = tmp_path / "snapshots" / "abc123" / "senteval.tar"
    path.parent.mkdir(parents=True)
    (tmp_path / "other").write_text("a review")
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "STS", "downstream/STS")
        tar.add(folder / "SICK", "downstream/SICK")
        tar.add(tmp_path / "other", "downstream/MR/mr.txt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return path


def test_senteval_archive_of_the_hub(archive: Path, folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # unpacked, then found unpacked
        for name in ("STS12", "STSBenchmark-dev", "SICK-R-test"):
            assert load_sts("hub:senteval", name) == load_sts(folder, name)
        archive.write_bytes(b"no longer read")
    unpacked = tmp_path / "home" / "clusterns"
    assert [path.name for path in unpacked.iterdir()] == ["senteval-abc123"]
    assert sorted(path.name for path in (unpacked / "senteval-abc123").iterdir()) == ["SICK", "STS"]


def test_a_broken_archive_leaves_nothing_behind(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(b"not a tar file")
    with pytest.raises(ValueError, match=r"senteval.tar: expected a tar archive of SentEval's data"):
        load_sts("hub:senteval", "STS12")
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "other", "other.txt")
    with pytest.raises(
        ValueError, match=r"senteval.tar: expected SentEval's folders STS and SICK, got neither$"
    ):
        load_sts("hub:senteval", "STS12")
    assert list((tmp_path / "home" / "clusterns").iterdir()) == []


def test_mteb_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        rows = {"sentence1": ["a  b", "c"], "sentence2": ["d", "e"], "score": [1.5, 5], "year": ["x", "y"]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in sets_of("hub:mteb"):
        assert load_sts("hub:mteb", name) == (["a b", "c"], ["d", "e"], [1.5, 5.0])
    assert asked == [place for name, place in MTEB_DATASETS.items() if name != "STSBenchmark-train"]
    assert ("mteb/stsbenchmark-sts", "validation") in asked
    # Its SICK-R is all parts in one, which is no published test set.
    with pytest.raises(
        ValueError, match=r"^name: .* 'SICK-R-test', which mteb does not keep apart: .*SICK-R-all"
    ):
        load_sts("hub:mteb", "SICK-R-test")
    with pytest.raises(ValueError, match=r"^name: expected one of STS12, .* got 'STS17'$"):
        load_sts("hub:mteb", "STS17")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"sentence1": ["a"]})
    )
    with pytest.raises(ValueError, match=r"^mteb/sts12-sts: expected the columns .* got sentence1$"):
        load_sts("hub:mteb", "STS12")


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    for source, what in (("hub:mteb", "mteb/sts12-sts"), ("hub:senteval", "hub:senteval")):
        with pytest.raises(FileNotFoundError, match=rf"^sts_dir: expected {what} .*give a folder") as caught:
            load_sts(source, "STS12")
        assert "\n" not in str(caught.value)
