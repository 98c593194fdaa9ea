"""Poolings against the hidden states of tiny encoders of several kinds; the uses of the head."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import SENTENCES, assert_close
from tiny_prompt import make_kind, without_dropout

from clusterns.models.pooling import POOLINGS, check_pooling

KINDS = ("bert", "roberta", "distilbert", "mpnet", "electra", "albert", "deberta-v2")
PLAIN = ("cls", "cls-before-pooler", "mean", "mean-first-last", "mean-top2")


def by_hand(pooling: str, states: list[torch.Tensor]) -> torch.Tensor:
    """The embedding of one sentence from its layers' states, (T, D) each, the embedding layer's first."""
    if pooling.startswith("cls"):
        return states[-1][0]
    layers = {"mean": [-1], "mean-first-last": [1, -1], "mean-top2": [-2, -1]}[pooling]
    return torch.stack([states[layer].mean(dim=0) for layer in layers]).mean(dim=0)


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_of_a_padded_batch_is_that_of_each_sentence_alone(kind: str) -> None:
    encoder = make_kind(kind)
    states = []
    for sentence in SENTENCES:
        tokens = encoder.tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            outputs = encoder.transformer(**tokens, output_hidden_states=True)
        assert len(outputs.hidden_states) == 4
        assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)
        states.append([state[0] for state in outputs.hidden_states])
    for pooling in PLAIN:
        encoder.pooling = pooling
        expected = torch.stack([by_hand(pooling, layers) for layers in states])
        with torch.no_grad():
            assert_close(encoder(encoder.tokenize(SENTENCES)), expected)
        assert_close(encoder.encode(SENTENCES), expected)


@pytest.mark.parametrize("pooling", PLAIN)
def test_hidden_states_are_asked_for_only_where_needed(pooling: str) -> None:
    encoder = make_kind("bert", pooling=pooling)
    encoder.transformer.config.output_hidden_states = True  # as in a folder saved with another pooling
    given: list[bool] = []
    encoder.transformer.register_forward_hook(
        lambda module, args, output: given.append(output.hidden_states is not None)
    )
    encoder.encode(SENTENCES)
    assert set(given) == {pooling in ("mean-first-last", "mean-top2")}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_uses_of_the_head(pooling: str) -> None:
    results = {}
    for use in ("train", "always", "none"):
        encoder = make_kind("bert", pooling=pooling, head=use)
        inputs = encoder.tokenize(SENTENCES)
        bare = encoder(inputs, head=False)
        evaluation, training = encoder(inputs), without_dropout(encoder)(inputs)
        results[use] = (torch.equal(evaluation, bare), torch.allclose(training, bare, atol=1e-3))
        if encoder.head is not None:
            projected = torch.tanh(bare @ encoder.head[0].weight.T + encoder.head[0].bias)
            assert_close(training, projected)
            assert_close(encoder.encode(SENTENCES), bare.detach() if use == "train" else projected.detach())
    assert results == {"train": (True, False), "always": (False, False), "none": (True, True)}


def test_an_encoder_without_head_has_no_parameters_of_one() -> None:
    for encoder in (make_kind("bert", head="none"), make_kind("bert", pooling="cls-before-pooler")):
        assert encoder.head_use == "none"
        assert not any(name.startswith("head") for name, _ in encoder.named_parameters())
        with pytest.raises(
            ValueError, match=r"^head: expected an encoder with a head, got one with head 'none'$"
        ):
            encoder(encoder.tokenize(SENTENCES), head=True)
        without_dropout(encoder)(encoder.tokenize(SENTENCES)).square().sum().backward()
        trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        assert [name for name, p in trainable.items() if p.grad is None] == []


@pytest.mark.parametrize(
    ("pooling", "head", "has_prompt", "words"),
    [
        ("max", None, False, "^pooling: expected one of 'cls', .*'mask', got 'max'$"),
        ("mask", None, False, "^pooling: expected another one without a prompt, got 'mask'$"),
        ("mean", None, True, "^pooling: expected 'mask' for a prompt model, got 'mean'$"),
        (
            "cls-before-pooler",
            "train",
            False,
            "^head: expected 'none' with the pooling cls-before-pooler, got 'train'$",
        ),
        ("cls", "never", False, "^head: expected one of 'train', 'always', 'none', got 'never'$"),
    ],
)
def test_what_does_not_go_together(pooling: str, head: str | None, has_prompt: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_pooling(pooling, head, has_prompt=has_prompt)


def test_the_page_names_each_pooling_and_its_head() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (in training|none) \|$", page, re.MULTILINE)
    words = {"train": "in training", "none": "none"}
    assert rows == [(name, words[of.heads[0]]) for name, of in POOLINGS.items()]


def test_defaults() -> None:
    assert check_pooling(None, None, has_prompt=False) == ("cls", "train")
    assert check_pooling(None, None, has_prompt=True) == ("mask", "train")
    assert check_pooling("cls-before-pooler", None, has_prompt=False) == ("cls-before-pooler", "none")
