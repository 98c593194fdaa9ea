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

A fourth is `python bench/run.py training`: what the loss adds to a step of BERT-base.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import eager_info_nce, our_loss, published_step
from measure import Clock, clock_of, in_a_process, limit_memory, spread
from report import RESULTS, Results, machine, short, write_json
from torch import Tensor, nn
from tqdm import tqdm

from clusterns import CachedClusterNSLoss, ClusterNSLoss
from clusterns.corpus.docstrings import docstring_corpus
from clusterns.encoder import SentenceEncoder
from clusterns.training.scratch import small_bert, train_tokenizer

WARM_UP = 3  # steps that do not count
LENGTH = 32
MEMORY_CLUSTERS = 128
MEMORY_CONTENDERS = ("clusterns", "clusterns, mini-batches of 64", "published")
LOSSES = "loss: clusterns", "loss: published"  # compared before they are timed


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


# --- whole -------------------------------------------------------------------------------------------------


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

    ends: list[float] = []

    class StepClock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if wanted.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    model = SentenceTransformer(str(folder), device=wanted.device)
    model.max_seq_length = LENGTH
    lines = sentences.read_text(encoding="utf-8").splitlines()
    columns, loss = {"text": lines, "again": lines}, MultipleNegativesRankingLoss(model)
    if with_our_loss:
        columns, loss = {"text": lines}, ClusterNSLoss(model, wanted.clusters, start_cosine=1.0)
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
    table = Dataset.from_dict(columns)
    SentenceTransformerTrainer(
        model, arguments, train_dataset=table, loss=loss, callbacks=[StepClock()]
    ).train()
    return ends


def sentences_per_second(ends: list[float], batch: int) -> float:
    """Of the steps after the warm-up; a median, as one slow step is the machine's."""
    return batch / statistics.median(b - a for a, b in itertools.pairwise(ends[WARM_UP:]))


def measure_whole(
    folder: Path, sentences: Path, wanted: argparse.Namespace, rows: dict[str, dict[str, Any]]
) -> Iterator[None]:
    """Sentences per second of each trainer, and ours over theirs run by run."""
    given = folder, sentences, wanted
    runs: dict[str, Callable[[], list[float]]] = {
        "clusterns train": lambda: ours(*given, folder / "ours"),
        "sentence-transformers, MultipleNegativesRankingLoss": lambda: theirs(*given, folder / "st", False),
        "sentence-transformers, clusterns loss": lambda: theirs(*given, folder / "st-ours", True),
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


# --- parts -------------------------------------------------------------------------------------------------


def differentiate(loss: Callable[..., Tensor], leaves: list[Tensor], *more: Any) -> Tensor:
    """Loss, 0-d, with gradients left in the leaves."""
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves, *more)
    value.backward()
    return value.detach()


def measure_parts(
    folder: Path, sentences: Path, wanted: argparse.Namespace, parts: dict[str, float]
) -> Iterator[None]:
    """Median seconds of each part of a step, and of the losses on the same embeddings."""
    clock = clock_of(wanted.device)
    encoder = SentenceEncoder.from_pretrained(folder).to(clock.device).train()
    tokenize, lines = encoder.view_tokenizer(max_length=LENGTH), sentences.read_text("utf-8").splitlines()
    loss_fn = ClusterNSLoss(encoder.embedding_dim, wanted.clusters, start_cosine=1.0).to(clock.device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    on_gpu = wanted.device == "cuda"
    rate = clock.matrix_rate(*(3 * [8192 if on_gpu else 2048]), torch.bfloat16 if on_gpu else torch.float32)
    found: dict[str, list[float]] = {}
    operations = 0.0  # of the encoder's matrix products in a step: forward, and twice that backward

    def count_operations(_module: nn.Module, _args: tuple, given: dict[str, Any]) -> None:
        nonlocal operations
        rows, tokens = given["input_ids"].shape
        layers = sum(p.numel() for p in encoder.transformer.encoder.parameters() if p.ndim == 2)
        config = encoder.transformer.config
        attention = 4 * config.num_hidden_layers * tokens**2 * config.hidden_size
        operations += 3.0 * rows * (2 * tokens * layers + attention)

    encoder.transformer.register_forward_pre_hook(count_operations, with_kwargs=True)

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        with torch.autocast(wanted.device, torch.bfloat16, enabled=on_gpu):
            return encoder(inputs)

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(number: int) -> dict[str, float]:
        """Seconds of each part."""
        took: dict[str, float] = {}

        def time_of(name: str, run: Callable[[], Any]) -> Any:
            answer: list[Any] = []
            took[name] = took.get(name, 0.0) + 1e-6 * clock.host_timer(lambda: answer.append(run()))(1)
            return answer[0]

        rows = [(lines[(number * wanted.batch + i) % len(lines)],) for i in range(wanted.batch)]
        inputs = time_of("data", lambda: {k: v.to(clock.device) for k, v in tokenize(rows).items()})
        embeddings = time_of("encoder", lambda: encode(inputs))
        leaves = [view.detach().requires_grad_() for view in embeddings.float().chunk(2)]
        if not loss_fn.clustering_active:  # the step that seeds is not like the others
            loss_fn(*leaves)
        centroids = loss_fn.centroids.clone()
        published = time_of(LOSSES[1], lambda: differentiate(published_step, leaves, centroids))
        mine = time_of(LOSSES[0], lambda: differentiate(loss_fn, leaves))
        torch.testing.assert_close(mine, published, rtol=1e-3, atol=1e-4)
        gradient = torch.cat([leaf.grad for leaf in leaves]).to(embeddings.dtype)
        time_of("encoder", lambda: embeddings.backward(gradient))
        time_of("optimiser", optimise)
        return took

    for number in tqdm(range(wanted.steps), desc="parts", unit="step"):
        operations = 0.0
        took = step(number)
        if number < WARM_UP:
            continue
        for name, seconds in took.items():
            found.setdefault(name, []).append(seconds)
            parts[name] = statistics.median(found[name])
        parts["encoder_share_of_matrix_rate"] = operations / parts["encoder"] / rate
        yield


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


def measure_memory(folder: Path, wanted: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Peak of a step above the model, MiB, or why there is none."""
    cases = list(itertools.product(wanted.memory_batches, MEMORY_CONTENDERS))
    for batch, name in tqdm(cases, desc="memory", unit="run"):
        row: dict[str, Any] = {"batch": batch, "contender": name}
        try:
            row["peak_mib"] = in_a_process(peak_of_a_step, folder, name, batch, wanted.device)
        except Exception as error:  # out of memory, or killed
            row["failed"] = short(error)
        rows.append(row)
        yield


# --- what the loss adds to a step of BERT-base -------------------------------------------------------------


class Encoder(nn.Module):
    """[CLS] of a BERT of random weights, then the head that is used in training: Linear and Tanh."""

    def __init__(self, layers: int, hidden: int):
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
        self.bert = BertModel(
            BertConfig(num_attention_heads=max(1, hidden // 64), **sizes), add_pooling_layer=False
        )
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (sentences, D)."""
        return self.head(self.bert(input_ids=ids).last_hidden_state[:, 0])


def measure_added(results: Results, clock: Clock) -> None:
    """A row per loss: time of a whole step, and what it adds to plain SimCSE's in percent.

    bf16 autocast, fused AdamW, two dropout views of every sentence in one batch, as in SimCSE. All losses
    share one model; their steps are taken in turn, and plain SimCSE is timed twice, which shows the noise.
    """
    on_gpu = results.on_gpu
    batch, tokens, layers, hidden, clusters = (256, 32, 12, 768, 128) if on_gpu else (16, 8, 1, 64, 8)
    base = {"kind": "training", "what": "whole", "B": batch, "D": hidden, "K": clusters}
    base |= {"dtype": "bfloat16", "precision": "highest", "status": "ok"}
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    try:
        with clock.device:
            encoder = Encoder(layers, hidden).train()
            ids = torch.randint(1000, 30522, (batch, tokens)).repeat(2, 1)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        with torch.no_grad(), torch.autocast(clock.device.type, torch.bfloat16):
            centers = encoder(ids[:batch])[:clusters].float()
        moving = centers.clone()
        plain = ClusterNSLoss(hidden, 0, hard_negatives=False).to(clock.device).train()
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "plain SimCSE": plain,
            "plain SimCSE again": plain,
            "plain SimCSE, eager loss": eager_info_nce,
            "ClusterNS": our_loss(hidden, clusters, centers),
            "ClusterNS, published step": lambda a, p: published_step(a, p, moving),
        }
        values: dict[str, Tensor] = {}

        def step(name: str) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(clock.device.type, torch.bfloat16):
                loss = losses[name](*encoder(ids).chunk(2))
            loss.backward()
            optimizer.step()
            values[name] = loss.detach()

        timers = [clock.timer(lambda name=name: step(name)) for name in losses]
        blocks = copy.copy(clock)
        blocks.block_seconds, blocks.rounds, blocks.seconds = (0.4, 20, 40.0) if on_gpu else (0.0, 5, 0.5)
        times = dict(zip(losses, blocks.samples(timers), strict=True))
    except Exception as error:  # the rows that come after do not depend on it
        status = "not installed" if isinstance(error, ImportError) else "failed"
        results.add({**base, "contender": "ClusterNS", "status": status, "note": short(error)})
        return
    for name, samples in times.items():
        note = f"{layers} layers, {tokens} tokens, {len(samples)} rounds"
        row = {**base, "contender": name, "note": note, "loss": float(values[name])}
        for column, figures in (
            ("device_us", samples),
            (
                "adds_percent",
                [100 * (a / b - 1) for a, b in zip(samples, times["plain SimCSE"], strict=True)],
            ),
        ):
            row |= dict(zip((column, f"{column}_p20", f"{column}_p80"), spread(figures), strict=True))
        results.add(row)


# --- as a script -------------------------------------------------------------------------------------------


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
        whole = sum(parts[name] for name in ("data", "encoder", LOSSES[0], "optimiser"))
    for name, seconds in parts.items():
        print(f"{name:55} {1e3 * seconds:8.1f} ms  {seconds / whole:6.1%} of our step")
    for row in content["memory"]:
        peak = f"{row['peak_mib']:8.0f} MiB" if "peak_mib" in row else row["failed"]
        print(f"B={row['batch']:<6} {row['contender']:46} {peak}")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"layers": 6, "hidden": 384, "batch": 128, "clusters": 64, "steps": 15, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--memory-batches", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--output", type=Path, help="JSON; default bench/results/training-DEVICE.json")
    wanted = parser.parse_args()
    if wanted.steps < WARM_UP + 3:
        parser.error(f"--steps: expected at least {WARM_UP + 3}, got {wanted.steps}")
    output = wanted.output or RESULTS / f"training-{wanted.device}.json"
    settings = {key: value for key, value in vars(wanted).items() if key != "output"}
    content: dict[str, Any] = {"machine": machine(), "settings": settings, "losses_checked_at": LOSSES}
    content |= {"whole": {}, "parts": {}, "memory": []}
    status = 0
    with tempfile.TemporaryDirectory(prefix="clusterns-") as name:
        try:
            folder, sentences = write_model(Path(name), wanted.layers, wanted.hidden)
            for _ in itertools.chain(  # after each figure all of them are on disk
                measure_whole(folder, sentences, wanted, content["whole"]),
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
