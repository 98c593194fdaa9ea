"""Does a contender compute the same as the float64 reference? Asked before anything is timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from rivals import HALF, MARGINS, MOMENTUM, TAU, WORKSPACE_BYTES, Built, Case, Views
from torch import Tensor

import clusterns
from clusterns import reference

REFERENCE_AT_MOST = 1024  # rows; above, our torch path in float64 (which exactness.py holds against it)
AGREEMENT = 0.99  # share of equal ids of an assignment: half precision decides near ties either way


class Tolerance(NamedTuple):
    """Largest relative error at which a contender is timed."""

    loss: float
    gradient: float


# Products in tf32 round cosines to 5e-4 of themselves and their logits to 1/τ times that. Rivals in half
# precision round every intermediate: the eager formula came within half of these on the CPU.
EXACT, TF32 = Tolerance(1e-4, 1e-3), Tolerance(1e-3, 5e-3)
FLOAT16, BFLOAT16 = Tolerance(5e-3, 3e-2), Tolerance(2e-2, 8e-2)


def tolerance(case: Case) -> Tolerance:
    """What the dtype and the precision of products allow."""
    if case.dtype not in HALF:
        return EXACT if case.precision == "highest" else TF32
    return FLOAT16 if case.dtype == torch.float16 else BFLOAT16


class Expected(NamedTuple):
    """Loss and gradients of both views, and centroids after a step; of an assignment the ids alone."""

    answer: tuple[Tensor, ...]
    centroids: Tensor | None = None


def expected(case: Case, views: Views) -> Expected | None:
    """What float64 gives on the same, already rounded views; None for another loss."""
    if case.kind == "other loss":
        return None
    anchors, positives = (z.detach().double().requires_grad_() for z in views[:2])
    centroids = views.centers.to(case.dtype if case.kind != "step" else torch.float32).double()
    arguments: dict = {"temperature": TAU}
    small = case.batch <= REFERENCE_AT_MOST
    assign = reference.nearest_and_runner_up if small else clusterns.nearest_centroids
    if case.kind == "assign":
        return Expected(tuple(assign(anchors.detach(), centroids)[:1]))
    if case.kind != "plain":
        if case.kind == "step":
            nearest = assign(anchors, centroids)[0]
            with torch.no_grad():
                centroids = reference.update_centroids(centroids, anchors, nearest, MOMENTUM, "sum")
        nearest, runner_up = assign(anchors, centroids)[:2]
        arguments |= MARGINS | {
            "centroids": centroids,
            "cluster_ids": nearest,
            "hard_negative_ids": runner_up,
            "false_negatives": "bml",
        }
    if small:
        loss = reference.objective(anchors, positives, **arguments).loss
    else:
        more = {"backend": "torch", "workspace_bytes": 8 * WORKSPACE_BYTES}
        loss = clusterns.info_nce(anchors, positives, **arguments, **more)
    gradients = torch.autograd.grad(loss, (anchors, positives))
    return Expected((loss.detach(), *gradients), centroids if case.kind == "step" else None)


def relative(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return float((found.double() - truth).norm() / truth.norm())


def errors(case: Case, answer: object, built: Built, truth: Expected) -> dict[str, float]:
    """Relative errors of the loss, the gradients and the way the centroids went; of ids, how many agree."""
    if case.kind == "assign":
        return {"agreement": float((answer.flatten() == truth.answer[0]).double().mean())}  # type: ignore[attr-defined]
    loss, *gradients = answer  # type: ignore[misc]
    found = {
        "loss": float(loss),
        "loss_error": relative(loss, truth.answer[0]),
        "gradient_error": max(map(relative, gradients, truth.answer[1:])),
    }
    if truth.centroids is not None:
        start = built.views.centers.double()  # type: ignore[attr-defined]
        found["centroid_error"] = relative(built.centroids.double() - start, truth.centroids - start)  # type: ignore[attr-defined]
    return found


def failure(case: Case, found: dict[str, float]) -> str:
    """Which error is beyond the tolerance, in words; empty if none is. NaN never passes."""
    allowed = tolerance(case)
    limits = {
        "loss_error": allowed.loss,
        "gradient_error": allowed.gradient,
        "centroid_error": allowed.gradient,
    }
    beyond = [
        f"{name.replace('_', ' ')} {found[name]:.2g} > {limit:g}"
        for name, limit in limits.items()
        if name in found and not found[name] <= limit
    ]
    if "agreement" in found and not found["agreement"] >= AGREEMENT:
        beyond.append(f"{found['agreement']:.2%} of the ids agree, expected {AGREEMENT:.0%}")
    return ", ".join(beyond)
