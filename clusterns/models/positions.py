"""Positions of a transformer: how many, from where they count, and whether they can be shifted."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# The longest input of a model that states no limit (relative positions and a tokenizer without one).
FALLBACK_LENGTH = 512


def position_offset(transformer: Any) -> int:
    """Position id of the first token: RoBERTa and its kin count from padding_idx + 1."""
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def longest_input(transformer: Any, tokenizer: Any) -> int:
    """Tokens the model has positions for."""
    positions = getattr(transformer.config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else FALLBACK_LENGTH
    return positions - position_offset(transformer)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode and without gradient; then each part in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def check_shiftable(transformer: Any, ids: list[int]) -> None:
    """Require an encoder in which a token's place is told by its position id and by nothing else.

    The test, on a few token ids: reversed tokens with reversed position ids give the reversed states. Raises
    ValueError where they do not, or where there are no position ids to give.
    """
    kind = type(transformer).__name__
    if "position_ids" not in inspect.signature(transformer.forward).parameters:
        raise ValueError(f"denoising: expected a model that takes position_ids, got {kind}; use 'none'")
    device = next(transformer.parameters()).device
    tokens = torch.tensor([ids], device=device)
    mask = torch.ones_like(tokens)
    positions = position_offset(transformer) + torch.arange(len(ids), device=device).unsqueeze(0)
    with evaluating(transformer), torch.autocast(device.type, enabled=False):
        straight = transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
        reverse = transformer(input_ids=tokens.flip(1), attention_mask=mask, position_ids=positions.flip(1))
    difference = (straight - reverse.last_hidden_state.flip(1)).abs().max()
    tolerance = max(1e-3, 30 * torch.finfo(straight.dtype).eps) * straight.abs().max()
    if not bool(difference <= tolerance):
        raise ValueError(
            f"denoising: expected a model whose position_ids alone place a token, got {kind}, "
            "whose relative positions cannot be shifted; use 'none'"
        )
