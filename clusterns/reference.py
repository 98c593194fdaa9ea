"""The ClusterNS objective, one formula of the paper a line. Written to be checked, not to be fast.

Deng et al., "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation", Findings of
ACL 2023 (arXiv 2305.09892). This file is the oracle of every test and benchmark: it works in whatever
floating dtype it is given (use float64), builds every matrix whole, and leaves gradients to autograd.

Notation: B sentences, D dimensions, K centroids; z1, z2 (B, D) the raw embeddings of the two views;
C (K, D) the raw centroids; τ the temperature; S = cos(z1, z2) (B, B), s_i = S_ii.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Pairs, Rule, Side, ask, rule_of

# A vector shorter than this has no direction: its cosine with everything is 0, and it gets no gradient.
SHORTEST_NORM = 1e-8

CITATION = """
@inproceedings{deng-etal-2023-clustering,
    title = "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation",
    author = "Deng, Jinghao and Wan, Fanqi and Yang, Tao and Quan, Xiaojun and Wang, Rui",
    booktitle = "Findings of the Association for Computational Linguistics: ACL 2023",
    year = "2023",
    url = "https://arxiv.org/abs/2305.09892",
}
"""


class Terms(NamedTuple):
    """The loss and its parts, each a 0-dim tensor."""

    loss: Tensor
    info_nce: Tensor
    bml: Tensor


def unit(z: Tensor) -> Tensor:
    """z / ‖z‖ by rows, (rows, D); a zero row stays zero."""
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z / norm.where((norm > SHORTEST_NORM) | norm.isnan(), torch.inf)


def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    """cos(x_i, y_j), (rows of x, rows of y)."""
    return unit(x) @ unit(y).T


def mean_cosine(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean of S over all B² cells: the start rule compares it with σ (section 3.4)."""
    return cosine_similarity_matrix(z1, z2).mean()


def seed_centroids(z1: Tensor, z2: Tensor, num_clusters: int, first: int) -> tuple[Tensor, Tensor]:
    """Initial centroids: a chain in which each pick is the sentence least similar to the last pick.

    Returns centroids (K, D), raw rows of z1, and the indices (K,) of the picks.
    """
    S = cosine_similarity_matrix(z1, z2)
    picks = [first]
    while len(picks) < num_clusters:
        similarity_to_last = S[picks[-1]].index_fill(0, torch.tensor(picks, device=S.device), torch.inf)
        picks.append(int(similarity_to_last.argmin()))
    indices = torch.tensor(picks, device=z1.device)
    return z1.detach()[indices], indices


def nearest_and_runner_up(z: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B,) of the nearest and the second-nearest centroid by cosine (Eq. 5); lowest id on ties."""
    G = cosine_similarity_matrix(z, C)
    ids = G.argsort(dim=1, descending=True, stable=True)
    return ids[:, 0], ids[:, min(1, C.shape[0] - 1)]


def update_centroids(C: Tensor, z1: Tensor, near: Tensor, momentum: float, statistic: str) -> Tensor:
    """C_k ← (1−γ) C_k + γ · stat_k for every non-empty cluster (Eq. 6 and 7); empty clusters stay.

    stat_k is the "mean" of its members in the paper and their "sum" in the authors' code. Replacing the
    centroids (the authors' `kmeans` mode) is the sum with γ = 1.
    """
    members = F.one_hot(near, C.shape[0]).to(z1.dtype)  # (B, K)
    count = members.sum(0)[:, None]  # (K, 1)
    total = members.T @ z1  # (K, D)
    stat = total / count.clamp_min(1) if statistic == "mean" else total
    return torch.where(count > 0, (1 - momentum) * C + momentum * stat, C)


def false_negatives_of(
    rule: Rule, S: Tensor, near: Tensor | None, centroid: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Which pairs (B, B) bool are out of the denominator, and M, those that the margin loss holds.

    The paper's rule (section 3.2): i and j lie in one cluster. centroid: cos(i, own centroid), (B,). No pair
    is one of a sentence with itself.
    """
    places = torch.arange(len(S), device=S.device)
    sentences = Side(places, near, S.detach().diagonal()[:, None], centroid)
    decision = ask(rule, Pairs(S.detach(), 1.0, sentences, sentences, slice(None), slice(None)))
    others = places[:, None] != places[None, :]
    out, held = (None if mask is None else mask & others for mask in decision)
    return out, held


def info_nce(
    S: Tensor,
    temperature: float | Tensor,
    *,
    hard: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    negatives: Tensor | None = None,
    excluded: Tensor | None = None,
    directions: str = "one",
) -> Tensor:
    """Cross-entropy of [S/τ | N/τ | H/τ + w·I] with label i, mean over the B anchors (Eq. 3 and 8).

    hard (B, B): H_ij = cos(z1_i, runner-up centroid of j). negatives (B, N): cosines with explicit
    negatives. excluded (B, B) bool: cells of S left out of the denominator. directions "both": the mean of
    that and of the positives' way to their anchors, cross-entropy of Sᵀ/τ with label j.
    """
    logits = S / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    blocks = [logits]
    if negatives is not None:
        blocks.append(negatives / temperature)
    if hard is not None:
        own = torch.eye(len(S), dtype=S.dtype, device=S.device)
        blocks.append(hard / temperature + hard_negative_weight * own)
    labels = torch.arange(len(S), device=S.device)
    of_anchors = F.cross_entropy(torch.cat(blocks, dim=1), labels)
    return of_anchors if directions == "one" else (of_anchors + F.cross_entropy(logits.T, labels)) / 2


def dimension_info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE over the D dimensions, each a row of its B values: z1's c-th looks for z2's c-th."""
    return info_nce(cosine_similarity_matrix(z1.T, z2.T), temperature)


def bidirectional_margin_loss(S: Tensor, M: Tensor, alpha: float, beta: float) -> Tensor:
    """BML: mean over all B² cells of relu(Δ+α) + relu(−Δ−β), Δ_ij = (S_ij − s_i)·M_ij (Eq. 9 and 10)."""
    delta = (S - S.diagonal()[:, None]) * M
    return (F.relu(delta + alpha) + F.relu(-delta - beta)).mean()


def objective(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    centroids: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    cluster_ids: Tensor | None = None,
    nearest_cosine: Tensor | None = None,
    false_negatives: str | Rule = "keep",
    bml_weight: float = 1e-4,
    bml_alpha: float = 0.2,
    bml_beta: float = 0.5,
    directions: str = "one",
) -> Terms:
    """L = InfoNCE + λ·BML for given clusters (Eq. 11). Gradient reaches z1, z2, negatives and τ, never C."""
    S = cosine_similarity_matrix(z1, z2)
    hard = None
    if centroids is not None and hard_negative_ids is not None:
        hard = cosine_similarity_matrix(z1, centroids.detach()[hard_negative_ids])
    explicit = cosine_similarity_matrix(z1, negatives) if negatives is not None else None
    rule = rule_of(false_negatives, cluster_ids is not None)
    excluded, M = (None, None) if rule is None else false_negatives_of(rule, S, cluster_ids, nearest_cosine)
    nce = info_nce(
        S,
        temperature,
        hard=hard,
        hard_negative_weight=hard_negative_weight,
        negatives=explicit,
        excluded=excluded,
        directions=directions,
    )
    bml = S.new_zeros(())
    if M is not None:
        bml = bidirectional_margin_loss(S, M, bml_alpha, bml_beta)
    # One detached tensor: with BML = 0 a compiler takes loss and InfoNCE for one buffer, and cuts both.
    return Terms(nce + bml_weight * bml, *torch.stack([nce, bml]).detach().unbind())
