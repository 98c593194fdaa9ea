"""Tiny models for the tests with sentence-transformers, and a rank of two: gradients against one process."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from tiny import assert_close, assert_gradients_close, make_encoder
from torch.nn.parallel import DistributedDataParallel

from clusterns.sentence_transformers import ClusterNSLoss

TEXTS = ["a cat sat", "the dog ran", "bird", "the bird ran far", "a dog sat slowly", "mat", "home", "far far"]
# Of three words each, none twice.
PHRASES = [
    f"{a} {b} {c}" for a in ("a", "the", "bird") for b in ("cat", "dog", "mat") for c in ("sat", "ran")
]
OTHERS = ["the cat", "a dog", "bird bird", "far bird", "dog slowly sat", "the mat", "slowly home", "far"]


def make_model(
    folder: Path, *, dropout: float = 0.0, seed: int = 0, pooling: str = "cls", **settings: object
) -> SentenceTransformer:
    encoder = make_encoder(seed, pooling)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(encoder.transformer.config, name, dropout)
    encoder.save(folder)
    return SentenceTransformer(str(folder), device="cpu", **settings)


def preprocess(model: SentenceTransformer, texts: list[str], **settings: object) -> dict:
    # Its name before version 5.4.
    call = getattr(model, "preprocess", None) or model.tokenize
    return dict(call(list(texts), **settings))


def step(model, loss, rows):
    bare = getattr(model, "module", model)
    columns = [preprocess(bare, texts[rows]) for texts in (TEXTS, OTHERS)]
    bare.zero_grad()
    value = loss(columns, None)
    value.backward()
    return value.detach(), [p.grad.clone() for p in bare.parameters() if p.grad is not None]


def compare(folder: str) -> None:
    """For each rank of two; an assertion that fails is a rank that ends badly."""
    for mini_batch_size in (None, 3):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            compare_steps(folder, mini_batch_size)
        cures = [warning for warning in warned if "gather_across_devices=True" in str(warning.message)]
        assert len(cures) == (dist.get_rank() == 0)  # of the loss without it


def compare_steps(folder: str, mini_batch_size: int | None) -> None:
    settings = {"mini_batch_size": mini_batch_size, "start_cosine": 1.0, "centroid_momentum": 0.1}
    alone, shared = (SentenceTransformer(folder, device="cpu").train() for _ in range(2))
    wrapped = DistributedDataParallel(shared, find_unused_parameters=True)
    rows = (slice(0, 3), slice(3, 8))[dist.get_rank()]  # as ragged as a last batch
    of_one = ClusterNSLoss(alone, 3, **settings)
    of_all = ClusterNSLoss(shared, 3, gather_across_devices=True, **settings)
    of_all.model = wrapped  # as the Trainer does
    for number in range(3):
        torch.manual_seed(number)  # of the first pick
        value, gradients = step(alone, of_one, slice(0, 8))
        torch.manual_seed(number)
        of_ranks, averaged = step(wrapped, of_all, rows)
        assert_close(of_ranks, value)
        assert len(gradients) == len(averaged) > 10
        assert_gradients_close(averaged, gradients)
        assert_close(of_all.objective.centroids, of_one.objective.centroids)
    assert bool(of_all.objective.initialized)
