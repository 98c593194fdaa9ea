"""A transformers encoder that turns sentences into vectors, with the projection head of training.

The embedding is the last layer's [CLS] state (or the mean over the tokens). In training it passes through
a new Linear+Tanh head first, at evaluation it does not (SimCSE's "MLP only in training", which ClusterNS
keeps). A saved encoder loads in transformers and in sentence-transformers, with the same vectors.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checks import check_choice
from .model_folder import (
    POOLING_CLASS,
    POOLING_KEYS,
    POOLINGS,
    TRANSFORMER_CLASS,
    first_line,
    load_transformer,
    read_max_length,
    read_modules,
    read_pooling,
    resolve,
    write_json,
)

HEAD_FILE = "head.safetensors"
# Sentences tokenised and sorted at a time: enough that padding is negligible, few enough to bound memory.
SORT_WINDOW = 16384
# The longest input of a model that states no limit (relative positions and a tokenizer without one).
FALLBACK_LENGTH = 512


class SentenceEncoder(nn.Module):
    """A transformers encoder, a pooling, and the projection head used in training only.

    Args:
        transformer: an encoder of transformers, whose output has `last_hidden_state` (B, T, D).
        tokenizer: its tokenizer, with a padding token.
        pooling: "cls" (the first token's state) or "mean" (over the tokens that are not padding).
        max_length: tokens a sentence is truncated to, special tokens included; None takes what the
            tokenizer and the model's positions allow.

    Raises ValueError for an unknown pooling, an encoder-decoder, a tokenizer without padding token, or a
    max_length that the model has no positions for.

    The head is Linear(D, D)+Tanh, initialised as BERT's layers are. The transformer's own pooler, where it
    has one, is unused: it is kept for saving, and frozen so that no optimiser or DDP waits for its gradient.
    """

    def __init__(
        self, transformer: Any, tokenizer: Any, *, pooling: str = "cls", max_length: int | None = None
    ) -> None:
        super().__init__()
        check_choice("pooling", pooling, POOLINGS)
        if getattr(transformer.config, "is_encoder_decoder", False):
            kind = type(transformer).__name__
            raise ValueError(f"transformer: expected an encoder, got the encoder-decoder {kind}")
        if tokenizer.pad_token is None:
            raise ValueError(
                f"tokenizer: expected one with a padding token, got {type(tokenizer).__name__} without"
            )
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.longest_input = _longest_input(transformer, tokenizer)
        self.max_length = self._check_length(
            min(tokenizer.model_max_length, self.longest_input) if max_length is None else max_length
        )
        linear = nn.Linear(self.embedding_dim, self.embedding_dim)
        nn.init.normal_(linear.weight, std=getattr(transformer.config, "initializer_range", 0.02))
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(linear, nn.Tanh())
        if isinstance(getattr(transformer, "pooler", None), nn.Module):
            transformer.pooler.requires_grad_(False)

    @property
    def embedding_dim(self) -> int:
        """Width D of the embeddings."""
        return int(self.transformer.config.hidden_size)

    def _check_length(self, length: int) -> int:
        shortest = self.tokenizer.num_special_tokens_to_add() + 1
        if not shortest <= length <= self.longest_input:
            raise ValueError(
                f"max_length: expected {shortest} to {self.longest_input} tokens for this model, got {length}"
            )
        return int(length)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        pooling: str | None = None,
        max_length: int | None = None,
    ) -> SentenceEncoder:
        """Load a local folder, or a hub name: from the local cache if it is there, else downloaded.

        Args:
            name_or_path: a folder as transformers, sentence-transformers or `save` write it, or a hub name.
            pooling: None takes the one in the folder's sentence-transformers files, else "cls". A given one
                also overrides modules that are not supported (the bare encoder is then taken).
            max_length: None takes max_seq_length of the folder's sentence-transformers files, else what the
                tokenizer and the model's positions allow.

        The weights are float32 whatever the checkpoint's dtype. The head comes from head.safetensors, or
        starts new where that is absent. Returns the encoder in eval mode.

        Raises FileNotFoundError where the folder, its weights or its tokenizer is missing or the hub cannot
        be reached, ValueError where the files do not make such an encoder; one line each.
        """
        folder = resolve(name_or_path)
        modules = read_modules(folder)
        if pooling is None:
            pooling = read_pooling(folder, modules)
        check_choice("pooling", pooling, POOLINGS)
        root = folder / modules.get("Transformer", "")
        transformer, tokenizer = load_transformer(root)
        encoder = cls(transformer, tokenizer, pooling=pooling, max_length=max_length)
        stated = read_max_length(root)
        if max_length is None and stated is not None:
            encoder.max_length = encoder._check_length(min(stated, encoder.longest_input))
        encoder._load_head(root / HEAD_FILE)
        return encoder.eval()

    def _load_head(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            self.head[0].load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{path}: expected a head of width {self.embedding_dim}, got: {first_line(error)}"
            ) from error

    def tokenize(self, sentences: Sequence[str], *, max_length: int | None = None) -> dict[str, Tensor]:
        """Token ids, attention mask and what else the model takes, each an int64 tensor (B, T) on the CPU.

        Padded on the right to the longest sentence, truncated to `max_length` (None: the encoder's).
        """
        length = self.max_length if max_length is None else self._check_length(max_length)
        if len(sentences) == 0:
            raise ValueError("sentences: expected at least one, got an empty list")
        batch = self.tokenizer(
            _check_sentences(sentences),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return dict(batch)

    def forward(self, inputs: Mapping[str, Tensor], *, head: bool | None = None) -> Tensor:
        """Embeddings (B, D) of a right-padded batch of `tokenize`, on the model's device.

        `head`: whether they pass through the projection head; None means in training mode only.
        """
        hidden = self.transformer(**inputs).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return self.head(pooled) if (self.training if head is None else head) else pooled

    def encode(self, sentences: Sequence[str], *, batch_size: int = 64, progress: bool = False) -> Tensor:
        """Embeddings (N, D) of the sentences, float32 on the CPU, without gradient, head or dropout.

        Each distinct sentence is encoded once, in batches of like length; the order is the caller's. The
        model runs where its parameters are, without autocast, and gets back the mode it was in.
        Raises ValueError for a batch_size below 1 or sentences that are not a list of strings.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        place = {sentence: row for row, sentence in enumerate(dict.fromkeys(_check_sentences(sentences)))}
        distinct = list(place)
        vectors = torch.empty(len(distinct), self.embedding_dim)
        device = next(self.parameters()).device
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(device.type, enabled=False),
                tqdm(
                    total=len(distinct), desc="encode", unit="sentence", mininterval=1, disable=not progress
                ) as bar,
            ):
                for start in range(0, len(distinct), SORT_WINDOW):
                    window = distinct[start : start + SORT_WINDOW]
                    vectors[start : start + len(window)] = self._encode_window(
                        window, batch_size, device, bar
                    ).cpu()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return vectors[[place[sentence] for sentence in sentences]]

    def _encode_window(self, window: list[str], batch_size: int, device: torch.device, bar: Any) -> Tensor:
        tokens = self.tokenizer(window, truncation=True, max_length=self.max_length)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        # Longest first, so that a batch too large for the memory fails at once and not at the end.
        order = sorted(range(len(window)), key=lengths.__getitem__, reverse=True)
        vectors = torch.empty(len(window), self.embedding_dim, device=device)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad(
                {name: [values[row] for row in rows] for name, values in tokens.items()},
                padding_side="right",
                return_tensors="pt",
            )
            inputs = {name: value.to(device) for name, value in batch.items()}
            vectors[torch.tensor(rows, device=device)] = self(inputs, head=False).float()
            bar.update(len(rows))
        return vectors

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Write the encoder as transformers and sentence-transformers load it, and head.safetensors.

        `beside`: tensors to save with it, by the name of their .safetensors file.

        Everything is first written whole to a hidden folder beside `directory` and then moved in file by
        file, so an error while writing (a full disk) leaves an earlier encoder there as it was. Other files
        in `directory` stay. Raises OSError where it cannot be written.
        """
        target = Path(directory).absolute()
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"directory: expected a folder, got the file {directory}")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            self._write(staging)
            for name, tensors in (beside or {}).items():
                save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, staging / name)
            files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
            for file in files:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
            # safetensors makes its files private; give every file the mode an ordinary one has here.
            usual = (staging / "modules.json").stat().st_mode
            for file in files:
                (staging / file).chmod(usual)
                os.replace(staging / file, target / file)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"{directory}: cannot write the encoder ({first_line(error)})") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        # One shard: the shards of an earlier, larger model would otherwise stay behind in the folder.
        self.transformer.save_pretrained(folder, max_shard_size="1000GB")
        stated_length = self.tokenizer.model_max_length
        self.tokenizer.model_max_length = self.max_length
        try:
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.model_max_length = stated_length
        head = self.head[0].state_dict()
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in head.items()}, folder / HEAD_FILE
        )
        modules = (("", TRANSFORMER_CLASS), ("1_Pooling", POOLING_CLASS))
        listing = [
            {"idx": index, "name": str(index), "path": path, "type": kind}
            for index, (path, kind) in enumerate(modules)
        ]
        pooling = {key: mode == self.pooling for mode, key in POOLING_KEYS.items()}
        write_json(folder / "modules.json", listing)
        write_json(
            folder / "1_Pooling" / "config.json", {"word_embedding_dimension": self.embedding_dim, **pooling}
        )
        write_json(
            folder / "sentence_bert_config.json", {"max_seq_length": self.max_length, "do_lower_case": False}
        )


def _check_sentences(sentences: Sequence[str]) -> list[str]:
    if isinstance(sentences, str):
        raise ValueError(f"sentences: expected a list of strings, got one string {sentences[:40]!r}")
    for index, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise ValueError(f"sentences: expected strings, got {type(sentence).__name__} at index {index}")
    return list(sentences)


def _longest_input(transformer: Any, tokenizer: Any) -> int:
    """Tokens the model has positions for."""
    positions = getattr(transformer.config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else FALLBACK_LENGTH
    # RoBERTa and its kin count positions from padding_idx + 1: 514 of them take 512 tokens.
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return positions if padding is None else positions - padding - 1
