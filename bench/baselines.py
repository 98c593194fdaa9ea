"""The losses that ClusterNSLoss is measured against. Only for benchmarks: none of this is the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """Numbers of the objective in a benchmark: the published RoBERTa-base row."""

    temperature: float = 0.05
    hard_negative_weight: float = 0.0
    bml_weight: float = 1e-4
    bml_alpha: float = 0.2
    bml_beta: float = 0.5
    centroid_momentum: float = 1e-3


def broadcast_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosines from a (M, N, D) broadcast, as the published code forms them."""
    return F.cosine_similarity(x[:, None, :], y[None, :, :], dim=-1)


def published_formulation(
    anchors: Tensor, positives: Tensor, centroids: Tensor, settings: Settings
) -> Tensor:
    """The objective the way the published code goes about it, in our words.

    Broadcast cosines for every matrix, clusters found anew for the hard negatives and for the mask, B×B
    masks by one-hot products, a Python list for the B×2B weights, and a mean cosine read to the host.
    """
    batch = len(anchors)
    cosines = broadcast_cosine(anchors, positives)
    float(cosines.detach().mean())
    points = anchors.detach()
    with torch.no_grad():
        runner_up = broadcast_cosine(points, centroids).topk(2, dim=1).indices[:, 1]
        nearest = broadcast_cosine(points, centroids).argmax(dim=1)
        members = F.one_hot(nearest, len(centroids)).float()
        mates = (members @ members.T).fill_diagonal_(0)
    delta = (cosines - cosines.diagonal()[:, None]) * mates
    bml = (F.relu(delta + settings.bml_alpha) + F.relu(-delta - settings.bml_beta)).mean()
    hard = broadcast_cosine(anchors, centroids[runner_up])
    logits = torch.cat([cosines, hard], dim=1) / settings.temperature
    weights = torch.tensor(
        [
            [0.0] * batch + [0.0] * row + [settings.hard_negative_weight] + [0.0] * (batch - row - 1)
            for row in range(batch)
        ]
    )
    loss = F.cross_entropy(logits + weights.to(logits.device), torch.arange(batch, device=logits.device))
    return loss + settings.bml_weight * bml


def published_step(anchors: Tensor, positives: Tensor, centroids: Tensor, settings: Settings) -> Tensor:
    """A training step the published way: assign, move the centroids (K, D) in place by the sum, objective."""
    points = anchors.detach().clone()
    with torch.no_grad():
        nearest = broadcast_cosine(points, centroids).argmax(dim=1)
        members = F.one_hot(nearest, len(centroids))
        (members.float() @ members.T.float()).fill_diagonal_(0)  # formed there too, for a result nobody uses
        totals = members.T.to(points.dtype) @ points
        totals = totals + centroids * members.sum(dim=0).bool().logical_not()[:, None]
        share = settings.centroid_momentum
        centroids.copy_(share * totals + (1 - share) * centroids)
    return published_formulation(anchors, positives, centroids, settings)


def eager_formula(anchors: Tensor, positives: Tensor, centroids: Tensor, settings: Settings) -> Tensor:
    """Best plain torch we know: normalise, one product, the B×K block with log-counts, autograd."""
    a, p, c = (F.normalize(z, dim=1) for z in (anchors, positives, centroids))
    return eager_unit_formula(a, p, c, settings)


def eager_unit_formula(a: Tensor, p: Tensor, c: Tensor, settings: Settings) -> Tensor:
    """`eager_formula` for rows that are normalised already. Half precision: the logits widen to float32."""
    cosines, to_centroids = a @ p.T, a @ c.T
    nearest, runner_up = to_centroids.detach().topk(2, dim=1).indices.unbind(1)
    ones = torch.ones(len(a), device=a.device)
    log_counts = torch.zeros(len(c), device=a.device).index_add_(0, runner_up, ones).log()
    logits = torch.cat([cosines / settings.temperature, to_centroids / settings.temperature + log_counts], 1)
    loss = F.cross_entropy(logits, torch.arange(len(a), device=a.device))
    mates = nearest[:, None] == nearest[None, :]  # a sentence as its own mate is neutral
    delta = (cosines - cosines.diagonal()[:, None]) * mates
    bml = (F.relu(delta + settings.bml_alpha) + F.relu(-delta - settings.bml_beta)).mean()
    return loss + settings.bml_weight * bml


class EagerStep(nn.Module):
    """A training step in the best plain torch we know: assign, update, assign anew, loss; no host sync.

    A module, because `torch.compile` may replay a graph that writes to a buffer, not one that writes to an
    argument.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, settings: Settings):
        super().__init__()
        self.register_buffer("centroids", centroids.clone())
        self.settings = settings

    def forward(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """Loss of one batch of (B, D) views; the centroids move in place by the sum of their members."""
        a, p = F.normalize(anchors, dim=1), F.normalize(positives, dim=1)
        with torch.no_grad():
            nearest = (a @ self.unit_centroids(a).T).argmax(dim=1)
            clusters = torch.arange(len(self.centroids), device=a.device)
            # No scatter into zeros: torch 2.11's inductor makes float32 of it, whatever their dtype.
            members = (nearest[:, None] == clusters).to(a.dtype)
            totals = (members.T @ anchors).float()
            moved = torch.lerp(self.centroids, totals, self.settings.centroid_momentum)
            occupied = members.sum(dim=0)[:, None] > 0
            self.centroids.copy_(torch.where(occupied, moved, self.centroids))
        return eager_unit_formula(a, p, self.unit_centroids(a), self.settings)

    def unit_centroids(self, like: Tensor) -> Tensor:
        """Normalised centroids (K, D) in the dtype of a batch."""
        return F.normalize(self.centroids, dim=1).to(like.dtype)


def eager_info_nce(anchors: Tensor, positives: Tensor, settings: Settings) -> Tensor:
    """Plain InfoNCE in plain torch."""
    a, p = F.normalize(anchors, dim=1), F.normalize(positives, dim=1)
    return F.cross_entropy(a @ p.T / settings.temperature, torch.arange(len(a), device=a.device))


def linear_cross_entropy_info_nce(batch_chunk_size: int) -> Callable[[Tensor, Tensor, Settings], Tensor]:
    """Plain InfoNCE through torch's chunked linear cross-entropy (torch ≥ 2.13)."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size)

    def loss(anchors: Tensor, positives: Tensor, settings: Settings) -> Tensor:
        a, p = F.normalize(anchors, dim=1), F.normalize(positives, dim=1)
        labels = torch.arange(len(a), device=a.device)
        return F.linear_cross_entropy(a / settings.temperature, p, labels, options=options)

    return loss
