"""Does a contender compute the same as the float64 reference? Asked before anything is timed."""

from __future__ import annotations

from typing import Any, NamedTuple

import corpus
import torch
from contenders import HALF, MARGINS, MOMENTUM, TAU, WORKSPACE_BYTES, Built, Case, make_views
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


def is_of_a_corpus(case: Case) -> bool:
    """Whether corpus.py has the data and the truth of a case."""
    return case.kind in {each.kind for each in corpus.CASES}


def data_of(case: Case, device: torch.device) -> Any:
    """What a case's contenders are built on."""
    return corpus.make_data(case) if is_of_a_corpus(case) else make_views(case, device)


class Expected(NamedTuple):
    """Loss and gradients of both views, and centroids after a step; of an assignment the ids alone."""

    answer: tuple[Tensor, ...]
    centroids: Tensor | None = None


def expected(case: Case, views: Any) -> Any:
    """What float64 gives on the same, already rounded views."""
    if is_of_a_corpus(case):
        return corpus.expected(case, views)
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


def check(case: Case, answer: Any, built: Built, truth: Any) -> tuple[dict[str, float], str]:
    """Errors of an answer as columns of a row, and which of them is too large, in words."""
    if is_of_a_corpus(case):
        return corpus.errors(built.views, answer, truth)
    if case.kind == "assign":
        agreement = float((answer.flatten() == truth.answer[0]).double().mean())
        few = f"{agreement:.2%} of the ids agree, expected {AGREEMENT:.0%}"
        return {"agreement": agreement}, "" if agreement >= AGREEMENT else few
    loss, *gradients = answer
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
