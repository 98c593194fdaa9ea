"""k-means over a corpus against scikit-learn's and faiss, the seven STS sets against their usual evaluator.

k-means: all get unit rows, and start from "given" centres or with their own "seeding" and default settings.
scikit-learn's is the Euclidean one, whose centres are means: on the sphere not quite the same method, so its
inertia is only about that of the others. faiss makes no labels, the others do. "loss" is the mean of 1 − cos
between points and the directions of the centres found.

evaluate: needs the STS sets and the six-layer all-MiniLM-L6-v2 of ../shared, or CLUSTERNS_STS and
CLUSTERNS_STS_MODEL.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from contenders import KINDS, Built, Case, contender
from report import OURS, ROOT
from torch import Tensor

SHARED = ROOT.parent / "shared" / "data"
STS = Path(os.environ.get("CLUSTERNS_STS", SHARED / "sts"))
MODEL = Path(os.environ.get("CLUSTERNS_STS_MODEL", SHARED / "models" / "all-MiniLM-L6-v2"))
GIVEN, SEEDING, EVALUATE = "k-means given", "k-means seeding", "evaluate"
CASES = [
    Case(GIVEN, 100_000, 384, 100, torch.float32),
    Case(GIVEN, 100_000, 384, 1000, torch.float32),
    Case(SEEDING, 100_000, 384, 100, torch.float32),
    Case(EVALUATE, 1, 384, 0, torch.float32),
]
OWN_KINDS = {case.kind for case in CASES}
LOSS_TOLERANCE = 0.01  # relative: nobody's objective may be better than ours by more


class Data(NamedTuple):
    """Unit rows (n, D) and centres to start from (K, D)."""

    points: np.ndarray
    start: np.ndarray


def data_of(case: Case, device: torch.device) -> Any:
    """Clusters of very different size that overlap, as embeddings do; or the STS sets by name."""
    if case.kind == EVALUATE:
        from clusterns.evaluation.sts import SEVEN, load_sts

        return {name: load_sts(STS, name) for name in SEVEN}
    random = np.random.default_rng(0)
    directions = random.standard_normal((case.clusters, case.dim)).astype(np.float32)
    members = random.choice(case.clusters, case.batch, p=random.dirichlet(np.ones(case.clusters)))
    noise = random.standard_normal((case.batch, case.dim), dtype=np.float32)
    points = F.normalize(torch.from_numpy(0.2 * directions[members] + noise), dim=1).numpy()
    return Data(points, points[np.random.default_rng(1).choice(len(points), case.clusters, replace=False)])


# --- contenders: calls that give the centres, or the scores ------------------------------------------------


def _iterations(case: Case) -> int:
    return 20 if case.clusters <= 100 else 10


def _settings(case: Case, data: Data) -> dict[str, Any]:
    """What a kind gives to both estimators."""
    if case.kind == SEEDING:
        return {"random_state": 0}
    return {"init": data.start, "max_iter": _iterations(case), "tol": 0}


@contender(OURS, GIVEN, SEEDING, package="sklearn")
def _ours(case: Case, data: Data):
    from clusterns import SphericalKMeans

    return lambda: SphericalKMeans(case.clusters, **_settings(case, data)).fit(data.points).cluster_centers_


@contender("scikit-learn", GIVEN, SEEDING, package="sklearn")
def _scikit_learn(case: Case, data: Data):
    from sklearn.cluster import KMeans

    settings = _settings(case, data) | ({"n_init": 1} if case.kind == GIVEN else {})
    return lambda: KMeans(case.clusters, **settings).fit(data.points).cluster_centers_


@contender("faiss", GIVEN, package="faiss")
def _faiss(case: Case, data: Data):
    import faiss

    settings = {"niter": _iterations(case), "spherical": True, "max_points_per_centroid": case.batch}

    def centers() -> np.ndarray:
        model = faiss.Kmeans(case.dim, case.clusters, **settings)
        model.train(data.points, init_centroids=data.start)
        return model.centroids

    return centers


def _evaluate(name: str, package: str = "torch") -> Callable[[Callable], Callable]:
    def refuses(case: Case) -> str:
        there = STS.is_dir() and MODEL.is_dir()
        return "" if there else f"no STS sets at {STS} or no model at {MODEL}"

    return contender(name, EVALUATE, package=package, refuses=refuses)


def _our_scores(case: Case, data: Any, dtype: torch.dtype | None = None) -> Callable[[], dict[str, float]]:
    """All sets in one call: each distinct sentence once, in batches of like length."""
    from clusterns.encoder import SentenceEncoder
    from clusterns.evaluation.sts_scores import evaluate_sts

    encoder = SentenceEncoder.from_pretrained(MODEL)
    encoder.max_length = encoder.longest_input
    if dtype is not None:
        encoder.encode = partial(encoder.encode, dtype=dtype)
    return lambda: evaluate_sts(encoder, STS, list(data), progress=False)


_evaluate(OURS)(_our_scores)
_evaluate("clusterns, bfloat16")(partial(_our_scores, dtype=torch.bfloat16))


@_evaluate("evaluator, float32, batch 64", package="sentence_transformers")
def _their_scores(case: Case, data: Any) -> Callable[[], dict[str, float]]:
    """An EmbeddingSimilarityEvaluator for each set, one after the other."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    model = SentenceTransformer(str(MODEL), device="cpu", model_kwargs={"dtype": "float32"})

    def run() -> dict[str, float]:
        scores = {}
        for name, pairs in data.items():
            evaluator = EmbeddingSimilarityEvaluator(*pairs, batch_size=64, name=name, write_csv=False)
            scores[name] = 100 * evaluator(model)[evaluator.primary_metric]
        return scores

    return run


# --- parity ------------------------------------------------------------------------------------------------


def mean_distance(x: np.ndarray, centers: np.ndarray) -> float:
    """Mean of 1 − cos to the nearest centre."""
    unit: Tensor = F.normalize(torch.from_numpy(np.asarray(centers)).float(), dim=1)
    nearest = [(block @ unit.T).amax(dim=1) for block in torch.from_numpy(x).split(4096)]
    return float((1 - torch.cat(nearest).double()).mean())


def score_tolerance(pairs: int) -> float:
    """Spearman × 100 that rounding, and in bfloat16 the dtype, may change on a set of so many pairs.

    Rounding swaps neighbours in the order of cosines, and one swap may change a correlation over n pairs by
    12 / n(n + 1). Few of these swap, each with what comes of it at random: together they spread as 1/n. On
    random parts of STS-B test (10 to 1,000 pairs, all-MiniLM-L6-v2, bfloat16) the root mean square was 6/n.
    """
    return max(0.05, 1200 / (pairs * (pairs + 1)) + 50 / pairs)


def expected(case: Case, data: Any) -> Any:
    """What ours gives."""
    return KINDS[case.kind][OURS].build(case, data)()


def check(case: Case, answer: Any, built: Built, truth: Any) -> tuple[dict[str, float], str]:
    """Columns of an answer, and what is wrong with it."""
    data = built.views
    if case.kind == EVALUATE:
        differences = {name: abs(answer[name] - truth[name]) for name in data}
        wrong = [  # NaN never passes
            f"{name} by {each:.2g}"
            for name, each in differences.items()
            if not each <= score_tolerance(len(data[name].scores))
        ]
        average = statistics.fmean(answer[name] for name in data)
        found = {"average": average, "largest_difference": max(differences.values())}
        return found, f"other scores: {', '.join(wrong)}" * bool(wrong)
    loss, ours = (mean_distance(data.points, centers) for centers in (answer, truth))
    better = f"a better objective than ours, {loss} < {ours}" if loss < ours * (1 - LOSS_TOLERANCE) else ""
    return {"loss": loss, "inertia": loss * len(data.points)}, better
