"""The results of an evaluation as Markdown: tables that read as plain text too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .judging import FIRST
from .sts import SHORT_NAMES

TEST_SETS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")
# Of the user's data, by their kind.
MEASURE_NAMES = {
    "pairs": {"spearman": "Scored pairs, Spearman"},
    "labels": {"accuracy": "Clustering, accuracy", "nmi": "Clustering, NMI", "ami": "Clustering, AMI"},
    "queries": {
        "mrr_at_10": "Queries, MRR@10",
        "recall_at_1": "Queries, recall@1",
        "recall_at_5": "Queries, recall@5",
        "recall_at_10": "Queries, recall@10",
        "ndcg_at_10": "Queries, nDCG@10",
    },
}
GEOMETRY_NAMES = {
    "alignment": "alignment",
    "uniformity": "uniformity",
    "mean_cosine": "mean cosine",
    "first_component_share": "first component",
}
_SHORT = {key: title.split(", ")[1] for names in MEASURE_NAMES.values() for key, title in names.items()}
ABSENT = "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table: the first column to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Table of models as rows and sets as columns, two decimals.

    Columns come in the order of their first appearance; a figure that a model lacks is a dash.
    """
    columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    return table(
        ["model", *(SHORT_NAMES.get(name, name) for name in columns)],
        ([model, *(_number(figures.get(name)) for name in columns)] for model, figures in rows.items()),
    )


def report(results: Mapping[str, Any], *, details: bool = True) -> str:
    """All tables of `evaluate`'s results; without `details` neither sub-sets nor how they came about."""
    sections = [
        ("STS test sets, Spearman × 100", _sts(results, test=True)),
        ("STS, not for the average, Spearman × 100", _sts(results, test=False)),
        ("Sub-sets, Spearman × 100", _subsets(results) if details else None),
        *(section for kind in MEASURE_NAMES for section in _data(results, kind)),
        ("Differences, × 100, with the p-value of the paired bootstrap", _comparisons(results)),
        ("Geometry of the STS-B dev sentences", _geometry(results)),
        ("Left out", _errors(results)),
        ("How", _settings(results) if details else None),
    ]
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in sections if body)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _models(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return results["models"]


def _names(results: Mapping[str, Any], key: str) -> list[str]:
    """Names of the sets under `key` in the order of their first appearance."""
    return list(dict.fromkeys(name for model in _models(results) for name in model[key]))


def _sts(results: Mapping[str, Any], *, test: bool) -> str | None:
    found = _names(results, "sts")
    columns = [name for name in found if (name in TEST_SETS) == test]
    if not columns:
        return None
    shown = [*columns, "avg"] if test else columns
    rows = []
    for model in _models(results):
        figures = [model["avg"] if name == "avg" else model["sts"].get(name) for name in shown]
        rows.append([model["label"], *(_number(figure and figure["spearman"]) for figure in figures)])
        rows.append(["95 % interval", *map(_interval, figures)])
    return table(["model", *shown], rows)


def _interval(figure: Mapping[str, Any] | None) -> str:
    if not figure or figure["low"] is None:
        return ABSENT
    return f"{figure['low']:.2f} to {figure['high']:.2f}"


def _subsets(results: Mapping[str, Any]) -> str | None:
    rows = []
    for name in _names(results, "sts"):
        of_models = [model["sts"].get(name, {}) for model in _models(results)]
        parts = list(dict.fromkeys(part for figure in of_models for part in figure.get("subsets", {})))
        if not parts:
            continue
        for part in parts:
            figures = [figure.get("subsets", {}).get(part) for figure in of_models]
            rows.append(_row(f"{name} {part}", figures))
        rows.append(_row(f"{name} all", of_models))
        for key, title in (("mean", "mean"), ("weighted_mean", "weighted mean")):
            rows.append(_row(f"{name} {title}", [figure.get(key) for figure in of_models]))
    if not rows:
        return None
    return table(["set", "pairs", *(model["label"] for model in _models(results))], rows)


def _row(title: str, figures: Sequence[Mapping[str, Any] | None]) -> list[str]:
    pairs = next((figure["pairs"] for figure in figures if figure and "pairs" in figure), None)
    return [
        title,
        "" if pairs is None else f"{pairs:,}",
        *(_number(figure.get("spearman") if figure else None) for figure in figures),
    ]


def _comparisons(results: Mapping[str, Any]) -> str | None:
    columns = list(dict.fromkeys(name for row in results["comparisons"] for name in row["sets"]))
    if not columns:
        return None
    rows = []
    for comparison in results["comparisons"]:
        cells = []
        for name in columns:
            found = comparison["sets"].get(name)
            cells.append(f"{found['difference']:+.2f} ({_p_value(found)})" if found else ABSENT)
        rows.append([f"{comparison['second']} − {comparison['first']}", *cells])
    figures = {name: found["figure"] for row in results["comparisons"] for name, found in row["sets"].items()}
    return table(["models", *(f"{name} {_SHORT[figures[name]]}" for name in columns)], rows)


def _p_value(found: Mapping[str, float]) -> str:
    """At its floor, rounded up, only what it is below: the resamples tell no more."""
    value, is_least = found["p_value"], found["p_value"] <= found["p_floor"]
    if is_least:
        scale = 10 ** max(3, -math.floor(math.log10(value)))
        value = math.ceil(value * scale) / scale
    return f"p {'< ' if is_least else ''}{f'{value:.3f}' if value >= 0.001 else f'{value:.0e}'}"


def _geometry(results: Mapping[str, Any]) -> str | None:
    rows = [
        [
            model["label"],
            *(
                ABSENT if model["geometry"].get(key) is None else f"{model['geometry'][key]:.3f}"
                for key in GEOMETRY_NAMES
            ),
        ]
        for model in _models(results)
        if model["geometry"]
    ]
    return table(["model", *GEOMETRY_NAMES.values()], rows) if rows else None


def _data(results: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    """Titles and tables: of a single set one of all measures, else for each measure one of all sets."""
    found = [
        {name: figure for name, figure in model["data"].items() if figure["kind"] == kind}
        for model in _models(results)
    ]
    sets = list(dict.fromkeys(name for figures in found for name in figures))
    measures = list(MEASURE_NAMES[kind])
    if len(sets) == 1:
        title = MEASURE_NAMES[kind][measures[0]].split(",")[0]
        columns = [_SHORT[measure] for measure in measures]
        yield (
            f"{title}: {sets[0]}, × 100",
            _measured(results, found, columns, [(sets[0], m) for m in measures]),
        )
    elif sets:
        for measure, title in MEASURE_NAMES[kind].items():
            cells = [(name, measure) for name in sets]
            yield f"{title} × 100", _measured(results, found, [*sets, "avg"], cells)


def _measured(
    results: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    cells: Sequence[tuple[str, str]],
) -> str:
    """Measures of sets, and their mean where `columns` has one more; the first measure with its interval."""
    rows = []
    for model, figures in zip(_models(results), found, strict=True):
        values = [figures[name][measure] if name in figures else None for name, measure in cells]
        row = [ABSENT if value is None else _spread(value) for value in values]
        bounds = [_interval(figures.get(n)) if m in FIRST.values() else ABSENT for n, m in cells]
        if len(columns) > len(cells):
            means = [_mean(value) for value in values if value is not None]
            row.append(_number(sum(means) / len(means)) if len(means) == len(cells) else ABSENT)
            bounds.append(ABSENT)
        rows.append([model["label"], *row])
        if any(measure in FIRST.values() for _, measure in cells):
            rows.append(["95 % interval", *bounds])
    return table(["model", *columns], rows)


def _mean(measure: float | Mapping[str, Any]) -> float:
    return measure["mean"] if isinstance(measure, Mapping) else measure


def _spread(measure: float | Mapping[str, Any]) -> str:
    if not isinstance(measure, Mapping):
        return _number(measure)
    std = "" if measure["std"] is None else f" ± {measure['std']:.2f}"
    return f"{measure['mean']:.2f}{std}"


def _errors(results: Mapping[str, Any]) -> str | None:
    lines = [*results["errors"], *results["notes"]]
    return "\n".join(f"- {line}" for line in lines) or None


def _settings(results: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in results["settings"].items() if value is not None]
    lines += [f"- {line}" for line in results["data"]]
    lines += [
        f"- {model['label']}: {model['model']}, pooling {model['pooling']}, up to {model['max_length']} "
        f"tokens, run by {model['library']}"
        for model in _models(results)
    ]
    lines.append("- versions: " + ", ".join(f"{name} {v}" for name, v in results["versions"].items()))
    return "\n".join(lines)
