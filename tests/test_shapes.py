"""What files are read as: format, delimiter, header, columns; what is said of it, and what is refused."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clusterns.corpus.sources import load_rows

# Characters that str.splitlines() splits at and a text file does not.
NOT_NEWLINES = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
ROWS = [("One two.",), ("Three, four.",), ("NA",), ("Last",)]
AB = [("a",), ("b",)]
PAIRS = [("a", "b"), ("c", "d")]


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content, indent=2)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def told():
    """The warnings of a test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "One two.\n\n  Three, four.  \r\nNA\n \nLast"),
        ("bom.txt", "\ufeffOne two.\nThree, four.\nNA\nLast\n"),
        ("old-mac.txt", "One two.\rThree, four.\rNA\rLast\r"),
        ("a.csv", 'number,line\n1,One two.\n2,"Three, four."\n3,NA\n\n5,Last\n'),
        ("bom.csv", '\ufeffline\r\nOne two.\r\n"Three, four."\r\nNA\r\nLast\r\n'),
        ("a.tsv", "number\tline\n1\tOne two.\n2\tThree, four.\n3\tNA\n4\tLast\n"),
        ("old-mac.tsv", "number\tline\r1\tOne two.\r2\tThree, four.\r3\tNA\r4\tLast"),
        ("a.json", [{"line": text} for text in ("One two.", "Three, four.", "NA", "Last")]),
        ("lines.json", '{"line":"One two."}\n{"line":"Three, four."}\n\n{"line":"NA"}\n{"line":"Last"}\n'),
        ("a.jsonl", '{"line":"One two.","n":1}\n{"line":"Three, four."}\n{"line":"NA"}\n{"line":"Last"}'),
        ("odd name [1]*.TXT", "One two.\nThree, four.\nNA\nLast\n"),
    ],
)
def test_every_format_gives_the_trimmed_rows(
    tmp_path: Path, name: str, content: str, capfd: pytest.CaptureFixture[str], told: list
) -> None:
    path = write(tmp_path, name, content)
    assert list(load_rows(path)) == ROWS
    assert list(load_rows(str(path), limit=2)) == ROWS[:2]
    assert capfd.readouterr() == ("", "")
    assert told == []


SHAPES = [
    # Delimiters that the suffix does not promise.
    ("a.csv", "text;label\na;1\nb, c;0\n", [("a",), ("b, c",)], "csv parted by semicolon, header"),
    ("a.csv", "text\tlabel\na\t1\nb\t0\n", AB, "csv parted by tab, header"),
    (
        "a.csv",
        "text|label\na|1\nb|0\n",
        AB,
        "csv parted by bar, header; 'text' as sentences, not used: 'label'",
    ),
    ("a.tsv", "text,label\na,1\nb,0\n", AB, "tsv parted by comma, header"),
    (
        "a.csv",
        "text\na; b\nd\n",
        [("a; b",), ("d",)],
        "comma, header",
    ),
    # A header is told from a row.
    (
        "a.csv",
        "A man sat.\nA dog ran.\n",
        [("A man sat.",), ("A dog ran.",)],
        "csv parted by comma, no header",
    ),
    ("a.tsv", "1\ta\n0\tb\n", AB, "tsv parted by tab, no header; '2' as sentences, not used: '1'"),
    ("a.tsv", "what was said\thow\na\t1\nb\t0\n", AB, "header; 'what was said' as sentences"),
    ("a.csv", ",0\n0,a\n1,b\n", AB, "header; '0' as sentences, not used: '1'"),  # of pandas, with its index
    ("a.csv", "Sentence1, SENTENCE2 \na,b\nc,d\n", PAIRS, "header; 'Sentence1' and 'SENTENCE2' as pairs"),
    # Quotes between tabs.
    ("a.tsv", 'text\n"Unclosed quote\nNext one\n', [('"Unclosed quote',), ("Next one",)], "by tab, header"),
    ("a.tsv", 'text\n"a"\nb\n', [('"a"',), ("b",)], "tsv parted by tab, header"),
    ("a.tsv", 'text\tn\n"a ""b"""\t1\nc\t2\n', [('a "b"',), ("c",)], "tsv parted by tab, quoted, header"),
    ("a.tsv", 'text\tn\n"a\tb"\t1\n"c\nd"\t2\n', [("a\tb",), ("c\nd",)], "tsv parted by tab, quoted, header"),
    ("a.tsv", '"text"\n"a"\n"b"\n', AB, "tsv parted by tab, quoted, header"),
    # Forms of json.
    ("a.json", {"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, AB, "json, the list 'data'"),
    ("a.json", '{"data": [{"text": "a"}, {"text": "b"}]}', AB, "json, the list 'data'"),
    ("a.json", {"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}, AB, "json, columns"),
    ("a.json", {"text": ["a", "b"], "n": [1, 2]}, AB, "json, columns"),
    ("a.json", {"0": {"text": "a"}, "1": {"text": "b"}}, AB, "json, objects by number"),
    (
        "a.json",
        {"columns": ["n", "text"], "index": [0, 1], "data": [[1, "a"], [2, "b"]]},
        AB,
        "pandas' split",
    ),
    ("a.json", ["a", "b"], AB, "json, a list; 'text' as sentences"),
    ("a.json", {"text": "a"}, AB[:1], "json, one object; 'text' as sentences; 1 row"),
    ("a.jsonl", '[{"text": "a"}, {"text": "b"}]', AB, "jsonl, a list"),
    ("a.jsonl", '{"text": "a"}{"text": "b"}\n', AB, "jsonl, objects one by one"),
    ("a.jsonl", '{\n"text": "a"\n}\n{\n"text": "b"\n}\n', AB, "jsonl, objects one by one"),
    # Columns of objects are those of all of the first ones.
    (
        "a.jsonl",
        '{"anchor": "a", "positive": "b", "negative": ["x"]}\n'
        '{"positive": "d", "anchor": "c", "negative": "y"}\n',
        [("a", "b", "x"), ("c", "d", "y")],
        "'anchor' and 'positive' as pairs, 'negative' as hard negatives; 2 rows",
    ),
    (
        "a.jsonl",
        '{"n": 1}\n' * 3 + '{"text": "a"}\n{"text": "b"}\n',
        AB,
        "left out: 3 with a blank text (line 1; line 2)",
    ),
    # As Excel and pandas write them.
    ("a.csv", "sep=;\nid;Größe\n1;a\n2;b\n", AB, "csv parted by semicolon, as its first line says, header"),
    ("a.csv", "No;Day;Comment\n1;2024-01-02;a\n2;03.02.2024;b\n", AB, "not used: 'No', 'Day'"),
    ("a.csv", "0\na\nb\n", AB, "header; '0' as sentences"),
    ("a.csv", 'text\na\n""\nb\n', AB, "2 rows; left out: 1 with a blank text (line 3)"),
    ("a.txt", "a\n\u200b\nb\n", AB, "left out: 1 with a blank text (line 2)"),
    # A label beside one text is no matter.
    ("a.csv", "label,headline\n1,a\n0,b\n", AB, "'headline' as sentences, not used: 'label'"),
    ("a.csv", "sentence1,sentence2,source,id\na,b,web,7\nc,d,web,7\n", PAIRS, "not used: 'source', 'id'"),
]


@pytest.mark.parametrize(("name", "content", "rows", "account"), SHAPES)
def test_the_shape_is_found_and_said(tmp_path: Path, name: str, content, rows: list, account: str) -> None:
    path = write(tmp_path, name, content)
    found = load_rows(path)
    assert list(found) == rows
    assert account in found.account
    assert found.account.startswith(f"{path}: ")
    assert load_rows(path).account == found.account  # from the cache


@pytest.mark.parametrize(
    ("name", "content", "options", "rows"),
    [
        ("a.txt", "a\tb\nc\td\ne\tf\n", {"delimiter": "none"}, [("a\tb",), ("c\td",), ("e\tf",)]),
        ("a.txt", "a\tb\nc\td\n", {"delimiter": "tab", "columns": "1,2"}, PAIRS),
        ("a.txt", "a\tb\nc\td\n", {"delimiter": "\\t", "columns": "2"}, [("b",), ("d",)]),
        ("a.txt", "sent0~sent1\na~b\nc~d\n", {"delimiter": "~"}, PAIRS),
        ("a.csv", "text\na, b\nc\n", {"delimiter": "none"}, [("a, b",), ("c",)]),
        ("a.csv", "x,y;z\na,b;0\nc,d;1\n", {"delimiter": "comma", "columns": "x"}, [("a",), ("c",)]),
        ("a.csv", "a,b\nc,d\n", {"header": False, "columns": "1,2"}, PAIRS),
        ("a.csv", "a,b\nc,d\n", {"columns": "1,2"}, PAIRS),  # numbers say that there is no header
        ("a.csv", "A sentence.,x\na,b\nc,d\n", {"header": True, "columns": "A sentence.,x"}, PAIRS),
        ("a.txt", "name\na\nb\n", {"header": True}, AB),
        ("a.csv", "first one, second \na,b\nc,d\n", {"columns": "first one,second"}, PAIRS),
        ("a.csv", '"one, two",x\na,b\nc,d\n', {"columns": '"one, two"'}, [("a",), ("c",)]),
        ("a.csv", "one.two,x\na,b\nc,d\n", {"columns": ["one.two"]}, [("a",), ("c",)]),
        ("a.jsonl", '["a", "b"]\n["c", "d"]\n', {"columns": "1,2"}, PAIRS),
        ("a.csv", "x,n\na,1\nb,2\n", {"columns": "n"}, [("1",), ("2",)]),
        ("a.csv", "question,answer\na,b\nc,d\n", {"columns": [1, 2]}, PAIRS),  # numbers, and a plain header
        ("a.csv", "Gro\u0308\u00dfe,n\na,1\nb,2\n", {"columns": "GR\u00d6SSE"}, AB),
        ("a.csv", "sent0,sent1,hard_neg\na,b,\nc,d,e\n", {"columns": "sent0,sent1"}, PAIRS),
    ],
)
def test_what_is_told_decides(tmp_path: Path, name: str, content: str, options: dict, rows: list) -> None:
    assert list(load_rows(write(tmp_path, name, content), **options)) == rows


def test_doubt_is_said(tmp_path: Path, told: list) -> None:
    path = write(tmp_path, "a.csv", "left\na\nb\n")
    rows = load_rows(path)
    assert list(rows) == AB
    assert "header in doubt" in rows.account
    (warning,) = told
    assert str(warning.message) == (
        f"{path}: the first line ('left') is taken for a header; --header or --no-header (header=True or "
        "False) decides"
    )
    assert warning.filename == __file__
    told.clear()
    assert load_rows(path, header=True).account.endswith("header; 'left' as sentences; 2 rows")
    assert list(load_rows(path, header=False)) == [("left",), *AB]
    assert told == []
    path = write(tmp_path, "a.txt", "left\tright\na\tb\n")  # which has no header by its nature
    refuses(path, "1 (text), 2 (text) (txt parted by tab, no header in doubt)", delimiter="tab")
    assert "is taken for a row" in str(told[0].message)


def test_parquet(tmp_path: Path) -> None:
    texts = ["One two.", " Three, four.", "NA", None, "Last"]
    columns = {"line": texts, "n": [1, 2, 3, 4, 5]}
    for name, column in {
        "plain": texts,
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "categories": pyarrow.array(texts).dictionary_encode(),
        "lists": [text and [text] for text in texts],
    }.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({**columns, "line": column}), path, row_group_size=2)
        with pytest.warns(UserWarning, match=r"1 of 5 rows are left out, 1 with a blank line \(row 4\)"):
            rows = load_rows(path)
        assert list(rows) == ROWS
        assert rows.account == (
            f"{path}: parquet; 'line' as sentences, not used: 'n'; 4 rows; left out: 1 with a blank line "
            "(row 4)"
        )


def test_only_a_newline_ends_a_sentence(tmp_path: Path) -> None:
    lines = [f"before{char}after" for char in NOT_NEWLINES]
    assert list(load_rows(write(tmp_path, "a.txt", "\n".join(lines)))) == [(line,) for line in lines]
    path = write(tmp_path, "b.txt", "a\rb\nc\n")  # a CR is white space where a newline ends lines
    assert list(load_rows(path)) == [("a\rb",), ("c",)]


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("sent0,sent1,hard_neg", "sent0,sent1,hard_neg"),
        ("hard_neg,sent1,other,sent0", "sent0,sent1,hard_neg"),
        ("sent0,sent1", "sent0,sent1"),
        ("anchor,positive,negative", "anchor,positive,negative"),
        ("sentence2,sentence1,source", "sentence1,sentence2"),
        ("premise,entailment,contradiction", "premise,entailment,contradiction"),
        ("title,text", "text"),
        ("title,sentence", "sentence"),
    ],
)
def test_usual_columns(tmp_path: Path, header: str, chosen: str) -> None:
    names = header.split(",")
    path = write(tmp_path, "a.csv", header + "\n" + ",".join(f"the {name}" for name in names) + "\n")
    rows = load_rows(path)
    assert rows.columns == tuple(chosen.split(","))
    assert list(rows) == [tuple(f"the {name}" for name in chosen.split(","))]


DUPLICATES = "sentence1,sentence2,is_duplicate\na,b,1\nx,y,0\nc,d,1\n"


@pytest.mark.parametrize(
    ("name", "content", "options", "reason"),
    [
        ("a.csv", DUPLICATES, {"positive_label": "1"}, "1 with is_duplicate other than 1 (line 3: '0')"),
        ("a.csv", DUPLICATES.replace("1\n", "true\n"), {"positive_label": "TRUE"}, "other than TRUE"),
        (
            "a.json",
            [{"text1": a, "text2": b, "gold": a != "x"} for a, b in [*PAIRS, ("x", "y")]],
            {"positive_label": "1"},
            "(object 3: False)",
        ),
        ("a.csv", "sent0,sent1, score\na,b,4\nx,y,0.5\nc,d,5\n", {"min_score": 4}, "with score below 4"),
        ("a.csv", "sent0,sent1,score\na,b,4\nx,y,\nc,d,5\n", {"min_score": 4}, "1 without a number in score"),
        (
            "a.csv",
            "premise,hypothesis,gold_label\na,b,entailment\nx,y,neutral\nc,d,entailment\n",
            {"positive_label": "entailment, duplicate", "columns": "premise,hypothesis"},
            "other than entailment, duplicate (line 3: 'neutral')",
        ),
        (
            "a.csv",
            "sent0,sent1,score,verdict\na,b,1,yes\nx,y,0,no\nc,d,1,yes\n",
            {"positive_label": "yes", "label_column": "verdict"},
            "with verdict other than yes",
        ),
    ],
)
def test_a_label_or_score_says_which_pairs_are_pairs(tmp_path: Path, name, content, options, reason) -> None:
    path = write(tmp_path, name, content)
    rows = load_rows(path, **options)
    assert list(rows) == PAIRS
    assert reason in rows.account
    assert rows.dropped == 1


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (DUPLICATES, "'is_duplicate' (1, 0)"),
        ("sentence1,sentence2,alike\na,b,0%\nc,d,95%\n", "'alike' (0%, 95%)"),
        ('sentence1,sentence2,alike\na,b,"0,5"\nc,d,"3,5"\n', "'alike' (0,5, 3,5)"),
        ("sentence1,sentence2,about\n" + "".join(f"a{i},b{i},class {i % 9}\n" for i in range(20)), "'about'"),
        ("sentence1,sentence2,gold\na,b,1\nc,d,2\n", "'gold' (1, 2)"),
        ("sentence1,sentence2, score\na,b,0.25\nc,d,0.5\n", "'score' (0.25, 0.5)"),
        ("sentence1,sentence2,how_alike\na,b,0.25\nc,d,0.5\n", "'how_alike'"),
        ("sentence1,sentence2,same\na,b,1\nc,d,0\ne,f,1\n", "'same' (1, 0)"),
        ("sentence1,sentence2,same\n" + "a,b,1\n" * 1200 + "c,d,0\n", "'same' (1)"),
        ("sent0,sent1,verdict\n" + "a,b,yes\nc,d,no\nx,y,yes\n" * 2, "'verdict' (yes, no)"),
        ("sent0,sent1,hard_neg,label\na,b,c,1\nd,e,f,0\n", "'label' (1, 0)"),
    ],
)
def test_pairs_beside_a_label_are_refused(tmp_path: Path, content: str, label: str) -> None:
    path = write(tmp_path, "a.csv", content)
    refuses(path, f"only some by {label}", "--positive-label LABEL or --min-score NUMBER", "any all")
    count = content.count("\n") - 1
    assert len(load_rows(path, positive_label="any")) == count
    names = content.split(",")[:2]
    refuses(path, "could all be pairs", columns=names)
    path.write_text(content.partition("\n")[2], encoding="utf-8")
    if label not in ("'gold' (1, 2)", "'label' (1, 0)"):  # which are so by their names alone
        refuses(path, "could all be pairs", columns=[1, 2], header=False)


def test_labels_in_the_wrong_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", DUPLICATES)
    refuses(
        path,
        "none, left out: 3 with is_duplicate other than yes (line 2: '1'; line 3: '0')",
        positive_label="yes",
    )
    with pytest.raises(ValueError, match="--min-score: expected none with --positive-label, got both"):
        load_rows(path, positive_label="1", min_score=1)
    with pytest.raises(
        ValueError, match="expected a column 'verdict', got sentence1, sentence2, is_duplicate"
    ):
        load_rows(path, positive_label="1", label_column="verdict")
    plain = write(tmp_path, "b.csv", "sent0,sent1\na,b\n")
    with pytest.raises(ValueError, match="--label-column: .*, one of none, got none that looks like it"):
        load_rows(plain, min_score=1)


def refuses(path: Path, *parts: str, **options: object) -> None:
    with pytest.raises(ValueError, match=": expected|: could be|could all be") as caught:
        load_rows(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "", "empty file"),
        ("a.csv", "", "empty file"),
        ("a.parquet", "", "empty file"),
        ("a.txt", " \n\n\t\r\n", "only blank lines"),
        ("a.csv", "\n\n", "only blank lines"),
        ("a.jsonl", "\ufeff\n", "only blank lines"),
        ("a.csv", "sep=;\n", "no rows"),
        ("a.csv", "text\n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", 'text,n\n"",1\n" ",2\n', "none, left out: 2 with a blank text (line 2; line 3)"),
        ("a.jsonl", '{"text": null}\n{"text": " "}\n', "2 with a blank text"),
        ("a.txt", b"abc\0def\n", "binary"),
        ("a.txt", "two words\n".encode("utf-16"), "got UTF-16: save it as UTF-8"),
        ("a.txt", "two words\n".encode("utf-16-le"), "binary"),
        ("a.csv", b"PK\x03\x04 and more", "got a zip file, as an Excel workbook is one"),
        ("a.jsonl", b"\x1f\x8b and more", "got a gzip file"),
        ("a.txt", b"fine\ncaf\xe9 au lait\n", "line 2: expected UTF-8"),
        ("a.csv", b"text\nfine\ncaf\xe9\n", "line 3: expected UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1: expected UTF-8"),
        ("a.json", b'[{"text": "caf\xe9"}]\n', "UTF-8"),
        ("a.txt", b"cut short \xe2\x82", "UTF-8"),
        (
            "a.csv",
            "text,n\na,1\nb,2,3\n",
            "line 3: expected a well-formed csv file parted by comma, 2 fields",
        ),
        ("a.csv", "text,n\na,1\nb\n", "line 3: expected a well-formed csv file parted by comma, 2 fields"),
        ("a.tsv", "text\tn\na\t1\nb\n", "line 3: expected a well-formed tsv file parted by tab, 2 fields"),
        ("a.csv", 'text,n\n"two\nlines",1\nb,2,3\n', "line 4"),
        ("a.csv", "text\nwell, unquoted\n", "well-formed csv"),
        ("a.csv", 'text\n"never closed\nb\n', "well-formed csv"),
        ("a.csv", 'text,n\n"closed" early,1\n', "line 2: expected a well-formed csv"),
        ("a.csv", "text,text\na,b\n", "different names"),
        ("a.csv", "n\n1\n2\n", "column of text"),
        ("a.csv", "left,right\na,b\n", "left (text), right (text) (csv parted by comma, header in doubt)"),
        ("a.tsv", "sport\ta\nart\tb\nsport\tc\n", "1 (text), 2 (text) (tsv parted by tab, no header)"),
        (
            "a.csv",
            "a,b;c\nd,e;f\ng,h;i\n",
            "2 columns parted by comma or 2 columns parted by semicolon; --delim",
        ),
        (
            "a.txt",
            "a\tb\nc\td\ne\tf\n",
            "could be a sentence a line, or 2 columns parted by tab; --delimiter none",
        ),
        (
            "a.txt",
            "text,label\na,1\nb,0\n",
            "or 2 columns parted by comma; --delimiter none or --delimiter comma",
        ),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n', "could be sentences or json; a name that ends in .jsonl"),
        ("a.json", '[{"text": "a"}, {"text": ', "well-formed json"),
        ("a.json", '"a"', "expected a list of objects"),
        (
            "a.json",
            {"train": [{"text": "a"}], "test": [{"text": "b"}]},
            "several lists of objects: 'train', 'test'",
        ),
        ("a.json", {"text": ["a", "b"], "n": [1]}, "got an object: 'text', 'n'"),
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2: expected a well-formed jsonl"),
        ("a.jsonl", 'not json\n{"text": "a"}\n', "line 1: expected a well-formed jsonl"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2: expected an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "one text in each row of 'text', got int"),
        ("a.jsonl", '{"text": "a"}\n' * 2000 + '{"text": 3}\n', "line 2001: expected text in column 'text'"),
        (
            "a.jsonl",
            '{"title": "a", "text": ["b", "c"]}\n' * 2,
            "'text', got lists of up to 2; --text-columns title",
        ),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": "b", "negative": ["c", "d"]}\n' * 2,
            "'negative', got lists of up to 2; --text-columns anchor,positive leaves it out",
        ),
        (
            "a.jsonl",
            '{"text": "a", "text": "b"}\n{"text": "c"}\n',
            "line 1: expected a well-formed jsonl file, got an object that has 'text' twice",
        ),
        ("a.jsonl", '{"text": "a"},\n{"text": "b"},\n', "(a comma between values of a line each)"),
        ("a.json", "[" * 5000 + "]" * 5000, "got values nested too deep"),
        (
            "a.csv",
            'text,n\na,1\n"b,2\nc,3\n',
            "got unexpected end of data in what began in line 3",
        ),
        (
            "a.csv",
            "I came, I saw.\nHe ran, he fell.\nWe sat, we ate.\n",
            "--delimiter none takes a sentence a line",
        ),
        ("a.jsonl", '{"text": "\\ud800"}\n', "lone surrogate"),
        ("a.parquet", "PAR1 and no more of it", "well-formed parquet"),
        ("a.xlsx", "a sentence\n", "suffix of .txt"),
        ("suffixless", "a sentence\n", "got none"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is taken for a header")
def test_bad_files_give_one_line(
    tmp_path: Path, name: str, content: object, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refuses(write(tmp_path, name, content), expected)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": 2}, "columns: expected names in a list or joined by commas, got 2"),
        ({"columns": {"a"}}, "columns: expected names in a list"),
        ({"min_score": "0.5"}, "min_score: expected a finite number, got str"),
        ({"min_score": float("nan")}, "min_score: expected a finite number, got nan"),
        ({"header": "no"}, "header: expected a word, got str 'no'"),
        ({"delimiter": 9}, "delimiter: expected a word, got int 9"),
        ({"positive_label": ["1"]}, "positive_label: expected a word, got list"),
    ],
)
def test_arguments_of_other_types(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        load_rows(write(tmp_path, "a.csv", DUPLICATES), **options)


def test_sources_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for source, kind, words in (
        (tmp_path / "pipe.txt", ValueError, "got a pipe or device, which is read twice: save it as a file"),
        (tmp_path / "loop.txt", FileNotFoundError, "a link that leads nowhere"),
        ("https://example.org/a.csv", ValueError, "got an address, which is not read: download it"),
        (" ", ValueError, "got an empty name"),
        (["a.txt"], TypeError, "source: expected the name of a file or dataset, got list"),
        ("~no-such-user/a.txt", ValueError, "source: expected the home folder of a user that exists"),
    ):
        with pytest.raises(kind, match=words):
            load_rows(source)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            'id,text\n1,a\n2,"b\n3,c\n4,d"\n5,e\n',
            "1 of 3 are rows with a line end within (line 5); was a quote never closed?",
        ),
        ("a.csv", 'text,n\n"a\nb",1\n"c\nd",2\n', None),
        ("a.txt", "a\rb\nc\n", None),
        (
            "a.csv",
            "sent0,sent1\na,b\nc,NULL\nd,NaN\n",
            "2 of 3 are rows that read NaN, NULL or the like (line 3; line 4)",
        ),
        ("a.csv", "sent0,sent1\na,a\nc,d\n", "1 of 2 are rows with one text twice (line 2)"),
    ],
)
def test_odd_rows_are_kept_and_said(
    tmp_path: Path, told: list, name: str, content: str, words: str | None
) -> None:
    path = write(tmp_path, name, content)
    rows = load_rows(path)
    assert "among them" in rows.account
    assert rows.dropped == 0
    assert [str(warning.message) for warning in told] == ([f"{path}: {words}"] if words else [])
    assert load_rows(path).odd == rows.odd  # from the cache


def test_bad_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "sent0,sent1,n\na,b,1\nc,d,2\n")
    refuses(path, "column 'sent2'", "sent0, sent1, n (csv parted by comma, header)", columns="sent0,sent2")
    for columns in ("sent0,sent1,n,n", []):
        with pytest.raises(ValueError, match="columns: expected one to three, got [40]"):
            load_rows(path, columns=columns)
    with pytest.raises(ValueError, match="delimiter: expected comma, .* or a character, got 'commas'"):
        load_rows(path, delimiter="commas")
    lines = write(tmp_path, "a.jsonl", '{"text": "a"}\n')
    for option in ({"delimiter": "tab"}, {"header": False}):
        with pytest.raises(ValueError, match="a.jsonl, which has none, got "):
            load_rows(lines, **option)
    table = pyarrow.table({"text": ["a"], "score": [1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refuses(tmp_path / "a.parquet", "text in column 'score', got double", columns="text,score")


def test_rows_left_out_are_counted_told_and_warned_of(tmp_path: Path, told: list) -> None:
    path = write(tmp_path, "a.csv", "sent0,sent1,hard_neg\na,b,c\n ,c,d\nd,e,\ne,f,\n,,\n")
    rows = load_rows(path)
    assert list(rows) == [("a", "b", "c")]
    assert rows.dropped == 4
    left_out = "2 with a blank sent0 (line 3; line 6), 2 with a blank hard_neg (line 4; line 5)"
    assert rows.account == (
        f"{path}: csv parted by comma, header; 'sent0' and 'sent1' as pairs, 'hard_neg' as hard negatives; "
        f"1 row; left out: {left_out}"
    )
    (warning,) = told
    assert str(warning.message) == (
        f"{path}: 4 of 5 rows are left out, {left_out}; --text-columns sent1 takes them"
    )
    told.clear()
    # Two in a hundred are said, and no warning.
    rows = load_rows(write(tmp_path, "b.csv", "text,n\n" + "a,1\n" * 98 + ",2\n" * 2))
    assert (len(rows), rows.dropped, told) == (98, 2, [])
    assert "left out: 2 with a blank text (line 100; line 101)" in rows.account
    assert load_rows(path, columns="sent0", limit=1).account.endswith(
        "header, the first 1 rows at most; 'sent0' as sentences, not used: 'sent1', 'hard_neg'; 1 row"
    )
