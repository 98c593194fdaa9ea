"""Does clustering help, and which part or rule of it? Variants of the loss × seeds, in the time there is.

    python bench/ablations.py --data ../shared/data --output runs/wiki [--minutes 60] [--seeds 10]
    python bench/ablations.py … --search --variants SimCSE rules ClusterNS,start_cosine=0.8

Each run is the loop of `clusterns train`, in this process: encoder, sentences and judged sets are loaded
once, the best weights stay in memory, and a run costs its steps and evaluations. It keeps the best checkpoint
by dev, and scores that on the test sets. All variants have the first seed, then the second. A run that has
its result is not run again: start the command anew and it goes on where it stopped. `--minutes` begins no run
that would end later. Ends with every run as CSV, a table (mean ± standard deviation over seeds, paired tests
against the first variant, the difference that so many seeds can show), and a figure.

Nothing is chosen by a test set: `--search` sees dev only, and trains with seeds that the comparison does not
use. DATA is a folder with models, wiki_sentences.txt, snli_triplets.csv, sts_raw and clustering.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from report import machine, write, write_csv, write_json
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar
from variants import GROUPS, PUBLISHED, Variant, chosen

from clusterns import ClusterNSLoss
from clusterns.compare import draw_groups, metric, report
from clusterns.corpus.judged import LabelledTexts
from clusterns.corpus.judged_files import load_judged
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.judging import dev_scores
from clusterns.evaluation.sts_scores import evaluate_sts
from clusterns.files import holding, replacing
from clusterns.train import Run
from clusterns.training.config import TrainConfig
from clusterns.training.devices import choose_device
from clusterns.training.processes import Processes
from clusterns.training.run_folder import SUMMARY
from clusterns.training.task import Task, prepare_task

SEARCH_SEED = 1000
MOST_SEEDS = 1000
MODEL = "models/distilbert-base-cased-gec"
# What is trained on; short texts in halves, the other of which is for dev and test.
TEXTS = {"wiki": "wiki_sentences.txt", "snli": "snli_triplets.csv"}
SHORT = {name: f"clustering/{name}.tsv" for name in ("AgNews", "SearchSnippets", "StackOverflow")}
STS_TITLES = {"dev": "STS-B dev", "avg": "seven test sets, mean"}
SHORT_TITLES = {"dev": "dev accuracy", "accuracy": "test accuracy"}
COLUMNS = """best_step clustering_started mean_cosine nearest_cosine hard_negative_cosine centroids_cosine
    empty_clusters with_mates seconds commit cpu gpu""".split()
PROTOCOL = "text layers batch steps eval_steps learning_rate max_length".split()


# --- what all runs share -----------------------------------------------------------------------------------


class OnlyFirst(nn.Module):
    """A last block of DistilBERT that computes the first token alone, the one that [CLS] pooling reads."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """States of all tokens (rows, T, D) to that of the first (rows, 1, D)."""
        attention, first = self.block.attention, states[:, :1]
        inputs = ((attention.q_lin, first), (attention.k_lin, states), (attention.v_lin, states))
        heads = [layer(x).unflatten(2, (attention.n_heads, -1)).transpose(1, 2) for layer, x in inputs]
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        drops = attention.dropout.p if self.training else 0.0
        found = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=drops)
        found = attention.out_lin(found.transpose(1, 2).flatten(2))
        found = self.block.sa_layer_norm(found + first)
        return self.block.output_layer_norm(self.block.ffn(found) + found)


class TokenisedOnce:
    """A tokenizer that keeps the ids of each text it has seen."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(
        self, texts: list[str], *, max_length: int, padding: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Ids and masks, truncated to max_length: tensors padded on the right, or lists as they are."""
        new = [text for text in dict.fromkeys(texts) if (text, max_length) not in self.known]
        if new:
            ids = self.tokenizer(new, truncation=True, max_length=max_length)["input_ids"]
            self.known.update(zip([(text, max_length) for text in new], ids, strict=True))
        found = {"input_ids": [self.known[text, max_length] for text in texts]}
        found["attention_mask"] = [[1] * len(row) for row in found["input_ids"]]
        if not padding:
            return found
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        return {
            name: pad_sequence([*map(torch.tensor, rows)], batch_first=True, padding_value=fill[name])
            for name, rows in found.items()
        }


class Prepared(NamedTuple):
    """What every run begins with, and what judges its end."""

    task: Task
    encoder: SentenceEncoder
    start: dict[str, Tensor]
    at_start: dict[str, float]  # what dev says of it
    processes: Processes
    test: Callable[[Any], dict[str, float]]


def prepare(wanted: argparse.Namespace) -> Prepared:
    """Load everything once."""
    config, device = configured(wanted, Variant(ClusterNSLoss, {}), 0, Path()), choose_device("auto")
    test: Callable[[Any], dict[str, float]]
    if wanted.text in SHORT:
        name = Path(SHORT[wanted.text]).name
        judged = load_judged(wanted.data / SHORT[wanted.text], kind="labels")
        order = torch.randperm(len(judged.texts), generator=torch.Generator().manual_seed(0)).tolist()
        train, dev, held = (order[i::4] for i in (0, 2, 3))
        train += order[1::4]
        parts = [
            LabelledTexts([judged.texts[i] for i in part], [judged.labels[i] for i in part], judged.classes)
            for part in (dev, held)
        ]
        task = Task([(judged.texts[i],) for i in train], partial(dev_scores, name, parts[0]))
        test = partial(dev_scores, name, parts[1])
    else:
        task = prepare_task(config, lambda _: None)
        test = lambda encoder: evaluate_sts(encoder, wanted.data / "sts_raw", batch_size=128, progress=False)  # noqa: E731
    encoder = SentenceEncoder.from_pretrained(wanted.data / MODEL, pooling="cls", head="none")
    stack = encoder.transformer.transformer
    stack.layer = stack.layer[: wanted.layers]
    stack.layer[-1] = OnlyFirst(stack.layer[-1])
    encoder.transformer.config.n_layers = len(stack.layer)
    encoder.tokenizer = TokenisedOnce(encoder.tokenizer)
    encoder.to(device)
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    return Prepared(task, encoder, start, task.dev(encoder), Processes(0, 1, device), test)


def configured(wanted: argparse.Namespace, variant: Variant, seed: int, folder: Path) -> TrainConfig:
    """Settings of one run."""
    # The fused kernels assign on their own.
    fused = torch.cuda.is_available() and variant.loss is ClusterNSLoss
    given = {"model": str(wanted.data / MODEL), "pooling": "cls", "head": "none", "seed": seed, "patience": 0}
    given |= {"train_file": str(wanted.data / {**TEXTS, **SHORT}[wanted.text]), "report_to": "none"}
    given |= {"sts_dir": str(wanted.data / "sts_raw")} if wanted.text in TEXTS else {}
    given |= {"output_dir": str(folder), "num_workers": 0, "log_steps": 10}
    given |= {"batch_size": wanted.batch, "max_steps": wanted.steps, "eval_steps": wanted.eval_steps}
    given |= {"learning_rate": wanted.learning_rate, "max_length": wanted.max_length}
    given |= {"backend": "auto" if fused else "torch"}
    given |= {"num_clusters": wanted.batch // 2, **PUBLISHED, **variant.settings}

    class Config(TrainConfig):
        loss_class: ClassVar[type[ClusterNSLoss]] = variant.loss

    return Config.from_settings(given)


# --- one run -----------------------------------------------------------------------------------------------


class TimeIsUp(Exception):
    """The budget ended within a run, after so much of it."""


class Trial(Run):
    """The loop of `clusterns train`; its best weights stay in memory, and a deadline ends it.

    What the loss draws at random is not taken from the stream of the encoder's dropout masks: all variants
    have those of their seed, and differ by what the loss does alone.
    """

    deadline = math.inf  # by time.time()
    best: dict[str, Tensor]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        forward, devices = self.loss_fn.forward, [self.device] if self.device.type == "cuda" else []

        def forked(*views: Tensor) -> Tensor:
            with torch.random.fork_rng(devices):
                return forward(*views)

        if getattr(self.loss_fn, "shares_masks", True):
            self.loss_fn.__dict__["forward"] = forked

    def save(self) -> None:
        """Keep the best weights."""
        self.best = {name: value.clone() for name, value in self.encoder.state_dict().items()}

    def train_step(self, *, watched: bool) -> dict[str, Tensor]:
        """See `Run.train_step`."""
        if time.time() > self.deadline and self.step > 1:  # of one step it is known what a run takes
            raise TimeIsUp((self.step - 1) / self.total_steps)
        return super().train_step(watched=watched)


def one_run(
    prepared: Prepared, wanted: argparse.Namespace, variant: Variant, seed: int, folder: Path, deadline: float
) -> dict[str, Any]:
    """Train and score; what there is to say of it. The log is in the folder."""
    began, encoder = time.perf_counter(), prepared.encoder
    encoder.load_state_dict(prepared.start)
    config = configured(wanted, variant, seed, folder)
    set_seed(seed)
    known = iter([prepared.at_start])
    task = replace(prepared.task, dev=lambda encoder: next(known, None) or prepared.task.dev(encoder))
    result: dict[str, Any] = {"protocol": protocol(wanted), "seed": seed}
    # Without the training's own lines and bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = Trial(config, folder, task, encoder, prepared.processes, None)
        run.deadline = deadline
        run.begin(None)
        try:
            run.loop()
        except ValueError as error:  # of a rule that trains to no number; the others go on
            return {**result, "failed": str(error)}
        finally:
            run.data.close()
            run.journal.close()
            (folder / SUMMARY).unlink()
    records = run.journal.records
    started = [r["step"] for r in records if r.get("event") == "clustering starts"]
    result |= {"dev": next(iter(run.best_scores.values())), "best_step": run.best_step}
    result |= {"clustering_started": started[0] if started else None}
    result["last"] = next(record for record in reversed(records) if "loss" in record)
    if not wanted.search:
        encoder.load_state_dict(run.best)
        half = partial(encoder.encode, dtype=run.precision.dtype)  # as in training
        encoder.__dict__["encode"] = half
        try:
            result["test"] = prepared.test(encoder)
        finally:
            del encoder.__dict__["encode"]
    return {**result, "seconds": round(time.perf_counter() - began, 1), "machine": machine()}


def protocol(wanted: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one table have in common."""
    return {name: getattr(wanted, name) for name in PROTOCOL}


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[ ,=]+", "-", name).lower()


def planned(wanted: argparse.Namespace) -> Iterator[tuple[int, str, Path]]:
    """Seed, variant and folder of each run, in order: an interruption leaves whole seeds."""
    first, count = SEARCH_SEED if wanted.search else 1, wanted.seeds or (MOST_SEEDS if wanted.minutes else 5)
    for seed, name in itertools.product(range(first, first + count), chosen(wanted.variants)):
        yield seed, name, folder_of(wanted) / slug(name) / str(seed)


def folder_of(wanted: argparse.Namespace) -> Path:
    """Where the runs are."""
    return wanted.output / "search" if wanted.search else wanted.output


def work(_: int, wanted: argparse.Namespace, deadline: float) -> None:
    """One of the processes that share the runs out: make those that nobody has made or is at."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // wanted.processes))
    disable_progress_bar()
    variants, prepared, longest = chosen(wanted.variants), None, 0.0
    for seed, name, folder in planned(wanted):
        file = folder / "result.json"
        if file.is_file():
            continue
        if longest and time.time() + longest > deadline:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(BlockingIOError), holding(folder / ".lock"):
            if file.is_file():
                continue
            prepared = prepared or prepare(wanted)
            began = time.time()
            try:
                result = one_run(prepared, wanted, variants[name], seed, folder, deadline)
            except TimeIsUp as error:
                if not longest:
                    needed = (time.time() - began) / error.args[0] / 60
                    raise SystemExit(
                        f"--minutes: expected at least {math.ceil(needed) + 1} for one such run here, "
                        f"got {wanted.minutes:g}"
                    ) from None
                tqdm.write(f"the time is up within {name}, seed {seed}, which is not kept", sys.stderr)
                return
            write_json(file, result)
            longest = max(longest, 1.05 * (time.time() - began))


# --- table and figure --------------------------------------------------------------------------------------


def results_of(wanted: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs there are, by variant and then by seed; those of other settings are refused with one line."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in chosen(wanted.variants):
        files = (folder_of(wanted) / slug(name)).glob("*/result.json")
        runs = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]
        for file, run in runs:
            if run["protocol"] != protocol(wanted):
                raise SystemExit(
                    f"--output: expected runs of {protocol(wanted)}, got {file} of {run['protocol']}"
                )
        if runs:
            found[name] = sorted((run for _, run in runs), key=lambda run: run["seed"])
    return found


def write_tables(found: dict[str, list[dict[str, Any]]], wanted: argparse.Namespace) -> None:
    """CSV of the runs, Markdown and figure of what there is so far; the first variant is the baseline."""
    rows = [
        {"variant": name, **run["last"], **run["machine"], **run.get("test", {}), **run}
        for name, runs in found.items()
        for run in runs
        if "failed" not in run
    ]
    if not rows:
        return
    path = wanted.output / ("search" if wanted.search else "comparison")
    tests = list(dict.fromkeys(key for row in rows for key in row.get("test", {})))
    write_csv(path.with_suffix(".csv"), ["variant", "seed", "dev", *tests, *COLUMNS], rows)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    metrics = {
        title: metric({n: {row["seed"]: row[key] for row in rows if row["variant"] == n} for n in names})
        for key, title in (STS_TITLES if wanted.text in TEXTS else SHORT_TITLES).items()
        if key in rows[0]
    }
    seeds = {n: of["seeds"] for n, of in next(iter(metrics.values()))["groups"].items()}
    lines = [report({"groups": seeds, "metrics": metrics, "differing": {}, "never_clustered": {}}), ""]
    lines += [
        f"{name}, seed {run['seed']}, has no figures: {run['failed']}\n"
        for name, runs in found.items()
        for run in runs
        if "failed" in run
    ]
    lines += ["This table was written by (commits of the runs: in the CSV)", "", "```json"]
    write(path.with_suffix(".md"), "\n".join([*lines, json.dumps(protocol(wanted) | machine()), "```", ""]))
    with replacing(path.with_suffix(".png")) as temporary:
        draw_groups(metrics, temporary)


# --- as a script -------------------------------------------------------------------------------------------


def checked(wanted: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse with one line what no run can begin with."""
    chosen(wanted.variants)
    needed = [f"{MODEL}/config.json", {**TEXTS, **SHORT}[wanted.text]]
    needed += ["sts_raw/STS"] if wanted.text in TEXTS else []
    for name in needed:
        if not (wanted.data / name).exists():
            parser.error(f"--data: expected a folder with {name}, got {wanted.data}")
    layers = json.loads((wanted.data / MODEL / "config.json").read_text(encoding="utf-8"))["n_layers"]
    for name, most in (("layers", layers), ("processes", math.inf), ("seeds", MOST_SEEDS)):
        if (given := getattr(wanted, name)) is not None and not 1 <= given <= most:
            parser.error(
                f"--{name}: expected 1{f' to {most}' if most < math.inf else ' or more'}, got {given}"
            )
    if wanted.minutes is not None and not wanted.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {wanted.minutes:g}")


def main() -> int:
    """Share out what is missing; tables after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with models, texts and judged sets")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--text", choices=[*TEXTS, *SHORT], default="wiki", help="what is trained on")
    parser.add_argument("--search", action="store_true", help="by dev alone, with seeds of its own")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--seeds", type=int, help="default 5, or as many as --minutes allow")
    parser.add_argument(
        "--variants", nargs="+", default=["parts"], help=f"names, with settings, or {', '.join(GROUPS)}"
    )
    on_gpu = torch.cuda.is_available()
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--processes", type=int, default=max(1, min(4, cores // 2)) if on_gpu else cores, help="side by side"
    )
    parser.add_argument("--layers", type=int, default=6 if on_gpu else 2)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 64)
    parser.add_argument("--steps", type=int, default=500 if on_gpu else 60)
    parser.add_argument("--eval-steps", type=int, default=125 if on_gpu else 20)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=32)
    wanted = parser.parse_args()
    checked(wanted, parser)
    deadline = time.time() + 60 * (wanted.minutes or math.inf)
    found = results_of(wanted)
    wanted.output.mkdir(parents=True, exist_ok=True)
    total, ended = len(list(planned(wanted))) if wanted.seeds or not wanted.minutes else None, False
    context = torch.multiprocessing.spawn(work, (wanted, deadline), nprocs=wanted.processes, join=False)
    with tqdm(total=total, unit="run") as bar:
        while not ended:
            try:
                ended = context.join(timeout=1)
            except torch.multiprocessing.ProcessExitedException:  # it has said why
                return 1
            count, found = bar.n, results_of(wanted)
            bar.update(sum(map(len, found.values())) - count)
            if bar.n > count:
                write_tables(found, wanted)
    path = wanted.output / ("search.md" if wanted.search else "comparison.md")
    if not found:
        return 1
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
