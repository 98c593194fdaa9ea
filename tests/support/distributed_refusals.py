"""Bad input on a rank, and ranks that do not agree: part of the worker of test_distributed.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from clusterns import ClusterNSLoss

WIDTH = 8


def _error(group, gather: str, anchors, positives, negatives=None, width: int = WIDTH) -> Exception | None:
    loss_fn = ClusterNSLoss(width, 2, process_group=group, gather=gather)
    try:
        loss_fn(anchors, positives, negatives)
    except Exception as error:
        return error
    return None


def check_refusals(group) -> None:
    """Each rank gets its error, none waits, and the group is as good as before."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    z = torch.randn(4, WIDTH)
    last = size - 1
    for gather in ("all", "ring"):
        bad_inputs = [
            ((z, z[:3]), ValueError, r"positives: expected shape (4, 8) to match anchors, got (3, 8)"),
            ((z.long(), z), TypeError, "anchors: expected float16, bfloat16, float32 or float64, got"),
            ((z.tolist(), z), TypeError, "anchors: expected a tensor of shape (rows, dim), got list"),
            ((z, None), TypeError, "positives: expected a tensor of shape (rows, dim), got NoneType"),
            ((z[:0], z[:0]), ValueError, "anchors: expected at least one row and one column"),
            ((z[:, :5], z[:, :5]), ValueError, "anchors: expected embedding_dim 8, got shape (4, 5)"),
            ((z, z, z[:, :5]), ValueError, "negatives: expected shape (rows, 8)"),
            ((z[0], z[0]), ValueError, "anchors: expected 2 dimensions"),
        ]
        for culprit in {0, last}:
            for inputs, kind, words in bad_inputs:
                error = _error(group, gather, *(inputs if rank == culprit else (z, z)))
                if rank == culprit:
                    assert type(error) is kind, repr(error)
                    assert str(error).startswith(words), repr(error)
                else:
                    assert type(error) is ValueError, repr(error)
                    assert f"rank {culprit} has refused its own" in str(error), repr(error)

        other, double = z[:, :5], z.double()
        disagreements = [
            ((double, double), {}, "the same dtype on every rank", "float64"),
            ((z, double), {}, "the same dtype on every rank", "float64"),
            ((other, other), {"width": 5}, "the same embedding dimension on every rank", "5"),
            ((z, z, z[:1]), {}, "the same negatives on every rank", "some of torch.float32"),
        ]
        for inputs, arguments, words, got in disagreements:
            odd = rank == last
            error = _error(group, gather, *(inputs if odd else (z, z)), **(arguments if odd else {}))
            assert type(error) is ValueError, repr(error)
            assert words in str(error), repr(error)
            assert str(error).endswith(got), repr(error)
        assert _error(group, gather, z, z, z) is None  # and the group goes on
