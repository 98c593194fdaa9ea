"""All figures of one model: STS with intervals, geometry, data of the user. An error leaves out one alone.

Beside the correlation over all pairs of an STS set stand those of its sub-sets and their mean, plain and
weighted by pairs, since some papers report those.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from ..corpus.judged import Judged
from .correlation import Floats, bootstrap_correlations, correlation, interval, pair_cosines
from .evaluated_model import EvaluatedModel
from .geometry import alignment, first_component_share, mean_cosine, uniformity
from .judging import judge
from .sts import SEVEN, SHORT_NAMES, StsSet, joined
from .sts_scores import ALIKE, GEOMETRY_SET, Vectors, sentences_of

Subsets = dict[str, StsSet]


class Problems:
    """Errors that leave out one result and let the others go on, a line each, also shown as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def leave_out(self, what: str, of: str = "") -> Iterator[None]:
        """Turn an error inside into one line about `what`, a result `of` some model."""
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, IndexError) as error:
            if os.environ.get("CLUSTERNS_TRACEBACK"):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            line = f"{of}{', ' if of else ''}{reason if reason.startswith(what) else f'{what}: {reason}'}"
            self.lines.append(line)
            tqdm.write(f"clusterns: error: {line}", file=sys.stderr)


class ModelFigures:
    """The figures of one model, and the bootstrap figures by set that comparisons need."""

    def __init__(
        self,
        model: EvaluatedModel,
        batch_size: int,
        dtype: torch.dtype | None,
        resamples: int,
        seed: int,
        problems: Problems,
        label: str,
        progress: bool,
    ) -> None:
        self.model, self.batch_size, self.dtype = model, batch_size, dtype
        self.resamples, self.seed = resamples, seed
        self.problems, self.label, self.progress = problems, label, progress
        self.drawn: dict[str, Floats] = {}

    def all_figures(
        self, sts: Mapping[str, Subsets], data: Mapping[str, Judged], kmeans: str, seeds: range
    ) -> dict[str, Any]:
        """STS, its average, geometry and the user's data, as the JSON holds them."""
        figures: dict[str, Any] = {"sts": {}, "avg": None, "geometry": {}, "data": {}}
        if sts:
            sentences = sentences_of(part for subsets in sts.values() for part in subsets.values())
            with self.problems.leave_out("STS", self.label):
                vectors = self._encode(sentences)
                figures |= self._sts_figures(sts, vectors)
        for name, judged in data.items():
            with self.problems.leave_out(name, self.label):
                figures["data"][name], self.drawn[name] = judge(
                    name,
                    judged,
                    self._encode(judged.sentences),
                    normalized=self.model.normalized,
                    resamples=self.resamples,
                    seed=self.seed,
                    algorithm=kmeans,
                    seeds=seeds,
                    progress=self.progress,
                )
        return figures

    def _encode(self, sentences: Iterable[str]) -> Vectors:
        settings = {} if self.dtype is None else {"dtype": self.dtype}
        return Vectors(self.model.encoder, sentences, self.batch_size, self.progress, **settings)

    def _sts_figures(self, sts: Mapping[str, Subsets], vectors: Vectors) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, subsets in sts.items():
            with self.problems.leave_out(name, self.label):
                figures[name] = self._set_figures(name, subsets, vectors)
        geometry: dict[str, Any] = {}
        name = SHORT_NAMES[GEOMETRY_SET]
        if name in figures:
            with self.problems.leave_out(f"geometry of {name}", self.label):
                geometry = self._geometry(joined(sts[name].values()), vectors)
        average = None
        seven = [SHORT_NAMES.get(name, name) for name in SEVEN]
        if all(name in figures for name in seven):
            value = sum(figures[name]["spearman"] for name in seven) / len(seven)
            average = self._with_interval("avg", value, [self.drawn[name] for name in seven])
        return {"sts": figures, "avg": average, "geometry": geometry}

    def _set_figures(self, name: str, subsets: Subsets, vectors: Vectors) -> dict[str, Any]:
        """One set: all pairs together; where it has sub-sets, each of them, their mean and weighted mean."""
        cosines = {
            part: pair_cosines(name, vectors.of(pairs.first), vectors.of(pairs.second))
            for part, pairs in subsets.items()
        }
        whole = [cosine for part in cosines.values() for cosine in part]
        figures = self._correlation(name, whole, joined(subsets.values()).scores)
        if len(subsets) < 2:
            return figures
        parts: dict[str, dict[str, Any]] = {}
        for part, pairs in subsets.items():
            with self.problems.leave_out(f"{name} {part}", self.label):
                parts[part] = self._correlation(f"{name} {part}", cosines[part], pairs.scores)
        figures["subsets"] = parts
        if len(parts) == len(subsets):
            sizes = [figure["pairs"] for figure in parts.values()]
            drawn = [self.drawn[f"{name} {part}"] for part in parts]
            for key, weights in (("mean", [1] * len(sizes)), ("weighted_mean", sizes)):
                shares = [weight / sum(weights) for weight in weights]
                value = math.fsum(s * f["spearman"] for s, f in zip(shares, parts.values(), strict=True))
                figures[key] = self._with_interval(f"{name} {key}", value, drawn, shares)
        return figures

    def _correlation(
        self, name: str, cosines: Sequence[float] | Floats, scores: list[float]
    ) -> dict[str, Any]:
        value = correlation(name, cosines, scores)
        self.drawn[name] = bootstrap_correlations(name, cosines, scores, self.resamples, self.seed)
        return {**self._with_interval(name, value, [self.drawn[name]]), "pairs": len(scores)}

    def _with_interval(
        self, name: str, value: float, drawn: Sequence[Floats], shares: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """A figure, and the interval of the (weighted) mean of independent bootstrap figures."""
        shares = shares or [1 / len(drawn)] * len(drawn)
        self.drawn[name] = sum(s * figures for s, figures in zip(shares, drawn, strict=True))  # type: ignore[assignment]
        bounds = interval(self.drawn[name])
        low, high = bounds if bounds is not None else (None, None)
        return {"spearman": value, "low": low, "high": high}

    def _geometry(self, pairs: StsSet, vectors: Vectors) -> dict[str, Any]:
        """Of the distinct sentences of STS-B dev; alignment of its pairs scored above 4, or None."""
        rows = vectors.of(list(dict.fromkeys(sentences_of([pairs]))))
        alike = torch.tensor(pairs.scores) > ALIKE
        first, second = (vectors.of(side)[alike] for side in pairs[:2])
        return {
            "sentences": len(rows),
            "alike_pairs": len(first),
            "alignment": alignment(first, second) if len(first) else None,
            "uniformity": uniformity(rows),
            "mean_cosine": mean_cosine(rows),
            "first_component_share": first_component_share(rows),
        }
