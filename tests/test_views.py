"""Rows of text to the token ids of their views; rows of like length pass the transformer together."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_files import cases
from tiny import SENTENCES, assert_close, assert_gradients_close, make_encoder
from tiny_prompt import make_kind, make_prompted, without_dropout
from torch.utils.data import DataLoader

from clusterns.encoder import SentenceEncoder
from clusterns.models import length_groups as module
from clusterns.models.length_groups import LEAST_SHARE, length_groups, map_groups
from clusterns.models.views import ViewTokenizer

TRIPLES = [(SENTENCES[i], SENTENCES[i + 1], SENTENCES[i + 2]) for i in range(4)]
PLAIN, PROMPT = make_kind("bert"), make_prompted("roberta")


def ids_of(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Token ids of each row, without padding."""
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return [ids[:length].tolist() for ids, length in zip(inputs["input_ids"], lengths, strict=True)]


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_views_of_plain_rows(columns: int) -> None:
    encoder = make_kind("bert", max_length=5)
    rows = [row[:columns] for row in TRIPLES]
    inputs = encoder.view_tokenizer()(row for row in rows)  # which may come one after the other
    views = max(columns, 2)
    texts = [row[min(view, columns - 1)] for view in range(views) for row in rows]
    expected = [encoder.tokenizer(text, truncation=True, max_length=5)["input_ids"] for text in texts]
    assert ids_of(inputs) == expected
    assert {(value.shape, value.dtype) for value in inputs.values()} == {((views * 4, 5), torch.int64)}
    assert "template" not in inputs
    with torch.no_grad():
        assert_close(encoder(inputs), encoder.encode(texts))


@pytest.mark.parametrize(
    "templates",
    [("[X] : [MASK]",), ('"[X]" [MASK].', "This [X] means [MASK].")],
    ids=["1", "2"],
)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_views_in_prompts(columns: int, kind: str, templates: Any) -> None:
    encoder = make_prompted(kind, max_length=5, templates=templates)
    rows = [row[:columns] for row in TRIPLES]
    inputs = encoder.view_tokenizer()(rows)
    assert encoder.prompt is not None
    last = len(encoder.prompt.templates) - 1
    begin, end = encoder.tokenizer("")["input_ids"]
    expected, numbers = [], []
    for view in range(max(columns, 2)):
        number = 0 if view == 0 else last
        template = encoder.prompt.templates[number].replace("[MASK]", encoder.tokenizer.mask_token)
        before, after = template.split("[X]")
        space = before[len(before.rstrip()) :]
        for row in rows:
            text = row[min(view, columns - 1)]
            pieces = [before.rstrip(), space + text if text else "", after]
            ids = [encoder.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
            expected.append([begin, *ids[0], *ids[1][:5], *ids[2], end])
            numbers.append(number)
    assert ids_of(inputs) == expected
    assert inputs["template"].tolist() == numbers
    assert {(len(value), value.dtype) for value in inputs.values()} == {(len(numbers), torch.int64)}


@pytest.mark.parametrize("encoder", [PLAIN, PROMPT], ids=["plain", "prompt"])
def test_max_length_and_padding(encoder: SentenceEncoder) -> None:
    inputs = encoder.view_tokenizer(max_length=4, pad_to_multiple_of=8)([("the cat sat on the mat", "bird")])
    assert inputs["input_ids"].shape[1] % 8 == 0
    assert max(map(len, ids_of(inputs))) == encoder.template_length + 4
    # Right-padded: nothing of a row behind its padding.
    assert inputs["attention_mask"].diff(dim=1).max() == 0
    with pytest.raises(ValueError, match="^max_length: expected"):
        encoder.view_tokenizer(max_length=100)
    # A prompt's period is for evaluation alone.
    view, evaluation = encoder.view_tokenizer()([("the dog",)]), encoder.tokenize(["the dog"])
    assert len(ids_of(view)[0]) + (encoder is PROMPT) == len(ids_of(evaluation)[0])


@pytest.mark.parametrize("encoder", [PLAIN, PROMPT], ids=["plain", "prompt"])
def test_workers_give_what_this_process_gives(encoder: SentenceEncoder) -> None:
    """Forked ones, and with what is pickled for those that are spawned, nothing of the model."""
    views = encoder.view_tokenizer(max_length=6)
    pickled = pickle.dumps(views)
    assert b"torch" not in pickled
    rows = [(sentence,) for sentence in SENTENCES[:6]]
    options = {"num_workers": 1, "multiprocessing_context": "fork"}
    loader = DataLoader(rows, batch_size=6, collate_fn=pickle.loads(pickled), **options)
    (found,), expected = loader, views(rows)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@cases(
    "rows words",
    [
        ([], "^rows: expected at least one, got an empty list$"),
        ([("a",), ("a", "b")], "^rows: expected 1 texts as in the first, got 2 at index 1$"),
        ([("a", None)], "^rows: expected strings, got NoneType at index 0$"),
    ],
)
def test_bad_rows(rows: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ViewTokenizer(make_encoder().tokenizer, max_length=8)(rows)


WORDS = "the cat sat on the mat far far home a dog and a bird sat there".split()
ROWS = [(" ".join(WORDS[: 1 + (5 * i) % 14]),) for i in range(11)]


@given(st.lists(st.integers(0, 512), min_size=1, max_size=400))
def test_each_row_is_in_one_group_and_no_large_group_pads_much(lengths):
    groups = length_groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group, following in pairwise(groups):
        assert len(group) * lengths[group[0]] >= module.LEAST_TOKENS
        assert lengths[following[0]] < LEAST_SHARE * lengths[group[0]]
        assert min(lengths[row] for row in group) > lengths[following[0]]


@pytest.mark.parametrize(
    ("make", "kind", "settings"),
    [
        (make_kind, "bert", {"pooling": "mean-first-last"}),
        (make_kind, "roberta", {"pooling": "cls"}),
        (make_prompted, "bert", {"denoising": "trained"}),
        (make_prompted, "roberta", {}),
    ],
)
def test_groups_change_no_embedding_and_no_gradient(make, kind, settings, monkeypatch):
    monkeypatch.setattr(module, "LEAST_TOKENS", 1)
    encoder = without_dropout(make(kind, **settings))
    inputs = encoder.view_tokenizer()(ROWS)
    shapes = []
    encoder.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    upstream = torch.randn(2 * len(ROWS), encoder.embedding_dim)
    found = []
    for encoder.by_length in (False, True):
        encoder.zero_grad()
        embeddings = encoder(inputs)
        embeddings.backward(upstream)
        found.append((embeddings, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]))
    assert len(shapes) >= 3  # one pass, then several
    assert shapes[0] == tuple(inputs["input_ids"].shape)
    assert min(length for _, length in shapes) < shapes[0][1]
    (whole, expected), (grouped, gradients) = found
    assert len(expected) > 10
    assert_close(grouped, whole)
    assert_gradients_close(gradients, expected)


def test_rows_without_a_token(monkeypatch):
    monkeypatch.setattr(module, "LEAST_TOKENS", 1)
    mask = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])

    def encode(part):
        assert part["attention_mask"].shape[1] >= 1
        return part["template"] * 10 + part["attention_mask"].sum(dim=1)

    found = map_groups(encode, {"attention_mask": mask, "template": torch.arange(4)})
    assert found.tolist() == [0, 13, 21, 30]
