"""The settings of the published runs, by name, for `clusterns train --preset NAME`.

ClusterNS: Deng et al., Findings of ACL 2023, the paper's table of hyper-parameters, which the commands
shipped with the authors' code do not all follow. SimCSE: Gao et al., EMNLP 2021, unsupervised BERT-base.
PromptBERT: Jiang et al., EMNLP 2022, unsupervised BERT-base. What is not here has its usual default.

One is not published: "dimensions-bert-base" is simcse-bert-base with what won against it on a small encoder
(docs/results.md). On BERT nobody has run it.
"""

from __future__ import annotations

from typing import Any

# The million English Wikipedia sentences that all of them train on.
WIKIPEDIA = "princeton-nlp/datasets-for-simcse"

# Common to all: one epoch of sentences cut to 32 tokens, AdamW without weight decay, linear decay without
# warm-up, STS-B dev every 125 steps.
_COMMON: dict[str, Any] = {
    "train_file": WIKIPEDIA,
    "epochs": 1,
    "max_length": 32,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "temperature": 0.05,
    "eval_steps": 125,
    "seed": 42,
}
_CLUSTERNS: dict[str, Any] = {
    **_COMMON,
    "pooling": "cls",
    "head": "train",
    "patience": 3,
    "centroid_update": "sum",
    "false_negatives": "bml",
    "hard_negatives": True,
}
# PromptBERT's templates, the template's own state subtracted with gradient.
_PROMPT: dict[str, Any] = {"pooling": "mask", "prompt": "auto", "denoise": "trained"}
# Whole epochs, no clustering: neither paper stops early.
_BASELINE: dict[str, Any] = {**_COMMON, "head": "train", "patience": 0, "num_clusters": 0}
_SIMCSE: dict[str, Any] = {"pooling": "cls", "batch_size": 64, "learning_rate": 3e-5}


def _clusterns(
    model: str,
    *,
    batch_size: int,
    learning_rate: float,
    num_clusters: int,
    centroid_momentum: float,
    start_cosine: float,
    bml: tuple[float, float, float] | None,
    **others: Any,
) -> dict[str, Any]:
    """One column of the table; `bml` is λ, α, β, and None is λ = 0."""
    weight, alpha, beta = bml or (0.0, 0.0, 0.0)
    return {
        "model": model,
        **_CLUSTERNS,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "num_clusters": num_clusters,
        "centroid_momentum": centroid_momentum,
        "start_cosine": start_cosine,
        "bml_weight": weight,
        "bml_alpha": alpha,
        "bml_beta": beta,
        **others,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": _clusterns(
        "bert-base-uncased",
        batch_size=256,
        learning_rate=5e-5,
        num_clusters=128,
        centroid_momentum=1e-3,
        start_cosine=0.4,
        bml=(1e-3, 0.0, 0.3),
    ),
    "bert-large": _clusterns(
        "bert-large-uncased",
        batch_size=512,
        learning_rate=5e-5,
        num_clusters=128,
        centroid_momentum=1e-3,
        start_cosine=0.5,
        bml=(5e-5, 0.25, 0.3),
    ),
    "roberta-base": _clusterns(
        "roberta-base",
        batch_size=512,
        learning_rate=5e-5,
        num_clusters=128,
        centroid_momentum=1e-3,
        start_cosine=0.4,
        bml=(1e-4, 0.2, 0.5),
    ),
    "roberta-large": _clusterns(
        "roberta-large",
        batch_size=512,
        learning_rate=5e-5,
        num_clusters=128,
        centroid_momentum=5e-4,
        start_cosine=0.4,
        bml=None,
    ),
    "prompt-bert-base": _clusterns(
        "bert-base-uncased",
        batch_size=512,
        learning_rate=5e-5,
        num_clusters=96,
        centroid_momentum=5e-4,
        start_cosine=0.4,
        bml=(1e-2, 0.0, 0.2),
        **_PROMPT,
    ),
    "prompt-bert-large": _clusterns(
        "bert-large-uncased",
        batch_size=256,
        learning_rate=3e-5,
        num_clusters=96,
        centroid_momentum=1e-4,
        start_cosine=0.2,
        bml=(5e-4, 0.25, 0.3),
        **_PROMPT,
    ),
    "prompt-roberta-base": _clusterns(
        "roberta-base",
        batch_size=512,
        learning_rate=5e-5,
        num_clusters=128,
        centroid_momentum=1e-3,
        start_cosine=0.4,
        bml=(1e-2, 0.2, 0.6),
        hard_negatives=False,
        **_PROMPT,
    ),
    "simcse-bert-base": {
        "model": "bert-base-uncased",
        **_BASELINE,
        **_SIMCSE,
    },
    "dimensions-bert-base": {
        "model": "bert-base-uncased",
        **_BASELINE,
        **_SIMCSE,
        "dimension_weight": 3.0,
    },
    "promptbert-base": {
        "model": "bert-base-uncased",
        **_BASELINE,
        **_PROMPT,
        "batch_size": 256,
        "learning_rate": 1e-5,
    },
}
