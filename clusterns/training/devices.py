"""Where a run computes, in which precision, and what it keeps in memory."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .config import TrainConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Where torch has AdamW in one kernel.
_FUSED_ADAMW = ("cpu", "cuda", "mps", "xpu")


def choose_device(name: str) -> torch.device:
    """The named device, or the fastest at hand."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device of this machine, got {name!r} ({error})") from None
    return device


@dataclass(frozen=True)
class Precision:
    """Autocast of the encoder, and for float16 the scaling of the loss against underflow."""

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """For a word of the setting `precision`; "auto" is bf16 where the device computes in it, else fp32.

        Raises ValueError for fp16 on another device than CUDA.
        """
        if name == "fp16" and device.type != "cuda":
            raise ValueError(f"--precision: expected bf16 or fp32 on {device.type}, got fp16")
        if name == "auto":
            supported = {
                "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
                "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            }
            name = "bf16" if supported.get(device.type, lambda: False)() else "fp32"
        return cls(device, _DTYPES.get(name))

    def autocast(self) -> contextlib.AbstractContextManager:
        """For the forward pass of the encoder."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """It leaves loss and gradients as they are but for float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def adamw(*groups: dict[str, Any], learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the groups that have parameters, as one kernel where torch has it so."""
    full = [group for group in groups if group["params"]]
    fused = all(parameter.device.type in _FUSED_ADAMW for group in full for parameter in group["params"])
    return torch.optim.AdamW(full, lr=learning_rate, fused=fused)


def checkpoint_layers(transformer: Any) -> None:
    """Have a model of transformers keep only its layers' inputs in training, and compute the rest again.

    Dropout draws the same then. Raises ValueError, in one line, for a model that cannot.
    """
    if not transformer.supports_gradient_checkpointing:
        raise ValueError(
            "--gradient-checkpointing: expected a model that transformers can compute again layer by layer, "
            f"got {type(transformer).__name__}; --mini-batch-size saves memory with every model"
        )
    # Its name before transformers 5.23 is an alias there, with a warning.
    known = getattr(transformer, "activation_checkpointing_enable", None)
    (known or transformer.gradient_checkpointing_enable)({"use_reentrant": False})


@contextlib.contextmanager
def explained_errors(config: TrainConfig, place: Callable[[], str]) -> Iterator[None]:
    """Full memory, and what `torch.compile` refuses, as ValueError with one line that says what helps."""
    try:
        yield
    except RuntimeError as error:
        line = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in line:
            smaller = max(1, (config.mini_batch_size or config.batch_size) // 4)
            helps = [f"--mini-batch-size {smaller}, which changes no gradient"]
            if config.mini_batch_size is None and config.mlm_weight:
                helps = [f"--batch-size {smaller}"]
            if config.precision == "fp32":
                helps.append("--precision bf16")
            raise ValueError(
                f"{place()}: out of memory with --batch-size {config.batch_size}; what helps: "
                f"{', or '.join(helps)}, or a smaller --max-length than {config.max_length} ({line[:200]})"
            ) from error
        if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ValueError(
                f"{place()}: --compile: expected an encoder that torch.compile takes on this machine, got: "
                f"{line[:300]}"
            ) from error
        raise


def random_states(device: torch.device) -> dict[str, Any]:
    """States of all random generators that a training may draw from; plain values and tensors."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the global state is what is meant
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (numpy_state[1].tolist(), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
    }
    if device.type not in ("cpu", "meta"):
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `random_states` gave."""
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "device" in states and device.type not in ("cpu", "meta"):
        torch.get_device_module(device).set_rng_state(states["device"])
