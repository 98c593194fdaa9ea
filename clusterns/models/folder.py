"""Model folders: finding one by path or hub name, and reading what is in it.

Every complaint is one line that names the folder or file, what was expected there and what came.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from ..files import expanded
from .pooling import plain_poolings

HEAD_FILE = "head.safetensors"
WEIGHT_FILES = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
)
# What a hub repository is asked for: no ONNX, TensorFlow or other copies of the weights.
HUB_FILES = (
    *("*.json", "*.txt", "*.model", "model*.safetensors", "0_Transformer/*"),
    *("head.safetensors", "*_Dense/model.safetensors"),
)
# What the folder of a model or of its training consists of, at any depth; beside it there may be others.
MODEL_FILES = (
    *("config*.json", "clusterns.json", "modules.json", "sentence_bert*.json", "generation_config.json"),
    *(*VOCABULARY_FILES, "tokenizer*", "special_tokens*.json", "added_tokens.json", "merges.txt"),
    *("*.safetensors*", "pytorch_model*", "checkpoints", "training.json", "training.png", "log.jsonl"),
    "README.md",
)

# The keys that every sentence-transformers reads: version 6 still maps them to its new ones.
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(path: Path) -> Any:
    """The parsed file, or None where there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {first_line(error)}") from error


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, making its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The local folder of a model: itself, or the cached or downloaded snapshot of a hub name."""
    name = os.fspath(name_or_path)
    folder = expanded(name, "model")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"model: expected a folder or a hub name, got the file {name}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise FileNotFoundError(f"model: expected a folder or a hub name, got {name!r}, which does not exist")
    try:
        cached: Path | None = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        cached = None
    # A cache that transformers filled lacks the sentence-transformers files, and with them the pooling.
    if cached and (cached / "modules.json").is_file() and _first_file(cached, WEIGHT_FILES):
        return cached
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
        if not _first_file(folder, WEIGHT_FILES) and not (folder / "0_Transformer").is_dir():
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model: expected a folder or a reachable hub name, got {name!r} ({first_line(error)})"
        ) from error
    return folder


def _first_file(folder: Path, names: Sequence[str]) -> str | None:
    return next((name for name in names if (folder / name).is_file()), None)


def load_transformer(folder: Path, tokenizer_folder: Path) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer of local folders."""
    for what, place, names in (
        ("config.json", folder, ("config.json",)),
        ("weights (model.safetensors)", folder, WEIGHT_FILES),
        ("tokenizer (tokenizer.json, vocab.txt)", tokenizer_folder, VOCABULARY_FILES),
    ):
        if not _first_file(place, names):
            raise FileNotFoundError(f"model: expected {what} in {place}, got a folder without")
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model: expected an encoder that transformers loads in {folder}, got: {first_line(error)}"
        ) from error
    # transformers fills what a checkpoint lacks with random numbers; only the unused pooler may be so.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"model: expected every weight of {type(model).__name__} in {folder}, "
            f"got {len(missing)} missing, {missing[0]} among them"
        )
    return model, tokenizer


def read_modules(folder: Path) -> dict[str, str]:
    """Module class (its bare name) -> its subfolder, of a sentence-transformers folder; else empty."""
    listing = read_json(folder / "modules.json") or []
    try:
        return {entry["type"].rpartition(".")[2]: entry["path"] for entry in listing}
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / 'modules.json'}: expected a list of modules with type and path"
        ) from error


def read_pooling(folder: Path, modules: Mapping[str, str]) -> str | None:
    """The pooling of a sentence-transformers folder; None where it states none."""
    # A Normalize module changes no cosine; any other would change the embedding.
    others = sorted(set(modules) - {"Transformer", "Pooling", "Dense", "Normalize", "Dropout"})
    if others:
        raise ValueError(
            f"{folder / 'modules.json'}: expected Transformer, Pooling, Dense and Normalize, "
            f"got {others[0]}; give a pooling to take the encoder without it"
        )
    return plain_poolings()[read_pooling_mode(folder, modules)] if "Pooling" in modules else None


def read_pooling_mode(folder: Path, modules: Mapping[str, str]) -> str:
    """What the Pooling module's config.json states, of the modes that are poolings here too."""
    path = folder / modules["Pooling"] / "config.json"
    config = read_json(path) or {}
    stated = config.get("pooling_mode")
    if stated is None:
        stated = [mode for mode, key in POOLING_KEYS.items() if config.get(key)]
    modes = [stated] if isinstance(stated, str) else list(stated)
    known = plain_poolings()
    if len(modes) != 1 or modes[0] not in known:
        wanted, got = " or ".join(sorted(known)), " and ".join(modes) or "none"
        raise ValueError(f"{path}: expected the pooling {wanted}, got {got}")
    return modes[0]


def read_head(folder: Path, modules: Mapping[str, str], root: Path, width: int) -> dict[str, Tensor] | None:
    """Weight (D, D) and bias (D,) of the head, or None where the folder has none.

    From the Dense module of sentence-transformers where there is one, else from head.safetensors.
    """
    path = root / HEAD_FILE
    if "Dense" in modules:
        path = folder / modules["Dense"] / "model.safetensors"
        config = read_json(path.with_name("config.json")) or {}
        shape = (config.get("in_features"), config.get("out_features"), config.get("bias", True))
        activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
        if (*shape, activation) != (width, width, True, "Tanh"):
            raise ValueError(
                f"{path.with_name('config.json')}: expected a head of width {width} with bias and Tanh, "
                f"got {shape[0]} to {shape[1]} with {activation}"
            )
    elif not path.exists():
        return None
    try:
        state = {name.removeprefix("linear."): value for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a head of width {width}, got: {first_line(error)}") from error
    expected = {"weight": (width, width), "bias": (width,)}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != expected:
        raise ValueError(f"{path}: expected a head of width {width}, got {shapes}")
    return state


def read_max_length(folder: Path) -> int | None:
    """max_seq_length of the folder's sentence_bert_config.json, or None where it states none."""
    path = folder / "sentence_bert_config.json"
    length = (read_json(path) or {}).get("max_seq_length")
    if length is not None and not isinstance(length, int):
        raise ValueError(f"{path}: expected a whole number as max_seq_length, got {length!r}")
    return length
