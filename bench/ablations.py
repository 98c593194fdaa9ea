"""Does ClusterNS beat SimCSE on a small encoder, and which part of it matters? Over several seeds.

    python bench/ablations.py --data ../shared/data --output runs/ablations [--seeds 5] [--layers 2]
    python bench/ablations.py … --search     learning rate, then σ, K, γ, λ, margins, on STS-B dev alone

Each run trains on Wikipedia sentences from the first layers of a small pretrained encoder, keeps the best
checkpoint by STS-B dev, and scores that on the seven test sets. A run that has its result is not run again:
start the command anew and it goes on where it stopped, and more seeds join the old ones. Started twice at
once it shares the runs out, which on few cores is the faster way (OMP_NUM_THREADS=1). Ends with every run as
CSV, a table (mean ± standard deviation over seeds, paired t-test against SimCSE), and a figure; a search with
its runs as CSV, the best settings first.

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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from report import machine, new_figure, save_figure, write, write_csv, write_json
from scipy.stats import ttest_rel
from torch import Tensor
from tqdm import tqdm

from clusterns import ClusterNSLoss
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.sts_scores import evaluate_sts
from clusterns.files import holding
from clusterns.objective.problem import Clusters
from clusterns.train import train
from clusterns.training.config import TrainConfig

SEARCH_SEED = 1000
BASELINE = "SimCSE"
Choice = tuple[type[ClusterNSLoss], dict[str, Any]]
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


# The published BERT-base row but for K, which must fit a small batch.
PUBLISHED: dict[str, Any] = {"num_clusters": 32, "bml_weight": 1e-3, "bml_alpha": 0.0, "bml_beta": 0.3}
# The best on dev of --search, in place of those.
TUNED: dict[str, Any] = {"start_cosine": 0.9, "num_clusters": 8}
VARIANTS: dict[str, Choice] = {
    "SimCSE": (ClusterNSLoss, {"num_clusters": 0}),
    "ClusterNS": (ClusterNSLoss, TUNED),
    "published settings": (ClusterNSLoss, {}),
    "no BML": (ClusterNSLoss, TUNED | {"bml_weight": 0.0}),
    "no hard negatives": (ClusterNSLoss, TUNED | {"hard_negatives": False}),
    "nearest centroid": (NearestAsHardNegative, TUNED),
    "random clusters": (RandomClusters, TUNED),
    "exclude, not BML": (ClusterNSLoss, TUNED | {"false_negatives": "exclude"}),
    "mean update": (ClusterNSLoss, TUNED | {"centroid_update": "mean"}),
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
    loss: type[ClusterNSLoss], settings: dict[str, Any], seed: int, folder: Path, wanted: argparse.Namespace
) -> None:
    """Make a run, unless there is its result already or another process is at it.

    Train, score, keep the figures and the log, drop the weights.
    """
    file = folder / "result.json"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError), holding(folder / ".lock"):
        if not file.is_file():
            began = time.perf_counter()
            result = trained(loss, settings, seed, folder, wanted)
            if not wanted.search:
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
    loss: type[ClusterNSLoss], settings: dict[str, Any], seed: int, folder: Path, wanted: argparse.Namespace
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
    if loss is not ClusterNSLoss:
        given["backend"] = "torch"  # the fused kernels assign on their own

    class Config(TrainConfig):
        loss_class: ClassVar[type[ClusterNSLoss]] = loss

    # Without the training's own lines and bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        scores = train(Config.from_settings(given))
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
    encoder = SentenceEncoder.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    encoder.encode = partial(encoder.encode, dtype=torch.bfloat16)
    return evaluate_sts(encoder, sts_dir, batch_size=128, progress=False)


def found_in(folder: Path, names: Iterable[str]) -> Found:
    """What runs there are, by variant or settings and by seed."""
    found: Found = {name: {} for name in names}
    for name in found:
        runs = [read(file) for file in (folder / slug(name)).glob("*/result.json")]
        found[name] = {run["seed"]: run for run in sorted(runs, key=lambda run: run["seed"])}
    return {name: runs for name, runs in found.items() if runs}


def make_runs(
    wanted: argparse.Namespace,
    folder: Path,
    choices: dict[str, Choice],
    runs: Iterable[tuple[int, str]],
    write: Callable[[Found, argparse.Namespace], None],
) -> None:
    """Make runs one after the other, and write the tables after each."""
    with tqdm(list(runs), unit="run") as bar:
        for seed, name in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            one_run(*choices[name], seed, folder / slug(name) / str(seed), wanted)
            if found := found_in(folder, choices):  # those that another process made meanwhile, too
                write(found, wanted)


def compare(wanted: argparse.Namespace) -> None:
    """All variants, seed after seed, so that an interruption leaves whole seeds."""
    choices = {name: VARIANTS[name] for name in wanted.variants or VARIANTS}
    runs = itertools.product(range(1, wanted.seeds + 1), choices)
    make_runs(wanted, wanted.output, choices, runs, write_comparison)
    if (wanted.output / "comparison.md").is_file():
        print((wanted.output / "comparison.md").read_text(encoding="utf-8"))


def search(wanted: argparse.Namespace) -> None:
    """Settings one at a time, on dev; with --best those that did best with the first seed, and one SimCSE."""
    choices: dict[str, Choice] = {
        f"SimCSE, learning rate {rate}": (ClusterNSLoss, {"num_clusters": 0, "learning_rate": rate})
        for rate in LEARNING_RATES
    }
    for settings in SEARCH:
        if settings.get("num_clusters", 0) <= wanted.batch:  # a batch seeds them
            what = ", ".join(f"{name} {value}" for name, value in settings.items())
            choices[f"ClusterNS, {what or 'published settings'}"] = ClusterNSLoss, settings
    folder, tried = wanted.output / "search", list(choices)
    if wanted.best:
        best = ranked(found_in(folder, choices))
        tried = best[: wanted.best] + [name for name in best if name.startswith(BASELINE)][:1]
    seeds = range(SEARCH_SEED, SEARCH_SEED + wanted.seeds)
    make_runs(wanted, folder, choices, itertools.product(seeds, tried), write_search)


def ranked(found: Found) -> list[str]:
    """Settings by dev with the first seed, which all have."""
    return sorted(found, key=lambda name: -next(iter(found[name].values()))["dev"])


# --- tables and figure -------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean ± standard deviation of a sample."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def figure_of(result: dict[str, Any], name: str) -> float:
    """STS-B dev, or a test figure."""
    return result["dev"] if name == "dev" else result["test"][name]


def difference(found: Found, name: str, figure: str) -> str:
    """Mean difference to the baseline over the seeds of both, and p of the paired t-test."""
    seeds = [seed for seed in found[name] if seed in found.get(BASELINE, {})]
    if not seeds or name == BASELINE:
        return ""
    mine, base = ([figure_of(found[each][seed], figure) for seed in seeds] for each in (name, BASELINE))
    p = float(ttest_rel(mine, base).pvalue) if len(seeds) > 1 else math.nan
    return f"{statistics.fmean(mine) - statistics.fmean(base):+.2f} ({p:.3f})"


def rows_of(found: Found, names: Iterable[str], column: str) -> list[dict[str, Any]]:
    """A row a run, its name in that column."""
    return [
        {
            **run["machine"],
            **run.get("test", {}),
            column: name,
            "seed": seed,
            "dev": run["dev"],
            "clustering_started": next(iter(run["clustering_started"]), ""),
            "seconds": round(run["seconds"], 1),
        }
        for name in names
        for seed, run in found[name].items()
    ]


def write_search(found: Found, wanted: argparse.Namespace) -> None:
    """search.csv of what there is so far, the best settings first."""
    columns = ["settings", "seed", "dev", "clustering_started"]
    write_csv(wanted.output / "search.csv", columns, rows_of(found, ranked(found), "settings"))


def write_comparison(found: Found, wanted: argparse.Namespace) -> None:
    """comparison.csv (a row a run), comparison.md and comparison.png of what there is so far."""
    sets = next(iter(next(iter(found.values())).values()))["test"]
    columns = ["variant", "seed", "dev", *sets, "clustering_started", "seconds", "commit", "cpu"]
    write_csv(wanted.output / "comparison.csv", columns, rows_of(found, found, "variant"))
    lines = [
        "| variant | seeds | STS-B dev | test avg | − SimCSE, dev (p) | − SimCSE, test avg (p) |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name, runs in found.items():
        cells = [spread([figure_of(run, each) for run in runs.values()]) for each in ("dev", "avg")]
        cells += [difference(found, name, each) for each in ("dev", "avg")]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    lines += ["", "Spearman × 100, mean ± standard deviation over seeds; p of a paired t-test.", ""]
    lines += ["This table was written by (commits of the runs: comparison.csv)", "", "```json"]
    origin = json.dumps(protocol(wanted) | machine())
    write(wanted.output / "comparison.md", "\n".join([*lines, origin, "```", ""]))
    draw(found, wanted.output / "comparison.png")


def draw(found: Found, file: Path) -> None:
    """A dot for each seed, lines between the runs of one seed, a bar for the mean."""
    figure, ((*axes,),) = new_figure(1, 2, (11, 4.5))
    for axis, name, title in zip(axes, ("dev", "avg"), ("STS-B dev", "seven test sets, mean"), strict=True):
        for seed in sorted({seed for runs in found.values() for seed in runs}):
            points = {x: runs[seed] for x, runs in enumerate(found.values()) if seed in runs}
            figures = [figure_of(run, name) for run in points.values()]
            axis.plot([*points], figures, "o-", lw=0.6, ms=4, alpha=0.6, label=f"seed {seed}")
        for x, runs in enumerate(found.values()):
            mean = statistics.fmean(figure_of(run, name) for run in runs.values())
            axis.plot([x - 0.3, x + 0.3], [mean, mean], color="black", lw=2)
        axis.set_xticks(range(len(found)), found, rotation=35, ha="right")
        axis.set_title(title)
        axis.set_ylabel("Spearman × 100")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, file)


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
