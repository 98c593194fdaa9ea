"""Clustering-aware InfoNCE: fast, small, exact.

>>> loss_fn = clusterns.ClusterNSLoss(embedding_dim=768, num_clusters=128)
>>> loss = loss_fn(anchors, positives)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cached import CachedClusterNSLoss
    from .functional import cosine_similarity_matrix, info_nce, nearest_centroids, seed_centroids
    from .loss import ClusterNSLoss
    from .spherical_kmeans import SphericalKMeans as SphericalKMeans

__version__ = "0.1.0"

__all__ = [
    "CachedClusterNSLoss",
    "ClusterNSLoss",
    "__version__",
    "cosine_similarity_matrix",
    "info_nce",
    "nearest_centroids",
    "seed_centroids",
]

_PLACES = {
    "CachedClusterNSLoss": "cached",
    "ClusterNSLoss": "loss",
    **dict.fromkeys(
        ("cosine_similarity_matrix", "info_nce", "nearest_centroids", "seed_centroids"), "functional"
    ),
    "SphericalKMeans": "spherical_kmeans",  # not in __all__: it alone needs scikit-learn
}


def __getattr__(name: str):
    # Imported when first needed: torch takes a second, in which the command line can do without it.
    if name in _PLACES.values() or name == "rules":
        return import_module(f".{name}", __name__)
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_PLACES[name]}", __name__)
    except ImportError as error:
        if name != "SphericalKMeans":
            raise
        raise ImportError(
            f"SphericalKMeans: expected scikit-learn 1.6 or newer, got: {error}; "
            'pip install "clusterns[cluster]"'
        ) from error
    return globals().setdefault(name, getattr(module, name))
