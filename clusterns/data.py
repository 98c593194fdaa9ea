"""From rows of text to the batches of an epoch: shuffled, without equal sentences in one, tokenised ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .checks import check_count
from .corpus.rows import Row, Rows

Tokenize = Callable[[list[Row]], dict[str, Tensor]]
# A text is cut to so many characters for each token it may have. BERT's WordPiece gives up on longer words.
CHARACTERS_PER_TOKEN = 100
# Where `tokenize` does not tell how many tokens it leaves.
USUAL_MAX_LENGTH = 512


def batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    tokenize: Tokenize,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 4,
    unique: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """One shuffled pass over the rows, in whole batches of B.

    The order follows from `seed` and `epoch` alone: the number of workers, `start` and the global random
    state, which stays as it is, change nothing. Another pass over what is returned repeats it.

    With `unique` two equal texts, of whatever columns, are never in one batch of different rows, where they
    would be each other's negatives. A row whose text is in the batch already waits for the next batch that
    lacks it; those that waited come first, in the order in which they began to wait. When the rows run out,
    what does not fill a batch is left out. An epoch with many repetitions may so be shorter than N // B
    batches. Ranks agree on all of it without a word.

    Args:
        rows: N tuples of one to three texts, as of `load_rows`; or a list of such.
        batch_size: rows in a batch of all ranks, B.
        tokenize: makes tensors of a list of rows, as `ViewTokenizer` does; with workers it must pickle where
            processes are spawned, not forked. Texts come cut to 100 characters for each of its `max_length`
            tokens (512 where it has no such attribute), so that a book in one line costs no more than that.
        seed, epoch: fix the order together.
        start: batches of this pass that were already seen; they are not tokenised, only the fingerprints of
            their texts are looked at, and what follows is what an uninterrupted pass gives.
        num_workers: processes that read and tokenise ahead; 0 does so in this one, when a batch is due.
        pin_memory: for copies to a CUDA device that the host does not wait for; ignored where there is none.
        prefetch_factor: batches that each worker is ahead.
        unique: no two equal texts in a batch.
        rank, world_size: yield rows r·B/W up to (r+1)·B/W of every batch, for rank r of W.

    Raises ValueError or TypeError with one line for a number out of range, ranks that do not divide the
    batch, or fewer rows than a batch; while iterating, ValueError for fewer distinct rows than a batch, and
    what `tokenize` raises, be it in a worker.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("epoch", epoch, 0),
        ("start", start, 0),
        ("num_workers", num_workers, 0),
        ("prefetch_factor", prefetch_factor, 1),
        ("world_size", world_size, 1),
        ("rank", rank, 0),
    ):
        check_count(name, value, at_least=least)
    if rank >= world_size:
        raise ValueError(f"rank: expected below world_size {world_size}, got {rank}")
    if batch_size % world_size:
        raise ValueError(f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}")
    if len(rows) < batch_size:
        raise ValueError(f"rows: expected at least batch_size {batch_size} of them, got {len(rows)}")
    return Batches(
        rows=rows,
        batch_size=batch_size,
        tokenize=tokenize,
        seed=seed,
        epoch=epoch,
        start=start,
        loader_options={
            "num_workers": num_workers,
            "pin_memory": pin_memory and torch.cuda.is_available(),
            "prefetch_factor": prefetch_factor if num_workers else None,
        },
        unique=unique,
        rank=rank,
        world_size=world_size,
    )


class Batches:
    """What `batches` returns: an iterable of what `tokenize` makes of each batch.

    `len()` is the number of batches from `start` on, N // B less `start`; with `unique` at most so many.

    Attributes:
        deferred: rows that had to wait for a later batch, up to the last batch yielded and from the epoch's
            first batch, whatever `start` is.
        left_out: rows of no batch, known when a pass has ended; else None.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        tokenize: Tokenize,
        seed: int,
        epoch: int,
        start: int,
        loader_options: dict[str, Any],
        unique: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.rows, self.batch_size, self.tokenize = rows, batch_size, tokenize
        self.seed, self.epoch, self.start, self.unique = seed, epoch, start, unique
        self.loader_options = loader_options
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)
        self.deferred = 0
        self.left_out: int | None = None

    def __len__(self) -> int:
        return max(len(self.rows) // self.batch_size - self.start, 0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.deferred, self.left_out = 0, None
        # The two numbers are hashed together: their sum would make epoch 1 of seed 0 epoch 0 of seed 1.
        state = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(state)
        count = len(self.rows)
        dtype = torch.int32 if count < 2**31 else torch.int64
        plan = _Plan(
            torch.randperm(count, generator=generator, dtype=dtype).numpy(),
            self.batch_size,
            _keys_of(self.rows) if self.unique else None,
        )
        chosen = (batch[self.share] for batch in islice(plan, self.start, None))
        limit = CHARACTERS_PER_TOKEN * getattr(self.tokenize, "max_length", USUAL_MAX_LENGTH)
        loader = DataLoader(
            _Texts(self.rows, limit),
            batch_sampler=chosen,
            collate_fn=self.tokenize,
            generator=generator,  # else the loader draws its workers' seed from the global random state
            **self.loader_options,
        )
        with _single_threaded_tokenizers(loader.num_workers > 0):
            iterator = iter(loader)
        number = self.start
        while (batch := _next(iterator)) is not _END:
            self.deferred = plan.deferred[number]
            number += 1
            yield batch
        self.deferred = plan.deferred[-1]
        self.left_out = count - self.batch_size * (len(plan.deferred) - 1)


_END = object()


def _next(iterator: Iterator[Any]) -> Any:
    """The next batch, or _END; an error of a worker in one line, as it was there."""
    try:
        return next(iterator, _END)
    except (ValueError, TypeError, OSError) as error:
        lines = str(error).strip().splitlines()
        if not lines or not lines[0].startswith("Caught "):
            raise
        # The message is the worker's traceback, whose last line is "ValueError: what went wrong".
        raise type(error)(lines[-1].partition(": ")[2]) from error


Keys = Callable[[np.ndarray], Sequence[Sequence[Hashable]]]


class _Plan:
    """The rows of one batch after the other, B indices each.

    Attributes:
        deferred: for each batch the rows that had begun to wait by then, and at the end for the epoch.
    """

    def __init__(self, order: np.ndarray, batch_size: int, keys: Keys | None) -> None:
        self.order, self.batch_size, self.keys = order, batch_size, keys
        self.deferred: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        deferred = 0
        self.waiting: dict[Hashable, deque[tuple[int, Sequence[Hashable]]]] = {}
        size, position = self.batch_size, 0
        while True:
            batch: list[int] = []
            present: set[Hashable] = set()
            if self.waiting:
                self.take_waiting(batch, present)
            while len(batch) < size and position < len(self.order):
                drawn = self.order[position : position + size - len(batch)]
                position += len(drawn)
                if self.keys is None:
                    batch += drawn.tolist()
                    continue
                for row, keys in zip(drawn.tolist(), self.keys(drawn), strict=True):
                    if not self.add(row, keys, batch, present):
                        deferred += 1
            self.deferred.append(deferred)
            if len(batch) < size:
                if len(self.deferred) == 1:
                    raise ValueError(
                        f"rows: expected at least batch_size {size} without a text in common, got "
                        f"{len(batch)} among {len(self.order)}; the others repeat them"
                    )
                return
            yield batch

    def add(self, row: int, keys: Sequence[Hashable], batch: list[int], present: set[Hashable]) -> bool:
        """Put a row into the batch, or have it wait for the first text of its that is there already."""
        for key in keys:
            if key in present:
                self.waiting.setdefault(key, deque()).append((row, keys))
                return False
        batch.append(row)
        present.update(keys)
        return True

    def take_waiting(self, batch: list[int], present: set[Hashable]) -> None:
        """Of the rows that wait for one text, the first, for as many texts as a batch has room for.

        Twice as many are tried, as a row with several texts may meet another of them in the batch; it then
        waits for that one.
        """
        for key in list(islice(self.waiting, 2 * self.batch_size)):
            if len(batch) == self.batch_size:
                return
            queue = self.waiting[key]
            row, keys = queue.popleft()
            if not queue:
                del self.waiting[key]
            self.add(row, keys, batch, present)


def _keys_of(rows: Sequence[Row]) -> Keys:
    """What is equal where texts are."""
    if isinstance(rows, Rows):
        return rows.keys
    return lambda indices: [[text.strip() for text in rows[index]] for index in indices.tolist()]


class _Texts(Dataset[Row]):
    """Rows by their numbers, a batch at once, with their texts cut to so many characters."""

    def __init__(self, rows: Sequence[Row], limit: int) -> None:
        self.rows, self.limit = rows, limit

    def __getitem__(self, index: int) -> Row:
        return tuple(text[: self.limit] for text in self.rows[index])

    def __getitems__(self, indices: list[int]) -> list[Row]:
        return [self[index] for index in indices]


@contextmanager
def _single_threaded_tokenizers(wanted: bool) -> Iterator[None]:
    """While workers are started: one thread in each, without tokenizers' warning about the fork."""
    name = "TOKENIZERS_PARALLELISM"
    if not wanted or name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
