from __future__ import annotations

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


def test_a_wordpiece_tokenizer_with_berts_special_tokens() -> None:
    tokenizer = train_tokenizer(SENTENCES, 600)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.tokenize("The ENCODER was na\u00efve!") == ["the", "encoder", "was", "naive", "!"]
    assert tokenizer.tokenize("\u0416") == ["[UNK]"]
    pieces = tokenizer.tokenize("sizes")
    assert len(pieces) > 1
    assert all(piece.startswith("##") for piece in pieces[1:])
    batch = tokenizer(["the encoder", "the"], padding=True)
    assert batch["input_ids"][1][0] == 2
    assert batch["input_ids"][1][-2:] == [3, 0]
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] the encoder [SEP]"


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, 500, max_length=12)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 12
    assert loaded(SENTENCES)["input_ids"] == tokenizer(SENTENCES)["input_ids"]


def test_training_again_gives_the_same_tokenizer() -> None:
    # The trainer's hash tables are seeded anew each time, in one process too.
    vocabularies = [train_tokenizer(SENTENCES, 500).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_a_small_bert_of_the_given_sizes_and_seed() -> None:
    tokenizer = train_tokenizer(SENTENCES, 500)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = small_bert(tokenizer, seed=1, hidden_size=32, layers=2, heads=2, max_positions=40)
    assert torch.equal(before, torch.get_rng_state())
    assert model.pooler is None
    assert model.config.num_hidden_layers == 2
    output = model(**tokenizer(SENTENCES[:3], padding=True, return_tensors="pt")).last_hidden_state
    assert output.shape[::2] == (3, 32)
    torch.manual_seed(9)
    again = small_bert(tokenizer, seed=1, hidden_size=32, layers=2, heads=2, max_positions=40).state_dict()
    other = small_bert(tokenizer, seed=2, hidden_size=32, layers=2, heads=2, max_positions=40).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    name = "embeddings.word_embeddings.weight"
    sizes = {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 40}
    wide = small_bert(tokenizer, seed=1, **sizes, word_std=0.2, position_std=0.01)
    assert torch.allclose(wide.state_dict()[name], 10 * again[name])
    positions = wide.embeddings.position_embeddings.weight
    assert 0.009 < positions.std().item() < 0.011
    assert not torch.equal(again[name], other[name])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="sentences: expected a list of strings .*, got none"):
        train_tokenizer([])
    with pytest.raises(ValueError, match="sentences: expected a list of strings .*, got one string"):
        train_tokenizer("a sentence")
    with pytest.raises(ValueError, match="vocab_size: expected at least 405, got 100"):
        train_tokenizer(SENTENCES, 100)
    tokenizer = train_tokenizer(SENTENCES, 500)
    for options, message in (
        ({"hidden_size": 30}, "heads: expected a divisor of hidden_size 30, got 4"),
        ({"word_std": 0.0}, "word_std: expected a positive number, got 0.0"),
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            small_bert(tokenizer, seed=0, **options)  # type: ignore[arg-type]
