"""Tables and figure of bench/ablations.py."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from machine import write, write_csv
from scipy.stats import ttest_rel

from clusterns.files import replacing

BASELINE = "SimCSE"
Found = dict[str, dict[int, dict[str, Any]]]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation of a sample."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def paired(found: Found, name: str, figure: str) -> tuple[float, float, int]:
    """Mean difference to the baseline over the seeds of both, p of the paired t-test, number of seeds."""
    seeds = [seed for seed in found[name] if seed in found.get(BASELINE, {})]
    mine, base = ([figure_of(found[each][seed], figure) for seed in seeds] for each in (name, BASELINE))
    if not seeds or name == BASELINE:
        return math.nan, math.nan, len(seeds)
    difference = statistics.fmean(a - b for a, b in zip(mine, base, strict=True))
    p = float(ttest_rel(mine, base).pvalue) if len(seeds) > 1 else math.nan
    return difference, p, len(seeds)


def figure_of(result: dict[str, Any], name: str) -> float:
    """STS-B dev, or a test figure."""
    return result["dev"] if name == "dev" else result["test"][name]


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """A run's own columns."""
    started = next(iter(result["clustering_started"]), "")
    row = {"seed": result["seed"], "dev": result["dev"], "clustering_started": started}
    return row | {"seconds": round(result["seconds"], 1)}


def write_comparison(found: Found, folder: Path, origin: dict[str, Any]) -> None:
    """comparison.csv (a row a run), comparison.md and comparison.png of what there is so far."""
    names = [name for name in found if found[name]]  # of other processes' runs some may be missing
    sets = list(next(iter(found[names[0]].values()))["test"])
    columns = ["variant", "seed", "dev", *sets, "clustering_started", "seconds", "commit", "cpu"]
    rows = [
        {**result["machine"], **result["test"], **row_of(result), "variant": name}
        for name in names
        for _, result in sorted(found[name].items())
    ]
    write_csv(folder / "comparison.csv", columns, rows)
    lines = [
        "| variant | seeds | STS-B dev | test avg | − SimCSE, dev (p) | − SimCSE, test avg (p) |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        results = list(found[name].values())
        cells = [spread([figure_of(result, each) for result in results]) for each in ("dev", "avg")]
        for each in ("dev", "avg"):
            difference, p, _ = paired(found, name, each)
            cells.append("" if math.isnan(difference) else f"{difference:+.2f} ({p:.3f})")
        lines.append(f"| {name} | {len(results)} | {' | '.join(cells)} |")
    lines += ["", "Spearman × 100, mean ± standard deviation over seeds; p of a paired t-test.", ""]
    lines += ["This table was written by (commits of the runs: comparison.csv)", ""]
    lines += ["```json", json.dumps(origin), "```", ""]
    write(folder / "comparison.md", "\n".join(lines))
    draw(found, names, folder / "comparison.png")


def draw(found: Found, names: list[str], file: Path) -> None:
    """A dot for each seed, lines between the runs of one seed, a bar for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, name, title in zip(axes, ("dev", "avg"), ("STS-B dev", "seven test sets, mean"), strict=True):
        for seed in sorted({seed for each in names for seed in found[each]}):
            points = [(x, found[each].get(seed)) for x, each in enumerate(names)]
            points = [(x, figure_of(result, name)) for x, result in points if result]
            axis.plot(*zip(*points, strict=True), "o-", lw=0.6, ms=4, alpha=0.6, label=f"seed {seed}")
        for x, each in enumerate(names):
            mean = statistics.fmean(figure_of(result, name) for result in found[each].values())
            axis.plot([x - 0.3, x + 0.3], [mean, mean], color="black", lw=2)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axis.set_title(title)
        axis.set_ylabel("Spearman × 100")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=7)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def write_search(found: dict[str, list[dict[str, Any]]], folder: Path, origin: dict[str, Any]) -> None:
    """search.csv and search.md: dev for each seed, ranked by the first, which all settings have."""
    rows = [{**row_of(result), "settings": name} for name, results in found.items() for result in results]
    write_csv(folder / "search.csv", ["settings", "seed", "dev", "clustering_started"], rows)
    seeds = sorted({result["seed"] for results in found.values() for result in results})
    lines = [f"| settings | {' | '.join(f'seed {seed}' for seed in seeds)} | clustering starts at step |"]
    lines.append(f"|:--|{'--:|' * (len(seeds) + 1)}")
    for name, results in sorted(found.items(), key=lambda item: -item[1][0]["dev"]):
        dev = {result["seed"]: f"{result['dev']:.2f}" for result in results}
        started = next(iter(results[0]["clustering_started"]), "never")
        lines.append(f"| {name} | {' | '.join(dev.get(seed, '') for seed in seeds)} | {started} |")
    lines += [
        "",
        "STS-B dev, Spearman × 100. This table was written by",
        "",
        "```json",
        json.dumps(origin),
        "```",
        "",
    ]
    write(folder / "search.md", "\n".join(lines))
