"""`clusterns compare`: groups of training runs that differ by their seeds, side by side.

A group is the runs of one folder. Each later group is compared with the first one, seed by seed: the mean of
the differences, its 95 % interval, the p-value of the paired t-test, and the difference that so many seeds
show in four experiments of five, where there is one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from .evaluation.figure import check_suffix
from .evaluation.judging import first_figures
from .evaluation.tables import table
from .files import Read, check_outputs, expanded, write_results
from .models.folder import MODEL_FILES
from .training.config import FREE_ON_RESUME, flag
from .training.run_folder import LOG, SUMMARY, read_summary

# What the runs of a group may differ in.
_FREE = FREE_ON_RESUME | {"seed"}
CONFIDENCE, POWER = 0.95, 0.8
LEAST_P = 0.001  # smaller ones say no more


class Run(NamedTuple):
    """One training: its folder, settings, what tells its data from others, and its figures by name."""

    folder: Path
    settings: dict[str, Any]
    data: dict[str, Any]
    figures: dict[str, float]
    # It was to have clusters, and clustering never started.
    never_clustered: bool

    @property
    def seed(self) -> int:
        """The one setting that runs of a group differ in."""
        return self.settings["seed"]


def compare(
    folders: Sequence[str | os.PathLike[str]], scores: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Compare the trainings in these folders.

    Args:
        folders: output folders of `clusterns train`, or folders of such; those that lie in one are a group.
        scores: what `clusterns evaluate --json` wrote of their models, to compare in place of dev scores.

    Returns what the JSON holds: groups (folders by seed); never_clustered (runs of each group whose
    clustering was to start and did not); differing (settings that tell the groups apart, by group); and
    metrics: for each figure the groups (values by seed, mean, standard deviation with n − 1, 95 % interval
    of the mean; None for one seed) and the difference of each later group to the first, over the seeds of
    both: also `p_value`, `p_holm` (corrected for all groups, Holm 1979) and `detectable` (see there).

    Raises ValueError or OSError in one line for a folder that is no finished training, runs of a group that
    differ by more than the seed, a seed that comes twice, and groups judged by different data.
    """
    found = dict.fromkeys(path for given in folders for path in _run_folders(expanded(given, "RUN")))
    runs = [_read(path) for path in found]
    if scores is not None:
        runs = _with_scores(runs, expanded(scores, "--scores"))
    groups = _grouped(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.figures))
    if not names:
        raise ValueError("RUN: expected runs with dev scores, got none; --scores compares by other data")
    for run in runs:
        for name in names:
            if not isinstance(value := run.figures.get(name), (int, float)) or not math.isfinite(value):
                raise ValueError(f"{run.folder}: expected a number as {name}, got {value}")
    return {
        "groups": {
            group: {run.seed: str(run.folder) for run in members} for group, members in groups.items()
        },
        "never_clustered": {
            group: sum(run.never_clustered for run in members) for group, members in groups.items()
        },
        "differing": _differing({group: members[0] for group, members in groups.items()}),
        "metrics": {
            name: metric({g: {run.seed: run.figures[name] for run in runs} for g, runs in groups.items()})
            for name in names
        },
    }


def _run_folders(path: Path) -> list[Path]:
    """The folder itself where it is that of a run, else those in it that are."""
    if not path.is_dir():
        raise FileNotFoundError(f"RUN: expected the output folder of a training, got {path}")
    found = [each for each in (path, *sorted(path.iterdir())) if (each / LOG).is_file()]
    if not found:
        raise ValueError(f"RUN: expected the output folder of a training, or a folder of such, got {path}")
    return [each.resolve() for each in (found[:1] if found[0] == path else found)]


def _read(folder: Path) -> Run:
    summary = read_summary(folder)
    if not summary.get("finished"):
        raise ValueError(f"{folder}: expected a training that has ended, got one without scores in {SUMMARY}")
    figures = {f"dev {name}": value for name, value in list(summary["scores"]["after"].items())[:1]}
    never = bool(summary["settings"].get("num_clusters")) and summary.get("clustered") is False
    return Run(folder, summary["settings"], summary.get("data", {}), figures, never)


def _with_scores(runs: Sequence[Run], file: Path) -> list[Run]:
    """The runs with the figures that an evaluation gave their models."""
    try:
        models = json.loads(file.read_text(encoding="utf-8"))["models"]
        found = [(Path(model["model"]).resolve(), first_figures(model)) for model in models]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--scores: expected what `clusterns evaluate --json` writes, got {file}") from error
    known = {path: {name: value for name, (_, value) in figures.items()} for path, figures in found}
    for run in runs:
        if (count := sum(path == run.folder for path, _ in found)) != 1:
            raise ValueError(
                f"--scores: expected one model of each run in {file}, got {count} of {run.folder}"
            )
    # What judged them there is the same for all.
    return [run._replace(figures=known[run.folder], data={**run.data, "dev": None}) for run in runs]


def _grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by the names of their folders' folders, those of a group by seed."""
    places = dict.fromkeys(run.folder.parent for run in runs)
    names = [place.name for place in places]
    groups: dict[str, list[Run]] = {}
    for place in places:
        members = sorted((run for run in runs if run.folder.parent == place), key=lambda run: run.seed)
        groups[place.name if names.count(place.name) == 1 else str(place)] = members
        for one, other in itertools.pairwise(members):
            if one.seed == other.seed:
                raise ValueError(
                    f"{other.folder}: expected another seed than {one.folder} has, got {one.seed} in both; "
                    "those of one folder are a group: give each group a folder of its own"
                )
            for name, before, now in _changes(one, other):
                raise ValueError(
                    f"{other.folder}: expected the settings and data of {one.folder}, with which it is one "
                    f"group, got another {name}: {now}, not {before}"
                )
    first, *later = groups.values()
    by_seed = {run.seed: run for run in first}
    for run in (run for members in later for run in members):
        # Documentation is parted into training and dev by the seed, a file is one for all.
        is_file = run.settings.get("dev") or run.settings.get("sts_dir")
        other = by_seed.get(run.seed, first[0] if is_file else run)
        if len({run.data.get("dev"), other.data.get("dev")} - {None}) > 1:
            raise ValueError(
                f"{run.folder}: expected to be judged by the dev data of {other.folder}, got other data; "
                "--scores compares what `clusterns evaluate` gives on data of your choice"
            )
    return groups


def _changes(one: Run, other: Run) -> Iterator[tuple[str, Any, Any]]:
    """Settings and data, but for the seed, in which two runs differ; what they are in both."""
    for name in sorted(one.settings.keys() | other.settings.keys()):
        values = one.settings.get(name), other.settings.get(name)
        if name not in _FREE and values[0] != values[1]:
            yield flag(name), *values
    if one.settings["train_file"] is None and one.seed != other.seed:
        return  # the documentation is parted into training and dev by the seed
    for name in one.data.keys() & other.data.keys():
        if one.data[name] != other.data[name]:
            yield f"content of {flag(name)}", one.data[name], other.data[name]


def _differing(firsts: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Settings and data that tell groups apart: the value of each group, by a run of each."""
    runs = list(firsts.values())
    names = sorted({name for run in runs[1:] for name, _, _ in _changes(runs[0], run)})
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        setting = name.removeprefix("--").replace("-", "_")
        found[name] = {
            group: run.settings.get(setting, run.data.get(name.split("--")[-1]))
            for group, run in firsts.items()
        }
    return found


def metric(groups: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """What `compare` says of one figure, from its values by seed in each group."""
    first, *later = groups
    differences: list[dict[str, Any]] = []
    for group in later:
        seeds = sorted(groups[first].keys() & groups[group].keys())
        values = [groups[group][seed] - groups[first][seed] for seed in seeds]
        differs = len(set(values)) > 1  # else there is no t
        differences.append(
            {
                "first": first,
                "second": group,
                "seeds": seeds,
                **_spread(values),
                "p_value": float(stats.ttest_1samp(values, 0).pvalue) if differs else None,
                "p_holm": None,
                "detectable": detectable(float(np.std(values, ddof=1)), len(values)) if differs else None,
            }
        )
    tested = sorted(
        (one for one in differences if one["p_value"] is not None), key=lambda one: one["p_value"]
    )
    least = 0.0
    for place, one in enumerate(tested):
        one["p_holm"] = least = max(least, min(1.0, (len(tested) - place) * one["p_value"]))
    return {
        "groups": {group: {"seeds": dict(of), **_spread([*of.values()])} for group, of in groups.items()},
        "differences": differences,
    }


def detectable(std: float, count: int) -> float:
    """The mean difference that a paired t-test at 5 % shows with a power of 80 %.

    std: of the `count` differences, with count − 1. Where the true difference is this, four experiments of
    five of so many seeds have p < 0.05; a smaller one they mostly miss.
    """
    bound, root = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)), math.sqrt(count)

    def lack(effect: float) -> float:
        """Of power, where the difference is `effect` standard deviations; that of the wrong sign is nil."""
        return POWER - float(stats.nct.sf(bound, count - 1, effect * root))

    return std * float(optimize.brentq(lack, 0, (bound + 8) / root))


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation and 95 % interval of the mean by Student's t; None where there is none."""
    count = len(values)
    mean = float(np.mean(values)) if count else None
    if mean is None or count < 2:
        return {"mean": mean, "std": None, "low": None, "high": None}
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half}


def report(results: Mapping[str, Any]) -> str:
    """The results as Markdown that reads as plain text too."""
    metrics = results["metrics"]
    rows = [
        [group, str(len(seeds)), *(_mean(metric["groups"][group]) for metric in metrics.values())]
        for group, seeds in results["groups"].items()
    ]
    parts = [table(["group", "seeds", *metrics], rows)]
    parts.append("Mean ± standard deviation over seeds.")
    first = next(iter(results["groups"]))
    rows = [
        [one["second"], name, str(len(one["seeds"])), *_difference(one, len(metric["differences"]))]
        for name, metric in metrics.items()
        for one in metric["differences"]
    ]
    if rows:
        head = [f"difference to {first}", "score", "seeds", "mean", "95 % interval", "shown from", "p"]
        several = any(len(metric["differences"]) > 1 for metric in metrics.values())
        parts.append(table([*head, "p (Holm)"] if several else head, rows))
        parts.append(
            "Over the seeds of both groups; p of the paired t-test"
            + (", and corrected for so many groups" if several else "")
            + ". Shown from: a true difference of this size has p < 0.05 in four experiments of five."
        )
    if results["differing"]:
        groups = list(results["groups"])
        rows = [[name, *(str(of[group]) for group in groups)] for name, of in results["differing"].items()]
        parts.append(table(["what differs", *groups], rows))
    for group, count in results["never_clustered"].items():
        if count:
            of = len(results["groups"][group])
            parts.append(
                f"{group}: clustering never started in {count} of {of} runs, which are plain SimCSE."
            )
    return "\n\n".join(parts)


def _mean(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.2f}" + ("" if spread["std"] is None else f" ± {spread['std']:.2f}")


def _difference(found: Mapping[str, Any], of: int) -> list[str]:
    """Mean, interval, what is shown, p, and where there are several groups p after Holm."""
    bounds, shown = "", ""
    if found["low"] is not None:
        bounds = f"{found['low']:+.2f} to {found['high']:+.2f}"
    if found["detectable"] is not None:
        shown = f"{found['detectable']:.2f}"
    mean = "no seed in both" if found["mean"] is None else f"{found['mean']:+.2f}"
    return [mean, bounds, shown, *map(_p, (found["p_value"], found["p_holm"])[: 1 + (of > 1)])]


def _p(value: float | None) -> str:
    return "" if value is None else f"< {LEAST_P}" if value < LEAST_P else f"{value:.3f}"


def draw_groups(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw `compare`'s metrics, a panel each: every seed as a point, mean and 95 % interval beside them."""
    from matplotlib.figure import Figure

    columns = min(3, len(metrics))
    rows, count = -(-len(metrics) // columns), max(len(metric["groups"]) for metric in metrics.values())
    figure = Figure(figsize=(max(3.5, 0.65 * count) * columns, 4.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, one) in zip(panels, metrics.items(), strict=False):
        for place, of in enumerate(one["groups"].values()):
            values = list(of["seeds"].values())
            # Side by side, for seeds with nearly one score; the mean stands on their right.
            spread = [place - 0.3 + 0.4 * (i + 0.5) / len(values) for i in range(len(values))]
            axes.plot(spread, values, "o", ms=4, alpha=0.6, color="C0", label="" if place else "one seed")
            half = 0.0 if of["low"] is None else of["high"] - of["mean"]
            label = "" if place else "mean, 95 % interval"
            axes.errorbar(place + 0.25, of["mean"], half, fmt="_", ms=12, capsize=4, color="k", label=label)
        axes.set(ylabel="score × 100", xlim=(-0.6, count - 0.4))
        axes.set_title(name, parse_math=False)
        turned = {"rotation": 35, "ha": "right"} if count > 3 else {}
        axes.set_xticks(range(count), one["groups"], parse_math=False, **turned)
        axes.grid(axis="y", alpha=0.3)
    for axes in panels[len(metrics) :]:
        axes.remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def run(
    folders: Sequence[str],
    *,
    scores: str | None = None,
    json_file: str | None = None,
    markdown_file: str | None = None,
    figure_file: str | None = None,
) -> int:
    """`compare`; print the tables, and write JSON, Markdown and figure where asked, each whole or not at all.

    Returns 0.
    """
    files = {"--json": json_file, "--markdown": markdown_file, "--figure": figure_file}
    reads = [Read("RUN", folder, MODEL_FILES) for folder in folders]
    check_outputs(files, [*reads, *([Read("--scores", scores)] if scores is not None else [])])
    if figure_file is not None:
        check_suffix("--figure", figure_file)
    results = compare(folders, scores)
    print(text := report(results))
    write_results(results, text, lambda path: draw_groups(results["metrics"], path), files)
    return 0
