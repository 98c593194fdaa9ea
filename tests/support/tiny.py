"""What several test files share: a tiny random encoder and a small STS folder, made on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from clusterns.encoder import SentenceEncoder
from clusterns.evaluation.sts import SUBSETS, TABLES

WORDS = ["a", "cat", "dog", "bird", "sat", "ran", "on", "the", "mat", "far", "home", "slowly"]
WORDS += ["aab", "abb", "cde", "h", "b", "gh"]  # of ROWS below
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SENTENCES = [
    "a cat sat on the mat",
    "the dog ran",
    "bird",
    "the bird ran far far home slowly on the mat",
    "the dog ran",
    "",
    "a dog sat slowly",
]


def make_tokenizer(**kwargs: object) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **kwargs})


def make_encoder(seed: int = 0, pooling: str = "cls", max_length: int | None = None) -> SentenceEncoder:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.5,  # vectors that differ well beyond rounding
    )
    return SentenceEncoder(BertModel(config), make_tokenizer(), pooling=pooling, max_length=max_length).eval()


def assert_close(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4, *, least: float = 0.0
) -> None:
    """Alike but for the rounding of another order of sums: a share of the largest number expected.

    least: the measure at least, where what is expected may be rounding alone.
    """
    assert found.dtype == expected.dtype
    found, expected = found.detach().double(), expected.detach().double()
    scale = max(least, float(expected.abs().max())) or 1.0
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)


def assert_gradients_close(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """The gradients of all parameters; that of a bias of attention's keys is 0 but for rounding."""
    expected = list(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for ours, gradient in zip(found, expected, strict=True):
        assert_close(ours, gradient, 1e-3, least=largest / 100)


ROWS = [("aab", "abb", "3.5"), ("cde", "h", "0.0"), ("a b", "b a", "5.0"), ("aab", "gh", "1.2")]


def write_sts_folder(root: Path) -> Path:
    """All sets in SentEval's layout, each file with the four pairs of ROWS."""
    for name, subsets in SUBSETS.items():
        place = root / "STS" / f"{name}-en-test"
        place.mkdir(parents=True)
        for subset in subsets:
            (place / f"STS.input.{subset}.txt").write_text("".join(f"{a}\t{b}\n" for a, b, _ in ROWS))
            (place / f"STS.gs.{subset}.txt").write_text("".join(f"{score}\n" for _, _, score in ROWS))
    for name, table in TABLES.items():
        path = root / table.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("SICK"):
            head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\r\n"
            body = "".join(f"{i}\t{a}\t{b}\t{score}\tNEUTRAL\r\n" for i, (a, b, score) in enumerate(ROWS))
            path.write_bytes((head + body).encode())
        else:
            path.write_text("".join(f"main\tfile\t2012\t7\t{score}\t{a}\t{b}\n" for a, b, score in ROWS))
    return root
