"""The masked copy, the head and its tied embedding."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_close, make_encoder, make_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
)

from clusterns.training.mlm import MaskedLanguageHead, TokenMasker

TOKENIZER = make_tokenizer(mask_token="[MASK]")


def small(kind, **settings):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(**{"vocab_size": 30, "max_position_embeddings": 40, **sizes, **settings})


def test_the_copy_is_masked_and_the_original_is_not():
    masker = TokenMasker(TOKENIZER, 0.5, seed=3)
    ids = torch.randint(4, 20, (60, 12))
    ids[:, 0], ids[:, 9] = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id
    ids[:, 10:] = TOKENIZER.pad_token_id
    mask = (ids != TOKENIZER.pad_token_id).long()
    before = ids.clone()
    masked = masker({"input_ids": ids, "attention_mask": mask, "template": torch.zeros(60)}, 0, 1)
    assert torch.equal(ids, before)
    assert masked.keys() == {"input_ids", "attention_mask", "places", "labels"}
    changed = (masked["input_ids"] != ids).flatten().nonzero()[:, 0]
    assert set(changed.tolist()) <= set(masked["places"].tolist())
    assert torch.equal(ids.flatten()[masked["places"]], masked["labels"])
    columns = masked["places"] % 12
    assert columns.min() > 0  # never a special token or padding
    assert columns.max() < 9
    share = len(masked["places"]) / (60 * 8)
    assert 0.4 < share < 0.6
    now = masked["input_ids"].flatten()[masked["places"]]
    assert 0.7 < (now == TOKENIZER.mask_token_id).double().mean() < 0.9
    # The numbers of a call decide, and the global random state takes no part.
    state = torch.get_rng_state()
    again, other = (masker({"input_ids": ids, "attention_mask": mask}, 0, n) for n in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again["input_ids"], masked["input_ids"])
    assert not torch.equal(other["input_ids"], masked["input_ids"])


@pytest.mark.parametrize(
    ("kind", "config"),
    [(BertForMaskedLM, BertConfig), (RobertaForMaskedLM, RobertaConfig)],
    ids=["bert", "roberta"],
)
def test_the_pretrained_head_gives_what_transformers_gives(kind, config, tmp_path):
    whole = kind(small(config, type_vocab_size=2, pad_token_id=0)).eval()
    with torch.no_grad():
        for name, value in whole.named_parameters():
            if "LayerNorm" not in name and "layer_norm" not in name:
                value.normal_(std=0.3)
    whole.save_pretrained(tmp_path)
    transformer = type(whole.base_model).from_pretrained(tmp_path, add_pooling_layer=False).eval()
    head = MaskedLanguageHead(transformer, str(tmp_path))
    assert head.origin == "of the checkpoint"
    ids = torch.randint(3, 30, (4, 9))
    places = torch.tensor([1, 5, 13, 30])
    labels = torch.full((36,), -100)
    labels[places] = ids.flatten()[places]
    expected = whole(input_ids=ids, labels=labels.view(4, 9)).loss
    states = transformer(input_ids=ids).last_hidden_state.flatten(0, 1)[places]
    loss = head(states, labels[places])
    assert_close(loss / len(places), expected)
    # The gradient reaches the encoder's embedding also as the output's, and the head does not own it.
    embedding = transformer.get_input_embeddings().weight
    assert all(value.shape != embedding.shape for value in head.state_dict().values())
    through_output = torch.autograd.grad(head(states.detach(), labels[places]), embedding)[0]
    assert through_output.abs().sum() > 0


def test_other_architectures_and_checkpoints_without_a_head(tmp_path):
    """GPT-2 has no such head."""
    encoder = make_encoder()
    encoder.save(tmp_path)
    for source in (str(tmp_path), None):
        assert MaskedLanguageHead(encoder.transformer, source).origin == "new"
    gpt2 = GPT2Model(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="^mlm_weight: expected 0 for GPT2Model.*$"):
        MaskedLanguageHead(gpt2, None)
    with pytest.raises(ValueError, match="mlm_weight: expected 0 for a tokenizer without a mask token"):
        TokenMasker(make_tokenizer(), 0.1, seed=0)
