"""What to watch while a run learns: cosines, cluster occupancy, and verdicts that say what to do.

All of it is computed on the steps that are logged, and only there. A report judges its sentences by the same
`verdicts`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import nearest_centroids
from ..loss import ClusterNSLoss
from ..objective.norms import unit_rows, without_autocast

# Anchors whose softmax is looked at; all of their negatives are.
SAMPLED_ANCHORS = 256
# Steps before which embeddings may look collapsed, and logged steps in a row that a warning takes.
EARLIEST_STEP, IN_A_ROW = 50, 3
# A largest cluster with this share of the batch is a collapse, and so is a positive, or a nearest centroid,
# this little above the mean cosine; in a healthy run of the paper they are 0.8 and 0.2 above it.
LARGEST_SHARE, LEAST_GAP = 0.5, 0.05
# Mean cosine above which sentences are crowded. The uniformity that the paper reports, of -0.22 for RoBERTa
# before training and -1.65 and less after it, is that of a mean cosine of 0.95, and of 0.59 and less.
MOST_COSINE = 0.8
# Share of sentences with a cluster-mate below which there are too few: with the paper's K and B, and clusters
# equally full, it is 0.86 and more.
LEAST_MATES = 0.5


@torch.no_grad()
def measure(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    loss_fn: ClusterNSLoss,
    clustered: bool,
) -> dict[str, Tensor]:
    """What `loss_fn.last` does not tell of a batch, 0-d tensors on the device.

    Args:
        anchors, positives: (B, D) embeddings of the whole batch, raw.
        negatives: (N, D) mined hard negatives, or None.
        loss_fn: after its step on that batch.
        clustered: whether clustering was active in that step.

    Always `effective_negatives`: the number of equally hard negatives that would weigh as these do, exp of
    the entropy of the softmax over all that is not the positive, mean over up to 256 anchors. With clustering
    also `mates_cosine` (between views of two sentences of one cluster; 0 where no sentence has a mate),
    `centroids_cosine` (between two different ones), `empty_clusters`, `largest_cluster` (share of the batch)
    and `cluster_entropy` (of the occupancy; 1 where all clusters are equally full).
    """
    with without_autocast(anchors.device):
        a, _ = unit_rows(anchors.float(), torch.float32)  # (B, D)
        p, _ = unit_rows(positives.float(), torch.float32)  # (B, D)
        found: dict[str, Tensor] = {}
        hard: list[Tensor] = []  # what stands beside the positives as negatives, unit rows
        counts: list[Tensor] = []  # how often each of them does
        if negatives is not None:
            hard.append(unit_rows(negatives.float(), torch.float32)[0])
            counts.append(torch.ones_like(hard[0][:, 0]))
        if clustered:
            near = nearest_centroids(anchors.float(), loss_fn.centroids)
            c, _ = unit_rows(loss_fn.centroids, torch.float32)  # (K, D)
            found |= _occupancy(a, p, c, near.nearest)
            if loss_fn.hard_negatives:
                hard.append(c)
                counts.append(torch.bincount(near.runner_up, minlength=len(c)).float())
        found["effective_negatives"] = _effective_negatives(a, p, hard, counts, loss_fn.temperature)
    return found


def _occupancy(a: Tensor, p: Tensor, c: Tensor, nearest: Tensor) -> dict[str, Tensor]:
    """Terms of unit rows a, p (B, D), centroids c (K, D) and cluster ids (B,); no B×B matrix is made."""
    size = torch.bincount(nearest, minlength=len(c)).float()  # (K,)
    sums = [torch.zeros_like(c).index_add_(0, nearest, side) for side in (a, p)]  # (K, D) each
    pairs = (size * (size - 1)).sum()
    mates = (sums[0] * sums[1]).sum() - (a * p).sum()
    share = size / size.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    k = len(c)
    return {
        "mates_cosine": torch.where(pairs > 0, mates / pairs.clamp_min(1), 0.0),
        "centroids_cosine": (c.sum(dim=0).square().sum() - k) / max(k * (k - 1), 1),
        "empty_clusters": (size == 0).sum().float(),
        "largest_cluster": share.max(),
        "cluster_entropy": entropy / math.log(max(k, 2)),
    }


def _effective_negatives(
    a: Tensor, p: Tensor, hard: list[Tensor], counts: list[Tensor], temperature: float | Tensor
) -> Tensor:
    """Mean over sampled anchors of exp(entropy) of the softmax over their negatives."""
    rows = min(len(a), SAMPLED_ANCHORS)
    places = torch.arange(rows, device=a.device) * len(a) // rows  # evenly over the batch, so over the ranks
    columns = torch.cat([p, *hard])  # (B + N + K, D)
    weight = torch.cat([torch.ones_like(p[:, 0]), *counts])  # (B + N + K,)
    logits = a[places] @ columns.T / temperature + weight.log()  # (rows, B + N + K)
    logits[torch.arange(rows, device=a.device), places] = -torch.inf
    log_share = logits.log_softmax(dim=1)
    share = log_share.exp()
    # A column that stands for n equal negatives has n shares of share / n.
    each = torch.where(share > 0, log_share - weight.log(), 0.0)
    return (-(share * each).sum(dim=1)).exp().mean()


class Verdict(NamedTuple):
    """On a figure of the log: its name there, what is healthy, what is wrong (or "") and the cure."""

    figure: str
    healthy: str
    wrong: str
    text: str


def verdicts(values: Mapping[str, float], rows: int, clusters: int) -> list[Verdict]:
    """On embeddings and clusters, from figures as the log names them; without clusters on embeddings only.

    Args:
        values: `mean_cosine`; with clusters also `nearest_cosine`, `with_mates`, `largest_cluster` and
            `empty_clusters`. Without `positive_cosine` a sentence is its own positive.
        rows: sentences that the figures are of.
        clusters: K.

    """
    cosine, positive = values["mean_cosine"], values.get("positive_cosine", 1.0)
    collapsed = positive - cosine < LEAST_GAP
    found = [
        Verdict(
            "mean_cosine",
            f"below {MOST_COSINE:g}, best near 0",
            "embeddings collapsed" if collapsed else "embeddings crowded" if cosine > MOST_COSINE else "",
            (
                f"two views of a sentence (cosine {positive:.3f}) are hardly more alike than any two "
                f"sentences ({cosine:.3f}); lower --learning-rate, and see whether the sentences differ"
            )
            if collapsed
            else f"any two sentences are much alike (cosine {cosine:.3f}); train longer",
        )
    ]
    if not clusters or "nearest_cosine" not in values:  # or clustering has not started
        return found
    nearest, share, empty = (values[name] for name in ("nearest_cosine", "largest_cluster", "empty_clusters"))
    # Of as many rows dealt out blindly, so many clusters would have one.
    filled = clusters * (1 - (1 - 1 / clusters) ** rows)
    most_empty = clusters - LARGEST_SHARE * filled
    return [
        *found,
        Verdict(
            "nearest_cosine",
            f"at least {LEAST_GAP:g} above all pairs",
            # Where all cosines are near 1 no centroid can be nearer.
            "centroids stale" if not collapsed and nearest - cosine < LEAST_GAP else "",
            f"a sentence is hardly nearer its own centroid (cosine {nearest:.3f}) than any other sentence "
            f"({cosine:.3f}); raise --centroid-momentum, so that the centroids keep up",
        ),
        Verdict(
            "largest_cluster",
            f"below {LARGEST_SHARE:g}",
            "clusters collapsed" if clusters > 2 and share >= LARGEST_SHARE else "",
            f"one of {clusters} clusters holds {share:.0%} of the sentences and {empty:.0f} are empty; lower "
            "--start-cosine, so that they are seeded from sentences further apart, or lower "
            "--centroid-momentum",
        ),
        Verdict(
            "empty_clusters",
            f"at most {most_empty:.0f} of {clusters}",
            "clusters empty" if empty > most_empty else "",
            f"{empty:.0f} of {clusters} clusters are empty; lower --num-clusters, or --start-cosine, so that "
            "they are seeded from sentences further apart",
        ),
        Verdict(
            "with_mates",
            f"at least {LEAST_MATES:g}",
            "too few mates" if values["with_mates"] < LEAST_MATES else "",
            f"{values['with_mates']:.0%} of the sentences have a cluster-mate, hence a false negative; lower "
            "--num-clusters, or raise --batch-size",
        ),
    ]


class Watch:
    """Warns of runs that go wrong, once of each kind. A warning is its name and a text that says what to do.

    Args:
        loss_fn: whose settings the advice names.
        rows: of a batch, over all ranks.

    """

    def __init__(self, loss_fn: ClusterNSLoss, rows: int) -> None:
        self.loss_fn, self.rows = loss_fn, rows
        self.lowest_cosine: float | None = None
        self.lowest_step = 0
        self.in_a_row: dict[str, int] = {}
        self.told: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""
        names = ("lowest_cosine", "lowest_step", "in_a_row", "told")
        return {name: copy.copy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in self.state_dict():
            setattr(self, name, copy.copy(state[name]))

    def start(self, cosine: float) -> tuple[str, str]:
        """Of clustering, at this mean cosine."""
        return (
            "clustering starts",
            f"clustering starts with {self.loss_fn.num_clusters} centroids "
            f"(mean cosine {cosine:.3f} <= {self.loss_fn.start_cosine})",
        )

    def look(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """At the figures of a logged step; yields warnings."""
        cosine = values["mean_cosine"]
        if not self.loss_fn.clustering_active and (self.lowest_cosine is None or cosine < self.lowest_cosine):
            self.lowest_cosine, self.lowest_step = cosine, step
        wrong = {verdict.wrong: verdict.text for verdict in self._verdicts(values)}
        for name, earliest in (("embeddings collapsed", EARLIEST_STEP), ("clusters collapsed", 0)):
            if self._lasts(name, name in wrong and step >= earliest):
                yield name, wrong[name]

    def end(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Of the run, with the figures of its last logged step; yields verdicts, as `look` does warnings.

        Runs of less than 50 steps are not judged, but for clustering that, though wanted, never started.
        """
        never = self.loss_fn.num_clusters and not self.loss_fn.clustering_active
        if never and self.lowest_cosine is not None:
            yield (
                "clustering never started",
                f"clustering never started, all {step} steps were plain InfoNCE: the lowest mean cosine seen "
                f"was {self.lowest_cosine:.3f}, at step {self.lowest_step}, while --start-cosine is "
                f"{self.loss_fn.start_cosine:g}; raise it above {self.lowest_cosine:.2f}, or train longer",
            )
        if step < EARLIEST_STEP:
            return
        found = self._verdicts(values)
        for verdict in found:
            if verdict.wrong:
                yield verdict.wrong, f"in the end: {verdict.wrong}: {verdict.text}"
        if never or any(verdict.wrong for verdict in found):
            return
        figures = (f"{v.figure.replace('_', ' ')} {values[v.figure]:.3g} ({v.healthy})" for v in found)
        yield "healthy", f"in the end healthy: {', '.join(figures)}"

    def _verdicts(self, values: Mapping[str, float]) -> list[Verdict]:
        return verdicts(values, self.rows, self.loss_fn.num_clusters)

    def _lasts(self, name: str, is_so: bool) -> bool:
        """Whether it is so on several logged steps in a row, for the first time."""
        self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if is_so else 0
        if self.in_a_row[name] < IN_A_ROW or name in self.told:
            return False
        self.told.append(name)
        return True
