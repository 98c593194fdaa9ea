"""How fast are the seven STS sets, against sentence-transformers' own evaluator over the same pairs?

Needs the STS sets and the six-layer all-MiniLM-L6-v2 of ../shared, or CLUSTERNS_STS and CLUSTERNS_STS_MODEL.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.sts import SEVEN, load_sts
from clusterns.evaluation.sts_scores import evaluate_sts

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STS = Path(os.environ.get("CLUSTERNS_STS", DATA / "sts"))
MODEL = Path(os.environ.get("CLUSTERNS_STS_MODEL", DATA / "models" / "all-MiniLM-L6-v2"))
# Spearman × 100: what rounding, and in bfloat16 the dtype, may change.
TOLERANCE = 0.05
Scores = dict[str, float]


def ours(dtype: torch.dtype | None = None) -> Callable[[], Scores]:
    """All sets in one call: each distinct sentence once, in batches of like length."""
    encoder = SentenceEncoder.from_pretrained(MODEL)
    encoder.max_length = encoder.longest_input
    if dtype is not None:
        encode = encoder.encode
        encoder.encode = lambda sentences, **settings: encode(sentences, dtype=dtype, **settings)
    return lambda: evaluate_sts(encoder, STS, SEVEN, progress=False)


def theirs(batch_size: int, dtype: str) -> Callable[[], Scores]:
    """An EmbeddingSimilarityEvaluator for each set, one after the other."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    model = SentenceTransformer(str(MODEL), device="cpu", model_kwargs={"dtype": dtype})

    def run() -> Scores:
        scores = {}
        for name in SEVEN:
            evaluator = EmbeddingSimilarityEvaluator(
                *load_sts(STS, name), batch_size=batch_size, name=name, write_csv=False
            )
            scores[name] = 100 * evaluator(model)[evaluator.primary_metric]
        return scores

    return run


# "auto" is how sentence-transformers loads a checkpoint: here in float16, which a CPU computes slowly.
CONTENDERS: dict[str, Callable[[], Callable[[], Scores]]] = {
    "clusterns": ours,
    "clusterns, bfloat16": lambda: ours(torch.bfloat16),
    "evaluator, float32, batch 64": lambda: theirs(64, "float32"),
    "evaluator as it comes": lambda: theirs(16, "auto"),
}


def timed(run: Callable[[], Scores]) -> tuple[float, Scores]:
    began = time.perf_counter()
    scores = run()
    return time.perf_counter() - began, scores


@pytest.mark.benchmark(group="seven STS sets, six layers")
@pytest.mark.parametrize("contender", list(CONTENDERS))
def test_seven_sts_sets(benchmark, contender):
    if not (STS.is_dir() and MODEL.is_dir()):
        pytest.skip(f"no STS sets at {STS} or no model at {MODEL}")
    run, reference = CONTENDERS[contender](), ours()
    seconds, scores = timed(lambda: benchmark.pedantic(run, rounds=1, warmup_rounds=0))
    our_seconds, expected = timed(reference)  # back to back: a shared machine drifts
    differences = [abs(scores[name] - expected[name]) for name in SEVEN]
    assert max(differences) <= TOLERANCE, dict(zip(SEVEN, differences, strict=True))
    benchmark.extra_info["largest_difference"] = max(differences)
    benchmark.extra_info["average"] = statistics.fmean(scores[name] for name in SEVEN)
    benchmark.extra_info["time_ratio"] = seconds / our_seconds
