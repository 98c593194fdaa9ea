"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What a panel shows of the log, with its label. The cosines from the most alike to the least.
COSINES = {
    "positive_cosine": "two views of a sentence",
    "nearest_cosine": "nearest centroid",
    "hard_negative_cosine": "hard-negative centroid",
    "centroids_cosine": "between centroids",
    "mates_cosine": "cluster-mates",
    "mean_cosine": "all pairs",
}
SHARES = {
    "with_mates": "sentences with a mate",
    "cluster_entropy": "entropy of the sizes (1: all equal)",
    "largest_cluster": "largest cluster",
}
# Title, label of the axis and figures of each panel; BML is drawn times its weight λ.
PANELS = (
    ("loss: InfoNCE", "nats", {"info_nce": "InfoNCE"}),
    ("loss: masked language modelling", "nats", {"mlm": "masked language modelling"}),
    ("loss: λ · BML", "nats", {"bml": "λ · BML"}),
    ("mean cosines", "cosine", COSINES),
    ("clusters", "share", SHARES),
    ("empty clusters", "of the batch", {"empty_clusters": "empty clusters"}),
    ("negatives that count", "as many equally hard ones", {"effective_negatives": "effective negatives"}),
    ("learning rate", "learning rate", {"learning_rate": "learning rate"}),
    ("temperature", "temperature τ", {"temperature": "temperature"}),
)
# A loss that falls by more than this has a logarithmic axis.
FAR = 10.0


def draw_run(records: Sequence[dict], path: Path, name: str, bml_weight: float) -> None:
    """Draw the records of log.jsonl against the step, with a panel for each kind of figure that there is.

    Args:
        records: of the log, one with a `loss` among them.
        path: of the picture; its suffix says which kind.
        name: of the run.
        bml_weight: λ, by which the log's `bml` counts; 0 leaves it out.

    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (title, label, lines)
        for title, label, names in PANELS
        if (lines := _lines(records, names, bml_weight))
    ]
    judged = [record for record in records if "dev" in record]
    if judged:
        metric = next(iter(judged[0]["dev"]))
        line = [(record["step"], record["dev"][metric]) for record in judged]
        panels.insert(1, (f"dev {metric.replace('_', ' ')}", "score × 100", {"dev": line}))
    columns = 2 if len(panels) <= 4 else 3
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.8 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    starts = [record["step"] for record in records if record.get("event") == "clustering starts"]
    for axes, (title, label, lines) in zip(grid.flat, panels, strict=False):
        for text, points in lines.items():
            marker = "o" if len(points) == 1 or text == "dev" else None
            dashes = "--" if text == COSINES["mean_cosine"] else "-"  # cluster-mates may lie on it
            axes.plot(*zip(*points, strict=True), dashes, marker=marker, markersize=4, label=text)
        axes.set(title=title, ylabel=label, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if title.startswith("loss"):
            values = [value for points in lines.values() for _, value in points]
            if min(values) > 0 and max(values) > FAR * min(values):
                axes.set_yscale("log")
        for step in starts:
            axes.axvline(step, color="0.5", linestyle="--", linewidth=1)
        if len(lines) > 1:  # below the panel, where no curve is
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize="small", frameon=False
            )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    dashed = f"; clustering starts at step {starts[0]} (dashed)" if starts else ""
    figure.suptitle(f"{name}{dashed}", parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(
    records: Sequence[dict], names: dict[str, str], bml_weight: float
) -> dict[str, list[tuple[int, Any]]]:
    """(step, value) of each figure that the log has, by its label."""
    found = {}
    for name, label in names.items():
        scale = bml_weight if name == "bml" else 1.0
        needed = {"loss", name, *(["nearest_cosine"] if name == "bml" else [])}  # BML is 0 without clusters
        points = [(r["step"], scale * r[name]) for r in records if needed <= r.keys()]
        if points and scale:
            found[label] = points
    return found
