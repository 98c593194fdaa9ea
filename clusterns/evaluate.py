"""The STS test sets after the published protocol, and alignment and uniformity on STS-B dev.

Seven sets: STS12-16 (all sub-sets concatenated, STS13 without SMT), STS-B test and SICK-R test, each one
Spearman correlation between the cosines and the gold scores, times 100, and their plain mean. This is
the "all" aggregation of SimCSE and ClusterNS (arXiv 2305.09892); the folder layout is SentEval's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from .encoder import SentenceEncoder
from .model_folder import write_json

SEVEN = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark-test", "SICK-R-test")
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
# What the paper's tables call them; the keys of the JSON too.
SHORT_NAMES = {"STSBenchmark-test": "STS-B", "SICK-R-test": "SICK-R"}
# Rows of the pairwise distances held at a time.
UNIFORMITY_ROWS = 1024


class StsSet(NamedTuple):
    """Scored sentence pairs: pair i is first[i], second[i], with the gold similarity scores[i]."""

    first: list[str]
    second: list[str]
    scores: list[float]


class Encoder(Protocol):
    """What is evaluated: anything that turns N sentences into an (N, D) tensor."""

    def encode(self, sentences: Sequence[str], *, batch_size: int = 64, progress: bool = False) -> Tensor:
        """Embeddings (N, D), in the order of the sentences."""


def load_sts(sts_dir: str | os.PathLike[str], name: str) -> StsSet:
    """Read one set from a folder in SentEval's layout (STS/STS12-en-test/..., STS/STSBenchmark, SICK).

    Names: STS12 ... STS16, STSBenchmark-train, -dev, -test, SICK-R-train, -dev (SICK's trial), -test.
    Pairs without a gold score are left out. Raises ValueError for an unknown name or a malformed line,
    FileNotFoundError for a missing folder or file; both name the file.
    """
    root = Path(sts_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"sts_dir: expected a folder in SentEval's layout, got {sts_dir}")
    pairs = StsSet([], [], [])
    if name in SUBSETS:
        folder = root / "STS" / f"{name}-en-test"
        for subset in SUBSETS[name]:
            _read_input_and_gold(folder / f"STS.input.{subset}.txt", folder / f"STS.gs.{subset}.txt", pairs)
    elif name in TABLES:
        _read_table(root / TABLES[name].path, TABLES[name], pairs)
    else:
        raise ValueError(f"name: expected one of {', '.join([*SUBSETS, *TABLES])}, got {name!r}")
    return pairs


def _read_input_and_gold(input_path: Path, gold_path: Path, pairs: StsSet) -> None:
    lines, gold = _lines(input_path), _lines(gold_path)
    if len(lines) != len(gold):
        raise ValueError(
            f"{gold_path}: expected {len(lines)} lines as {input_path.name} has, got {len(gold)}"
        )
    for number, (line, score) in enumerate(zip(lines, gold, strict=True), start=1):
        if score.strip():
            columns = _columns(line, 2, input_path, number)
            _append(pairs, columns[0], columns[1], score, gold_path, number)


def _read_table(path: Path, table: _Table, pairs: StsSet) -> None:
    least = max(table.first, table.second, table.score) + 1
    for number, line in enumerate(_lines(path), start=1):
        is_header = number == 1 and table.header is not None and line.startswith(table.header)
        if is_header or not line.strip():
            continue
        columns = _columns(line, least, path, number)
        if columns[table.score].strip():
            _append(pairs, columns[table.first], columns[table.second], columns[table.score], path, number)


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


def _append(pairs: StsSet, first: str, second: str, score: str, path: Path, number: int) -> None:
    try:
        value = float(score)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}, line {number}: expected a number as gold score, got {score!r}")
    # SentEval splits at white space and joins with single spaces; some tokenizers tell the difference.
    pairs.first.append(" ".join(first.split()))
    pairs.second.append(" ".join(second.split()))
    pairs.scores.append(value)


def spearman(name: str, first: Tensor, second: Tensor, scores: Sequence[float]) -> float:
    """Spearman correlation × 100 between the cosines of paired rows, (N, D) each, and N gold scores.

    `name` is for the message of the ValueError raised where there is none: embeddings with NaN or
    infinity, or all cosines or all gold scores equal.
    """
    # Rounded, so that cosines equal but for their last bits (identical sentences) are ties, not noise.
    cosines = F.cosine_similarity(first.double(), second.double()).round(decimals=12)
    if not bool(torch.isfinite(cosines).all()):
        count = int((~torch.isfinite(cosines)).sum())
        raise ValueError(f"{name}: expected finite embeddings, got {count} pairs with NaN or infinity")
    if len(scores) < 2 or bool((cosines == cosines[0]).all()) or len(set(scores)) < 2:
        raise ValueError(
            f"{name}: expected cosines and gold scores that vary, got {len(scores)} pairs with all of one "
            "equal, which have no Spearman correlation"
        )
    return 100 * float(spearmanr(cosines.numpy(), scores).statistic)


def _embed(encoder: Encoder, sets: Iterable[StsSet], batch_size: int, progress: bool) -> dict[str, Tensor]:
    """Sentence -> its embedding (D,), each distinct sentence of all sets encoded once."""
    distinct = list(dict.fromkeys(sentence for pairs in sets for sentence in (*pairs.first, *pairs.second)))
    vectors = encoder.encode(distinct, batch_size=batch_size, progress=progress)
    return dict(zip(distinct, vectors.float().cpu(), strict=True))


def _rows(vectors: Mapping[str, Tensor], sentences: Sequence[str]) -> Tensor:
    return torch.stack([vectors[sentence] for sentence in sentences])


def _score(encoder: Encoder, sets: Mapping[str, StsSet], batch_size: int, progress: bool) -> dict[str, float]:
    vectors = _embed(encoder, sets.values(), batch_size, progress)
    figures = {
        name: spearman(name, _rows(vectors, pairs.first), _rows(vectors, pairs.second), pairs.scores)
        for name, pairs in sets.items()
    }
    figures["avg"] = sum(figures.values()) / len(figures)
    return figures


def evaluate_sts(
    encoder: Encoder,
    sts_dir: str | os.PathLike[str],
    tasks: Sequence[str] = SEVEN,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """Spearman × 100 of each task, by its `load_sts` name, and "avg", their plain mean.

    All tasks are encoded in one call, each distinct sentence once, truncated as the encoder truncates.
    Raises what `load_sts` and `spearman` raise, and ValueError for no tasks.
    """
    if not tasks:
        raise ValueError("tasks: expected at least one set, got none")
    return _score(encoder, {name: load_sts(sts_dir, name) for name in tasks}, batch_size, progress)


def sts_dev(encoder: Encoder, sts_dir: str | os.PathLike[str], batch_size: int = 64) -> dict[str, float]:
    """STS-B dev: "spearman" × 100, "alignment" of the pairs scored above 4, "uniformity" of all sentences.

    Encodes those sentences only. Uniformity is over the distinct sentences, so that a repeated one is no
    pair at distance 0.
    """
    pairs = load_sts(sts_dir, "STSBenchmark-dev")
    vectors = _embed(encoder, [pairs], batch_size, progress=False)
    first, second = _rows(vectors, pairs.first), _rows(vectors, pairs.second)
    figure = spearman("STSBenchmark-dev", first, second, pairs.scores)
    alike = torch.tensor(pairs.scores) > 4
    return {
        "spearman": figure,
        "alignment": alignment(first[alike], second[alike]),
        "uniformity": uniformity(torch.stack(list(vectors.values()))),
    }


def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> float:
    """Mean distance to the power alpha between paired rows, (N, D) each, after L2 normalisation.

    Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity
    on the Hypersphere". Raises ValueError for shapes that differ or hold no pair.
    """
    if x.ndim != 2 or x.shape != y.shape or len(x) < 1:
        raise ValueError(f"x, y: expected two (N ≥ 1, D) tensors, got {tuple(x.shape)} and {tuple(y.shape)}")
    distances = (F.normalize(x.double(), dim=1) - F.normalize(y.double(), dim=1)).norm(dim=1)
    return float(distances.pow(alpha).mean())


def uniformity(x: Tensor, t: float = 2) -> float:
    """Log of the mean of exp(-t · squared distance) over all pairs of rows of x (N, D), L2-normalised.

    Wang & Isola 2020, as `alignment`. Takes rows × N memory, not N × N. Raises ValueError below two rows.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x: expected an (N ≥ 2, D) tensor, got {tuple(x.shape)}")
    unit = F.normalize(x.double(), dim=1)
    parts = []
    for start in range(0, len(unit), UNIFORMITY_ROWS):
        exponents = 2 * t * (unit[start : start + UNIFORMITY_ROWS] @ unit.T - 1)
        exponents.diagonal(offset=start).fill_(-math.inf)  # no row is a pair with itself
        parts.append(exponents.logsumexp(dim=(0, 1)))
    return float(torch.stack(parts).logsumexp(dim=0)) - math.log(len(unit) * (len(unit) - 1))


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown table, readable as plain text: models as rows, sets as columns, two decimals.

    Columns come in the order of their first appearance; a figure that a model lacks is a dash.
    """
    columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    cells = [["model", *(SHORT_NAMES.get(name, name) for name in columns)]]
    for model, figures in rows.items():
        cells.append([model, *(f"{figures[name]:.2f}" if name in figures else "-" for name in columns)])
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def run(
    model: str,
    sts_dir: str | os.PathLike[str],
    *,
    pooling: str | None = None,
    json_file: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model folder or hub name on the seven sets: print the table, and write JSON where asked.

    `max_length` None takes all the positions the model has, whatever length it was trained with, since
    the published evaluation does not truncate at 32 tokens. Runs on the GPU where there is one. Returns
    what the JSON holds: model, pooling, max_length, the seven figures, avg, and the pairs of each set.
    """
    # The cheap checks first: loading and encoding take minutes.
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise FileNotFoundError(f"json_file: expected a file in a folder that exists, got {json_file}")
    sets = {name: load_sts(sts_dir, name) for name in SEVEN}
    encoder = SentenceEncoder.from_pretrained(model, pooling=pooling, max_length=max_length)
    if max_length is None:
        encoder.max_length = encoder.longest_input
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    figures = _score(encoder, sets, batch_size, progress=True)
    print(format_table({str(model): figures}))
    result = {
        "model": str(model),
        "pooling": encoder.pooling,
        "max_length": encoder.max_length,
        **{SHORT_NAMES.get(name, name): figure for name, figure in figures.items()},
        "pairs": {SHORT_NAMES.get(name, name): len(pairs.scores) for name, pairs in sets.items()},
    }
    if json_file is not None:
        _replace_json(Path(json_file), result)
    return result


def _replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write the file whole beside its place, then move it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_json(temporary, value)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
