"""English sentences that every machine with Python has: the docstrings of the installed packages.

They are the text of the default training run, which downloads nothing, and of its held-out score: find a
function's description from its summary line.
"""

from __future__ import annotations

import inspect
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, takewhile
from pathlib import Path

from tqdm.auto import tqdm

# Tests and vendored copies say little that is new; the other entries lie below one another's roots.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "_vendor", "clusterns", "dist-packages", "lib2to3", "site-packages", "test", "tests"}
)
# A sentence's length in words.
SHORTEST, LONGEST = 4, 40
# Share of a sentence's words that are plain alphabetic ones.
ALPHABETIC = 0.8
# Pairs whose words overlap more than this (Jaccard) would be found by any bag of words.
OVERLAP = 0.5
# Candidates read per pair that is held out: many are not unique or too alike.
SPARE = 4

# Where a docstring opens: first thing in a file, or after a line that ends in a colon. A full parse takes
# over a minute on the packages that torch and transformers bring; this takes seconds and finds the same.
_MODULE_OPENING = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*([rR]?)(\"\"\"|''')")
_OPENING = re.compile(r":[ \t]*(?:#[^\n]*)?\n\s*([rR]?)(\"\"\"|''')")
_ESCAPE = re.compile(r"\\(\n|.)", re.DOTALL)
_PLAIN_ESCAPES = {"\n": "", "\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t"}

_UNDERLINE = re.compile(r"^[-=~^*]{3,}$")
_PROSE_SECTIONS = frozenset({"notes", "note", "warnings", "warning", "description", "overview"})
# Where the prose of a docstring stops: Google style sections, reST fields, doctests, directives, tables.
_STOP = re.compile(r"^(?:[A-Z][A-Za-z ]{2,24}:$|:\w|@\w|>>>|\.\. |[-*+|#=] |\||\d+[.)] |<|\{|```|!!! )")
_INLINE = (
    (re.compile(r":[a-zA-Z:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),
    (re.compile(r"\[([^\]\[]+)\]\([^)\s]*\)"), r"\1"),
    (re.compile(r"`+_*([^`]*)`+_{0,2}"), r"\1"),
    (re.compile(r"\*{1,2}(\w[^*]*?)\*{1,2}"), r"\1"),
    (re.compile(r"\s+"), " "),
)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!cf\.)(?<!vs\.)\s+(?=[A-Z\"'(])")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_UNWANTED = re.compile(r"https?:|www\.|[\\{}<>=|~^$]|::|__|\.\.\.|[^ -~]")
_FUNCTION_WORDS = re.compile(
    r"\b(?:an?|and|are|as|at|be|by|can|for|from|ha[sd]|have|if|in|into|is|its?|not|of|on|or|that|the|then|this|"
    r"to|was|when|which|will|with)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DocstringCorpus:
    """Sentences to train on, and pairs held out from them: queries[i] is to find documents[i].

    `neighbours` are the pairs of `sentences` that follow one another in a docstring, for training with a
    neighbour as the second view. The held-out pairs are of that kind too, though of other functions.
    """

    sentences: list[str]
    queries: list[str]
    documents: list[str]
    neighbours: list[tuple[str, str]]


def docstring_corpus(
    limit: int = 50_000,
    *,
    seed: int = 0,
    pairs: int = 1_000,
    roots: Sequence[str | os.PathLike[str]] | None = None,
    progress: bool = True,
) -> DocstringCorpus:
    """Sentences of the docstrings under `roots`, and held-out pairs of a summary line and a description.

    Args:
        limit: sentences at most; reading stops when there are enough.
        seed: of the order in which the files are read and of the draw of the pairs.
        pairs: held-out pairs at most; a tenth of the sentences at most.
        roots: folders with Python files; None takes the standard library and the installed packages. The
            files are read as text, nothing is imported.
        progress: show a progress bar.

    The same files and arguments give the same corpus. Every sentence is distinct, and none is equal, up to
    case and punctuation, to a query or to a sentence of a document.

    Raises ValueError for a limit or number of pairs below 1, FileNotFoundError for a root that is missing
    or roots without a sentence and a pair to hold out.
    """
    for name, value in (("limit", limit), ("pairs", pairs)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    folders = default_roots() if roots is None else [Path(root) for root in roots]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"roots: expected a folder with Python files, got {folder}")

    sentences: dict[str, str] = {}
    adjacent: dict[tuple[str, str], None] = {}
    candidates: dict[tuple[str, str], tuple[str, list[str]]] = {}
    files = [path for folder in folders for path in python_files(folder)]
    # A random order of files instead of the sorted one: what is enough then comes from all the packages.
    random.Random(seed).shuffle(files)
    with tqdm(files, desc="docstrings", unit="file", disable=not progress) as bar:
        for path in bar:
            if len(sentences) >= limit + SPARE * pairs and len(candidates) >= SPARE * pairs:
                break
            for docstring in docstrings(path):
                summary, description = summary_and_description(docstring)
                usable = [sentence for sentence in (summary, *description) if is_sentence(sentence)]
                keys = [_key(sentence) for sentence in usable]
                for key, sentence in zip(keys, usable, strict=True):
                    sentences.setdefault(key, sentence)
                adjacent.update(dict.fromkeys(pairwise(keys)))
                opening = list(takewhile(is_sentence, description[:2]))
                if is_sentence(summary) and opening:
                    candidates.setdefault((_key(summary), _key(opening[0])), (summary, opening))

    held_out = _draw_pairs(list(candidates.values()), min(pairs, len(sentences) // 10), seed)
    if not held_out:
        places = ", ".join(map(str, folders))
        raise FileNotFoundError(f"roots: expected documented Python packages, found too few under {places}")
    for summary, opening in held_out:
        for sentence in (summary, " ".join(opening), *opening):
            sentences.pop(_key(sentence), None)
    chosen = dict(islice(sentences.items(), limit))
    return DocstringCorpus(
        sentences=list(chosen.values()),
        queries=[summary for summary, _ in held_out],
        documents=[" ".join(opening) for _, opening in held_out],
        neighbours=[
            (chosen[first], chosen[second])
            for first, second in adjacent
            if first != second and first in chosen and second in chosen
        ],
    )


def default_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    folders = (Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def python_files(root: Path) -> list[Path]:
    """The Python files under a folder, in sorted order, without tests and vendored copies."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


def docstrings(path: Path) -> Iterator[str]:
    """The dedented docstrings of a Python file, which is read and not run; none where it cannot be read."""
    try:
        source = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another user's file, a dangling link: the corpus does without
        return
    match = _MODULE_OPENING.match(source) or _OPENING.search(source)
    while match:
        raw, quote = match.groups()
        end = source.find(quote, match.end())
        if end < 0:
            return
        text = source[match.end() : end]
        if not raw and "\\" in text:
            text = _ESCAPE.sub(lambda escape: _PLAIN_ESCAPES.get(escape[1], escape[0]), text)
        yield inspect.cleandoc(text)
        match = _OPENING.search(source, end + len(quote))


def summary_and_description(docstring: str) -> tuple[str, list[str]]:
    """A docstring's first sentence and the prose sentences after it, inline markup removed.

    Parameter lists, doctests, directives, tables and code are left out.
    """
    paragraphs = list(_prose(docstring))
    if not paragraphs:
        return "", []
    sentences = [part for paragraph in paragraphs for part in _SENTENCE_END.split(paragraph)]
    return sentences[0], sentences[1:]


def is_sentence(text: str) -> bool:
    """Whether a text is a sentence of plain English words."""
    words = text.split()
    if not SHORTEST <= len(words) <= LONGEST or _UNWANTED.search(text) or not text[0].isalpha():
        return False
    plain = [word for word in words if _WORD.fullmatch(word.strip(".,;:!?\"'()[]"))]
    return (
        len(plain) >= ALPHABETIC * len(words)
        and text[-1] in ".!?"
        and _FUNCTION_WORDS.search(text) is not None
    )


def _prose(docstring: str) -> Iterator[str]:
    """The paragraphs that are running text, as one line each."""
    in_prose = True
    for block in docstring.split("\n\n"):
        lines = [line.rstrip() for line in block.strip("\n").split("\n")]
        if len(lines) > 1 and _UNDERLINE.match(lines[1]):
            in_prose = lines[0].strip().lower() in _PROSE_SECTIONS
            lines = lines[2:]
        if not in_prose or not lines or lines[0].startswith(" "):
            continue
        kept = []
        for index, line in enumerate(lines):
            # An indented line that follows is a hanging one: of a list, a parameter, or code.
            following = lines[index + 1] if index + 1 < len(lines) else ""
            if _STOP.match(line) or line.startswith(" ") or following.startswith("    "):
                break
            kept.append(line)
        paragraph = " ".join(kept)
        for pattern, replacement in _INLINE:
            paragraph = pattern.sub(replacement, paragraph)
        if paragraph.strip():
            yield paragraph.strip()


def _key(sentence: str) -> str:
    """What two sentences share that differ in case, spacing and punctuation only."""
    return " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))


def _draw_pairs(
    candidates: list[tuple[str, list[str]]], count: int, seed: int
) -> list[tuple[str, list[str]]]:
    """Pairs with a summary and an opening that no other function has, and that do not repeat each other."""
    summaries = Counter(_key(summary) for summary, _ in candidates)
    openings = Counter(_key(sentence) for _, opening in candidates for sentence in opening)
    usable = []
    for summary, opening in candidates:
        query, document = (set(_key(text).split()) for text in (summary, " ".join(opening)))
        if (
            summaries[_key(summary)] == 1
            and all(openings[_key(sentence)] == 1 for sentence in opening)
            and len(query & document) <= OVERLAP * min(len(query), len(document))
        ):
            usable.append((summary, opening))
    return random.Random(seed).sample(usable, min(count, len(usable)))
