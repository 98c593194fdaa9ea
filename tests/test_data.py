from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from clusterns.data import load_sentences, sentence_batches

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
# Characters that str.splitlines() splits at and a text file does not.
NOT_NEWLINES = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def one_line(caught: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "One two.\n\n  Three, four.  \r\nNA\n \nLast"),
        ("bom.txt", "\ufeffOne two.\nThree, four.\nNA\nLast\n"),
        ("a.csv", 'number,line\n1,One two.\n2,"Three, four."\n3,NA\n4,\n5,Last\n'),
        ("bom.csv", '\ufeffline\nOne two.\n"Three, four."\nNA\nLast\n'),
        ("a.tsv", "number\tline\n1\tOne two.\n2\tThree, four.\n3\tNA\n4\tLast\n"),
        ("a.json", json.dumps([{"line": text} for text in ("One two.", "Three, four.", "NA", "", "Last")])),
        (
            "a.jsonl",
            '{"line":"One two."}\n{"line":"Three, four."}\n{"line":"NA"}\n{"line":null}\n{"line":"Last"}',
        ),
        ("odd name [1]*.TXT", "One two.\nThree, four.\nNA\nLast\n"),
    ],
)
def test_every_format_gives_the_trimmed_sentences(
    tmp_path: Path, name: str, content: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, content)
    assert load_sentences(path) == ["One two.", "Three, four.", "NA", "Last"]
    assert load_sentences(str(path), limit=2) == ["One two.", "Three, four."]
    assert capfd.readouterr() == ("", "")


def test_only_a_newline_ends_a_sentence(tmp_path: Path) -> None:
    lines = [f"before{char}after" for char in NOT_NEWLINES]
    assert load_sentences(write(tmp_path / "a.txt", "\n".join(lines))) == lines


def test_a_lone_quote_in_a_tsv_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\n"Unclosed quote\nNext one\n')
    assert load_sentences(path) == ['"Unclosed quote', "Next one"]


def test_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "sent0,sent1,score\na,b,1\nc,d,2\n")
    assert load_sentences(path) == ["a", "c"]
    assert load_sentences(path, column="sent1") == ["b", "d"]
    with pytest.raises(ValueError, match="column") as caught:
        load_sentences(path, column="sent2")
    one_line(caught, str(path), "'sent2'", "sent0, sent1, score")
    with pytest.raises(ValueError, match="strings in column 'score', got") as caught:
        load_sentences(path, column="score")
    one_line(caught, str(path))
    with pytest.raises(ValueError, match="name it with column") as caught:
        load_sentences(write(tmp_path / "b.csv", "left,right\na,b\n"))
    one_line(caught, "b.csv", "left (strings), right (strings)")


def test_an_edited_file_is_read_anew_and_no_cache_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = write(tmp_path / "a.txt", "first\n")
    stamp = path.stat()
    assert load_sentences(path) == ["first"]
    write(path, "other\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load_sentences(path) == ["other"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "", "empty file"),
        ("a.csv", "", "empty file"),
        ("a.txt", " \n\n\t\r\n", "only blank lines"),
        ("a.csv", "text\n", "no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "text (Json)"),
        ("a.json", "[]", "no rows"),
        ("a.csv", 'text,n\n"",1\n" ",2\n', "only blank ones"),
        ("a.txt", b"abc\0def\n", "binary"),
        ("a.txt", "two words\n".encode("utf-16"), "binary"),
        ("a.txt", b"caf\xe9 au lait\n", "UTF-8"),
        ("a.txt", b"cut short \xe2\x82", "UTF-8"),
        ("a.csv", "text,n\na,1\nb,2,3\n", "line 3"),
        ("a.csv", "text\nwell, unquoted\n", "well-formed csv"),
        ("a.csv", 'text\n"never closed\nb\n', "well-formed csv"),
        ("a.json", '[{"text": "a"}, {"text": ', "well-formed json"),
        ("a.jsonl", '{"text": "a"}\nnot json\n', "well-formed jsonl"),
        ("a.csv", "n\n1\n2\n", "column of strings"),
        ("a.parquet", "PAR1", "suffix"),
        ("suffixless", "a sentence\n", "suffix"),
    ],
)
def test_bad_files_give_one_line(
    tmp_path: Path, name: str, content: str | bytes, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=r".") as caught:
        load_sentences(path)
    one_line(caught, str(path), expected)
    assert capfd.readouterr() == ("", "")


def test_missing_and_wrong_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (tmp_path / "none.txt", "none.csv", "./none", "some/folder/none.jsonl"):
        with pytest.raises(FileNotFoundError, match="there is none") as caught:
            load_sentences(missing)
        one_line(caught, str(missing).removeprefix("./"))
    with pytest.raises(ValueError, match="folder") as folder:
        load_sentences(tmp_path)
    one_line(folder, str(tmp_path))
    with pytest.raises(ValueError, match="limit: expected at least 1 sentence, got 0"):
        load_sentences("any.txt", limit=0)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="dataset on the hub") as offline:
        load_sentences("nobody/no-such-dataset")
    one_line(offline, "nobody/no-such-dataset")


def test_real_files() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    path = SHARED / "wiki_sentences.txt"
    lines = path.read_bytes().decode().split("\n")
    assert load_sentences(path) == [line.strip() for line in lines if line.strip()]
    triplets = SHARED / "snli_triplets.csv"
    first, second = load_sentences(triplets), load_sentences(triplets, column="sent1")
    assert len(first) == len(second) == 27_195
    assert first[0] != second[0]


def batches_of(count: int, size: int, **options: int) -> list[list[str]]:
    return list(sentence_batches([str(i) for i in range(count)], batch_size=size, tokenize=list, **options))


def test_an_epoch_holds_every_sentence_at_most_once_in_whole_batches() -> None:
    batches = batches_of(103, 10)
    assert [len(batch) for batch in batches] == [10] * 10
    assert len({text for batch in batches for text in batch}) == 100
    assert batches_of(7, 7)[0] != [str(i) for i in range(7)]


def test_seed_and_epoch_fix_the_order_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = batches_of(64, 8, seed=3, epoch=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert batches_of(64, 8, seed=3, epoch=2) == first
    others = [batches_of(64, 8, seed=seed, epoch=epoch) for seed, epoch in ((3, 1), (2, 2), (2, 3), (4, 1))]
    assert all(other != first for other in others)


def test_a_loader_repeats_its_pass_and_tokenizes() -> None:
    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        return {"length": torch.tensor([len(text) for text in texts])}

    loader = sentence_batches(["a", "bb", "ccc", "dddd"], batch_size=2, tokenize=tokenize, seed=5)
    passes = [torch.cat([batch["length"] for batch in loader]) for _ in range(2)]
    assert len(loader) == 2
    assert torch.equal(passes[0], passes[1])
    assert passes[0].sort().values.tolist() == [1, 2, 3, 4]


def test_workers_give_the_same_batches() -> None:
    assert batches_of(20, 4, seed=1, num_workers=1) == batches_of(20, 4, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, "sentences: expected at least batch_size 5 of them, got 4"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2, "seed": -1}, "seed: expected at least 0, got -1"),
        ({"batch_size": 2, "epoch": -1}, "epoch: expected at least 0, got -1"),
    ],
)
def test_bad_batch_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sentence_batches(list("abcd"), tokenize=list, **options)
