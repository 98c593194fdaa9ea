"""What files are read as: format, delimiter, header, columns, labels; what is said of it, and refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_files import cases, refuses, write

from clusterns.corpus.judged_files import load_judged
from clusterns.corpus.sources import load_rows

# Characters that str.splitlines() splits at and a text file does not.
LINES = [f"before{char}after" for char in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
AB, PAIRS, TRIPLET = [("a",), ("b",)], [("a", "b"), ("c", "d")], [("a", "b", "c")]
DUPLICATES = "sentence1,sentence2,is_duplicate\na,b,1\nx,y,0\nc,d,1\n"
VERDICTS = "sent0,sent1,score,verdict\na,b,1,yes\nx,y,0,no\nc,d,1,yes\n"

FORMATS = [
    ("a.txt", "One two.\n\n  Three, four.  \r\nNA\n \nLast"),
    ("a.csv", 'number,line\n1,One two.\n2,"Three, four."\n3,NA\n\n5,Last\n'),
    ("bom.csv", '\ufeffline\r\nOne two.\r\n"Three, four."\r\nNA\r\nLast\r\n'),
    ("a.json", [{"line": text} for text in ("One two.", "Three, four.", "NA", "Last")]),
    ("a.jsonl", '{"line":"One two.","n":1}\n{"line":"Three, four."}\n{"line":"NA"}\n{"line":"Last"}'),
]
ROWS = [("One two.",), ("Three, four.",), ("NA",), ("Last",)]

# A file, what is told of it, its rows, and words of the account of it.
READ = [
    *((name, content, {}, ROWS, "4 rows") for name, content in FORMATS),
    ("a.txt", "\n".join(LINES), {}, [(line,) for line in LINES], "a sentence a line"),
    # Delimiters that the suffix does not promise.
    # A header is told from a row.
    ("a.csv", "A man sat.\nA dog ran.\n", {}, [("A man sat.",), ("A dog ran.",)], "by comma, no header"),
    ("a.tsv", "1\ta\n0\tb\n", {}, AB, "tsv parted by tab, no header; '2' as sentences, not used: '1'"),
    ("a.csv", ",0\n0,a\n1,b\n", {}, AB, "header; '0' as sentences, not used: '1'"),  # pandas' index
    # Quotes between tabs.
    ("a.tsv", 'text\n"Unclosed\nNext\n', {}, [('"Unclosed',), ("Next",)], "by tab, header"),
    ("a.tsv", 'text\tn\n"a ""b"""\t1\nc\t2\n', {}, [('a "b"',), ("c",)], "by tab, quoted, header"),
    ("a.tsv", 'text\tn\n"a\tb"\t1\n"c\nd"\t2\n', {}, [("a\tb",), ("c\nd",)], "by tab, quoted, header"),
    # Forms of json; columns of objects are those of all of the first ones.
    ("a.json", {"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}, {}, AB, "json, columns"),
    ("a.json", ["a", "b"], {}, AB, "json, a list; 'text' as sentences"),
    ("a.jsonl", '{"text1": "a", "text2": ["b"]}\n{"text2": "d", "text1": "c"}\n', {}, PAIRS, "as pairs; 2"),
    # As Excel and pandas write them.
    ("a.csv", "sep=;\nid;Größe\n1;a\n2;b\n", {}, AB, "by semicolon, as its first line says, header"),
    ("a.csv", 'text\na\n""\nb\n', {}, AB, "2 rows; left out: 1 with a blank text (line 3)"),
    # Usual names of columns.
    ("a.csv", "hard_neg,sent1,other,sent0\nc,b,x,a\n", {}, TRIPLET, "'sent0' and 'sent1' as pairs, 'hard"),
    ("a.csv", "SENTENCE2, Sentence1 ,source,id\nb,a,web,7\nd,c,web,7\n", {}, PAIRS, "'source', 'id'"),
    # What is told decides.
    ("a.txt", "a\tb\nc\td\n", {"delimiter": "none"}, [("a\tb",), ("c\td",)], "a sentence a line"),
    ("a.txt", "sent0~sent1\na~b\nc~d\n", {"delimiter": "~"}, PAIRS, "parted by '~', header"),
    ("a.csv", "a,b\nc,d\n", {"columns": "1,2"}, PAIRS, "no header"),  # as numbers say
    ("a.csv", "sent0,sent1,hard_neg\na,b,\nc,d,e\n", {"columns": "sent0,sent1"}, PAIRS, "2 rows"),
    # A label or score says which pairs are pairs.
    ("a.csv", DUPLICATES.replace("1\n", "true\n"), {"positive_label": "1.0"}, PAIRS, "other than 1.0 (li"),
    ("a.csv", "sent0,sent1, score\na,b,4\nx,y,.5\nc,d,5\n", {"min_score": 4}, PAIRS, "1 with score below 4"),
    ("a.csv", VERDICTS, {"positive_label": "yes", "label_column": "verdict"}, PAIRS, "verdict other than y"),
]


@cases("name content options rows said", READ)
@pytest.mark.filterwarnings("error", "ignore:.*(rows are left out|taken for a row|a quote never closed)")
def test_a_file_is_read_and_said(tmp_path, capfd, name, content, options, rows, said) -> None:
    path = write(tmp_path, name, content)
    found = load_rows(path, **options)
    assert list(found) == rows
    assert said in found.account
    assert load_rows(path, **options).account == found.account  # from the cache
    first = load_rows(str(path), limit=1, **options)
    assert list(first) == rows[:1]
    assert "the first 1 rows at most" in first.account
    assert capfd.readouterr() == ("", "")


def test_doubt_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = write(tmp_path, "a.csv", "left\na\nb\n")
    assert "header in doubt; 'left' as sentences; 2 rows" in load_rows(path).account
    (warning,) = recwarn.list
    assert str(warning.message).startswith(f"{path}: the first line ('left') is taken for a header; --header")
    assert warning.filename == __file__


def test_parquet(tmp_path: Path) -> None:
    texts = ["One two.", " Three, four.", "NA", None, "Last"]
    path = tmp_path / "a.parquet"
    for column in (
        pyarrow.array(texts, pyarrow.large_string()),
        pyarrow.array(texts).dictionary_encode(),
        [text and [text] for text in texts],
    ):
        table = pyarrow.table({"line": column, "n": [1.0] * 5})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        with pytest.warns(UserWarning, match=r"1 of 5 rows are left out, 1 with a blank line \(row 4\)"):
            rows = load_rows(path)
        assert list(rows) == ROWS
        assert "parquet; 'line' as sentences, not used: 'n'; 4 rows; left out" in rows.account
    refuses(path, "text in column 'n', got double", columns="line,n")


@cases(
    "content label",
    [
        ("sentence1,sentence2,alike\na,b,0%\nc,d,95%\n", "'alike' (0%, 95%)"),
        ("sentence1,sentence2,gold\na,b,1\nc,d,2\n", "'gold' (1, 2)"),
        ("sent0,sent1,verdict\n" + "a,b,yes\nc,d,no\nx,y,yes\n" * 2, "'verdict' (yes, no)"),
    ],
)
def test_pairs_beside_a_label_are_refused(tmp_path: Path, content: str, label: str) -> None:
    path = write(tmp_path, "a.csv", content)
    refuses(path, f"only some by {label}", "--positive-label LABEL or --min-score NUMBER", "any all")
    assert len(load_rows(path, positive_label="any")) == content.count("\n") - 1
    refuses(path, "could all be pairs", columns=content.split(",")[:2])


@cases(
    "name content expected",
    [
        ("a.txt", "", "empty file"),
        ("a.csv", "text\n", "no rows"),
        ("a.txt", b"abc\0def\n", "binary"),
        ("a.txt", "two words\n".encode("utf-16"), "got UTF-16: save it as UTF-8"),
        ("a.csv", b"PK\x03\x04 and more", "got a zip file, as an Excel workbook is one"),
        ("a.csv", b"text\nfine\ncaf\xe9\n", "line 3: expected UTF-8"),
        ("a.csv", "text,n\na,1\nb,2,3\n", "line 3: expected a well-formed csv file parted by comma, 2 fi"),
        ("a.tsv", "text\tn\na\t1\nb\n", "line 3: expected a well-formed tsv file parted by tab, 2 fields"),
        ("a.csv", 'text,n\na,1\n"b,2\nc,3\n', "got unexpected end of data in what began in line 3"),
        ("a.csv", "a,b;c\nd,e;f\ng,h;i\n", "2 columns parted by comma or 2 columns parted by semicolon; --"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n', "could be sentences or json; a name that ends in .jsonl"),
        ("a.json", {"train": [{}], "test": [{"text": "b"}]}, "several lists of objects: 'train', 'test'"),
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2: expected a well-formed jsonl"),
        ("a.parquet", "PAR1 and no more of it", "well-formed parquet"),
    ],
)
def test_bad_files_give_one_line(tmp_path: Path, name: str, content: object, expected: str, capfd) -> None:
    refuses(write(tmp_path, name, content), expected)
    assert capfd.readouterr() == ("", "")


@cases(
    "options words",
    [
        ({"columns": "sentence1,sent2"}, r"a.csv: expected a column .sent2., got sentence1, .* \(csv part"),
        ({"min_score": float("nan")}, "min_score: expected a finite number, got nan"),
        ({"positive_label": "yes"}, r"none, left out: 3 with is_.* than yes \(line 2: '1'; line 3: '0'\)"),
        ({"positive_label": "1", "min_score": 1}, "--min-score: expected none with --positive-label"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        load_rows(write(tmp_path, "a.csv", DUPLICATES), **options)


def test_sources_that_are_no_files(tmp_path: Path) -> None:
    refuses(tmp_path, "got a folder")
    refuses("some/folder/none.jsonl", "there is none", kind=FileNotFoundError)
    refuses("https://example.org/a.csv", "got an address, which is not read: download it")
    refuses(write(tmp_path, "a.jsonl", '{"text": "a"}\n'), "which has none, got ", delimiter="tab")


@cases(
    "name content words",
    [
        ("a.csv", 'id,text\n2,"b\n3,c\n4,d"\n5,e\n', "1 of 2 are rows with a line end within (line 4); was"),
        ("a.csv", 'text,n\n"a\nb",1\n"c\nd",2\n', None),
        ("a.csv", "sent0,sent1\na,b\nc,NULL\nd,NaN\n", "2 of 3 are rows that read NaN, NULL or the like ("),
    ],
)
def test_odd_rows_are_kept_and_said(tmp_path: Path, recwarn, name: str, content: str, words) -> None:
    path = write(tmp_path, name, content)
    rows = load_rows(path)
    assert "among them" in rows.account
    assert rows.dropped == 0
    assert len(recwarn) == bool(words)
    assert all(str(warning.message).startswith(f"{path}: {words}") for warning in recwarn)
    assert load_rows(path).odd == rows.odd  # from the cache


def test_rows_left_out_are_counted_told_and_warned_of(tmp_path: Path, recwarn) -> None:
    path = write(tmp_path, "a.csv", "sent0,sent1,hard_neg\na,b,c\n ,c,d\nd,e,\ne,f,\n,,\n")
    rows = load_rows(path)
    assert list(rows) == TRIPLET
    assert rows.dropped == 4
    left_out = "2 with a blank sent0 (line 3; line 6), 2 with a blank hard_neg (line 4; line 5)"
    assert rows.account.endswith(f"; 1 row; left out: {left_out}")
    (warning,) = recwarn
    lost = f"{path}: 4 of 5 rows are left out, {left_out}; --text-columns sent1 takes them"
    assert str(warning.message) == lost
    # Two in a hundred are said, and no warning.
    rows = load_rows(write(tmp_path, "b.csv", "text,n\n" + "a,1\n" * 98 + ",2\n" * 2))
    assert (len(rows), rows.dropped, len(recwarn)) == (98, 2, 1)
    assert "left out: 2 with a blank text (line 100; line 101)" in rows.account


LABELLED = [("sport", "a b"), ("7", "c"), ("sport", "d")]
BY_NUMBER = {"columns": "1,2"}


@cases(
    "name content options account",
    [
        ("a.tsv", "sport\ta  b\r\n\n7\t\u2028 c \nsport\td", {}, "no header; '1' as labels, '2' as texts"),
        ("a.csv", "text,topic,category\na b,x,sport\nc,y,7\nd,z,sport\n", {}, "'category' as labels, 'text'"),
        ("a.csv", "a b;sport\nc;7\nd;sport\n", BY_NUMBER, "by semicolon"),
    ],
)
def test_labelled_texts(tmp_path: Path, name: str, content: object, options: dict, account: str) -> None:
    path = write(tmp_path, name, content)
    found = load_judged(path, **options)
    assert [found.classes[label] for label in found.labels] == [label for label, _ in LABELLED]
    assert found.texts == [text for _, text in LABELLED]
    assert account in found.account
    assert "; 3 rows of 2 classes" in found.account
    # Swapped columns without a header would score 100 %, as each text is a class of its own.
    rows = [f"text {i}\t{i % 3}" for i in range(12)]
    found = load_judged(write(tmp_path, "b.tsv", "\n".join(rows)))
    assert (found.texts[0], found.classes) == ("text 0", ["0", "1", "2"])


@cases(
    "content words",
    [
        ("1\ta\n1\tb\n", "expected at least two classes in '1', got only '1'"),
        ("label\ttext\na\tx\nb\ty\n", "labels that texts share in column 'label', got 2 different ones in 2"),
        ("".join(f"a{i % 8}\tc{i % 6}\n" for i in range(10)), "10 rows; --data-columns 1,2"),
    ],
)
def test_malformed_labelled_texts(tmp_path: Path, content: str | bytes, words: str) -> None:
    refuses(write(tmp_path, "texts.tsv", content), words, load=partial(load_judged, kind="labels"))


def test_unlabelled_rows_are_said(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "label\ttext\n1\ta\n2\tb\n\tc\n1\t \n1\td\n")
    with pytest.warns(UserWarning, match="2 of 5 rows are left out, 1 with a blank label .line 4., 1 with"):
        found = load_judged(path)
    assert found.texts == ["a", "b", "d"]
    left_out = "1 with a blank label (line 4), 1 with a blank text (line 5)"
    assert found.account.endswith(f"3 rows of 2 classes; left out: {left_out}")
