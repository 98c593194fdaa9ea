"""The choice of backend.

| word | what runs |
|---|---|
| "auto" | "triton" for CUDA and ROCm tensors where it can, "torch" elsewhere |
| "triton" | fused kernels; an error that says why where they cannot run |
| "torch" | row chunks in plain torch, on any device |
| "reference" | one formula a line, for checks |

Triton has two regimes, chosen by size: "triton" keeps a weight for every cosine where they fit the
workspace; "triton-chunked" sweeps over larger batches, and those that ranks share, in row chunks.

`CLUSTERNS_DISABLE_TRITON=1` in the environment turns Triton off.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_choice, warn
from .kernels import target
from .objective.problem import Options

BACKENDS = ("auto", "triton", "torch", "reference")
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
    workspace (by default B up to about 8,000) is "triton"; a larger one, or one that ranks share,
    "triton-chunked". A rule for false negatives that is no word is torch's, which is said once.
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
    columns = sum(z.shape[0] for z in (anchors, negatives, centroids) if z is not None)
    # The cosines, whose place is kept for the backward, and a row for every 8 of theirs.
    fits = 4.5 * anchors.shape[0] * columns <= options.workspace_bytes
    return "triton" if fits and not shared else "triton-chunked"


def why_not(*tensors: Tensor | None) -> str | None:
    """Say why Triton cannot run on the tensors and what to do; None if it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device if present else None
    return target.why_not(device, *(tensor.dtype for tensor in present))


def _refuse_if(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"backend: 'triton' cannot run, {reason}")
