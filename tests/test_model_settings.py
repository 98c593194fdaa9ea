"""Saved encoders of every pooling, head and prompt: read back, overridden, and in sentence-transformers."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.training_args import SentenceTransformerTrainingArguments
from tiny import SENTENCES, assert_close, make_encoder
from tiny_prompt import make_kind, make_prompted
from transformers import AutoModel, AutoTokenizer

from clusterns.encoder import SentenceEncoder
from clusterns.models.folder import HUB_FILES
from clusterns.models.pooling import POOLINGS, Pooling
from clusterns.models.prompts import PUBLISHED, Prompt

TEXTS = [*SENTENCES, "the cat sat on the mat far far far home home", " the cat ", "a [MASK] cat", "far?"]
ENCODERS: dict[str, dict[str, Any]] = {
    **{name: {"pooling": name} for name, of in POOLINGS.items() if not of.of_prompt},
    **{name: {"pooling": name, "prompt": Prompt()} for name, of in POOLINGS.items() if of.of_prompt},
    "cls, head always": {"pooling": "cls", "head": "always"},
    "mean, head always": {"pooling": "mean", "head": "always"},
    "mean, no head": {"pooling": "mean", "head": "none"},
    "mean-top2, head always": {"pooling": "mean-top2", "head": "always"},
    "prompt": {"prompt": Prompt(denoising="trained")},
    "prompt, head always": {"prompt": Prompt(), "head": "always"},
    "prompt, no period": {"prompt": Prompt(append_period=False)},
    "custom prompt": {"prompt": Prompt(("[MASK] of [X] .", '"[X]" means <mask>'), denoising="frozen")},
    "denoised": {"prompt": Prompt(denoising="frozen", evaluation_denoising=True)},
}


def trusts(encoder: SentenceEncoder) -> bool:
    return encoder.prompt is not None and encoder.prompt.evaluation_denoising


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bert", name) for name in ENCODERS]
    + [("roberta", name) for name in ("mean-first-last", "prompt", "custom prompt", "denoised")],
)
def test_saved_encoders_give_the_same_vectors(kind: str, name: str, tmp_path: Path) -> None:
    encoder = make_kind(kind, max_length=9, **ENCODERS[name])
    vectors = encoder.encode(TEXTS)
    assert (vectors[0] - vectors[1]).norm() > 0.01
    encoder.save(tmp_path)

    again = SentenceEncoder.from_pretrained(tmp_path)
    assert again.settings() == encoder.settings()
    assert_close(again.encode(TEXTS), vectors)
    assert [str(token) for token in again.tokenizer.tokenize("the cat")] == encoder.tokenizer.tokenize(
        "the cat"
    )

    other = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=trusts(encoder))
    texts = TEXTS
    if kind == "roberta" and encoder.prompt is None:
        texts = [text for text in TEXTS if text == text.strip()]  # which sentence-transformers strips
    assert_close(other.encode(texts, convert_to_tensor=True), encoder.encode(texts))
    # Nothing of ours is needed for that, but for denoising at evaluation.
    ours = any(type(module).__module__.startswith("clusterns") for module in other)
    assert ours == trusts(encoder)


def largest(states: torch.Tensor, mask: torch.Tensor, mask_index: torch.Tensor | None) -> torch.Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(dim=1)


def test_a_new_pooling_is_one_entry_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POOLINGS, "new", Pooling(largest, "max"))
    make_kind("bert", pooling="new").save(tmp_path / "ours")
    encoder = SentenceEncoder.from_pretrained(tmp_path / "ours")
    assert encoder.pooling == "new"
    other = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert_close(other.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS))
    other.save(str(tmp_path / "theirs"))
    again = SentenceEncoder.from_pretrained(tmp_path / "theirs")
    assert again.pooling == "new"
    assert_close(again.encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("mode", [None, "median"])
def test_a_pooling_that_sentence_transformers_has_not_is_not_saved_as_another(
    mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POOLINGS, "new", Pooling(largest, mode))
    words = r"^pooling: expected one to save that sentence-transformers has too, 'cls' or .*, got 'new'$"
    with pytest.raises(ValueError, match=words):
        make_kind("bert", pooling="new").save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_model_in_plain_transformers(tmp_path: Path) -> None:
    encoder = make_prompted("roberta", denoising="frozen", max_length=5)
    encoder.save(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    place = tokens["input_ids"] == tokenizer.mask_token_id
    assert place.sum(dim=1).tolist() == [1] * len(TEXTS)
    with torch.no_grad():
        assert_close(model(**tokens).last_hidden_state[place], encoder.encode(TEXTS))


def test_what_is_read_is_downloaded(tmp_path: Path) -> None:
    make_prompted("bert").save(tmp_path)
    make_kind("bert", head="always").save(tmp_path)
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert {"tokenizer/tokenizer.json", "2_Dense/model.safetensors", "clusterns.json"} < set(files)
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in HUB_FILES)] == []


def test_settings_file(tmp_path: Path) -> None:
    make_prompted("bert", denoising="trained").save(tmp_path)
    assert json.loads((tmp_path / "clusterns.json").read_text()) == {
        "format": 1,
        "pooling": "mask",
        "head": "train",
        "prompt": {
            "templates": list(PUBLISHED["bert"]),
            "denoising": "trained",
            "evaluation_denoising": False,
            "append_period": True,
        },
        "max_length": 6,
    }


def test_saving_another_kind_over_a_prompt_model_leaves_nothing_of_it(tmp_path: Path) -> None:
    make_prompted("roberta").save(tmp_path)
    for settings in ({"pooling": "mean", "head": "always"}, {"pooling": "mean-top2"}, {"pooling": "cls"}):
        encoder = make_kind("bert", max_length=9, **settings)
        encoder.save(tmp_path)
        assert_close(SentenceEncoder.from_pretrained(tmp_path).encode(TEXTS), encoder.encode(TEXTS))
        other = SentenceTransformer(str(tmp_path), device="cpu")
        assert_close(other.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS))


def test_overriding_is_explicit(tmp_path: Path) -> None:
    encoder = make_prompted("bert", denoising="frozen")
    encoder.save(tmp_path)
    with pytest.raises(
        ValueError, match=r"^pooling: expected 'mask' for a prompt model, got 'cls'; pass prompt='none'"
    ):
        SentenceEncoder.from_pretrained(tmp_path, pooling="cls")
    bare = SentenceEncoder.from_pretrained(tmp_path, pooling="mean", prompt="none")
    assert (bare.pooling, bare.prompt, bare.head_use) == ("mean", None, "train")
    plain = SentenceEncoder(encoder.transformer, encoder.tokenizer, pooling="mean")
    assert_close(bare.encode(TEXTS), plain.encode(TEXTS))
    assert SentenceEncoder.from_pretrained(tmp_path, prompt="none").pooling == "cls"

    second = SentenceEncoder.from_pretrained(tmp_path, prompt=PUBLISHED["bert"][1:])
    assert second.prompt == Prompt(PUBLISHED["bert"][1:])
    assert (second.encode(TEXTS) - encoder.encode(TEXTS)).norm() > 0.01
    denoised = SentenceEncoder.from_pretrained(tmp_path, evaluation_denoising=True, max_length=4)
    assert denoised.prompt == Prompt(PUBLISHED["bert"], denoising="frozen", evaluation_denoising=True)
    assert denoised.max_length == 4
    assert SentenceEncoder.from_pretrained(tmp_path, head="none").head is None

    plain.save(tmp_path)
    with pytest.raises(ValueError, match=r"^evaluation_denoising: expected a prompt model, got one without"):
        SentenceEncoder.from_pretrained(tmp_path, evaluation_denoising=True)
    prompted = SentenceEncoder.from_pretrained(tmp_path, prompt="auto", head="always")
    assert (prompted.pooling, prompted.head_use) == ("mask", "always")
    assert_close(prompted.head[0].weight, plain.head[0].weight)


def test_a_pooling_of_ones_own_has_a_head_of_its_own(tmp_path: Path) -> None:
    make_kind("bert", pooling="cls-before-pooler").save(tmp_path)
    assert SentenceEncoder.from_pretrained(tmp_path).head_use == "none"
    assert SentenceEncoder.from_pretrained(tmp_path, pooling="cls").head_use == "train"
    make_kind("bert", pooling="mean", head="always").save(tmp_path)
    assert SentenceEncoder.from_pretrained(tmp_path, pooling="mean").head_use == "always"
    assert SentenceEncoder.from_pretrained(tmp_path, pooling="cls-before-pooler").head_use == "none"
    with pytest.raises(ValueError, match=r"^head: expected 'none' with the pooling cls-before-pooler"):
        SentenceEncoder.from_pretrained(tmp_path, pooling="cls-before-pooler", head="always")


@pytest.mark.parametrize("name", ["mean, head always", "cls"])
def test_what_sentence_transformers_saves_of_them_is_read(name: str, tmp_path: Path) -> None:
    encoder = make_kind("bert", max_length=9, **ENCODERS[name])
    encoder.save(tmp_path / "ours")
    SentenceTransformer(str(tmp_path / "ours"), device="cpu").save(str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs" / "clusterns.json").exists()
    again = SentenceEncoder.from_pretrained(tmp_path / "theirs")
    assert (again.pooling, again.max_length) == (encoder.pooling, 9)
    assert_close(again.encode(TEXTS), encoder.encode(TEXTS))


def test_what_sentence_transformers_saves_of_a_prompt_is_refused_and_not_misread(tmp_path: Path) -> None:
    make_prompted().save(tmp_path / "ours")
    SentenceTransformer(str(tmp_path / "ours"), device="cpu").save(str(tmp_path / "theirs"))
    with pytest.raises(
        ValueError, match=r"expected Transformer, Pooling, .* got WordWeights; give a pooling"
    ):
        SentenceEncoder.from_pretrained(tmp_path / "theirs")


def test_training_a_prompt_model_in_sentence_transformers(tmp_path: Path) -> None:
    from clusterns.sentence_transformers_modules import PromptEncoder

    encoder = make_prompted("bert", denoising="trained")
    model = SentenceTransformer(modules=[PromptEncoder(encoder)], device="cpu")
    assert model.max_seq_length == 6
    before = encoder.encode(TEXTS)
    assert_close(model.encode(TEXTS, convert_to_tensor=True), before)
    columns = {"anchor": SENTENCES[:4], "positive": SENTENCES[1:5]}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    after = model.encode(TEXTS, convert_to_tensor=True)
    assert (after - before).norm() > 0.1
    model.save(str(tmp_path / "trained"))
    again = SentenceEncoder.from_pretrained(tmp_path / "trained")
    assert again.settings() == encoder.settings()
    assert_close(again.encode(TEXTS), after.cpu())
    loaded = SentenceTransformer(str(tmp_path / "trained"), device="cpu", trust_remote_code=True)
    assert_close(loaded.encode(TEXTS, convert_to_tensor=True), after)
    loaded.max_seq_length = 3
    assert loaded[0].encoder.max_length == 3
    with pytest.raises(ValueError, match=r"^max_length: expected 1 to"):
        loaded.max_seq_length = 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "expected format 1, got 2; a newer clusterns"),
        ({"pooling": 3}, "expected the settings of an encoder"),
        ({"pooling": "max"}, "clusterns.json: pooling: expected one of 'cls', .*got 'max'"),
        ({"pooling": "cls"}, "clusterns.json: pooling: expected 'mask' for a prompt model, got 'cls'"),
        ({"head": "never"}, "clusterns.json: head: expected one of 'train', 'always', 'none', got 'never'"),
        (
            {"prompt": {"templates": ["[MASK]"]}},
            r"clusterns.json: template: expected one \[X\] for the sentence",
        ),
        ({"prompt": {"template": "x"}}, "clusterns.json: .*unexpected keyword argument 'template'"),
        ({"prompt": None}, "clusterns.json: pooling: expected another one without a prompt, got 'mask'"),
        ({"prompt": 3}, "clusterns.json: "),
        ({"max_length": "6"}, "expected a whole number as max_length, got '6'"),
        ({"whitening": True}, "expected format, head, max_length, pooling, prompt, got 'whitening'"),
    ],
)
def test_broken_settings(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    make_prompted().save(tmp_path)
    path = tmp_path / "clusterns.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=words) as caught:
        SentenceEncoder.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    make_encoder(pooling="mean").save(tmp_path)
    pooling = tmp_path / "1_Pooling" / "config.json"
    written = pooling.read_text()
    pooling.write_text('{"pooling_mode": "cls"}')
    with pytest.raises(
        ValueError, match=r"expected the pooling mean to match clusterns.json, got cls; give a pooling"
    ):
        SentenceEncoder.from_pretrained(tmp_path)
    pooling.write_text(written)
    modules = tmp_path / "modules.json"
    listing = json.loads(modules.read_text())
    modules.write_text(json.dumps([*listing, {"idx": 2, "path": "2_Normalize", "type": "x.Normalize"}]))
    assert SentenceEncoder.from_pretrained(tmp_path).pooling == "mean"
    modules.write_text(json.dumps([*listing, {"idx": 2, "path": "2_Dense", "type": "x.Dense"}]))
    with pytest.raises(
        ValueError, match=r"expected Transformer, Pooling to match .*, got Dense, Pooling, Transformer"
    ):
        SentenceEncoder.from_pretrained(tmp_path)


def test_missing_parts_of_what_the_settings_name(tmp_path: Path) -> None:
    make_prompted(denoising="frozen", evaluation_denoising=True).save(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^model: expected tokenizer .* in .*tokenizer, got a folder without"
    ):
        SentenceEncoder.from_pretrained(tmp_path)
    (tmp_path / "clusterns.json").unlink()
    with pytest.raises(
        ValueError, match=r"clusterns.json: expected the settings of a prompt model, there are none"
    ):
        SentenceEncoder.from_pretrained(tmp_path)
    make_kind("bert", head="always").save(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^model: expected head.safetensors in"):
        SentenceEncoder.from_pretrained(tmp_path)
    assert SentenceEncoder.from_pretrained(tmp_path, head="always").head is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"activation_function": "torch.nn.modules.linear.Identity"},
            "with bias and Tanh, got 16 to 16 with Identity",
        ),
        ({"out_features": 8}, "expected a head of width 16 with bias and Tanh, got 16 to 8 with Tanh"),
    ],
)
def test_a_dense_module_of_another_kind_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    make_kind("bert", head="always").save(tmp_path)
    (tmp_path / "clusterns.json").unlink()
    assert SentenceEncoder.from_pretrained(tmp_path).head_use == "always"
    path = tmp_path / "2_Dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        SentenceEncoder.from_pretrained(tmp_path)
