"""Tiny random encoders of several kinds, with tokenizers that know a mask token."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import SENTENCES, WORDS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoModel, PreTrainedTokenizerFast

from clusterns.encoder import SentenceEncoder
from clusterns.models.prompts import Prompt

BERT_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_SPECIAL = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
PROMPT_WORDS = ["this", "sentence", "of", ":", '"', "'", "means", ".", "?", "mask", "[", "]"]
# Kinds with [MASK] that take position ids and no other positions; and RoBERTa, which counts them from 2.
ABSOLUTE = ("bert", "distilbert", "roberta")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # vectors that differ well beyond rounding
}


def with_special(backend: Tokenizer, names: dict[str, str], **changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that puts its special tokens around a text."""
    around = [(names[name], list(names).index(name)) for name in ("cls", "sep")]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{names['cls']} $A {names['sep']}", special_tokens=around
    )
    tokens = {f"{name}_token": token for name, token in {**names, **changes}.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    words = dict.fromkeys([*BERT_SPECIAL.values(), *WORDS, *PROMPT_WORDS])
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return with_special(backend, BERT_SPECIAL)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: a word after a space is another token than the word alone."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(ROBERTA_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*SENTENCES, "This sentence : ' X ' means that The sentence"] * 2, trainer)
    return with_special(backend, ROBERTA_SPECIAL, mask=AddedToken("<mask>", lstrip=True, special=True))


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return roberta_tokenizer() if kind in ("roberta", "mpnet") else bert_tokenizer()


def transformer_of(kind: str, vocabulary: int, seed: int = 0, **changes: Any) -> Any:
    """A random transformers encoder of a kind, in eval mode."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind)
    values = {**SIZES, "vocab_size": vocabulary, **changes}
    if kind == "distilbert":
        values = {**values, "hidden_dim": values.pop("intermediate_size")}
    if kind in ("roberta", "mpnet"):
        values = {"pad_token_id": 1, **values}
    for name, value in values.items():
        setattr(config, name, value)
    return AutoModel.from_config(config).eval()


def make_kind(kind: str, **settings: Any) -> SentenceEncoder:
    tokenizer = tokenizer_of(kind)
    return SentenceEncoder(transformer_of(kind, len(tokenizer)), tokenizer, **settings).eval()


def make_prompted(kind: str = "bert", *, max_length: int | None = 6, **prompt: Any) -> SentenceEncoder:
    return make_kind(kind, prompt=Prompt(**prompt), max_length=max_length)


def without_dropout(encoder: SentenceEncoder) -> SentenceEncoder:
    """In training mode, without its noise."""
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return encoder
