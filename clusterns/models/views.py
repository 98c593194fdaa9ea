"""From rows of text to the token ids of their views, in the loop's process or in a DataLoader's workers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_count

if TYPE_CHECKING:
    from .prompts import PromptTokenizer

# Half of a character of UTF-16, which is no character by itself.
_HALF = re.compile(r"[\ud800-\udfff]")


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
        check_count("max_length", max_length, at_least=1)
        if pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", pad_to_multiple_of, at_least=1)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prompt = prompt
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Iterable[tuple[str, ...]]) -> dict[str, Tensor]:
        """Inputs of `SentenceEncoder.forward`: every tensor int64 on the CPU, with V·B rows.

        Args:
            rows: B tuples of one, two or three texts, as many in each. One: the text twice, two views that
                differ by dropout, and by the template where there is a prompt. Two: a pair, V = 2. Three: a
                pair and its hard negative, V = 3.

        Returns input_ids and attention_mask (V·B, T), right-padded to the longest, and what else the
        tokenizer makes, as token_type_ids (V·B, T). With a prompt also template (V·B,), 0 or 1. All first
        views come first, then all second, then all hard negatives: `chunk(V)` parts them. The first view has
        template 1; the second view and the hard negative have template 2, as in the authors' code. A dict can
        be split into chunks of rows: each row says all about itself.

        Raises ValueError for no rows, rows of unlike numbers of texts or more than three, or what is no text.
        """
        if not isinstance(rows, Iterable):
            raise ValueError(f"rows: expected tuples of texts, got {type(rows).__name__}")
        columns = _columns(list(rows))
        return self._plain(columns) if self.prompt is None else self._prompted(columns)

    def _plain(self, columns: list[list[str]]) -> dict[str, Tensor]:
        texts = [text for column in columns for text in column]
        options = {"padding_side": "right", "return_tensors": "pt"}
        cut = {"truncation": True, "max_length": self.max_length}
        if self.pad_to_multiple_of is None:
            inputs = dict(self.tokenizer(texts, padding=True, **cut, **options))
        else:  # in two steps, since the tokenizer wants a max_length that is such a multiple itself
            ids = self.tokenizer(texts, **cut)
            inputs = dict(self.tokenizer.pad(ids, pad_to_multiple_of=self.pad_to_multiple_of, **options))
        if len(columns) == 1:  # a text's two views have the same tokens
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        return inputs

    def _prompted(self, columns: list[list[str]]) -> dict[str, Tensor]:
        assert self.prompt is not None
        last = len(self.prompt.templates) - 1
        ids = self.prompt.view(columns[0], 0, self.max_length)
        if len(columns) == 1:
            moved = self.prompt.move(ids, 0, last)
            ids += self.prompt.view(columns[0], last, self.max_length) if moved is None else moved
        for column in columns[1:]:
            ids += self.prompt.view(column, last, self.max_length)
        batch = self.prompt.tokenizers[0].pad(
            {"input_ids": ids},
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
        )
        template = torch.full((len(ids),), last)
        template[: len(columns[0])] = 0
        return {**batch, "template": template}


def _columns(rows: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """The texts of each column, checked."""
    if len(rows) == 0:
        raise ValueError("rows: expected at least one, got an empty list")
    for number, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or not 1 <= len(row) <= 3:
            got = f"{len(row)} texts" if isinstance(row, (tuple, list)) else type(row).__name__
            raise ValueError(f"rows: expected tuples of one to three texts, got {got} at index {number}")
        if len(row) != len(rows[0]):
            raise ValueError(
                f"rows: expected {len(rows[0])} texts as in the first, got {len(row)} at index {number}"
            )
    return [check_texts("rows", column) for column in zip(*rows, strict=True)]


def check_texts(name: str, texts: Iterable[str]) -> list[str]:
    """The texts as a list, walked through once; ValueError for what is no such list, or no text in it."""
    if isinstance(texts, str):
        raise ValueError(f"{name}: expected a list of strings, got one string {texts[:40]!r}")
    if hasattr(texts, "columns"):  # walking through a table gives their names
        kind = type(texts).__name__
        raise ValueError(f"{name}: expected a list of strings, got a {kind}; give one column of it")
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"{name}: expected a list of strings, got {type(texts).__name__}")
    if isinstance(texts, (set, frozenset)) or getattr(texts, "ndim", 1) != 1:
        what = f"{texts.ndim} dimensions" if hasattr(texts, "ndim") else "no order"
        raise ValueError(f"{name}: expected a list of strings, got {type(texts).__name__} of {what}")
    found = list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected strings, got {type(text).__name__} at index {index}")
        if not text.isascii() and _HALF.search(text):
            raise ValueError(f"{name}: expected text that UTF-8 has, got a lone surrogate at index {index}")
    return found
