"""Texts that models are judged by: scored pairs, labelled texts, queries with passages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

KINDS = ("pairs", "labels", "queries")


@dataclass(frozen=True)
class ScoredPairs:
    """N pairs of texts, how alike people found the two of each (any scale), and in a line what was read."""

    first: list[str]
    second: list[str]
    scores: list[float]
    account: str = ""
    kind: ClassVar[str] = "pairs"

    @property
    def sentences(self) -> list[str]:
        """All that is to be encoded."""
        return self.first + self.second


@dataclass(frozen=True)
class LabelledTexts:
    """N texts, their class ids (N,) from 0 on, the classes' names by id, and in a line what was read."""

    texts: list[str]
    labels: list[int]
    classes: list[str]
    account: str = ""
    kind: ClassVar[str] = "labels"

    @property
    def sentences(self) -> list[str]:
        """All that is to be encoded."""
        return self.texts


@dataclass(frozen=True)
class Queries:
    """Q distinct queries, P distinct passages, for each query the places of its own ones, what was read."""

    queries: list[str]
    passages: list[str]
    relevant: list[list[int]]
    account: str = ""
    kind: ClassVar[str] = "queries"

    @property
    def sentences(self) -> list[str]:
        """All that is to be encoded."""
        return self.queries + self.passages


Judged = ScoredPairs | LabelledTexts | Queries
