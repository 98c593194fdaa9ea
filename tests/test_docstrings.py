from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
        assert words(query) not in trained
        assert words(document) not in trained
        noun, verb = re.search(r"the (\w+) still (\w+) anybody", query).groups()  # type: ignore[union-attr]
        assert f"it {verb[:-1]}ed when that {noun} broke." in document
    # Each of the 72 functions has two sentences that follow one another; 9 of them are held out.
    assert len(set(corpus.neighbours)) == len(corpus.neighbours) == 72 - 9
    assert {text for pair in corpus.neighbours for text in pair} <= set(corpus.sentences)


def test_the_same_files_and_seed_give_the_same_corpus(packages: Path) -> None:
    first = docstring_corpus(40, roots=[packages], pairs=5, progress=False, seed=1)
    assert docstring_corpus(40, roots=[packages], pairs=5, progress=False, seed=1) == first
    assert docstring_corpus(40, roots=[packages], pairs=5, progress=False, seed=2) != first
    assert len(first.sentences) == 40


def test_parameters_doctests_and_short_texts_are_left_out(packages: Path) -> None:
    text = " ".join(docstring_corpus(roots=[packages], pairs=1, progress=False).sentences)
    assert "numbers" not in text
    assert ">>>" not in text
    assert "Some do" not in text


def test_repeated_and_trivial_pairs_are_not_held_out(tmp_path: Path, packages: Path) -> None:
    twice = '    """Say the very same thing again.\n\n    Two functions have all this in common.\n    """\n'
    near = '    """Open the red door to the garden.\n\n    Opens the red door to the garden.\n    """\n'
    (tmp_path / "more.py").write_text(
        "".join(f"def f{index}():\n{text}" for index, text in enumerate([twice, twice, near]))
        + 'def g():\n    """Say the very same thing again.\n\n    But describe it in its own way.\n    """\n'
    )
    corpus = docstring_corpus(roots=[packages], pairs=1_000, progress=False)
    assert not {"Say the very same thing again.", "Open the red door to the garden."} & set(corpus.queries)


def test_docstrings_as_the_parser_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "#!/usr/bin/env python\n# A licence.\n\n'''Module\n\n    text.'''\n"
        'class A:\n    """Class."""\n    x = """not one"""\n'
        'async def f(a={"k": 1}):\n\n    r"""Raw \\n one."""\n'
        'def g():\n    """Joined \\\n    line, \\"quoted\\", a \\\\ and \\d."""\n'
    )
    assert list(docstrings(path)) == [
        "Module\n\ntext.",
        "Class.",
        "Raw \\n one.",
        'Joined     line, "quoted", a \\ and \\d.',
    ]
    (tmp_path / "bad.py").write_bytes(b'def f(:\n    """Caf\xe9."""\n"""unclosed')
    assert list(docstrings(tmp_path / "bad.py")) == ["Caf\ufffd."]
    assert list(docstrings(tmp_path / "none.py")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Only a summary.", ("Only a summary.", [])),
        ("", ("", [])),
        ('One, e.g. this. Two\nof them. "Three"?', ("One, e.g. this.", ["Two of them.", '"Three"?'])),
        (
            "See :class:`~a.b.Name`, ``code`` and [a link](https://x.y).\n\nIt *is* **so**.",
            ("See a.b.Name, code and a link.", ["It is so."]),
        ),
        ("Sum.\n\nArgs:\n    x: A text.\n\nReturns:\n    It all.\n\nLast one.", ("Sum.", ["Last one."])),
        ("Sum.\n\nNotes\n-----\nA note.\n\nSee Also\n--------\nother : Text.", ("Sum.", ["A note."])),
        ("Sum.\n\n:param x: A text.\n:returns: It.", ("Sum.", [])),
        ("Sum.\n\n.. note:: A text.\n\n- item\n\n* item\n\n    code = 1", ("Sum.", [])),
    ],
)
def test_summary_and_description(text: str, expected: tuple[str, list[str]]) -> None:
    assert summary_and_description(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This is a sentence.", True),
        ("Return the (first) item's name, if any.", True),
        ("Too short this.", False),
        ("This is not ended", False),
        ("- this is an item.", False),
        ("Ceci n'est pas une phrase.", False),
        ("Une phrase au caf\u00e9 for the test.", False),
        ("The x1 y2 z3 w4 v5.", False),
        ("See the page at https://example.org now.", False),
        ("This is so " + "very " * 40 + "long.", False),
        ("", False),
    ],
)
def test_is_sentence(text: str, expected: bool) -> None:
    assert is_sentence(text) is expected


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        docstring_corpus(0)
    with pytest.raises(ValueError, match="pairs: expected at least 1, got -1"):
        docstring_corpus(pairs=-1)
    with pytest.raises(FileNotFoundError, match="roots: expected a folder with Python files, got .*none"):
        docstring_corpus(roots=[tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="expected documented Python packages, found too few under"):
        docstring_corpus(roots=[tmp_path], progress=False)


def test_the_installed_packages() -> None:
    before = set(sys.modules)
    corpus = docstring_corpus(2_000, pairs=50, progress=False)
    assert set(sys.modules) - before == set()
    assert len(corpus.sentences) == 2_000
    assert len(corpus.queries) == 50
    trained = {words(sentence) for sentence in corpus.sentences}
    assert not trained & {words(text) for text in (*corpus.queries, *corpus.documents)}
    assert all(map(is_sentence, (*corpus.sentences, *corpus.queries)))
    files = [path for root in default_roots() for path in python_files(root)]
    assert len(files) == len(set(files))


def naive_score(queries: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        return float(x @ y / norms) if norms else 0.0

    ranks = []
    for i in range(len(queries)):
        own, rank = cosine(queries[i], documents[i]), 1
        for j in range(len(documents)):
            rank += j != i and cosine(queries[i], documents[j]) >= own - 1e-9
        ranks.append(rank)
    return {
        "mrr": 100 * float(np.mean([1 / rank for rank in ranks])),
        "accuracy_at_1": 100 * float(np.mean([rank <= 1 for rank in ranks])),
        "accuracy_at_10": 100 * float(np.mean([rank <= 10 for rank in ranks])),
    }


# Small whole numbers make ties, also of vectors that differ, and zero vectors.
@settings(max_examples=60)
@given(
    st.integers(1, 25).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=2 * n, max_size=2 * n
        )
    ),
    st.integers(1, 30),
)
def test_retrieval_score_is_that_of_a_double_loop(rows: list[list[int]], chunk_size: int) -> None:
    values = torch.tensor(rows, dtype=torch.float32)
    queries, documents = values.chunk(2)
    expected = naive_score(queries.double().numpy(), documents.double().numpy())
    assert retrieval_score(queries, documents, chunk_size=chunk_size) == pytest.approx(expected, abs=1e-9)


def test_retrieval_score_of_known_embeddings() -> None:
    same = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert retrieval_score(same, 3 * same) == {"mrr": 100.0, "accuracy_at_1": 100.0, "accuracy_at_10": 100.0}
    collapsed = torch.ones(20, 8)
    assert retrieval_score(collapsed, collapsed) == pytest.approx(
        {"mrr": 5.0, "accuracy_at_1": 0.0, "accuracy_at_10": 0.0}
    )


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 3), r"one shape \(N, D\), got \(2, 3\) and \(3, 3\)"),
        (torch.ones(3), torch.ones(3), r"one shape \(N, D\), got \(3,\) and \(3,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), r"one shape \(N, D\), got \(0, 3\)"),
        (torch.ones(2, 3), torch.full((2, 3), torch.nan), "document_embeddings: expected finite"),
    ],
)
def test_retrieval_score_refuses(queries: torch.Tensor, documents: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_score(queries, documents)
