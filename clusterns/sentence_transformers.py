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

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import loss as _loss
from .cached import CachedClusterNSLoss

STATE_FILE = "clusterns_loss.safetensors"

CITATION = """
@inproceedings{deng-etal-2023-clustering,
    title = "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation",
    author = "Deng, Jinghao and Wan, Fanqi and Yang, Tao and Quan, Xiaojun and Wang, Rui",
    booktitle = "Findings of the Association for Computational Linguistics: ACL 2023",
    year = "2023",
    url = "https://arxiv.org/abs/2305.09892",
}
"""


class ClusterNSLoss(nn.Module):
    """`clusterns.ClusterNSLoss` over the embeddings of a SentenceTransformer.

    Clustering goes on while the model is in training mode; an evaluation loss uses the state and leaves it.
    The Trainer's checkpoints hold the model alone: add `ClusteringState(loss)` to its callbacks.

    Args:
        model: the SentenceTransformer to train.
        num_clusters: K; 0 (with `hard_negatives=False`) is plain InfoNCE, that is SimCSE.
        mini_batch_size: rows that the model encodes at a time (gradient caching); None takes a column whole.
        gather_across_devices: with several ranks, the loss of all their batches together, each rank
            computing its own rows. The gradient after averaging is that of one process with the whole batch.
        settings: those of `clusterns.ClusterNSLoss`: temperature (a number here), start_cosine, bml_weight ….

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
        if isinstance(settings.get("temperature"), Tensor):
            raise ValueError(
                "temperature: expected a number, got a tensor; the Trainer would not average the gradient of "
                "a learned one over ranks"
            )
        if "process_group" in settings:
            raise ValueError("process_group: expected gather_across_devices in its place")
        self.model = model
        self.mini_batch_size = mini_batch_size
        self.gather_across_devices = gather_across_devices
        self.settings = settings
        dim = _embedding_dim(model)
        self.objective = (
            _loss.ClusterNSLoss(dim, num_clusters, **settings)
            if mini_batch_size is None
            else CachedClusterNSLoss(dim, num_clusters, mini_batch_size=mini_batch_size, **settings)
        )

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Loss of a batch, 0-d; the features are those of one, two or more columns, labels are not used."""
        columns = [dict(column) for column in sentence_features]
        if len(columns) == 1:
            columns = [columns[0], dict(columns[0])]
        self._prepare()
        if isinstance(self.objective, CachedClusterNSLoss):
            anchors, positives, *negatives = columns
            return self.objective(
                _Encode(self.model, anchors),
                _tensors(anchors),
                _tensors(positives),
                _stack([_tensors(column) for column in negatives]) if negatives else None,
                no_sync=getattr(self.model, "no_sync", None),
            )
        embeddings = [self.model(column)["sentence_embedding"] for column in columns]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Loss of embeddings (B, D) of anchors, positives and any number of negatives; 0-d."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: expected at least 2 tensors, got {len(embeddings)}")
        if isinstance(self.objective, CachedClusterNSLoss):
            raise ValueError("mini_batch_size: expected None for a loss from embeddings, got a number")
        self._prepare()
        negatives = torch.cat(list(embeddings[2:])) if len(embeddings) > 2 else None
        return self.objective(embeddings[0], embeddings[1], negatives)

    def _prepare(self) -> None:
        """The Trainer switches the mode of the model, not that of the loss."""
        self.objective.train(self.model.training)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.gather_across_devices and distributed and torch.distributed.get_world_size() > 1:
            self.objective.process_group = torch.distributed.group.WORLD

    @property
    def last(self) -> dict[str, Tensor]:
        """Terms of the last batch, see `clusterns.ClusterNSLoss`."""
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
        loss: the loss that the Trainer has.
        resume_from: the checkpoint that `trainer.train` resumes from, where it lies outside of `output_dir`.

    Raises FileNotFoundError or ValueError, in one line, on a resume from a checkpoint without such a state.
    """

    def __init__(self, loss: ClusterNSLoss, resume_from: str | os.PathLike[str] | None = None):
        self.loss = loss
        self.resume_from = resume_from

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write it beside the model, whole or not at all."""
        if not state.is_world_process_zero:
            return
        path = _checkpoint(args, state) / STATE_FILE
        partial = path.with_name(f".{path.name}.partial")
        tensors = self.loss.objective.state_dict()
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial)
        partial.replace(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Load it where the Trainer goes on from a checkpoint."""
        if state.global_step == 0:
            return
        path = Path(self.resume_from or _checkpoint(args, state)) / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected the clustering state of the checkpoint to resume from, there is none; "
                "name the checkpoint with ClusteringState(loss, resume_from=...)"
            )
        try:
            self.loss.objective.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{path}: expected the clustering state of {self.loss.objective}, "
                f"got: {' '.join(str(error).split())}"
            ) from error


class _Encode:
    """Tensors of some rows to their embeddings, with what the features hold beside tensors of rows."""

    def __init__(self, model: nn.Module, features: Mapping[str, Any]):
        self.model = model
        self.others = {name: value for name, value in features.items() if not isinstance(value, Tensor)}

    def __call__(self, rows: Mapping[str, Tensor]) -> Tensor:
        return self.model({**self.others, **rows})["sentence_embedding"]


def _tensors(features: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in features.items() if isinstance(value, Tensor)}


def _stack(columns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several columns under each other; shorter ones get masked tokens at the end."""
    stacked = {}
    for name in columns[0]:
        values = [column[name] for column in columns]
        if values[0].ndim > 1:
            longest = max(value.shape[1] for value in values)
            values = [F.pad(value, (0, longest - value.shape[1])) for value in values]
        stacked[name] = torch.cat(values)
    return stacked


def _embedding_dim(model: SentenceTransformer) -> int:
    # Renamed in version 6.
    find = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    dim = find()
    if dim is None:
        raise ValueError("model: expected one that states the dimension of its embeddings, got one without")
    return int(dim)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
