"""Saved encoders of every pooling, head and prompt: read back, overridden, elsewhere, broken, cut short."""

from __future__ import annotations

import json
import os
import resource
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import MultipleNegativesRankingLoss
from small_files import cases
from tiny import SENTENCES, assert_close, make_encoder
from tiny_prompt import make_kind, make_prompted

from clusterns.encoder import SentenceEncoder
from clusterns.models.folder import HUB_FILES
from clusterns.models.pooling import POOLINGS, Pooling
from clusterns.models.prompts import PUBLISHED, Prompt
from clusterns.sentence_transformers_modules import PromptEncoder
from clusterns.training.config import TrainConfig
from clusterns.training.task import Task, prepare_encoder

TEXTS = [*SENTENCES, "the cat sat on the mat far far far home home", " the cat ", "a [MASK] cat", "far?"]
ENCODERS: dict[str, dict[str, Any]] = {
    **{name: {"pooling": name} for name, of in POOLINGS.items() if not of.of_prompt},
    **{name: {"pooling": name, "prompt": Prompt()} for name, of in POOLINGS.items() if of.of_prompt},
    "new, head always": {"pooling": "new", "head": "always"},
    "mean, no head": {"pooling": "mean", "head": "none"},
    "mean-top2, head always": {"pooling": "mean-top2", "head": "always"},
    "prompt": {"prompt": Prompt(denoising="trained")},
    "prompt, head always": {"prompt": Prompt(), "head": "always"},
    "prompt, no period": {"prompt": Prompt(append_period=False)},
    "custom prompt": {"prompt": Prompt(("[MASK] of [X] .", '"[X]" means <mask>'), denoising="frozen")},
    "denoised": {"prompt": Prompt(denoising="frozen", evaluation_denoising=True)},
}


def largest(states: torch.Tensor, mask: torch.Tensor, mask_index: torch.Tensor | None) -> torch.Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(dim=1)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(words: str, name: str | Path, **settings: Any) -> None:
    with pytest.raises((ValueError, OSError), match=words) as caught:
        SentenceEncoder.from_pretrained(name, **settings)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bert", name) for name in ENCODERS]
    + [("roberta", name) for name in ("mean-first-last", "prompt", "custom prompt", "denoised")],
)
def test_saved_encoders_give_the_same_vectors(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a new pooling, which is one entry of the table."""
    monkeypatch.setitem(POOLINGS, "new", Pooling(largest, "max"))
    encoder = make_kind(kind, max_length=9, **ENCODERS[name])
    vectors = encoder.encode(TEXTS)
    assert (vectors[0] - vectors[1]).norm() > 0.01
    folder, theirs = tmp_path / "deep" / "model", tmp_path / "theirs"
    encoder.save(folder)
    assert os.listdir(folder.parent) == ["model"]

    again = SentenceEncoder.from_pretrained(folder)
    assert (again.settings(), again.training) == (encoder.settings(), False)
    assert_close(again.encode(TEXTS), vectors)
    assert again.tokenizer.tokenize("the cat") == encoder.tokenizer.tokenize("the cat")
    for part, other in zip(again.head or [], encoder.head or [], strict=True):
        assert all(torch.equal(*pair) for pair in zip(part.parameters(), other.parameters(), strict=True))

    denoised = encoder.prompt is not None and encoder.prompt.evaluation_denoising
    other = SentenceTransformer(str(folder), device="cpu", trust_remote_code=denoised)
    # The other library strips texts.
    texts = [text for text in TEXTS if encoder.prompt or kind == "bert" or text == text.strip()]
    assert_close(other.encode(texts, convert_to_tensor=True), encoder.encode(texts))
    # Nothing of ours is needed for that, but for denoising at evaluation.
    assert any(type(module).__module__.startswith("clusterns") for module in other) == denoised

    other.save(str(theirs))
    if (encoder.prompt and not denoised) or POOLINGS[encoder.pooling].layers:
        assert_refused("expected Transformer, Pooling, .* got W.*; give a pooling", theirs)
    else:
        assert (theirs / "clusterns.json").exists() == denoised
        read = SentenceEncoder.from_pretrained(theirs)
        assert read.max_length == 9
        assert_close(read.encode(texts), encoder.encode(texts))


def test_a_pooling_that_sentence_transformers_has_not_is_not_saved_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POOLINGS, "new", Pooling(largest, "median"))
    words = r"^pooling: expected one that sentence-transformers has too, 'cls' or .*, to save, got 'new'$"
    with pytest.raises(ValueError, match=words):
        make_kind("bert", pooling="new").save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    make_kind("bert").save(tmp_path)
    config = TrainConfig(model=str(tmp_path), pooling="new")
    with pytest.raises(ValueError, match=words):  # before the training, not after it
        prepare_encoder(config, Task(rows=[], dev=None))


def test_files_and_what_is_downloaded_of_them(tmp_path: Path) -> None:
    make_prompted("bert", denoising="trained").save(tmp_path)
    assert json.loads((tmp_path / "clusterns.json").read_text()) == {
        **{"format": 1, "pooling": "mask", "head": "train", "max_length": 6},
        "prompt": {
            "templates": list(PUBLISHED["bert"]),
            "denoising": "trained",
            "evaluation_denoising": False,
            "append_period": True,
        },
    }
    make_kind("bert", head="always").save(tmp_path)
    files = snapshot(tmp_path)
    assert {"tokenizer/tokenizer.json", "2_Dense/model.safetensors", "clusterns.json"} < files.keys()
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in HUB_FILES)] == []
    (tmp_path / "plain").write_text("")
    assert len({path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}) == 1  # the usual one


def test_saving_another_kind_over_a_prompt_model_leaves_nothing_of_it(tmp_path: Path) -> None:
    make_prompted("roberta").save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for settings in ({"pooling": "mean", "head": "always"}, {"pooling": "mean-top2"}, {"pooling": "cls"}):
        encoder = make_kind("bert", max_length=9, **settings)
        encoder.save(tmp_path)
        for other in (
            SentenceEncoder.from_pretrained(tmp_path),
            SentenceTransformer(str(tmp_path), device="cpu"),
        ):
            assert_close(torch.as_tensor(other.encode(TEXTS)), encoder.encode(TEXTS))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overriding_is_explicit(tmp_path: Path) -> None:
    def load(**settings: Any) -> SentenceEncoder:
        return SentenceEncoder.from_pretrained(tmp_path, **settings)

    encoder = make_prompted("bert", denoising="frozen")
    encoder.save(tmp_path)
    words = r"^pooling: expected 'mask' for a prompt model, got 'cls'; pass prompt='none'"
    assert_refused(words, tmp_path, pooling="cls")
    bare = load(pooling="mean", prompt="none")
    assert (bare.pooling, bare.prompt, bare.head_use) == ("mean", None, "train")
    plain = SentenceEncoder(encoder.transformer, encoder.tokenizer, pooling="mean")
    assert_close(bare.encode(TEXTS), plain.encode(TEXTS))
    assert load(prompt="none").pooling == "cls"
    assert load(prompt=PUBLISHED["bert"][1:]).prompt == Prompt(PUBLISHED["bert"][1:])
    denoised = load(evaluation_denoising=True, max_length=4)
    assert denoised.prompt == Prompt(PUBLISHED["bert"], denoising="frozen", evaluation_denoising=True)
    assert denoised.max_length == 4
    assert load(head="none").head is None

    plain.save(tmp_path)
    words = r"^evaluation_denoising: expected a prompt model, got one without"
    assert_refused(words, tmp_path, evaluation_denoising=True)
    prompted = load(prompt="auto", head="always")
    assert (prompted.pooling, prompted.head_use) == ("mask", "always")
    assert_close(prompted.head[0].weight, plain.head[0].weight)
    # A pooling of one's own has a head of its own.
    make_kind("bert", pooling="mean", head="always").save(tmp_path)
    assert load(pooling="mean").head_use == "always"
    assert load(pooling="cls-before-pooler").head_use == "none"
    assert load(pooling="cls").head_use == "train"
    words = r"^head: expected 'none' with the pooling cls-before-pooler"
    assert_refused(words, tmp_path, pooling="cls-before-pooler", head="always")
    # And one that is given overrides what is not supported.
    (tmp_path / "clusterns.json").unlink()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    assert_close(load(pooling="mean").encode(TEXTS), make_kind("bert", pooling="mean").encode(TEXTS))


def test_training_a_prompt_model_in_sentence_transformers(tmp_path: Path) -> None:
    encoder = make_prompted("bert", denoising="trained")
    model = SentenceTransformer(modules=[PromptEncoder(encoder)], device="cpu")
    assert model.max_seq_length == 6
    assert_close(model.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS))
    preprocess = getattr(model, "preprocess", None) or model.tokenize  # its name before version 5.4
    columns = [preprocess(SENTENCES[:4]), preprocess(SENTENCES[1:5])]
    MultipleNegativesRankingLoss(model)(columns, None).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    model.save(str(tmp_path))
    again = SentenceEncoder.from_pretrained(tmp_path)
    assert again.settings() == encoder.settings()
    loaded = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    for other in (again.encode(TEXTS), loaded.encode(TEXTS, convert_to_tensor=True)):
        assert_close(other, encoder.encode(TEXTS))
    loaded.max_seq_length = 3
    assert loaded[0].encoder.max_length == 3
    with pytest.raises(ValueError, match=r"^max_length: expected 1 to"):
        loaded.max_seq_length = 300


def test_a_folder_of_transformers_alone_means_cls_and_a_new_head_in_float32(tmp_path: Path) -> None:
    encoder = make_encoder()
    expected = encoder.encode(SENTENCES)
    encoder.tokenizer.save_pretrained(tmp_path)
    encoder.transformer.half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    loaded = SentenceEncoder.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.pooling == "cls"
    assert not torch.equal(loaded.head[0].weight, encoder.head[0].weight)
    assert_close(loaded.encode(SENTENCES), expected, 0.01)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_encoder().save(tmp_path / "model")
    return tmp_path / "model"


def test_failed_save_leaves_the_previous_model(saved: Path) -> None:
    """At the first file that is larger than the disk has room for."""
    before, limits = snapshot(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert (saved / "model.safetensors").stat().st_size > 9000
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        for folder in (saved, saved.parent / "fresh"):
            with pytest.raises(OSError, match="File too large"):
                make_encoder(seed=1, pooling="mean").save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(NotADirectoryError, match="expected a folder, got the file"):
        make_encoder().save(saved / "config.json")
    assert snapshot(saved) == before
    assert os.listdir(saved.parent) == ["model"]


def test_names_of_models(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub name in the local cache needs no network."""
    revision = "0" * 40
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(saved, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = SentenceEncoder.from_pretrained("someone/tiny")
    assert_close(loaded.encode(SENTENCES), make_encoder().encode(SENTENCES))
    assert_refused("does not exist", tmp_path / "absent")
    assert_refused("reachable hub name, got 'someone/nothing'", "someone/nothing")
    assert_refused("got the file", saved / "config.json")


LISTED = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
DENSE = {"type": "x.Dense", "path": "2_Dense"}
NOT_LOADED = "expected an encoder that transformers loads"
# What is done to a file of a kind of encoder: a change of what it says, other JSON, or None takes it away.
BROKEN = {
    "train model.safetensors": [([], NOT_LOADED), (None, "^model: expected weights")],
    "train config.json": [([], NOT_LOADED), (None, "^model: expected config.json")],
    "train tokenizer.json": [(None, "^model: expected tokenizer .*, got a folder without")],
    "train head.safetensors": [([], "expected a head of width 16")],
    "train sentence_bert_config.json": [({"max_seq_length": "32"}, "expected a whole number")],
    "train modules.json": [
        ([*LISTED, DENSE], "expected Transformer, Pooling to match .*, got Dense, Pooling, Transformer"),
    ],
    "train 1_Pooling/config.json": [
        ({"pooling_mode": "max"}, "expected the pooling cls or mean, got max"),
        ({"pooling_mode": "mean"}, "the pooling cls to match clusterns.json, got mean; give a pooling"),
    ],
    "prompt clusterns.json": [
        (None, "clusterns.json: expected the settings of a prompt model"),
        ({"format": 2}, "expected format 1, got 2; a newer clusterns"),
        ({"pooling": "max"}, "clusterns.json: pooling: expected one of 'cls', .*got 'max'"),
        ({"pooling": "cls"}, "clusterns.json: pooling: expected 'mask' for a prompt model, got 'cls'"),
        ({"prompt": {"templates": ["[MASK]"]}}, r"json: template: expected one \[X\] for the sentence"),
        ({"whitening": True}, "expected format, head, max_length, pooling, prompt, got 'whitening'"),
    ],
    "prompt tokenizer/tokenizer.json": [(None, "^model: expected tokenizer .* in .*tokenizer, got a folder")],
    "always head.safetensors": [(None, "^model: expected head.safetensors in")],
    "dense 2_Dense/config.json": [
        ({"activation_function": "torch.nn.Identity"}, "with bias and Tanh, got 16 to 16 with Identity"),
    ],
}


@cases("place change words", [(place, *row) for place, rows in BROKEN.items() for row in rows])
def test_broken_files(place: str, change: Any, words: str, tmp_path: Path) -> None:
    kind, file = place.split()
    if kind == "prompt":
        make_prompted(denoising="frozen", evaluation_denoising=True).save(tmp_path)
    else:
        make_kind("bert", head="train" if kind == "train" else "always").save(tmp_path)
    if kind == "dense":  # without what says that it has a head
        (tmp_path / "clusterns.json").unlink()
        assert SentenceEncoder.from_pretrained(tmp_path).head_use == "always"
    path = tmp_path / file
    if change is None:
        path.unlink()
    else:
        told = {**json.loads(path.read_text()), **change} if isinstance(change, dict) else change
        path.write_text(json.dumps(told))
    assert_refused(words, tmp_path)
    if kind == "always":
        assert SentenceEncoder.from_pretrained(tmp_path, head="always").head is not None


def test_missing_weights_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert_refused("got 1 missing, encoder.layer.1.output.dense.weight", saved)
