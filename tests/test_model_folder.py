"""The encoder's files: in transformers and sentence-transformers, written whole or not, missing, broken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny import SENTENCES, assert_close, make_encoder
from transformers import AutoModel, AutoTokenizer

from clusterns.encoder import SentenceEncoder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_encoder().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_saved_encoder_gives_the_same_vectors_everywhere(pooling: str, tmp_path: Path) -> None:
    encoder = make_encoder(pooling=pooling, max_length=9)
    sentences = [*SENTENCES, "the cat sat on the mat far far far home home"]
    vectors = encoder.encode(sentences)
    encoder.save(tmp_path / "deep" / "model")
    folder = tmp_path / "deep" / "model"

    again = SentenceEncoder.from_pretrained(folder)
    assert (again.pooling, again.max_length, again.training) == (pooling, 9, False)
    assert_close(again.encode(sentences), vectors)
    assert torch.equal(again.head[0].weight, encoder.head[0].weight)
    assert torch.equal(again.head[0].bias, encoder.head[0].bias)

    other = SentenceTransformer(str(folder), device="cpu")
    assert other.max_seq_length == 9
    assert_close(other.encode(sentences, convert_to_tensor=True), vectors)

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    assert_close(pooled, vectors)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_what_sentence_transformers_writes_is_read(pooling: str, saved: Path, tmp_path: Path) -> None:
    make_encoder(pooling=pooling, max_length=7).save(saved)
    SentenceTransformer(str(saved), device="cpu").save(str(tmp_path / "other"))
    assert "pooling_mode" in json.loads((tmp_path / "other" / "1_Pooling" / "config.json").read_text())
    encoder = SentenceEncoder.from_pretrained(tmp_path / "other")
    assert (encoder.pooling, encoder.max_length) == (pooling, 7)
    assert SentenceEncoder.from_pretrained(tmp_path / "other", pooling="cls", max_length=5).max_length == 5


def test_plain_transformers_folder_means_cls_and_a_new_head(saved: Path) -> None:
    for name in ("modules.json", "sentence_bert_config.json", "head.safetensors"):
        (saved / name).unlink()
    encoder = SentenceEncoder.from_pretrained(saved)
    assert encoder.pooling == "cls"
    assert not torch.equal(encoder.head[0].weight, make_encoder().head[0].weight)
    assert_close(encoder.encode(SENTENCES), make_encoder().encode(SENTENCES))


def test_half_precision_checkpoint_is_loaded_in_float32(saved: Path) -> None:
    encoder = make_encoder()
    encoder.transformer.half().save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float16"
    loaded = SentenceEncoder.from_pretrained(saved)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_save_replaces_the_model_and_keeps_other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    second = make_encoder(seed=1, pooling="mean")
    second.save(saved)
    assert_close(SentenceEncoder.from_pretrained(saved).encode(SENTENCES), second.encode(SENTENCES))
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("failing", ["model", "tokenizer", "head", "json"])
def test_failed_save_leaves_the_previous_model(
    failing: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, expected = snapshot(saved), make_encoder().encode(SENTENCES)
    second = make_encoder(seed=1, pooling="mean")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    place, name = {
        "model": (second.transformer, "save_pretrained"),
        "tokenizer": (second.tokenizer, "save_pretrained"),
        "head": ("clusterns.models.saving.save_file", None),
        "json": ("clusterns.models.saving.write_json", None),
    }[failing]
    if name is None:
        monkeypatch.setattr(place, fail)
    else:
        monkeypatch.setattr(place, name, fail)
    with pytest.raises(OSError, match="No space left"):
        second.save(saved)
    with pytest.raises(OSError, match="No space left"):
        second.save(saved.parent / "fresh")
    assert snapshot(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert_close(SentenceEncoder.from_pretrained(saved).encode(SENTENCES), expected)


def test_a_real_write_error_leaves_the_previous_model(saved: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits, which stand in for a full disk")
    before, second = snapshot(saved), make_encoder(seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert (saved / "model.safetensors").stat().st_size > 9000
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            second.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(saved) == before
    assert os.listdir(saved.parent) == ["model"]


def test_saved_files_have_the_usual_permissions(saved: Path) -> None:
    (saved / "plain").write_text("")
    usual = (saved / "plain").stat().st_mode
    assert {path.name: path.stat().st_mode for path in saved.rglob("*") if path.is_file()} == {
        path.name: usual for path in saved.rglob("*") if path.is_file()
    }


def test_hub_name_in_the_local_cache_needs_no_network(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(saved, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_close(
        SentenceEncoder.from_pretrained("someone/tiny").encode(SENTENCES), make_encoder().encode(SENTENCES)
    )


def assert_one_line_error(kind: type[Exception], words: str, name: str | Path, **kwargs: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        SentenceEncoder.from_pretrained(name, **kwargs)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_models(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_one_line_error(FileNotFoundError, "does not exist", tmp_path / "absent")
    assert_one_line_error(FileNotFoundError, "reachable hub name, got 'someone/nothing'", "someone/nothing")
    assert_one_line_error(ValueError, "got the file", saved / "config.json")
    for missing, words in (
        ("tokenizer.json", "expected tokenizer"),
        ("model.safetensors", "expected weights"),
        ("config.json", "expected config.json"),
    ):
        (saved / missing).unlink()
        assert_one_line_error(FileNotFoundError, words, saved)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0broken", "expected an encoder that transformers loads"),
        ("config.json", b"{", "expected an encoder that transformers loads"),
        ("head.safetensors", b"broken", "expected a head of width 16"),
        ("modules.json", b"[{]", "modules.json: expected JSON"),
        ("modules.json", b'[{"path": ""}]', "expected a list of modules"),
        ("modules.json", b'[{"type": "x.Dense", "path": "2_Dense"}]', "got Dense"),
        (
            "1_Pooling/config.json",
            b'{"pooling_mode_max_tokens": true}',
            "expected the pooling cls or mean, got max",
        ),
        ("1_Pooling/config.json", b'{"pooling_mode": ["cls", "mean"]}', "got cls and mean"),
        ("1_Pooling/config.json", b"{}", "got none"),
        ("sentence_bert_config.json", b'{"max_seq_length": "32"}', "expected a whole number"),
    ],
)
def test_broken_files(file: str, content: bytes, words: str, saved: Path) -> None:
    (saved / file).write_bytes(content)
    assert_one_line_error(ValueError, words, saved)


def test_a_given_pooling_overrides_an_unsupported_one(saved: Path) -> None:
    (saved / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    expected = make_encoder(pooling="mean").encode(SENTENCES)
    assert_close(SentenceEncoder.from_pretrained(saved, pooling="mean").encode(SENTENCES), expected)


def test_incomplete_weights_and_a_foreign_head_are_refused(saved: Path) -> None:
    save_file({"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}, saved / "head.safetensors")
    assert_one_line_error(ValueError, "expected a head of width 16", saved)
    weights = load_file(saved / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert_one_line_error(ValueError, "got 1 missing, encoder.layer.1.output.dense.weight", saved)


def test_save_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="expected a folder, got the file"):
        make_encoder().save(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"
