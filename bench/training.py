"""How fast is a training step as a whole, where does its time go, and what memory does it take?

    python bench/training.py [--layers 6 --hidden 384 --batch 64 --steps 12] [--output FILE]

Three questions, each on a BERT of random weights and the documentation strings of this machine:

    whole   `clusterns train` against the Trainer of sentence-transformers, with its own in-batch loss and
            with ours in it: sentences per second of the steady steps, runs taken in turn
    parts   data, encoder, loss and optimiser of one step; our loss and the published one on the same
            embeddings
    memory  peak of a step, above the model, at several batch sizes, each in a process of its own (Linux, or
            a CUDA device): our loss, our loss with the encoder in mini-batches, the published loss

Two dropout views of each sentence, [CLS], no head, float32 on a CPU and bfloat16 autocast on a GPU, the same
optimiser settings, the same tokenizer in the training process. On a CPU `clusterns train` encodes texts of
like length together; both trainers get the same batches of texts as they come.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import machine, write_json
from tqdm import tqdm
from training_step import LENGTH, LOSSES, Step, matrix_rate, write_model

HERE = Path(__file__).parent
WARM_UP = 3  # steps that do not count
MEMORY_CONTENDERS = ("clusterns", "clusterns, mini-batches of 64", "published")


def ours(folder: Path, sentences: Path, wanted: argparse.Namespace, output: Path) -> list[float]:
    """Seconds at which the steps of `clusterns train` ended."""
    from clusterns.train import train
    from clusterns.training.config import TrainConfig

    settings = {
        "model": str(folder),
        "train_file": str(sentences),
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "batch_size": wanted.batch,
        "max_steps": wanted.steps,
        "max_length": LENGTH,
        "num_clusters": wanted.clusters,
        "start_cosine": 1.0,  # clusters from the second step on, though of a random encoder
        "head": "none",
        "pooling": "cls",
        "log_steps": 1,
        "precision": "bf16" if wanted.device == "cuda" else "fp32",
        "device": wanted.device,
        "tensorboard": False,
    }
    train(TrainConfig.from_settings(settings))
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["seconds"] for record in map(json.loads, lines) if "loss" in record]


def theirs(
    folder: Path, sentences: Path, wanted: argparse.Namespace, output: Path, with_our_loss: bool
) -> list[float]:
    """Seconds at which the steps of sentence-transformers' Trainer ended."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from clusterns.sentence_transformers import ClusterNSLoss

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if wanted.device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    model = SentenceTransformer(str(folder), device=wanted.device)
    model.max_seq_length = LENGTH
    lines = sentences.read_text(encoding="utf-8").splitlines()
    columns = {"text": lines} if with_our_loss else {"text": lines, "again": lines}
    loss = (
        ClusterNSLoss(model, wanted.clusters, start_cosine=1.0)
        if with_our_loss
        else MultipleNegativesRankingLoss(model)
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=wanted.steps,
        per_device_train_batch_size=wanted.batch,
        learning_rate=5e-5,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=wanted.device == "cuda",
        use_cpu=wanted.device == "cpu",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[clock]
    ).train()
    return clock.ends


def sentences_per_second(ends: list[float], batch: int) -> float:
    """Of the steps after the warm-up; a median, as one slow step is the machine's."""
    return batch / statistics.median(b - a for a, b in itertools.pairwise(ends[WARM_UP:]))


def measure_whole(
    folder: Path, sentences: Path, wanted: argparse.Namespace, scratch: Path, rows: dict[str, dict[str, Any]]
) -> Iterator[None]:
    """Sentences per second of each trainer, and ours over theirs run by run."""
    runs: dict[str, Callable[[], list[float]]] = {
        "clusterns train": lambda: ours(folder, sentences, wanted, scratch / "ours"),
        "sentence-transformers, MultipleNegativesRankingLoss": lambda: theirs(
            folder, sentences, wanted, scratch / "theirs", False
        ),
        "sentence-transformers, clusterns loss": lambda: theirs(
            folder, sentences, wanted, scratch / "theirs-ours", True
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    first = rates["clusterns train"]
    for name, run in list(runs.items()) * wanted.rounds:
        try:
            rates[name].append(sentences_per_second(run(), wanted.batch))
        except ImportError as error:  # a GPU machine may lack what a trainer needs
            rows[name] = {"failed": f"not installed: {error}"}
        found = rates[name]
        if found and first:
            rows[name] = {
                "sentences_per_second": statistics.median(found),
                "ours_over_theirs": statistics.median(a / b for a, b in zip(first, found, strict=False)),
                "rounds": found,
                # Of the paper's 1M sentences, from this rate: not a run of that length.
                "extrapolated_epoch_minutes": 1e6 / statistics.median(found) / 60,
            }
        yield


def measure_parts(
    folder: Path, sentences: Path, wanted: argparse.Namespace, parts: dict[str, float]
) -> Iterator[None]:
    """Median seconds of each part of a step, and of the losses on the same embeddings."""
    step = Step(folder, sentences, wanted.batch, wanted.clusters, torch.device(wanted.device))
    rate = matrix_rate(step.device)
    found: dict[str, list[float]] = {}
    for number in tqdm(range(wanted.steps), desc="parts", unit="step"):
        took = step.timed()
        if number < WARM_UP:
            continue
        for name, seconds in took.items():
            found.setdefault(name, []).append(seconds)
            parts[name] = statistics.median(found[name])
        parts["encoder_share_of_matrix_rate"] = step.operations / parts["encoder"] / rate
        yield


def measure_memory(folder: Path, wanted: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Peak of a step above the model, MiB, or why there is none."""
    cases = list(itertools.product(wanted.memory_batches, MEMORY_CONTENDERS))
    for batch, contender in tqdm(cases, desc="memory", unit="run"):
        command = [sys.executable, str(HERE / "training_step.py"), str(folder), contender, str(batch)]
        done = subprocess.run([*command, wanted.device], capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"batch": batch, "contender": contender}
        if done.returncode == 0:
            row |= json.loads(done.stdout.splitlines()[-1])
        else:
            row["failed"] = (done.stderr.strip().splitlines() or [f"killed, status {done.returncode}"])[-1]
        rows.append(row)
        yield


def show(content: dict[str, Any]) -> None:
    """Print what was measured."""
    for name, row in content["whole"].items():
        if "failed" in row:
            print(f"{name:55} {row['failed']}")
            continue
        print(f"{name:55} {row['sentences_per_second']:8.1f} sentences/s  {row['ours_over_theirs']:.2f}x")
    parts = dict(content["parts"])
    if parts:
        share = parts.pop("encoder_share_of_matrix_rate")
        print(f"encoder: {share:.0%} of the matrix rate of this device, measured in this run")
        whole = sum(parts[name] for name in ("data", "encoder", "loss: clusterns", "optimiser"))
    for name, seconds in parts.items():
        print(f"{name:55} {1e3 * seconds:8.1f} ms  {seconds / whole:6.1%} of our step")
    for row in content["memory"]:
        peak = f"{row['peak_mib']:8.0f} MiB" if "peak_mib" in row else row["failed"]
        print(f"B={row['batch']:<6} {row['contender']:46} {peak}")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-batches", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--output", type=Path, help="JSON; default bench/results/training-DEVICE.json")
    wanted = parser.parse_args()
    if wanted.steps < WARM_UP + 3:
        parser.error(f"--steps: expected at least {WARM_UP + 3}, got {wanted.steps}")
    output = wanted.output or HERE / "results" / f"training-{wanted.device}.json"
    content: dict[str, Any] = {
        "machine": machine(gpu=True),
        "settings": {key: value for key, value in vars(wanted).items() if key != "output"},
        "losses_checked_at": LOSSES,
        "whole": {},
        "parts": {},
        "memory": [],
    }
    status = 0
    with tempfile.TemporaryDirectory(prefix="clusterns-") as name:
        scratch = Path(name)
        try:
            folder, sentences = write_model(scratch, wanted.layers, wanted.hidden)
            for _ in itertools.chain(  # after each figure all of them are on disk
                measure_whole(folder, sentences, wanted, scratch, content["whole"]),
                measure_parts(folder, sentences, wanted, content["parts"]),
                measure_memory(folder, wanted, content["memory"]),
            ):
                write_json(output, content)
        except KeyboardInterrupt:
            status = 1
            print("interrupted")
    write_json(output, content)
    show(content)
    print(f"written to {output}")
    return status


if __name__ == "__main__":
    sys.exit(main())
