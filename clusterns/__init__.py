"""Clustering-aware InfoNCE: fast, small, exact.

>>> loss_fn = clusterns.ClusterNSLoss(embedding_dim=768, num_clusters=128)
>>> loss = loss_fn(anchors, positives)
"""

from .functional import cosine_similarity_matrix, info_nce, nearest_centroids, seed_centroids
from .loss import ClusterNSLoss

__version__ = "0.1.0"

__all__ = [
    "ClusterNSLoss",
    "__version__",
    "cosine_similarity_matrix",
    "info_nce",
    "nearest_centroids",
    "seed_centroids",
]
