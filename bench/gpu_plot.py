"""Time and peak memory against the batch size, from the rows of the GPU benchmark."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from clusterns.files import replacing

COLORS = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f"]
PANELS = [("step", "bfloat16"), ("step", "float32"), ("plain", "bfloat16")]


def plot(rows: list[dict], path: Path, title: str) -> bool:
    """Draw the sweeps over B, if there are any; returns whether a file was written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [row for row in rows if row["status"] == "ok" and row["what"] == "both"]
    measured = [row for row in measured if row["dtype"] != "float32" or row["precision"] == "highest"]
    panels = [panel for panel in PANELS if any((r["kind"], r["dtype"]) == panel for r in measured)]
    if not panels:
        return False
    names = list(dict.fromkeys(row["contender"] for row in measured))
    color = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    figure, axes = plt.subplots(2, len(panels), figsize=(5.2 * len(panels), 8), squeeze=False, sharex="col")
    for (kind, dtype), (time_axis, memory_axis) in zip(panels, axes.T, strict=True):
        chosen = [row for row in measured if (row["kind"], row["dtype"]) == (kind, dtype)]
        dim, clusters = Counter((row["D"], row["K"]) for row in chosen).most_common(1)[0][0]
        chosen = [row for row in chosen if (row["D"], row["K"]) == (dim, clusters)]
        for name in names:
            own = sorted((row for row in chosen if row["contender"] == name), key=lambda row: row["B"])
            draw(time_axis, own, "device_us", color[name], "--", None)
            draw(time_axis, own, "graph_us", color[name], "-", None)
            draw(memory_axis, own, "peak_mib", color[name], "-", name)
            if own:  # the legend shows the contender once, the line styles below
                time_axis.plot([], [], color=color[name], marker="o", markersize=4, label=name)
        time_axis.plot([], [], "k-", label="as a graph")
        time_axis.plot([], [], "k--", label="launched eagerly")
        time_axis.set(
            ylabel="microseconds, forward + backward", title=f"{kind}, {dtype}, D={dim}, K={clusters}"
        )
        memory_axis.set(xlabel="batch size B", ylabel="peak MiB above inputs and gradients")
        for axis in (time_axis, memory_axis):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
    return save(figure, path, title)


def plot_large(rows: list[dict], path: Path, title: str) -> bool:
    """Draw time with its floor, achieved rate and peak memory of large batches against B, by kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {"step": "full objective", "plain": "plain InfoNCE (and a sigmoid loss)"}
    chosen = {
        kind: [
            row
            for row in rows
            if row["status"] == "ok" and row["what"] == "both" and not row.get("regime")
            and (row["kind"] == kind or (kind, row["kind"]) == ("plain", "other loss"))
        ]
        for kind in kinds
    }  # fmt: skip
    if not any(chosen.values()):
        return False
    names = list(dict.fromkeys(row["contender"] for each in chosen.values() for row in each))
    panels = (
        ("device_us", "microseconds, forward + backward"),
        ("tflops", "TFLOP/s, counting 6·B²·D"),
        ("peak_mib", "peak MiB above inputs and gradients"),
    )
    figure, axes = plt.subplots(len(panels), len(kinds), figsize=(11, 12), squeeze=False, sharex="col")
    for (kind, label), column_axes in zip(kinds.items(), axes.T, strict=True):
        own = sorted(chosen[kind], key=lambda row: row["B"])
        for axis, (column, unit) in zip(column_axes, panels, strict=True):
            for index, name in enumerate(names):
                of_name = [row for row in own if row["contender"] == name]
                draw(axis, of_name, column, COLORS[index % len(COLORS)], "-", name)
            if column == "device_us":
                draw(axis, own, "floor_us", "black", "--", "6·B²·D at the measured matrix rate")
            axis.set(ylabel=unit, yscale="log" if column != "tflops" else "linear")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3, which="both")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
        column_axes[0].set_title(label)
        column_axes[-1].set_xlabel("batch size B")
    return save(figure, path, title)


def draw(axis, rows: list[dict], column: str, color: str, style: str, label: str | None) -> None:
    """One series, without the rows that lack the figure."""
    points = [(row["B"], row[column]) for row in rows if row.get(column) and row[column] > 0]
    if points:
        axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=4, label=label)


def save(figure, path: Path, title: str) -> bool:
    """Write the figure whole."""
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return True
