"""k-means over a corpus against scikit-learn's and faiss, the seven STS sets against their usual evaluator.

k-means: all get unit rows. scikit-learn's is the Euclidean one, whose centres are means: on the sphere not
quite the same method, so its inertia is only about that of the others. faiss makes no labels, the others do.
"loss" is the mean of 1 − cos between points and the directions of the centres found. A kind a question: from
"given" centres, with "seeding" and default settings, in mini-"batches", and of real "sentences".

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
from contenders import KINDS, Case, contender
from report import OURS, ROOT
from torch import Tensor

SHARED = ROOT.parent / "shared" / "data"
STS = Path(os.environ.get("CLUSTERNS_STS", SHARED / "sts"))
MODEL = Path(os.environ.get("CLUSTERNS_STS_MODEL", SHARED / "models" / "all-MiniLM-L6-v2"))
FLOAT32 = {"dtype": torch.float32}
CASES = [
    Case("k-means given", 100_000, 384, 100, **FLOAT32),
    Case("k-means given", 100_000, 384, 1000, **FLOAT32),
    Case("k-means seeding", 100_000, 384, 100, **FLOAT32),
    Case("k-means batches", 100_000, 384, 100, **FLOAT32),
    Case("k-means sentences", 20_000, 384, 100, **FLOAT32),
    Case("evaluate", 1, 384, 0, **FLOAT32),
]
LOSS_TOLERANCE = 0.01  # relative: nobody's objective may be better than ours by more
SCORE_TOLERANCE = 0.05  # Spearman × 100: what rounding, and in bfloat16 the dtype, may change


class Data(NamedTuple):
    """Unit rows (n, D) and centres to start from (K, D)."""

    points: np.ndarray
    start: np.ndarray


def make_data(case: Case) -> Data | None:
    """Clusters of very different size that overlap, as embeddings do; or embeddings, which take a minute."""
    if case.kind == "evaluate":
        return None
    random = np.random.default_rng(0)
    if case.kind == "k-means sentences":
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(str(MODEL), device="cpu").float()
        lines = (SHARED / "wiki_sentences.txt").read_text(encoding="utf-8").splitlines()[: case.batch]
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder.encode(lines, batch_size=128, show_progress_bar=False, convert_to_tensor=True)
    else:
        directions = random.standard_normal((case.clusters, case.dim)).astype(np.float32)
        members = random.choice(case.clusters, case.batch, p=random.dirichlet(np.ones(case.clusters)))
        noise = random.standard_normal((case.batch, case.dim), dtype=np.float32)
        found = torch.from_numpy(0.2 * directions[members] + noise)
    points = F.normalize(found.float(), dim=1).numpy()
    return Data(points, points[np.random.default_rng(1).choice(len(points), case.clusters, replace=False)])


# --- contenders: calls that give the centres, or the scores ------------------------------------------------


def _kmeans(*kinds: str, name: str, package: str = "sklearn") -> Callable[[Callable], Callable]:
    def refuses(case: Case) -> str:
        missing = case.kind == "k-means sentences" and not SHARED.is_dir()
        return f"no {SHARED.name} with sentences and an encoder" if missing else ""

    def enter(build: Callable) -> Callable:
        for kind in kinds:
            contender(f"k-means {kind}", name, package=package, refuses=refuses)(build)
        return build

    return enter


def _iterations(case: Case) -> int:
    return 20 if case.clusters <= 100 else 10


def _settings(case: Case, data: Data, iterations: str) -> dict[str, Any]:
    """What a kind gives to both estimators."""
    if case.kind == "k-means seeding":
        return {"random_state": 0}
    if case.kind == "k-means batches":
        return {"random_state": 0, "batch_size": 4096}
    return {"init": data.start, iterations: _iterations(case), "tol": 0}


@_kmeans("given", "sentences", "seeding", "batches", name=OURS)
def _ours(case: Case, data: Data):
    from clusterns import SphericalKMeans

    more = {"max_iter": 2} if case.kind == "k-means batches" else {}
    settings = _settings(case, data, "max_iter") | more
    return lambda: SphericalKMeans(case.clusters, **settings).fit(data.points).cluster_centers_


@_kmeans("given", "sentences", "seeding", "batches", name="scikit-learn")
def _scikit_learn(case: Case, data: Data):
    from sklearn import cluster

    settings = _settings(case, data, "max_iter")
    kind = cluster.MiniBatchKMeans if case.kind == "k-means batches" else cluster.KMeans
    if case.kind != "k-means seeding":
        settings["n_init"] = 1
    return lambda: kind(case.clusters, **settings).fit(data.points).cluster_centers_


@_kmeans("given", "sentences", name="faiss", package="faiss")
def _faiss(case: Case, data: Data):
    import faiss

    def centers() -> np.ndarray:
        model = faiss.Kmeans(
            case.dim,
            case.clusters,
            niter=_iterations(case),
            spherical=True,
            max_points_per_centroid=case.batch,
        )
        model.train(data.points, init_centroids=data.start)
        return model.centroids

    return centers


def _without_data(case: Case) -> str:
    return "" if STS.is_dir() and MODEL.is_dir() else f"no STS sets at {STS} or no model at {MODEL}"


def _evaluate(name: str, build: Callable[..., Any], *given: Any, package: str = "torch") -> None:
    contender("evaluate", name, package=package, refuses=_without_data)(lambda case, data: build(*given))


def _our_scores(dtype: torch.dtype | None) -> Callable[[], dict[str, float]]:
    """All sets in one call: each distinct sentence once, in batches of like length."""
    from clusterns.encoder import SentenceEncoder
    from clusterns.evaluation.sts import SEVEN
    from clusterns.evaluation.sts_scores import evaluate_sts

    encoder = SentenceEncoder.from_pretrained(MODEL)
    encoder.max_length = encoder.longest_input
    if dtype is not None:
        encoder.encode = partial(encoder.encode, dtype=dtype)
    return lambda: evaluate_sts(encoder, STS, SEVEN, progress=False)


def _their_scores(batch_size: int, dtype: str) -> Callable[[], dict[str, float]]:
    """An EmbeddingSimilarityEvaluator for each set, one after the other."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    from clusterns.evaluation.sts import SEVEN, load_sts

    model = SentenceTransformer(str(MODEL), device="cpu", model_kwargs={"dtype": dtype})

    def run() -> dict[str, float]:
        scores = {}
        for name in SEVEN:
            pairs = load_sts(STS, name)
            evaluator = EmbeddingSimilarityEvaluator(
                *pairs, batch_size=batch_size, name=name, write_csv=False
            )
            scores[name] = 100 * evaluator(model)[evaluator.primary_metric]
        return scores

    return run


_evaluate(OURS, _our_scores, None)
_evaluate("clusterns, bfloat16", _our_scores, torch.bfloat16)
_evaluate("evaluator, float32, batch 64", _their_scores, 64, "float32", package="sentence_transformers")
# "auto" is how sentence-transformers loads a checkpoint: here in float16, which a CPU computes slowly.
_evaluate("evaluator as it comes", _their_scores, 16, "auto", package="sentence_transformers")


# --- parity ------------------------------------------------------------------------------------------------


def mean_distance(x: np.ndarray, centers: np.ndarray) -> float:
    """Mean of 1 − cos to the nearest centre."""
    unit: Tensor = F.normalize(torch.from_numpy(np.asarray(centers)).float(), dim=1)
    nearest = [(block @ unit.T).amax(dim=1) for block in torch.from_numpy(x).split(4096)]
    return float((1 - torch.cat(nearest).double()).mean())


def expected(case: Case, data: Data | None) -> Any:
    """What ours gives."""
    return KINDS[case.kind][OURS].build(case, data)()


def errors(data: Data | None, answer: Any, truth: Any) -> tuple[dict[str, float], str]:
    """Columns of an answer, and what is wrong with it."""
    if data is None:
        differences = {name: abs(answer[name] - truth[name]) for name in truth if name != "avg"}
        found = {
            "average": statistics.fmean(answer.values()),
            "largest_difference": max(differences.values()),
        }
        return found, "" if found["largest_difference"] <= SCORE_TOLERANCE else f"other scores: {differences}"
    loss, ours = (mean_distance(data.points, centers) for centers in (answer, truth))
    better = f"a better objective than ours, {loss} < {ours}" if loss < ours * (1 - LOSS_TOLERANCE) else ""
    return {"loss": loss, "inertia": loss * len(data.points)}, better
