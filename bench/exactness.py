"""How far are loss and gradients from float64, beside eager torch's in the same dtype?

    python bench/run.py exactness [--device cuda] [--batch 64 300 1024] [--output DIR]
    make exactness    on a CPU the kernels too, in the interpreter, at small B

The full objective: K centroids, explicit negatives, margin loss at a λ that matters and at the published one.
Inputs are rounded to the dtype before either side sees them. Errors are relative, that of the gradients is
the largest of anchors', positives' and negatives'.

A row fails if it is further from the truth than eager torch + a small tolerance, or if two runs differ in a
bit. Where eager torch outgrows the memory, its largest errors at the sizes before stand in.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
from contenders import DTYPES, KINDS, MARGINS, WORKSPACES, Case
from harness import Bench
from measure import Clock
from report import OURS, Results, short

import clusterns

WEIGHTS = (1e-2, MARGINS["bml_weight"])  # λ: one at which the margin loss has a say, and the published one
INTERPRETED_AT_MOST = 300  # rows of a batch, on a CPU
WHOLE_AT_MOST = 16384  # rows: a single chunk keeps 4·B² bytes
NEGATIVES = 96
FIGURES = ("loss_error", "gradient_error")
# Beside eager's error: a few roundings of float32 sums and, in half precision, of the result.
TOLERANCE = dict(zip(DTYPES.values(), (1e-6, 1e-4, 2e-5), strict=True))


def round_in_the_interpreter() -> None:
    """Make Triton's interpreter round float32 to the nearest bfloat16, as a GPU does; 3.7 cuts bits off."""
    import numpy as np
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        bits = np.frombuffer(data.tobytes(), dtype=np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return nearest.reshape(data.shape)

    interpreter._convert_float = rounded


def why_no_triton(device: torch.device) -> str:
    """Why kernels cannot run on a device, empty if they can: by asking for them."""
    try:
        rows = torch.randn(2, 16, device=device)
        clusterns.info_nce(rows, rows, backend="triton")
    except (RuntimeError, ImportError) as error:
        return short(error)
    return ""


class Exactness:
    """Adds the rows of one case after the other; knows eager's largest errors so far by dtype and λ."""

    def __init__(self, bench: Bench, with_triton: bool):
        self.bench, self.with_triton = bench, with_triton
        self.eager: dict[tuple[torch.dtype, float], dict[str, float]] = {}

    def measure(self, case: Case) -> None:
        """All backends in a case."""
        bench, key = self.bench, (case.dtype, case.bml_weight)
        bench.start(case)
        allowed = self.eager.setdefault(key, {"eager_B": 0} | dict.fromkeys(FIGURES, 0.0))
        try:
            built, found, _ = bench.build(KINDS[case.kind]["eager"])
            self.eager[key] = {each: max(allowed[each], found[each]) for each in FIGURES}
            self.eager[key]["eager_B"] = case.batch
            allowed = {"eager_B": case.batch, **{each: found[each] for each in FIGURES}}
            del built
        except torch.OutOfMemoryError:
            pass
        with_triton = self.with_triton and (bench.on_gpu or case.batch <= INTERPRETED_AT_MOST)
        for backend, workspace in itertools.product(("torch", "triton")[: 1 + with_triton], WORKSPACES):
            if workspace == " whole" and case.batch > WHOLE_AT_MOST:
                continue
            name = f"{OURS} {backend}{workspace}"
            built, found, _ = bench.build(KINDS[case.kind][name])
            once, again = built.run(), built.run()
            same = all(map(torch.equal, once, again))  # NaN equals nothing
            near = all(found[each] <= allowed[each] + TOLERANCE[case.dtype] for each in FIGURES)
            row = {"contender": name, **case.columns(), **found, "tolerance": TOLERANCE[case.dtype]}
            row |= {f"eager_{each}": allowed[each] for each in FIGURES} | {"eager_B": allowed["eager_B"]}
            wrong = ["further from float64 than eager"] * (not near) + ["not repeatable"] * (not same)
            bench.results.add(row | {"status": "failed" if wrong else "ok", "note": ", ".join(wrong)})


def stages(wanted: argparse.Namespace, results: Results, clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do: a case a stage."""
    reason = why_no_triton(clock.device)
    if reason:
        print(f"no Triton rows: {reason}" + " (or set TRITON_INTERPRET=1)" * (not results.on_gpu))
    elif not results.on_gpu:
        print(f"Triton rows: by the interpreter, up to B = {INTERPRETED_AT_MOST}")
        round_in_the_interpreter()
    measure = Exactness(Bench(results, clock), with_triton=not reason).measure
    shapes = itertools.product(wanted.dtype, wanted.dim, sorted(wanted.batch), WEIGHTS)
    cases = [
        Case("objective", batch, dim, wanted.clusters, DTYPES[dtype], wanted.precision, NEGATIVES, weight)
        for dtype, dim, batch, weight in shapes
    ]
    return [(f"exactness {case}", partial(measure, case)) for case in cases]
