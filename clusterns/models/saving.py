"""Writing a model folder: whole or not at all, in the form that sentence-transformers loads.

Poolings and prompts are expressed in modules of sentence-transformers itself, so that its users, mteb among
them, need nothing of ours: a layer average as WeightedLayerPooling; the mask token's state as WordWeights, 1
for the mask token and 0 for all others, before a mean; a template in the tokenizer's post-processor. Only
denoising at evaluation has no such form, see `sentence_transformers_modules.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn, tensor

from ..files import expanded, staging
from .folder import HEAD_FILE, POOLING_KEYS, first_line, write_json
from .pooling import POOLINGS, Pooling, in_words
from .settings import SETTINGS_FILE, TOKENIZER_FOLDER, sentence_transformers_modules

# The names that every sentence-transformers reads: version 6 still maps them to its new ones.
LIBRARY = "sentence_transformers.models"
PROMPT_ENCODER = "clusterns.sentence_transformers_modules.PromptEncoder"


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder to write into, whose files are then moved into `directory` around it one by one.

    Where writing fails, `directory` stays as it was. Other files in it stay. Raises OSError where it cannot
    be written.
    """
    target = expanded(directory, "directory").absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"directory: expected a folder, got the file {directory}")
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with staging(target) as place:
            yield place
            files = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
            for file in files:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
            # safetensors makes its files private; give every file the mode an ordinary one has here.
            usual = (place / "modules.json").stat().st_mode
            for file in files:
                (place / file).chmod(usual)
                os.replace(place / file, target / file)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{directory}: cannot write the encoder ({first_line(error)})") from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # but for a failure it is not empty
                target.rmdir()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One .safetensors file, from any device."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def save_transformer(transformer: Any, folder: Path, *, hidden_states: bool) -> None:
    """Weights and config.json; `hidden_states` makes every loader of the config return them."""
    stated = transformer.config.output_hidden_states
    transformer.config.output_hidden_states = hidden_states
    try:
        # One shard: the shards of an earlier, larger model would otherwise stay behind in the folder.
        transformer.save_pretrained(folder, max_shard_size="1000GB")
    finally:
        transformer.config.output_hidden_states = stated


def save_tokenizer(tokenizer: Any, folder: Path, *, max_length: int) -> None:
    """The tokenizer with `max_length` as what it truncates to; a prompt's as every transformers loads it."""
    stated = tokenizer.model_max_length
    tokenizer.model_max_length = max_length
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.model_max_length = stated


def save_prompt_tokenizer(tokenizer: Any, folder: Path, *, max_length: int) -> None:
    """A tokenizer with a template, under the class name that loads tokenizer.json as it is everywhere."""
    save_tokenizer(tokenizer, folder, max_length=max_length)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True})


def savable(name: str) -> Pooling:
    """A pooling by its name; ValueError where sentence-transformers would not load it as what it is."""
    if POOLINGS[name].saved_as in POOLING_KEYS:
        return POOLINGS[name]
    known = in_words(other for other, of in POOLINGS.items() if of.saved_as in POOLING_KEYS)
    raise ValueError(
        f"pooling: expected one that sentence-transformers has too, {known}, to save, got {name!r}"
    )


def write_encoder(encoder: Any, folder: Path) -> None:
    """Everything of a `SentenceEncoder` into an empty folder; raises as `savable` does."""
    settings, pooling = encoder.settings(), savable(encoder.pooling)
    save_transformer(encoder.transformer, folder, hidden_states=bool(pooling.layers))
    tokenizer, longest = encoder.tokenizer, encoder.max_length + encoder.evaluation_template_length
    vocabulary: list[str] = []
    if encoder.prompt is None:
        save_tokenizer(tokenizer, folder, max_length=longest)
    else:
        save_prompt_tokenizer(encoder.evaluation_tokenizer, folder, max_length=longest)
        save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER, max_length=tokenizer.model_max_length)
        ids = range(max(len(tokenizer), encoder.transformer.config.vocab_size))
        tokens = tokenizer.convert_ids_to_tokens(list(ids))
        vocabulary = [token or f"[id {number}]" for number, token in enumerate(tokens)]
    head: Any = None if encoder.head is None else encoder.head[0]
    if head is not None:
        save_tensors(head.state_dict(), folder / HEAD_FILE)
    write_modules(
        folder,
        sentence_transformers_modules(encoder.pooling, encoder.head_use, settings["prompt"]),
        pooling=pooling,
        width=encoder.embedding_dim,
        max_length=longest,
        layers=getattr(encoder.transformer.config, "num_hidden_layers", 0),
        head=head,
        mask_token=tokenizer.mask_token,
        vocabulary=vocabulary,
    )
    write_json(folder / SETTINGS_FILE, settings)


def write_modules(
    folder: Path,
    modules: list[str],
    *,
    pooling: Pooling,
    width: int,
    max_length: int,
    layers: int,
    head: nn.Linear | None,
    mask_token: str,
    vocabulary: list[str],
) -> None:
    """modules.json and the modules' files.

    Args:
        folder: the model folder, whose root holds the transformer and the tokenizer.
        modules: what `settings.sentence_transformers_modules` returns.
        pooling: of the encoder, which a mode of Pooling gives.
        width: of the embedding, D.
        max_length: tokens of an input, template and special tokens included.
        layers: of the transformer.
        head: where the embedding passes through it.
        mask_token, vocabulary: of a prompt model, the token of every id; else unused.
    """
    paths = {name: "" if index == 0 else f"{index}_{name}" for index, name in enumerate(modules)}
    listing = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": PROMPT_ENCODER if name == "PromptEncoder" else f"{LIBRARY}.{name}",
        }
        for index, (name, path) in enumerate(paths.items())
    ]
    write_json(folder / "modules.json", listing)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    configs: dict[str, dict[str, Any]] = {}
    if "WordWeights" in paths:
        configs["WordWeights"] = {
            "vocab": vocabulary,
            "word_weights": {mask_token: 1.0},
            "unknown_word_weight": 0.0,
        }
    if "WeightedLayerPooling" in paths:
        chosen = [layer % (layers + 1) for layer in pooling.layers]
        start = min(chosen)
        weights = [float(chosen.count(layer)) for layer in range(start, layers + 1)]
        configs["WeightedLayerPooling"] = {
            "word_embedding_dimension": width,
            "layer_start": start,
            "num_hidden_layers": layers,
        }
    if "Pooling" in paths:
        configs["Pooling"] = {
            "word_embedding_dimension": width,
            **{key: name == pooling.saved_as for name, key in POOLING_KEYS.items()},
        }
    if "Dense" in paths:
        configs["Dense"] = {
            "in_features": width,
            "out_features": width,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
    for name, config in configs.items():
        write_json(folder / paths[name] / "config.json", config)
    if "WeightedLayerPooling" in paths:
        save_tensors(
            {"layer_weights": tensor(weights)}, folder / paths["WeightedLayerPooling"] / "model.safetensors"
        )
    if head is not None and "Dense" in paths:
        state = {f"linear.{name}": value for name, value in head.state_dict().items()}
        save_tensors(state, folder / paths["Dense"] / "model.safetensors")
