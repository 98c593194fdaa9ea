"""Encoding many sentences: each distinct one once, in batches of like length, back in the caller's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_count
from .positions import evaluating
from .views import check_texts

if TYPE_CHECKING:
    from .encoder import SentenceEncoder

# Sentences tokenised and sorted at a time: enough that padding is negligible, few enough to bound memory.
SORT_WINDOW = 16384
# Tokens of a batch on a CPU, where larger ones fall out of the cache and are no faster.
CPU_TOKENS = 1024


def encode(
    encoder: SentenceEncoder,
    sentences: Sequence[str],
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
    distinct = list(dict.fromkeys(check_texts("sentences", sentences)))
    place = {sentence: row for row, sentence in enumerate(distinct)}
    vectors = torch.empty(len(distinct), encoder.embedding_dim)
    device = next(encoder.parameters()).device
    run = _Run(encoder, batch_size, device)
    with (
        evaluating(encoder),
        torch.autocast(device.type, half, enabled=half is not None),
        tqdm(total=len(distinct), desc="encode", unit="sentence", mininterval=1, disable=not progress) as bar,
    ):
        for start in range(0, len(distinct), SORT_WINDOW):
            window = distinct[start : start + SORT_WINDOW]
            vectors[start : start + len(window)] = run.window(window, bar).cpu()
    return vectors[[place[sentence] for sentence in sentences]]


class _Run:
    """One call: where it runs, and the states of the template alone by the length of a row."""

    def __init__(self, encoder: SentenceEncoder, batch_size: int, device: torch.device) -> None:
        self.encoder, self.batch_size, self.device = encoder, batch_size, device
        self.denoises = encoder.denoises(training=False)
        self.template_states: dict[int, Tensor] = {}

    def window(self, sentences: list[str], bar: Any) -> Tensor:
        """Embeddings (N, D) of so many sentences, on the device."""
        encoder, tokenizer = self.encoder, self.encoder.evaluation_tokenizer
        length = encoder.max_length + encoder.evaluation_template_length
        tokens = tokenizer(sentences, truncation=True, max_length=length)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        if self.denoises:
            self.add_template_states(lengths)
        # Longest first, so that a batch too large for the memory fails at once and not at the end.
        order = sorted(range(len(sentences)), key=lengths.__getitem__, reverse=True)
        vectors = torch.empty(len(sentences), encoder.embedding_dim, device=self.device)
        for rows in self.batches(order, lengths):
            batch = tokenizer.pad(
                {name: [values[row] for row in rows] for name, values in tokens.items()},
                padding_side="right",
                return_tensors="pt",
            )
            pooled = encoder.pool({name: value.to(self.device) for name, value in batch.items()})
            if self.denoises:
                pooled = pooled - torch.stack([self.template_states[lengths[row]] for row in rows])
            final = encoder.project(pooled) if encoder.head_use == "always" else pooled
            vectors[torch.tensor(rows, device=self.device)] = final.float()
            bar.update(len(rows))
        return vectors

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
        assert self.encoder.denoiser is not None
        new = sorted(set(lengths) - set(self.template_states))
        if new:
            of_sentence = torch.tensor(new, device=self.device) - self.encoder.evaluation_template_length
            table = self.encoder.denoiser.table(self.encoder.transformer, of_sentence, self.batch_size)
            self.template_states.update(zip(new, table, strict=True))
