"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What each panel shows of the log, with its label. The cosines from the most alike to the least.
COSINES = {
    "positive_cosine": "two views of a sentence",
    "nearest_cosine": "nearest centroid",
    "hard_negative_cosine": "hard negative",
    "centroids_cosine": "between centroids",
    "mates_cosine": "cluster-mates",
    "mean_cosine": "all pairs of the batch",
}
SHARES = {
    "with_mates": "sentences with a mate",
    "cluster_entropy": "entropy of occupancy",
    "largest_cluster": "largest cluster",
}
LOSSES = {"info_nce": "InfoNCE", "mlm": "masked language modelling"}


def draw_run(records: Sequence[dict], path: Path) -> None:
    """Draw the records of log.jsonl against the step, as a PNG: loss, cosines, clusters and dev score."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    terms = [record for record in records if "loss" in record]
    starts = [record["step"] for record in records if record.get("event") == "clustering starts"]
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharex=True)
    (loss_axes, cosine_axes), (cluster_axes, dev_axes) = grid

    _draw(loss_axes, terms, LOSSES)
    loss_axes.set(title="loss", ylabel="nats" if len(loss_axes.lines) > 1 else "InfoNCE (nats)")
    _draw_beside(loss_axes, terms, "effective_negatives", "effective negatives")

    _draw(cosine_axes, terms, COSINES)
    cosine_axes.set(title="mean cosines", ylabel="cosine")

    _draw(cluster_axes, terms, SHARES)
    cluster_axes.set(title="clusters", ylabel="share", ylim=(-0.03, 1.03))
    _draw_beside(cluster_axes, terms, "empty_clusters", "empty clusters")

    judged = [record for record in records if "dev" in record]
    if judged:
        metric = next(iter(judged[0]["dev"]))
        dev_axes.plot([r["step"] for r in judged], [r["dev"][metric] for r in judged], "o-")
        dev_axes.set(title=f"dev {metric.replace('_', ' ')}", ylabel="score × 100")

    for axes, empty in (
        (loss_axes, ""),
        (cosine_axes, ""),
        (cluster_axes, "clustering did not start"),
        (dev_axes, "no dev set given"),
    ):
        if not axes.lines:
            axes.text(0.5, 0.5, empty, ha="center", va="center", transform=axes.transAxes)
            axes.set(yticks=[], ylabel="", title=axes.get_title() or "dev score")
        axes.grid(alpha=0.3)
        for step in starts:
            axes.axvline(step, color="0.4", linestyle="--", linewidth=1)
    for axes in grid[1]:
        axes.set_xlabel("step")
    if starts:
        late = starts[0] > records[-1]["step"] / 2  # the label goes where there is room
        loss_axes.annotate(
            "clustering starts",
            (starts[0], 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            va="top",
            fontsize="small",
            color="0.3",
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axes: Any, terms: Sequence[dict], names: dict[str, str]) -> None:
    """One line for each figure that the log has."""
    for name, label in names.items():
        points = [(r["step"], r[name]) for r in terms if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    if len(axes.lines) > 1:
        axes.legend(fontsize="small")


def _draw_beside(axes: Any, terms: Sequence[dict], name: str, label: str) -> None:
    """A figure in a unit of its own, dotted, against an axis on the right."""
    points = [(r["step"], r[name]) for r in terms if name in r]
    if not points:
        return
    beside = axes.twinx()
    beside.plot(*zip(*points, strict=True), ":", color="0.4", linewidth=1.2)
    beside.set_ylabel(f"{label} (dotted)", color="0.4")
    beside.set_ylim(bottom=0)
    beside.tick_params(axis="y", colors="0.4")
