"""Sentences of installed packages: what is taken of a docstring, what is held out, and its score."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_files import cases

from clusterns.corpus.docstrings import (
    default_roots,
    docstring_corpus,
    docstrings,
    is_sentence,
    python_files,
    retrieval_score,
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


def test_repeated_and_trivial_pairs_are_not_held_out(packages: Path) -> None:
    twice = '    """Say the very same thing again.\n\n    Two functions have all this in common.\n    """\n'
    near = '    """Open the red door to the garden.\n\n    Opens the red door to the garden.\n    """\n'
    own = '    """Say the very same thing again.\n\n    But describe it in its own way.\n    """\n'
    functions = (f"def f{index}():\n{text}" for index, text in enumerate([twice, twice, near, own]))
    (packages / "more.py").write_text("".join(functions))
    draw = partial(docstring_corpus, roots=[packages], pairs=1_000, progress=False)  # a tenth is drawn
    drawn = {query for seed in range(25) for query in draw(seed=seed).queries}
    assert len(drawn) == 72
    assert not {"Say the very same thing again.", "Open the red door to the garden."} & drawn


def test_docstrings_as_the_parser_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "#!/usr/bin/env python\n# A licence.\n\n'''Module\n\n    text.'''\n"
        'class A:\n    """Class."""\n    x = """not one"""\n'
        'async def f(a={"k": 1}):\n\n    r"""Raw \\n one."""\n'
        'def g():\n    """Joined \\\n    line, \\"quoted\\", a \\\\ and \\d."""\n'
    )
    joined = 'Joined     line, "quoted", a \\ and \\d.'
    assert list(docstrings(path)) == ["Module\n\ntext.", "Class.", "Raw \\n one.", joined]
    path.write_bytes(b'def f(:\n    """Caf\xe9."""\n"""unclosed')
    assert list(docstrings(path)) == ["Caf\ufffd."]
    assert list(docstrings(tmp_path / "none.py")) == []


@cases(
    "text summary description",
    [
        ("Only a summary.", "Only a summary.", []),
        ("", "", []),
        ('One, e.g. this. Two\nof them. "Three"?', "One, e.g. this.", ["Two of them.", '"Three"?']),
        ("See :class:`~a.b.Name`, ``code`` and [a link](https://x.y).", "See a.b.Name, code and a link.", []),
        ("Sum.\n\nIt *is* **so**.", "Sum.", ["It is so."]),
        ("Sum.\n\nArgs:\n    x: A text.\n\nReturns:\n    It all.\n\nLast one.", "Sum.", ["Last one."]),
        ("Sum.\n\nNotes\n-----\nA note.\n\nSee Also\n--------\nother : Text.", "Sum.", ["A note."]),
        ("Sum.\n\n:param x: A text.\n:returns: It.", "Sum.", []),
        ("Sum.\n\n.. note:: A text.\n\n- item\n\n* item\n\n    code = 1", "Sum.", []),
    ],
)
def test_summary_and_description(text: str, summary: str, description: list[str]) -> None:
    assert summary_and_description(text) == (summary, description)


def test_is_sentence() -> None:
    for text in ("This is a sentence.", "Return the (first) item's name, if any."):
        assert is_sentence(text)
    for text in (
        "Too short this.",
        "This is not ended",
        "- this is an item.",
        "Ceci n'est pas une phrase.",
        "Une phrase au caf\u00e9 for the test.",
        "The x1 y2 z3 w4 v5.",
        "See the page at https://example.org now.",
        "This is so " + "very " * 40 + "long.",
    ):
        assert not is_sentence(text), text


def test_bad_arguments(tmp_path: Path) -> None:
    one, corpus = torch.ones(2, 3), partial(docstring_corpus, progress=False)
    for call, message in (
        (partial(corpus, roots=[tmp_path / "none"]), "roots: expected a folder with .*, got .*none"),
        (partial(corpus, roots=[tmp_path]), "expected documented Python packages, found too few"),
        (partial(retrieval_score, one, one[:1]), r"one shape \(N, D\), got \(2, 3\) and \(1, 3\)"),
        (partial(retrieval_score, one, one / 0), "document_embeddings: expected finite"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()


def test_the_installed_packages() -> None:
    before = set(sys.modules)
    corpus = docstring_corpus(2_000, pairs=50, progress=False)
    assert set(sys.modules) == before
    assert (len(corpus.sentences), len(corpus.queries)) == (2_000, 50)
    files = [path for root in default_roots() for path in python_files(root)]
    assert len(files) == len(set(files))


# Small whole numbers make ties, also of vectors that differ, and zero vectors.
@settings(max_examples=60)
@given(st.integers(1, 25), st.integers(0, 10_000), st.integers(1, 30))
def test_retrieval_score_is_that_of_all_ranks(count: int, seed: int, chunk_size: int) -> None:
    values = np.random.default_rng(seed).integers(-2, 3, (2, count, 3)).astype(np.float64)
    queries, documents = values / np.maximum(np.linalg.norm(values, axis=2, keepdims=True), 1e-9)
    cosines = queries @ documents.T
    ranks = (cosines >= np.diag(cosines)[:, None] - 1e-9).sum(axis=1)  # a tie ranks before
    expected = {"mrr": 100 * np.mean(1 / ranks), "accuracy_at_1": 100 * np.mean(ranks <= 1)}
    expected["accuracy_at_10"] = 100 * np.mean(ranks <= 10)
    found = retrieval_score(*torch.from_numpy(values).float(), chunk_size=chunk_size)
    assert found == pytest.approx(expected, abs=1e-9)
