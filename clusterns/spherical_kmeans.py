"""k-means by cosine over a whole corpus, behind scikit-learn's estimator interface.

Needs scikit-learn ≥ 1.6: `pip install "clusterns[cluster]"`.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from .checks import check_choice, check_count, check_embeddings, check_number, in_short
from .kmeans_seeding import k_means_plus_plus, random_rows
from .kmeans_steps import Assigned, Clusters, Rows, assign, lloyd, mini_batches
from .objective.norms import compute_dtype, unit_rows, without_autocast

_INITS = ("k-means++", "random")

# Rows per cluster to seed from, and a number below which all are taken.
_SEEDING_ROWS, _FEW_ROWS = 32, 2**14


class SphericalKMeans(  # scikit-learn wants its mixins on the left
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator
):
    """k-means on the unit sphere: centres are unit vectors, and points go to the one of highest cosine.

    It minimises `inertia_`, the sum of w (1 − cos) between points and their centres. Points are (n, D) NumPy
    arrays, memory maps, anything array-like or torch tensors on any device; float16, bfloat16, float32 or
    float64, and other numbers become float64. They need not be normalised, are read in chunks and never
    copied whole. Float64 is computed in float64, everything else in float32, on a GPU by the Triton
    assignment kernel. The same input, `random_state`, machine and number of threads give the same bits.

    A zero row (‖x‖ ≤ 1e-8) has cosine 0 with everything: it gets label 0, adds w to the inertia, and pulls on
    no centre. An empty cluster takes the point that is farthest from its centre.

    Args:
        n_clusters: K, at most the number of points.
        init: "k-means++" (greedy, with chances in proportion to w (1 − cos)), "random" points, or centres
            (K, D), which need not be normalised.
        n_init: how often to start afresh; the run of lowest inertia is kept. "auto" is 1 for "k-means++" and
            10 for "random"; given centres make one run.
        max_iter: most iterations over the points in a run.
        tol: a run ends once an iteration lowers the inertia by no more than this share of it. With 0 it ends
            when no label changes.
        batch_size: None for Lloyd's algorithm; a number for mini-batches of so many points, which need fewer
            passes over the data to come close: an iteration is then a pass over all points in random order.
        init_size: how many points, drawn at random, "k-means++" picks from; None for 32 per cluster, and at
            least 16,384.
        random_state: seed or `numpy.random.RandomState`.
        verbose: above 0 shows progress with tqdm.
        device: where to compute; None for the device of a tensor, and the CPU for everything else.

    Attributes:
        cluster_centers_: (K, D) unit vectors, float32 or float64.
        labels_: (n,) int64, the centre of highest cosine of each point, the lowest id on ties. After
            `partial_fit`, of the points of that call.
        inertia_: Σ w (1 − cos) over the points of `labels_`.
        n_iter_: iterations of the run that was kept, and calls of `partial_fit`.
        n_features_in_: D.
        feature_names_in_: names of the columns, where the input has them.

    `cluster_centers_` and `labels_` are tensors on the device of the points if those came as a tensor, NumPy
    arrays otherwise; `predict` and `transform` likewise go by their own input.

    """

    def __init__(
        self,
        n_clusters=8,
        *,
        init="k-means++",
        n_init="auto",
        max_iter=100,
        tol=1e-4,
        batch_size=None,
        init_size=None,
        random_state=None,
        verbose=0,
        device=None,
    ):
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.init_size = init_size
        self.random_state = random_state
        self.verbose = verbose
        self.device = device

    def fit(self, X, y=None, sample_weight=None):
        """Find the clusters of X (n, D).

        Args:
            X: points, see the class.
            y: ignored.
            sample_weight: (n,) weights w ≥ 0, 1 if None.

        Raises:
            TypeError, ValueError: one line that names the argument, what was expected and what came.

        """
        self._check_parameters()
        rows = self._rows(X, sample_weight, reset=True)
        random = check_random_state(self.random_state)
        best: tuple[Clusters, int, Assigned, float] | None = None
        for _ in range(self._runs()):
            clusters, iterations = self._run(rows, random)
            assigned = assign(rows, clusters.centers)
            inertia = assigned.inertia(rows)
            if best is None or inertia < best[3]:
                best = clusters, iterations, assigned, inertia
        assert best is not None
        self._clusters, self.n_iter_ = best[:2]
        self._publish(X, best[2], best[3])
        found = int(torch.bincount(best[2].labels).count_nonzero())
        if found < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({found}) found smaller than n_clusters ({self.n_clusters}). "
                "Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def partial_fit(self, X, y=None, sample_weight=None):
        """Learn from one mini-batch X (n, D), for data that comes in pieces.

        The first call seeds the centres from its points, at least K; every call moves each centre into the
        direction of the weighted sum of all points that were ever assigned to it. After `fit` it goes on from
        there. Arguments and errors as `fit`.
        """
        self._check_parameters()
        first = not hasattr(self, "cluster_centers_")
        rows = self._rows(X, sample_weight, reset=first)
        if first:
            self._clusters = Clusters(self._first_centers(rows, check_random_state(self.random_state)))
            self.n_iter_ = 0
        else:
            self._clusters.to(rows.dtype, rows.device)
        self._clusters.learn(rows)
        self.n_iter_ += 1
        assigned = assign(rows, self._clusters.centers)
        self._publish(X, assigned, assigned.inertia(rows))
        return self

    def predict(self, X):
        """Return the centre of highest cosine of each point, (n,) int64, the lowest id on ties."""
        rows, centers = self._fitted_rows(X)
        return _like(X, assign(rows, centers).labels)

    def transform(self, X):
        """Return cosine distances 1 − cos to all centres, (n, K), in [0, 2], float32 or float64."""
        rows, centers = self._fitted_rows(X)
        distances = torch.empty((len(rows), len(centers)), dtype=rows.dtype, device=rows.device)
        with torch.no_grad(), without_autocast(rows.device):
            for part in rows.parts(len(rows)):
                out = torch.mm(rows.block(part), centers.T, out=distances[part])
                out.mul_(rows.scale[part, None]).neg_().add_(1).clamp_(0, 2)
        return _like(X, distances)

    def score(self, X, y=None, sample_weight=None):
        """Return −Σ w (1 − cos) between points (n, D) and their nearest centres."""
        rows, centers = self._fitted_rows(X, sample_weight)
        return -assign(rows, centers).inertia(rows)

    # --- what the public methods are made of ---------------------------------------------------------------

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _check_parameters(self) -> None:
        for name in ("n_clusters", "max_iter", "batch_size", "init_size", "n_init"):
            value = getattr(self, name)
            if value is None and name in ("batch_size", "init_size"):
                continue
            if name == "n_init" and isinstance(value, str):
                check_choice(name, value, ("auto",))
                continue
            check_count(name, _plain(value), at_least=1)
        check_number("tol", _plain(self.tol), at_least=0)
        if isinstance(self.init, str):
            check_choice("init", self.init, _INITS)

    def _runs(self) -> int:
        if not isinstance(self.init, str):
            return 1
        if self.n_init == "auto":
            return 10 if self.init == "random" else 1
        return self.n_init

    def _rows(self, X, sample_weight=None, *, reset: bool) -> Rows:
        data = self._tensor(X, reset)
        if reset and len(data) < self.n_clusters:
            raise ValueError(f"n_clusters: expected at most n_samples={len(data)}, got {self.n_clusters}")
        device = data.device if self.device is None else torch.device(self.device)
        if device.type == "cuda" and not data.is_cuda:  # once if it fits, else chunk by chunk in every pass
            fits = data.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
            data = data.to(device) if fits else data
        weight = None if sample_weight is None else _weights(sample_weight, len(data))
        rows = Rows(data, weight, compute_dtype(data), device)
        if reset and not bool(rows.valid.any()):
            raise ValueError("X: expected a row that is not zero and has a weight above 0, got none")
        return rows

    def _tensor(self, X, reset: bool) -> Tensor:
        """View X as a tensor of a floating dtype, checked; keep or check the number and names of features."""
        if isinstance(X, Tensor):
            if not (X.is_floating_point() or X.is_complex()):
                X = X.double()
            check_embeddings("X", X)
            if reset:
                self.n_features_in_ = X.shape[1]
                if hasattr(self, "feature_names_in_"):
                    del self.feature_names_in_
            elif X.shape[1] != self.n_features_in_:
                raise ValueError(f"X: expected {self.n_features_in_} features, got {X.shape[1]}")
            return X.detach()
        # Finite or not is what the norms tell, which must be taken anyway.
        floating = [np.float64, np.float32, np.float16]
        array = validate_data(self, X, reset=reset, dtype=floating, ensure_all_finite=False)
        native = array.dtype.newbyteorder("=")
        if array.dtype != native or any(stride < 0 or stride % native.itemsize for stride in array.strides):
            array = np.ascontiguousarray(array, dtype=native)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # nobody writes
            return torch.from_numpy(array)

    def _fitted_rows(self, X, sample_weight=None) -> tuple[Rows, Tensor]:
        check_is_fitted(self)
        rows = self._rows(X, sample_weight, reset=False)
        return rows, torch.as_tensor(self.cluster_centers_).to(rows.device, rows.dtype)

    def _first_centers(self, rows: Rows, random: np.random.RandomState) -> Tensor:
        if not isinstance(self.init, str):
            return self._given_centers(rows)
        if self.init == "random":
            return rows.units(random_rows(rows, self.n_clusters, random))
        wanted = max(_SEEDING_ROWS * self.n_clusters, _FEW_ROWS) if self.init_size is None else self.init_size
        wanted = max(wanted, self.n_clusters)
        valid = rows.valid.nonzero()[:, 0]
        if len(valid) > wanted:
            drawn = np.sort(random.choice(len(valid), wanted, replace=False))
            rows = rows.subset(valid[torch.from_numpy(drawn).to(valid.device)])
        with self._progress("k-means++", self.n_clusters) as advance:
            return rows.units(k_means_plus_plus(rows, self.n_clusters, random, advance))

    def _given_centers(self, rows: Rows) -> Tensor:
        given = self.init if isinstance(self.init, Tensor) else np.asarray(self.init)
        expected = (self.n_clusters, self.n_features_in_)
        if tuple(given.shape) != expected:
            words = " or ".join(map(repr, _INITS))
            came = f"shape {tuple(given.shape)}" if given.ndim else repr(self.init)
            raise ValueError(f"init: expected {words}, or centres of shape {expected}, got {came}")
        centers = torch.as_tensor(given).detach().to(rows.device, torch.float64)
        centers, scale = unit_rows(centers, torch.float64)
        if not bool((scale > 0).all()):
            raise ValueError("init: expected finite centres that are not zero, got others")
        return centers.to(rows.dtype)

    def _run(self, rows: Rows, random: np.random.RandomState) -> tuple[Clusters, int]:
        centers = self._first_centers(rows, random)
        with self._progress("k-means", self.max_iter) as advance:
            if self.batch_size is None:
                return lloyd(rows, centers, self.max_iter, self.tol, advance)
            return mini_batches(rows, centers, self.max_iter, self.tol, self.batch_size, random, advance)

    def _publish(self, X, assigned: Assigned, inertia: float) -> None:
        self.cluster_centers_ = _like(X, self._clusters.centers)
        self.labels_ = _like(X, assigned.labels)
        self.inertia_ = inertia

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[..., None] | None]:
        """Give a function that advances a bar and shows the inertia it is given; None without `verbose`."""
        if not self.verbose:
            yield None
            return
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=what) as bar:

            def advance(inertia: float | None = None) -> None:
                if inertia is not None:
                    bar.set_postfix(inertia=f"{inertia:.6g}", refresh=False)
                bar.update()

            yield advance


def _plain(value: Any) -> Any:
    """Turn NumPy's numbers, as a parameter grid has them, into Python's."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _weights(sample_weight: Any, rows: int) -> Tensor:
    weight = sample_weight
    if not isinstance(weight, Tensor):
        try:
            weight = torch.from_numpy(np.array(weight, dtype=np.float64))  # a copy: it may be read-only
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"sample_weight: expected {rows} numbers, got {in_short(sample_weight)}"
            ) from error
    if weight.ndim == 0:
        weight = weight.expand(rows)
    if tuple(weight.shape) != (rows,):
        raise ValueError(f"sample_weight: expected shape ({rows},), got {tuple(weight.shape)}")
    if not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError("sample_weight: expected finite numbers of at least 0, got others")
    return weight.detach()


def _like(X: Any, result: Tensor) -> Any:
    """Give the result in the kind of X: a tensor on its device, else a NumPy array."""
    return result.to(X.device) if isinstance(X, Tensor) else result.cpu().numpy()
