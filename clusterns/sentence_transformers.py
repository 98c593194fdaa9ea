"""`ClusterNSLoss` for the Trainer of sentence-transformers (version 5 or newer).

>>> from clusterns.sentence_transformers import ClusteringState, ClusterNSLoss
>>> loss = ClusterNSLoss(model, num_clusters=128)
>>> trainer = SentenceTransformerTrainer(
...     model, args, train_dataset, loss=loss, callbacks=[ClusteringState(loss)]
... )

Data sets of one column have two dropout views of each text as positive pair; of two columns the pair; further
columns are mined hard negatives. The encoder needs dropout (its configuration says how much) for the first.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import loss as _loss
from .cached import CachedClusterNSLoss
from .checks import check_count
from .files import replacing
from .reference import CITATION

try:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
except ImportError:  # its place before version 5.4
    from sentence_transformers.models import StaticEmbedding  # type: ignore[no-redef]

STATE_FILE = "clusterns_loss.safetensors"


class ClusterNSLoss(nn.Module):
    """`clusterns.ClusterNSLoss` over the embeddings of a SentenceTransformer.

    Clustering goes on while the model is in training mode; an evaluation loss uses the state and leaves it.
    The Trainer's checkpoints hold the model alone: add `ClusteringState(loss)` to its callbacks. A new model
    in the place of the old, as in a hyperparameter search, begins without clusters.

    Within `MatryoshkaLoss` each width has centroids of its own: they start from embeddings cut to it, and
    move once in each batch for which it is drawn. With a `truncate_dim` the model is trained as cut to it.
    `AdaptiveLayerLoss` and `Matryoshka2dLoss` are refused in the first step: they call the loss for several
    layers of one batch, and each would move the centroids.

    Args:
        model: the SentenceTransformer to train.
        num_clusters: K; 0 is plain InfoNCE, that is SimCSE.
        mini_batch_size: rows that the model encodes at a time (gradient caching); None takes a column whole,
            and is the one for a `StaticEmbedding`, whose features are no rows, and within `MatryoshkaLoss`
            before sentence-transformers 5.7.
        gather_across_devices: with several ranks, the loss of all their batches together, each rank
            computing its own rows. The gradient after averaging is that of one process with the whole batch.
        settings: those of `clusterns.ClusterNSLoss`: temperature (a number here), start_cosine, bml_weight ….
            Without clusters, `directions="both"` is MultipleNegativesSymmetricRankingLoss.

    Raises TypeError or ValueError with one line for bad settings.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        num_clusters: int = 128,
        *,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        **settings: Any,
    ):
        super().__init__()
        bare = _bare(model)
        if not isinstance(bare, SentenceTransformer):
            raise TypeError(
                f"model: expected a SentenceTransformer, got {type(model).__name__}; the loss that takes "
                "embeddings, and their dimension, is clusterns.ClusterNSLoss"
            )
        if isinstance(settings.get("temperature"), Tensor):
            raise ValueError(
                "temperature: expected a number, got a tensor; the Trainer would not average the gradient of "
                "a learned one over ranks"
            )
        if "process_group" in settings:
            raise ValueError("process_group: expected gather_across_devices in its place")
        if mini_batch_size is not None:
            check_count("mini_batch_size", mini_batch_size, at_least=1)
            if any(isinstance(module, StaticEmbedding) for module in model.modules()):
                raise ValueError(
                    "mini_batch_size: expected None for a model with a StaticEmbedding, whose features have "
                    f"no rows to cut, got {mini_batch_size}"
                )
        self.model = model
        self.truncate_dim = bare.truncate_dim
        self.mini_batch_size = mini_batch_size
        self.gather_across_devices = gather_across_devices
        self.settings = settings
        self.objective = _Objective(_embedding_dim(bare), num_clusters, **settings)
        self._begun = False

    def __setattr__(self, name: str, value: Any) -> None:
        # The Trainer puts in a wrapper of the same model, or for another trial another model.
        is_model = name == "model" and isinstance(value, SentenceTransformer)
        if is_model and hasattr(self, "objective") and value is not _bare(self.model):
            for buffer in self.objective.buffers():
                buffer.zero_()
        super().__setattr__(name, value)

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Loss of a batch, 0-d; the features are those of one, two or more columns, labels are not used.

        Each column goes through the model as a copy, with all that its features hold beside tensors.
        """
        columns = list(sentence_features)
        if len(columns) == 1:
            columns *= 2
        bare = _bare(self.model)
        if isinstance(bare, SentenceTransformer) and hasattr(bare[0].forward, "set_layer_idx"):
            raise ValueError(
                "loss: expected one outside of AdaptiveLayerLoss and Matryoshka2dLoss, got ClusterNSLoss; "
                "each layer of a batch would move its centroids"
            )
        if self.model.training and not self._begun:
            self._begun = True
            self._look_for_state()
        cut_by_model = hasattr(self.model.forward, "set_dim")  # MatryoshkaLoss is at it
        if self.mini_batch_size is None:
            embeddings = [self._encode(column) for column in columns]
            return self._loss(embeddings, embeddings[0].shape[-1] if cut_by_model else None)
        if cut_by_model:
            raise ValueError(
                "mini_batch_size: expected None within MatryoshkaLoss before sentence-transformers 5.7, "
                f"got {self.mini_batch_size}"
            )
        embeddings = self._encode_in_mini_batches(columns, self.mini_batch_size)
        if "calculate_loss" not in vars(self):
            return self._loss(embeddings)
        # MatryoshkaLoss has put its own in place, which gives the gradients of several widths together.
        leaves = [rows.detach().requires_grad_(torch.is_grad_enabled()) for rows in embeddings]
        loss = self.calculate_loss([[leaf] for leaf in leaves])
        for rows, leaf in zip(embeddings, leaves, strict=True):
            if leaf.grad is not None:
                loss = loss + ((rows - leaf.detach()) * leaf.grad).sum()  # adds 0, and hands on the gradient
        return loss

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Loss of embeddings (B, D) of anchors, positives and any number of negatives; 0-d."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: expected at least 2 tensors, got {len(embeddings)}")
        return self._loss(embeddings)

    @property
    def uses_gradient_cache(self) -> bool:
        """Whether MatryoshkaLoss is to replace `calculate_loss`, not `forward` of the model."""
        return self.mini_batch_size is not None

    def calculate_loss(self, columns: Sequence[Sequence[Tensor]]) -> Tensor:
        """For MatryoshkaLoss: loss of columns of embeddings (B, d), whose gradients go into their `.grad`."""
        embeddings = [torch.cat(list(column)) for column in columns]
        loss = self._loss(embeddings, embeddings[0].shape[-1])
        if torch.is_grad_enabled():
            loss.backward()
        return loss.detach()

    def _encode(self, features: Mapping[str, Any]) -> Tensor:
        """Embeddings (B, D). A module may change the features in place, or add to them: it gets a copy."""
        return self.model(_copy(features))["sentence_embedding"][:, : self.truncate_dim]

    def _encode_in_mini_batches(self, columns: Sequence[Mapping[str, Any]], size: int) -> list[Tensor]:
        """Embeddings (B, D) of anchors and positives, then of all negatives, by gradient caching."""
        columns = [_copy(column) for column in columns]  # to encode them again in backward
        counts = [_count_rows(column) for column in columns]
        device = next(value.device for value in columns[0].values() if isinstance(value, Tensor))

        def places(*numbers: int) -> dict[str, Tensor]:
            """Column and row of each text, in the place of its features; and the device of these."""
            each = [[number, row] for number in numbers for row in range(counts[number])]
            return {"places": torch.tensor(each, device="cpu"), "": torch.empty(len(each), 0, device=device)}

        def encode(texts: Mapping[str, Tensor]) -> Tensor:
            embeddings = []
            for number, run in groupby(texts["places"].tolist(), key=lambda place: place[0]):
                rows = [row for _, row in run]
                embeddings.append(self._encode(_cut(columns[number], slice(rows[0], rows[-1] + 1))))
            return torch.cat(embeddings)

        negatives = places(*range(2, len(columns))) if len(columns) > 2 else None
        caching = _GradientCaching(self.objective.embedding_dim, 0, mini_batch_size=size)
        no_sync = getattr(self.model, "no_sync", None)
        return list(caching(encode, places(0), places(1), negatives, no_sync=no_sync))

    def _loss(self, embeddings: Sequence[Tensor], width: int | None = None) -> Tensor:
        """Loss of embeddings, with the clusters of a width where there are several."""
        # The Trainer switches the mode of the model, not that of the loss.
        self.objective.train(self.model.training)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.gather_across_devices and distributed and torch.distributed.get_world_size() > 1:
            self.objective.process_group = torch.distributed.group.WORLD
        negatives = torch.cat(list(embeddings[2:])) if len(embeddings) > 2 else None
        objective = self.objective if width is None else self.objective.of_width(width)
        return objective(embeddings[0], embeddings[1], negatives)

    def _look_for_state(self) -> None:
        """Warn in a Trainer that saves checkpoints without the clusters."""
        trainer = _running_trainer()
        if trainer is None or trainer.args.save_strategy == "no" or not self.objective.num_clusters:
            return
        saved = any(self in state.losses for state in _states(trainer))
        if trainer.is_world_process_zero() and not saved:
            warnings.warn(
                "the Trainer's checkpoints hold the model without the clusters of ClusterNSLoss, with which "
                "a resumed run would go on; pass callbacks=[ClusteringState(loss)] to the Trainer",
                stacklevel=3,
            )

    @property
    def last(self) -> dict[str, Tensor]:
        """Terms of the last batch, at full width; see `clusterns.ClusterNSLoss`."""
        return self.objective.last

    def get_config_dict(self) -> dict[str, Any]:
        """Settings, for the model card."""
        return {
            "num_clusters": self.objective.num_clusters,
            "temperature": self.objective.temperature,
            **{name: value for name, value in self.settings.items() if name != "temperature"},
            "mini_batch_size": self.mini_batch_size,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return CITATION


class ClusteringState(TrainerCallback):
    """Saves the clustering state of the loss with each checkpoint, and brings it back on resume.

    Args:
        loss: what the Trainer has as its loss: one, or a dict of them, also within a `MatryoshkaLoss`. Each
            has a file of its own, named after its data set where the Trainer has several.
        resume_from: the checkpoint that `trainer.train` resumes from, where it lies outside of `output_dir`.

    Raises TypeError where the loss holds no ClusterNSLoss of this module; FileNotFoundError or ValueError, in
    one line, on a resume from a checkpoint without such a state.
    """

    def __init__(
        self,
        loss: nn.Module | Mapping[str, nn.Module],
        resume_from: str | os.PathLike[str] | None = None,
    ):
        self.loss = loss
        self.losses = list(_losses(loss).values())
        if not self.losses:
            raise TypeError(
                "loss: expected a clusterns.sentence_transformers.ClusterNSLoss, or what holds one, "
                f"got {type(loss).__name__}"
            )
        self.resume_from = resume_from

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write it beside the model, whole or not at all."""
        if not args.should_save:
            return
        folder, names = _checkpoint(args, state), self._file_names()
        for loss in self.losses:
            tensors = {name: value.cpu().contiguous() for name, value in loss.objective.state_dict().items()}
            with replacing(folder / names[loss]) as temporary:
                save_file(tensors, temporary)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Load it where the Trainer goes on from a checkpoint."""
        if state.global_step == 0:
            return
        folder, names = Path(self.resume_from or _checkpoint(args, state)), self._file_names()
        for loss in self.losses:
            path = folder / names[loss]
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: expected the clustering state of the checkpoint to resume from, there is none; "
                    "name the checkpoint with ClusteringState(loss, resume_from=...)"
                )
            try:
                loss.objective.load_state_dict(load_file(path))
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(
                    f"{path}: expected the clustering state of {loss.objective.num_clusters} clusters of "
                    f"dimension {loss.objective.embedding_dim}, got: {' '.join(str(error).split())}"
                ) from error

    def _file_names(self) -> dict[ClusterNSLoss, str]:
        """Of the state of each loss; those of other callbacks of the Trainer have other names."""
        trainer, given = _running_trainer(), [self.loss]
        if trainer is not None:
            given = [getattr(trainer, "loss", {}), *(state.loss for state in _states(trainer))]
        losses = _losses(*given)
        if len(losses) == 1:
            return dict.fromkeys(losses.values(), STATE_FILE)
        stem, suffix = os.path.splitext(STATE_FILE)
        return {loss: f"{stem}-{quote(name, safe='')}{suffix}" for name, loss in losses.items()}


class _Objective(_loss.ClusterNSLoss):
    """With clusters for embeddings of other widths too, as MatryoshkaLoss cuts them; part of its state."""

    lone_ranks_cure = "gather_across_devices=True"

    def __init__(self, embedding_dim: int, num_clusters: int, **settings: Any):
        super().__init__(embedding_dim, num_clusters, **settings)
        self._settings = settings

    def of_width(self, width: int) -> _loss.ClusterNSLoss:
        """The objective of embeddings (B, width): itself, or one that it keeps."""
        if width == self.embedding_dim:
            return self
        if str(width) not in self._modules:
            other = _Objective(width, self.num_clusters, **self._settings).to(self.centroids.device)
            other._told = self._told  # warnings come once, not for each width
            self.add_module(str(width), other)
        other = getattr(self, str(width))
        other.process_group = self.process_group
        return other.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, *arguments, **keywords):
        for name in state_dict:
            width = name.removeprefix(prefix).split(".")[0]
            if name.startswith(prefix) and width.isdecimal():
                self.of_width(int(width))
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)


class _AsGiven(_loss.ClusterNSLoss):
    def forward(self, *embeddings: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return embeddings


class _GradientCaching(CachedClusterNSLoss, _AsGiven):  # type: ignore[misc]
    """The embeddings that `CachedClusterNSLoss` would hand to the loss, with what its backward pass does."""


def _losses(*given: nn.Module | Mapping[str, nn.Module]) -> dict[str, ClusterNSLoss]:
    """Each ClusterNSLoss that these hold, once, by its name there."""
    found: dict[str, ClusterNSLoss] = {}
    for each in given:
        for prefix, holder in each.items() if isinstance(each, Mapping) else [("", each)]:
            modules = holder.named_modules(prefix=prefix) if isinstance(holder, nn.Module) else ()
            for name, module in modules:
                if isinstance(module, ClusterNSLoss) and module not in found.values():
                    while name in found:
                        name += "+"
                    found[name] = module
    return found


def _running_trainer() -> Trainer | None:
    """The Trainer that is calling, which tells neither losses nor callbacks about itself."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
    return None


def _states(trainer: Trainer) -> list[ClusteringState]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, ClusteringState)]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder of the checkpoint of this step; each run of a hyperparameter search has its own."""
    folder, trainer = args.output_dir or ".", _running_trainer()
    if trainer is not None:
        folder = trainer._get_output_dir(getattr(trainer, "_trial", None))
    return Path(folder) / f"checkpoint-{state.global_step}"


def _bare(model: nn.Module) -> nn.Module:
    """Without what DistributedDataParallel and torch.compile wrap around it."""
    while not isinstance(model, SentenceTransformer):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _copy(features: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in features.items()
    }


def _is_of_rows(name: str, value: Any) -> bool:
    # The length of the prompt is that of all rows, whatever its shape.
    return isinstance(value, Tensor) and value.ndim > 0 and name != "prompt_length"


def _count_rows(features: Mapping[str, Any]) -> int:
    counts = {name: len(value) for name, value in features.items() if _is_of_rows(name, value)}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"mini_batch_size: expected None for features without equally many rows each, got {counts}"
        )
    return next(iter(counts.values()))


def _cut(features: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] if _is_of_rows(name, value) else value for name, value in features.items()}


def _embedding_dim(model: SentenceTransformer) -> int:
    # Its name before version 5.4.
    find = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    dim = find()
    if dim is None:
        raise ValueError("model: expected one that states the dimension of its embeddings, got one without")
    return int(dim)
