"""How fast is a training step as a whole, where does its time go, and what memory does it take?

    python bench/training.py [--layers 6 --dim 384 --batch 64 --steps 12] [--output DIR]

Four questions, the last three on a BERT of random weights and the documentation strings of this machine:

    training      what the loss adds to a step of BERT-base (on a CPU a tiny BERT)
    trainer       `clusterns train` against the Trainer of sentence-transformers, with its own in-batch loss
                  and with ours in it: sentences per second of the steady steps, runs taken in turn
    part          data, encoder, loss and optimiser of one step; our loss and the published one on the same
                  embeddings
    step memory   peak of a step, above the model, at several batch sizes, each in a process of its own
                  (Linux, or a CUDA device): our loss, our loss with the encoder in mini-batches, and the
                  published loss

Two dropout views of each sentence, [CLS], no head, float32 on a CPU and bfloat16 autocast on a GPU, the same
optimiser settings, the same tokenizer in the training process. On a CPU `clusterns train` encodes texts of
like length together; both trainers get the same batches of texts as they come.
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
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import eager_info_nce, our_loss, published_step
from measure import Clock, clock_of, columns, in_a_process, limit_memory
from report import OURS, Results, line, short
from torch import Tensor, nn
from tqdm import tqdm

from clusterns import CachedClusterNSLoss, ClusterNSLoss
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


def ours(model: Path, sentences: Path, wanted: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds at which the steps of `clusterns train` ended."""
    from clusterns.train import train
    from clusterns.training.config import TrainConfig

    settings = {
        "model": str(model),
        "train_file": str(sentences),
        "output_dir": str(folder / "ours"),
        "overwrite_output_dir": True,
        "batch_size": wanted.batch[0],
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
    lines = (folder / "ours" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["seconds"] for record in map(json.loads, lines) if "loss" in record]


def trainer_of(
    start: Path,
    columns: dict[str, list[str]],
    size: int,
    folder: Path,
    loss_of: Callable[[Any], nn.Module] | None = None,
    callbacks: Sequence[Any] = (),
    **more: Any,
) -> Any:
    """The Trainer of sentence-transformers over columns of texts, by default with its in-batch loss."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, sentence_transformer
    from sentence_transformers import SentenceTransformerTrainer as Trainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments

    model = SentenceTransformer(str(start), device="cpu" if more["use_cpu"] else "cuda")
    model.max_seq_length = LENGTH
    loss = (loss_of or sentence_transformer.losses.MultipleNegativesRankingLoss)(model)
    given = Arguments(str(folder / "theirs"), per_device_train_batch_size=size, report_to="none", **more)
    table = Dataset.from_dict(columns)
    return Trainer(model, given, train_dataset=table, loss=loss, callbacks=list(callbacks))


def theirs(
    start: Path, sentences: Path, wanted: argparse.Namespace, folder: Path, *, with_our_loss: bool
) -> list[float]:
    """Seconds at which the steps of sentence-transformers' Trainer ended."""
    from transformers import TrainerCallback

    from clusterns.sentence_transformers import ClusterNSLoss

    ends: list[float] = []

    class StepClock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if wanted.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    lines = sentences.read_text(encoding="utf-8").splitlines()
    trainer = trainer_of(
        start,
        {"text": lines} if with_our_loss else {"text": lines, "again": lines},
        wanted.batch[0],
        folder,
        partial(ClusterNSLoss, num_clusters=wanted.clusters, start_cosine=1.0) if with_our_loss else None,
        [StepClock()],
        max_steps=wanted.steps,
        learning_rate=5e-5,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=wanted.device == "cuda",
        use_cpu=wanted.device == "cpu",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer.train()
    return ends


def row_of(kind: str, contender: str, wanted: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a row has besides its figures."""
    row = {"contender": contender, "what": "whole", "kind": kind, "B": wanted.batch[0], "D": wanted.dim[0]}
    row |= {"K": wanted.clusters, "dtype": "bfloat16" if wanted.device == "cuda" else "float32"}
    return row | {"precision": "highest", "layers": wanted.layers, "status": "ok", "note": ""} | more


def measure_trainers(folder: Path, wanted: argparse.Namespace, results: Results, _clock: Clock) -> None:
    """Time of a step with each trainer, a median, as one slow step is the machine's; theirs over ours."""
    given = *write_model(folder, wanted.layers, wanted.dim[0]), wanted, folder
    runs: dict[str, Callable[[], list[float]]] = {
        "clusterns train": lambda: ours(*given),
        "sentence-transformers, MultipleNegativesRankingLoss": lambda: theirs(*given, with_our_loss=False),
        "sentence-transformers, our loss": lambda: theirs(*given, with_our_loss=True),
    }
    rows = {name: row_of("trainer", name, wanted) for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in list(runs.items()) * wanted.rounds:
        row, took = rows[name], times[name]
        try:
            took.append(1e6 * statistics.median(b - a for a, b in itertools.pairwise(run()[WARM_UP:])))
            first = times["clusterns train"]
            row |= columns("device_us", took)
            row |= columns("ratio_device", [a / b for a, b in zip(took, first, strict=False)])
            row |= {"sentences_per_second": 1e6 * wanted.batch[0] / row["device_us"], "rounds": len(took)}
        except ImportError as error:  # a GPU machine may lack what a trainer needs
            row |= {"status": "not installed", "note": short(error)}
        results.add(row)


# --- parts -------------------------------------------------------------------------------------------------


def differentiate(loss: Callable[..., Tensor], leaves: list[Tensor], *more: Any) -> Tensor:
    """Loss, 0-d, with gradients left in the leaves."""
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves, *more)
    value.backward()
    return value.detach()


def measure_parts(folder: Path, wanted: argparse.Namespace, results: Results, clock: Clock) -> None:
    """Median time of each part of a step, and of the losses on the same embeddings, which are compared."""
    model, sentences = write_model(folder, wanted.layers, wanted.dim[0])
    encoder = SentenceEncoder.from_pretrained(model).to(clock.device).train()
    tokenize, lines = encoder.view_tokenizer(max_length=LENGTH), sentences.read_text("utf-8").splitlines()
    loss_fn = ClusterNSLoss(encoder.embedding_dim, wanted.clusters, start_cosine=1.0).to(clock.device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    on_gpu = wanted.device == "cuda"
    found: dict[str, list[float]] = {}
    names = ("data", "encoder", OURS, "optimiser", "published")  # the first four are our step
    rows = {name: row_of("part", name, wanted) for name in names}

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

        first = number * wanted.batch[0]
        texts = [(lines[each % len(lines)],) for each in range(first, first + wanted.batch[0])]
        inputs = time_of("data", lambda: {k: v.to(clock.device) for k, v in tokenize(texts).items()})
        embeddings = time_of("encoder", lambda: encode(inputs))
        leaves = [view.detach().requires_grad_() for view in embeddings.float().chunk(2)]
        if not loss_fn.clustering_active:  # the step that seeds is not like the others
            loss_fn(*leaves)
        centroids = loss_fn.centroids.clone()
        published = time_of("published", lambda: differentiate(published_step, leaves, centroids))
        mine = time_of(OURS, lambda: differentiate(loss_fn, leaves))
        torch.testing.assert_close(mine, published, rtol=1e-3, atol=1e-4)
        gradient = torch.cat([leaf.grad for leaf in leaves]).to(embeddings.dtype)
        time_of("encoder", lambda: embeddings.backward(gradient))
        time_of("optimiser", optimise)
        return took

    for number in tqdm(range(wanted.steps), desc="parts", unit="step"):
        took = step(number)
        if number < WARM_UP:
            continue
        for name, seconds in took.items():
            found.setdefault(name, []).append(1e6 * seconds)
            rows[name] |= columns("device_us", found[name])
        whole = sum(rows[name]["device_us"] for name in names[:4])
        for name in names:
            rows[name]["share"] = rows[name]["device_us"] / whole
        results.keep(rows.values())
    print(*map(line, rows.values()), sep="\n")


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


def measure_memory(folder: Path, wanted: argparse.Namespace, results: Results, _clock: Clock) -> None:
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
    on_gpu, kind = results.on_gpu, clock.device.type
    batch, tokens, layers, hidden, clusters = (256, 32, 12, 768, 128) if on_gpu else (16, 8, 1, 64, 8)
    sizes = {"batch": [batch], "dim": [hidden], "clusters": clusters, "layers": layers, "device": kind}
    row_for = partial(row_of, "training", wanted=argparse.Namespace(**sizes), dtype="bfloat16")
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    try:
        with clock.device:
            encoder = Encoder(layers, hidden).train()
            ids = torch.randint(1000, 30522, (batch, tokens)).repeat(2, 1)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16):
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
            with torch.autocast(kind, torch.bfloat16):
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
        results.add(row_for("ClusterNS", status=status, note=short(error)))
        return
    for name, samples in times.items():
        row = row_for(name, tokens=tokens, rounds=len(samples), loss=float(values[name]))
        more = [100 * (a / b - 1) for a, b in zip(samples, times["plain SimCSE"], strict=True)]
        results.add(row | columns("device_us", samples) | columns("adds_percent", more))


# --- as a script -------------------------------------------------------------------------------------------


def in_a_folder(measure: Callable[..., None], *given: Any) -> None:
    """Measure with a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="clusterns-") as folder:
        measure(Path(folder), *given)


def stages(wanted: argparse.Namespace, results: Results, clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do."""
    if wanted.steps < WARM_UP + 3:
        raise SystemExit(f"--steps: expected at least {WARM_UP + 3}, got {wanted.steps}")
    own = {"trainers": measure_trainers, "parts": measure_parts, "memory of a step": measure_memory}
    of_a_folder = [(name, partial(in_a_folder, each, wanted, results, clock)) for name, each in own.items()]
    return [("training step", partial(measure_added, results, clock)), *of_a_folder]


if __name__ == "__main__":
    from run import main

    sys.exit(main("training"))
