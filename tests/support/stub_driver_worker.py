"""A training step through Triton's own compiler with a driver that launches nothing; run by test_launch.py.

Prints JSON: of each of two steps the launches, with their grids, addresses and whether they may overlap.
"""

from __future__ import annotations

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import clusterns
from clusterns.kernels import target

launches = []


class Launcher:
    def __init__(self, source, metadata):
        self.name, self.overlaps = source.fn.__name__, metadata.launch_pdl
        self.pointers = [kind.startswith("*") for kind in source.signature.values()]

    def __call__(self, x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *arguments):
        addresses = [value for value, is_one in zip(arguments, self.pointers, strict=True) if is_one]
        launches.append([self.name, [x, y, z], addresses, self.overlaps])


class Utilities:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, *arguments):
        return 1, 2, 100, 0, 1024  # module, function, registers, spills, threads


class Driver:
    launcher_cls, utils = Launcher, Utilities()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Driver())
target.why_not = lambda *tensors: None
target._override = target.Target("cuda", 90)
views = [torch.randn(64, 32).bfloat16().requires_grad_() for _ in range(2)]
loss_fn = clusterns.ClusterNSLoss(32, 8, backend="triton", false_negatives="bml")
loss_fn.start_from(torch.randn(8, 32))
for _ in range(2):
    loss_fn(*views).backward()
print(json.dumps({"launches": launches, "views": [z.data_ptr() for z in views]}))
