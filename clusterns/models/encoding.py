"""Encoding many sentences: each distinct one once, in batches of like length, back in the caller's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_count
from .positions import evaluating
from .views import check_texts

# Sentences tokenised and sorted at a time: enough that padding is negligible, few enough to bound memory.
SORT_WINDOW = 16384
# Tokens of a batch on a CPU, where larger ones fall out of the cache and are no faster.
CPU_TOKENS = 1024
# Batches that a CPU encodes side by side, each on its own share of the cores: the threads of one batch would
# wait for one another after every operation, most of all where other programs want the cores too.
MOST_WORKERS = 16


def encode(
    encoder: Any,
    sentences: Iterable[str],
    *,
    batch_size: int,
    progress: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """See `SentenceEncoder.encode`."""
    check_count("batch_size", batch_size, at_least=1)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    sentences = check_texts("sentences", sentences)
    distinct = list(dict.fromkeys(sentences))
    place = {sentence: row for row, sentence in enumerate(distinct)}
    vectors = torch.empty(len(distinct), encoder.embedding_dim)
    device = next(encoder.parameters()).device
    with (
        evaluating(encoder),
        torch.autocast(device.type, half, enabled=half is not None),
        _Run(encoder, batch_size, device, half) as run,
        tqdm(total=len(distinct), desc="encode", unit="sentence", mininterval=1, disable=not progress) as bar,
    ):
        for start in range(0, len(distinct), SORT_WINDOW):
            window = distinct[start : start + SORT_WINDOW]
            vectors[start : start + len(window)] = run.window(window, bar).cpu()
    return vectors[[place[sentence] for sentence in sentences]]


class _Run:
    """One call: where it runs, and the states of the template alone by the length of a row."""

    def __init__(self, encoder: Any, batch_size: int, device: torch.device, half: torch.dtype | None) -> None:
        self.encoder, self.batch_size, self.device, self.half = encoder, batch_size, device, half
        self.denoises = encoder.denoises(training=False)
        self.template_states: dict[int, Tensor] = {}
        self.threads = torch.get_num_threads()
        self.workers = min(self.threads, MOST_WORKERS) if device.type == "cpu" else 1
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Run:
        if self.workers > 1:
            self.pool = ThreadPoolExecutor(self.workers, initializer=self.begin_worker)
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)

    def begin_worker(self) -> None:
        """Give a thread its share of the cores, and the modes of the caller, which are each thread's own."""
        torch.set_num_threads(self.threads // self.workers)
        torch.set_grad_enabled(False)
        if self.half is not None:
            torch.autocast(self.device.type, self.half).__enter__()  # for the thread's whole life

    def window(self, sentences: list[str], bar: Any) -> Tensor:
        """Embeddings (N, D) of so many sentences, on the device."""
        encoder = self.encoder
        length = encoder.max_length + encoder.evaluation_template_length
        tokens = encoder.evaluation_tokenizer(sentences, truncation=True, max_length=length)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        if self.denoises:
            self.add_template_states(lengths)
        # Longest first, so that a batch too large for the memory fails at once and not at the end.
        order = sorted(range(len(sentences)), key=lengths.__getitem__, reverse=True)
        vectors = torch.empty(len(sentences), encoder.embedding_dim, device=self.device)
        batches = list(self.batches(order, lengths))
        side_by_side = self.pool.map if self.pool is not None and len(batches) > 1 else map
        for rows, found in zip(
            batches, side_by_side(lambda rows: self.embed(tokens, rows), batches), strict=True
        ):
            vectors[torch.tensor(rows, device=self.device)] = found
            bar.update(len(rows))
        return vectors

    def embed(self, tokens: Mapping[str, list[list[int]]], rows: list[int]) -> Tensor:
        """Embeddings (len(rows), D) of some rows of `tokens`, float32 on the device."""
        encoder = self.encoder
        batch = encoder.evaluation_tokenizer.pad(
            {name: [values[row] for row in rows] for name, values in tokens.items()},
            padding_side="right",
            return_tensors="pt",
        )
        pooled = encoder.pool({name: value.to(self.device) for name, value in batch.items()})
        if self.denoises:
            lengths = [len(tokens["input_ids"][row]) for row in rows]
            pooled = pooled - torch.stack([self.template_states[length] for length in lengths])
        final = encoder.project(pooled) if encoder.head_use == "always" else pooled
        return final.float()

    def batches(self, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """The rows of `order`, longest first, in batches of `batch_size`; on a CPU of fewer long ones."""
        start = 0
        while start < len(order):
            count = self.batch_size
            if self.device.type == "cpu":
                count = min(count, max(1, CPU_TOKENS // max(1, lengths[order[start]])))
            yield order[start : start + count]
            start += count

    def add_template_states(self, lengths: list[int]) -> None:
        """Encode the template for each length that has not occurred before."""
        new = sorted(set(lengths) - set(self.template_states))
        if new:
            of_sentence = torch.tensor(new, device=self.device) - self.encoder.evaluation_template_length
            table = self.encoder.denoiser.table(self.encoder.transformer, of_sentence, self.batch_size)
            self.template_states.update(zip(new, table, strict=True))
