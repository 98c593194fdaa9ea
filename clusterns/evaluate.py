"""`clusterns evaluate`: one or several models on STS sets and data of the user, side by side."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .checks import check_choice, check_count, check_seed
from .corpus.judged import KINDS, Judged
from .corpus.judged_files import load_judged
from .evaluation.clustering import ALGORITHMS
from .evaluation.correlation import Floats, paired_difference
from .evaluation.evaluated_model import PRECISIONS, load_model
from .evaluation.figure import check_suffix, draw_evaluation
from .evaluation.judging import first_figures
from .evaluation.model_figures import ModelFigures, Problems, Subsets
from .evaluation.sts import (
    HUB_MTEB,
    PUBLISHED_PAIRS,
    SHORT_NAMES,
    STS_FOLDERS,
    joined,
    load_sts_subsets,
    sets_of,
    sts_folder,
)
from .evaluation.sts_scores import ALIKE, GEOMETRY_SET
from .evaluation.tables import report
from .files import Read, check_outputs, write_results
from .models.folder import MODEL_FILES


def evaluate(
    models: Sequence[str],
    *,
    sts_dir: str | os.PathLike[str] | None = None,
    sets: Sequence[str] | None = None,
    data: Sequence[str | os.PathLike[str]] = (),
    data_kind: str | None = None,
    data_columns: Sequence[str] | str | None = None,
    data_corpus: str | os.PathLike[str] | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    pooling: str | Sequence[str] | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    kmeans: str = "kmeans",
    cluster_seeds: int = 5,
    resamples: int = 1000,
    seed: int = 42,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate models on STS sets and on data of the user: scored pairs, labelled texts, queries.

    Args:
        models: folders or hub names, see `load_model`.
        sts_dir: source of STS sets, see `load_sts_subsets`; None for none.
        sets: names of STS sets; None takes the seven test sets and the two dev sets.
        data: files, see `load_judged`.
        data_kind, data_columns, data_corpus, delimiter, header: what they are and how to read them, for all,
            see there.
        pooling: see `load_model`; one for all models, or one for each, "auto" for what its files say. A model
            may come twice, with two poolings.
        max_length: see `load_model`, for all models.
        batch_size: sentences that are encoded at a time.
        precision: "fp32", or "bf16" for autocast to it.
        kmeans, cluster_seeds: see `evaluate_clustering`; the runs have the seeds from `seed` on.
        resamples: of the bootstrap; 0 for no intervals and no tests.
        seed: of the bootstrap and of k-means.
        progress: show bars.

    Returns what the JSON holds: settings, versions, data (what was read, a line for each source), models (one
    dict each, in the order given), comparisons of each two models, notes, and errors: one line for each
    result that is left out.

    Raises ValueError where there is nothing to evaluate on, and for settings out of range.
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    if sts_dir is None and not data:
        raise ValueError("evaluate: expected --sts-dir or --data, got neither")
    reading = {"kind": data_kind, "columns": data_columns, "corpus": data_corpus}
    of_data = {**{f"--data-{name}": given for name, given in reading.items()}, "--delimiter": delimiter}
    for name, given in {**of_data, "--header": header}.items():
        if given is not None and not data:
            raise ValueError(f"{name}: expected --data, whose files it is about, got none")
    if data_kind is not None:
        check_choice("--data-kind", data_kind, KINDS)
    if sets is not None and sts_dir is None:
        raise ValueError("--sts-sets: expected --sts-dir, whose sets they are, got none")
    for name, value, least in (
        *(("batch_size", batch_size, 1), ("cluster_seeds", cluster_seeds, 1)),
        ("resamples", resamples, 0),
    ):
        check_count(name, value, at_least=least)
    check_seed("--seed", seed, cluster_seeds)
    chosen = _with_poolings(list(map(str, models)), pooling)
    check_choice("kmeans", kmeans, ALGORITHMS)
    check_choice("precision", precision, PRECISIONS)
    dtype = torch.bfloat16 if precision == "bf16" else None

    problems = Problems()
    sts = _read_sts(sts_dir, sets, problems) if sts_dir is not None else {}
    judged = _read_data(data, sts, problems, {**reading, "delimiter": delimiter, "header": header})
    kinds = {each.kind for each in judged.values()}
    if data_corpus is not None and kinds and "queries" not in kinds:
        got = ", ".join(f"{each.kind} in {name}" for name, each in judged.items())
        raise ValueError(f"--data-corpus: expected queries in --data, got {got}")
    accounts = [_sts_account(sts_dir, sts)] if sts else []
    accounts += [each.account for each in judged.values()]
    if progress:
        for line in accounts:
            tqdm.write(line, file=sys.stderr)
    if not sts and not judged:
        raise ValueError("evaluate: expected data to evaluate on, got none that can be read (see above)")
    found, drawn = [], []
    for (name, asked), label in zip(chosen, _labels(chosen), strict=True):
        with problems.leave_out(label):
            model = load_model(name, pooling=asked, max_length=max_length)
            one = ModelFigures(model, batch_size, dtype, resamples, seed, problems, label, progress)
            figures = one.all_figures(sts, judged, kmeans, range(seed, seed + cluster_seeds))
            described = {"model": name, "label": label, **model._asdict()}
            described.pop("encoder")
            found.append({**described, **figures})
            drawn.append(one.drawn)
            del model, one  # before the next one takes the memory
    return {
        "settings": {
            "sts_dir": None if sts_dir is None else str(sts_dir),
            "data": [str(path) for path in data] or None,
            "kmeans": kmeans if "labels" in kinds else None,
            "resamples": resamples,
            "seed": seed,
            "batch_size": batch_size,
            "precision": precision,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        },
        "versions": _versions(),
        "data": accounts,
        "models": found,
        "comparisons": _compare(found, drawn) if resamples else [],
        "notes": _notes(sts),
        "errors": problems.lines,
    }


def _read_sts(
    source: str | os.PathLike[str], names: Sequence[str] | None, problems: Problems
) -> dict[str, Subsets]:
    """STS sets by their short names, each by its sub-sets."""
    long_names = {short: name for name, short in SHORT_NAMES.items()}
    place: str | Path | None = None
    with problems.leave_out("STS"):  # one line where none of the sets can be read
        place = HUB_MTEB if os.fspath(source) == HUB_MTEB else sts_folder(source)
    found: dict[str, Subsets] = {}
    if place is None:
        return found
    for name in sets_of(place) if names is None else [long_names.get(name, name) for name in names]:
        with problems.leave_out(short := SHORT_NAMES.get(name, name)):
            found[short] = load_sts_subsets(place, name)
    return found


def _sts_account(source: str | os.PathLike[str] | None, sts: Mapping[str, Subsets]) -> str:
    """What was read of a source of STS sets, and what was left out."""
    parts = []
    for name, subsets in sts.items():
        pairs = joined(subsets.values())
        left_out = f" ({pairs.unscored:,} without a score left out)" if pairs.unscored else ""
        parts.append(f"{name} {len(pairs.scores):,}{left_out}")
    return f"{source}: scored pairs of {', '.join(parts)}"


def _read_data(
    paths: Sequence[str | os.PathLike[str]],
    sts: Iterable[str],
    problems: Problems,
    reading: Mapping[str, Any],
) -> dict[str, Judged]:
    """The user's data by the names of their files, none of them that of an STS set."""
    found: dict[str, Judged] = {}
    for number, path in enumerate(paths):
        with problems.leave_out(str(path)):
            if path in paths[:number]:
                raise ValueError("expected each file once, got it twice")
            name = Path(path).stem
            name = str(path) if name in {*found, *sts, "avg"} else name
            found[name] = load_judged(path, **reading)
    return found


def _compare(models: Sequence[dict[str, Any]], drawn: Sequence[dict[str, Floats]]) -> list[dict[str, Any]]:
    """Every later model against every earlier one, on the sets, the average and the data that both have."""
    figures = [first_figures(model) for model in models]
    rows = []
    for j in range(len(models)):
        for i in range(j):
            sets = {}
            for name in figures[i]:
                if name not in figures[j]:
                    continue
                value = figures[j][name][1] - figures[i][name][1]
                found = paired_difference(value, drawn[i][name], drawn[j][name])
                if found is not None:
                    difference, *rest = found
                    told = dict(zip(("low", "high", "p_value", "p_floor"), rest, strict=True))
                    sets[name] = {"figure": figures[i][name][0], "difference": difference, **told}
            if sets:
                rows.append({"first": models[i]["label"], "second": models[j]["label"], "sets": sets})
    return rows


def _notes(sts: Mapping[str, Subsets]) -> list[str]:
    """Sets that are not those of the published protocol, by their pairs; and what has no figure."""
    lines = []
    dev = sts.get(SHORT_NAMES[GEOMETRY_SET])
    if dev is not None and max(joined(dev.values()).scores) <= ALIKE:
        lines.append(
            f"{SHORT_NAMES[GEOMETRY_SET]}: no pair is scored above {ALIKE:g}, so there is no alignment"
        )
    for name, short in ((name, SHORT_NAMES.get(name, name)) for name in PUBLISHED_PAIRS):
        if short in sts:
            pairs, published = sum(len(part.scores) for part in sts[short].values()), PUBLISHED_PAIRS[name]
            if pairs != published:
                lines.append(f"{short}: {pairs:,} scored pairs, the published set has {published:,}")
    return lines


def _with_poolings(
    models: Sequence[str], pooling: str | Sequence[str] | None
) -> list[tuple[str, str | None]]:
    """Each model with its pooling, None for what its files say; none comes twice."""
    poolings = [pooling] if isinstance(pooling, str) or pooling is None else list(pooling)
    if len(poolings) not in (1, len(models)):
        raise ValueError(
            f"pooling: expected one for all or one for each of {len(models)} models, got {len(poolings)}"
        )
    asked = [None if name == "auto" else name for name in poolings]
    return list(dict.fromkeys(zip(models, asked * (len(models) // len(asked)), strict=True)))


def _labels(models: Sequence[tuple[str, str | None]]) -> list[str]:
    """What tables call the models: the folder's name, or all of it and the pooling, to tell them apart."""
    names = [name for name, _ in models]
    short = {name: Path(name).resolve().name if Path(name).is_dir() else name for name in names}
    shared = {name for name, label in short.items() if list(short.values()).count(label) > 1}
    labels = []
    for name, pooling in models:
        label = name if name in shared else short[name]
        labels.append(f"{label} ({pooling or 'auto'})" if names.count(name) > 1 else label)
    return labels


def _versions() -> dict[str, str]:
    packages = ("clusterns", "transformers", "tokenizers", "scipy", "scikit-learn", "sentence-transformers")
    installed = [
        name for name in packages if find_spec(name.replace("scikit-learn", "sklearn").replace("-", "_"))
    ]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in installed},
    }


def run(
    models: Sequence[str],
    *,
    json_file: str | os.PathLike[str] | None = None,
    markdown_file: str | os.PathLike[str] | None = None,
    figure_file: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> int:
    """`evaluate` with its settings; print the tables, and write JSON, Markdown and figure where asked.

    Each file is written whole or not at all. Returns 0, or 2 where a result was left out.
    """
    # The cheap checks first: loading and encoding take minutes.
    files = {"--json": json_file, "--markdown": markdown_file, "--figure": figure_file}
    reads = [Read("model", model, MODEL_FILES) for model in models]
    if settings.get("sts_dir") is not None:
        reads.append(Read("--sts-dir", settings["sts_dir"], STS_FOLDERS))
    reads += [Read("--data", path) for path in settings.get("data", ())]
    if settings.get("data_corpus") is not None:
        reads.append(Read("--data-corpus", settings["data_corpus"]))
    check_outputs(files, reads)
    if figure_file is not None:
        check_suffix("--figure", figure_file)
    results = evaluate(models, **settings)
    print(report(results, details=False))
    write_results(results, report(results), lambda path: draw_evaluation(results, path), files)
    return 2 if results["errors"] else 0
