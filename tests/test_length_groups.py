"""Rows of like length pass the transformer together: the same embeddings and gradients, less padding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_close, assert_gradients_close
from tiny_prompt import make_kind, make_prompted, without_dropout

from clusterns.models import length_groups as module
from clusterns.models.length_groups import LEAST_SHARE, length_groups, map_groups

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
