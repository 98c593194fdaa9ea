"""From the states of the tokens to one vector per sentence: the poolings and the uses of the head.

The names are SimCSE's (Gao et al., EMNLP 2021), with "mean" for its "avg"; "mask" is PromptBERT's (Jiang et
al., EMNLP 2022). "First" is the output of the first layer, hidden state 1 and not the embedding layer's 0,
as in SimCSE's code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice

POOLINGS = ("cls", "cls-before-pooler", "mean", "mean-first-last", "mean-top2", "mask")
# The hidden states whose average is taken before the mean over the tokens.
LAYERS = {"mean-first-last": (1, -1), "mean-top2": (-2, -1)}
# "train": the projection head is part of training only; "always": of evaluation too; "none": there is none.
HEADS = ("train", "always", "none")


def check_pooling(pooling: str | None, head: str | None, *, has_prompt: bool) -> tuple[str, str]:
    """Pooling and head with their defaults filled in; ValueError where they do not go together."""
    if pooling is None:
        pooling = "mask" if has_prompt else "cls"
    check_choice("pooling", pooling, POOLINGS)
    if (pooling == "mask") != has_prompt:
        wanted = "'mask' for a prompt model" if has_prompt else "another one without a prompt"
        raise ValueError(f"pooling: expected {wanted}, got {pooling!r}")
    if head is None:
        head = "none" if pooling == "cls-before-pooler" else "train"
    check_choice("head", head, HEADS)
    if pooling == "cls-before-pooler" and head != "none":
        raise ValueError(f"head: expected 'none' with the pooling cls-before-pooler, got {head!r}")
    return pooling, head


def pool(pooling: str, outputs: Any, attention_mask: Tensor, mask_index: Tensor | None = None) -> Tensor:
    """Sentence vectors (rows, D) of a right-padded batch.

    Args:
        pooling: one of POOLINGS.
        outputs: of the transformer, with `last_hidden_state` (rows, T, D) and, for a pooling in LAYERS,
            `hidden_states`.
        attention_mask: (rows, T), 0 at padding, which never counts.
        mask_index: for "mask" the place of the mask token in each row, (rows,).
    """
    hidden = outputs.last_hidden_state
    if pooling == "mask":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask_index]
    if pooling in ("cls", "cls-before-pooler"):
        return hidden[:, 0]
    if pooling in LAYERS:
        first, second = (outputs.hidden_states[layer] for layer in LAYERS[pooling])
        hidden = (first + second) / 2
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
