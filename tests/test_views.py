"""Rows of text to the token ids of their views: order, templates, truncation, worker processes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from tiny import SENTENCES, assert_close, make_encoder
from tiny_prompt import make_kind, make_prompted
from torch.utils.data import DataLoader

from clusterns.encoder import SentenceEncoder
from clusterns.models.views import ViewTokenizer

TRIPLES = [(SENTENCES[i], SENTENCES[i + 1], SENTENCES[i + 2]) for i in range(4)]


def ids_of(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Token ids of each row, without padding."""
    return [
        ids[: int(mask.sum())].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_views_of_plain_rows(columns: int) -> None:
    encoder = make_kind("bert", max_length=5)
    rows = [row[:columns] for row in TRIPLES]
    inputs = encoder.view_tokenizer()(rows)
    views = max(columns, 2)
    texts = [row[min(view, columns - 1)] for view in range(views) for row in rows]
    expected = [encoder.tokenizer(text, truncation=True, max_length=5)["input_ids"] for text in texts]
    assert ids_of(inputs) == expected
    assert {value.shape for value in inputs.values()} == {(views * len(rows), 5)}
    assert {value.dtype for value in inputs.values()} == {torch.int64}
    assert "template" not in inputs
    with torch.no_grad():
        assert_close(encoder(inputs), encoder.encode(texts))


@pytest.mark.parametrize(
    "templates", ["auto", ("[X] : [MASK]",), ('"[X]" [MASK].', "This [X] means [MASK].")]
)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_views_in_prompts(columns: int, kind: str, templates: Any) -> None:
    encoder = make_prompted(kind, max_length=5, templates=templates)
    rows = [row[:columns] for row in TRIPLES]
    inputs = encoder.view_tokenizer()(rows)
    assert encoder.prompt is not None
    last = len(encoder.prompt.templates) - 1
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
            begin, end = encoder.tokenizer("")["input_ids"]
            expected.append([begin, *ids[0], *ids[1][:5], *ids[2], end])
            numbers.append(number)
    assert ids_of(inputs) == expected
    assert inputs["template"].tolist() == numbers
    assert {len(value) for value in inputs.values()} == {len(numbers)}
    assert {value.dtype for value in inputs.values()} == {torch.int64}


def test_rows_may_come_one_after_the_other() -> None:
    views = make_kind("bert").view_tokenizer()
    assert ids_of(views(row for row in TRIPLES)) == ids_of(views(TRIPLES))


def test_settings_of_views_that_mean_nothing() -> None:
    encoder = make_kind("bert")
    with pytest.raises(ValueError, match=r"^pad_to_multiple_of: expected at least 1, got 0$"):
        encoder.view_tokenizer(pad_to_multiple_of=0)
    with pytest.raises(TypeError, match=r"^max_length: expected an integer, got str '8'$"):
        encoder.view_tokenizer(max_length="8")
    with pytest.raises(ValueError, match=r"^rows: expected tuples of texts, got NoneType$"):
        encoder.view_tokenizer()(None)


def test_training_views_get_no_period_and_evaluation_does() -> None:
    encoder = make_prompted(max_length=8)
    view, evaluation = encoder.view_tokenizer()([("the dog ran",)]), encoder.tokenize(["the dog ran"])
    assert len(ids_of(view)[0]) + 1 == len(ids_of(evaluation)[0])


@pytest.mark.parametrize("encoder", [make_kind("bert"), make_prompted("roberta")], ids=["plain", "prompt"])
def test_max_length_and_padding(encoder: SentenceEncoder) -> None:
    views = encoder.view_tokenizer(max_length=4, pad_to_multiple_of=8)
    inputs = views([("the cat sat on the mat", "bird")])
    assert inputs["input_ids"].shape[1] % 8 == 0
    longest = encoder.template_length + 4
    assert max(map(len, ids_of(inputs))) == longest
    # Right-padded: nothing of a row behind its padding.
    assert inputs["attention_mask"].diff(dim=1).max() == 0
    with pytest.raises(ValueError, match=r"^max_length: expected"):
        encoder.view_tokenizer(max_length=100)


PLAIN, PROMPT = make_kind("bert"), make_prompted("roberta")


# A spawned process, which loads everything again, for the kind that has more to be sent to it.
@pytest.mark.parametrize(("encoder", "start"), [(PLAIN, "fork"), (PROMPT, "fork"), (PROMPT, "spawn")])
def test_workers_give_what_this_process_gives(encoder: SentenceEncoder, start: str) -> None:
    views = encoder.view_tokenizer(max_length=6)
    rows = [(sentence,) for sentence in SENTENCES[:6]]
    loader: DataLoader = DataLoader(
        rows,
        batch_size=3,
        collate_fn=views,
        num_workers=1,
        multiprocessing_context=start,  # type: ignore[arg-type]
    )
    batches = list(loader)
    assert len(batches) == 2
    for batch, start_row in zip(batches, (0, 3), strict=True):
        expected = views(rows[start_row : start_row + 3])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_it_pickles_without_the_model() -> None:
    encoder = make_prompted("roberta", denoising="frozen")
    views = encoder.view_tokenizer()
    pickled = pickle.dumps(views)
    assert b"transformers.models" not in pickled
    assert b"torch" not in pickled
    again = pickle.loads(pickled)
    expected = views(TRIPLES)
    assert all(torch.equal(value, expected[name]) for name, value in again(TRIPLES).items())


def test_rows_split_anywhere_give_the_same_embeddings() -> None:
    encoder = make_prompted("roberta", denoising="trained", evaluation_denoising=True)
    inputs = encoder.view_tokenizer()(TRIPLES)
    with torch.no_grad():
        whole = encoder(inputs)
        for size in (1, 5):
            parts = [
                encoder({name: value[start : start + size] for name, value in inputs.items()})
                for start in range(0, len(whole), size)
            ]
            assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "^rows: expected at least one, got an empty list$"),
        (["the dog"], "^rows: expected tuples of one to three texts, got str at index 0$"),
        ([("a",), ()], "^rows: expected tuples of one to three texts, got 0 texts at index 1$"),
        ([("a", "b", "c", "d")], "got 4 texts at index 0$"),
        ([("a",), ("a", "b")], "^rows: expected 1 texts as in the first, got 2 at index 1$"),
        ([("a", None)], "^rows: expected strings, got NoneType at index 0$"),
    ],
)
def test_bad_rows(rows: Any, words: str) -> None:
    encoder = make_encoder()
    views = ViewTokenizer(encoder.tokenizer, max_length=8)
    with pytest.raises(ValueError, match=words):
        views(rows)
