"""Settings of `clusterns train`: one dataclass, from which the command line is made (`arguments.py`)."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..backend import BACKENDS, check_backend
from ..cached import CachedClusterNSLoss
from ..centroids import CENTROID_UPDATES
from ..checks import check_choice, check_count, check_number, check_seed
from ..corpus.judged import KINDS
from ..files import expanded
from ..loss import ClusterNSLoss
from ..models.pooling import HEADS, POOLINGS
from ..objective.ranks import GATHERS
from ..rules import WORDS
from .presets import PRESETS


def setting(
    group: str,
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    symbol: str = "",
    when: str = "",
) -> Any:
    """A field with its help text, the words it may take, the paper's symbol, and when to change it."""
    told = {"group": group, "help": text, "choices": choices, "symbol": symbol, "when": when}
    return field(default=default, metadata=told)


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


# Settings that may differ between a run and its resumption: they change where and how fast, not what.
FREE_ON_RESUME = set(
    """preset output_dir overwrite_output_dir resume checkpoint_steps keep_checkpoints num_workers device
    report_to push_to_hub log_steps mini_batch_size gradient_checkpointing compile backend gather""".split()
)
# What these name is compared by its content, and with these a run may go on for longer.
COMPARED_BY_CONTENT = set(
    """model train_file text_columns delimiter header label_column positive_label min_score sts_dir dev
    dev_kind dev_columns dev_corpus""".split()
)
LENGTH = {"max_steps", "epochs", "patience"}
_PATHS = ("model", "train_file", "output_dir", "sts_dir", "dev", "dev_corpus")
GROUPS = "data model objective clustering optimiser evaluation checkpoints output hardware".split()
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
TEMPERATURES = (0.01, 1.0)  # bounds of a learned one


@dataclass
class TrainConfig:
    """Everything `clusterns train` can be told.

    With neither `model` nor `train_file` a small BERT is trained from scratch on documentation strings; see
    `from_settings` for its defaults.
    """

    loss_class: ClassVar[type[ClusterNSLoss]] = ClusterNSLoss  # for experiments with another one

    preset: str | None = setting(
        "data",
        None,
        "settings of a published run, model and sentences included; flags override",
        choices=tuple(PRESETS),
        when="to repeat a row of the paper",
    )
    train_file: str | None = setting(
        "data",
        None,
        "sentences to train on: a txt, csv, tsv, json, jsonl or parquet file, or the hub name of a dataset; "
        "without it the documentation strings of the installed Python packages",
    )
    text_columns: str | None = setting(
        "data",
        None,
        "columns to train on, as in sent0,sent1,hard_neg: one gives two dropout views of each sentence, two "
        "are pairs, the third is a hard negative; names, or numbers from 1",
        when="the columns have other names than the usual ones",
    )
    delimiter: str | None = setting(
        "data",
        None,
        "of a txt, csv or tsv file: comma, semicolon, tab, bar, a character, or none for a sentence a line; "
        "default: found out",
        when="the log says another one than the file's",
    )
    header: bool | None = setting(
        "data",
        None,
        "whether its first line names the columns; default: found out, and said where in doubt",
        when="the log says that it is in doubt",
    )
    label_column: str | None = setting(
        "data",
        None,
        "what --positive-label or --min-score is about; default: the column that looks like it",
    )
    positive_label: str | None = setting(
        "data",
        None,
        "labels, by commas, of the pairs to train on; any takes all, whatever the label",
        when="pairs stand beside a label, and not all of them mean the same",
    )
    min_score: float | None = setting(
        "data", None, "the least score of the pairs to train on", when="pairs stand beside a score"
    )
    unique: bool = setting(
        "data",
        True,
        "a sentence only once in a batch, where it would be its own negative",
        when="never, but to repeat a code without it",
    )
    max_length: int = setting(
        "data",
        32,
        "tokens of a training sentence; a template's do not count",
        when="your texts are longer: time and memory grow with it",
    )

    model: str | None = setting(
        "model",
        None,
        "folder or hub name of a transformers encoder; without it a small BERT starts from scratch",
    )
    pooling: str | None = setting(
        "model",
        None,
        "embedding of a sentence; default: what the model's files say, else cls, mask with a prompt",
        choices=tuple(POOLINGS),
        when="mean often suits a model that was never trained for [CLS]",
    )
    head: str | None = setting(
        "model",
        None,
        "Linear+Tanh on the embedding: in training only, as the paper has it, always, or none; default: "
        "what the model's files say, else train",
        choices=HEADS,
        when="none for short runs, in which the new layer does not pay",
    )
    prompt: str | None = setting(
        "model",
        None,
        "published templates around each sentence, the embedding at their mask: PromptBERT's for this "
        "vocabulary (auto), for BERT's or for RoBERTa's",
        choices=("auto", "bert", "roberta"),
        when="the model has a mask token, and a template may cost tokens",
    )
    template: str | None = setting(
        "model",
        None,
        "template of your own, with [X] for the sentence and [MASK]: of view 1 and evaluation",
        when="another language than English",
    )
    second_template: str | None = setting("model", None, "template of view 2; without it that of view 1")
    denoise: str = setting(
        "model",
        "none",
        "subtract in training what the template alone gives: without gradient through it (frozen), or with "
        "(trained)",
        choices=("none", "frozen", "trained"),
        when="with a template",
    )

    temperature: float = setting(
        "objective",
        0.05,
        "divides the cosines",
        symbol="τ",
        when="seldom; lower weighs the hardest negatives more",
    )
    learn_temperature: bool = setting(
        "objective", False, "start from --temperature and learn it, between 0.01 and 1"
    )
    false_negatives: str = setting(
        "objective",
        "bml",
        "what becomes of cluster-mates",
        choices=WORDS,
        when="exclude takes them out of the negatives, keep leaves them in",
    )
    bml_weight: float = setting(
        "objective",
        1e-4,
        "of the two-sided margin loss (BML) on false negatives",
        symbol="λ",
        when="raise it where mates drift far below the positives, beyond β",
    )
    bml_alpha: float = setting(
        "objective",
        0.2,
        "least gap between the cosine of the positive and that of a false negative",
        symbol="α",
        when="with β: they bracket the gap between positives and mates in training.png",
    )
    bml_beta: float = setting(
        "objective",
        0.5,
        "largest such gap",
        symbol="β",
        when="with α",
    )
    dimension_weight: float = setting(
        "objective",
        0.0,
        "of a second InfoNCE, over the dimensions of the batch, which keeps them apart",
        when="short runs on a small batch for similarity: 3 won there against SimCSE, but not where texts "
        "were clustered (docs/results.md); not with torchrun",
    )
    dimension_temperature: float = setting("objective", 0.5, "divides its cosines")
    mlm_weight: float = setting(
        "objective", 0.0, "of masked language modelling on a masked copy; SimCSE's is 0.1"
    )
    mlm_probability: float = setting("objective", 0.15, "share of the tokens it masks")

    num_clusters: int = setting(
        "clustering",
        128,
        "clusters; 0 is plain SimCSE",
        symbol="K",
        when="your batch is small: a quarter to a half of it, so that mates meet",
    )
    start_cosine: float = setting(
        "clustering",
        0.4,
        "clustering starts when the mean cosine of a batch falls to it",
        symbol="σ",
        when="the log says that clustering never started",
    )
    centroid_momentum: float = setting(
        "clustering",
        1e-3,
        "how far a centroid moves towards its sentences in a step; the learning rate with adamw",
        symbol="γ",
        when="raise it where training.png shows centroids no nearer than the batch",
    )
    centroid_update: str = setting("clustering", "sum", "what moves a centroid", choices=CENTROID_UPDATES)
    hard_negatives: bool = setting(
        "clustering",
        True,
        "the second-nearest centroid (runner-up) as hard negative",
        when="an ablation; the published prompt-RoBERTa has none",
    )
    hard_negative_weight: float = setting(
        "clustering", 0.0, "added to the logit of a sentence's own hard negative"
    )

    max_steps: int | None = setting("optimiser", None, "optimiser steps; without it, --epochs decides")
    epochs: int = setting("optimiser", 1, "passes over the sentences")
    batch_size: int = setting(
        "optimiser",
        256,
        "sentences in a batch, over all processes",
        symbol="B",
        when="as large as memory and sentences allow: each is a negative of all others",
    )
    mini_batch_size: int | None = setting(
        "optimiser",
        None,
        "sentences whose activations the encoder holds at a time, for batches beyond its memory: gradients "
        "stay those of the whole batch, a step takes one more forward pass; without it the batch goes whole",
        when="the encoder runs out of memory",
    )
    gradient_checkpointing: bool = setting(
        "optimiser",
        False,
        "keep only the inputs of the encoder's layers, and compute what is within again in the backward pass",
        when="one sentence more would not fit; --mini-batch-size saves more at large batches",
    )
    accumulation_steps: int = setting(
        "optimiser",
        1,
        "batches whose gradients are averaged in an optimiser step; each has its own loss, so a sentence "
        "meets the negatives of its batch only: for a truly larger batch use --batch-size with "
        "--mini-batch-size",
    )
    learning_rate: float = setting(
        "optimiser",
        5e-5,
        "peak of the linear decay",
        when="lower where embeddings collapse or the loss is no number; 1e-3 from scratch",
    )
    warmup_steps: int = setting("optimiser", 0, "steps in which the learning rate rises")
    weight_decay: float = setting("optimiser", 0.0, "of AdamW")
    max_grad_norm: float = setting("optimiser", 1.0, "gradient clipping")
    seed: int = setting("optimiser", 42, "of everything random", when="a repetition; --seeds runs several")

    dev: str | None = setting(
        "evaluation",
        None,
        "file of your own that chooses the best checkpoint: scored pairs, labelled texts, or queries with "
        "their passages; which of them is found from its columns",
        when="you have some hundred judged texts: far better than the last checkpoint",
    )
    dev_kind: str | None = setting(
        "evaluation",
        None,
        "what --dev holds, where its columns do not tell",
        choices=KINDS,
    )
    dev_columns: str | None = setting(
        "evaluation",
        None,
        "its columns, as sentence1,sentence2,score or text,label or query,passage; names, or numbers from 1",
        when="they have other names than the usual ones",
    )
    dev_corpus: str | None = setting(
        "evaluation",
        None,
        "file of more passages, among which those of --dev are to be found",
    )
    sts_dir: str | None = setting(
        "evaluation",
        None,
        "folder of STS sets in SentEval's layout; STS-B dev then chooses the best checkpoint",
    )
    eval_steps: int = setting("evaluation", 125, "steps between two dev evaluations")
    patience: int = setting(
        "evaluation",
        3,
        "stop after so many dev evaluations without a gain; 0 never stops early",
        when="0 where runs are to be compared step by step",
    )

    checkpoint_steps: int | None = setting(
        "checkpoints",
        None,
        "steps between two checkpoints in OUTPUT_DIR/checkpoints; without it there are none",
        when="a run may be killed",
    )
    keep_checkpoints: int = setting("checkpoints", 2, "the newest ones, so many")
    resume: bool = setting(
        "checkpoints",
        False,
        "go on from the newest checkpoint in the output folder to the same end; from the beginning where "
        "there is none yet",
    )

    output_dir: str = setting("output", "runs/clusterns", "where the best model, the log and the picture go")
    overwrite_output_dir: bool = setting("output", False, "write into an output folder that is not empty")
    log_steps: int = setting("output", 5, "steps between two lines of the log")
    report_to: str = setting(
        "output",
        "tensorboard",
        "who charts the figures of the log as they come, beside log.jsonl",
        choices=TRACKERS,
    )
    push_to_hub: str | None = setting(
        "output", None, "name on the Hugging Face hub (USER/MODEL) that the finished model is uploaded to"
    )

    precision: str = setting(
        "hardware",
        "auto",
        "autocast of the encoder: bf16, fp16 with loss scaling (CUDA only), or none; auto is bf16 where the "
        "device computes in it",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    device: str = setting("hardware", "auto", "cuda, cpu, mps ...; auto takes the fastest at hand")
    compile: bool = setting(
        "hardware", False, "compile the encoder: the first steps take a minute, the others less"
    )
    num_workers: int | None = setting(
        "hardware",
        None,
        "processes that tokenise ahead of the loop; 0 tokenises in it; default 0 on a CPU, else 2",
    )
    backend: str = setting("hardware", "auto", "of the loss", choices=BACKENDS)
    gather: str = setting(
        "hardware",
        "all",
        "how several processes share the positives; ring takes less memory",
        choices=GATHERS,
    )

    def __post_init__(self) -> None:
        for name in _PATHS:
            if getattr(self, name) is not None:
                expanded(getattr(self, name), flag(name))  # says what is wrong with it
                setattr(self, name, os.path.expanduser(getattr(self, name)))

    @property
    def from_scratch(self) -> bool:
        """Whether a small BERT is made instead of an encoder loaded."""
        return self.model is None

    @property
    def is_judged(self) -> bool:
        """Whether there is a dev score; the documentation strings bring their own."""
        return self.dev is not None or self.sts_dir is not None or self.train_file is None

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainConfig:
        """Settings by name over those of their preset, over the defaults.

        Without a model the defaults are those of `FROM_SCRATCH`. Raises ValueError or TypeError in one line.
        """
        preset = settings.get("preset")
        if preset is not None:
            check_choice("preset", preset, tuple(PRESETS))
            defaults = {"output_dir": f"runs/{preset}", **PRESETS[preset]}
            if settings.get("template") is not None:  # in place of the published ones
                defaults.pop("prompt", None)
            settings = {**defaults, **settings}
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
        """Raise `ValueError` with one line for a setting out of range. Loss and prompt check their own."""
        for name in "epochs accumulation_steps max_length eval_steps log_steps keep_checkpoints".split():
            check_count(name, getattr(self, name), at_least=1)
        check_count("batch_size", self.batch_size, at_least=2)  # a sentence's negatives are the others
        for name in ("patience", "num_clusters", "warmup_steps"):
            check_count(name, getattr(self, name), at_least=0)
        check_seed("--seed", self.seed)
        for name in ("max_steps", "mini_batch_size", "checkpoint_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), at_least=1)
        if self.num_workers is not None:
            check_count("num_workers", self.num_workers, at_least=0)
        if self.num_clusters > self.batch_size:
            raise ValueError(
                f"--num-clusters: expected at most --batch-size {self.batch_size}, of which the first "
                f"centroids are taken, got {self.num_clusters}; a quarter to a half of it is usual"
            )
        check_number("learning_rate", self.learning_rate, above=0)
        if self.learn_temperature:
            low, high = TEMPERATURES
            check_number("--temperature to learn", self.temperature, at_least=low, at_most=high)
        check_number("max_grad_norm", self.max_grad_norm, above=0)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_number("mlm_weight", self.mlm_weight, at_least=0)
        check_number("mlm_probability", self.mlm_probability, above=0, at_most=0.99)
        if self.resume and self.overwrite_output_dir:
            raise ValueError(
                "--resume: expected no --overwrite-output-dir with it, which begins anew, got both"
            )
        if self.push_to_hub is not None:
            check_hub_name(self.push_to_hub)
        if self.model is not None:
            model, output = (Path(os.path.realpath(path)) for path in (self.model, self.output_dir))
            if model == output or output / "checkpoints" in model.parents:
                raise ValueError(
                    f"--output-dir: expected another folder than that of --model {self.model}, got "
                    f"{self.output_dir}"
                )
        if self.dev is not None and self.sts_dir is not None:
            raise ValueError(
                "--dev: expected no --sts-dir with it, as one of them chooses the checkpoint, got "
                f"{self.dev} and {self.sts_dir}"
            )
        if self.mlm_weight and self.mini_batch_size is not None:
            raise ValueError(
                "mlm_weight: expected 0 with mini_batch_size, which has no graph of the whole batch"
            )
        if self.template is not None and self.prompt is not None:
            raise ValueError(
                f"template: expected none with the prompt {self.prompt!r}, got {self.template!r}"
            )
        if self.second_template is not None and self.template is None:
            raise ValueError("second_template: expected a template for view 1 with it, got none")
        if self.denoise != "none" and self.prompt is None and self.template is None:
            raise ValueError(f"denoise: expected 'none' without a prompt or template, got {self.denoise!r}")

    def without_effect(self) -> Iterator[str]:
        """A line for each setting that was changed and that another one makes idle."""
        of_file = "text_columns delimiter header label_column positive_label min_score"
        of_clusters = "start_cosine centroid_momentum centroid_update hard_negatives false_negatives"
        of_bml, clustered = "bml_weight bml_alpha bml_beta", self.num_clusters > 0
        is_asked = self.positive_label is not None or self.min_score is not None
        for names, is_idle, why in (
            (of_file, self.train_file is None, "without --train-file"),
            ("label_column", not is_asked, "without --positive-label or --min-score"),
            ("epochs", self.max_steps is not None, "with --max-steps"),
            ("keep_checkpoints", self.checkpoint_steps is None, "without --checkpoint-steps"),
            ("eval_steps patience", not self.is_judged, "without --dev or --sts-dir"),
            ("dev_kind dev_columns dev_corpus", self.dev is None, "without --dev"),
            ("mlm_probability", not self.mlm_weight, "without --mlm-weight"),
            ("dimension_temperature", not self.dimension_weight, "without --dimension-weight"),
            (f"{of_clusters} {of_bml}", not clustered, "with --num-clusters 0"),
            ("hard_negative_weight", not (clustered and self.hard_negatives), "without --hard-negatives"),
            (of_bml, clustered and self.false_negatives != "bml", "without --false-negatives bml"),
        ):
            for name in names.split():
                defaults = (FROM_SCRATCH, PRESETS.get(self.preset or "", {}))
                usual = [type(self).__dataclass_fields__[name].default, *(of.get(name) for of in defaults)]
                if is_idle and getattr(self, name) not in usual:
                    yield f"{flag(name)} has no effect {why}"

    def total_steps(self, batches: int) -> int:
        """Optimiser steps with so many batches in an epoch; ValueError where there is none."""
        steps = self.max_steps or self.epochs * batches // self.accumulation_steps
        if not steps:
            raise ValueError(
                f"accumulation_steps: expected at most {self.epochs * batches}, the batches of "
                f"{self.batch_size} in {self.epochs} epochs, for one step, got {self.accumulation_steps}"
            )
        return steps

    def workers(self, device: torch.device) -> int:
        """Processes that tokenise; by default none on a CPU, which they would share with the loop, else 2."""
        if self.num_workers is not None:
            return self.num_workers
        return 0 if device.type == "cpu" else 2

    def build_prompt(self) -> Any:
        """The `Prompt` these settings describe, or None."""
        from ..models.prompts import Prompt  # late: it needs transformers

        if self.template is not None:
            templates = [self.template, self.second_template]
            return Prompt(tuple(filter(None, templates)), denoising=self.denoise)
        return None if self.prompt is None else Prompt(self.prompt, denoising=self.denoise)

    def build_loss(
        self, embedding_dim: int, process_group: torch.distributed.ProcessGroup | None = None
    ) -> ClusterNSLoss:
        """The loss these settings describe; K = 0 is plain InfoNCE."""
        make: Callable[..., ClusterNSLoss] = self.loss_class
        if self.mini_batch_size is not None:
            make = functools.partial(CachedClusterNSLoss, mini_batch_size=self.mini_batch_size)
        try:
            check_backend(self.backend)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return make(
            embedding_dim,
            self.num_clusters,
            temperature=(
                nn.Parameter(torch.tensor(self.temperature)) if self.learn_temperature else self.temperature
            ),
            start_cosine=self.start_cosine,
            centroid_momentum=self.centroid_momentum,
            centroid_update=self.centroid_update,
            hard_negatives=self.hard_negatives,
            hard_negative_weight=self.hard_negative_weight,
            false_negatives=self.false_negatives,
            bml_weight=self.bml_weight,
            bml_alpha=self.bml_alpha,
            bml_beta=self.bml_beta,
            dimension_weight=self.dimension_weight,
            dimension_temperature=self.dimension_temperature,
            backend=self.backend,
            process_group=process_group,
            gather=self.gather,
        )


def check_hub_name(name: str) -> None:
    """Require the full name of a repository on the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        is_full = name.count("/") == 1
    except HFValidationError:
        is_full = False
    if not is_full:
        raise ValueError(
            f"--push-to-hub: expected USER/MODEL, each of letters, digits, '-', '_' and '.', got {name!r}"
        )


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings by name, as saved beside a trained model."""
    return dataclasses.asdict(config)
