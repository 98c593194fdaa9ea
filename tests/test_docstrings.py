"""Sentences of installed packages: what is taken of a docstring, and what is held out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_files import cases

from clusterns.corpus.docstrings import (
    docstring_corpus,
    docstrings,
    summary_and_description,
)

NOUNS = "apple bridge candle desert engine forest garden harbor island jacket kettle ladder".split()
VERBS = "paints repairs carries measures watches follows".split()


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def write_packages(root: Path) -> Path:
    """A folder of packages whose 72 functions are each described in words of their own."""
    for noun in NOUNS:
        functions = [f'"""All the functions of the {noun} package are in here."""\nimport does_not_exist\n']
        for index, verb in enumerate(VERBS):
            other = NOUNS[(NOUNS.index(noun) + index + 1) % len(NOUNS)]
            functions.append(
                f"def {verb}(\n    first: int, second: int = 2\n) -> int:  # a comment\n"
                f'    """Return whether the {noun} still {verb} anybody.\n\n'
                f"    Nobody with one {other} minds how it {verb[:-1]}ed when that {noun} broke.  Some do.\n"
                f"\n    Parameters\n    ----------\n    first : int\n        Is one of the two numbers.\n\n"
                f'    >>> {verb}(1)\n    """\n    return 1\n'
            )
        (root / noun).mkdir(parents=True)
        (root / noun / "__init__.py").write_text("\n\n".join(functions))
    return root


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    return write_packages(tmp_path)


def test_nothing_held_out_is_trained_on(packages: Path) -> None:
    corpus = docstring_corpus(roots=[packages], pairs=9, progress=False)
    assert len(corpus.queries) == len(corpus.documents) == 9
    assert len(set(corpus.queries)) == len(set(corpus.documents)) == 9
    trained = {words(sentence) for sentence in corpus.sentences}
    assert len(trained) == len(corpus.sentences) == 12 * 13 - 18
    for query, document in zip(corpus.queries, corpus.documents, strict=True):
        assert not {words(query), words(document)} & trained
        noun, verb = re.search(r"the (\w+) still (\w+) anybody", query).groups()  # type: ignore[union-attr]
        assert f"it {verb[:-1]}ed when that {noun} broke." in document
    # Each of the 72 functions has two sentences that follow one another; 9 of them are held out.
    assert len(set(corpus.neighbours)) == len(corpus.neighbours) == 72 - 9
    assert {text for pair in corpus.neighbours for text in pair} <= set(corpus.sentences)
    assert not re.search(r"numbers|>>>|Some do", " ".join(corpus.sentences))  # parameters, code, short texts
    few = [docstring_corpus(40, roots=[packages], pairs=5, seed=seed, progress=False) for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2]
    assert len(few[0].sentences) == 40


def test_files_that_are_no_python_end_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b'def f(:\n    """Caf\xe9."""\n"""unclosed')
    assert list(docstrings(path)) == ["Caf\ufffd."]
    assert list(docstrings(tmp_path / "none.py")) == []


@cases(
    "text summary description",
    [
        ('One, e.g. this. Two\nof them. "Three"?', "One, e.g. this.", ["Two of them.", '"Three"?']),
        ("See :class:`~a.b.Name`, ``code`` and [a link](https://x.y).", "See a.b.Name, code and a link.", []),
        ("Sum.\n\nArgs:\n    x: A text.\n\nReturns:\n    It all.\n\nLast one.", "Sum.", ["Last one."]),
        ("Sum.\n\n:param x: A text.\n:returns: It.", "Sum.", []),
    ],
)
def test_summary_and_description(text: str, summary: str, description: list[str]) -> None:
    assert summary_and_description(text) == (summary, description)


def test_a_missing_root(tmp_path: Path) -> None:
    message = "roots: expected a folder with .*, got .*none"
    with pytest.raises(FileNotFoundError, match=message):
        docstring_corpus(roots=[tmp_path / "none"], progress=False)
