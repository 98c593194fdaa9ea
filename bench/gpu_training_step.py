"""What the loss adds to a training step of BERT-base: random weights, bf16 autocast, fused AdamW.

Two dropout views of every sentence go through the encoder in one batch, as in SimCSE. All losses share one
model; their steps are taken in turn, and plain SimCSE is timed twice, which shows the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from baselines import eager_info_nce, published_step
from contenders import SETTINGS
from gpu_results import Results
from gpu_timing import Stopwatch, paired_ratio, spread
from torch import Tensor, nn

import clusterns

Loss = Callable[[Tensor, Tensor], Tensor]
PLAIN, AGAIN = "plain SimCSE", "plain SimCSE again"


@dataclass(frozen=True)
class Shape:
    """BERT-base and the published batch."""

    batch: int = 256
    tokens: int = 32
    layers: int = 12
    hidden: int = 768
    clusters: int = 128


class Encoder(nn.Module):
    """[CLS] of a BERT of random weights, then the head that is used in training: Linear and Tanh."""

    def __init__(self, shape: Shape):
        super().__init__()
        from transformers import BertConfig, BertModel

        self.config = BertConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=max(1, shape.hidden // 64),
            intermediate_size=4 * shape.hidden,
        )
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(shape.hidden, shape.hidden), nn.Tanh())

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (sentences, D)."""
        return self.head(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])


def losses(shape: Shape, centers: Tensor) -> dict[str, Loss]:
    """The losses to compare; the clustered ones start from the same centroids."""
    device = centers.device

    def module(clusters: int) -> clusterns.ClusterNSLoss:
        loss = clusterns.ClusterNSLoss(shape.hidden, clusters, hard_negatives=clusters > 0).to(device)
        if clusters:
            loss.centroids.copy_(centers)
            loss.initialized.fill_(True)
        return loss.train()

    theirs = centers.clone()
    plain = module(0)
    return {
        PLAIN: plain,
        AGAIN: plain,
        "plain SimCSE, eager loss": lambda a, p: eager_info_nce(a, p, SETTINGS),
        "ClusterNS": module(shape.clusters),
        "ClusterNS, published step": lambda a, p: published_step(a, p, theirs, SETTINGS),
    }


def measure_training(results: Results, watch: Stopwatch, shape: Shape, rounds: int = 20) -> None:
    """Add a row per loss: time of the whole step, and what it adds to plain SimCSE's in percent.

    After an interrupt there are the rows of the turns that were whole.
    """
    base = {"kind": "training", "what": "whole", "B": shape.batch, "D": shape.hidden, "K": shape.clusters}
    base |= {"dtype": "bfloat16", "precision": "highest"}
    watch.release()
    torch.set_float32_matmul_precision("highest")
    times: dict[str, list[float]] = {}
    values: dict[str, Tensor] = {}
    interrupt = None
    try:
        _time(watch, shape, rounds, times, values)
    except ImportError as error:
        results.add({**base, "contender": PLAIN, "status": "not installed", "note": str(error)[:160]})
        return
    except Exception as error:  # the rows that come after do not depend on it
        text = f"{type(error).__name__}: {error}"[:160]
        results.add({**base, "contender": PLAIN, "status": "failed", "note": text})
        return
    except KeyboardInterrupt as error:
        interrupt = error
    finally:
        watch.release()
    turns = min(map(len, times.values()), default=0)
    note = f"{shape.layers} layers, {shape.tokens} tokens, {turns} turns"
    for name in times if turns else ():
        samples, plain = times[name][:turns], times[PLAIN][:turns]
        row = {**base, "contender": name, "status": "ok", "note": note, "loss": float(values[name])}
        row |= dict(zip(("device_us", "device_us_p20", "device_us_p80"), spread(samples), strict=True))
        if name != PLAIN:
            added = [100 * (a - b) / b for a, b in zip(samples, plain, strict=True)]
            names = ("adds_percent", "adds_percent_p20", "adds_percent_p80")
            row |= dict(zip(names, spread(added), strict=True))
            row["ratio_device"] = paired_ratio(samples, plain)
        results.add(row)
    if interrupt:
        raise interrupt


def _time(
    watch: Stopwatch, shape: Shape, rounds: int, times: dict[str, list[float]], values: dict[str, Tensor]
) -> None:
    """Microseconds per step of each loss, blocks of steps taken in turn in changing order; last losses."""
    device = watch.device
    torch.manual_seed(0)
    with device:
        encoder = Encoder(shape).train()
        ids = torch.randint(1000, encoder.config.vocab_size, (shape.batch, shape.tokens)).repeat(2, 1)
        mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        centers = encoder(ids[: shape.batch], mask[: shape.batch])[: shape.clusters].float()
    candidates = losses(shape, centers)

    def step(name: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            anchors, positives = encoder(ids, mask).chunk(2)
            loss = candidates[name](anchors, positives)
        loss.backward()
        optimizer.step()
        values[name] = loss.detach()

    on_gpu = device.type == "cuda"
    rounds, steps, warm_up = (rounds, 4, 3) if on_gpu else (3, 1, 1)
    names = list(candidates)
    times |= {name: [] for name in names}
    for name in names:
        for _ in range(warm_up):
            step(name)
    for turn in range(rounds):
        turned = names[turn % len(names) :] + names[: turn % len(names)]
        for name in turned:
            times[name].append(watch.block(lambda name=name: step(name), steps))
