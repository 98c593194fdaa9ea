"""Cases, and everything that is measured in them: ours, eager torch, published code, other libraries.

A contender is built for a case and its views, and is then a call without arguments. One list for the CPU and
the GPU. Only for benchmarks: none of the losses here is the product.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import Run
from report import OURS, short
from torch import Tensor, nn

import clusterns
from clusterns.objective.problem import WORKSPACE_BYTES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP32, BF16, FP16 = DTYPES.values()
HALF = (BF16, FP16)
CUDA = torch.cuda.is_available()

# Numbers of the objective: the published RoBERTa-base row.
TAU, HARD_NEGATIVE_WEIGHT, MOMENTUM = 0.05, 0.0, 1e-3
MARGINS: dict[str, Any] = {"bml_weight": 1e-4, "bml_alpha": 0.2, "bml_beta": 0.5}
LOSS_SCALE = 4096.0  # of float16, whose small gradients vanish without one, in training too

# Kinds of cases with gradients, and the (B, B) matrices in the dtype that are alive at once in plain torch on
# a CPU, from peaks measured there ("both": as a guess).
LOSSES = {"step": 7.5, "objective": 7.5, "plain": 3.0, "both": 6.0}


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    A whole training "step" with clustering active, the "objective" for given centroids, "plain" InfoNCE, that
    in "both" directions, or what corpus.py adds.
    """

    kind: str
    batch: int
    dim: int = 768
    clusters: int = 128
    dtype: torch.dtype = torch.bfloat16
    precision: str = "highest"  # of float32 matrix products; half precision does not depend on it
    negatives: int = 0  # explicit ones N of an objective
    bml_weight: float = MARGINS["bml_weight"]
    dominant: float = 0.0  # share of the sentences that lie near the first center, whatever the others do

    @property
    def is_loss(self) -> bool:
        """Whether there are gradients."""
        return self.kind in LOSSES

    def columns(self) -> dict[str, object]:
        """The case as columns of a row."""
        return {
            "kind": self.kind,
            "B": self.batch,
            "D": self.dim,
            "K": 0 if self.kind in ("plain", "both") else self.clusters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "precision": self.precision,
            **({"N": self.negatives, "bml_weight": self.bml_weight} if self.negatives else {}),
            **({"dominant": self.dominant} if self.dominant else {}),
        }

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.columns().items())


class Views(NamedTuple):
    """Anchors and positives (B, D), explicit negatives (N, D) or none, centers (K, D) float32.

    All but the centers want gradients.
    """

    anchors: Tensor
    positives: Tensor
    centers: Tensor
    negatives: Tensor | None = None

    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are of."""
        return self[:2] if self.negatives is None else (*self[:2], self.negatives)


def make_views(case: Case, device: torch.device) -> Views:
    """Views of sentences that lie near one center and half as near to another one.

    So no two centroids are equally near, and whoever rounds picks the same hard negative: what parity shows
    is arithmetic, not the luck of a tie.
    """
    made: dict = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    batch, dim, clusters = case.batch, case.dim, case.clusters
    centers = 0.8 * torch.randn(clusters, dim, **made)
    first = torch.randint(clusters, (batch,), **made)
    if case.dominant:
        first *= torch.rand(batch, **made) >= case.dominant
    second = (first + torch.randint(1, clusters, (batch,), **made)) % clusters
    anchors = centers[first] + 0.5 * centers[second] + torch.randn(batch, dim, **made)
    positives = anchors + 3 * torch.randn(batch, dim, **made)
    others = torch.randint(clusters, (case.negatives,), **made)
    negatives = centers[others] + 3 * torch.randn(case.negatives, dim, **made)
    a, p, n = (z.to(case.dtype).requires_grad_() for z in (anchors, positives, negatives))
    return Views(a, p, centers, n if case.negatives else None)


class Built:
    """A contender ready to run in a case: of a loss forward and backward."""

    def __init__(self, contender: Contender, case: Case, views: Any):
        made = contender.build(case, views)
        self.call, self.centroids = made if isinstance(made, tuple) else (made, None)
        self.contender, self.views = contender, views
        self.run: Run = self._step if case.is_loss else self.call
        self.scale = LOSS_SCALE if case.dtype == FP16 else 1.0
        self._upstream: Tensor | None = None
        self._graph: Run | str = contender.no_graph

    def _step(self) -> tuple[Tensor, ...]:
        """Loss, and the gradients of all leaves times `scale`."""
        loss, leaves = self.call(), self.views.leaves()
        if self._upstream is None:  # made once, else the engine makes it in every backward
            self._upstream = torch.full_like(loss, self.scale)
        return loss.detach(), *torch.autograd.grad(loss, leaves, self._upstream)

    @torch.no_grad()
    def reset(self) -> None:
        """Put the centroids back where every contender's started."""
        if self.centroids is not None:
            self.centroids.copy_(self.views.centers)

    def seen(self, view: str, clock: Any) -> Run | str:
        """The run by itself, or as a "graph", captured once, or why there is none."""
        if view == "graph" and not self._graph:
            try:
                self._graph = clock.capture(self.run)
            except Exception as error:  # a rival may do anything while it is captured
                self._graph = f"not captured: {short(error)}"
                with contextlib.suppress(RuntimeError):  # the broken capture reports itself once more
                    clock.synchronize()
        return self._graph if view == "graph" else self.run


@dataclass(frozen=True)
class Contender:
    """How to build a contender, and what it cannot do, in words.

    `build(case, views)` gives the call, of a loss that moves centroids the pair of call and centroids.
    """

    build: Callable[[Case, Any], Any]
    name: str
    package: str = "torch"
    refuses: Callable[[Case], str] = field(default=lambda case: "")
    no_graph: str = ""
    square: bool = False  # forms (B, B) matrices
    other_loss: bool = False  # than ours, so timed whatever it computes

    def unavailable(self, case: Case) -> str:
        """Why it is left out of a case; empty if it takes part."""
        return self.refuses(case) if util.find_spec(self.package) else "not installed"


KINDS: dict[str, dict[str, Contender]] = {}


def rivals(kind: str) -> list[str]:
    """Names of a kind's contenders but for ours with other settings."""
    return [name for name in KINDS[kind] if not name.startswith(f"{OURS} ")]


def contender(name: str, *kinds: str, **more: Any) -> Callable[[Callable], Callable]:
    """Enter the builder below in the lists of these kinds."""

    def enter(build: Callable) -> Callable:
        for kind in kinds:
            KINDS.setdefault(kind, {})[name] = Contender(build, name, **more)
        return build

    return enter


# --- formulas ----------------------------------------------------------------------------------------------


def broadcast_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosines from a (M, N, D) broadcast, as the published code forms them."""
    return F.cosine_similarity(x[:, None, :], y[None, :, :], dim=-1)


def margin_loss(cosines: Tensor, mates: Tensor) -> Tensor:
    """Mean of the bidirectional margin loss, for cosines and a mask of false negatives (B, B)."""
    delta = (cosines - cosines.diagonal()[:, None]) * mates
    return (F.relu(delta + MARGINS["bml_alpha"]) + F.relu(-delta - MARGINS["bml_beta"])).mean(
        dtype=torch.promote_types(delta.dtype, torch.float32)
    )


def published_formulation(anchors: Tensor, positives: Tensor, centroids: Tensor) -> Tensor:
    """The objective the way the published code goes about it, in our words.

    Broadcast cosines for every matrix, clusters found anew for the hard negatives and for the mask, B×B
    masks by one-hot products, a Python list for the B×2B weights, and a mean cosine read to the host.
    """
    batch = len(anchors)
    cosines = broadcast_cosine(anchors, positives)
    float(cosines.detach().mean())
    points = anchors.detach()
    with torch.no_grad():
        runner_up = broadcast_cosine(points, centroids).topk(2, dim=1).indices[:, 1]
        nearest = broadcast_cosine(points, centroids).argmax(dim=1)
        members = F.one_hot(nearest, len(centroids)).float()
        mates = (members @ members.T).fill_diagonal_(0)
    hard = broadcast_cosine(anchors, centroids[runner_up])
    logits = torch.cat([cosines, hard], dim=1) / TAU
    weights = torch.tensor(
        [
            [0.0] * batch + [0.0] * row + [HARD_NEGATIVE_WEIGHT] + [0.0] * (batch - row - 1)
            for row in range(batch)
        ]
    )
    loss = F.cross_entropy(logits + weights.to(logits.device), torch.arange(batch, device=logits.device))
    return loss + MARGINS["bml_weight"] * margin_loss(cosines, mates)


def published_step(anchors: Tensor, positives: Tensor, centroids: Tensor) -> Tensor:
    """A training step the published way: assign, move the centroids (K, D) in place by the sum, objective."""
    points = anchors.detach().clone()
    with torch.no_grad():
        nearest = broadcast_cosine(points, centroids).argmax(dim=1)
        members = F.one_hot(nearest, len(centroids))
        (members.float() @ members.T.float()).fill_diagonal_(0)  # formed there too, for a result nobody uses
        totals = members.T.to(points.dtype) @ points
        totals = totals + centroids * members.sum(dim=0).bool().logical_not()[:, None]
        centroids.copy_(MOMENTUM * totals + (1 - MOMENTUM) * centroids)
    return published_formulation(anchors, positives, centroids)


def unit_formula(a: Tensor, p: Tensor, c: Tensor, negatives: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """InfoNCE and margin loss of unit rows in the best plain torch we know: the B×K block with log-counts.

    In half precision the logits widen to float32.
    """
    cosines, to_centroids = a @ p.T, a @ c.T
    nearest, runner_up = to_centroids.detach().topk(2, dim=1).indices.unbind(1)
    ones = torch.ones(len(a), device=a.device)
    log_counts = torch.zeros(len(c), device=a.device).index_add_(0, runner_up, ones).log()
    explicit = [] if negatives is None else [a @ negatives.T / TAU]
    logits = torch.cat([cosines / TAU, *explicit, to_centroids / TAU + log_counts], dim=1)
    info_nce = F.cross_entropy(logits, torch.arange(len(a), device=a.device))
    del logits, explicit
    mates = nearest[:, None] == nearest[None, :]  # a sentence as its own mate is neutral
    return info_nce, margin_loss(cosines, mates)


def eager_formula(
    anchors: Tensor,
    positives: Tensor,
    centroids: Tensor,
    negatives: Tensor | None = None,
    bml_weight: float = MARGINS["bml_weight"],
) -> Tensor:
    """The objective: normalise, then `unit_formula`, by autograd."""
    a, p, c = (F.normalize(z, dim=1) for z in (anchors, positives, centroids))
    n = None if negatives is None else F.normalize(negatives, dim=1)
    info_nce, margins = unit_formula(a, p, c, n)
    return info_nce + bml_weight * margins


class EagerStep(nn.Module):
    """A training step in the best plain torch we know: assign, update, assign anew, loss; no host sync.

    A module, because `torch.compile` may replay a graph that writes to a buffer, not one that writes to an
    argument.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor):
        super().__init__()
        self.register_buffer("centroids", centroids.clone())

    def forward(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """Loss of one batch of (B, D) views; the centroids move in place by the sum of their members."""
        a, p = F.normalize(anchors, dim=1), F.normalize(positives, dim=1)
        with torch.no_grad():
            nearest = (a @ self.unit_centroids(a).T).argmax(dim=1)
            clusters = torch.arange(len(self.centroids), device=a.device)
            # No scatter into zeros: torch 2.11's inductor makes float32 of it, whatever their dtype.
            members = (nearest[:, None] == clusters).to(a.dtype)
            moved = torch.lerp(self.centroids, (members.T @ anchors).float(), MOMENTUM)
            occupied = members.sum(dim=0)[:, None] > 0
            self.centroids.copy_(torch.where(occupied, moved, self.centroids))
        info_nce, margins = unit_formula(a, p, self.unit_centroids(a))
        return info_nce + MARGINS["bml_weight"] * margins

    def unit_centroids(self, like: Tensor) -> Tensor:
        """Normalised centroids (K, D) in the dtype of a batch."""
        return F.normalize(self.centroids, dim=1).to(like.dtype)


def eager_info_nce(anchors: Tensor, positives: Tensor) -> Tensor:
    """Plain InfoNCE in plain torch."""
    a, p = F.normalize(anchors, dim=1), F.normalize(positives, dim=1)
    return F.cross_entropy(a @ p.T / TAU, torch.arange(len(a), device=a.device))


def eager_both(anchors: Tensor, positives: Tensor) -> Tensor:
    """CLIP's loss in plain torch."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T / TAU
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


# --- what is measured --------------------------------------------------------------------------------------


def our_loss(dim: int, clusters: int, centers: Tensor, **more: Any) -> clusterns.ClusterNSLoss:
    """`ClusterNSLoss` in training mode with clustering active."""
    loss = clusterns.ClusterNSLoss(
        dim, clusters, temperature=TAU, centroid_momentum=MOMENTUM, **MARGINS, **more
    )
    loss.to(centers.device).centroids.copy_(centers)
    loss.initialized.fill_(True)
    return loss.train()


def whole_bytes(case: Case) -> int:
    """A workspace in which all rows are one chunk."""
    return 8 * case.batch * (case.batch + case.negatives + case.clusters + 64)


WORKSPACES: dict[str, Callable[[Case], int]] = {
    " whole": whole_bytes,
    " in chunks": lambda case: min(WORKSPACE_BYTES, whole_bytes(case) // 8),  # four or more
}


def _ours_with(backend: str, workspace: str) -> None:
    @contender(f"{OURS} {backend}{workspace}".replace("  ", " ").rstrip(), *LOSSES)
    def build(case: Case, views: Views):
        a, p = views[:2]
        more: dict[str, Any] = {"backend": backend} if backend else {}
        if workspace:
            more["workspace_bytes"] = WORKSPACES[workspace](case) if workspace in WORKSPACES else 2**28
        if case.kind == "step":
            loss = our_loss(case.dim, case.clusters, views.centers, **more)
            return (lambda: loss(a, p)), loss.centroids
        if case.kind == "objective":
            more |= {"centroids": views.centers.to(case.dtype), "negatives": views.negatives}
            more |= {"false_negatives": "bml", **MARGINS, "bml_weight": case.bml_weight}
        if case.kind == "both":
            more["directions"] = "both"
        return lambda: clusterns.info_nce(a, p, temperature=TAU, **more)


for backend, workspace in itertools.product(("", "torch", "triton"), ("", *WORKSPACES)):
    _ours_with(backend, workspace)
_ours_with("", " 256 MiB")


def _in_torch(name: str, wrap: Callable[[Callable], Callable]) -> None:
    @contender(name, *LOSSES, square=True)
    def build(case: Case, views: Views):
        if case.kind == "step":
            step = EagerStep(views.centers)
            run = wrap(step)
            return (lambda: run(*views[:2])), step.centroids
        if case.kind in ("plain", "both"):
            run = wrap(eager_info_nce if case.kind == "plain" else eager_both)
            return lambda: run(*views[:2])
        run, centers = wrap(eager_formula), views.centers.to(case.dtype)
        return lambda: run(*views[:2], centers, views.negatives, case.bml_weight)


_in_torch("eager", lambda function: function)
_in_torch("torch.compile", partial(torch.compile, dynamic=False))  # fixed sizes


@contender(
    "published",
    "step",
    "objective",
    no_graph="reads the mean cosine to the host and builds its weights there",
    refuses=lambda case: "its B×B×D tensors outgrow the device" if case.batch > 1024 else "",
)
def _published(case: Case, views: Views):
    """A step in half precision goes under autocast, as it was trained."""
    if case.kind == "objective":
        centers = views.centers.to(case.dtype)
        return lambda: published_formulation(*views[:2], centers)
    centroids = views.centers.clone()

    def loss() -> Tensor:
        with torch.autocast(centroids.device.type, case.dtype, enabled=case.dtype in HALF):
            return published_step(*views[:2], centroids)

    return loss, centroids


@contender("sentence-transformers", "plain", package="sentence_transformers", square=True)
def _sentence_transformers(case: Case, views: Views):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(None, scale=1 / TAU)
    return lambda: loss.compute_loss_from_embeddings(list(views[:2]), None)


def _needs_linear_cross_entropy(case: Case) -> str:
    return "" if hasattr(nn, "LinearCrossEntropyOptions") else "not in this torch (needs 2.13)"


@contender("linear_cross_entropy", "plain", refuses=_needs_linear_cross_entropy)
def _linear_cross_entropy(case: Case, views: Views):
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=min(case.batch, 1024))
    labels = torch.arange(case.batch, device=views.anchors.device)

    def loss() -> Tensor:
        a, p = (F.normalize(z, dim=1) for z in views[:2])
        return F.linear_cross_entropy(a / TAU, p, labels, options=options)

    return loss


def _of_unit_rows(name: str, package: str, import_loss: Callable[[], Callable], **more: Any) -> None:
    """Enter a library's loss of anchors over τ, positives and the number of each one's positive."""

    @contender(name, "plain", package=package, refuses=lambda case: "" if CUDA else "needs a GPU", **more)
    def build(case: Case, views: Views):
        loss, labels = import_loss(), torch.arange(case.batch, device=views.anchors.device)
        return lambda: loss(F.normalize(views[0], dim=1) / TAU, F.normalize(views[1], dim=1), labels)


def _inf_cl() -> Callable:
    from inf_cl import cal_flash_loss

    return lambda a, p, labels: cal_flash_loss(a, p, labels).mean()


def _liger() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=FP32)
    return lambda a, p, labels: loss(p, a, labels)


def _cut_cross_entropy() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return partial(linear_cross_entropy, filter_eps=None)  # else it leaves small gradients out


def _quack() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _siglip() -> Callable:
    from siglip_kernel import fused_siglip_loss

    def loss(a: Tensor, p: Tensor, labels: Tensor) -> Tensor:  # temperature 10, bias −10, as it starts
        start = torch.tensor([math.log(10 * TAU), -10.0], device=a.device)
        return fused_siglip_loss(a, p, *start)

    return loss


_of_unit_rows("Inf-CL", "inf_cl", _inf_cl)
_of_unit_rows("Liger", "liger_kernel", _liger)
_of_unit_rows("cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy)
_of_unit_rows("QuACK", "quack", _quack)
_of_unit_rows("siglip-kernel", "siglip_kernel", _siglip, other_loss=True)
