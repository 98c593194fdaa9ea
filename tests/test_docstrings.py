"""Sentences of installed packages: what is taken of a docstring, what is held out, and its score."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_files import cases

from clusterns.corpus.docstrings import (
    docstring_corpus,
    docstrings,
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


def test_bad_arguments(tmp_path: Path) -> None:
    one, corpus = torch.ones(2, 3), partial(docstring_corpus, progress=False)
    for call, message in (
        (partial(corpus, roots=[tmp_path / "none"]), "roots: expected a folder with .*, got .*none"),
        (partial(retrieval_score, one, one[:1]), r"one shape \(N, D\), got \(2, 3\) and \(1, 3\)"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()


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
