"""How fast is a training step as a whole, what does the loss add to it, and what memory does it take?

    python bench/run.py training [--layers 6 --dim 384 --batch 64 --steps 12] [--output DIR]

On a BERT of random weights and the documentation strings of this machine:

    trainer       `clusterns train` with and without clusters (SimCSE), the Trainer of sentence-transformers
                  with its own in-batch loss and with ours: sentences per second of the steady steps, and the
                  last loss; runs taken in turn
    step memory   peak of a step, above the model, at several batch sizes, each in a process of its own
                  (Linux, or a CUDA device): our loss, our loss with the encoder in mini-batches, and the
                  published loss

Two dropout views of each sentence, [CLS], no head, float32 on a CPU and bfloat16 autocast on a GPU, the same
optimiser settings, the same tokenizer in the training process. On a CPU `clusterns train` encodes texts of
like length together; both trainers get the same batches of texts as they come.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import our_loss, published_step
from measure import Clock, clock_of, columns, in_a_process, limit_memory
from report import OURS, Results, short
from torch import Tensor

from clusterns import CachedClusterNSLoss
from clusterns.corpus.docstrings import docstring_corpus
from clusterns.encoder import SentenceEncoder
from clusterns.training.scratch import small_bert, train_tokenizer

WARM_UP = 3  # steps that do not count
LENGTH = 32
MEMORY_CLUSTERS = 128
MEMORY_CONTENDERS = (OURS, f"{OURS}, mini-batches of 64", "published")


def write_model(folder: Path, layers: int, hidden: int) -> tuple[Path, Path]:
    """A BERT of random weights with a tokenizer, and a file of sentences."""
    sentences = docstring_corpus(20_000, seed=0).sentences
    text = folder / "sentences.txt"
    text.write_text("\n".join(" ".join(line.split()) for line in sentences) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(sentences)
    heads = max(1, hidden // 64)
    bert = small_bert(tokenizer, seed=0, hidden_size=hidden, layers=layers, heads=heads, dropout=0.1)
    SentenceEncoder(bert, tokenizer, pooling="cls", head="none").save(folder / "model")
    return folder / "model", text


# --- trainer ------------------------------------------------------------------------------------------------


def ours(
    model: Path, sentences: Path, wanted: argparse.Namespace, folder: Path, *, clusters: int
) -> tuple[list[float], float]:
    """Seconds at which the steps of `clusterns train` ended, and the last loss."""
    from clusterns.train import train
    from clusterns.training.config import TrainConfig

    settings: dict[str, Any] = {"model": str(model), "pooling": "cls", "head": "none", "report_to": "none"}
    settings |= {"output_dir": str(folder / "ours"), "overwrite_output_dir": True, "log_steps": 1}
    settings |= {"train_file": str(sentences), "max_length": LENGTH, "batch_size": wanted.batch[0]}
    settings |= {"precision": "bf16" if wanted.device == "cuda" else "fp32", "device": wanted.device}
    # Clusters from the second step on, though of a random encoder.
    settings |= {"num_clusters": clusters, "start_cosine": 1.0, "max_steps": wanted.steps}
    train(TrainConfig.from_settings(settings))
    lines = (folder / "ours" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    return [each["seconds"] for each in steps], steps[-1]["loss"]


def theirs(
    start: Path, sentences: Path, wanted: argparse.Namespace, folder: Path, *, with_our_loss: bool
) -> tuple[list[float], float]:
    """The same of sentence-transformers' Trainer, with its in-batch loss or ours."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from clusterns.sentence_transformers import ClusterNSLoss

    on_gpu, ends = wanted.device == "cuda", []

    class StepClock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    model = SentenceTransformer(str(start), device=wanted.device)
    model.max_seq_length = LENGTH
    lines = sentences.read_text(encoding="utf-8").splitlines()
    texts, loss = {"text": lines, "again": lines}, MultipleNegativesRankingLoss(model)
    if with_our_loss:
        texts, loss = {"text": lines}, ClusterNSLoss(model, num_clusters=wanted.clusters, start_cosine=1.0)
    settings = {"per_device_train_batch_size": wanted.batch[0], "max_steps": wanted.steps, "bf16": on_gpu}
    settings |= {"learning_rate": 5e-5, "weight_decay": 0.0, "max_grad_norm": 1.0, "use_cpu": not on_gpu}
    settings |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "report_to": "none"}
    arguments = Arguments(str(folder / "theirs"), **settings)
    data = {"train_dataset": Dataset.from_dict(texts)}
    trainer = SentenceTransformerTrainer(model, arguments, loss=loss, callbacks=[StepClock()], **data)
    trainer.train()
    return ends, [record["loss"] for record in trainer.state.log_history if "loss" in record][-1]


def row_of(kind: str, contender: str, wanted: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a row has besides its figures."""
    row = {"contender": contender, "kind": kind, "B": wanted.batch[0], "D": wanted.dim[0]}
    row |= {"K": wanted.clusters, "dtype": "bfloat16" if wanted.device == "cuda" else "float32"}
    return row | {"precision": "highest", "layers": wanted.layers, "status": "ok", "note": ""} | more


def measure_trainers(folder: Path, wanted: argparse.Namespace, results: Results) -> None:
    """Mean time of a steady step with each trainer, and theirs over ours, as medians over the rounds."""
    given = *write_model(folder, wanted.layers, wanted.dim[0]), wanted, folder
    runs: dict[str, Callable[[], tuple[list[float], float]]] = {
        "clusterns train": lambda: ours(*given, clusters=wanted.clusters),
        "clusterns train, SimCSE": lambda: ours(*given, clusters=0),
        "sentence-transformers, MultipleNegativesRankingLoss": lambda: theirs(*given, with_our_loss=False),
        "sentence-transformers, our loss": lambda: theirs(*given, with_our_loss=True),
    }
    rows = {name: row_of("trainer", name, wanted) for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in list(runs.items()) * wanted.rounds:
        row, took = rows[name], times[name]
        try:
            ends, row["loss"] = run()
            took.append(1e6 * (ends[-1] - ends[WARM_UP]) / len(ends[WARM_UP + 1 :]))
            first = times["clusterns train"]
            row |= columns("device_us", took)
            row |= columns("ratio_device", [a / b for a, b in zip(took, first, strict=False)])
            row |= {"sentences_per_second": 1e6 * wanted.batch[0] / row["device_us"], "rounds": len(took)}
        except ImportError as error:  # a GPU machine may lack what a trainer needs
            row |= {"status": "not installed", "note": short(error)}
        results.add(row)


# --- memory ------------------------------------------------------------------------------------------------


def peak_of_a_step(folder: Path, contender: str, batch: int, device: str) -> float:
    """MiB above the model: encoder, loss, backward. Fails where memory runs out."""
    torch.manual_seed(0)
    clock = clock_of(device)
    encoder = SentenceEncoder.from_pretrained(folder).to(clock.device).train()
    dim = encoder.embedding_dim
    centroids = torch.randn(MEMORY_CLUSTERS, dim, device=clock.device)
    ids = torch.randint(5, encoder.transformer.config.vocab_size, (batch, LENGTH), device=clock.device)
    loss_fn = our_loss(dim, MEMORY_CLUSTERS, centroids)
    if "mini-batches" in contender:
        loss_fn = CachedClusterNSLoss(dim, MEMORY_CLUSTERS, mini_batch_size=64).to(clock.device)
        loss_fn.centroids.copy_(centroids)
        loss_fn.initialized.fill_(True)

    def step(rows: Tensor) -> None:
        part = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        if isinstance(loss_fn, CachedClusterNSLoss):
            loss_fn(encoder, part, part).backward()
        elif contender == "published":
            published_step(encoder(part), encoder(part), centroids).backward()
        else:
            loss_fn(encoder(part), encoder(part)).backward()

    step(ids[:8])  # gradients' own place, libraries, thread pools
    if device == "cpu":
        limit_memory()
    return clock.peak_mib(lambda: step(ids))


def measure_memory(folder: Path, wanted: argparse.Namespace, results: Results) -> None:
    """Peak of a step above the model, MiB, or why there is none."""
    model, _ = write_model(folder, wanted.layers, wanted.dim[0])
    for batch, name in itertools.product(wanted.batch, MEMORY_CONTENDERS):
        row = row_of("step memory", name, wanted, B=batch, K=MEMORY_CLUSTERS)
        try:
            row["peak_mib"] = in_a_process(peak_of_a_step, model, name, batch, wanted.device)
        except Exception as error:
            full = isinstance(error, BrokenProcessPool) or "memory" in str(error)  # killed, or refused
            row |= {"status": "left out" if full else "failed", "note": short(error)}
        results.add(row)


def in_a_folder(measure: Callable[..., None], *given: Any) -> None:
    """Measure with a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="clusterns-") as folder:
        measure(Path(folder), *given)


def stages(wanted: argparse.Namespace, results: Results, _clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do."""
    if wanted.steps < WARM_UP + 3:
        raise SystemExit(f"--steps: expected at least {WARM_UP + 3}, got {wanted.steps}")
    return [
        ("trainers", partial(in_a_folder, measure_trainers, wanted, results)),
        ("memory of a step", partial(in_a_folder, measure_memory, wanted, results)),
    ]
