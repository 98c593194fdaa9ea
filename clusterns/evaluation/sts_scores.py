"""STS scores of an encoder after the published protocol, and STS-B dev for training.

The Spearman correlation between cosines and gold scores, times 100, over all pairs of a set, its sub-sets
concatenated, and the plain mean of the seven test sets: the "all" aggregation of SimCSE and ClusterNS
(arXiv 2305.09892).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import warn
from ..models.views import check_texts
from .correlation import Floats, correlation, pair_cosines, spearman
from .evaluated_model import Encoder
from .geometry import alignment, uniformity
from .sts import SEVEN, StsSet, load_sts

# Pairs scored above it are alike, for alignment.
ALIKE = 4.0
# The Spearman correlation × 100 of an encoder that tells no two sentences apart, lower than any other.
WORST = -100.0
GEOMETRY_SET = "STSBenchmark-dev"


class Vectors:
    """Embeddings of sentences, each distinct one encoded once, in one call for all of them.

    `settings` go to the encoder's `encode` as they are.
    """

    def __init__(
        self, encoder: Encoder, sentences: Iterable[str], batch_size: int, progress: bool, **settings: Any
    ) -> None:
        if type(encoder).__name__ == "SentenceTransformer":
            raise TypeError(
                "encoder: expected a SentenceEncoder or another Encoder, got a SentenceTransformer; wrap it, "
                "clusterns.evaluation.evaluated_model.SentenceTransformerEncoder(model)"
            )
        self._row = {sentence: row for row, sentence in enumerate(dict.fromkeys(sentences))}
        encoded = encoder.encode(list(self._row), batch_size=batch_size, progress=progress, **settings)
        if not isinstance(encoded, Tensor) or encoded.ndim != 2 or len(encoded) != len(self._row):
            shape = getattr(encoded, "shape", None)
            came = type(encoded).__name__ if shape is None else f"{type(encoded).__name__} of {tuple(shape)}"
            raise ValueError(f"encoder: expected a tensor ({len(self._row)}, dim) from encode, got {came}")
        self.rows = encoded.float().cpu()

    def of(self, sentences: Sequence[str]) -> Tensor:
        """Their embeddings, (N, D)."""
        return self.rows[[self._row[sentence] for sentence in sentences]]


def sentences_of(sets: Iterable[StsSet]) -> Iterator[str]:
    """All sentences of the sets, repeated ones too."""
    for pairs in sets:
        yield from pairs.first
        yield from pairs.second


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
    names = check_texts("tasks", tasks)
    if not names:
        raise ValueError("tasks: expected at least one set, got none")
    sets = {name: load_sts(sts_dir, name) for name in names}
    vectors = Vectors(encoder, sentences_of(sets.values()), batch_size, progress)
    figures = {
        name: spearman(name, vectors.of(pairs.first), vectors.of(pairs.second), pairs.scores)
        for name, pairs in sets.items()
    }
    figures["avg"] = sum(figures.values()) / len(figures)
    return figures


def sts_dev(encoder: Encoder, sts_dir: str | os.PathLike[str], batch_size: int = 64) -> dict[str, float]:
    """STS-B dev: "spearman" × 100, "alignment" of the pairs scored above 4, "uniformity" of all sentences.

    Encodes those sentences only. Uniformity is over the distinct sentences, so that a repeated one is no
    pair at distance 0. It judges checkpoints, so what says something of the encoder is no error: where all
    cosines are equal "spearman" is the worst, -100, with a UserWarning. Scores that go from 0 to 1 have no
    pair above 4: "alignment" is left out, with a UserWarning too.

    Raises what `load_sts` raises, and ValueError for embeddings with NaN or infinity and gold scores that are
    all equal.
    """
    pairs = load_sts(sts_dir, GEOMETRY_SET)
    vectors = Vectors(encoder, sentences_of([pairs]), batch_size, progress=False)
    first, second = vectors.of(pairs.first), vectors.of(pairs.second)
    cosines = pair_cosines(GEOMETRY_SET, first, second)
    figures = {"spearman": dev_spearman(GEOMETRY_SET, cosines, pairs.scores)}
    alike = torch.tensor(pairs.scores) > ALIKE
    if bool(alike.any()):
        figures["alignment"] = alignment(first[alike], second[alike])
    else:
        warnings.warn(
            f"{GEOMETRY_SET}: no pair is scored above {ALIKE:g} (the highest score is "
            f"{max(pairs.scores):g}), so there is no alignment; scores go from 0 to 5",
            stacklevel=2,
        )
    return {**figures, "uniformity": uniformity(vectors.rows)}


def dev_spearman(name: str, cosines: Floats, scores: Sequence[float]) -> float:
    """`correlation` for a checkpoint: where all cosines are equal the worst, -100, with a UserWarning."""
    if len(set(scores)) > 1 and len(set(cosines.tolist())) == 1:
        warn(
            f"{name}: all cosines are {cosines[0]:g}, which scores {WORST:g}: the embeddings have collapsed, "
            "or the tokenizer knows none of the words"
        )
        return WORST
    return correlation(name, cosines, scores)
