"""Models to evaluate: any of transformers or sentence-transformers by path or name, pooled as its files say.

Most become a `SentenceEncoder`. A sentence-transformers folder that asks for more (a dense layer, another
pooling, a prompt before every text, lower-casing) is run by sentence-transformers itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..encoder import SentenceEncoder
from ..models.folder import first_line, read_json, read_modules, resolve
from ..models.positions import longest_input
from ..models.settings import SETTINGS_FILE
from ..models.views import check_texts

PRECISIONS = ("fp32", "bf16")


class Encoder(Protocol):
    """What is evaluated: anything that turns N sentences into an (N, D) tensor."""

    def encode(self, sentences: Sequence[str], *, batch_size: int = 64, progress: bool = False) -> Tensor:
        """Embeddings (N, D), in the order of the sentences."""


class EvaluatedModel(NamedTuple):
    """An encoder, and what its figures depend on."""

    encoder: Encoder
    pooling: str
    max_length: int | None
    # Whether the model ends in a Normalize module, which no cosine shows but k-means does.
    normalized: bool
    library: str


class SentenceTransformerEncoder:
    """A model of sentence-transformers as an `Encoder`; each distinct sentence is encoded once.

    Raises ValueError for a max_seq_length without room for a sentence: the tokenizers library then cuts off
    nothing at all, and a saved prompt model's counts the template.
    """

    def __init__(self, model: Any) -> None:
        count = getattr(model.tokenizer, "num_special_tokens_to_add", lambda: 0)
        length, around = model.max_seq_length, count()
        if length is not None and length <= around:
            raise ValueError(
                f"max_length: expected more than the {around} tokens that this model puts around each text, "
                f"got {length}"
            )
        self.model = model

    def encode(
        self,
        sentences: Iterable[str],
        *,
        batch_size: int = 64,
        progress: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Embeddings (N, D) of the sentences, float32 on the CPU; `dtype` computes in autocast to it."""
        sentences = check_texts("sentences", sentences)
        place = {sentence: row for row, sentence in enumerate(dict.fromkeys(sentences))}
        with torch.autocast(self.model.device.type, dtype, enabled=dtype is not None):
            vectors = self.model.encode(
                list(place), batch_size=batch_size, show_progress_bar=progress, convert_to_tensor=True
            )
        return vectors.float().cpu()[[place[sentence] for sentence in sentences]]


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> EvaluatedModel:
    """Load a model to evaluate, on the GPU where there is one.

    Args:
        name_or_path: a folder or a hub name.
        pooling: None takes the one that the model's files state; a given one takes the bare transformer with
            it, whatever modules the folder has.
        max_length: None takes all the positions the model has, whatever length it was trained with, since
            the published evaluation does not truncate at 32 tokens.
        truncate: with no max_length, keep the one that the model's files state.

    Raises ValueError where no file states a pooling and none is given, and what
    `SentenceEncoder.from_pretrained` raises; one line each.
    """
    folder = resolve(name_or_path)
    modules = read_modules(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not modules and not (folder / "config.json").exists():
        raise ValueError(f"model: expected the folder of a model, got {folder}, which has no config.json")
    if pooling is None and not _states_pooling(folder, modules):
        raise ValueError(
            f"model: expected files that state a pooling in {folder}, got none: "
            "give --pooling (cls, mean ...) as the model was trained"
        )
    normalized = pooling is None and "Normalize" in modules
    foreign = pooling is None and not (folder / SETTINGS_FILE).exists()
    reason = _beyond_us(folder, modules) if foreign else None
    if reason is None:
        try:
            encoder = SentenceEncoder.from_pretrained(folder, pooling=pooling, max_length=max_length)
        except ValueError as error:
            if not foreign:
                raise
            reason = first_line(error)
        else:
            if max_length is None and not truncate:
                encoder.max_length = encoder.longest_input
            encoder.to(device)
            return EvaluatedModel(encoder, encoder.pooling, encoder.max_length, normalized, "clusterns")
    model = _sentence_transformer(folder, device, reason)
    if max_length is not None:
        transformer = getattr(model[0], "auto_model", None)
        most = max_length if transformer is None else longest_input(transformer, model.tokenizer)
        if max_length > most:
            raise ValueError(f"max_length: expected at most {most} tokens, got {max_length}")
        model.max_seq_length = max_length
    return EvaluatedModel(
        SentenceTransformerEncoder(model),
        _stated_pooling(model),
        model.max_seq_length,
        normalized,
        "sentence-transformers",
    )


def _states_pooling(folder: Path, modules: dict[str, str]) -> bool:
    """Whether the files make an embedding, and not but the states of a transformer."""
    return (folder / SETTINGS_FILE).exists() or bool(set(modules) - {"Transformer", "Normalize", "Dropout"})


def _beyond_us(folder: Path, modules: dict[str, str]) -> str | None:
    """What a sentence-transformers folder asks for that a SentenceEncoder would pass over without a word."""
    if len(read_json(folder / "modules.json") or []) != len(modules):
        return "several modules of one kind"
    settings = read_json(folder / "config_sentence_transformers.json") or {}
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    if prompt:
        return f"a prompt before every text, {prompt!r}"
    transformer = folder / modules.get("Transformer", "") / "sentence_bert_config.json"
    if (read_json(transformer) or {}).get("do_lower_case"):
        return "text in lower case"
    return None


def _sentence_transformer(folder: Path, device: str, reason: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"model: expected sentence-transformers for {folder} ({reason}), got: {error}; "
            'pip install "clusterns[sentence-transformers]"'
        ) from error
    try:
        # In float32 whatever the checkpoint's dtype, as a SentenceEncoder.
        return SentenceTransformer(
            str(folder), device=device, local_files_only=True, model_kwargs={"dtype": torch.float32}
        ).eval()
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"model: expected a model that sentence-transformers loads in {folder}, got: {first_line(error)}"
        ) from error


def _stated_pooling(model: Any) -> str:
    """What a SentenceTransformer pools by, in its own words."""
    modes = [getattr(module, "pooling_mode", None) for module in model]
    return next((mode if isinstance(mode, str) else "+".join(mode) for mode in modes if mode), "own")
