"""`clusterns train`: sentences in, a sentence encoder out.

The loop: two dropout views of each sentence, [CLS] through a head, `ClusterNSLoss`, AdamW with linear decay,
a dev score every few hundred steps, the best checkpoint kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from .cached import CachedClusterNSLoss
from .config import TrainConfig, to_dict
from .data import sentence_batches
from .encoder import SentenceEncoder
from .evaluation_tables import format_table
from .figure import draw_run
from .loss import ClusterNSLoss
from .task import Task, prepare_encoder, prepare_task

REAL_RUN = (
    "clusterns train --model bert-base-uncased --train-file wiki1m_for_simcse.txt --sts-dir STS_FOLDER "
    "--output-dir runs/bert-base --bml-weight 1e-3 --bml-alpha 0 --bml-beta 0.3"
)


def train(config: TrainConfig) -> dict[str, dict[str, float]]:
    """Run a whole training; returns the dev scores "before" and "after" (of the best checkpoint).

    Writes into `output_dir`: the encoder as transformers and sentence-transformers load it,
    `loss.safetensors` (the clustering state that belongs to it), `training.json` (settings and scores),
    `log.jsonl` and `training.png`.

    Raises `ValueError` or `OSError` with one line for bad settings, data, models and folders.
    """
    config.check()
    output = Path(config.output_dir)
    with claimed(output, config.overwrite_output_dir):
        set_seed(config.seed)
        device = choose_device(config.device)
        task = prepare_task(config)
        encoder = prepare_encoder(config, task).to(device)
        loss_fn = config.build_loss(encoder.embedding_dim).to(device)
        run = Run(config, output, task, encoder, loss_fn, device)
        run.loop()
        scores = {"before": run.first_scores, "after": run.best_scores}
        write_whole(
            output / "training.json",
            {"settings": to_dict(config), "scores": scores, "best_step": run.best_step},
        )
        draw_run(run.records, output / "training.png")
        report(config, output, scores, run)
    return scores


class Run:
    """State of the loop: model, optimiser, log and the best score so far."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        task: Task,
        encoder: SentenceEncoder,
        loss_fn: ClusterNSLoss,
        device: torch.device,
    ):
        self.config, self.output, self.task = config, output, task
        self.encoder, self.loss_fn, self.device = encoder, loss_fn, device
        self.total_steps = config.max_steps or config.epochs * len(self.batches(0))
        self.optimizer = torch.optim.AdamW(
            encoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, config.warmup_steps, self.total_steps)
        self.autocast_dtype = choose_precision(config.precision, device)
        self.records: list[dict] = []
        self.first_scores: dict[str, float] = {}
        self.best_scores: dict[str, float] = {}
        self.best_step = 0
        self.evaluations_without_gain = 0

    def loop(self) -> None:
        """Train to the last step or to the early stop."""
        (self.output / "log.jsonl").unlink(missing_ok=True)
        self.began = time.monotonic()
        self.judge(0)
        step = 0
        self.encoder.train()
        with tqdm(total=self.total_steps, desc="train", unit="step", smoothing=0.1) as bar:
            for step, inputs in enumerate(self.stream(), start=1):
                terms = self.step(inputs, bar, step)
                bar.update()
                if step % self.config.log_steps == 0 or step == self.total_steps:
                    self.log_terms(step, terms, bar)
                if step % self.config.eval_steps == 0 and step < self.total_steps and self.judge(step, bar):
                    break
        if step == self.total_steps:
            self.judge(step)
        if self.task.dev is None:
            self.save(step)

    def batches(self, epoch: int) -> DataLoader:
        """Tokenised batches of one epoch, in an order that seed and epoch decide."""
        texts: Sequence[Any] = self.task.texts
        return sentence_batches(
            texts,
            batch_size=self.config.batch_size,
            tokenize=self.tokenize_views,
            seed=self.config.seed,
            epoch=epoch,
        )

    def tokenize_views(self, texts: list) -> dict[str, Tensor]:
        """Token ids and mask (2B, T): the first views, then the second ones in the same order."""
        if isinstance(texts[0], tuple):
            first, second = zip(*texts, strict=True)
            return self.encoder.tokenize([*first, *second], max_length=self.config.max_length)
        inputs = self.encoder.tokenize(texts, max_length=self.config.max_length)
        return {name: torch.cat([value, value]) for name, value in inputs.items()}

    def stream(self) -> Iterator[dict[str, Tensor]]:
        """Batches on the device until the last step, epoch after epoch."""
        batches = (inputs for epoch in itertools.count() for inputs in self.batches(epoch))
        for inputs in itertools.islice(batches, self.total_steps):
            yield {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}

    def step(self, inputs: dict[str, Tensor], bar: tqdm, step: int) -> dict[str, Tensor]:
        """One optimiser step on both views (2B, T); returns the terms of the loss, on the device."""
        was_active = self.loss_fn.clustering_active
        loss = self.loss(inputs)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        terms = self.loss_fn.last
        if self.loss_fn.clustering_active and not was_active:
            cosine = float(terms["mean_cosine"])
            bar.write(
                f"step {step}: clustering starts with {self.loss_fn.num_clusters} centroids "
                f"(mean cosine {cosine:.3f} <= {self.config.start_cosine})"
            )
            self.log({"step": step, "event": "clustering starts", "mean_cosine": cosine})
        return terms

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """Loss of both views (2B, T); with --mini-batch-size by gradient caching."""
        if isinstance(self.loss_fn, CachedClusterNSLoss):
            first, second = ({name: value.chunk(2)[i] for name, value in inputs.items()} for i in (0, 1))
            return self.loss_fn(self.encode, first, second)
        anchors, positives = self.encode(inputs).chunk(2)  # (B, D) each
        return self.loss_fn(anchors, positives)

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Training embeddings (rows, D) of token ids and mask (rows, T)."""
        with self.autocast():
            return self.encoder(inputs, head=self.config.head == "train")

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 where the device computes in it."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def log_terms(self, step: int, terms: dict[str, Tensor], bar: tqdm) -> None:
        """Read the terms of one step from the device; stop where the loss is no number."""
        values = {name: float(value) for name, value in terms.items()}
        if not math.isfinite(values["loss"]):
            kept = f"the best model so far is in {self.output}" if self.best_step else "no model was saved"
            raise ValueError(f"step {step}: expected a finite loss, got {values['loss']}; {kept}")
        bar.set_postfix(loss=f"{values['loss']:.4f}", cosine=f"{values['mean_cosine']:.3f}")
        self.log({"step": step, **values, "learning_rate": self.schedule.get_last_lr()[0]})

    def log(self, record: dict) -> None:
        """Append one line to log.jsonl."""
        record = {**record, "seconds": round(time.monotonic() - self.began, 3)}
        self.records.append(record)
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def judge(self, step: int, bar: tqdm | None = None) -> bool:
        """Score the encoder on dev, keep it if it is the best so far; True when it is time to stop early."""
        if self.task.dev is None:
            return False
        scores = self.task.dev(self.encoder)
        name, score = next(iter(scores.items()))
        self.log({"step": step, "dev": scores})
        tqdm.write(f"step {step}: dev " + ", ".join(f"{key} {value:.2f}" for key, value in scores.items()))
        if step == 0:
            self.first_scores = self.best_scores = scores
            self.save(0)
            return False
        if score > self.best_scores[name]:
            self.best_scores, self.best_step, self.evaluations_without_gain = scores, step, 0
            self.save(step)
            return False
        self.evaluations_without_gain += 1
        stop = 0 < self.config.patience <= self.evaluations_without_gain
        if stop and bar is not None:
            bar.write(f"step {step}: {self.evaluations_without_gain} evaluations without a gain, stopping")
        return stop

    def save(self, step: int) -> None:
        """Keep the encoder and the clustering state that belongs to it."""
        state = {**self.loss_fn.state_dict(), "step": torch.tensor(step)}
        self.encoder.save(self.output, beside={"loss.safetensors": state})


def choose_device(name: str) -> torch.device:
    """The named device, or the fastest at hand."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device of this machine, got {name!r} ({error})") from None
    return device


def choose_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 for autocast, or None for float32."""
    if precision == "auto":
        supported = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        }
        precision = "bf16" if supported.get(device.type, lambda: False)() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


@contextlib.contextmanager
def claimed(output: Path, overwrite: bool) -> Iterator[None]:
    """Hold the output folder for one run; refuse one that is in use or not empty."""
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output-dir: expected a folder, got the file {output}")
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"--output-dir: expected a folder of its own, {output} is in use by a running training"
        ) from None
    try:
        if not overwrite and any(path.name != ".lock" for path in output.iterdir()):
            raise FileExistsError(
                f"--output-dir: expected a new or empty folder, {output} holds files; "
                "choose another or pass --overwrite-output-dir"
            )
        yield
    finally:
        lock.release()
        (output / ".lock").unlink(missing_ok=True)


def write_whole(path: Path, value: dict) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def report(config: TrainConfig, output: Path, scores: dict[str, dict[str, float]], run: Run) -> None:
    """What came out, and what to do next."""
    print()
    if run.task.dev is not None:
        print(format_table(scores))
        print(f"\nbest dev score at step {run.best_step} of {run.total_steps}")
    print(f"model, log and picture: {output} (log.jsonl, training.png)")
    if config.from_scratch:
        print(f"a real run, on the paper's sentences:\n  {REAL_RUN}")
