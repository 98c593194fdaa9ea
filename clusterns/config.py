"""Settings of `clusterns train`: one dataclass, from which the command line and config files are read."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .backend import BACKENDS
from .cached import CachedClusterNSLoss
from .centroids import CENTROID_UPDATES
from .checks import check_count, check_number
from .functional import FALSE_NEGATIVES
from .loss import ClusterNSLoss


def setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with its help text, and the words it may take."""
    return field(default=default, metadata={"help": text, "choices": choices})


# What the run with neither model nor sentences uses in place of the defaults. Small, because two minutes of
# two CPU cores are all it takes; mean pooling, because a random network's [CLS] state says nothing.
FROM_SCRATCH: dict[str, Any] = {
    "pooling": "mean",
    "max_steps": 240,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "eval_steps": 60,
    "num_clusters": 64,
    "start_cosine": 0.3,
}


@dataclass
class TrainConfig:
    """Everything `clusterns train` can be told.

    With neither `model` nor `train_file` a small BERT is trained from scratch on documentation strings; see
    `from_settings` for its defaults.
    """

    model: str | None = setting(
        None, "folder or hub name of a transformers encoder; without it a small BERT starts from scratch"
    )
    train_file: str | None = setting(
        None,
        "sentences to train on: a txt, csv, tsv, json or jsonl file, or the hub name of a dataset; "
        "without it the documentation strings of the installed Python packages",
    )
    text_column: str | None = setting(None, "column of a csv, json or hub dataset that holds the sentences")
    output_dir: str = setting("runs/clusterns", "where the best model, the log and the picture go")
    overwrite_output_dir: bool = setting(False, "write into an output folder that is not empty")
    sts_dir: str | None = setting(
        None, "folder of STS sets in SentEval's layout; STS-B dev then chooses the best checkpoint"
    )

    max_steps: int | None = setting(None, "optimiser steps; without it, --epochs decides")
    epochs: int = setting(1, "passes over the sentences")
    batch_size: int = setting(256, "sentences in a batch")
    mini_batch_size: int | None = setting(
        None,
        "sentences whose activations the encoder holds at a time, for batches beyond its memory: gradients "
        "stay those of the whole batch, a step takes one more forward pass; without it the batch goes whole",
    )
    learning_rate: float = setting(5e-5, "peak of the linear decay")
    warmup_steps: int = setting(0, "steps in which the learning rate rises")
    weight_decay: float = setting(0.0, "of AdamW")
    max_grad_norm: float = setting(1.0, "gradient clipping")
    max_length: int = setting(32, "tokens of a training sentence")
    pooling: str = setting("cls", "embedding of a sentence", ("cls", "mean"))
    head: str = setting(
        "train",
        "Linear+Tanh on the embedding: in training only, as the paper has it, or none",
        ("train", "none"),
    )
    seed: int = setting(42, "of everything random")
    eval_steps: int = setting(125, "steps between two dev evaluations")
    patience: int = setting(3, "stop after so many dev evaluations without a gain; 0 never stops early")
    log_steps: int = setting(5, "steps between two lines of the log")
    precision: str = setting(
        "auto", "bf16 autocast; auto where the device computes in it", ("auto", "bf16", "fp32")
    )
    device: str = setting("auto", "cuda, cpu, mps ...; auto takes the fastest at hand")

    num_clusters: int = setting(128, "K; 0 is SimCSE")
    temperature: float = setting(0.05, "τ")
    start_cosine: float = setting(0.4, "σ: clustering starts when the mean cosine of a batch falls to it")
    centroid_momentum: float = setting(1e-3, "γ; the learning rate with adamw")
    centroid_update: str = setting("sum", "what moves a centroid", CENTROID_UPDATES)
    hard_negatives: bool = setting(True, "runner-up centroids as hard negatives")
    hard_negative_weight: float = setting(0.0, "added to the logit of a sentence's own hard negative")
    false_negatives: str = setting("bml", "treatment of cluster-mates", FALSE_NEGATIVES)
    bml_weight: float = setting(1e-4, "λ")
    bml_alpha: float = setting(0.2, "α, upper margin")
    bml_beta: float = setting(0.5, "β, lower margin")
    backend: str = setting("auto", "of the loss", BACKENDS)

    @property
    def from_scratch(self) -> bool:
        """Whether a small BERT is made instead of an encoder loaded."""
        return self.model is None

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainConfig:
        """Settings by name over the defaults; over `FROM_SCRATCH` where there is no model."""
        config = cls(**settings)
        if config.from_scratch:
            if config.train_file is not None:
                raise ValueError(
                    f"--model: expected an encoder to train on {config.train_file}, got none; from scratch "
                    "only the documentation strings can be learned from, whose neighbours serve as pairs"
                )
            config = cls(**{**FROM_SCRATCH, **settings})
        config.check()
        return config

    def check(self) -> None:
        """Raise `ValueError` with one line for a setting out of range. The loss checks its own."""
        for name in ("epochs", "batch_size", "max_length", "eval_steps", "log_steps"):
            check_count(name, getattr(self, name), at_least=1)
        for name in ("patience", "num_clusters", "seed", "warmup_steps"):
            check_count(name, getattr(self, name), at_least=0)
        for name in ("max_steps", "mini_batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), at_least=1)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("max_grad_norm", self.max_grad_norm, above=0)
        check_number("weight_decay", self.weight_decay, at_least=0)

    def build_loss(self, embedding_dim: int) -> ClusterNSLoss:
        """The loss these settings describe; K = 0 is plain InfoNCE."""
        make: Callable[..., ClusterNSLoss] = ClusterNSLoss
        if self.mini_batch_size is not None:
            make = functools.partial(CachedClusterNSLoss, mini_batch_size=self.mini_batch_size)
        return make(
            embedding_dim,
            self.num_clusters,
            temperature=self.temperature,
            start_cosine=self.start_cosine,
            centroid_momentum=self.centroid_momentum,
            centroid_update=self.centroid_update,
            hard_negatives=self.hard_negatives and self.num_clusters > 0,
            hard_negative_weight=self.hard_negative_weight,
            false_negatives=self.false_negatives,
            bml_weight=self.bml_weight,
            bml_alpha=self.bml_alpha,
            bml_beta=self.bml_beta,
            backend=self.backend,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, and --config for a file of them."""
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of settings; flags override it")
    types_of = typing.get_type_hints(TrainConfig)
    for item in fields(TrainConfig):
        flag = "--" + item.name.replace("_", "-")
        default = "" if item.default in (None, False) else f" (default {item.default})"
        default += f" (from scratch {FROM_SCRATCH[item.name]})" if item.name in FROM_SCRATCH else ""
        text = item.metadata["help"].replace("%", "%%") + default
        kind = _plain_type(types_of[item.name])
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            parser.add_argument(
                flag,
                type=kind,
                choices=item.metadata["choices"],
                metavar=None if item.metadata["choices"] else kind.__name__.upper(),
                default=argparse.SUPPRESS,
                help=text,
            )


def read_config(arguments: argparse.Namespace) -> TrainConfig:
    """Defaults, overridden by the config file, overridden by the flags given."""
    given = {name: value for name, value in vars(arguments).items() if name in _names()}
    return TrainConfig.from_settings({**_read_file(arguments.config), **given})


def _names() -> set[str]:
    return {item.name for item in fields(TrainConfig)}


def _plain_type(annotation: Any) -> Any:
    """The type behind `X | None`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _read_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: expected a YAML or JSON file, found none at {path}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config {path}: expected YAML or JSON, got {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected settings by name, got {type(content).__name__}")
    types_of = typing.get_type_hints(TrainConfig)
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in types_of:
            raise ValueError(f"--config {path}: expected a setting of `clusterns train`, got {key!r}")
        settings[name] = _convert(path, name, value, _plain_type(types_of[name]))
        choices = TrainConfig.__dataclass_fields__[name].metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"--config {path}: {name}: expected one of {', '.join(choices)}, got {value!r}")
    return settings


def _convert(path: str, name: str, value: Any, kind: Any) -> Any:
    """Accept exact types, whole numbers for real ones, and YAML's 5e-5, which it reads as a string."""
    if value is None and TrainConfig.__dataclass_fields__[name].default is None:
        return None
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ValueError(f"--config {path}: {name}: expected {kind.__name__}, got {value!r}")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings by name, as saved beside a trained model."""
    return dataclasses.asdict(config)
