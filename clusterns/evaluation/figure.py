"""The picture of an evaluation: STS and the user's data, with intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .judging import first_figure
from .tables import TEST_SETS


def check_suffix(name: str, path: str | os.PathLike[str]) -> None:
    """Require the suffix of an image that matplotlib draws."""
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, kinds = Path(path).suffix, FigureCanvasBase.get_supported_filetypes()
    if suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"{name}: expected a suffix of {', '.join(kinds)}, got {suffix or 'none'}")


def draw_evaluation(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results of `evaluate` as an image of the path's suffix (png, svg, pdf).

    One panel of the Spearman correlations of STS, and one of the first figures of the user's data, where
    there are any, with their 95 % intervals; a colour for each model.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = results["models"]
    sets = list(dict.fromkeys(name for model in models for name in model["sts"]))
    tests = [name for name in sets if name in TEST_SETS]
    columns = [*tests, *(["avg"] if any(model["avg"] for model in models) else [])]
    columns += [name for name in sets if name not in tests]
    data = list(dict.fromkeys(name for model in models for name in model["data"]))
    panels = [panel for panel in ("sts", "data") if (columns if panel == "sts" else data)] or ["sts"]
    widths = [
        max(3.5, 0.35 * len(columns if panel == "sts" else data) * (len(models) + 2)) for panel in panels
    ]
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + sum(widths), 4.5),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    for panel, axes in zip(panels, grid[0], strict=True):
        names = columns if panel == "sts" else data
        for index, model in enumerate(models):
            shift = (index - (len(models) - 1) / 2) * 0.8 / len(models)
            points = [
                (place + shift, *bounds)
                for place, name in enumerate(names)
                if (bounds := _bounds(model, panel, name)) is not None
            ]
            if points:
                places, values, below, above = zip(*points, strict=True)
                axes.errorbar(places, values, (below, above), fmt="o", capsize=3, label=model["label"])
                for at, value, _, up in points:
                    axes.annotate(
                        f"{value:.1f}",
                        (at, value + up),
                        xytext=(0, 4),
                        textcoords="offset points",
                        ha="center",
                        fontsize=6.5,
                    )
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_xlim(-0.6, len(names) - 0.4)
        for place in range(1, len(names)):
            axes.axvline(place - 0.5, color="0.9", linewidth=0.8, zorder=0)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(y=0.1)  # room for the values
    titles = {
        "sts": ("STS, 95 % bootstrap intervals", "Spearman × 100"),
        "data": ("data, 95 % bootstrap intervals", "Spearman, accuracy or MRR@10, × 100"),
    }
    for panel, axes in zip(panels, grid[0], strict=True):
        title, label = titles[panel]
        axes.set(title=title, ylabel=label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bounds(model: Mapping[str, Any], panel: str, name: str) -> tuple[float, float, float] | None:
    """Value, and how far the bar reaches below and above it."""
    found = model["avg"] if (panel, name) == ("sts", "avg") else model[panel].get(name)
    if not found:
        return None
    value = found["spearman"] if panel == "sts" else first_figure(found)
    if found["low"] is None:
        return value, 0.0, 0.0
    # The interval of a percentile bootstrap can leave out the value itself, a bar cannot.
    return value, max(0.0, value - found["low"]), max(0.0, found["high"] - value)
