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


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


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
    ["auto", ("[X] : [MASK]",), ('"[X]" [MASK].', "This [X] means [MASK].")],
    ids=["auto", "1", "2"],
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


@cases(
    "settings error words",
    [
        ({"pad_to_multiple_of": 0}, ValueError, r"^pad_to_multiple_of: expected at least 1, got 0$"),
        ({"max_length": "8"}, TypeError, r"^max_length: expected an integer, got str '8'$"),
        ({"max_length": 100}, ValueError, r"^max_length: expected"),
    ],
)
def test_settings_of_views_that_mean_nothing(settings: dict, error: type[Exception], words: str) -> None:
    for encoder in (PLAIN, PROMPT):
        with pytest.raises(error, match=words):
            encoder.view_tokenizer(**settings)


def test_training_views_get_no_period_and_evaluation_does() -> None:
    encoder = make_prompted(max_length=8)
    view, evaluation = encoder.view_tokenizer()([("the dog ran",)]), encoder.tokenize(["the dog ran"])
    assert len(ids_of(view)[0]) + 1 == len(ids_of(evaluation)[0])


@pytest.mark.parametrize("encoder", [PLAIN, PROMPT], ids=["plain", "prompt"])
def test_max_length_and_padding(encoder: SentenceEncoder) -> None:
    inputs = encoder.view_tokenizer(max_length=4, pad_to_multiple_of=8)([("the cat sat on the mat", "bird")])
    assert inputs["input_ids"].shape[1] % 8 == 0
    assert max(map(len, ids_of(inputs))) == encoder.template_length + 4
    # Right-padded: nothing of a row behind its padding.
    assert inputs["attention_mask"].diff(dim=1).max() == 0


# A spawned process, which loads everything again, for the kind that has more to be sent to it.
@pytest.mark.parametrize(("encoder", "start"), [(PLAIN, "fork"), (PROMPT, "fork"), (PROMPT, "spawn")])
def test_workers_give_what_this_process_gives(encoder: SentenceEncoder, start: str) -> None:
    views = encoder.view_tokenizer(max_length=6)
    rows = [(sentence,) for sentence in SENTENCES[:6]]
    options = {"collate_fn": views, "num_workers": 1, "multiprocessing_context": start}
    one, two = DataLoader(rows, batch_size=3, **options)  # type: ignore[arg-type, misc]
    assert_same(one, views(rows[:3]))
    assert_same(two, views(rows[3:]))


def test_it_pickles_without_the_model() -> None:
    views = make_prompted("roberta", denoising="frozen").view_tokenizer()
    pickled = pickle.dumps(views)
    assert b"transformers.models" not in pickled
    assert b"torch" not in pickled
    assert_same(pickle.loads(pickled)(TRIPLES), views(TRIPLES))


@cases(
    "rows words",
    [
        (None, "^rows: expected tuples of texts, got NoneType$"),
        ([], "^rows: expected at least one, got an empty list$"),
        (["the dog"], "^rows: expected tuples of one to three texts, got str at index 0$"),
        ([("a",), ()], "^rows: expected tuples of one to three texts, got 0 texts at index 1$"),
        ([("a", "b", "c", "d")], "got 4 texts at index 0$"),
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
        (make_kind, "bert", {"pooling": "cls"}),
        (make_kind, "bert", {"pooling": "mean-first-last"}),
        (make_kind, "roberta", {"pooling": "mean"}),
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


def test_small_batches_equal_lengths_and_rows_padded_on_the_left_pass_at_once():
    seen = []
    long, short = torch.ones(4096, 8, dtype=torch.int64), torch.ones(5, 8, dtype=torch.int64).tril()
    left = torch.ones(4096, 8, dtype=torch.int64)
    left[:2048, :-1] = 0
    for mask in (long, short, left):
        map_groups(lambda part: seen.append(part) or part["attention_mask"], {"attention_mask": mask})
    assert [part["attention_mask"].shape for part in seen] == [(4096, 8), (5, 8), (4096, 8)]


def test_rows_without_a_token_and_entries_of_one_dimension(monkeypatch):
    monkeypatch.setattr(module, "LEAST_TOKENS", 1)
    mask = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])

    def encode(part):
        assert part["attention_mask"].shape[1] >= 1
        return part["template"] * 10 + part["attention_mask"].sum(dim=1)

    found = map_groups(encode, {"attention_mask": mask, "template": torch.arange(4)})
    assert found.tolist() == [0, 13, 21, 30]
