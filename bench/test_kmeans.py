"""How fast is k-means over a corpus, against scikit-learn's and faiss, at the same objective?

All get unit rows. scikit-learn's k-means is the Euclidean one, whose centres are means: on the sphere that is
not quite the same method, so its inertia is only about that of the others. faiss makes no labels, the others
do. "loss" is the mean of 1 − cos between points and the directions of the centres found.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from contenders import paired_ratio

from clusterns.normalization import unit_rows

cluster = pytest.importorskip("sklearn.cluster", reason='needs pip install "clusterns[cluster]"')
faiss = pytest.importorskip("faiss", reason="needs pip install faiss-cpu")

from clusterns import SphericalKMeans  # noqa: E402 (needs scikit-learn)

POINTS, DIM = 100_000, 384
SENTENCES = 20_000
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def blobs(clusters: int) -> np.ndarray:
    """Unit rows (n, D) of a mixture: clusters of very different size that overlap, as embeddings do."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((clusters, DIM)).astype(np.float32)
    members = random.choice(clusters, POINTS, p=random.dirichlet(np.ones(clusters)))
    noise = random.standard_normal((POINTS, DIM), dtype=np.float32)
    return unit_rows(torch.from_numpy(0.2 * directions[members] + noise), torch.float32)[0].numpy()


@pytest.fixture(scope="module")
def sentences() -> np.ndarray:
    """Embeddings (n, 384) of Wikipedia sentences by all-MiniLM-L6-v2; takes a minute."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data with sentences and an encoder")
    encoders = pytest.importorskip("sentence_transformers")
    encoder = encoders.SentenceTransformer(str(SHARED / "models/all-MiniLM-L6-v2"), device="cpu").float()
    lines = (SHARED / "wiki_sentences.txt").read_text(encoding="utf-8").splitlines()[:SENTENCES]
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.encode(lines, batch_size=128, show_progress_bar=False, convert_to_tensor=True)
    return unit_rows(found, torch.float32)[0].numpy()


def start_of(x: np.ndarray, clusters: int) -> np.ndarray:
    return x[np.random.default_rng(1).choice(len(x), clusters, replace=False)]


# From given centres, a number of iterations; returns the centres.


def ours_from(x, start, iterations):
    return SphericalKMeans(len(start), init=start, max_iter=iterations, tol=0).fit(x).cluster_centers_


def scikit_learn_from(x, start, iterations):
    model = cluster.KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    return model.fit(x).cluster_centers_


def faiss_from(x, start, iterations):
    model = faiss.Kmeans(
        x.shape[1], len(start), niter=iterations, spherical=True, max_points_per_centroid=len(x)
    )
    model.train(x, init_centroids=start)
    return model.centroids


FROM = {"clusterns": ours_from, "scikit-learn": scikit_learn_from, "faiss": faiss_from}

# From nothing, each with its own seeding and defaults; and in mini-batches.
ALONE = {
    "clusterns": lambda x, k: SphericalKMeans(k, random_state=0).fit(x).cluster_centers_,
    "scikit-learn": lambda x, k: cluster.KMeans(k, random_state=0).fit(x).cluster_centers_,
}
BATCHES = {
    "clusterns": lambda x, k: (
        SphericalKMeans(k, batch_size=4096, max_iter=2, random_state=0).fit(x).cluster_centers_
    ),
    "scikit-learn": lambda x, k: (
        cluster.MiniBatchKMeans(k, batch_size=4096, n_init=1, random_state=0).fit(x).cluster_centers_
    ),
}


def mean_distance(x: np.ndarray, centers: np.ndarray) -> float:
    c, _ = unit_rows(torch.from_numpy(np.asarray(centers)), torch.float32)
    nearest = [(block @ c.T).amax(dim=1) for block in torch.from_numpy(x).split(4096)]
    return float((1 - torch.cat(nearest).double()).mean())


def measure(benchmark, contenders, contender, *arguments, tolerance, rounds=3):
    """Check that the contender's objective is about ours or worse, then time it beside ours."""
    theirs, ours = contenders[contender], contenders["clusterns"]
    loss, expected = (mean_distance(arguments[0], run(*arguments)) for run in (theirs, ours))
    assert loss >= expected * (1 - tolerance)
    benchmark.extra_info |= {"loss": loss, "inertia": loss * len(arguments[0])}
    benchmark.pedantic(lambda: theirs(*arguments), rounds=rounds)
    benchmark.extra_info["time_ratio"] = paired_ratio(
        lambda: theirs(*arguments), lambda: ours(*arguments), rounds
    )


@pytest.mark.benchmark(group=f"k-means, 20 iterations, n={POINTS} K=100 D={DIM}")
@pytest.mark.parametrize("contender", list(FROM))
def test_hundred_clusters(benchmark, contender):
    x = blobs(100)
    measure(benchmark, FROM, contender, x, start_of(x, 100), 20, tolerance=0.01, rounds=5)


@pytest.mark.benchmark(group=f"k-means, 10 iterations, n={POINTS} K=1000 D={DIM}")
@pytest.mark.parametrize("contender", list(FROM))
def test_thousand_clusters(benchmark, contender):
    x = blobs(1000)
    measure(benchmark, FROM, contender, x, start_of(x, 1000), 10, tolerance=0.01)


@pytest.mark.benchmark(group=f"k-means, 20 iterations, sentence embeddings, n={SENTENCES} K=100 D={DIM}")
@pytest.mark.parametrize("contender", list(FROM))
def test_sentences(benchmark, sentences, contender):
    start = start_of(sentences, 100)
    measure(benchmark, FROM, contender, sentences, start, 20, tolerance=0.01, rounds=5)


@pytest.mark.benchmark(group=f"k-means with seeding, default settings, n={POINTS} K=100 D={DIM}")
@pytest.mark.parametrize("contender", list(ALONE))
def test_with_seeding(benchmark, contender):
    measure(benchmark, ALONE, contender, blobs(100), 100, tolerance=0.01)


@pytest.mark.benchmark(group=f"k-means in mini-batches with seeding, n={POINTS} K=100 D={DIM}")
@pytest.mark.parametrize("contender", list(BATCHES))
def test_mini_batches(benchmark, contender):
    measure(benchmark, BATCHES, contender, blobs(100), 100, tolerance=0.01)
