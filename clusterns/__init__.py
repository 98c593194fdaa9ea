"""Clustering-aware InfoNCE: fast, small, exact.

>>> loss_fn = clusterns.ClusterNSLoss(embedding_dim=768, num_clusters=128)
>>> loss = loss_fn(anchors, positives)
"""

from typing import TYPE_CHECKING

from .cached import CachedClusterNSLoss
from .functional import cosine_similarity_matrix, info_nce, nearest_centroids, seed_centroids
from .loss import ClusterNSLoss

if TYPE_CHECKING:
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


def __getattr__(name: str):
    # Not imported above, nor in __all__: it alone needs scikit-learn.
    if name != "SphericalKMeans":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .spherical_kmeans import SphericalKMeans
    except ImportError as error:
        raise ImportError(
            f"SphericalKMeans: expected scikit-learn 1.6 or newer, got: {error}; "
            'pip install "clusterns[cluster]"'
        ) from error
    return SphericalKMeans
