"""How far are loss and gradients from float64, beside eager torch's in the same dtype?

    python bench/exactness.py [--device cuda] [--batch 64 300 1024] [--output DIR]
    TRITON_INTERPRET=1 python bench/exactness.py    (`make exactness`) the kernels too, on a CPU, at small B

The full objective: K centroids, explicit negatives, margin loss at a λ that matters and at the published one.
The truth is our torch path in float64, which is itself held against `clusterns.reference` where B is small,
so no B×B matrix is needed. Inputs are rounded to the dtype before either side sees them, and clusters are
fixed from float64. An error is ‖g − g64‖ / ‖g64‖ for each gradient and |loss − loss64| for the loss.

Ends with an error if a row is further from the truth than eager torch + a small tolerance, or if two runs
differ in a bit. Where eager torch outgrows the memory, its largest error at the sizes before stands in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from contenders import DTYPES, MARGINS, TAU, WORKSPACE_BYTES, Case, make_views, unit_formula
from measure import Clock
from parity import REFERENCE_AT_MOST, relative
from report import OURS, Results, short
from torch import Tensor

import clusterns

WEIGHTS = (1e-2, MARGINS["bml_weight"])  # λ: one at which the margin loss has a say, and the published one
INTERPRETED_AT_MOST = 300  # rows of a batch, on a CPU
WHOLE_AT_MOST = 16384  # rows: a single chunk keeps 4·B² bytes
NEGATIVES = 96
LOSS_SCALE = 4096.0  # of float16, whose small gradients vanish without one, in training too
GRADIENTS = ("anchors", "positives", "negatives")
FIGURES = ("loss", *GRADIENTS)
COLUMNS = [
    *"device dtype precision B D K N bml_weight backend workspace_bytes".split(),
    *(f"{name}_error" for name in FIGURES),
    *(f"eager_{name}_error" for name in FIGURES),
    *"eager_B tolerance within repeatable cpu gpu torch triton commit command".split(),
]
# Beside eager's error: a few roundings of float32 sums and, in half precision, of the result.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-4, "float16": 2e-5}


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


def errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """By the names of `FIGURES`."""
    loss = abs(float(found[0]) - float(truth[0]))
    return dict(zip(FIGURES, (loss, *map(relative, found[1:], truth[1:])), strict=True))


def why_no_triton(device: torch.device) -> str:
    """Why kernels cannot run on a device, empty if they can: by asking for them."""
    try:
        rows = torch.randn(2, 16, device=device)
        clusterns.info_nce(rows, rows, backend="triton")
    except (RuntimeError, ImportError) as error:
        return short(error)
    return ""


class Problem:
    """Views around centers, explicit negatives of the same kind, clusters as float64 sees them."""

    def __init__(self, case: Case, device: torch.device, bml_weight: float):
        anchors, positives, self.centroids = make_views(case, device)
        others = make_views(Case("step", NEGATIVES, case.dim, case.clusters, case.dtype), device).positives
        self.embeddings, self.rows, self.bml_weight = (anchors, positives, others), case.batch, bml_weight
        self.found = clusterns.nearest_centroids(anchors.detach().double(), self.centroids.double())

    def answer(self, loss_of: Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """A loss and its gradients; those of float16 under a loss scale, widened before it is taken out."""
        leaves = [z.detach().to(dtype or z.dtype).requires_grad_() for z in self.embeddings]
        loss = loss_of(*leaves)
        if leaves[0].dtype != torch.float16:
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]
        scaled = torch.autograd.grad(loss, leaves, loss.new_tensor(LOSS_SCALE))
        return [loss.detach(), *(g.float() / LOSS_SCALE for g in scaled)]

    def ours(self, backend: str, workspace_bytes: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """By a backend."""
        settings = {**MARGINS, "bml_weight": self.bml_weight, "false_negatives": "bml"}
        settings |= {"cluster_ids": self.found.nearest, "hard_negative_ids": self.found.runner_up}
        settings |= {"temperature": TAU, "backend": backend, "workspace_bytes": workspace_bytes}
        centroids = self.centroids.to(dtype or torch.float32)
        return self.answer(
            lambda a, p, n: clusterns.info_nce(a, p, negatives=n, centroids=centroids, **settings), dtype
        )

    def eager(self) -> list[Tensor]:
        """In plain torch."""

        def loss(*leaves: Tensor) -> Tensor:
            a, p, n = (F.normalize(z, dim=1) for z in leaves)
            c = F.normalize(self.centroids, dim=1).to(a.dtype)
            info_nce, margins = unit_formula(a, p, c, (self.found.nearest, self.found.runner_up), n)
            return info_nce + self.bml_weight * margins

        return self.answer(loss)

    def truth(self) -> list[Tensor]:
        """The torch path in float64, held against the reference where that fits."""
        found = self.ours("torch", 8 * WORKSPACE_BYTES, torch.float64)
        if self.rows <= REFERENCE_AT_MOST:
            worst = max(errors(found, self.ours("reference", WORKSPACE_BYTES, torch.float64)).values())
            if not worst <= 1e-10:
                raise ValueError(f"float64: the torch path and the reference differ by {worst:.1e}")
        return found

    def backends(self) -> list[tuple[str, str, int]]:
        """(name, user's word, workspace) of what can run here; in 4 chunks or more, and Triton in one too."""
        device = self.centroids.device
        whole = 4 * self.rows * (self.rows + NEGATIVES + len(self.centroids) + 64)
        part = min(WORKSPACE_BYTES, whole // 4)
        found = [("torch", "torch", part)]
        if not why_no_triton(device) and (device.type == "cuda" or self.rows <= INTERPRETED_AT_MOST):
            found.append(("triton-chunked", "triton", part))
            if self.rows <= WHOLE_AT_MOST:
                found.append(("triton", "triton", 2 * whole))
        return found


def measure(results: Results, seen: dict[tuple, tuple[int, dict[str, float]]], case: Case) -> None:
    """All rows of a shape; `seen` has eager's largest errors so far by dtype and λ."""
    torch.set_float32_matmul_precision(case.precision)
    device = torch.device("cuda" if results.on_gpu else "cpu")
    name = case.columns()["dtype"]
    for weight in WEIGHTS:
        problem = Problem(case, device, weight)
        truth = problem.truth()
        eager_rows, allowed = seen.get((name, weight), (0, dict.fromkeys(FIGURES, 0.0)))
        theirs: dict[str, float] = {}
        try:
            theirs = errors(problem.eager(), truth)
            largest = {each: max(allowed[each], theirs[each]) for each in FIGURES}
            seen[name, weight] = eager_rows, _ = case.batch, largest
            allowed = theirs
        except torch.OutOfMemoryError:
            pass
        for backend, word, workspace in problem.backends():
            found, again = (problem.ours(word, workspace) for _ in range(2))
            same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))  # NaN equals nothing
            mine = errors(found, truth)
            within = all(mine[each] <= allowed[each] + TOLERANCE[name] for each in FIGURES)
            row = {
                "contender": f"{OURS} {backend}", "what": "both", **case.columns(),
                "device": device.type, "N": NEGATIVES, "bml_weight": weight, "backend": backend,
                "workspace_bytes": workspace,
                **{f"{each}_error": mine[each] for each in FIGURES},
                **{f"eager_{each}_error": theirs.get(each) for each in FIGURES},
                "eager_B": eager_rows, "tolerance": TOLERANCE[name], "within": within, "repeatable": same,
                "status": "ok" if within and same else "failed",
                "note": ("" if within else "further from float64 than eager") if same else "not repeatable",
            }  # fmt: skip
            results.add(row)


def stages(wanted: argparse.Namespace, results: Results, clock: Clock) -> list[tuple[str, Callable]]:
    """What run.py is to do: a shape a stage."""
    reason = why_no_triton(clock.device)
    if reason:
        print(f"no Triton rows: {reason}" + " (or set TRITON_INTERPRET=1)" * (not results.on_gpu))
    elif not results.on_gpu:
        print(f"Triton rows: by the interpreter, up to B = {INTERPRETED_AT_MOST}")
        round_in_the_interpreter()
    seen: dict[tuple, tuple[int, dict[str, float]]] = {}
    cases = [
        Case("step", batch, dim, wanted.clusters, DTYPES[dtype], wanted.precision)
        for dtype in wanted.dtype
        for dim in wanted.dim
        for batch in sorted(wanted.batch)
    ]
    return [(f"exactness {case}", partial(measure, results, seen, case)) for case in cases]


if __name__ == "__main__":
    from run import main

    sys.exit(main("exactness"))
