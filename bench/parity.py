"""Does a contender compute the same as the float64 reference? Asked before anything is timed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from contenders import FP16, FP32, HALF, MARGINS, MOMENTUM, TAU, Built, Case, Views, make_views
from torch import Tensor

import clusterns
from clusterns import reference

REFERENCE_AT_MOST = 1024  # rows; above, our torch path in float64 (which test_contract.py holds against it)


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
    return FLOAT16 if case.dtype == FP16 else BFLOAT16


data_of = make_views  # what a case's contenders are built on


class Expected(NamedTuple):
    """Loss and gradients, and centroids after a step."""

    answer: tuple[Tensor, ...]
    centroids: Tensor | None = None


def expected(case: Case, views: Views) -> Expected:
    """What float64 gives on the same, already rounded views."""
    leaves = [z.detach().double().requires_grad_() for z in views.leaves()]
    anchors, centroids = leaves[0], views.centers.to(case.dtype if case.kind != "step" else FP32).double()
    arguments: dict = {"temperature": TAU}
    small = case.batch <= REFERENCE_AT_MOST
    if case.kind == "both":
        arguments["directions"] = "both"
    elif case.kind != "plain":
        assign = reference.nearest_and_runner_up if small else clusterns.nearest_centroids
        if case.kind == "step":
            nearest = assign(anchors, centroids)[0]
            with torch.no_grad():
                centroids = reference.update_centroids(centroids, anchors, nearest, MOMENTUM, "sum")
        nearest, runner_up = assign(anchors, centroids)[:2]
        arguments |= MARGINS | {"bml_weight": case.bml_weight, "false_negatives": "bml"}
        arguments |= {"centroids": centroids, "cluster_ids": nearest, "hard_negative_ids": runner_up}
        arguments["negatives"] = leaves[2] if case.negatives else None
    if small:
        loss = reference.objective(*leaves[:2], **arguments).loss
    else:
        more = {"backend": "torch", "workspace_bytes": 2**31}
        loss = clusterns.info_nce(*leaves[:2], **arguments, **more)
    gradients = torch.autograd.grad(loss, leaves)
    return Expected((loss.detach(), *gradients), centroids if case.kind == "step" else None)


def relative(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return float((found.double() - truth).norm() / truth.norm())


def check(case: Case, answer: Any, built: Built, truth: Expected) -> tuple[dict[str, float], str]:
    """Errors of an answer as columns of a row, and which of them is too large, in words."""
    loss, *gradients = answer
    gradients = [each.double() / built.scale for each in gradients]
    found = {
        "loss": float(loss),
        "loss_error": relative(loss, truth.answer[0]),
        "gradient_error": max(map(relative, gradients, truth.answer[1:])),
    }
    allowed = tolerance(case)
    limits = {"loss_error": allowed.loss, "gradient_error": allowed.gradient}
    if truth.centroids is not None:  # the way they went
        start = built.views.centers.double()
        found["centroid_error"] = relative(built.centroids.double() - start, truth.centroids - start)
        limits["centroid_error"] = allowed.gradient
    beyond = [  # NaN never passes
        f"{name.replace('_', ' ')} {found[name]:.2g} > {limit:g}"
        for name, limit in limits.items()
        if not found[name] <= limit
    ]
    return found, ", ".join(beyond)
