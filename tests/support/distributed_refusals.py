"""Bad input on a rank, and ranks that do not agree: part of the worker of test_distributed.py."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from clusterns import ClusterNSLoss

Z = torch.randn(4, 8)
OTHER, DOUBLE = Z[:, :5], Z.double()
BAD_INPUTS = [
    ((Z, Z[:3]), ValueError, r"positives: expected shape (4, 8) to match anchors, got (3, 8)"),
    ((Z.tolist(), Z), TypeError, "anchors: expected a tensor of shape (rows, dim), got list"),
    ((OTHER, OTHER), ValueError, "anchors: expected embedding_dim 8, got shape (4, 5)"),
    ((Z, Z, OTHER), ValueError, "negatives: expected shape (rows, 8)"),
]
DISAGREEMENTS = [
    ((DOUBLE, DOUBLE), 8, "the same dtype on every rank", "float64"),
    ((Z, DOUBLE), 8, "the same dtype on every rank", "float64"),
    ((OTHER, OTHER), 5, "the same embedding dimension on every rank", "5"),
    ((Z, Z, Z[:1]), 8, "the same negatives on every rank", "some of torch.float32"),
]


def check_refusals(group) -> None:
    """Each rank gets its error, none waits, and the group is as good as before."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1

    def error(gather: str, culprit: int, inputs, width: int = 8) -> Exception | None:
        inputs, width = (inputs, width) if rank == culprit else ((Z, Z), 8)
        try:
            ClusterNSLoss(width, 2, process_group=group, gather=gather)(*inputs)
        except Exception as found:
            return found
        return None

    for gather in ("all", "ring"):
        for culprit, (inputs, kind, words) in itertools.product({0, last}, BAD_INPUTS):
            found = error(gather, culprit, inputs)
            if rank != culprit:
                kind, words = ValueError, f"anchors: expected valid input on every rank, rank {culprit} has"
            assert type(found) is kind, repr(found)
            assert str(found).startswith(words), repr(found)
        for inputs, width, words, got in DISAGREEMENTS:
            found = error(gather, last, inputs, width)
            assert type(found) is ValueError, repr(found)
            assert words in str(found), repr(found)
            assert str(found).endswith(got), repr(found)
        assert error(gather, last, (Z, Z)) is None  # and the group goes on
