"""Unit rows, and the precision that everything is computed in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..checks import under_functorch
from ..reference import SHORTEST_NORM


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 as soon as one input is float64, else float32 (half precision is accumulated in float32)."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that all share, else float32: what Triton's products take."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """How gradients wait for the backward: float16 would underflow before it is scaled."""
    return torch.float32 if dtype == torch.float16 else dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Keep float32 products float32 inside; devices that have no autocast need nothing."""
    # The names first: torch 2.11 does not compile the question.
    if device.type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device.type):
        return nullcontext()  # to enter the other takes its time, beside a small batch
    return torch.autocast(device.type, enabled=False)


def without_autograd() -> AbstractContextManager:
    """Pass by autograd's layers of the dispatcher, which take their time beside a small batch.

    `torch.no_grad` still walks through them. For sums whose gradient, if any, is made by hand.
    """
    if torch.compiler.is_compiling() or under_functorch():
        return torch.no_grad()
    return torch._C._AutoDispatchBelowAutograd()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose neighbouring columns are neighbours in memory."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def inverse_norms(z: Tensor, dtype: torch.dtype | None = None, keepdim: bool = False) -> Tensor:
    """1/‖z_i‖, (rows,) or with `keepdim` (rows, 1); 0 for a row without direction (‖z_i‖ ≤ 1e-8).

    Non-finite rows give NaN or 0.
    """
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=keepdim, dtype=dtype)
    return torch.threshold_(norm, SHORTEST_NORM, torch.inf).reciprocal_()


def unit_rows(z: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z/‖z‖ in `dtype`, (rows, D), and 1/‖z‖, (rows, 1)."""
    z = z.detach().to(dtype)
    scale = inverse_norms(z, keepdim=True)
    return torch.mul(z, scale, out=out), scale


def through_norm(gradient: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """dz = (du − u (u·du)) / ‖z‖ with scale = 1/‖z‖ (rows, 1), in place on du `gradient` (rows, D)."""
    along = (unit * gradient).sum(dim=1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1).mul_(scale)
