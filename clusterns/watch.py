"""What to watch while a run learns: cosines, cluster occupancy, and warnings that say what to do.

All of it is computed on the steps that are logged, and only there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .functional import nearest_centroids
from .loss import ClusterNSLoss
from .normalization import unit_rows, without_autocast

# Anchors whose softmax is looked at; all of their negatives are.
SAMPLED_ANCHORS = 256
# Warnings, each with its evidence: steps before which nothing is said, and logged steps in a row it takes.
PATIENCE_STEPS, IN_A_ROW = 50, 3
# A largest cluster with this share of the batch, or a positive this little above the mean, is a collapse.
LARGEST_SHARE, LEAST_GAP = 0.5, 0.05


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


class Watch:
    """Warns of runs that go wrong, once of each kind.

    Args:
        tell: gets each warning, as a name for the log and a text for the reader.
        loss_fn: whose settings the advice names.
        batch_size: B.

    """

    def __init__(self, tell: Callable[[str, str], None], loss_fn: ClusterNSLoss, batch_size: int) -> None:
        self.tell, self.loss_fn, self.batch_size = tell, loss_fn, batch_size
        self.lowest_cosine: float | None = None
        self.lowest_step = 0
        self.in_a_row: dict[str, int] = {}
        self.told: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""
        return {
            "lowest_cosine": self.lowest_cosine,
            "lowest_step": self.lowest_step,
            "in_a_row": dict(self.in_a_row),
            "told": list(self.told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.lowest_cosine, self.lowest_step = state["lowest_cosine"], state["lowest_step"]
        self.in_a_row, self.told = dict(state["in_a_row"]), list(state["told"])

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """At the figures of a logged step."""
        cosine = values["mean_cosine"]
        if not self.loss_fn.clustering_active and (self.lowest_cosine is None or cosine < self.lowest_cosine):
            self.lowest_cosine, self.lowest_step = cosine, step
        if step >= PATIENCE_STEPS:
            self._count(
                "embeddings collapsed",
                values["positive_cosine"] - cosine < LEAST_GAP,
                f"two views of a sentence (cosine {values['positive_cosine']:.3f}) are hardly more alike "
                f"than any two sentences ({cosine:.3f}); lower --learning-rate, and see whether the "
                "sentences differ",
            )
        if "largest_cluster" in values and self.loss_fn.num_clusters > 2:
            share, empty = values["largest_cluster"], values["empty_clusters"]
            self._count(
                "clusters collapsed",
                share >= LARGEST_SHARE,
                f"one of {self.loss_fn.num_clusters} clusters holds {share:.0%} of the batch and {empty:.0f} "
                "are empty; lower --start-cosine, so that they are seeded from sentences further apart, or "
                "lower --centroid-momentum",
            )

    def close(self, step: int) -> None:
        """At the end of a run: whether clustering, if it was wanted, has ever started."""
        if not self.loss_fn.num_clusters or self.loss_fn.clustering_active or self.lowest_cosine is None:
            return
        sigma, clusters = self.loss_fn.start_cosine, self.loss_fn.num_clusters
        text = (
            f"clustering never started in {step} steps, all of them plain InfoNCE: "
            f"the lowest mean cosine seen is {self.lowest_cosine:.3f}, at step {self.lowest_step}, "
        )
        if self.lowest_cosine > sigma:
            text += (
                f"and --start-cosine is {sigma:g}; raise it above {self.lowest_cosine:.2f}, or train longer"
            )
        else:
            text += f"but a batch of {self.batch_size} cannot seed --num-clusters {clusters}"
        self._tell("clustering never started", text)

    def _count(self, name: str, is_so: bool, text: str) -> None:
        self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if is_so else 0
        if self.in_a_row[name] >= IN_A_ROW:
            self._tell(name, text)

    def _tell(self, name: str, text: str) -> None:
        if name not in self.told:
            self.told.append(name)
            self.tell(name, text)


# Where the figures of log.jsonl stand in TensorBoard; "..._cosine" stand under cosine/.
_GROUPS = {
    "loss": ("loss", "info_nce", "bml", "mlm"),
    "clusters": ("empty_clusters", "largest_cluster", "cluster_entropy", "with_mates"),
    "negatives": ("effective_negatives",),
}


class Scalars:
    """The figures of log.jsonl as TensorBoard scalars, in OUTPUT_DIR/tensorboard; nothing where not wanted.

    Raises ImportError with one line where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, wanted: bool, step: int) -> None:
        self.writer: Any = None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--tensorboard: expected TensorBoard, got: {error}; "
                'pip install "clusterns[train]" or pass --no-tensorboard'
            ) from error
        # Events of a run that was killed beyond the checkpoint are no longer shown.
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """One record of the log."""
        if self.writer is None:
            return
        step = record["step"]
        numbers = {f"dev/{name}": value for name, value in record.get("dev", {}).items()}
        if "loss" in record:
            numbers |= {scalar_tag(name): record[name] for name in record if name not in ("step", "seconds")}
        for tag, value in numbers.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is still on its way."""
        if self.writer is not None:
            self.writer.close()


def scalar_tag(name: str) -> str:
    """The TensorBoard tag of a figure of the log."""
    if name.endswith("_cosine"):
        return f"cosine/{name.removesuffix('_cosine')}"
    group = next((group for group, names in _GROUPS.items() if name in names), "training")
    return f"{group}/{name}"
