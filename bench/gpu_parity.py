"""Does a contender compute the same loss, gradients and centroids as the float64 reference?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from contenders import SETTINGS
from gpu_contenders import Built, Case, Views
from torch import Tensor

from clusterns import reference


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
    if case.dtype == torch.float32:
        return EXACT if case.precision == "highest" else TF32
    return FLOAT16 if case.dtype == torch.float16 else BFLOAT16


class Expected(NamedTuple):
    """The reference's loss, gradients of both views, and centroids after the step."""

    loss: Tensor
    gradients: tuple[Tensor, ...]
    centroids: Tensor | None


def expected(case: Case, views: Views) -> Expected:
    """One step of the reference in float64 on the same, already rounded views."""
    anchors, positives = (z.detach().double().requires_grad_() for z in views[:2])
    arguments: dict = {}
    if case.kind == "step":
        centroids = views.centers.double()
        with torch.no_grad():
            nearest, _ = reference.nearest_and_runner_up(anchors, centroids)
            moved = reference.update_centroids(centroids, anchors, nearest, SETTINGS.centroid_momentum, "sum")
            nearest, runner_up = reference.nearest_and_runner_up(anchors, moved)
        arguments = {
            "centroids": moved,
            "cluster_ids": nearest,
            "hard_negative_ids": runner_up,
            "false_negatives": "bml",
            "bml_weight": SETTINGS.bml_weight,
            "bml_alpha": SETTINGS.bml_alpha,
            "bml_beta": SETTINGS.bml_beta,
        }
    loss = reference.objective(anchors, positives, temperature=SETTINGS.temperature, **arguments).loss
    gradients = torch.autograd.grad(loss, (anchors, positives))
    return Expected(loss.detach(), gradients, arguments.get("centroids"))


def errors(found: tuple[Tensor, ...], built: Built, truth: Expected) -> dict[str, float]:
    """Relative errors of (loss, gradient, gradient) and, for a step, of the way the centroids went."""

    def relative(ours: Tensor, theirs: Tensor) -> float:
        return float((ours.double() - theirs).norm() / theirs.norm())

    loss, *gradients = found
    columns = {
        "loss": float(loss),
        "loss_error": relative(loss, truth.loss),
        "gradient_error": max(map(relative, gradients, truth.gradients)),
    }
    if truth.centroids is not None:
        start = built.views.centers.double()
        columns["centroid_error"] = relative(built.centroids.double() - start, truth.centroids - start)
    return columns


def failure(measured: dict[str, float], allowed: Tolerance) -> str:
    """Which error is beyond the tolerance, in words; empty if none is. NaN never passes."""
    limits = {
        "loss_error": allowed.loss,
        "gradient_error": allowed.gradient,
        "centroid_error": allowed.gradient,
    }
    beyond = [
        f"{name.replace('_', ' ')} {measured[name]:.2g} > {limit:g}"
        for name, limit in limits.items()
        if name in measured and not measured[name] <= limit
    ]
    return ", ".join(beyond)
