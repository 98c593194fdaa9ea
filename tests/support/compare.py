"""What an assertion may ask of floating-point numbers on any processor: no more than rounding allows.

Libraries add up in other orders, on other instructions and with other numbers of threads. So a number is
compared with the float64 truth, and an id by the score of what it names.
"""

from __future__ import annotations

import torch

ROOM = 12  # how many times the error that rounding may make is still right: ten times what is seen, and more


def assert_close_to_truth(found, truth, *, condition=4.0, least=0.0, rounding=0.0, dtype=None, what=""):
    """The error of `found` against the float64 `truth`, by norm and as a share of the truth's.

    At most ROOM times `condition` times the dtype's epsilon; the condition is 1/τ, and a few more, where a
    logit of that size is rounded. Half precision is added up in float32.
    least: the norm below which a truth does not count as a scale. rounding: allowed once more, as it stands.
    dtype: what was computed in, if not that of `found`.
    """
    truth = truth.detach().double().cpu()
    scale = truth.norm().clamp_min(max(least, 1e-30))
    error = float((found.detach().double().cpu() - truth).norm() / scale)
    eps = torch.finfo(torch.float64 if (dtype or found.dtype) == torch.float64 else torch.float32).eps
    allowed = ROOM * condition * eps + rounding
    if found.dtype.itemsize == 2:
        allowed += 4 * torch.finfo(found.dtype).eps  # factors and result; the interpreter truncates them
    assert found.shape == truth.shape, what
    assert error <= allowed, f"{what} error {error:.1e}, allowed {allowed:.1e}"


def assert_ids_within_rounding(ids, scores, gap=1e-5):
    """Each id (rows,) names the best of its row of float64 scores (rows, choices), or one `gap` below it."""
    missed = scores.max(dim=1).values - scores.gather(1, ids[:, None])[:, 0]
    assert missed.max() <= gap, f"an id whose score is {float(missed.max()):.1e} below the best"
