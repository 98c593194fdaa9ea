"""The choice of backend.

| word | what runs |
|---|---|
| "auto" | "triton" for CUDA and ROCm tensors where it can, "torch" elsewhere |
| "triton" | fused kernels; an error that says why where they cannot run |
| "torch" | row chunks in plain torch, on any device |
| "reference" | one formula a line, for checks |

Triton has two regimes: "triton" keeps a weight for every cosine; "triton-chunked" sweeps over row chunks,
where that takes less time or the cosines do not fit the workspace, where ranks share a batch, and in both
directions.

`CLUSTERNS_DISABLE_TRITON=1` in the environment turns Triton off.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_choice, warn
from .kernels import target
from .objective.problem import GPU_WORKSPACE_BYTES, Options

BACKENDS = ("auto", "triton", "torch", "reference")

# Half precision: what a cell of the cosines costs more as part of a whole batch than in chunks, by dimension
# and beside, and what chunks cost before the first, in picoseconds. Predicted for an H200, where at D = 768
# they cross at B = 5,200; `python bench/run.py crossover` measures that. Float32 is slower in chunks.
_BY_DIMENSION, _BY_CELL, _BEFORE_CHUNKS = 0.017, 3.2, 450e6

_told: set[str] = set()


def check_backend(backend: str) -> None:
    """Require a known word, and for "triton" that it can run on this machine at all.

    Raises `ValueError` for an unknown word and `RuntimeError` for "triton" without Triton or a GPU.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "triton":
        _refuse_if(why_not())


def choose_backend(
    backend: str,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    centroids: Tensor | None = None,
    options: Options = Options(),  # noqa: B008 (a tuple)
    shared: bool = False,
) -> str:
    """Turn the user's word into "triton", "triton-chunked", "torch" or "reference" for these tensors.

    "auto" is Triton on CUDA and ROCm where it can, and torch elsewhere. A batch whose cosines fit the
    workspace is "triton", in half precision up to where chunks are faster (B of about 5,000). A larger one,
    one that ranks share, or one in both directions is "triton-chunked". A rule for false negatives that is no
    word is torch's, which is said once.
    Raises as `check_backend`.
    """
    check_choice("backend", backend, BACKENDS)
    if backend not in ("auto", "triton"):
        return backend
    if backend == "auto" and not anchors.is_cuda:
        return "torch"  # also while the interpreter is on: it is for tests
    reason = why_not(anchors, positives, negatives, centroids)
    if backend == "triton":
        _refuse_if(reason)
    elif reason is not None:
        return "torch"
    rule = options.false_negatives
    if not isinstance(rule, str):
        name = getattr(rule, "__name__", type(rule).__name__)
        if name not in _told:
            _told.add(name)
            warn(f"false_negatives: the rule {name} is computed in torch; the kernels know only words")
        return "torch"
    if shared or options.directions == "both":
        return "triton-chunked"
    cells = anchors.shape[0] * sum(z.shape[0] for z in (anchors, negatives, centroids) if z is not None)
    # The cosines, whose place is kept for the backward, and a row for every 8 of theirs.
    whole = 4.5 * cells <= (options.workspace_bytes or GPU_WORKSPACE_BYTES)
    if anchors.dtype.itemsize == 2 and positives.dtype.itemsize == 2:
        whole = whole and cells * (_BY_DIMENSION * anchors.shape[1] + _BY_CELL) <= _BEFORE_CHUNKS
    return "triton" if whole else "triton-chunked"


def why_not(*tensors: Tensor | None) -> str | None:
    """Say why Triton cannot run on the tensors and what to do; None if it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device if present else None
    return target.why_not(device, *(tensor.dtype for tensor in present))


def _refuse_if(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"backend: 'triton' cannot run, {reason}")
