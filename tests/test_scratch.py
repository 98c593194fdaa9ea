"""The tokenizer and the small BERT that are made where nothing can be downloaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from clusterns.training.scratch import SPECIAL_TOKENS, small_bert, train_tokenizer

SENTENCES = [
    f"The {size} {thing} was {state} by the Engineer\u2019s na\u00efve tools, number {number}!"
    for number in range(12)
    for size in ("small", "larger", "largest")
    for thing in ("tokenizer", "encoder", "sentence", "sentences")
    for state in ("measured", "trained", "tokenized")
]


def test_a_wordpiece_tokenizer_with_berts_special_tokens_is_the_same_when_saved(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, 600, max_length=12)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.tokenize("The ENCODER was na\u00efve!") == ["the", "encoder", "was", "naive", "!"]
    assert tokenizer.tokenize("\u0416") == ["[UNK]"]
    assert tokenizer.decode(tokenizer("the encoder")["input_ids"]) == "[CLS] the encoder [SEP]"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 12
    assert loaded(SENTENCES)["input_ids"] == tokenizer(SENTENCES)["input_ids"]


def test_training_again_gives_the_same_tokenizer() -> None:
    # The trainer's hash tables are seeded anew each time, in one process too.
    vocabularies = [train_tokenizer(SENTENCES, 500).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    with pytest.raises(ValueError, match="vocab_size: expected at least 405, got 100"):
        train_tokenizer(SENTENCES, 100)


def test_a_small_bert_of_the_given_sizes_and_seed() -> None:
    tokenizer = train_tokenizer(SENTENCES, 500)
    make = partial(small_bert, tokenizer, hidden_size=32, layers=2, heads=2, max_positions=40)
    before = torch.get_rng_state()
    model = make(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert model.pooler is None
    output = model(**tokenizer(SENTENCES[:3], padding=True, return_tensors="pt"), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert output.last_hidden_state.shape[::2] == (3, 32)
    torch.manual_seed(9)
    again, other = make(seed=1).state_dict(), make(seed=2).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(again[name], other[name])
