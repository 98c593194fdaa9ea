"""Which pooling a model is evaluated with: what its files say, or an error that asks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny import SENTENCES, assert_close, make_encoder

from clusterns.evaluation.evaluated_model import load_model

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
TEXTS = [sentence for sentence in SENTENCES if sentence]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_encoder(pooling="mean").save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def bare(saved: Path) -> Path:
    """The files that transformers alone writes."""
    folder = saved.parent / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, folder / name)
    return folder


def foreign(bare: Path, *, pooling: str = "mean", more: tuple = (), **settings: object) -> Path:
    """A folder as sentence-transformers saves it, without our own settings."""
    parts = [modules.Transformer(str(bare)), modules.Pooling(16, pooling), *(make() for make in more)]
    folder = bare.parent / "foreign"
    library.SentenceTransformer(modules=parts, device="cpu", **settings).save(str(folder))
    return folder


def library_vectors(folder: Path) -> torch.Tensor:
    return library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)


def test_a_bare_checkpoint_asks_for_the_pooling_and_takes_one_given(bare: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^model: expected files that state a pooling in .*bare, got none: "
    ):
        load_model(bare)
    for pooling in ("cls", "mean"):
        model = load_model(bare, pooling=pooling)
        assert (model.pooling, model.library) == (pooling, "clusterns")
        assert_close(model.encoder.encode(TEXTS), make_encoder(pooling=pooling).encode(TEXTS))


def test_a_saved_model_knows_its_pooling_and_is_not_truncated(saved: Path) -> None:
    make_encoder(pooling="mean", max_length=6).save(saved)
    assert load_model(saved)[1:] == ("mean", 24, False, "clusterns")
    assert load_model(saved, max_length=5).max_length == 5
    assert load_model(saved, pooling="cls").pooling == "cls"


def test_a_sentence_transformers_folder_knows_its_pooling(bare: Path) -> None:
    folder = foreign(bare, pooling="cls", more=(modules.Normalize,))
    model = load_model(folder)
    assert (model.pooling, model.library, model.normalized) == ("cls", "clusterns", True)
    vectors = torch.nn.functional.normalize(model.encoder.encode(TEXTS), dim=1)
    assert_close(vectors, library_vectors(folder))


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling": "max"}, "max"),
        ({"prompts": {"query": "the cat "}, "default_prompt_name": "query"}, "mean"),
        ({"more": (lambda: modules.Dense(16, 5),)}, "mean"),
    ],
    ids=["max", "prompt", "dense"],
)
def test_what_asks_for_more_is_run_by_sentence_transformers(settings: dict, pooling: str, bare: Path) -> None:
    folder = foreign(bare, **settings)
    model = load_model(folder)
    assert (model.pooling, model.library) == (pooling, "sentence-transformers")
    expected = library_vectors(folder)
    twice = model.encoder.encode([*TEXTS, *reversed(TEXTS)], batch_size=2)
    assert_close(twice, torch.cat([expected, expected.flip(0)]))
    # A given pooling takes the bare transformer.
    assert load_model(folder, pooling="cls").library == "clusterns"


def test_a_length_without_room_for_a_sentence_is_refused(bare: Path) -> None:
    """The tokenizers library would cut off nothing, and the whole text reach the model."""
    with pytest.raises(ValueError, match=r"^max_length: expected more than the 2 tokens that .*, got 2$"):
        load_model(foreign(bare, pooling="max"), max_length=2)


def test_lower_case_is_not_passed_over(bare: Path) -> None:
    folder = foreign(bare)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    model = load_model(folder, max_length=7)
    assert (model.library, model.max_length) == ("sentence-transformers", 7)
