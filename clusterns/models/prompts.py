"""Prompt models: a sentence within a template, the embedding at the template's mask token.

PromptBERT (Jiang et al., EMNLP 2022), as ClusterNS uses it (Deng et al., Findings of ACL 2023). A template
is tokenised as two pieces, before and after the sentence, and put around the sentence's tokens by the
tokenizer's post-processor. So the sentence is truncated and the template never, and whoever loads the saved
tokenizer does the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, normalizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..checks import check_choice, in_short

SENTENCE = "[X]"
MASKS = ("[MASK]", "<mask>")
# View 1, view 2. PromptBERT's, for vocabularies with [MASK] and with <mask>.
PUBLISHED = {
    "bert": ('This sentence of "[X]" means [MASK].', 'This sentence : "[X]" means [MASK].'),
    "roberta": ("This sentence : ' [X] ' means <mask>.", "The sentence : ' [X] ' means <mask>."),
}
DENOISING = ("none", "frozen", "trained")
# Where a sentence ends without one of . ? " or ', of whatever it is made.
UNENDED = r"""(?<=[^.?"'])\z"""


@dataclass(frozen=True)
class Prompt:
    """Templates and what goes with them.

    Args:
        templates: one text or two with `[X]` for the sentence and `[MASK]` or `<mask>`, which both mean the
            tokenizer's mask token: the first for view 1 and evaluation, the last for view 2. Or the name of
            the published ones: "bert", "roberta", or "auto" for those of the tokenizer's kind.
        denoising: "none"; or in training the state of the template alone, at the positions it has around a
            sentence of that length, is subtracted from the embedding: "frozen" without, "trained" with
            gradient through it.
        evaluation_denoising: subtract it at evaluation too. The paper's test protocol does not.
        append_period: at evaluation, end a sentence with "." where it does not end in . ? " or ' (the paper's
            test protocol).

    Raises ValueError for a template without or with two sentence slots
    or masks, other than one or two templates, or an unknown name or denoising.
    """

    templates: tuple[str, ...] | str = "auto"
    denoising: str = "none"
    evaluation_denoising: bool = False
    append_period: bool = True

    def __post_init__(self) -> None:
        check_choice("denoising", self.denoising, DENOISING)
        for name in ("evaluation_denoising", "append_period"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        templates: Any = self.templates
        if isinstance(templates, str):
            if SENTENCE not in templates:
                check_choice("templates", templates, ("auto", *PUBLISHED), beside="texts with [X] and a mask")
                return
            templates = (templates,)
        if isinstance(templates, Mapping) or not isinstance(templates, Iterable):
            raise ValueError(f"templates: expected one or two texts, got {in_short(templates)}")
        object.__setattr__(self, "templates", tuple(templates))
        if not 1 <= len(self.templates) <= 2:
            raise ValueError(f"templates: expected one or two, got {len(self.templates)}")
        for template in self.templates:
            check_template(template)

    def resolve(self, tokenizer: Any) -> Prompt:
        """Itself with the texts in place of a name."""
        if not isinstance(self.templates, str):
            return self
        kind = ("roberta" if tokenizer.mask_token == "<mask>" else "bert") if self.templates == "auto" else ""
        return replace(self, templates=PUBLISHED[kind or self.templates])


def check_template(template: str) -> None:
    """ValueError for a template that has not one slot for the sentence and one mask."""
    if not isinstance(template, str):
        raise ValueError(f"template: expected a text, got {type(template).__name__}")
    masks = sum(template.count(mask) for mask in MASKS)
    for count, what in (
        (template.count(SENTENCE), f"{SENTENCE} for the sentence"),
        (masks, "[MASK] or <mask>"),
    ):
        if count != 1:
            raise ValueError(f"template: expected one {what}, got {count or 'none'} in {template!r}")


class TemplateTokens(NamedTuple):
    """A template as token ids: those before the sentence and those after it, special tokens among them."""

    before: list[int]
    after: list[int]
    # Place of the mask token: from the row's beginning, or below 0 from its end.
    mask: int
    # Whether white space parts the sentence from what is before it, which byte-level vocabularies tell.
    spaced: bool

    @property
    def ids(self) -> list[int]:
        """The template alone."""
        return [*self.before, *self.after]


class PromptTokenizer:
    """A prompt's templates for one tokenizer; it pickles.

    Args:
        prompt: what `Prompt.resolve` returns.
        tokenizer: of transformers, backed by the tokenizers library, with a mask token.

    Raises ValueError for a tokenizer without mask token or not backed by the tokenizers library, and for a
    template that it does not turn into ids with one mask token.
    """

    def __init__(self, prompt: Prompt, tokenizer: Any) -> None:
        kind = type(tokenizer).__name__
        if tokenizer.mask_token is None:
            raise ValueError(f"prompt: expected a tokenizer with a mask token, got {kind} without")
        if not tokenizer.is_fast:
            raise ValueError(f"prompt: expected a tokenizer of the tokenizers library, got {kind}")
        self.prompt = prompt
        self.templates = [template_tokens(template, tokenizer) for template in prompt.templates]
        # Of the views, by template. They need no token types: a template with its sentence is one text.
        self.tokenizers = [_around(tokenizer, tokens, period=False) for tokens in self.templates]
        self.evaluation_tokenizer = _around(tokenizer, self.templates[0], period=prompt.append_period)

    @property
    def longest_template(self) -> int:
        """Tokens of the longest template, special tokens included."""
        return max(len(tokens.ids) for tokens in self.templates)

    def view(self, sentences: Sequence[str], template: int, max_length: int) -> list[list[int]]:
        """Token ids of each sentence, cut to `max_length` tokens, in one of the templates."""
        length = max_length + len(self.templates[template].ids)
        return self.tokenizers[template](list(sentences), truncation=True, max_length=length)["input_ids"]

    def move(self, rows: list[list[int]], start: int, end: int) -> list[list[int]] | None:
        """The rows of `view` in another template, without tokenising anew; None where that would differ."""
        old, new = self.templates[start], self.templates[end]
        if old.spaced != new.spaced:
            return None
        first, last = len(old.before), len(old.after)
        return [[*new.before, *row[first : len(row) - last], *new.after] for row in rows]

    def mask_index(self, attention_mask: Tensor, template: Tensor | None) -> Tensor:
        """Place (rows,) of the mask token in right-padded rows (rows, T) of the given templates (rows,).

        It is counted and not looked for, since a sentence may hold the mask token's text.
        """
        length = attention_mask.sum(dim=1)
        places = [torch.full_like(length, t.mask) if t.mask >= 0 else length + t.mask for t in self.templates]
        if template is None or len(places) == 1:
            return places[0]
        return torch.where(template == 0, places[0], places[1])


def template_tokens(template: str, tokenizer: Any) -> TemplateTokens:
    """The ids around the sentence, as the tokenizer makes them of the text before and after its slot."""
    check_template(template)
    for mask in MASKS:
        template = template.replace(mask, tokenizer.mask_token)
    before, after = template.strip().split(SENTENCE)
    first, last = _special_ids(tokenizer)
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before.rstrip(), after)]
    ids_before, ids_after = [*first, *pieces[0]], [*pieces[1], *last]
    ids = [*ids_before, *ids_after]
    if ids.count(tokenizer.mask_token_id) != 1:
        found = ids.count(tokenizer.mask_token_id)
        raise ValueError(f"template: expected one mask token among its tokens, got {found} in {template!r}")
    place = ids.index(tokenizer.mask_token_id)
    place = place if place < len(ids_before) else place - len(ids)
    return TemplateTokens(ids_before, ids_after, place, spaced=before != before.rstrip())


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if not bare or place is None:
        kind = type(tokenizer).__name__
        raise ValueError(f"prompt: expected a tokenizer that puts special tokens around a text, got {kind}")
    return whole[:place], whole[place + len(bare) :]


def _around(tokenizer: Any, tokens: TemplateTokens, *, period: bool) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer that puts the template around each text; a text's own "[MASK]" is just text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    pieces = {"[before]": tokens.before, "[after]": tokens.after}
    backend.post_processor = processors.TemplateProcessing(
        single="[before]:0 $A:0 [after]:0",
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in pieces.items()
        ],
    )
    steps: list[Any] = [normalizers.Strip()]
    if period:
        steps.append(normalizers.Replace(Regex(UNENDED), "."))
    if tokens.spaced:
        # So the first word is the one it is in the whole text, as in the authors' evaluation; their training
        # tokenised it as if it began the text.
        steps.append(normalizers.Prepend(" "))
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    names = ("unk_token", "pad_token", "mask_token", "cls_token", "sep_token", "bos_token", "eos_token")
    special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,
        **special,
    )
