"""What the kernels run on: precision of products, tile shapes, whether they can run at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util

import torch

SWITCH = "CLUSTERNS_DISABLE_TRITON"
OLDEST = (3, 6)  # the oldest Triton that the kernels are tested with
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def switched_off() -> bool:
    """Whether the user has switched Triton off in the environment."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


def _find_triton() -> bool:
    try:
        return util.find_spec("triton") is not None
    except (ImportError, ValueError):  # a blocked module has no spec
        return False


def _triton_version() -> tuple[int, ...]:
    """Major and minor version from the metadata; importing Triton takes long."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
            return tuple(int(part) for part in metadata.version(name).split(".")[:2])
    return OLDEST  # built from source, presumably new


_INSTALLED = _find_triton()  # whether Triton can be imported
_VERSION = _triton_version()


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) for others."""
    return torch.cuda.get_device_capability(device) if torch.version.cuda else (0, 0)


def why_not(device: torch.device | None, *dtypes: torch.dtype) -> str | None:
    """Say why the kernels cannot run on such tensors and what to do; None if they can.

    Without a device only what holds for every tensor is checked.
    """
    if switched_off():
        return f"it is switched off by {SWITCH}={os.environ[SWITCH]}; unset that, or use 'auto' or 'torch'"
    if not _INSTALLED:
        return "Triton is not installed; pip install triton (Linux), or use 'auto' or 'torch'"
    if _VERSION < OLDEST:
        have, need = (".".join(map(str, version)) for version in (_VERSION, OLDEST))
        return f"Triton {have} is installed, {need} is needed; upgrade torch, or use 'auto' or 'torch'"
    if not interpreting():
        on_gpu = device is not None and device.type == "cuda"
        if not on_gpu and not torch.cuda.is_available():  # asks the driver, which takes its time
            return "no GPU is available; use 'auto' or 'torch'"
        if device is not None and not on_gpu:
            return f"the tensors are on {device}; move them to a GPU, or use 'auto' or 'torch'"
        if device is not None and torch.version.cuda and capability(device) < (8, 0):
            have = ".".join(map(str, capability(device)))
            return f"{device} has compute capability {have}, 8.0 is needed; use 'auto' or 'torch'"
    for dtype in dtypes:
        if dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            return (
                f"{name} is not supported; convert to float32, bfloat16 or float16, or use 'auto' or 'torch'"
            )
    return None


# What `torch.compiler.assume_constant_result` sets; calling that would import the compiler with the package.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _float32_is_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's answer where only its newer setting has been used
        return getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") != "tf32"


@dataclass(frozen=True)
class Target:
    """What a launch is compiled for."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: int | str  # 90 for sm_90, "gfx942"
    multiprocessors: int = 132

    @property
    def waits_for_stores(self) -> bool:
        """Whether a barrier must be told to wait for stores, see `tiles.is_last_to_arrive`."""
        return self.backend == "hip" and str(self.arch).startswith("gfx9")

    @property
    def loads_tiles(self) -> bool:
        """Whether tiles are best loaded by descriptors; with them sm_100 spills, on Triton 3.6 and 3.7."""
        return self.backend == "interpreter" or (self.backend == "cuda" and int(self.arch) == 90)

    @property
    def overlaps_launches(self) -> bool:
        """Whether a kernel may start before the one before it has ended (programmatic dependent launch)."""
        return self.backend == "cuda" and int(self.arch) >= 90

    def precision(self, exact: bool | None = None, turned: bool = False) -> str:
        """How float32 operands are multiplied, by default after `torch.get_float32_matmul_precision()`.

        "highest" keeps float32 products: on NVIDIA as three tf32 products, whose error is that of a float32
        sum, since float32 units would take most of the time. "high" and "medium" are tf32 where there is it.
        turned: neighbours of a factor lie along the result. Matrix units that read from shared memory
        (sm_90, sm_100) do not read tf32 so, and turning it around took most of a product's time (H200); terms
        in bfloat16 they read as they are.
        """
        exact = _float32_is_exact() if exact is None else exact
        if self.backend == "cuda":
            if turned and 90 <= int(self.arch) < 120:
                return "bf16x6" if exact else "bf16x3"
            return "tf32x3" if exact else "tf32"
        if self.backend == "hip" and self.arch == "gfx942":
            return "ieee" if exact else "tf32"
        return "ieee"


_override: Target | None = None


@lru_cache(maxsize=64)
def _target_of(device: torch.device) -> Target:
    if interpreting():
        return Target("interpreter", 0, 3)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    arch = properties.major * 10 + properties.minor
    return Target("cuda", arch, properties.multi_processor_count)


def target_of(device: torch.device) -> Target:
    """Target of a device."""
    return _override or _target_of(device)


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Choose tiles and precision for another target, to compile for it here."""
    global _override
    before, _override = _override, target
    try:
        yield
    finally:
        _override = before
