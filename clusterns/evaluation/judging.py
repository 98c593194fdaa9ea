"""What a user's own judged texts say of an encoder: in an evaluation, and as the dev score of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..checks import warn
from ..corpus.judged import Judged, LabelledTexts, ScoredPairs
from .clustering import MEASURES, evaluate_clustering
from .correlation import (
    Floats,
    bootstrap_correlations,
    bootstrap_means,
    correlation,
    interval,
    pair_cosines,
)
from .evaluated_model import Encoder
from .retrieval import query_ranks, retrieval_figures
from .sts_scores import Vectors, dev_spearman

# The figure of each kind that has an interval, that models are compared by, and that chooses a checkpoint.
FIRST = {"pairs": "spearman", "labels": "accuracy", "queries": "mrr_at_10"}
# k-means for a checkpoint: 9 runs, not 50. On 2,000 texts of 20 classes (384 dimensions, one thread) that is
# 0.8 s in place of 6, two points below the best of ten starts, and no noisier. Always the same seeds, so that
# checkpoints are judged alike.
DEV_SEEDS, DEV_STARTS = (0, 1, 2), 3
# Unit vectors nowhere farther apart than this are one point.
_POINT = 1e-4


class Judgement(NamedTuple):
    """Figures as the JSON holds them, and the first of them on bootstrap resamples (R,)."""

    figures: dict[str, Any]
    drawn: Floats


def judge(
    name: str,
    judged: Judged,
    vectors: Vectors,
    *,
    normalized: bool,
    resamples: int,
    seed: int,
    **clustering: Any,
) -> Judgement:
    """Judge embeddings of `judged.sentences`; the bootstrap draws pairs, texts or queries.

    Args:
        name: of the data, for messages and the bootstrap.
        judged, vectors: the data, and the embeddings of all its texts.
        normalized: whether k-means is to see unit vectors.
        resamples, seed: of the bootstrap.
        clustering: arguments of `evaluate_clustering`.

    Raises ValueError as `pair_cosines`, `correlation`, `evaluate_clustering` and `relevant_ranks` do.
    """
    figures: dict[str, Any]
    if isinstance(judged, ScoredPairs):
        cosines = pair_cosines(name, vectors.of(judged.first), vectors.of(judged.second))
        figures = {"pairs": len(cosines), "spearman": correlation(name, cosines, judged.scores)}
        drawn = bootstrap_correlations(name, cosines, judged.scores, resamples, seed)
    elif isinstance(judged, LabelledTexts):
        rows = vectors.of(judged.texts)
        rows = F.normalize(rows, dim=1) if normalized else rows
        figures, correct = evaluate_clustering(name, rows, judged.labels, **clustering)
        drawn = bootstrap_means(name, correct, resamples, seed)
    else:
        found = retrieval_figures(query_ranks(name, judged, vectors), judged.relevant)
        figures = {"queries": len(judged.queries), "passages": len(judged.passages)}
        figures |= {key: 100 * float(values.mean()) for key, values in found.items()}
        drawn = bootstrap_means(name, found[FIRST[judged.kind]], resamples, seed)
    low, high = interval(drawn) or (None, None)
    return Judgement({"kind": judged.kind, **figures, "low": low, "high": high}, drawn)


def first_figure(found: Mapping[str, Any]) -> float:
    """The one of FIRST, of the figures of `judge`."""
    value = found[FIRST[found["kind"]]]
    return value["mean"] if isinstance(value, Mapping) else value


def dev_scores(name: str, judged: Judged, encoder: Encoder, batch_size: int = 64) -> dict[str, float]:
    """Judge a checkpoint: "spearman"; "accuracy", "nmi" and "ami"; or MRR@10 and others; all × 100.

    What says something of the encoder is no error: where the embeddings are one point the first figure is the
    worst there is, with a UserWarning. Raises ValueError for embeddings with NaN or infinity.
    """
    vectors = Vectors(encoder, judged.sentences, batch_size, progress=False)
    if isinstance(judged, ScoredPairs):
        cosines = pair_cosines(name, vectors.of(judged.first), vectors.of(judged.second))
        return {"spearman": dev_spearman(name, cosines, judged.scores)}
    unit = F.normalize(vectors.rows.double(), dim=1)
    has_collapsed = bool(torch.all((unit - unit[0]).norm(dim=1) < _POINT))
    if has_collapsed:
        warn(f"{name}: all embeddings are one point, which scores worst: they have collapsed")
    if isinstance(judged, LabelledTexts):
        # Of one cluster the accuracy would be the share of the largest class.
        if has_collapsed:
            return dict.fromkeys(MEASURES, 0.0)
        rows = vectors.of(judged.texts)
        figures, _ = evaluate_clustering(name, rows, judged.labels, seeds=DEV_SEEDS, starts=DEV_STARTS)
        return {measure: figures[measure]["mean"] for measure in MEASURES}
    found = retrieval_figures(query_ranks(name, judged, vectors), judged.relevant)
    return {key: 100 * float(values.mean()) for key, values in found.items()}


def first_figures(model: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """What a model is compared by on each set, the average and the user's data: its name and value."""
    sts = {**model["sts"], **({"avg": model["avg"]} if model["avg"] else {})}
    found = {name: ("spearman", figure["spearman"]) for name, figure in sts.items()}
    return found | {name: (FIRST[f["kind"]], first_figure(f)) for name, f in model["data"].items()}
