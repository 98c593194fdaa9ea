"""Does ClusterNS beat SimCSE on a small encoder, and which part of it matters? Over several seeds.

    python bench/ablations.py --data ../shared/data --output runs/ablations [--seeds 5] [--layers 2]
    python bench/ablations.py … --search     learning rate, then σ, K, γ, λ, margins, on STS-B dev alone

Each run trains on Wikipedia sentences from the first layers of a small pretrained encoder, keeps the best
checkpoint by STS-B dev, and scores that on the seven test sets. A run that has its result is not run again:
start the command anew and it goes on where it stopped, and more seeds join the old ones. Started twice at
once it shares the runs out, which on few cores is the faster way (OMP_NUM_THREADS=1). Ends with a table
(mean ± standard deviation over seeds, paired t-test against SimCSE), as CSV and Markdown, and a figure.

Nothing is chosen by a test set: `--search` sees STS-B dev only and trains with seeds that the comparison
does not use. The learning rate is the best of SimCSE, not of ClusterNS.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from ablation_tables import write_comparison, write_search
from machine import machine, write_json
from torch import Tensor
from tqdm import tqdm

from clusterns import ClusterNSLoss
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.correlation import spearman
from clusterns.evaluation.sts import SEVEN, load_sts
from clusterns.evaluation.sts_scores import Vectors, sentences_of
from clusterns.files import holding
from clusterns.functional import NearestCentroids
from clusterns.train import train
from clusterns.training.config import TrainConfig

SEARCH_SEED = 1000


class NearestAsHardNegative(ClusterNSLoss):
    """The nearest centroid is the hard negative, not the runner-up."""

    def assign(self, points: Tensor, **options: Any) -> tuple[NearestCentroids, Tensor | None]:
        """See `OnlineKMeans.assign`."""
        found, cosines = super().assign(points, **options)
        return found._replace(runner_up=found.nearest, runner_up_cosine=found.nearest_cosine), cosines


class RandomClusters(ClusterNSLoss):
    """Sentences belong to clusters at random, and any other centroid is their hard negative."""

    def assign(self, points: Tensor, **options: Any) -> tuple[NearestCentroids, Tensor | None]:
        """See `OnlineKMeans.assign`."""
        found, cosines = super().assign(points, **options)
        nearest = torch.randint_like(found.nearest, self.num_clusters)
        step = torch.randint_like(nearest, 1, self.num_clusters)
        return found._replace(nearest=nearest, runner_up=(nearest + step) % self.num_clusters), cosines


class NearestConfig(TrainConfig):
    """Settings with another loss."""

    loss_class: ClassVar[type[ClusterNSLoss]] = NearestAsHardNegative


class RandomConfig(TrainConfig):
    """Settings with another loss."""

    loss_class: ClassVar[type[ClusterNSLoss]] = RandomClusters


# The published BERT-base row but for K, which must fit a small batch.
PUBLISHED: dict[str, Any] = {"num_clusters": 32, "bml_weight": 1e-3, "bml_alpha": 0.0, "bml_beta": 0.3}
# The best on dev of --search, in place of those.
TUNED: dict[str, Any] = {"start_cosine": 0.9, "num_clusters": 8}
VARIANTS: dict[str, tuple[type[TrainConfig], dict[str, Any]]] = {
    "SimCSE": (TrainConfig, {"num_clusters": 0}),
    "ClusterNS": (TrainConfig, TUNED),
    "published settings": (TrainConfig, {}),
    "no BML": (TrainConfig, TUNED | {"bml_weight": 0.0}),
    "no hard negatives": (TrainConfig, TUNED | {"hard_negatives": False}),
    "nearest centroid": (NearestConfig, TUNED),
    "random clusters": (RandomConfig, TUNED),
    "exclude, not BML": (TrainConfig, TUNED | {"false_negatives": "exclude"}),
    "mean update": (TrainConfig, TUNED | {"centroid_update": "mean"}),
}

# Learning rates of SimCSE; then σ; then, from the best σ, other settings of ClusterNS one at a time.
LEARNING_RATES = [2e-5, 5e-5, 1e-4]
START = {"start_cosine": 0.8}
SEARCH: list[dict[str, Any]] = [
    {},
    *({"start_cosine": value} for value in (0.2, 0.6, 0.8)),
    *(START | {"num_clusters": value} for value in (4, 8, 16, 64)),
    *(START | {"centroid_momentum": value} for value in (1e-4, 1e-2)),
    *(START | {"bml_weight": value} for value in (1e-2, 1e-1, 1.0)),
    START | {"bml_beta": 0.5},
    START | {"bml_alpha": 0.2},
    START | {"hard_negative_weight": 1.0},
    {"start_cosine": 0.9, "num_clusters": 8},
    {"start_cosine": 0.6, "num_clusters": 8},
]


def truncated(data: Path, layers: int, folder: Path) -> Path:
    """The first layers of the shared DistilBERT as a model of its own."""
    if not (folder / "config.json").is_file():
        encoder = SentenceEncoder.from_pretrained(
            data / "models/distilbert-base-cased-gec", pooling="cls", head="none"
        )
        blocks = encoder.transformer.transformer.layer
        encoder.transformer.transformer.layer = blocks[:layers]
        encoder.transformer.config.n_layers = layers
        encoder.save(folder)
    return folder


def one_run(
    kind: type[TrainConfig],
    settings: dict[str, Any],
    seed: int,
    folder: Path,
    wanted: argparse.Namespace,
    *,
    with_test: bool,
) -> None:
    """Make a run, unless there is its result already or another process is at it."""
    file = folder / "result.json"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError), holding(folder / ".lock"):
        if not file.is_file():
            run(kind, settings, seed, folder, wanted, with_test=with_test)
    if file.is_file() and (found := read(file)["protocol"]) != protocol(wanted):
        raise SystemExit(f"--output: expected runs of {protocol(wanted)}, got {file} of {found}")


def read(file: Path) -> dict[str, Any]:
    """A run's result."""
    return json.loads(file.read_text(encoding="utf-8"))


def protocol(wanted: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one table have in common."""
    return {name: getattr(wanted, name) for name in "layers batch steps eval_steps learning_rate".split()}


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(", ", "-").replace(" ", "-").lower()


def run(
    kind: type[TrainConfig],
    settings: dict[str, Any],
    seed: int,
    folder: Path,
    wanted: argparse.Namespace,
    *,
    with_test: bool,
) -> None:
    """Train, score, keep the figures and the log, drop the weights."""
    began = time.perf_counter()
    given = {
        "model": str(wanted.model),
        "train_file": str(wanted.data / "wiki_sentences.txt"),
        "sts_dir": str(wanted.data / "sts_raw"),
        "output_dir": str(folder / "model"),
        "overwrite_output_dir": True,
        "batch_size": wanted.batch,
        "max_steps": wanted.steps,
        "eval_steps": wanted.eval_steps,
        "patience": 0,
        "learning_rate": wanted.learning_rate,
        "pooling": "cls",
        "head": "none",
        "seed": seed,
        "backend": "torch" if not torch.cuda.is_available() else "auto",
        "tensorboard": False,
        **PUBLISHED,
        **settings,
    }
    if kind is not TrainConfig:
        given["backend"] = "torch"  # the fused kernels assign on their own
    with quiet():
        scores = train(kind.from_settings(given))
    log = (folder / "model" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in log]
    result = {
        "protocol": protocol(wanted),
        "settings": settings,
        "seed": seed,
        "dev": scores["after"]["spearman"],
        "dev_before": scores["before"]["spearman"],
        "clustering_started": [r["step"] for r in records if r.get("event") == "clustering starts"],
        "last": next(r for r in reversed(records) if "loss" in r),
    }
    if with_test:
        result["test"] = seven_sets(folder / "model", wanted.data / "sts_raw")
    result |= {"seconds": time.perf_counter() - began, "machine": machine(gpu=True)}
    shutil.copy(folder / "model" / "log.jsonl", folder / "log.jsonl")
    shutil.rmtree(folder / "model")
    write_json(folder / "result.json", result)


def seven_sets(model: Path, sts_dir: Path) -> dict[str, float]:
    """Spearman × 100 of each test set and their mean; bfloat16 autocast, as in training."""
    encoder = SentenceEncoder.from_pretrained(model)
    if torch.cuda.is_available():
        encoder = encoder.cuda()
    sets = {name: load_sts(sts_dir, name) for name in SEVEN}
    vectors = Vectors(encoder, sentences_of(sets.values()), 128, False, dtype=torch.bfloat16)
    found = {
        name: spearman(name, vectors.of(pairs.first), vectors.of(pairs.second), pairs.scores)
        for name, pairs in sets.items()
    }
    return found | {"avg": sum(found.values()) / len(found)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the training's own lines and bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def compare(wanted: argparse.Namespace) -> None:
    """All variants, seed after seed, so that an interruption leaves whole seeds."""
    names = wanted.variants or list(VARIANTS)
    seeds = range(1, wanted.seeds + 1)
    with tqdm(list(itertools.product(seeds, names)), desc="runs", unit="run") as bar:
        for seed, name in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            kind, settings = VARIANTS[name]
            one_run(kind, settings, seed, wanted.output / slug(name) / str(seed), wanted, with_test=True)
            # Those that another process made meanwhile, too.
            found = {each: results_by_seed(wanted.output / slug(each), seeds) for each in names}
            if any(found.values()):
                write_comparison(found, wanted.output, described(wanted))
    if (wanted.output / "comparison.md").is_file():
        print((wanted.output / "comparison.md").read_text(encoding="utf-8"))


def results_by_seed(folder: Path, seeds: Iterable[int]) -> dict[int, dict[str, Any]]:
    """What runs of a variant there are."""
    files = {seed: folder / str(seed) / "result.json" for seed in seeds}
    return {seed: read(file) for seed, file in files.items() if file.is_file()}


def search(wanted: argparse.Namespace) -> None:
    """Settings one at a time, on dev."""
    baseline = {"num_clusters": 0}
    every = {f"SimCSE, learning rate {rate}": baseline | {"learning_rate": rate} for rate in LEARNING_RATES}
    for settings in SEARCH:
        if settings.get("num_clusters", 0) > wanted.batch:
            continue  # a batch seeds them
        what = ", ".join(f"{name} {value}" for name, value in settings.items())
        every[f"ClusterNS, {what or 'published settings'}"] = settings
    tried = best_so_far(wanted, every) if wanted.best else list(every)
    with tqdm(list(itertools.product(range(wanted.seeds), tried)), desc="search", unit="run") as bar:
        for number, name in bar:
            bar.set_postfix_str(f"{name}, seed {SEARCH_SEED + number}")
            folder = search_folder(wanted, name) / str(number)
            one_run(TrainConfig, every[name], SEARCH_SEED + number, folder, wanted, with_test=False)
            write_search(searched(wanted, every), wanted.output, described(wanted))
    if (wanted.output / "search.md").is_file():
        print((wanted.output / "search.md").read_text(encoding="utf-8"))


def search_folder(wanted: argparse.Namespace, name: str) -> Path:
    """Where the runs of some settings are."""
    return wanted.output / "search" / slug(name)


def searched(wanted: argparse.Namespace, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """What runs of these settings there are, of whatever seeds."""
    found = {}
    for name in names:
        files = sorted(search_folder(wanted, name).glob("*/result.json"))
        if files:
            found[name] = [read(file) for file in files]
    return found


def best_so_far(wanted: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The settings that did best with the first seed of the search, and the best SimCSE."""
    found = searched(wanted, names)
    ranked = sorted(found, key=lambda name: -found[name][0]["dev"])
    return ranked[: wanted.best] + [name for name in ranked if name.startswith("SimCSE")][:1]


def described(wanted: argparse.Namespace) -> dict[str, Any]:
    """What the tables say of their origin."""
    return protocol(wanted) | machine(gpu=True)


def main() -> int:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with models, sentences, sts_raw")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--best", type=int, help="of a search with one seed: more seeds for so many settings")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    wanted = parser.parse_args()
    if not (wanted.data / "wiki_sentences.txt").is_file():
        parser.error(f"--data: expected a folder with wiki_sentences.txt, got {wanted.data}")
    wanted.output.mkdir(parents=True, exist_ok=True)
    wanted.model = truncated(wanted.data, wanted.layers, wanted.output / f"start-{wanted.layers}")
    began = time.perf_counter()
    (search if wanted.search else compare)(wanted)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
