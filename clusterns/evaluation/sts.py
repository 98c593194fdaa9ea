"""The STS sets: which there are, and reading them from a folder in SentEval's layout or from the hub.

Seven test sets: STS12-16 (each of several sub-sets, STS13 without SMT), STS-B test and SICK-R test; for
choosing settings STS-B dev and SICK-R dev (SICK's trial part).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..files import expanded
from .sts_hub import HUB_MTEB, HUB_SENTEVAL, MTEB_DATASETS, mteb_pairs, senteval_folder

SEVEN = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark-test", "SICK-R-test")
DEV = ("STSBenchmark-dev", "SICK-R-dev")
# STS12 also holds an ALL file, which repeats the others, and STS13's SMT is left out by the protocol.
SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}


class _Table(NamedTuple):
    """A file of one scored pair a line: where its columns are, and how its header begins."""

    path: str
    first: int
    second: int
    score: int
    header: str | None


TABLES = {
    **{
        f"STSBenchmark-{part}": _Table(f"STS/STSBenchmark/sts-{part}.csv", 5, 6, 4, None)
        for part in ("train", "dev", "test")
    },
    **{
        f"SICK-R-{part}": _Table(f"SICK/SICK_{file}.txt", 1, 2, 3, "pair_ID")
        for part, file in (("train", "train"), ("dev", "trial"), ("test", "test_annotated"))
    },
}
# The folders of a source that all of these are in.
STS_FOLDERS = ("STS", "SICK")
# What tables and JSON call the sets; the paper's names for the test sets.
SHORT_NAMES = {
    "STSBenchmark-test": "STS-B",
    "SICK-R-test": "SICK-R",
    "STSBenchmark-dev": "STS-B-dev",
    "STSBenchmark-train": "STS-B-train",
}
# Scored pairs of the published protocol: a set of another size is not the set of that name.
PUBLISHED_PAIRS = {
    **{"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186},
    **{"STSBenchmark-train": 5749, "STSBenchmark-dev": 1500, "STSBenchmark-test": 1379},
    **{"SICK-R-train": 4500, "SICK-R-dev": 500, "SICK-R-test": 4927, "SICK-R-all": 9927},
}
LOWEST, HIGHEST = 0.0, 5.0  # of the gold scores


class _Pairs(NamedTuple):
    first: list[str]
    second: list[str]
    scores: list[float]


class StsSet(_Pairs):
    """Scored sentence pairs: pair i is first[i], second[i], with the gold similarity scores[i]."""

    # Pairs left out, as they have no gold score.
    unscored = 0


def joined(parts: Iterable[StsSet]) -> StsSet:
    """The pairs of all parts, one after the other."""
    parts = list(parts)
    pairs = StsSet(
        [sentence for part in parts for sentence in part.first],
        [sentence for part in parts for sentence in part.second],
        [score for part in parts for score in part.scores],
    )
    pairs.unscored = sum(part.unscored for part in parts)
    return pairs


def sets_of(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the sets that are evaluated where none are named: the seven and the two dev sets."""
    if os.fspath(source) == HUB_MTEB:
        return tuple(name for name in MTEB_DATASETS if name != "STSBenchmark-train")
    return (*SEVEN, *DEV)


def load_sts(source: str | os.PathLike[str], name: str) -> StsSet:
    """Read one set, the pairs of all its sub-sets together; see `load_sts_subsets`."""
    return joined(load_sts_subsets(source, name).values())


def load_sts_subsets(source: str | os.PathLike[str], name: str) -> dict[str, StsSet]:
    """Read one set by its sub-sets, in the protocol's order; a set without any has one part, named "".

    Args:
        source: a folder in SentEval's layout (STS/STS12-en-test/..., STS/STSBenchmark, SICK); or
            "hub:senteval", that layout from the archive of SimCSE's authors; or "hub:mteb", mteb's data sets.
        name: STS12 ... STS16, STSBenchmark-train, -dev, -test, SICK-R-train, -dev (SICK's trial), -test; of
            mteb's only SICK-R-all, its 9,927 pairs, which is no published test set.

    Pairs without a gold score are left out. Raises ValueError for an unknown name, a malformed line or a
    score outside 0 to 5, FileNotFoundError for a missing folder or file or an unreachable hub; both name it.
    """
    place = os.fspath(source)
    if place == HUB_MTEB:
        pairs = StsSet([], [], [])
        for first, second, score, row in mteb_pairs(name):
            _append_pair(pairs, first, second, score, row)
        return {"": pairs}
    if name not in SUBSETS and name not in TABLES:
        raise ValueError(f"name: expected one of {', '.join([*SUBSETS, *TABLES])}, got {name!r}")
    root = sts_folder(place)
    if name in TABLES:
        return {"": _read_table(root / TABLES[name].path, TABLES[name])}
    folder = root / "STS" / f"{name}-en-test"
    return {
        subset: _read_input_and_gold(folder / f"STS.input.{subset}.txt", folder / f"STS.gs.{subset}.txt")
        for subset in SUBSETS[name]
    }


def sts_folder(source: str | os.PathLike[str]) -> Path:
    """The local folder of a source other than "hub:mteb"; raises as `load_sts_subsets` does."""
    if os.fspath(source) == HUB_SENTEVAL:
        return senteval_folder()
    folder = expanded(source, "sts_dir")
    if not folder.is_dir():
        raise FileNotFoundError(f"sts_dir: expected a folder in SentEval's layout, got {source}")
    return folder


def _read_input_and_gold(input_path: Path, gold_path: Path) -> StsSet:
    lines, gold = _lines(input_path), _lines(gold_path)
    if len(lines) != len(gold):
        raise ValueError(
            f"{gold_path}: expected {len(lines)} lines as {input_path.name} has, got {len(gold)}"
        )
    pairs = StsSet([], [], [])
    for number, (line, score) in enumerate(zip(lines, gold, strict=True), start=1):
        if score.strip():
            columns = _columns(line, 2, input_path, number)
            _append_pair(pairs, columns[0], columns[1], score, f"{gold_path}, line {number}")
    pairs.unscored = len(lines) - len(pairs.scores)
    return pairs


def _read_table(path: Path, table: _Table) -> StsSet:
    least = max(table.first, table.second, table.score) + 1
    pairs = StsSet([], [], [])
    for number, line in enumerate(_lines(path), start=1):
        is_header = number == 1 and table.header is not None and line.startswith(table.header)
        if is_header or not line.strip():
            continue
        columns = _columns(line, least, path, number)
        score = columns[table.score]
        if score.strip():
            _append_pair(pairs, columns[table.first], columns[table.second], score, f"{path}, line {number}")
        else:
            pairs.unscored += 1
    return pairs


def _lines(path: Path) -> list[str]:
    """Lines ended by LF or CRLF and by nothing else: Unicode's other line ends occur inside sentences."""
    if not path.is_file():
        raise FileNotFoundError(f"sts_dir: expected the file {path}, which does not exist")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {error.start} that is not") from error
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _columns(line: str, least: int, path: Path, number: int) -> list[str]:
    # No csv reader: a quotation mark in these files is part of the sentence.
    columns = line.split("\t")
    if len(columns) < least:
        raise ValueError(
            f"{path}, line {number}: expected at least {least} columns between tabs, got {len(columns)}"
        )
    return columns


def _append_pair(pairs: StsSet, first: str, second: str, score: str | float, place: str) -> None:
    """Add one pair; `place` is for the message of the ValueError where its score is none."""
    try:
        value = float(score)
    except ValueError:
        value = math.nan
    if not LOWEST <= value <= HIGHEST:
        raise ValueError(
            f"{place}: expected a gold score from {LOWEST:g} to {HIGHEST:g}, got {str(score).strip()!r}"
        )
    # SentEval splits at white space and joins with single spaces; some tokenizers tell the difference.
    pairs.first.append(" ".join(first.split()))
    pairs.second.append(" ".join(second.split()))
    pairs.scores.append(value)
