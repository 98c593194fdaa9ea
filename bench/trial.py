"""One run of bench/ablations.py: the loop of `clusterns train` over what is loaded once for all runs."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from report import machine
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed
from variants import PUBLISHED, Variant

from clusterns import ClusterNSLoss
from clusterns.corpus.judged import LabelledTexts
from clusterns.corpus.judged_files import load_judged
from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.judging import dev_scores
from clusterns.evaluation.sts_scores import evaluate_sts
from clusterns.train import Run
from clusterns.training.config import TrainConfig
from clusterns.training.devices import choose_device, explained_errors
from clusterns.training.processes import Processes
from clusterns.training.run_folder import SUMMARY
from clusterns.training.task import Task, prepare_task

MODEL = "models/distilbert-base-cased-gec"
# What is trained on; short texts in halves, the other of which is for dev and test.
TEXTS = {"wiki": "wiki_sentences.txt", "snli": "snli_triplets.csv"}
SHORT = {name: f"clustering/{name}.tsv" for name in ("AgNews", "SearchSnippets", "StackOverflow")}
PROTOCOL = "text layers batch steps eval_steps learning_rate max_length".split()


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
    machine: dict[str, object]


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
    return Prepared(task, encoder, start, task.dev(encoder), Processes(0, 1, device), test, machine())


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

    def left(self) -> str:
        """See `Run.left`."""
        return "no model is kept"

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
    result: dict[str, Any] = {"protocol": protocol(wanted), "seed": seed, "settings": varied(variant)}
    # Without the training's own lines and bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = Trial(config, folder, task, encoder, prepared.processes, None)
        run.deadline = deadline
        run.begin(None)
        try:
            with explained_errors(config, lambda: f"step {run.step}"):
                run.loop()
        except ValueError as error:
            if "finite" not in str(error):
                raise
            # A rule that trains to no number; the others go on.
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
        # In the precision of the training.
        result["test"] = prepared.test(
            SimpleNamespace(encode=partial(encoder.encode, dtype=run.precision.dtype))
        )
    return {**result, "seconds": round(time.perf_counter() - began, 1), "machine": prepared.machine}


def varied(variant: Variant) -> dict[str, Any]:
    """What tells the runs of a variant from others of its name: settings, those of its rule, and the rule."""
    own = vars(variant.loss) if variant.loss is not ClusterNSLoss else {}
    own = {name: own[name] for name in own if name[0] != "_" and isinstance(own[name], (int, float))}
    return {**PUBLISHED, **variant.settings, **own, "rule": variant.loss.__name__}


def protocol(wanted: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one table have in common."""
    return {name: getattr(wanted, name) for name in PROTOCOL}
