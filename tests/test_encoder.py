"""The encoder's vectors: order, batches, padding, truncation, the head; and its bad arguments."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import SENTENCES, assert_close, make_encoder, make_tokenizer
from transformers import RobertaConfig, RobertaModel

from clusterns.encoder import SentenceEncoder


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_encode_equals_each_sentence_alone(pooling: str) -> None:
    encoder = make_encoder(pooling=pooling)
    vectors = encoder.encode(SENTENCES)
    assert vectors.shape == (len(SENTENCES), encoder.embedding_dim) == (7, 16)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    for row, sentence in enumerate(SENTENCES):
        tokens = encoder.tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder.transformer(**tokens).last_hidden_state[0]
        assert_close(vectors[row], hidden[0] if pooling == "cls" else hidden.mean(dim=0))
    assert (vectors[0] - vectors[1]).norm() > 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_encode_does_not_depend_on_batch_size_or_window(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(pooling="mean")
    expected = encoder.encode(SENTENCES)
    monkeypatch.setattr("clusterns.models.encoding.SORT_WINDOW", 4)
    for tokens in (1024, 10, 1):
        monkeypatch.setattr("clusterns.models.encoding.CPU_TOKENS", tokens)
        assert_close(encoder.encode(SENTENCES, batch_size=batch_size), expected)


def test_batches_on_a_cpu_have_at_most_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterns.models.encoding.CPU_TOKENS", 20)
    encoder, shapes = make_encoder(pooling="mean"), []
    encoder.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    encoder.encode(
        ["the cat sat on the mat far far home", "a cat", "a dog", "bird", "dog", "cat"], batch_size=3
    )
    # 11 tokens with [CLS] and [SEP], then 4, 4, 3, 3, 3: at most 20 tokens and 3 sentences.
    assert sorted(shapes) == [(1, 11), (2, 3), (3, 4)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_batches_side_by_side_give_the_same_vectors(dtype: torch.dtype | None) -> None:
    encoder = make_encoder(pooling="mean").train()
    threads, seen, dtypes = torch.get_num_threads(), set(), set()
    query = encoder.transformer.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    encoder.transformer.register_forward_pre_hook(
        lambda *_: seen.add((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
    )
    try:
        torch.set_num_threads(1)
        expected = encoder.encode(SENTENCES, batch_size=1, dtype=dtype)
        assert seen == {(threading.get_ident(), 1, False)}
        seen.clear()
        torch.set_num_threads(3)
        with torch.enable_grad():
            vectors = encoder.encode(SENTENCES, batch_size=1, dtype=dtype)
            assert torch.is_grad_enabled()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert {place[1:] for place in seen} == {(1, False)}
    assert dtypes == {dtype or torch.float32}
    assert threading.get_ident() not in {place[0] for place in seen}
    assert not vectors.requires_grad
    assert encoder.training
    assert_close(vectors, expected, 1e-4 if dtype is None else 0.1)


def test_an_error_in_one_batch_is_an_error_of_all() -> None:
    encoder, threads = make_encoder(), torch.get_num_threads()

    def fail(_module: object, _arguments: object, inputs: dict) -> None:
        if inputs["input_ids"].shape[1] == 3:
            raise RuntimeError("out of memory")

    encoder.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder.encode(SENTENCES, batch_size=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_encode_takes_each_distinct_sentence_once_longest_first() -> None:
    encoder = make_encoder()
    masks: list[torch.Tensor] = []
    encoder.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    encoder.encode(SENTENCES * 3, batch_size=2)
    lengths = [int(length) for mask in masks for length in mask.sum(dim=1)]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == len(set(SENTENCES)) == 6


def test_texts_may_come_one_after_the_other() -> None:
    encoder = make_encoder()
    expected = encoder.encode(SENTENCES)
    assert_close(encoder.encode(sentence for sentence in SENTENCES), expected)
    assert_close(encoder.encode(map(str, SENTENCES)), expected)
    assert_close(
        encoder.encode(dict.fromkeys(SENTENCES).keys()), encoder.encode(list(dict.fromkeys(SENTENCES)))
    )
    tokens, again = encoder.tokenize(iter(SENTENCES)), encoder.tokenize(SENTENCES)
    assert torch.equal(tokens["input_ids"], again["input_ids"])
    assert_close(encoder.encode(np.array(SENTENCES)), expected)
    table = pa.table({"text": ["a"], "label": ["b"]})
    for wrong, words in (
        *(({"text": "a"}, "dict"), (None, "NoneType"), (7, "int"), ({"a", "b"}, "set of no order")),
        *((np.array("a"), "ndarray of 0 dimensions"), (np.array([["a", "b"]]), "ndarray of 2 dimensions")),
        *((data, f"a {type(data).__name__}; give one column of it") for data in (table, table.to_pandas())),
    ):
        with pytest.raises(ValueError, match=f"^sentences: expected a list of strings, got {words}$"):
            encoder.encode(wrong)
    with pytest.raises(ValueError, match=r"^sentences: .* got a lone surrogate at index 1$"):
        encoder.encode(["é", "\ud83d dog"])


def test_inputs_that_would_be_read_wrongly() -> None:
    """Padding on the left would take a [PAD] for the first token, and shift every position."""
    encoder = make_encoder()
    tokens = encoder.tokenizer(SENTENCES[:3], padding=True, padding_side="left", return_tensors="pt")
    with pytest.raises(
        ValueError, match=r"^inputs: expected rows padded on the right, got padding before a text"
    ):
        encoder(tokens)
    for wrong, words in ((SENTENCES, "list"), ({"input_ids": tokens["input_ids"]}, "dict")):
        with pytest.raises(
            ValueError, match=f"^inputs: expected tensors as .*, got {words}; encode takes texts$"
        ):
            encoder(wrong)


def test_encode_of_nothing_is_an_empty_matrix() -> None:
    assert make_encoder().encode([]).shape == (0, 16)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_change_embeddings(pooling: str) -> None:
    encoder = make_encoder(pooling=pooling)
    encoder.tokenizer.padding_side = "left"  # must not matter: the first position is the [CLS]
    alone, together = encoder.tokenize(["the dog ran"]), encoder.tokenize(["the dog ran", SENTENCES[3]])
    assert alone["input_ids"].shape[1] < together["input_ids"].shape[1]
    with torch.no_grad():
        assert_close(encoder(alone)[0], encoder(together)[0])
    assert_close(encoder.encode(SENTENCES, batch_size=7), encoder.encode(SENTENCES, batch_size=1))


def test_encode_ignores_autocast_and_restores_each_mode() -> None:
    encoder = make_encoder()
    expected = encoder.encode(SENTENCES)
    encoder.train()
    encoder.transformer.encoder.layer[0].eval()  # a part frozen by the caller
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = encoder.encode(SENTENCES)
    assert_close(vectors, expected)
    assert encoder.training
    assert encoder.head.training
    assert not encoder.transformer.encoder.layer[0].training
    assert encoder.transformer.encoder.layer[1].training


def test_encode_restores_the_mode_after_an_error() -> None:
    encoder = make_encoder().train()
    encoder.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(SENTENCES)
    assert all(module.training for module in encoder.modules())


def test_head_is_applied_in_training_only() -> None:
    encoder = make_encoder()
    inputs = encoder.tokenize(SENTENCES)
    bare = encoder(inputs)
    linear = encoder.head[0]
    projected = torch.tanh(bare @ linear.weight.T + linear.bias)
    assert_close(encoder(inputs, head=True), projected)
    assert (bare - projected).abs().max() > 0.1
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_close(encoder(inputs), projected)
    assert_close(encoder(inputs, head=False), bare)
    assert_close(encoder.encode(SENTENCES), bare.detach())


def test_every_trainable_parameter_gets_a_gradient() -> None:
    encoder = make_encoder().train()
    encoder(encoder.tokenize(SENTENCES)).square().sum().backward()
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert "head.0.weight" in trainable
    assert not any("pooler" in name for name in trainable)
    assert [name for name, p in trainable.items() if p.grad is None] == []


def test_truncation() -> None:
    encoder = make_encoder(max_length=5)
    long = "the cat sat on the mat far far"
    assert encoder.tokenize([long])["input_ids"].shape == (1, 5)
    assert encoder.tokenize([long], max_length=4)["input_ids"].shape == (1, 4)
    assert_close(encoder.encode([long]), encoder.encode(["the cat sat"]))
    assert make_encoder().max_length == 24
    assert make_encoder().encode(["far " * 100]).isfinite().all()


def test_roberta_positions_leave_room_for_the_padding_offset() -> None:
    config = RobertaConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=14,
        pad_token_id=1,
    )
    encoder = SentenceEncoder(RobertaModel(config), make_tokenizer(pad_token="[UNK]"))
    assert encoder.max_length == encoder.longest_input == 12
    assert encoder.encode(["far " * 30]).shape == (1, 16)


def test_bad_arguments() -> None:
    encoder = make_encoder()
    with pytest.raises(
        ValueError, match=r"^pooling: expected one of 'cls', 'cls-before-pooler', 'mean', .*'max'$"
    ):
        SentenceEncoder(encoder.transformer, encoder.tokenizer, pooling="max")
    for length in (25, 2):
        with pytest.raises(
            ValueError, match=f"^max_length: expected 3 to 24 tokens for this model, got {length}$"
        ):
            SentenceEncoder(encoder.transformer, encoder.tokenizer, max_length=length)
    with pytest.raises(TypeError, match=r"^max_length: expected an integer, got float 8.7$"):
        SentenceEncoder(encoder.transformer, encoder.tokenizer, max_length=8.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with a padding token"):
        SentenceEncoder(encoder.transformer, make_tokenizer(pad_token=None))
    with pytest.raises(ValueError, match=r"^sentences: expected a list of strings, got one string"):
        encoder.encode("the dog ran")
    with pytest.raises(ValueError, match=r"^sentences: expected strings, got NoneType at index 1$"):
        encoder.encode(["the dog", None])
    with pytest.raises(ValueError, match=r"^sentences: expected at least one"):
        encoder.tokenize([])
    with pytest.raises(ValueError, match=r"^batch_size: expected at least 1, got 0$"):
        encoder.encode(SENTENCES, batch_size=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encode_computes_in_the_dtype_it_is_told(dtype: torch.dtype) -> None:
    encoder = make_encoder(pooling="mean")
    dtypes: set[torch.dtype] = set()
    query = encoder.transformer.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    expected = encoder.encode(SENTENCES)
    dtypes.clear()
    with torch.autocast("cpu", dtype=torch.float16):  # the caller's, which does not count
        vectors = encoder.encode(SENTENCES, dtype=dtype)
    assert dtypes == {dtype}
    assert vectors.dtype == torch.float32
    assert_close(vectors, expected, 0.2 if dtype == torch.bfloat16 else 1e-4)
    with pytest.raises(ValueError, match=r"^dtype: expected float32, bfloat16 or float16, got torch.int64$"):
        encoder.encode(SENTENCES, dtype=torch.int64)
