"""Compare the launch cache's key with Triton's own specialisation; run by test_launch.py without interpreter.

Prints JSON, a line for NVIDIA and one for AMD: over pairs of random launches of every kernel, how often
Triton would compile different code and our key does not show it.
"""

from __future__ import annotations

import itertools
import json
import mmap
import random

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from clusterns.kernels import (
    assignment,
    centroid_update,
    cluster_sums,
    gradient,
    launch,
    objective,
    similarity,
)

KERNELS = [
    (assignment, assignment.assignment_kernel),
    (cluster_sums, cluster_sums.member_sums_kernel),
    (centroid_update, centroid_update.centroid_update_kernel),
    (gradient, gradient.gradient_kernel),
    (objective, objective.objective_kernel),
    (similarity, similarity.cosine_kernel),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.float64]
BACKING = {dtype: torch.zeros(64, dtype=dtype) for dtype in DTYPES}
# On AMD Triton looks at the storage's size. Read-only, so that no memory is set aside for it.
MAPPED = mmap.mmap(-1, 2**31 + 64, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
HUGE = torch.frombuffer(MAPPED, dtype=torch.int8)
TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}


def draw(name, generator):
    """A value for a run-time argument: a tensor of some dtype and alignment, a number, or nothing."""
    if name.endswith("_ptr") or (name == "temperature" and generator.random() < 0.5):
        if generator.random() < 0.2:
            return None
        dtype = generator.choice(DTYPES)
        if generator.random() < 0.3:
            return HUGE.view(dtype)
        return BACKING[dtype][generator.choice([0, 0, 0, 1, 3]) :]
    if name in ("temperature", "momentum", "hard_negative_weight", "bml_weight", "alpha", "beta"):
        return generator.choice([0.0, 0.5, 1.0, 16.0])
    return generator.choice([0, 1, 2, 15, 16, 17, 32, 768, 2**31 - 1, 2**31, 2**33])


def main(target):
    generator = random.Random(0)
    backend = make_backend(TARGETS[target])
    torch.version.hip = "6.4" if target == "hip" else None
    counts = {"pairs_that_differ_for_triton": 0, "missed": 0, "pairs_alike": 0, "recompiled_for_a_batch": 0}
    for module, kernel in KERNELS:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        run_time = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
        constants = {parameter.name: 16 for parameter in kernel.params if parameter.is_constexpr}

        def both(arguments, binder=binder, kernel=kernel, constants=constants):
            specialization = [tuple(each) for each in binder(**arguments, **constants)[1]]
            return specialization, launch._specialization(kernel, arguments)

        base = {name: draw(name, generator) for name in run_time}
        seen = []
        for _ in range(60):  # one or a few arguments changed at a time
            changed = dict(base)
            for name in generator.sample(run_time, generator.choice([0, 1, 1, 2])):
                changed[name] = draw(name, generator)
            seen.append(both(changed))
        for (theirs, ours), (theirs_too, ours_too) in itertools.combinations(seen, 2):
            if theirs != theirs_too:
                counts["pairs_that_differ_for_triton"] += 1
                counts["missed"] += ours == ours_too
            else:
                counts["pairs_alike"] += 1
        for size in (1, 16, 33, 100):
            changed = {**base, **dict.fromkeys(module.BATCH_SIZES, size)}
            counts["recompiled_for_a_batch"] += both(changed) != both({**changed, module.BATCH_SIZES[0]: 7})
    print(json.dumps(counts))


if __name__ == "__main__":
    for each in TARGETS:
        main(each)
