"""Compile launches through Triton's own call path, with a stand-in for the GPU driver; run by test_audit.py.

Binds real arguments and options as `kernel[grid](...)` does, up to the compiled kernel, and compares what was
compiled with what bench/audit.py compiles. Prints how many launches agree.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import audit

from clusterns.kernels.target import Target, assume

LABELS = (
    "cosines, negatives, clusters",
    "update, sum",
    "assignment",
    "objective, bml, negatives, learned temperature",
    "gradients, bml, negatives, learned temperature",
    "similarity, backward",
)


class Driver:
    """An sm_90 that can be compiled for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def main():
    driver.set_active(Driver())
    agreed = 0
    with assume(Target("cuda", 90)):
        launches = audit.record(torch.bfloat16, 768, 512)
        for label in LABELS:
            each = launches[label]
            values = {**each.arguments, **each.constants, **each.tiles.blocks}
            built = each.kernel.warmup(**values, **each.tiles.options("cuda"), grid=each.grid).src
            expected = audit.source(each, "cuda")
            stated = {where: what for where, what in built.attrs.items() if what}
            assert built.signature == expected.signature, label
            assert built.constants == expected.constants, label
            assert stated == expected.attrs, label
            agreed += 1
    print(f"{agreed} launches agree")


if __name__ == "__main__":
    main()
