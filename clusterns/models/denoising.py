"""Template denoising: what the template alone says at the mask token is taken off a sentence's embedding.

From PromptBERT (Jiang et al., EMNLP 2022). The template without a sentence is encoded with the position ids
that its tokens have around a sentence of a given length: those after the slot are shifted by it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .positions import check_shiftable, position_offset
from .prompts import TemplateTokens

# Where the values of a tensor are at hand without making the host wait for a device.
HOSTS = ("cpu",)


class TemplateDenoising(nn.Module):
    """The states of a prompt's templates alone, by the length of the sentence they stand around.

    It holds the templates' token ids and no weights; the transformer comes with each call.

    Args:
        templates: the templates' tokens.
        transformer: the encoder it will be called with, here to check that its positions can be shifted.
        pad_token_id: fills the shorter template.
        longest_input: tokens the transformer has positions for.
        trained: whether gradient flows through the states; dropout is on in training either way, as in the
            authors' code.

    Raises ValueError for a transformer that takes no position ids, or whose output depends on the order of
    the tokens in another way too (relative positions).
    """

    ids: Tensor
    mask: Tensor
    shifts: Tensor
    place: Tensor
    lengths: Tensor

    def __init__(
        self,
        templates: list[TemplateTokens],
        transformer: Any,
        *,
        pad_token_id: int,
        longest_input: int,
        trained: bool,
    ) -> None:
        super().__init__()
        self.trained = trained
        self.offset = position_offset(transformer)
        self.last_position = self.offset + longest_input - 1
        sizes = [len(tokens.ids) for tokens in templates]
        self.shortest = min(sizes)
        width = max(sizes)
        rows = [tokens.ids + [pad_token_id] * (width - len(tokens.ids)) for tokens in templates]
        after = [[int(i >= len(tokens.before)) for i in range(width)] for tokens in templates]
        buffers = {
            "ids": torch.tensor(rows),  # (templates, width)
            "mask": torch.tensor([[int(i < size) for i in range(width)] for size in sizes]),
            "shifts": torch.tensor(after),  # 1 where the sentence's length is added to the position
            "place": torch.tensor([tokens.mask % len(tokens.ids) for tokens in templates]),
            "lengths": torch.tensor(sizes),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        check_shiftable(transformer, templates[0].ids)

    def states(self, transformer: Any, template: Tensor, sentence_length: Tensor) -> Tensor:
        """States (R, D) at the mask token of templates (R,) around no sentence, shifted by lengths (R,)."""
        steps = torch.arange(self.ids.shape[1], device=self.ids.device)
        positions = self.offset + steps + self.shifts[template] * sentence_length.unsqueeze(1)
        hidden = transformer(
            input_ids=self.ids[template],
            attention_mask=self.mask[template],
            # Padding, and lengths that no row has, may lie beyond the table.
            position_ids=positions.clamp(max=self.last_position),
        ).last_hidden_state
        return hidden[torch.arange(len(template), device=hidden.device), self.place[template]]

    def forward(self, transformer: Any, attention_mask: Tensor, template: Tensor | None) -> Tensor:
        """What to subtract from each row, (rows, D), for rows (rows, T) in the given templates (rows,).

        On the CPU each pair of template and length is encoded once. Elsewhere asking which ones occur would
        make the host wait: there all that can occur are, or one per row where those are fewer.
        """
        length = attention_mask.sum(dim=1)
        if template is None:
            template = torch.zeros_like(length)
        length = length - self.lengths[template]
        lengths = attention_mask.shape[1] - self.shortest + 1  # 0 to the longest that fits
        pair = template * lengths + length
        places: Tensor | None
        if pair.device.type in HOSTS:
            pair, places = pair.unique(return_inverse=True)
        elif len(self.ids) * lengths <= len(pair):
            pair, places = torch.arange(len(self.ids) * lengths, device=pair.device), pair
        else:
            places = None
        with contextlib.nullcontext() if self.trained else torch.no_grad():
            states = self.states(transformer, pair // lengths, pair % lengths)
        return states if places is None else states[places]

    def table(self, transformer: Any, lengths: Tensor, batch_size: int) -> Tensor:
        """States (R, D) of the first template at lengths (R,), a batch at a time."""
        parts = [self.states(transformer, torch.zeros_like(some), some) for some in lengths.split(batch_size)]
        return torch.cat(parts)
