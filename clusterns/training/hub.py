"""What others see of a trained model: its card, README.md, and its upload to the Hugging Face hub."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation.tables import format_table, table
from ..files import replacing
from ..models.folder import first_line
from ..reference import CITATION
from .config import FREE_ON_RESUME, TrainConfig
from .run_folder import CARD, CARD_MARK, PICTURE, SUMMARY, is_of_user, read_summary, versions

# Stands in the card for the model's name, until it has one on the hub.
_NAME = "path/to/this/model"
# Rows of one, two or three texts.
_ROWS = ("sentences, of which two views differ by dropout", "pairs", "pairs, each with a hard negative")


def write_card(run: Any) -> None:
    """Write README.md for the model that a run has just saved, unless a user has written it."""
    path = run.output / CARD
    if not is_of_user(path):
        with replacing(path) as place:
            place.write_text(card(run), encoding="utf-8")


def card(run: Any) -> str:
    """The model card of a run as it stands: no folder of this machine is named in it."""
    from huggingface_hub import ModelCardData

    config: TrainConfig = run.config
    base = None if config.model is None else public(config.model)
    about = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "clusterns"],
        base_model=config.model if base == config.model else None,  # not a folder of this machine
    )
    clustered = run.loss_fn.clustering_active
    method = "ClusterNS" if clustered else "SimCSE"
    start = f"from `{base}`" if base is not None else "from random weights"
    words = ", trust_remote_code=True" if run.encoder.denoises(training=False) else ""
    rows, width = run.task.rows, run.encoder.embedding_dim
    source = "documentation strings of installed Python packages"
    if config.train_file is not None:
        source = public(config.train_file) + rows.account.removeprefix(config.train_file)
    settings = [
        (item.name, item.metadata["symbol"], _code(public(getattr(config, item.name))))
        for item in fields(config)
        if getattr(config, item.name) != item.default and item.name not in FREE_ON_RESUME - {"preset"}
    ]
    judged = "STS-B dev" if config.sts_dir is not None else "held-out documentation"
    judged = judged if config.dev is None else public(config.dev)
    scores = f"No dev set: the last model, of step {run.step} of {run.total_steps}."
    if run.best_scores:
        best = {"before": run.first_scores, f"step {run.best_step} of {run.total_steps}": run.best_scores}
        scores = f"On {judged}, by which this step was chosen:\n\n{format_table(best)}"
    text = f"""---
{about.to_yaml()}
---

{CARD_MARK}

# Sentence encoder trained with {method}

It maps a sentence to {width} numbers, which are compared by cosine; pooling `{run.encoder.pooling}`, at most
{run.encoder.max_length} tokens. Trained {start} by contrastive learning with clusterns {__version__}.

## Usage

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{_NAME}"{words})
embeddings = model.encode(["A man plays a guitar.", "Someone makes music."])
print(model.similarity(embeddings, embeddings))
```

With clusterns, the same vectors, and those of a whole file:

```python
from clusterns.encoder import SentenceEncoder

encoder = SentenceEncoder.from_pretrained("{_NAME}")
embeddings = encoder.encode(["A man plays a guitar.", "Someone makes music."])  # (2, {width})
```

```bash
clusterns encode {_NAME} sentences.txt --output embeddings.npy
```

## Training data

{len(rows):,} {_ROWS[len(rows[0]) - 1]}. Read from: {source}

## Settings

Those that are not the defaults of clusterns {__version__}; [{SUMMARY}]({SUMMARY}) has all.

{table(["setting", "symbol", "value"], settings)}

## Scores

{scores}

## Versions

{", ".join(f"{name} {version}" for name, version in versions().items())}
"""
    return text + (f"\n## Citation\n\n```bibtex{CITATION}```\n" if clustered else "")


def public(value: Any) -> str:
    """A setting in words, of a file or folder of this machine only its own name."""
    is_local = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).resolve().name if is_local else str(value)


def _code(text: str) -> str:
    """In a cell of a table, on one line."""
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def check_hub() -> None:
    """Require, before a training, what its upload will need on this side; ValueError in one line."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "--push-to-hub: expected a hub to reach, got HF_HUB_OFFLINE, which forbids it; without the flag "
            "now, the same command with --resume uploads the finished model later"
        )
    if get_token() is None:
        raise ValueError(
            "--push-to-hub: expected a login on the Hugging Face hub, got none; `hf auth login`, or a token "
            "in the variable HF_TOKEN"
        )


def upload(output: Path, name: str) -> None:
    """Upload the model of a finished training with its card, picture and settings, in one commit.

    A repository that is not there is made. Checkpoints, log and a user's other files stay here, as do the
    folders that settings name. Raises OSError with one line where it fails; the model stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    summary = read_summary(output)
    contents: dict[str, Path | bytes] = {name: output / name for name in summary["files"]}
    summary["settings"] = {
        key: public(value) if isinstance(value, str) else value for key, value in summary["settings"].items()
    }
    contents[SUMMARY] = json.dumps(summary, indent=2).encode()
    if (output / PICTURE).exists():
        contents[PICTURE] = output / PICTURE
    if (output / CARD).exists():
        contents[CARD] = (output / CARD).read_text(encoding="utf-8").replace(_NAME, name).encode()
    api = HfApi(library_name="clusterns", library_version=__version__)
    try:
        api.create_repo(name, exist_ok=True)
        commit = api.create_commit(
            name,
            [CommitOperationAdd(place, content) for place, content in contents.items()],
            commit_message=f"Model trained with clusterns {__version__}",
        )
    except Exception as error:  # of the hub, of its client, of what that uses to connect
        line = first_line(error).replace(get_token() or "\n", "...")
        raise OSError(
            f"--push-to-hub: expected {name} on the hub to take the model, got {type(error).__name__}: "
            f"{line}; the model is safe in {output}, and the same command with --resume tries again"
        ) from error
    print(f"uploaded: {commit.commit_url}")
