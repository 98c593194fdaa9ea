"""The still pictures of a report, as SVG text: cluster sizes, cosine histograms, a run's curves."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()


def draw_sizes(sizes: Sequence[int]) -> str:
    """Bars of the sentences in each cluster, the largest first."""
    figure, axes = _axes(9, 2.6)
    axes.bar(range(len(sizes)), sorted(sizes, reverse=True), width=0.9)
    axes.axhline(sum(sizes) / len(sizes), color="0.4", linestyle="--", linewidth=1, label="if all were equal")
    axes.set(xlabel="clusters, by size", ylabel="sentences", xlim=(-0.7, len(sizes) - 0.3), xticks=[])
    axes.legend(fontsize="small")
    return _svg(figure)


def draw_cosines(samples: Mapping[str, NDArray[Any]]) -> str:
    """Outlines of the histograms of cosines, each of area 1."""
    figure, axes = _axes(9, 3.2)
    for name, values in samples.items():
        if len(values):
            bins = min(80, max(5, int(len(values) ** 0.5)))
            low, high = float(values.min()), float(values.max())
            pad = max(0.0, 1e-3 - (high - low)) / 2  # numbers that are all alike would leave bins no width
            shown = (low - pad, high + pad)
            axes.hist(values, bins, shown, density=True, histtype="step", label=name, linewidth=1.5)
    axes.set(xlabel="cosine", ylabel="density")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return _svg(figure)


def draw_curves(records: Sequence[dict]) -> str:
    """The picture of a training run, as `clusterns train` draws it."""
    from ..training.figure import draw_run

    with tempfile.TemporaryDirectory(prefix="clusterns-") as folder:
        path = Path(folder) / "run.svg"
        draw_run(records, path)
        return path.read_text(encoding="utf-8")
