"""Argument checks shared by every backend, so that bad input meets the same words everywhere.

Each raises `ValueError` or `TypeError` with one line: the argument, what was expected, what came.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def warn(text: str) -> None:
    """A UserWarning at the user's line that called into this package."""
    level, caller = 1, sys._getframe()
    while caller.f_back and caller.f_globals.get("__name__", "").split(".")[0] in ("clusterns", "torch"):
        level, caller = level + 1, caller.f_back
    warnings.warn(text, stacklevel=level)


def under_functorch() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


def check_transforms(backend: str) -> None:
    """Require "reference" within `torch.func`, which would differentiate the gradients or batch the rows."""
    if backend != "reference" and under_functorch():
        raise RuntimeError(
            f"backend: expected 'reference' within torch.func (grad, vmap, jacrev ...), got {backend!r}, "
            "which is for loss.backward() and torch.autograd.grad"
        )


def check_differentiated_once() -> None:
    """Refuse, within a backward, to be differentiated again: its gradients are numbers, not formulas.

    A compiler only traces it, and refuses by itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph: expected False, got True; only backend='reference' is twice differentiable, "
            "and of cosines clusterns.reference.cosine_similarity_matrix"
        )


def check_embeddings(name: str, value: Tensor) -> None:
    """Require a (rows ≥ 1, dim ≥ 1) tensor of float16, bfloat16, float32 or float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape (rows, dim), got {type(value).__name__}")
    if value.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions (rows, dim), got shape {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}")
    if value.shape[0] < 1 or value.shape[1] < 1:
        raise ValueError(f"{name}: expected at least one row and one column, got shape {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, *, same_rows: bool = False) -> None:
    """Require embeddings of the width and device (and with `same_rows` the length) of `other`."""
    check_embeddings(name, value)
    expected = (other.shape[0] if same_rows else value.shape[0], other.shape[1])
    if tuple(value.shape) != expected:
        wanted = str(expected) if same_rows else f"(rows, {other.shape[1]})"
        raise ValueError(f"{name}: expected shape {wanted} to match {other_name}, got {tuple(value.shape)}")
    check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} to match {other_name}, got {value.device}")


def check_ids(name: str, value: Tensor, rows: int, other_name: str, other: Tensor) -> None:
    """Require an integer vector with one entry per row of `other`, on its device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor of shape ({rows},), got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")
    if tuple(value.shape) != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(value.shape)}")
    check_device(name, value, other_name, other)


def check_within(name: str, ids: Tensor, count: int) -> None:
    """Require ids in [0, count), which are looked at on the CPU only (no sync)."""
    if not isinstance(ids, Tensor) or ids.device.type != "cpu" or not ids.numel():
        return
    if torch.compiler.is_compiling() or under_functorch():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected ids in [0, {count}), got {low if low < 0 else high}")


def check_choice(name: str, value: str, choices: Sequence[str], beside: str = "") -> None:
    """Require one of a few words; `beside` says what else the argument takes."""
    if not isinstance(value, str) or value not in choices:
        words = ", ".join(repr(word) for word in choices)
        beside = f" or {beside}" if beside else ""
        raise ValueError(f"{name}: expected one of {words}{beside}, got {in_short(value)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A question whether one like it was meant, to end a message with; empty where none is like it."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def in_short(value: object) -> str:
    """The repr on one line, cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """Require a finite real number within the given bounds."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        is_number
        and math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    ):
        return
    limits = (("above", above), ("at least", at_least), ("at most", at_most))
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in limits if bound is not None)
    wanted = f"a finite number {bounds}".strip()
    if not is_number:
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__} {in_short(value)}")
    raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def check_count(name: str, value: int, *, at_least: int) -> None:
    """Require an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {in_short(value)}")
    if value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")


def check_seed(name: str, value: int, count: int = 1) -> None:
    """Require a seed that NumPy and scikit-learn take too, and `count` of them from it on."""
    check_count(name, value, at_least=0)
    if value > 2**32 - count:
        raise ValueError(f"{name}: expected 0 to {2**32 - count}, got {value}")


def check_temperature(temperature: float | Tensor, other_name: str = "", other: Tensor | None = None) -> None:
    """Require τ > 0: a number, or a 0-dim floating tensor, whose value is read on the CPU only (no sync).

    Where embeddings are given it must be on their device.
    """
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or temperature.dtype not in FLOATING:
            raise ValueError(
                "temperature: expected a number or a 0-dim floating tensor, "
                f"got shape {tuple(temperature.shape)} of {temperature.dtype}"
            )
        if other is not None and temperature.device != other.device:
            raise ValueError(
                f"temperature: expected the device of {other_name}, {other.device}, got "
                f"{temperature.device}; move it, or the loss that holds it, with .to(device)"
            )
        if temperature.device.type == "cpu" and not (torch.compiler.is_compiling() or under_functorch()):
            check_number("temperature", float(temperature.detach()), above=0)
        return
    check_number("temperature", temperature, above=0)
