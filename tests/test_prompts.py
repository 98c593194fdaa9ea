"""Prompts and denoising, against whole texts tokenised at once and templates around hidden sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_files import cases
from tiny import SENTENCES, assert_close, assert_gradients_close, make_encoder
from tiny_prompt import ABSOLUTE, bert_tokenizer, make_prompted, without_dropout
from transformers import AutoTokenizer

from clusterns.encoder import SentenceEncoder
from clusterns.models.prompts import PUBLISHED, Prompt, PromptTokenizer, template_tokens

ROWS = [(sentence,) for sentence in SENTENCES]
CUSTOM = ("[MASK] : [X] .", 'means "[X]" of this [MASK] sentence')


def state_in_text(encoder: SentenceEncoder, template: str, sentence: str) -> torch.Tensor:
    """The mask token's state (D,) in the template's text with the sentence in its slot."""
    tokenizer = encoder.tokenizer
    text = template.replace("[X]", sentence).replace("[MASK]", tokenizer.mask_token)
    tokens = tokenizer(text, return_tensors="pt")
    place = (tokens["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    with torch.no_grad():
        return encoder.transformer(**tokens).last_hidden_state[0, place]


def delta_by_hiding(encoder: SentenceEncoder, template: int, length: int) -> torch.Tensor:
    """The mask token's state (D,) around a sentence of so many tokens that attention does not see.

    The model counts the positions itself here, so its own counting is what the shift is held against.
    """
    tokens = encoder.prompt_tokenizer.templates[template]
    filler = encoder.tokenizer.convert_tokens_to_ids(encoder.tokenizer.unk_token)
    ids = torch.tensor([[*tokens.before, *[filler] * length, *tokens.after]])
    seen = torch.tensor([[*[1] * len(tokens.before), *[0] * length, *[1] * len(tokens.after)]])
    place = (ids[0] == encoder.tokenizer.mask_token_id).nonzero().item()
    return encoder.transformer(input_ids=ids, attention_mask=seen).last_hidden_state[0, place]


@pytest.mark.parametrize("kind", [*ABSOLUTE, "mpnet"])
def test_the_test_protocol_is_the_first_template_with_a_period_and_no_delta(kind: str) -> None:
    encoder = make_prompted(kind, max_length=None, denoising="none" if kind == "mpnet" else "frozen")
    name = "roberta" if kind in ("roberta", "mpnet") else "bert"
    assert encoder.prompt.templates == PUBLISHED[name]
    endings = ["the cat.", "the cat?", "the cat'", 'the "cat"', "the cat!"]
    vectors = encoder.encode([*SENTENCES, *endings], batch_size=3)
    for row, sentence in enumerate([*SENTENCES, *endings]):
        ended = sentence if not sentence or sentence[-1] in ".?\"'" else sentence + "."
        if not sentence and name == "roberta":
            continue  # the text's two spaces are a token of their own
        assert_close(vectors[row], state_in_text(encoder, PUBLISHED[name][0], ended))
    again = [encoder(encoder.tokenize([sentence]))[0] for sentence in endings]
    assert_close(torch.stack(again).detach(), vectors[len(SENTENCES) :])


@pytest.mark.parametrize("template", CUSTOM)
def test_without_period_and_with_custom_templates(template: str) -> None:
    encoder = make_prompted(templates=(template,), append_period=False)
    vectors = encoder.encode(SENTENCES)
    short = [" ".join(sentence.split()[:6]) for sentence in SENTENCES]
    assert_close(vectors, torch.stack([state_in_text(encoder, template, sentence) for sentence in short]))
    assert (vectors[1] - make_prompted(templates=(template,)).encode(SENTENCES)[1]).norm() > 0.01


@pytest.mark.parametrize(("kind", "positions"), [("bert", 64), ("roberta", 62)])
def test_the_sentence_is_truncated_and_the_template_never(kind: str, positions: int) -> None:
    encoder = make_prompted(kind, max_length=3)
    rows = encoder.tokenize(["the cat sat on the mat far far", "the cat sat"])["input_ids"].tolist()
    tokens = encoder.prompt_tokenizer.templates[0]
    assert len(rows[0]) == len(tokens.ids) + 3
    assert rows[0][: len(tokens.before)] == tokens.before
    assert rows[0][-len(tokens.after) :] == tokens.after
    assert kind != "bert" or rows[0] == rows[1]
    # The longest that the model has positions for.
    encoder = make_prompted(kind, max_length=None, denoising="frozen", evaluation_denoising=True)
    assert encoder.longest_input == encoder.max_length == positions - encoder.template_length
    assert encoder.encode(["far " * 1000, "x" * 100_000]).isfinite().all()
    assert encoder.train()(encoder.view_tokenizer()([("far " * 90, "far " * 90)])).isfinite().all()


def test_the_mask_token_in_a_sentence_is_text() -> None:
    encoder, texts = make_prompted(), ["a [MASK] cat", "[SEP] [PAD]"]
    inputs = encoder.tokenize(texts)
    assert (inputs["input_ids"] == encoder.tokenizer.mask_token_id).sum(dim=1).tolist() == [1, 1]
    assert_close(encoder.encode(texts, batch_size=1), encoder(inputs).detach())


def test_published_templates_have_the_tokens_of_the_published_code(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/all-MiniLM-L6-v2")
    tokens = template_tokens(PUBLISHED["bert"][0], tokenizer)
    # As a comment of PromptBERT's evaluation has them.
    assert tokens.ids == [101, 2023, 6251, 1997, 1000, 1000, 2965, 103, 1012, 102]
    assert tokens.before == [101, 2023, 6251, 1997, 1000]


@pytest.mark.parametrize("hosts", [("cpu",), ()], ids=["distinct lengths", "no synchronisation"])
@pytest.mark.parametrize("denoising", ["frozen", "trained"])
def test_denoised_training_embeddings_and_their_gradient(
    denoising: str, hosts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clusterns.models.denoising.HOSTS", hosts)
    encoder = without_dropout(make_prompted("roberta", denoising=denoising))
    inputs = encoder.view_tokenizer()([ROWS[0], ROWS[2], ROWS[5]])
    weights = torch.randn(6, encoder.embedding_dim, generator=torch.Generator().manual_seed(0))

    def gradients(vectors: torch.Tensor) -> list[torch.Tensor]:
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        return list(torch.autograd.grad((vectors * weights).sum(), parameters))

    # Every row by itself: the sentence's state less the template's, then the head.
    sizes = [len(tokens.ids) for tokens in encoder.prompt_tokenizer.templates]
    columns = (inputs[name] for name in ("input_ids", "attention_mask", "template"))
    rows = []
    for ids, mask, template in zip(*columns, strict=True):
        length = int(mask.sum())
        hidden = encoder.transformer(input_ids=ids[None, :length], attention_mask=mask[None, :length])
        place = (ids == encoder.tokenizer.mask_token_id).nonzero().item()
        delta = delta_by_hiding(encoder, int(template), length - sizes[int(template)])
        delta = delta if denoising == "trained" else delta.detach()
        rows.append(hidden.last_hidden_state[0, place] - delta)
    expected, vectors = encoder.head(torch.stack(rows)), encoder(inputs)
    assert_close(vectors, expected)
    assert_gradients_close(gradients(vectors), gradients(expected))


@pytest.mark.parametrize("templates", ["auto", CUSTOM, CUSTOM[::-1]], ids=["auto", "custom", "turned"])
@pytest.mark.parametrize("kind", ABSOLUTE)
def test_evaluation_with_denoising(kind: str, templates: Any) -> None:
    encoder = make_prompted(kind, templates=templates, denoising="frozen", evaluation_denoising=True)
    plain = make_prompted(kind, templates=templates)
    inputs = plain.tokenize(SENTENCES)
    lengths = inputs["attention_mask"].sum(dim=1) - len(plain.prompt_tokenizer.templates[0].ids)
    with torch.no_grad():
        deltas = torch.stack([delta_by_hiding(plain, 0, length) for length in lengths.tolist()])
        expected = plain.encode(SENTENCES) - deltas
        assert_close(encoder(inputs), expected)
        assert_close(encoder(inputs, denoise=False), plain.encode(SENTENCES))
    assert_close(encoder.encode(SENTENCES, batch_size=2), expected)
    if templates == "auto":
        assert (deltas[0] - deltas[2]).norm() > 0.01  # the shift matters


@pytest.mark.parametrize("denoising", ["frozen", "trained"])
def test_autocast_keeps_every_gradient(denoising: str) -> None:
    encoder = make_prompted(denoising=denoising).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(encoder.view_tokenizer()(ROWS)).float().square().sum().backward()
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    # The last bias is in the sentence's and the template's state alike, so it cancels.
    cancels = ["transformer.encoder.layer.2.output.LayerNorm.bias"] if denoising == "trained" else []
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == cancels


@cases(
    "settings words",
    [
        ({"templates": ("Text [MASK].",)}, "^template: expected one .X. for the sentence, got none in 'Te"),
        ({"templates": ("[X] [MASK]", "an [X].")}, "one .MASK. or <mask>, got none in 'an .X..'$"),
        ({"templates": "gpt"}, r"^templates: .* of 'auto', .* or texts with \[X\] and a mask, got 'gpt'$"),
        ({"denoising": "on"}, "^denoising: expected one of 'none', 'frozen', 'trained', got 'on'$"),
        ({"append_period": 1}, "^append_period: expected true or false, got 1$"),
    ],
)
def test_bad_prompts(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Prompt(**settings)
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_prompt_needs() -> None:
    plain, encoder, cut = make_encoder(), make_prompted(), bert_tokenizer()
    cut.mask_token = "cat dog"  # a mask that the vocabulary takes for two words
    shifted = "denoising: expected a model whose position_ids alone "
    make = SentenceEncoder
    for call, words in (
        (lambda: make(plain.transformer, plain.tokenizer, prompt=Prompt()), "prompt: .* a mask token"),
        (lambda: make_prompted(max_length=55), "max_length: .* 1 to 54 .* beside a template of 10, got 55$"),
        (lambda: encoder(encoder.tokenize(SENTENCES), denoise=True), "denoise: .* with denoising, got one"),
        (lambda: PromptTokenizer(Prompt().resolve(cut), cut), r"template: .* among its tokens, got \d in"),
        (lambda: make_prompted("mpnet", denoising="frozen"), f"{shifted}.*; use 'none'$"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            call()
    one = make(encoder.transformer, encoder.tokenizer, prompt="so [X] [MASK]")
    assert one.prompt == Prompt(("so [X] [MASK]",))
