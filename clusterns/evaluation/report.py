"""`clusterns report`: a look inside the clusters of a training run, or of any model, as one HTML page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__
from ..checks import check_choice, check_count, check_seed
from ..corpus.columns import Asked
from ..corpus.sources import column_names, read_rows
from ..encoder import SentenceEncoder
from ..files import Read, check_outputs, replacing
from ..models.folder import MODEL_FILES, first_line, resolve
from ..training.run_folder import LOG as LOG_FILE
from ..training.run_folder import STATE as STATE_FILE
from ..training.run_folder import read_summary
from ..training.watch import verdicts
from .cluster_view import plane, view_clusters
from .evaluated_model import load_model
from .report_figures import draw_cosines, draw_curves
from .report_page import render, write_case_studies, write_sentences

MAPS = ("tsne", "pca")
# Sentences for each cluster of k-means where no number is given, and the most clusters then.
PER_CLUSTER, MOST_CLUSTERS = 40, 128


def write_report(
    model: str | os.PathLike[str],
    sentences: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text_columns: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    csv_file: str | os.PathLike[str] | None = None,
    num_clusters: int | None = None,
    rows: int | None = 5000,
    map_sentences: int = 3000,
    map_method: str = "tsne",
    examples: int = 20,
    nearest: int = 5,
    pooling: str | None = None,
    batch_size: int = 64,
    seed: int = 42,
    progress: bool = True,
) -> int:
    """Write the page, and beside it as CSV all sentences and the case studies; each whole or not at all.

    Args:
        model: output folder of a training run, whose centroids and log are shown, or any model as
            `load_model` takes it, whose embeddings are clustered anew by `SphericalKMeans`.
        sentences: file or hub dataset, see `load_rows`; the first text of a row. Repeated ones count once.
        output: the HTML page.
        text_columns: the column of the sentences; None takes the first that `load_rows` takes.
        delimiter, header: see `load_rows`.
        csv_file: a line for each row read, see `write_sentences`; None is the page with the suffix .csv. The
            case studies stand beside it, with -examples before the suffix.
        num_clusters: K of a clustering anew; given, it leaves a run's own centroids aside. None is one for
            40 sentences, at most 128.
        rows: of the file at most, from the beginning; None is all.
        map_sentences: of them on the map, at most.
        map_method: "tsne" or "pca".
        examples: case studies, a random sample.
        nearest: sentences shown for each centroid and each role.
        pooling: see `load_model`.
        batch_size: sentences that are encoded at a time.
        seed: of the sample, the map and k-means.
        progress: show bars.

    A run's centroids live where its loss sees the sentences: behind the projection head, where it trained
    with one. Then so do the embeddings shown.

    Returns 0. Raises ValueError or OSError in one line for bad input, as fewer than two sentences.
    """
    table = f"{os.path.splitext(Path(output))[0]}.csv" if csv_file is None else csv_file
    reads = Read("model", model, MODEL_FILES), Read("--sentences", sentences)
    stem, suffix = os.path.splitext(table)
    outputs = {"--output": output, "--csv": table, "--csv (examples)": f"{stem}-examples{suffix}"}
    output, csv_file, examples_file = check_outputs(outputs, reads).values()
    check_choice("--map", map_method, MAPS)
    for name, value, least in (
        *(() if rows is None else (("--rows", rows, 2),)),
        *(("--map-sentences", map_sentences, 2), ("--examples", examples, 0)),
        ("--nearest", nearest, 1),
    ):
        check_count(name, value, at_least=least)
    check_seed("--seed", seed)
    if num_clusters is not None:
        check_count("--num-clusters", num_clusters, at_least=2)

    columns = column_names(text_columns)
    if columns is not None and len(columns) > 1:
        raise ValueError(f"--text-columns: expected one column, got {len(columns)}: {text_columns}")
    asked = Asked(columns, sentences=True)
    found = read_rows(sentences, asked, delimiter=delimiter, header=header)
    lines = [row[0] for row in found[:rows]]
    texts = list(dict.fromkeys(lines))
    print(found.account, flush=True)
    account = _account(len(texts), len(lines), len(found))
    print(account, flush=True)
    if len(texts) < 2:
        raise ValueError(f"--sentences: expected at least two different sentences, got one in {sentences}")
    folder = resolve(model)
    loaded = load_model(folder, pooling=pooling, truncate=True)
    encoder = loaded.encoder
    embeddings = encoder.encode(texts, batch_size=batch_size, progress=progress)
    centroids, why = (None, "") if num_clusters is not None else run_centroids(folder)
    source = f"of the run, {STATE_FILE}"
    if centroids is not None:
        embeddings = _as_the_loss_sees(encoder, embeddings, centroids, folder)
    else:
        _check_finite(embeddings)
        count = num_clusters or max(2, min(MOST_CLUSTERS, len(texts) // PER_CLUSTER))
        centroids = _cluster(embeddings, count, seed)
        source = f"by k-means over these sentences{why}"
    view = view_clusters(texts, embeddings, centroids, source)

    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    mapped = order[:map_sentences].sort().values
    chosen = view.examples(examples, nearest, seed)
    pictures = {"cosines": draw_cosines(view.cosine_samples(seed))}
    name = folder.resolve().name if Path(model).is_dir() else str(model)
    records = _records(folder / LOG_FILE)
    if any("loss" in record for record in records):
        settings = read_summary(folder).get("settings", {})
        pictures["curves"] = draw_curves(records, name, settings.get("bml_weight", 0.0))
    page = render(
        view,
        chosen,
        plane(view.unit[mapped], map_method, seed),
        mapped.tolist(),
        pictures,
        title=f"Inside the clusters of {name}",
        about={
            "model": str(model),
            "pooling": loaded.pooling,
            "sentences": account,
            "read": found.account,
            "written by": f"clusterns {__version__}, torch {torch.__version__}",
        },
        map_method=map_method,
        nearest=nearest,
    )
    with replacing(output) as path:
        path.write_text(page, encoding="utf-8")
    with replacing(csv_file) as path:
        write_sentences(view, lines, path)
    with replacing(examples_file) as path:
        write_case_studies(view, chosen, path)
    print(f"{len(view.centroids)} centroids {source}")
    for verdict in verdicts(view.facts(), len(texts), len(view.centroids)):
        if verdict.wrong:
            print(f"{verdict.wrong}: {verdict.text}")
    print(f"{output}, {csv_file}, {examples_file}")
    return 0


def _account(texts: int, lines: int, rows: int) -> str:
    """How many different sentences are looked at, of how many rows, and why not of all."""
    parts = [f"the first {lines:,} (--rows all takes all)"] if lines < rows else []
    parts += [f"{lines - texts:,} repeats count once"] if texts < lines else []
    return f"{texts:,} of {rows:,} rows" + (f": {', '.join(parts)}" if parts else "")


def run_centroids(folder: Path) -> tuple[Tensor | None, str]:
    """Centroids (K, D) of a training run; or None, and in words why it has none ("" for no run)."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None, ""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected the state of a loss, got: {first_line(error)}") from error
    centroids, initialized = state.get("centroids"), state.get("initialized")
    if centroids is None or initialized is None or len(centroids) < 2:
        return None, ", as the run had no clusters"
    if not bool(initialized):
        return None, ", as clustering never started in the run"
    return centroids, ""


def _as_the_loss_sees(encoder: Any, embeddings: Tensor, centroids: Tensor, folder: Path) -> Tensor:
    """Embeddings (N, D) behind the head that a run trained with, where it has one."""
    if centroids.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"{folder / STATE_FILE}: expected centroids of width {embeddings.shape[1]} as the embeddings, "
            f"got {centroids.shape[1]}"
        )
    if not isinstance(encoder, SentenceEncoder) or encoder.head_use != "train":
        return embeddings
    with torch.no_grad():
        return encoder.project(embeddings.to(next(encoder.parameters()).device)).cpu()


def _check_finite(embeddings: Tensor) -> None:
    broken = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if broken:
        raise ValueError(f"model: expected finite embeddings, got {broken} sentences with NaN or infinity")


def _cluster(embeddings: Tensor, count: int, seed: int) -> Tensor:
    """Centroids (K, D) of the embeddings (N, D)."""
    from ..spherical_kmeans import SphericalKMeans

    if count > len(embeddings):
        raise ValueError(
            f"--num-clusters: expected at most one for each of {len(embeddings)} sentences, got {count}"
        )
    return SphericalKMeans(count, random_state=seed).fit(embeddings).cluster_centers_


def _records(path: Path) -> list[dict[str, Any]]:
    """The log of a run, without the line that a run still going on may be writing; empty without a log."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object a line, got: {first_line(error)}") from error
