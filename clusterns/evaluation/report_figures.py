"""The still pictures of a report, as SVG to stand in the page: cosine histograms and a run's curves."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def draw_cosines(samples: Mapping[str, NDArray[Any]]) -> str:
    """Outlines of the histograms of cosines, each of area 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for (name, values), dashes in zip(samples.items(), ("-", "--", "-.", ":"), strict=True):
        if len(values):
            bins = min(80, max(5, int(len(values) ** 0.5)))
            low, high = float(values.min()), float(values.max())
            pad = max(0.0, 1e-3 - (high - low)) / 2  # numbers that are all alike would leave bins no width
            shown = (low - pad, high + pad)
            axes.hist(values, bins, range=shown, density=True, histtype="step", label=name, lw=1.5, ls=dashes)
    axes.set(xlabel="cosine", ylabel="density")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.grid(alpha=0.3)
    with tempfile.TemporaryDirectory(prefix="clusterns-") as folder:
        figure.savefig(path := Path(folder) / "cosines.svg")
        plt.close(figure)
        return _inline(path)


def draw_curves(records: Sequence[dict], name: str, bml_weight: float) -> str:
    """The picture of a training run, as `clusterns train` draws it."""
    from ..training.figure import draw_run

    with tempfile.TemporaryDirectory(prefix="clusterns-") as folder:
        draw_run(records, path := Path(folder) / "run.svg", name, bml_weight)
        return _inline(path)


def _inline(path: Path) -> str:
    """An SVG of matplotlib as an element of a page, in its colours: black is the ink, white nothing."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("#000000", "currentColor").replace("#ffffff", "none")
    return text.replace("<svg", '<svg fill="currentColor"', 1)
