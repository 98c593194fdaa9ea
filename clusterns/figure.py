"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

COSINES = ("positive_cosine", "nearest_cosine", "hard_negative_cosine", "mean_cosine")


def draw_run(records: Sequence[dict], path: Path) -> None:
    """Draw loss, cosines and dev score against the step, from the records of log.jsonl, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    terms = [record for record in records if "loss" in record]
    judged = [record for record in records if "dev" in record]
    starts = [record["step"] for record in records if record.get("event") == "clustering starts"]
    figure, (loss_axes, cosine_axes, dev_axes) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")

    loss_axes.plot([r["step"] for r in terms], [r["info_nce"] for r in terms], label="InfoNCE")
    loss_axes.set(title="loss", xlabel="step", ylabel="InfoNCE (nats)")

    for name in COSINES:
        points = [(r["step"], r[name]) for r in terms if name in r]
        if points:
            cosine_axes.plot(*zip(*points, strict=True), label=name.replace("_cosine", "").replace("_", " "))
    cosine_axes.set(title="mean cosines", xlabel="step", ylabel="cosine")
    cosine_axes.legend(fontsize="small")

    if judged:
        metric = next(iter(judged[0]["dev"]))
        dev_axes.plot([r["step"] for r in judged], [r["dev"][metric] for r in judged], "o-")
        dev_axes.set(title=f"dev {metric.replace('_', ' ')}", xlabel="step", ylabel="score × 100")
    else:
        dev_axes.text(0.5, 0.5, "no dev set given", ha="center", va="center", transform=dev_axes.transAxes)
        dev_axes.set(title="dev score", xticks=[], yticks=[])

    for axes in (loss_axes, cosine_axes, dev_axes if judged else cosine_axes):
        axes.grid(alpha=0.3)
        for step in starts:
            axes.axvline(step, color="0.4", linestyle="--", linewidth=1)
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
