"""A tokenizer and a small BERT made from scratch, for training where nothing can be downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, BertTokenizer

# In BERT's order: padding is token 0.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Distinct characters that get a token of their own; rarer ones become [UNK].
ALPHABET = 200


def train_tokenizer(
    sentences: Sequence[str], vocab_size: int = 8192, *, max_length: int = 128
) -> BertTokenizer:
    """A lower-casing WordPiece tokenizer, BERT's kind, trained on the sentences.

    Args:
        sentences: the text; the same sentences give the same tokenizer.
        vocab_size: tokens at most, BERT's five special tokens included; little text gives fewer.
        max_length: the tokenizer's model_max_length.

    Raises ValueError for no sentences, a single string, or a vocab_size without room for the special tokens
    and the alphabet.
    """
    if isinstance(sentences, str) or not len(sentences):
        what = "one string" if isinstance(sentences, str) else "none"
        raise ValueError(f"sentences: expected a list of strings to train a tokenizer on, got {what}")
    smallest = len(SPECIAL_TOKENS) + 2 * ALPHABET  # each character as a word's first and as a later one
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: expected at least {smallest}, got {vocab_size}")
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = Counter(char for sentence in sentences for char in trained.normalizer.normalize_str(sentence))
    alphabet = sorted(char for char in counts if not char.isspace())
    alphabet = sorted(sorted(alphabet, key=counts.__getitem__, reverse=True)[:ALPHABET])
    # The trainer numbers the letters in the order of a hash table that differs between runs, and breaks ties
    # by number: two runs would give two vocabularies. Entered before it looks, they are numbered here.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        limit_alphabet=0,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *(f"##{char}" for char in alphabet)],
        show_progress=False,
    )
    trained.train_from_iterator(sentences, trainer)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True, model_max_length=max_length)


def small_bert(
    tokenizer: BertTokenizer,
    *,
    seed: int,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    dropout: float = 0.1,
    max_positions: int = 128,
    word_std: float = 0.02,
    position_std: float = 0.02,
) -> BertModel:
    """A randomly initialised BERT without pooling layer for a tokenizer's vocabulary, in float32.

    Args:
        tokenizer: gives the vocabulary and the padding token.
        seed: of the weights; the global random state is left as it is.
        hidden_size: width D of the embeddings; the feed-forward layers are four times as wide.
        layers: transformer layers.
        heads: attention heads of each; they divide `hidden_size`.
        dropout: of the hidden states and of the attention.
        max_positions: tokens a sentence can have.
        word_std, position_std: of the initial embeddings, BERT's by default. Words above positions make the
            untrained model tell sentences apart by their words; larger ones also change less in a step.

    Raises ValueError for sizes or deviations that are not positive, heads that do not divide hidden_size, or
    a dropout outside [0, 1).
    """
    sizes = {"hidden_size": hidden_size, "layers": layers, "heads": heads, "max_positions": max_positions}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if hidden_size % heads:
        raise ValueError(f"heads: expected a divisor of hidden_size {hidden_size}, got {heads}")
    for name, deviation in (("word_std", word_std), ("position_std", position_std)):
        if not deviation > 0:
            raise ValueError(f"{name}: expected a positive number, got {deviation}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=max_positions,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():  # scaled, not drawn again: the padding's row stays zero
        model.embeddings.word_embeddings.weight.mul_(word_std / config.initializer_range)
        model.embeddings.position_embeddings.weight.mul_(position_std / config.initializer_range)
    return model
