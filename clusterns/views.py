"""From rows of text to the token ids of their views, in the loop's process or in a DataLoader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .prompts import PromptTokenizer


class ViewTokenizer:
    """Tokenises rows of a training set; it pickles, and holds the tokenizer but never the model.

    >>> views = encoder.view_tokenizer(max_length=32)
    >>> inputs = views([("a cat sat",), ("the dog ran",)])  # 2 rows, 2 views: tensors (4, T)
    >>> anchors, positives = encoder(inputs).chunk(2)

    Args:
        tokenizer: of transformers, with a padding token.
        max_length: tokens a text is truncated to: with the special tokens where there is no prompt, of the
            sentence alone where there is one, whose template is never truncated.
        prompt: the templates as tokens, see `PromptTokenizer`; None takes the texts as they are.
        pad_to_multiple_of: rounds T up to a multiple, for fewer shapes under `torch.compile`; None does not.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        prompt: PromptTokenizer | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prompt = prompt
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
        """Inputs of `SentenceEncoder.forward`: every tensor int64 on the CPU, with V·B rows.

        Args:
            rows: B tuples of one, two or three texts, as many in each. One: the text twice, two views that
                differ by dropout, and by the template where there is a prompt. Two: a pair, V = 2. Three: a
                pair and its hard negative, V = 3.

        Returns input_ids and attention_mask (V·B, T), right-padded to the longest, and what else the
        tokenizer makes, as token_type_ids (V·B, T). With a prompt also template and sentence_length (V·B,).
        All first views come first, then all second, then all hard negatives: `chunk(V)` parts them. The
        first view has template 1; the second view and the hard negative have template 2, as in the authors'
        code. A dict can be split into chunks of rows: each row says all about itself.

        Raises ValueError for no rows, rows of unlike numbers of texts, or more than three.
        """
        raise NotImplementedError
