"""What `clusterns train` learns from, what judges it, and the encoder it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import xxhash

from ..corpus.docstrings import docstring_corpus
from ..corpus.judged import Queries
from ..corpus.judged_files import load_judged
from ..corpus.sources import load_rows
from ..encoder import SentenceEncoder
from ..evaluation.geometry import alignment, uniformity
from ..evaluation.judging import dev_scores
from ..evaluation.retrieval import query_ranks, retrieval_figures
from ..evaluation.sts import load_sts
from ..evaluation.sts_scores import GEOMETRY_SET, Vectors, sts_dev
from ..models.saving import savable
from .config import TrainConfig
from .scratch import small_bert, train_tokenizer


@dataclass
class Task:
    """What a run trains on and how it is judged."""

    # Rows of one text, whose two views differ by dropout; of two that are each other's views; or of three,
    # a pair and its hard negative.
    rows: Any
    # Scores of an encoder; the first is the one to raise. None where there is nothing to judge by.
    dev: Callable[[SentenceEncoder], dict[str, float]] | None
    # What a vocabulary is made from, where the encoder has none.
    vocabulary_text: list[str] | None = None
    # What tells the texts that it is judged on from others.
    dev_content: str = ""


def prepare_task(config: TrainConfig, say: Callable[[str], None]) -> Task:
    """Rows of text and the dev score: of what is given, else retrieval on held-out documentation."""
    dev, dev_content = None, ""
    if config.dev is not None:
        dev, dev_content = _own_dev(config, say)
    if config.sts_dir is not None:
        sts_dir = config.sts_dir
        pairs = load_sts(sts_dir, GEOMETRY_SET)
        dev_content = xxhash.xxh3_128_hexdigest(repr(pairs).encode())
        dev = lambda encoder: sts_dev(encoder, sts_dir)  # noqa: E731
        left_out = f", {pairs.unscored:,} without a score left out" if pairs.unscored else ""
        say(f"{sts_dir}: {len(pairs.scores):,} scored pairs of STS-B dev{left_out}")
    if config.train_file is not None:
        rows = load_rows(
            config.train_file,
            columns=config.text_columns,
            delimiter=config.delimiter,
            header=config.header,
            label_column=config.label_column,
            positive_label=config.positive_label,
            min_score=config.min_score,
        )
        say(f"{rows.account}, for example: {rows[0]}")
        if dev is None:
            say("no --dev or --sts-dir: nothing to choose the best checkpoint by, the last one is kept")
        return Task(rows, dev, dev_content=dev_content)
    corpus = docstring_corpus(seed=config.seed)
    if dev is None:
        held_out = Queries(corpus.queries, corpus.documents, [[i] for i in range(len(corpus.queries))])
        dev_content = xxhash.xxh3_128_hexdigest(repr((corpus.queries, corpus.documents)).encode())
        dev = lambda encoder: documentation_scores(encoder, held_out)  # noqa: E731
        say(f"dev: find the description of each of {len(corpus.queries):,} functions by its summary line")
    if not config.from_scratch:
        say(f"{len(corpus.sentences):,} sentences from documentation strings")
        return Task([(sentence,) for sentence in corpus.sentences], dev, dev_content=dev_content)
    # Two dropout views of one sentence teach a random network next to nothing; neighbours do.
    say(
        f"{len(corpus.sentences):,} sentences from documentation strings; the two views of a text are "
        f"neighbours, {len(corpus.neighbours):,} pairs, for example:\n  {corpus.neighbours[0]}"
    )
    return Task(corpus.neighbours, dev, corpus.sentences, dev_content)


def _own_dev(
    config: TrainConfig, say: Callable[[str], None]
) -> tuple[Callable[[SentenceEncoder], dict[str, float]], str]:
    """The score of --dev, and what tells its texts from others."""
    name = str(config.dev)
    judged = load_judged(
        name, kind=config.dev_kind, columns=config.dev_columns, corpus=config.dev_corpus, of="dev"
    )
    if config.dev_corpus is not None and not isinstance(judged, Queries):
        raise ValueError(f"--dev-corpus: expected queries in --dev, got {judged.kind} in {name}")
    say(f"dev: {judged.account}")
    content = xxhash.xxh3_128_hexdigest(repr(replace(judged, account="")).encode())
    return partial(dev_scores, name, judged), content


def documentation_scores(encoder: SentenceEncoder, held_out: Queries) -> dict[str, float]:
    """Retrieval of each description by its summary line, × 100, with alignment and uniformity.

    "mrr" is over all ranks: a network that knows nothing yet seldom ranks one within ten.
    """
    vectors = Vectors(encoder, held_out.sentences, 64, progress=False)
    ranks = query_ranks("dev", held_out, vectors)
    found = {"mrr": ranks[:, 0].reciprocal().numpy(), **retrieval_figures(ranks, held_out.relevant)}
    x, y = vectors.of(held_out.queries), vectors.of(held_out.passages)
    geometry = {"alignment": alignment(x, y), "uniformity": uniformity(vectors.rows)}
    return {name: 100 * float(values.mean()) for name, values in found.items()} | geometry


def prepare_encoder(config: TrainConfig, task: Task) -> SentenceEncoder:
    """Load the encoder, or make a small BERT and a WordPiece vocabulary for the sentences."""
    prompt = config.build_prompt()
    if config.model is not None:
        encoder = SentenceEncoder.from_pretrained(
            config.model, pooling=config.pooling, head=config.head, prompt=prompt
        )
        savable(encoder.pooling)  # not only after the training
        return encoder
    tokenizer = train_tokenizer(task.vocabulary_text or [])
    # One layer, and words that stand out from positions: what learns most in two minutes.
    bert = small_bert(
        tokenizer, seed=config.seed, hidden_size=256, layers=1, heads=4, word_std=0.2, position_std=0.01
    )
    return SentenceEncoder(bert, tokenizer, pooling=config.pooling, head=config.head, prompt=prompt)
