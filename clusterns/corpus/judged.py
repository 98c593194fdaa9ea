"""Texts that models are judged by, from files: scored pairs, labelled texts, queries with passages."""

from __future__ import annotations

KINDS = ("pairs", "labels", "queries")
