"""Masked language modelling beside the contrastive loss (SimCSE's auxiliary, ClusterNS's "+ 0.1·MLM").

The tokens that are masked are a copy: the contrastive loss never sees a mask it was not given.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling
from transformers.modeling_outputs import BaseModelOutput

from ..encoder import SentenceEncoder
from ..models.folder import first_line, read_modules, resolve

# What the transformer takes; a prompt's further entries are for the pooling.
_OF_TRANSFORMER = ("attention_mask", "token_type_ids", "position_ids")


class TokenMasker:
    """Masks tokens as BERT's training does: of the chosen ones 80 % [MASK], 10 % random, 10 % as they are.

    Args:
        tokenizer: of transformers, with a mask token.
        probability: share of the tokens that are to be predicted, in (0, 1).
        seed: with the numbers of a call it fixes the choice; the global random state is left alone.

    Raises ValueError for a tokenizer without a mask token.
    """

    def __init__(self, tokenizer: Any, probability: float, seed: int) -> None:
        if tokenizer.mask_token is None:
            raise ValueError(
                f"mlm_weight: expected 0 for a tokenizer without a mask token, {type(tokenizer).__name__}"
            )
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self.seed = seed

    def __call__(self, inputs: Mapping[str, Tensor], *numbers: int) -> dict[str, Tensor]:
        """A masked copy of token ids (rows, T) on the CPU, and what is to be predicted.

        Returns input_ids (rows, T) and what goes with them, `places` (M,) of the tokens to predict in the
        flattened ids, and `labels` (M,), their ids. `numbers`: of the batch, such as rank and step.
        """
        state = np.random.SeedSequence((self.seed, *numbers)).generate_state(1, np.uint64)[0]
        self.collator.generator = torch.Generator().manual_seed(int(state) >> 1)
        ids = inputs["input_ids"]
        special = torch.isin(ids, self.special) | (inputs["attention_mask"] == 0)
        masked, labels = self.collator.torch_mask_tokens(ids.clone(), special_tokens_mask=special)
        places = (labels.flatten() != -100).nonzero()[:, 0]
        beside = {name: inputs[name] for name in _OF_TRANSFORMER if name in inputs}
        return {"input_ids": masked, **beside, "places": places, "labels": labels.flatten()[places]}


class MaskedLanguageHead(nn.Module):
    """The head that predicts tokens from the encoder's states, with the output embedding tied to its input.

    It is transformers' own, of the architecture's ...ForMaskedLM, applied to the masked places alone.

    Args:
        transformer: the encoder's.
        source: folder or hub name it came from, whose checkpoint may hold a pretrained head; None makes a new
            one.

    `origin` says which of the two it is. Raises ValueError for an architecture
    without masked language modelling.
    """

    def __init__(self, transformer: Any, source: str | None) -> None:
        super().__init__()
        kind = type(transformer).__name__
        try:
            if source is None:
                whole, missing = AutoModelForMaskedLM.from_config(copy.deepcopy(transformer.config)), True
            else:
                folder = resolve(source)
                whole, report = AutoModelForMaskedLM.from_pretrained(
                    folder / read_modules(folder).get("Transformer", ""),
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
                body = f"{whole.base_model_prefix}."
                missing = any(not name.startswith(body) for name in report["missing_keys"])
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"mlm_weight: expected 0 for {kind}, for which transformers has no masked language model "
                f"({first_line(error)})"
            ) from error
        self.origin = "new" if missing else "of the checkpoint"
        setattr(whole, whole.base_model_prefix, _Given())
        # The embedding belongs to the encoder: it is seen from here, but not a parameter of the head.
        embedding = transformer.get_input_embeddings().weight
        output = whole.get_output_embeddings()
        if output is None or output.weight.shape != embedding.shape:
            raise ValueError(f"mlm_weight: expected 0 for {kind}, whose output embedding is not its input's")
        del output._parameters["weight"]
        object.__setattr__(output, "weight", embedding)
        self.whole = whole

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy summed over states (M, D) at the masked places and the ids (M,) that belong there."""
        logits = self.whole(inputs_embeds=states[None]).logits[0]  # (M, V)
        return F.cross_entropy(logits.float(), labels, reduction="sum")


class TrainingModel(nn.Module):
    """Encoder and head of masked language modelling as one module, whose gradients are averaged together."""

    def __init__(self, encoder: SentenceEncoder, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.mlm = encoder, head

    def forward(
        self, inputs: Mapping[str, Tensor], masked: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Training embeddings (rows, D) of token ids (rows, T); of a masked copy the summed loss, 0-d."""
        embeddings = self.encoder(inputs)
        if masked is None or self.mlm is None:
            return embeddings, None
        ids = {name: value for name, value in masked.items() if name not in ("places", "labels")}
        states = self.encoder.transformer(**ids).last_hidden_state  # (rows, T, D)
        return embeddings, self.mlm(states.flatten(0, 1)[masked["places"]], masked["labels"])


class _Given(nn.Module):
    """In the place of the transformer: its states are what comes in."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)
