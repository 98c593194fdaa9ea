"""The report as one HTML page that loads nothing from anywhere, and its case studies as CSV."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from numpy.typing import NDArray

from .cluster_view import ClusterView, Example

# What begins a formula in a spreadsheet (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
CSV_COLUMNS = ("sentence", "cluster", "cosine with centroid", "role", "other", "cosine")


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
        pictures: SVG texts: sizes, cosines and, of a run, curves.
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
    clusters = [
        {"id": cluster, "size": size, "sentences": view.closest_to_centroid(cluster, nearest)}
        for cluster, size in sorted(enumerate(view.sizes), key=lambda item: -item[1])
    ]
    return environment.get_template("report.html.jinja").render(
        title=title,
        about=about,
        facts=view.facts(),
        source=view.source,
        sentences=view.sentences,
        clusters=clusters,
        examples=examples,
        pictures={name: _data_address(svg) for name, svg in pictures.items()},
        points=_in_script(_points(view, places, mapped)),
        map_method="t-SNE" if map_method == "tsne" else "principal components",
        mapped=len(mapped),
    )


def _points(view: ClusterView, places: NDArray[Any], mapped: Sequence[int]) -> dict[str, Any]:
    """What the map shows, with places between 0 and 1."""
    low, high = places.min(axis=0), places.max(axis=0)
    within = (places - low) / (high - low).clip(min=1e-12)
    return {
        "x": within[:, 0].round(4).tolist(),
        "y": within[:, 1].round(4).tolist(),
        "cluster": [int(view.nearest[row]) for row in mapped],
        "cosine": [round(float(view.nearest_cosines[row]), 3) for row in mapped],
        "text": [view.sentences[row] for row in mapped],
    }


def _in_script(value: Any) -> str:
    """JSON that can stand in a script element: no character in it begins a tag."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _data_address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def write_case_studies(view: ClusterView, examples: Sequence[Example], path: Path) -> None:
    """The case studies as CSV, a line for each sentence beside an example: its role and cosine.

    A hard negative is a centroid: its own line has the role "hard-negative centroid" and its number as the
    other, and the sentences nearest to it follow. A sentence that a spreadsheet would run as a formula has an
    apostrophe before it.
    """
    sentences = [f"'{text}" if text.startswith(_FORMULA) else text for text in view.sentences]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
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
