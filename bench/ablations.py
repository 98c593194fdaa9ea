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
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from report import machine, new_figure, save_figure, write, write_csv, write_json
from scipy.stats import ttest_rel
from torch import Tensor
from tqdm import tqdm

from clusterns import ClusterNSLoss
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.correlation import spearman
from clusterns.evaluation.sts import SEVEN, load_sts
from clusterns.evaluation.sts_scores import Vectors, sentences_of
from clusterns.files import holding
from clusterns.objective.problem import Clusters
from clusterns.train import train
from clusterns.training.config import TrainConfig

SEARCH_SEED = 1000
BASELINE = "SimCSE"
Found = dict[str, dict[int, dict[str, Any]]]


class NearestAsHardNegative(ClusterNSLoss):
    """The nearest centroid is the hard negative, not the runner-up."""

    def assign(self, points: Tensor, **options: Any) -> Clusters:
        """See `OnlineKMeans.assign`."""
        found = super().assign(points, **options)
        return found._replace(hard_ids=found.ids, runner_up_cosine=found.nearest_cosine)


class RandomClusters(ClusterNSLoss):
    """Sentences belong to clusters at random, and any other centroid is their hard negative."""

    def assign(self, points: Tensor, **options: Any) -> Clusters:
        """See `OnlineKMeans.assign`."""
        found = super().assign(points, **options)
        ids = torch.randint_like(found.ids, self.num_clusters)
        step = torch.randint_like(ids, 1, self.num_clusters)
        return found._replace(ids=ids, hard_ids=(ids + step) % self.num_clusters)


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
    """Make a run, unless there is its result already or another process is at it.

    Train, score, keep the figures and the log, drop the weights.
    """
    file = folder / "result.json"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError), holding(folder / ".lock"):
        if not file.is_file():
            began = time.perf_counter()
            result = trained(kind, settings, seed, folder, wanted)
            if with_test:
                result["test"] = seven_sets(folder / "model", wanted.data / "sts_raw")
            result |= {"seconds": time.perf_counter() - began, "machine": machine()}
            shutil.move(folder / "model" / "log.jsonl", folder / "log.jsonl")
            shutil.rmtree(folder / "model")
            write_json(file, result)
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


def trained(
    kind: type[TrainConfig], settings: dict[str, Any], seed: int, folder: Path, wanted: argparse.Namespace
) -> dict[str, Any]:
    """Train into folder/model; what the training says."""
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
    # Without the training's own lines and bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        scores = train(kind.from_settings(given))
    log = (folder / "model" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in log]
    return {
        "protocol": protocol(wanted),
        "settings": settings,
        "seed": seed,
        "dev": scores["after"]["spearman"],
        "dev_before": scores["before"]["spearman"],
        "clustering_started": [r["step"] for r in records if r.get("event") == "clustering starts"],
        "last": next(r for r in reversed(records) if "loss" in r),
    }


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
            found = {each: results(wanted.output / slug(each)) for each in names}
            if any(found.values()):
                write_comparison(found, wanted.output, described(wanted))
    if (wanted.output / "comparison.md").is_file():
        print((wanted.output / "comparison.md").read_text(encoding="utf-8"))


def results(folder: Path) -> dict[int, dict[str, Any]]:
    """What runs there are of a variant, or of some settings, by seed."""
    found = [read(file) for file in folder.glob("*/result.json")]
    return {result["seed"]: result for result in sorted(found, key=lambda result: result["seed"])}


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
    found = {name: list(results(search_folder(wanted, name)).values()) for name in names}
    return {name: runs for name, runs in found.items() if runs}


def best_so_far(wanted: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The settings that did best with the first seed of the search, and the best SimCSE."""
    found = searched(wanted, names)
    ranked = sorted(found, key=lambda name: -found[name][0]["dev"])
    return ranked[: wanted.best] + [name for name in ranked if name.startswith("SimCSE")][:1]


def described(wanted: argparse.Namespace) -> dict[str, Any]:
    """What the tables say of their origin."""
    return protocol(wanted) | machine()


# --- tables and figure -------------------------------------------------------------------------------------


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
    write(
        folder / "comparison.md",
        "\n".join([*lines, *with_origin("commits of the runs: comparison.csv", origin)]),
    )
    draw(found, names, folder / "comparison.png")


def draw(found: Found, names: list[str], file: Path) -> None:
    """A dot for each seed, lines between the runs of one seed, a bar for the mean."""
    figure, ((*axes,),) = new_figure(1, 2, (11, 4.5))
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
    save_figure(figure, file)


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
    lines += ["", "STS-B dev, Spearman × 100.", ""]
    write(folder / "search.md", "\n".join([*lines, *with_origin("commits of the runs: result.json", origin)]))


def with_origin(commits: str, origin: dict[str, Any]) -> list[str]:
    """Lines that say where a table is from."""
    return [f"This table was written by ({commits})", "", "```json", json.dumps(origin), "```", ""]


# --- as a script -------------------------------------------------------------------------------------------


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
