"""How far are loss and gradients from float64, beside eager torch's in the same dtype?

    python bench/exactness.py [--device cuda] [--batches 64,300,1024] [--output FILE]
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
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from contenders import MARGINS, TAU, WORKSPACE_BYTES, Case, make_views, unit_formula
from parity import relative
from report import RESULTS, machine, write_csv
from torch import Tensor
from tqdm import tqdm

import clusterns

WEIGHTS = (1e-2, MARGINS["bml_weight"])  # λ: one at which the margin loss has a say, and the published one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERPRETED_AT_MOST = 300  # rows of a batch, on a CPU
WHOLE_AT_MOST = 16384  # rows: a single chunk keeps 4·B² bytes
REFERENCE_AT_MOST = 1024  # rows at which the float64 truth is held against the reference
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


class Problem(NamedTuple):
    """Embeddings in the dtype under test, and everything else of the objective."""

    embeddings: tuple[Tensor, ...]  # anchors (B, D), positives (B, D), negatives (N, D)
    centroids: Tensor  # (K, D) float32
    cluster_ids: Tensor  # (B,)
    hard_negative_ids: Tensor  # (B,)
    bml_weight: float

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Embeddings that want gradients."""
        return [z.detach().to(dtype or z.dtype).requires_grad_() for z in self.embeddings]


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


def make_problem(case: Case, device: torch.device, bml_weight: float) -> Problem:
    """Views around centers, explicit negatives of the same kind, clusters as float64 sees them."""
    anchors, positives, centers = make_views(case, device)
    other = make_views(Case("step", NEGATIVES, case.dim, case.clusters, case.dtype), device).positives
    found = clusterns.nearest_centroids(anchors.detach().double(), centers.double())
    return Problem((anchors, positives, other), centers, found.nearest, found.runner_up, bml_weight)


def ours(
    problem: Problem, backend: str, workspace_bytes: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Loss and gradients by a backend."""
    leaves = problem.leaves(dtype)
    loss = clusterns.info_nce(
        *leaves[:2],
        temperature=TAU,
        negatives=leaves[2],
        centroids=problem.centroids.to(dtype or torch.float32),
        hard_negative_ids=problem.hard_negative_ids,
        cluster_ids=problem.cluster_ids,
        false_negatives="bml",
        workspace_bytes=workspace_bytes,
        backend=backend,
        **{**MARGINS, "bml_weight": problem.bml_weight},
    )
    return [loss.detach(), *differentiate(loss, leaves)]


def differentiate(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients; those of float16 under a loss scale, and widened before that is taken out again."""
    if leaves[0].dtype != torch.float16:
        return list(torch.autograd.grad(loss, leaves))
    return [g.float() / LOSS_SCALE for g in torch.autograd.grad(loss, leaves, loss.new_tensor(LOSS_SCALE))]


def eager(problem: Problem) -> list[Tensor]:
    """Loss and gradients in plain torch."""
    leaves = problem.leaves()
    a, p, n = (F.normalize(z, dim=1) for z in leaves)
    c = F.normalize(problem.centroids, dim=1).to(a.dtype)
    info_nce, margins = unit_formula(a, p, c, (problem.cluster_ids, problem.hard_negative_ids), n)
    loss = info_nce + problem.bml_weight * margins
    return [loss.detach(), *differentiate(loss, leaves)]


def errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """By the names of `FIGURES`."""
    loss = abs(float(found[0]) - float(truth[0]))
    return dict(zip(FIGURES, (loss, *map(relative, found[1:], truth[1:])), strict=True))


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two runs agree in every bit (NaN agrees with nothing)."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def truth_of(problem: Problem) -> list[Tensor]:
    """The torch path in float64, held against the reference where that fits."""
    found = ours(problem, "torch", 8 * WORKSPACE_BYTES, torch.float64)
    if len(problem.cluster_ids) <= REFERENCE_AT_MOST:
        worst = max(errors(found, ours(problem, "reference", WORKSPACE_BYTES, torch.float64)).values())
        if not worst <= 1e-10:
            raise SystemExit(f"float64: the torch path and the reference differ by {worst:.1e}")
    return found


def why_no_triton(device: torch.device) -> str:
    """Why kernels cannot run on a device, empty if they can: by asking for them."""
    try:
        rows = torch.randn(2, 16, device=device)
        clusterns.info_nce(rows, rows, backend="triton")
    except (RuntimeError, ImportError) as error:
        return str(error)
    return ""


def backends(problem: Problem) -> list[tuple[str, str, int]]:
    """(name, user's word, workspace) of what can run here; in four chunks or more, and Triton in one too."""
    rows, device = len(problem.cluster_ids), problem.centroids.device
    whole = 4 * rows * (rows + sum(len(z) for z in (problem.embeddings[2], problem.centroids)) + 64)
    part = min(WORKSPACE_BYTES, whole // 4)
    found = [("torch", "torch", part)]
    if not why_no_triton(device) and (device.type == "cuda" or rows <= INTERPRETED_AT_MOST):
        found.append(("triton-chunked", "triton", part))
        if rows <= WHOLE_AT_MOST:
            found.append(("triton", "triton", 2 * whole))
    return found


def measure(
    case: Case,
    device: torch.device,
    seen: dict[tuple, tuple[int, dict[str, float]]],
    add: Callable[[dict], None],
) -> None:
    """All rows of a shape; `seen` has eager's largest errors so far by dtype and λ."""
    name = str(case.dtype).removeprefix("torch.")
    for weight in WEIGHTS:
        problem = make_problem(case, device, weight)
        truth = truth_of(problem)
        key = (name, weight)
        rows_before, worst = seen.get(key, (0, dict.fromkeys(FIGURES, 0.0)))
        allowed, theirs, eager_rows = worst, None, rows_before
        try:
            theirs = allowed = errors(eager(problem), truth)
            eager_rows = case.batch
            seen[key] = (case.batch, {each: max(worst[each], theirs[each]) for each in FIGURES})
        except torch.OutOfMemoryError:
            pass
        for backend, word, workspace in backends(problem):
            found = ours(problem, word, workspace)
            repeatable = same_bits(found, ours(problem, word, workspace))
            mine = errors(found, truth)
            within = all(mine[each] <= allowed[each] + TOLERANCE[name] for each in FIGURES)
            row = {
                "device": device.type, **{k: v for k, v in case.columns().items() if k in COLUMNS},
                "N": NEGATIVES, "bml_weight": weight, "backend": backend, "workspace_bytes": workspace,
                **{f"{each}_error": mine[each] for each in FIGURES},
                **{f"eager_{each}_error": theirs[each] if theirs else "" for each in FIGURES},
                "eager_B": eager_rows, "tolerance": TOLERANCE[name], "within": within,
                "repeatable": repeatable,
            }  # fmt: skip
            add(row)


def line(row: dict) -> str:
    """A row of the table: ours / eager's for the loss and each gradient."""
    text = f"{row['dtype']:9} B={row['B']:<7} λ={row['bml_weight']:<7g}{row['backend']:15}"
    for name in FIGURES:
        theirs = row[f"eager_{name}_error"]
        text += f" {name} {row[f'{name}_error']:.1e}/{theirs if theirs == '' else format(theirs, '.1e')}"
    return f"{text}  {'ok' if row['within'] else 'WORSE'}{'' if row['repeatable'] else ' NOT REPEATABLE'}"


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "exactness.csv", help="CSV, default %(default)s"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", default="64,300,1024,4096", help="comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--clusters", type=int, default=128)
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    wanted = parser.parse_args()
    device = torch.device(wanted.device)
    torch.set_float32_matmul_precision(wanted.precision)
    batches = sorted(int(each) for each in wanted.batches.split(","))
    cases = [
        Case("step", batch, wanted.dim, wanted.clusters, DTYPES[dtype], wanted.precision)
        for dtype in wanted.dtypes.split(",")
        for batch in batches
    ]
    reason = why_no_triton(device)
    if reason:
        print(f"no Triton rows: {reason}" + (" (or set TRITON_INTERPRET=1)" if device.type == "cpu" else ""))
    elif device.type == "cpu":
        print(f"Triton rows: by the interpreter, up to B = {INTERPRETED_AT_MOST}")
        round_in_the_interpreter()
    found = machine()
    rows: list[dict] = []
    seen: dict[tuple, tuple[int, dict[str, float]]] = {}

    def add(row: dict) -> None:
        rows.append({**{name: found[name] for name in COLUMNS if name in found}, **row})
        write_csv(wanted.output, COLUMNS, rows)
        print(line(row), flush=True)

    print(f"ours / eager's error against float64; D={wanted.dim} K={wanted.clusters} N={NEGATIVES}")
    interrupted = False
    try:
        for case in tqdm(cases, desc="shapes", file=sys.stderr):
            measure(case, device, seen, add)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted")
    bad = [row for row in rows if not (row["within"] and row["repeatable"])]
    print(f"{len(rows)} rows, {len(bad)} worse than eager + tolerance or not repeatable; in {wanted.output}")
    return 1 if bad or not rows or interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
