"""The encoder's vectors: poolings, order, batches, padding, truncation, the head; and its bad arguments."""

from __future__ import annotations

import threading
from typing import Any

import pyarrow as pa
import pytest
import torch
from small_files import cases
from tiny import SENTENCES, assert_close, make_encoder, make_tokenizer
from tiny_prompt import make_kind, without_dropout

from clusterns.encoder import SentenceEncoder
from clusterns.models.pooling import HEADS

KINDS = ("bert", "roberta", "distilbert", "mpnet")
# The layers whose tokens' mean is averaged, the embedding layer's states the first; None: the last's [CLS].
BY_HAND = {
    "cls": None,
    "cls-before-pooler": None,
    "mean": [-1],
    "mean-first-last": [1, -1],
    "mean-top2": [-2, -1],
}


def by_hand(states: list[torch.Tensor], layers: list[int] | None) -> torch.Tensor:
    if layers is None:
        return states[-1][0]
    return torch.stack([states[layer].mean(dim=0) for layer in layers]).mean(dim=0)


@pytest.fixture
def threads():
    """Sets how many there are; in the end as many as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_each_sentence_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterns.models.encoding.SORT_WINDOW", 4)
    monkeypatch.setattr("clusterns.models.encoding.CPU_TOKENS", 20)
    encoder = make_kind(kind)
    states = []
    for sentence in SENTENCES:
        tokens = encoder.tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            outputs = encoder.transformer(**tokens, output_hidden_states=True)
        states.append([state[0] for state in outputs.hidden_states])
    encoder.tokenizer.padding_side = "left"  # must not matter
    encoder.transformer.config.output_hidden_states = True  # as in a folder saved with another pooling
    given: set[bool] = set()
    encoder.transformer.register_forward_hook(lambda *args: given.add(args[2].hidden_states is not None))
    for pooling, layers in BY_HAND.items():
        encoder.pooling = pooling
        expected = torch.stack([by_hand(of_layers, layers) for of_layers in states])
        given.clear()
        with torch.no_grad():
            assert_close(encoder(encoder.tokenize(SENTENCES)), expected)
        vectors = encoder.encode(iter(SENTENCES), batch_size=3)
        assert_close(vectors, expected)
        assert given == {"-" in pooling and layers is not None}  # hidden states, only where they are needed
    assert vectors.shape == (len(SENTENCES), encoder.embedding_dim) == (7, 16)
    assert not vectors.requires_grad
    assert encoder.encode([]).shape == (0, 16)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_uses_of_the_head(pooling: str) -> None:
    results = {}
    for use in HEADS:
        encoder = make_kind("bert", pooling=pooling, head=use)
        inputs = encoder.tokenize(SENTENCES)
        bare = encoder(inputs, head=False)
        evaluation, training = encoder(inputs), without_dropout(encoder)(inputs)
        results[use] = (torch.equal(evaluation, bare), torch.allclose(training, bare, atol=1e-3))
        if encoder.head is not None:
            projected = torch.tanh(bare @ encoder.head[0].weight.T + encoder.head[0].bias)
            assert_close(training, projected)
            assert_close(encoder.eval()(inputs, head=True), projected)
            assert_close(encoder.encode(SENTENCES), bare.detach() if use == "train" else projected.detach())
    assert results == {"train": (True, False), "always": (False, False), "none": (True, True)}


@pytest.mark.parametrize("settings", [{}, {"head": "none"}, {"pooling": "cls-before-pooler"}], ids=str)
def test_every_trainable_parameter_gets_a_gradient(settings: dict[str, Any]) -> None:
    encoder = without_dropout(make_kind("bert", **settings))
    encoder(encoder.tokenize(SENTENCES)).square().sum().backward()
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert ("head.0.weight" in trainable) == (not settings)
    assert not any("pooler" in name for name in trainable)
    assert [name for name, p in trainable.items() if p.grad is None] == []
    if settings:
        with pytest.raises(
            ValueError, match=r"^head: expected an encoder with a head, got one with head 'no"
        ):
            encoder(encoder.tokenize(SENTENCES), head=True)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_batches_side_by_side_in_a_dtype(dtype: torch.dtype | None, threads: Any) -> None:
    """In each thread, whatever the caller's modes are; and each part is left in its own."""
    encoder = make_encoder(pooling="mean")
    expected = encoder.encode(SENTENCES)
    seen: set[Any] = set()
    layers = encoder.train().transformer.encoder.layer
    layers[0].eval()  # a part frozen by the caller
    query = layers[1].attention.self.query
    query.register_forward_hook(lambda *args: seen.add((args[2].dtype, args[2].requires_grad)))
    idents = set()
    query.register_forward_hook(lambda *_: idents.add((threading.get_ident(), torch.get_num_threads())))
    for count in (1, 3):
        threads(count)
        with torch.autocast("cpu", dtype=torch.float16):
            vectors = encoder.encode(SENTENCES, batch_size=1, dtype=dtype)
        assert (threading.get_ident() in {ident for ident, _ in idents}) == (count == 1)
        assert {number for _, number in idents} == {1}
        assert torch.get_num_threads() == count
        assert torch.is_grad_enabled()
        assert vectors.dtype == torch.float32
        assert_close(vectors, expected, 0.2 if dtype == torch.bfloat16 else 1e-4)
        idents.clear()
    assert seen == {(dtype or torch.float32, False)}
    assert [part.training for part in (encoder, encoder.head, *layers)] == [True, True, False, True]


def test_an_error_in_one_batch_is_an_error_of_all(threads: Any) -> None:
    encoder = make_encoder().train()

    def fail(_module: object, _arguments: object, inputs: dict) -> None:
        if inputs["input_ids"].shape[1] == 3:
            raise RuntimeError("out of memory")

    encoder.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    threads(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoder.encode(SENTENCES, batch_size=1)
    assert torch.get_num_threads() == 2
    assert all(module.training for module in encoder.modules())


def test_truncation() -> None:
    encoder = make_encoder(max_length=5)
    long = "the cat sat on the mat far far"
    assert encoder.tokenize([long])["input_ids"].shape == (1, 5)
    assert encoder.tokenize([long], max_length=4)["input_ids"].shape == (1, 4)
    assert_close(encoder.encode([long]), encoder.encode(["the cat sat"]))
    encoder = make_encoder()
    assert encoder.max_length == encoder.longest_input == 24
    assert encoder.encode(["far " * 100]).isfinite().all()


@cases(
    "sentences words",
    [
        ("the dog ran", "expected a list of strings, got one string"),
        (["the dog", None], "expected strings, got NoneType at index 1$"),
        (["é", "\ud83d dog"], ".* got a lone surrogate at index 1$"),
        ({"a", "b"}, "expected a list of strings, got set of no order$"),
        (pa.table({"text": ["a"]}), "expected a list of strings, got a Table; give one column of it$"),
    ],
)
def test_what_are_no_sentences(sentences: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^sentences: {words}"):
        make_encoder().encode(sentences)


def test_bad_arguments() -> None:
    encoder = make_encoder()
    # Padding on the left would take a [PAD] for the first token, and shift every position.
    left = encoder.tokenizer(SENTENCES[:3], padding=True, padding_side="left", return_tensors="pt")
    unpadded = make_tokenizer(pad_token=None)

    def make(tokenizer: Any = encoder.tokenizer, **settings: Any) -> SentenceEncoder:
        return SentenceEncoder(encoder.transformer, tokenizer, **settings)

    for call, words in (
        (lambda: make(pooling="max"), "pooling: expected one of 'cls', "),
        (lambda: make(max_length=25), "max_length: .* 3 to 24 .*, got 25$"),
        (lambda: make(max_length=8.7), "max_length: .*, got float 8.7$"),
        (lambda: make(unpadded), "tokenizer: .* a padding token"),
        (lambda: encoder.encode(SENTENCES, batch_size=0), "batch_size: expected at least 1, got 0$"),
        (lambda: encoder.encode(SENTENCES, dtype=torch.int64), "dtype: expected .*, got torch.int64$"),
        (lambda: encoder(left), "inputs: expected rows padded on the right, got padding before a text"),
        (lambda: encoder({"input_ids": left["input_ids"]}), "inputs: expected tensors as .*, got dict;"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{words}"):
            call()
