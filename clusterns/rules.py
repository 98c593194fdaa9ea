"""Which pairs of a batch are false negatives, and what happens to them: the rule of section 3.2, and others.

A rule is a function of `Pairs`, the pairs of some anchors i with some positives j, and says of each what is
done: out of the denominator, or held in place by the margin loss. The words of `false_negatives` are rules:

    "keep"       nothing is done
    "exclude"    sentences of one cluster are out
    "bml"        sentences of one cluster are held (Eq. 9 and 10)

>>> def close_mates_out(pairs):
...     return Decision(out=pairs.same_cluster & (pairs.cosines > 0.8))
>>> loss_fn = ClusterNSLoss(768, 128, false_negatives=close_mates_out)

A decision is a constant of the step: no gradient flows through it. About a sentence's own positive it says
nothing that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_choice, check_number, in_short

WORDS = ("bml", "exclude", "keep")


class Side(NamedTuple):
    """Some sentences of a batch, as anchors or as positives."""

    places: Tensor  # (rows,) int64, in the batch
    ids: Tensor | None  # (rows,) their clusters
    logits: Tensor | None = None  # (rows, 1) of anchors: cos(a_i, p_i)/τ
    centroid: Tensor | None = None  # (rows,) of anchors: cosine with the centroid of their own cluster


@dataclass(slots=True)
class Pairs:
    """R anchors i and n positives j of a batch; what it gives broadcasts to (R, n)."""

    logits: Tensor  # (R, n) cos(a_i, p_j)/τ
    temperature: float | Tensor
    anchors: Side
    positives: Side
    i: slice  # of the anchors
    j: slice  # of the positives

    @property
    def cosines(self) -> Tensor:
        """cos(a_i, p_j), (R, n)."""
        return self.logits * self.temperature

    @property
    def positive(self) -> Tensor:
        """s_i = cos(a_i, p_i), (R, 1)."""
        assert self.anchors.logits is not None
        return self.anchors.logits[self.i] * self.temperature

    @property
    def same_cluster(self) -> Tensor:
        """Whether i and j lie in one cluster, (R, n) bool."""
        if self.anchors.ids is None or self.positives.ids is None:
            raise ValueError("cluster_ids: expected those of every row for this rule, got None")
        return self.anchors.ids[self.i, None] == self.positives.ids[self.j]

    @property
    def own_centroid(self) -> Tensor:
        """Cosine of a_i and the centroid of i's own cluster, (R, 1)."""
        if self.anchors.centroid is None:
            raise ValueError("centroids: expected those of the clusters for this rule, got None")
        return self.anchors.centroid[self.i, None]

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Places of i (R, 1) and j (n,) in the batch, int64: for what a rule itself knows of a sentence."""
        return self.anchors.places[self.i, None], self.positives.places[self.j]


class Decision(NamedTuple):
    """What is done to the pairs, (R, n) bool each; None for nothing."""

    out: Tensor | None = None  # leave the softmax denominator
    held: Tensor | None = None  # the margin loss keeps their cosine within its margins of s_i


# A rule may say more of itself: `within_clusters = True` that only sentences of one cluster can be false
# negatives, which spares work; `needs_clusters = False` that it does without, before clustering starts, too.
Rule = Callable[[Pairs], Decision]


def _decide(pairs: Tensor, how: str) -> Decision:
    return Decision(out=pairs) if how == "exclude" else Decision(held=pairs)


class Mates:
    """Sentences of one cluster, the paper's rule: "exclude" them or hold them by "bml"."""

    within_clusters = True

    def __init__(self, how: str = "bml"):
        check_choice("how", how, ("bml", "exclude"))
        self.how = how

    def __call__(self, pairs: Pairs) -> Decision:
        """Decide on all pairs of one cluster."""
        return _decide(pairs.same_cluster, self.how)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.how!r})"


class CloseMates(Mates):
    """Sentences of one cluster where cos(i, j) exceeds cos(i, own centroid).

    A comment in the authors' code has it. At the rim of a cluster fewer pairs are false negatives than in
    its middle.
    """

    def __call__(self, pairs: Pairs) -> Decision:
        """Decide on the close pairs of one cluster."""
        return _decide(pairs.same_cluster & (pairs.cosines > pairs.own_centroid), self.how)


class GuidedMargin:
    """Pairs whose cosine exceeds s_i − margin are out, whatever their clusters.

    The rule of GISTEmbed (Solatorio 2024, arXiv 2402.16829) with sentence-transformers' absolute margin, the
    model being its own guide. margin: cosine; below 0 only what is closer than the positive by it is out.
    """

    needs_clusters = False

    def __init__(self, margin: float = 0.0):
        check_number("margin", margin)
        self.margin = margin

    def __call__(self, pairs: Pairs) -> Decision:
        """Decide on the pairs as close as the positive."""
        return Decision(out=pairs.cosines > pairs.positive - self.margin)

    def __repr__(self) -> str:
        return f"GuidedMargin({self.margin:g})"


def ask(rule: Rule, pairs: Pairs) -> Decision:
    """What a rule says of pairs, (R, n) bool each.

    Raises `TypeError` or `ValueError` where it gives something else than masks that broadcast to that.
    """
    answer, shape = rule(pairs), pairs.logits.shape
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise TypeError(f"false_negatives: expected a rule that gives a Decision, got {in_short(answer)}")
    decision = Decision(*answer)
    for name, mask in decision._asdict().items():
        if mask is None or (mask.shape == shape and mask.dtype == torch.bool):
            continue
        wanted = f"false_negatives: expected a rule that gives {name} as bool for {tuple(shape)} pairs, got"
        if mask.dtype != torch.bool:
            raise TypeError(f"{wanted} {mask.dtype}")
        try:
            decision = decision._replace(**{name: mask.expand(shape)})
        except RuntimeError:
            raise ValueError(f"{wanted} shape {tuple(mask.shape)}") from None
    return decision


def check_rule(name: str, value: Any) -> None:
    """Require one of `WORDS`, or a rule."""
    if not callable(value) or isinstance(value, type):
        check_choice(name, value, WORDS, "a function of clusterns.rules.Pairs")


def check_has_clusters(rule: str | Rule, has_clusters: bool) -> None:
    """Require clusters for a rule of one's own that needs them: without it would do nothing."""
    if not isinstance(rule, str) and not has_clusters and rule_of(rule, False) is None:
        raise ValueError(
            "false_negatives: expected clusters beside a rule that does not say needs_clusters = False, "
            f"got none for {in_short(rule)}"
        )


def rule_of(false_negatives: str | Rule, has_clusters: bool) -> Rule | None:
    """The rule that a setting stands for; None where nothing is to be done."""
    if false_negatives == "keep":
        return None
    rule = Mates(false_negatives) if isinstance(false_negatives, str) else false_negatives
    return rule if has_clusters or not getattr(rule, "needs_clusters", True) else None
