"""What bench/ablations.py compares: settings of the loss, and rules as a few lines over its public functions.

A rule stands here, and not in the library, until one wins against SimCSE on fresh seeds, on dev and on test.
"""

from __future__ import annotations

import collections
import inspect
import json
import math
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns import ClusterNSLoss, cosine_similarity_matrix
from clusterns.objective.problem import Clusters
from clusterns.reference import unit
from clusterns.rules import Decision, GuidedMargin, Pairs, Rule
from clusterns.training.config import TrainConfig


class Variant(NamedTuple):
    """A loss, and settings of `clusterns train` over those that all variants share."""

    loss: type[ClusterNSLoss]
    settings: dict[str, Any]


# --- other clusters, other hard negatives ------------------------------------------------------------------


class NearestAsHardNegative(ClusterNSLoss):
    """The nearest centroid is the hard negative, not the runner-up."""

    def assign(self, points: Tensor, **options: Any) -> Clusters:
        """See `OnlineKMeans.assign`."""
        found = super().assign(points, **options)
        return found._replace(hard_ids=found.ids, runner_up_cosine=found.nearest_cosine)


class RandomHardNegative(ClusterNSLoss):
    """Any other centroid than the nearest is the hard negative."""

    def assign(self, points: Tensor, **options: Any) -> Clusters:
        """See `OnlineKMeans.assign`."""
        found = super().assign(points, **options)
        step = torch.randint_like(found.ids, 1, self.num_clusters)
        return found._replace(hard_ids=(found.ids + step) % self.num_clusters)


class RandomClusters(ClusterNSLoss):
    """Sentences belong to clusters at random, and any other centroid is their hard negative."""

    def assign(self, points: Tensor, **options: Any) -> Clusters:
        """See `OnlineKMeans.assign`."""
        found = super().assign(points, **options)
        ids = torch.randint_like(found.ids, self.num_clusters)
        step = torch.randint_like(ids, 1, self.num_clusters)
        return found._replace(ids=ids, hard_ids=(ids + step) % self.num_clusters)


class MeanAsHardNegative(ClusterNSLoss):
    """The mean of the batch, as often as it has sentences: what all centroids have in common, no clusters."""

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """See `ClusterNSLoss.forward`."""
        mean = positives.detach().mean(dim=0).expand_as(positives)
        return super().forward(
            anchors, positives, mean if negatives is None else torch.cat([negatives, mean])
        )


class GaussianNegatives(ClusterNSLoss):
    """As many random directions as sentences are negatives too (Wu et al., COLING 2022, GS-InfoNCE)."""

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """See `ClusterNSLoss.forward`."""
        noise = torch.randn_like(anchors)
        return super().forward(
            anchors, positives, noise if negatives is None else torch.cat([negatives, noise])
        )


def close_mates_out(pairs: Pairs) -> Decision:
    """Only cluster-mates of a cosine above 0.5 are false negatives, and leave the denominator."""
    return Decision(out=pairs.same_cluster & (pairs.cosines > 0.5))


def close_mates_held(pairs: Pairs) -> Decision:
    """Only cluster-mates of a cosine above 0.5 are false negatives, and the margin loss holds them."""
    return Decision(held=pairs.same_cluster & (pairs.cosines > 0.5))


def with_rule(rule: Rule) -> type[ClusterNSLoss]:
    """A loss with a rule of one's own, which the settings of `clusterns train` have no word for."""

    class WithRule(ClusterNSLoss):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "false_negatives": rule})

    return WithRule


# --- other terms of the loss -------------------------------------------------------------------------------


class AngularMargin(ClusterNSLoss):
    """The positive's angle counts as so much wider (Zhang et al., ACL 2022, ArcCSE)."""

    degrees = 10.0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.num_clusters or self.dimension_weight:
            raise ValueError("angular margin: expected num_clusters=0 and no dimension_weight, got others")

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """See `ClusterNSLoss.forward`."""
        super().forward(anchors, positives, negatives)  # its `last`; of the loss nothing is left
        others = positives if negatives is None else torch.cat([positives, negatives])
        cosines = cosine_similarity_matrix(anchors, others)
        own = cosines.diagonal().clamp(-1 + 1e-6, 1 - 1e-6)
        logits = cosines.diagonal_scatter((own.acos() + math.radians(self.degrees)).cos()) / self.temperature
        loss = F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))
        self.last["loss"] = loss.detach()
        return loss


class RankConsistency(ClusterNSLoss):
    """Both views rank the others alike: their softmax rows' divergence (Liu et al., ACL 2023, RankCSE)."""

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """See `ClusterNSLoss.forward`."""
        loss = super().forward(anchors, positives, negatives)
        logits = cosine_similarity_matrix(anchors, positives, self.temperature)
        views = [side.log_softmax(dim=1) for side in (logits, logits.T)]
        middle = torch.logaddexp(*views) - math.log(2)
        divergence = sum(F.kl_div(middle, view, reduction="batchmean", log_target=True) for view in views)
        loss = loss + divergence / 2
        self.last["loss"] = loss.detach()
        return loss


# --- where the spread over seeds comes from ----------------------------------------------------------------


class OtherMasks(ClusterNSLoss):
    """Draws a number at every step, so that the encoder's dropout masks are others than those of the seed."""

    shares_masks = False  # see bench/trial.py

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """See `ClusterNSLoss.forward`."""
        torch.rand(1, device=anchors.device)
        return super().forward(anchors, positives, negatives)


def first_pick(number: int) -> type[ClusterNSLoss]:
    """A loss whose chain begins at another sentence for each number, and is otherwise the same."""

    class FirstPick(ClusterNSLoss):
        quarter = number

        def seed(self, anchors: Tensor, positives: Tensor, **_: Any) -> Tensor:
            return super().seed(anchors, positives, first=number * len(anchors) // 4 % len(anchors))

    return FirstPick


class CentralPick(ClusterNSLoss):
    """The chain begins at the sentence nearest to the mean of the batch, so nothing of it is random."""

    def seed(self, anchors: Tensor, positives: Tensor, **_: Any) -> Tensor:
        """See `OnlineKMeans.seed`."""
        mean = unit(anchors.detach().float()).mean(dim=0, keepdim=True)
        first = int(cosine_similarity_matrix(anchors.detach().float(), mean).argmax())
        return super().seed(anchors, positives, first=first)


class BestChain(ClusterNSLoss):
    """Of the chains from eight first picks, the one whose centroids are least alike."""

    chains = 8

    def seed(self, anchors: Tensor, positives: Tensor, **_: Any) -> Tensor:
        """See `OnlineKMeans.seed`."""
        first = [i * len(anchors) // self.chains for i in range(self.chains)]
        found = [(super(BestChain, self).seed(anchors, positives, first=f), f) for f in first]

        def likeness(picks: Tensor) -> float:
            rows = anchors.detach()[picks].float()
            return float(cosine_similarity_matrix(rows, rows).mean())

        best = min(found, key=lambda each: likeness(each[0]))[1]
        return super().seed(anchors, positives, first=best)


class BufferedSeeds(CentralPick):
    """The chain runs over the last four batches, each by the encoder of its step."""

    batches = 4

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.held: collections.deque[tuple[Tensor, Tensor]] = collections.deque(maxlen=self.batches)

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """See `ClusterNSLoss.forward`."""
        if self.training and not self.clustering_active:
            self.held.append((anchors.detach(), positives.detach()))
        return super().forward(anchors, positives, negatives)

    def seed(self, anchors: Tensor, positives: Tensor, **options: Any) -> Tensor:
        """See `OnlineKMeans.seed`."""
        return super().seed(*(torch.cat(side) for side in zip(*self.held, strict=True)), **options)


class SeededAnew(ClusterNSLoss):
    """Every step takes its centroids from the batch before, so none is stale."""

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """See `ClusterNSLoss.forward`."""
        was_active = self.clustering_active
        loss = super().forward(anchors, positives, negatives)
        if self.training and was_active:
            self.seed(anchors, positives)
        return loss


# --- all of them -------------------------------------------------------------------------------------------

# The published BERT-base row but for K, which is a half of the published batch and so of ours.
PUBLISHED: dict[str, Any] = {"bml_weight": 1e-3, "bml_alpha": 0.0, "bml_beta": 0.3}
SIMCSE: dict[str, Any] = {"num_clusters": 0}
EARLY: dict[str, Any] = {"start_cosine": 0.9, "num_clusters": 8}
GROUPS: dict[str, dict[str, Variant]] = {
    # The paper's own ablations.
    "parts": {
        "SimCSE": Variant(ClusterNSLoss, SIMCSE),
        "ClusterNS": Variant(ClusterNSLoss, {}),
        "random clusters": Variant(RandomClusters, {}),
        "no BML": Variant(ClusterNSLoss, {"bml_weight": 0.0}),
        "no hard negatives": Variant(ClusterNSLoss, {"hard_negatives": False}),
        "nearest centroid": Variant(NearestAsHardNegative, {}),
        "random centroid": Variant(RandomHardNegative, {}),
        "exclude": Variant(ClusterNSLoss, {"false_negatives": "exclude"}),
    },
    "rules": {
        "early start": Variant(ClusterNSLoss, EARLY),
        "mean update": Variant(ClusterNSLoss, {"centroid_update": "mean", "centroid_momentum": 0.1}),
        "close mates out": Variant(with_rule(close_mates_out), {}),
        "close mates held": Variant(with_rule(close_mates_held), {}),
        "guided margin": Variant(with_rule(GuidedMargin(-0.1)), {}),
        "seeded anew": Variant(SeededAnew, {}),
        "batch mean": Variant(MeanAsHardNegative, SIMCSE),
        "Gaussian negatives": Variant(GaussianNegatives, SIMCSE),
        "angular margin": Variant(AngularMargin, SIMCSE),
        "over dimensions": Variant(ClusterNSLoss, {**SIMCSE, "dimension_weight": 3.0}),
        "rank consistency": Variant(RankConsistency, SIMCSE),
    },
    "spread": {
        "other masks": Variant(OtherMasks, SIMCSE),
        "ClusterNS and other masks": Variant(OtherMasks, {}),
        **{f"first pick {number}": Variant(first_pick(number), {}) for number in range(4)},
        "central pick": Variant(CentralPick, {}),
        "best chain": Variant(BestChain, {}),
        "buffered seeds": Variant(BufferedSeeds, {}),
    },
}
# What a variant may set of `clusterns train`: the loss and the optimiser; all else is shared by all runs.
FREE = {field.name for field in fields(TrainConfig)} & inspect.signature(ClusterNSLoss).parameters.keys()
FREE = FREE - {"backend", "gather"} | {"learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"}
VARIANTS = {name: variant for group in GROUPS.values() for name, variant in group.items()}


def chosen(names: list[str]) -> dict[str, Variant]:
    """Variants by their name or that of a group, or with settings, as "ClusterNS,start_cosine=0.8".

    A setting is one of FREE, or what the rule's own class has, as "angular margin,degrees=20".
    Raises SystemExit with one line for what is none of these.
    """
    found: dict[str, Variant] = {}
    for name in names:
        if name in GROUPS:
            found |= GROUPS[name]
            continue
        base, *pairs = name.split(",")
        try:
            settings = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}
            loss, given = VARIANTS[base]
        except (ValueError, KeyError):
            expected = f"some of {', '.join([*GROUPS, *VARIANTS])}, with settings as ClusterNS,bml_beta=0.5"
            raise SystemExit(f"--variants: expected {expected}, got {name}") from None
        own = {
            key: settings.pop(key) for key in [*settings] if loss is not ClusterNSLoss and key in vars(loss)
        }
        if unknown := settings.keys() - {field.name for field in fields(TrainConfig)}:
            raise SystemExit(
                f"--variants: expected settings of the loss or the optimiser, got {unknown.pop()} in {name}"
            )
        found[name] = Variant(type(loss.__name__, (loss,), own) if own else loss, {**given, **settings})
    return found
