"""Labelled texts: which column is which, what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_files import cases, refuses, write

from clusterns.corpus.labelled import load_labelled_texts

LABELLED = [("sport", "a b"), ("7", "c"), ("sport", "d")]
OBJECTS = [{"label": label if label != "7" else 7, "text": text} for label, text in LABELLED]
BY_NUMBER = {"label_column": "2", "text_column": "1"}


@cases(
    "name content options account",
    [
        ("a.tsv", "sport\ta  b\r\n\n7\t\u2028 c \nsport\td", {}, "no header; '1' as labels, '2' as texts"),
        ("a.tsv", "label\ttext\nsport\ta b\n7\tc\nsport\td\n", {}, "'label' as labels, 'text' as texts"),
        ("a.txt", "sport\ta b\n7\tc\nsport\td\n", {}, "txt parted by tab, no header"),
        ("a.csv", "text,topic,category\na b,x,sport\nc,y,7\nd,z,sport\n", {}, "'category' as labels, 'text'"),
        ("a.csv", "a b;sport\nc;7\nd;sport\n", BY_NUMBER, "by semicolon"),
        ("a.csv", "one,two\na b,sport\nc,7\nd,sport\n", {"label_column": "two"}, "'two' as labels, 'one' as"),
        ("a.json", OBJECTS, {}, "json, a list"),
    ],
)
def test_labelled_texts(tmp_path: Path, name: str, content: object, options: dict, account: str) -> None:
    path = write(tmp_path, name, content)
    found = load_labelled_texts(path, **options)
    assert [found.classes[label] for label in found.labels] == [label for label, _ in LABELLED]
    assert found.texts == [text for _, text in LABELLED]
    assert found.classes == ["7", "sport"]
    assert account in found.account
    assert found.account.endswith("3 rows of 2 classes")


def test_numbers_beside_texts_are_the_labels(tmp_path: Path) -> None:
    """Swapped columns without a header score 100 % where each text is a class of its own."""
    rows = [f"text {i}\t{i % 3}" for i in range(12)]
    found = load_labelled_texts(write(tmp_path, "a.tsv", "\n".join(rows)))
    assert (found.texts[0], found.classes) == ("text 0", ["0", "1", "2"])


@cases(
    "content words",
    [
        ("1\ta\nb\n", "line 2: expected a well-formed tsv file parted by tab, 2 fields as in its first line"),
        ("1\ta\n", "expected at least two labelled texts, got 1"),
        ("1\ta\n1\tb\n", "expected at least two classes in '1', got only '1'"),
        (b"1\ta\n2\t\xff\n", "line 2: expected UTF-8 text"),
        ("label\tx\ty\n2\tb\te\n1\tc\td\n", "expected a name, as of label, x, y"),
        ("1 a\n2 b\n", "expected a label and a text in each line, got 1 a (tsv parted by tab"),
        ("label\ttext\na\tx\nb\ty\n", "labels that texts share in column 'label', got 2 different ones in 2"),
        ("".join(f"a{i}\tc{i % 6}\n" for i in range(10)), "10 rows; --label-column 2 --text-columns 1 swaps"),
    ],
)
def test_malformed_labelled_texts(tmp_path: Path, content: str | bytes, words: str) -> None:
    refuses(write(tmp_path, "texts.tsv", content), words, load=load_labelled_texts)


def test_unlabelled_rows_are_said(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "label\ttext\n1\ta\n2\tb\n\tc\n1\t \n1\td\n")
    with pytest.warns(UserWarning, match="2 of 5 rows are left out, 1 with a blank label .line 4., 1 with"):
        found = load_labelled_texts(path)
    assert found.texts == ["a", "b", "d"]
    left_out = "1 with a blank label (line 4), 1 with a blank text (line 5)"
    assert found.account.endswith(f"3 rows of 2 classes; left out: {left_out}")
