"""The report as one HTML page that loads nothing from anywhere, and its sentences as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from numpy.typing import NDArray

from ..training.figure import COSINES, SHARES
from ..training.watch import verdicts
from .cluster_view import ClusterView, Example

# What begins a formula in a spreadsheet (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
CSV_COLUMNS = (
    *("text", "cluster", "name", "cosine"),
    *("runner-up", "runner-up name", "runner-up cosine", "mates"),
)
EXAMPLE_COLUMNS = ("sentence", "cluster", "cosine with centroid", "role", "other", "cosine")
# Characters of a sentence that the page shows; the CSV has it whole.
SHOWN = 500
FIGURES = {
    **{name: f"mean cosine: {label}" for name, label in COSINES.items()},
    **{name: f"share: {label}" if "entropy" not in label else label for name, label in SHARES.items()},
    "empty_clusters": "empty clusters",
}
# Marks of the clusters, the largest first: each colour in one shape, then in the next. Shapes are SVG paths.
COLOURS = (
    *("#1f77c9", "#e8590c", "#2f9e44", "#d6336c", "#8a5cf0", "#a0692e"),
    *("#12a5b8", "#c9a000", "#e03131", "#7a8a00", "#c04fd0", "#868e96"),
)
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M0-5L4.6 3.4H-4.6z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5L5 0L0 5L-5 0z",
    "M-1.5-4.6h3v3.1h3.1v3h-3.1v3.1h-3v-3.1h-3.1v-3h3.1z",
)


def render(
    view: ClusterView,
    examples: Sequence[Example],
    places: NDArray[Any],
    mapped: Sequence[int],
    pictures: Mapping[str, str],
    *,
    title: str,
    about: Mapping[str, str],
    map_method: str,
    nearest: int,
) -> str:
    """The page.

    Args:
        view: the sentences among their centroids.
        examples: the case studies.
        places: of the sentences `mapped` on the map, (M, 2).
        mapped: their rows in the view, M numbers.
        pictures: SVG elements: cosines and, of a run, curves.
        title: of the page.
        about: what was looked at, and with what.
        map_method: "tsne" or "pca".
        nearest: sentences to show for each centroid.
    """
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sizes = view.sizes
    clusters = {
        cluster: {
            "label": view.label(cluster),
            "named": bool(view.names[cluster]),
            "size": sizes[cluster],
            "colour": COLOURS[place % len(COLOURS)],
            "shape": SHAPES[place // len(COLOURS) % len(SHAPES)],
            "sentences": view.closest_to_centroid(cluster, nearest),
        }
        for place, cluster in enumerate(sorted(range(len(sizes)), key=lambda cluster: -sizes[cluster]))
    }
    facts = view.facts()
    judged = {verdict.figure: verdict for verdict in verdicts(facts, len(view.sentences), len(sizes))}
    return environment.get_template("report.html.jinja").render(
        title=title,
        about=about,
        figures=[(FIGURES[name], value, judged.get(name)) for name, value in facts.items()],
        wrong=[verdict.wrong for verdict in judged.values() if verdict.wrong],
        source=view.source,
        sentences=[_short(text) for text in view.sentences],
        clusters=clusters,
        filled={cluster: entry for cluster, entry in clusters.items() if entry["size"]},
        examples=examples,
        mates=view.mates,
        mean_size=len(view.sentences) / len(sizes),
        pictures=pictures,
        points=_in_script(_points(view, places, mapped, clusters)),
        map_method="t-SNE" if map_method == "tsne" else "principal components",
        mapped=len(mapped),
    )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _points(
    view: ClusterView, places: NDArray[Any], mapped: Sequence[int], clusters: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the map shows, with places between 0 and 1; the clusters from the largest on."""
    low, high = places.min(axis=0), places.max(axis=0)
    within = (places - low) / (high - low).clip(min=1e-12)
    ids = [int(view.nearest[row]) for row in mapped]
    marks = ("label", "colour", "shape")
    return {
        "x": within[:, 0].round(4).tolist(),
        "y": within[:, 1].round(4).tolist(),
        "cluster": ids,
        "cosine": [round(float(view.nearest_cosines[row]), 3) for row in mapped],
        "text": [_short(view.sentences[row]) for row in mapped],
        "clusters": [
            {"id": cluster, **{name: entry[name] for name in marks}}
            for cluster, entry in clusters.items()
            if entry["size"]
        ],
    }


def _in_script(value: Any) -> str:
    """JSON that can stand in a script element: no character in it begins a tag."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write_sentences(view: ClusterView, texts: Iterable[str], path: Path) -> None:
    """Each text, one of the view's and as often as it comes, as CSV with its cluster and the runner-up.

    `mates` is the number of other sentences of its cluster. A text that a spreadsheet would run as a formula
    has an apostrophe before it.
    """
    rows = {text: row for row, text in enumerate(view.sentences)}
    found = (view.nearest, view.nearest_cosines, view.runner_up, view.runner_up_cosines)
    nearest, cosines, runner_up, runner_up_cosines = (values.tolist() for values in found)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for text in texts:
            row = rows[text]
            mine, other = nearest[row], runner_up[row]
            writer.writerow(
                [
                    *(_cell(text), mine, view.names[mine], f"{cosines[row]:.4f}"),
                    *(other, view.names[other], f"{runner_up_cosines[row]:.4f}", view.mates[row]),
                ]
            )


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def write_case_studies(view: ClusterView, examples: Sequence[Example], path: Path) -> None:
    """The case studies as CSV, a line for each sentence beside an example: its role and cosine.

    A hard negative is a centroid: its own line has the role "hard-negative centroid" and its number as the
    other, and the sentences nearest to it follow. Formulas as in `write_sentences`.
    """
    sentences = [_cell(text) for text in view.sentences]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(EXAMPLE_COLUMNS)
        for example in examples:
            head = [sentences[example.row], example.cluster, f"{example.cluster_cosine:.4f}"]
            writer.writerow(
                [
                    *head,
                    "hard-negative centroid",
                    example.hard_negative,
                    f"{example.hard_negative_cosine:.4f}",
                ]
            )
            for role, others in (
                ("sentence of the hard-negative centroid", example.hard_negative_sentences),
                ("false negative", example.false_negatives),
            ):
                writer.writerows([*head, role, sentences[row], f"{cosine:.4f}"] for row, cosine in others)
