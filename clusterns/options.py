"""The numbers of the objective that are not tensors, as every backend takes them."""

from __future__ import annotations

from typing import NamedTuple

# For a chunk of logits and its temporaries, or for the cosines of a whole batch on the Triton path.
WORKSPACE_BYTES = 256 * 2**20


class Options(NamedTuple):
    """w, what happens to false negatives, λ, α, β, and the memory for logits."""

    hard_negative_weight: float
    false_negatives: str
    bml_weight: float
    bml_alpha: float
    bml_beta: float
    workspace_bytes: int
