"""From the states of the tokens to one vector per sentence: the poolings and the uses of the head.

The names are SimCSE's (Gao et al., EMNLP 2021), with "mean" for its "avg"; "mask" is PromptBERT's (Jiang et
al., EMNLP 2022). "First" is the output of the first layer, hidden state 1 and not the embedding layer's 0,
as in SimCSE's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice

# "train": the projection head is part of training only; "always": of evaluation too; "none": there is none.
HEADS = ("train", "always", "none")


class Pooling(NamedTuple):
    """One way to make a sentence's vector of the states of its tokens; all that is said of it anywhere."""

    # Of states (rows, T, D), the attention mask (rows, T), 0 at the padding on the right, and with a prompt
    # the place of the mask token in each row (rows,): vectors (rows, D).
    of_states: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    # The mode of sentence-transformers' Pooling module that gives the same vectors, of the same layers or of
    # the mask token alone; None where none does, and saving is refused.
    saved_as: str | None
    # The hidden states whose average is pooled; without any, the last.
    layers: tuple[int, ...] = ()
    # The uses of the head that it allows, the default first.
    heads: tuple[str, ...] = HEADS
    # Whether it is for prompt models, and only for them.
    of_prompt: bool = False


def first_token(states: Tensor, mask: Tensor, mask_index: Tensor | None) -> Tensor:
    """The first token's state."""
    return states[:, 0]


def mean_of_tokens(states: Tensor, mask: Tensor, mask_index: Tensor | None) -> Tensor:
    """The mean over the tokens that are not padding."""
    mask = mask.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)


def mask_token(states: Tensor, mask: Tensor, mask_index: Tensor | None) -> Tensor:
    """The mask token's state."""
    return states[torch.arange(len(states), device=states.device), mask_index]


# The first of those with and of those without a prompt is the default; the first plain one of a mode is what
# a folder of sentence-transformers with that mode is read as.
POOLINGS = {
    "cls": Pooling(first_token, "cls"),
    "cls-before-pooler": Pooling(first_token, "cls", heads=("none",)),
    "mean": Pooling(mean_of_tokens, "mean"),
    "mean-first-last": Pooling(mean_of_tokens, "mean", layers=(1, -1)),
    "mean-top2": Pooling(mean_of_tokens, "mean", layers=(-2, -1)),
    "mask": Pooling(mask_token, "mean", of_prompt=True),
}


def check_pooling(pooling: str | None, head: str | None, *, has_prompt: bool) -> tuple[str, str]:
    """Pooling and head with their defaults filled in; ValueError where they do not go together."""
    fitting = [name for name, of in POOLINGS.items() if of.of_prompt == has_prompt]
    pooling = fitting[0] if pooling is None else pooling
    check_choice("pooling", pooling, tuple(POOLINGS))
    if pooling not in fitting:
        wanted = f"{in_words(fitting)} for a prompt model" if has_prompt else "another one without a prompt"
        raise ValueError(f"pooling: expected {wanted}, got {pooling!r}")
    heads = POOLINGS[pooling].heads
    head = heads[0] if head is None else head
    check_choice("head", head, HEADS)
    if head not in heads:
        raise ValueError(f"head: expected {in_words(heads)} with the pooling {pooling}, got {head!r}")
    return pooling, head


def plain_poolings() -> dict[str, str]:
    """Modes of sentence-transformers' Pooling module, and the pooling here that each alone gives."""
    plain = [(of.saved_as, name) for name, of in POOLINGS.items() if not (of.layers or of.of_prompt)]
    return {mode: name for mode, name in reversed(plain) if mode is not None}


def in_words(names: Iterable[str]) -> str:
    """The names as an error message has them."""
    return " or ".join(map(repr, names))


def pool(pooling: str, outputs: Any, attention_mask: Tensor, mask_index: Tensor | None = None) -> Tensor:
    """Sentence vectors (rows, D) of a right-padded batch.

    Args:
        pooling: a name of POOLINGS.
        outputs: of the transformer, with `last_hidden_state` (rows, T, D) and, for a pooling of several
            layers, `hidden_states`.
        attention_mask: (rows, T), 0 at padding, which never counts.
        mask_index: with a prompt the place of the mask token in each row, (rows,).
    """
    chosen = POOLINGS[pooling]
    states = outputs.last_hidden_state
    if chosen.layers:
        states = sum(outputs.hidden_states[layer] for layer in chosen.layers) / len(chosen.layers)
    return chosen.of_states(states, attention_mask, mask_index)
