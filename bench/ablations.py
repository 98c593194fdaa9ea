"""Does ClusterNS beat SimCSE on a small encoder, and which part of it matters? Over several seeds.

    python bench/ablations.py --data ../shared/data --output runs/ablations [--seeds 5] [--layers 2]
    python bench/ablations.py … --search --variants num_clusters=8 num_clusters=8,start_cosine=0.9

Each run is a `clusterns train` on Wikipedia sentences from the first layers of a small pretrained encoder; it
keeps the best checkpoint by STS-B dev, and scores that on the seven test sets. A run that has its result is
not run again: start the command anew and it goes on where it stopped, and more seeds join the old ones.
Started twice at once it shares the runs out, which on few cores is the faster way (OMP_NUM_THREADS=1). Ends
with every run as CSV, a table (mean ± standard deviation over seeds, paired t-test against SimCSE), and a
figure.

Nothing is chosen by a test set: `--search` sees STS-B dev only and trains with seeds that the comparison
does not use. The settings here were chosen so, the learning rate as the best of SimCSE, not of ClusterNS.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas  # comes with datasets
import torch
from report import machine, write, write_json
from torch import Tensor
from tqdm import tqdm

from clusterns import ClusterNSLoss
from clusterns.compare import draw_groups, metric, report
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.sts import SEVEN
from clusterns.evaluation.sts_scores import evaluate_sts
from clusterns.files import holding, replacing
from clusterns.objective.problem import Clusters
from clusterns.train import train
from clusterns.training.config import TrainConfig

SEARCH_SEED = 1000
TITLES = {"dev": "STS-B dev", "avg": "seven test sets, mean"}
Choice = tuple[type[ClusterNSLoss], dict[str, Any]]


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


def choice(name: str) -> Choice:
    """What a variant is: one of the list, or settings as "start_cosine=0.8,num_clusters=16"."""
    if name in VARIANTS:
        return VARIANTS[name]
    pairs = (each.partition("=") for each in name.split(","))
    try:
        return ClusterNSLoss, {key: json.loads(value) for key, _, value in pairs}
    except ValueError:
        expected = f"some of {', '.join(VARIANTS)}, or settings as num_clusters=8,bml_beta=0.5"
        raise SystemExit(f"--variants: expected {expected}, got {name}") from None


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
            result |= {"seconds": round(time.perf_counter() - began, 1), "machine": machine()}
            shutil.move(folder / "model" / "log.jsonl", folder / "log.jsonl")
            shutil.rmtree(folder / "model")
            write_json(file, result)
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))["protocol"]
        if found != protocol(wanted):
            raise SystemExit(f"--output: expected runs of {protocol(wanted)}, got {file} of {found}")


def protocol(wanted: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one table have in common."""
    return {name: getattr(wanted, name) for name in "layers batch steps eval_steps learning_rate".split()}


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[ ,=]+", "-", name).lower()


def trained(
    loss: type[ClusterNSLoss], settings: dict[str, Any], seed: int, folder: Path, wanted: argparse.Namespace
) -> dict[str, Any]:
    """Train into folder/model; what the training says."""
    # The fused kernels assign on their own.
    fused = torch.cuda.is_available() and loss is ClusterNSLoss
    given = {"model": str(wanted.model), "pooling": "cls", "head": "none", "seed": seed, "patience": 0}
    given |= {"train_file": str(wanted.data / "wiki_sentences.txt"), "sts_dir": str(wanted.data / "sts_raw")}
    given |= {"output_dir": str(folder / "model"), "overwrite_output_dir": True, "report_to": "none"}
    given |= {"batch_size": wanted.batch, "max_steps": wanted.steps, "eval_steps": wanted.eval_steps}
    given |= {"learning_rate": wanted.learning_rate, "backend": "auto" if fused else "torch"}
    given |= PUBLISHED | settings

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
        "clustering_started": next((r["step"] for r in records if r.get("event") == "clustering starts"), ""),
        "last": next(r for r in reversed(records) if "loss" in r),
    }


def seven_sets(model: Path, sts_dir: Path) -> dict[str, float]:
    """Spearman × 100 of each test set and their mean; bfloat16 autocast, as in training."""
    encoder = SentenceEncoder.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    encoder.encode = partial(encoder.encode, dtype=torch.bfloat16)
    return evaluate_sts(encoder, sts_dir, batch_size=128, progress=False)


# --- table and figure --------------------------------------------------------------------------------------


def runs_in(folder: Path, names: list[str]) -> pandas.DataFrame:
    """A row a run, by variant and then by seed; those that another process made meanwhile, too."""
    rows: list[dict[str, Any]] = []
    for name in names:
        runs = [json.loads(file.read_text("utf-8")) for file in (folder / slug(name)).glob("*/result.json")]
        runs.sort(key=lambda run: run["seed"])
        rows += [{"variant": name, **run.pop("machine"), **run.pop("test", {}), **run} for run in runs]
    return pandas.DataFrame(rows)


def write_tables(runs: pandas.DataFrame, wanted: argparse.Namespace) -> None:
    """CSV of the runs, Markdown and figure of what there is so far; the first variant is the baseline."""
    columns = ["variant", "seed", "dev", *SEVEN, "avg", "clustering_started", "seconds", "commit", "cpu"]
    columns = [name for name in columns if name in runs]
    write(wanted.table.with_suffix(".csv"), runs.to_csv(columns=columns, index=False))
    groups = {variant: rows.set_index("seed") for variant, rows in runs.groupby("variant", sort=False)}
    metrics = {
        title: metric({variant: rows[name].to_dict() for variant, rows in groups.items()})
        for name, title in TITLES.items()
        if name in runs
    }
    seeds = {variant: dict.fromkeys(rows.index) for variant, rows in groups.items()}
    lines = [report({"groups": seeds, "metrics": metrics, "differing": {}, "never_clustered": {}}), ""]
    lines += ["This table was written by (commits of the runs: in the CSV)", "", "```json"]
    origin = json.dumps(protocol(wanted) | machine())
    write(wanted.table.with_suffix(".md"), "\n".join([*lines, origin, "```", ""]))
    with replacing(wanted.table.with_suffix(".png")) as temporary:
        draw_groups(metrics, temporary)


# --- as a script -------------------------------------------------------------------------------------------


def main() -> int:
    """Run what is missing, seed after seed so that an interruption leaves whole seeds; tables after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with models, sentences, sts_raw")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="*", help="by name or by settings, default all that have names")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    wanted = parser.parse_args()
    if not (wanted.data / "wiki_sentences.txt").is_file():
        parser.error(f"--data: expected a folder with wiki_sentences.txt, got {wanted.data}")
    choices = {name: choice(name) for name in wanted.variants or VARIANTS}
    wanted.output.mkdir(parents=True, exist_ok=True)
    wanted.model = truncated(wanted.data, wanted.layers, wanted.output / f"start-{wanted.layers}")
    wanted.table = wanted.output / ("search" if wanted.search else "comparison")
    folder = wanted.output / "search" if wanted.search else wanted.output
    first = SEARCH_SEED if wanted.search else 1
    with tqdm(list(itertools.product(range(first, first + wanted.seeds), choices)), unit="run") as bar:
        for seed, name in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            one_run(*choices[name], seed, folder / slug(name) / str(seed), wanted)
            if not (runs := runs_in(folder, list(choices))).empty:
                write_tables(runs, wanted)
    if not runs.empty:
        print(wanted.table.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
