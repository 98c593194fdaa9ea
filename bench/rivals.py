"""Cases, and everything that is measured in them: ours, eager torch, published code, other libraries.

A contender is built for a case and its views, and is then a call without arguments. One list for the CPU and
the GPU. Only for benchmarks: none of the losses here is the product.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clusterns

OURS = "clusterns"
WORKSPACE_BYTES: int = inspect.signature(clusterns.info_nce).parameters["workspace_bytes"].default
HALF = (torch.bfloat16, torch.float16)

# Numbers of the objective: the published RoBERTa-base row.
TAU, HARD_NEGATIVE_WEIGHT, MOMENTUM = 0.05, 0.0, 1e-3
MARGINS: dict[str, Any] = {"bml_weight": 1e-4, "bml_alpha": 0.2, "bml_beta": 0.5}


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    A whole training "step" with clustering active, the "objective" for given centroids, "plain" InfoNCE,
    "assign"-ment of points, or what corpus.py adds.
    """

    kind: str
    batch: int
    dim: int = 768
    clusters: int = 128
    dtype: torch.dtype = torch.bfloat16
    precision: str = "highest"  # of float32 matrix products; half precision does not depend on it

    def columns(self) -> dict[str, object]:
        """The case as columns of a row."""
        return {
            "kind": self.kind,
            "B": self.batch,
            "D": self.dim,
            "K": 0 if self.kind in ("plain", "other loss") else self.clusters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "precision": self.precision,
        }

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.columns().items())


class Views(NamedTuple):
    """Anchors and positives (B, D), both wanting gradients, and centers (K, D) float32."""

    anchors: Tensor
    positives: Tensor
    centers: Tensor


def make_views(case: Case, device: torch.device) -> Views:
    """Views of sentences that lie near one center and half as near to another one.

    So no two centroids are equally near, and whoever rounds picks the same hard negative: what parity shows
    is arithmetic, not the luck of a tie.
    """
    made: dict = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    batch, dim, clusters = case.batch, case.dim, case.clusters
    centers = 0.8 * torch.randn(clusters, dim, **made)
    first = torch.randint(clusters, (batch,), **made)
    second = (first + torch.randint(1, clusters, (batch,), **made)) % clusters
    anchors = centers[first] + 0.5 * centers[second] + torch.randn(batch, dim, **made)
    positives = anchors + 3 * torch.randn(batch, dim, **made)
    leaves = (z.to(case.dtype).requires_grad_() for z in (anchors, positives))
    return Views(*leaves, centers)


class Built:
    """A contender ready to run."""

    def __init__(self, call: Callable[[], Any]):
        self.call = call

    def make(self, what: str) -> Callable[[], Any]:
        """What is timed; here "both" alone: there is no backward."""
        return self.call

    def reset(self) -> None:
        """Put back what a call has moved."""


class BuiltLoss(Built):
    """A loss of views: `call` gives it, and moves `centroids`, if it has any."""

    def __init__(self, call: Callable[[], Tensor], views: Views, centroids: Tensor | None = None):
        super().__init__(call)
        self.views, self.centroids = views, centroids
        self.upstream: Tensor | None = None

    def make(self, what: str) -> Callable[[], Any]:
        """The "forward", the "backward" (with a forward of its own, before), or "both"."""
        if what == "forward":
            return self.call
        if what == "both":
            return self.step
        loss = self.call()
        return lambda: self.gradients(loss, keep=True)

    def step(self) -> tuple[Tensor, ...]:
        """Loss and both gradients."""
        loss = self.call()
        return loss.detach(), *self.gradients(loss)

    def gradients(self, loss: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        """Gradients of the views; with `keep` the loss can be differentiated again."""
        if self.upstream is None:  # made once, else the engine makes it in every backward
            self.upstream = torch.ones_like(loss)
        return torch.autograd.grad(loss, self.views[:2], self.upstream, retain_graph=keep)

    @torch.no_grad()
    def reset(self) -> None:
        """Put the centroids back where every contender's started."""
        if self.centroids is not None:
            self.centroids.copy_(self.views.centers)


@dataclass(frozen=True)
class Contender:
    """How to build a contender, and what it cannot do, in words."""

    name: str
    build: Callable[[Case, Any], Built]
    package: str = "torch"
    refuses: Callable[[Case], str] = field(default=lambda case: "")
    no_graph: str = ""
    no_backward_alone: str = ""
    own_graphs: bool = False  # it replays graphs itself, whose memory the allocator does not show
    matrices: float = 0.0  # (B, B) in the dtype that are alive at once on a CPU, from peaks measured there

    def unavailable(self, case: Case) -> str:
        """Why it is left out of a case; empty if it takes part."""
        return self.refuses(case) if util.find_spec(self.package) else "not installed"


def by_name(*contenders: Contender) -> dict[str, Contender]:
    """A kind's contenders."""
    return {each.name: each for each in contenders}


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


def unit_formula(
    a: Tensor,
    p: Tensor,
    c: Tensor,
    found: tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE and margin loss of unit rows in the best plain torch we know: the B×K block with log-counts.

    `found` are nearest and runner-up (B,), else found here. Half precision: the logits widen to float32.
    """
    cosines, to_centroids = a @ p.T, a @ c.T
    nearest, runner_up = found or to_centroids.detach().topk(2, dim=1).indices.unbind(1)
    ones = torch.ones(len(a), device=a.device)
    log_counts = torch.zeros(len(c), device=a.device).index_add_(0, runner_up, ones).log()
    explicit = [] if negatives is None else [a @ negatives.T / TAU]
    logits = torch.cat([cosines / TAU, *explicit, to_centroids / TAU + log_counts], dim=1)
    info_nce = F.cross_entropy(logits, torch.arange(len(a), device=a.device))
    del logits, explicit
    mates = nearest[:, None] == nearest[None, :]  # a sentence as its own mate is neutral
    return info_nce, margin_loss(cosines, mates)


def eager_formula(anchors: Tensor, positives: Tensor, centroids: Tensor) -> Tensor:
    """The objective: normalise, then `unit_formula`, by autograd."""
    unit = (F.normalize(z, dim=1) for z in (anchors, positives, centroids))
    info_nce, margins = unit_formula(*unit)
    return info_nce + MARGINS["bml_weight"] * margins


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


# --- whole steps, and the objective for given centroids -----------------------------------------------------


def our_loss(dim: int, clusters: int, centers: Tensor, **more: Any) -> clusterns.ClusterNSLoss:
    """`ClusterNSLoss` in training mode with clustering active."""
    loss = clusterns.ClusterNSLoss(
        dim, clusters, temperature=TAU, centroid_momentum=MOMENTUM, **MARGINS, **more
    ).to(centers.device)
    loss.centroids.copy_(centers)
    loss.initialized.fill_(True)
    return loss.train()


def our_step(**more: Any) -> Callable[[Case, Views], Built]:
    """Our module."""

    def build(case: Case, views: Views) -> Built:
        loss = our_loss(case.dim, case.clusters, views.centers, **more)
        return BuiltLoss(lambda: loss(*views[:2]), views, loss.centroids)

    return build


def eager_step(case: Case, views: Views) -> Built:
    """The best eager step."""
    step = EagerStep(views.centers)
    return BuiltLoss(lambda: step(*views[:2]), views, step.centroids)


def compiled_step(mode: str) -> Callable[[Case, Views], Built]:
    """The best eager step through `torch.compile`."""

    def build(case: Case, views: Views) -> Built:
        torch._dynamo.reset()  # a fresh compilation per shape: fixed sizes, and no recompile limit
        step = EagerStep(views.centers)
        compiled = torch.compile(step, mode=mode, dynamic=False)
        return BuiltLoss(lambda: compiled(*views[:2]), views, step.centroids)

    return build


def published(case: Case, views: Views) -> Built:
    """The published step; half precision under autocast, as it was trained."""
    centroids = views.centers.clone()
    half = torch.autocast(views.anchors.device.type, case.dtype) if case.dtype in HALF else None

    def loss() -> Tensor:
        with half or contextlib.nullcontext():
            return published_step(*views[:2], centroids)

    return BuiltLoss(loss, views, centroids)


def of_centroids(loss: Callable[..., Tensor]) -> Callable[[Case, Views], Built]:
    """Contender from a loss of raw views and centroids."""
    return lambda case, views: BuiltLoss(lambda: loss(*views[:2], views.centers.to(case.dtype)), views)


def compiled(loss: Callable[..., Tensor], given: int) -> Callable[[Case, Views], Built]:
    """Contender from a loss of raw views through `torch.compile`."""

    def build(case: Case, views: Views) -> Built:
        torch._dynamo.reset()
        made = torch.compile(loss, dynamic=False)
        return BuiltLoss(lambda: made(*views[:given]), views)

    return build


def our_objective(anchors: Tensor, positives: Tensor, centroids: Tensor, **more: Any) -> Tensor:
    """`info_nce` with all there is."""
    return clusterns.info_nce(
        anchors, positives, temperature=TAU, centroids=centroids, false_negatives="bml", **MARGINS, **more
    )


def _outgrows(case: Case) -> str:
    return "its B×B×D tensors outgrow the device" if case.batch > 1024 else ""


NO_BACKWARD = "a compiled backward gives its buffers away, so it runs once per forward"
HOST_SYNC = "reads the mean cosine to the host and builds its weights there"
STEP = by_name(
    Contender(OURS, our_step()),
    Contender("eager", eager_step, matrices=7.5),
    Contender("published", published, refuses=_outgrows, no_graph=HOST_SYNC),
    Contender("torch.compile", compiled_step("default"), no_backward_alone=NO_BACKWARD, matrices=7.5),
    Contender(
        "torch.compile reduce-overhead",
        compiled_step("reduce-overhead"),
        no_backward_alone=NO_BACKWARD,
        own_graphs=True,
        matrices=7.5,
    ),
    Contender("clusterns backend=torch", our_step(backend="torch")),
    Contender("clusterns backend=triton", our_step(backend="triton")),
    Contender("clusterns whole", our_step(workspace_bytes=2**40)),
    Contender("clusterns in chunks", our_step(workspace_bytes=2**20)),
    Contender("clusterns 2 GiB workspace", our_step(workspace_bytes=2**31)),
)
OBJECTIVE = by_name(
    Contender(OURS, of_centroids(our_objective)),
    Contender("eager", of_centroids(eager_formula), matrices=7.5),
    Contender("published", of_centroids(published_formulation), refuses=_outgrows, no_graph=HOST_SYNC),
    Contender("torch.compile", compiled(eager_formula, 3), no_backward_alone=NO_BACKWARD, matrices=7.5),
)


# --- plain InfoNCE -----------------------------------------------------------------------------------------


def plain(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, Views], Built]:
    """Contender without state from a loss of raw views."""
    return lambda case, views: BuiltLoss(lambda: loss(*views[:2]), views)


def on_unit_rows(make: Callable[[Case], Callable[[Tensor, Tensor, Tensor], Tensor]]):
    """Contender from a maker of a loss of (a/τ, p, labels), rows normalised."""

    def build(case: Case, views: Views) -> Built:
        loss = make(case)

        def run() -> Tensor:
            a, p = (F.normalize(z, dim=1) for z in views[:2])
            return loss(a / TAU, p, torch.arange(len(a), device=a.device))

        return BuiltLoss(run, views)

    return build


def _linear_cross_entropy(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(case.batch, 1024))
    return lambda a, p, labels: F.linear_cross_entropy(a, p, labels, options=options)


def _sentence_transformers(case: Case, views: Views) -> Built:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(None, scale=1 / TAU)
    return BuiltLoss(lambda: loss.compute_loss_from_embeddings(list(views[:2]), None), views)


def _metric_learning(case: Case, views: Views) -> Built:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return plain(SelfSupervisedLoss(NTXentLoss(TAU), symmetric=False))(case, views)


def _cut_cross_entropy(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda a, p, labels: linear_cross_entropy(a, p, labels, impl="cce")


def _liger(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda a, p, labels: loss(p, a, labels)


def _inf_cl(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from inf_cl import cal_flash_loss

    return lambda a, p, labels: cal_flash_loss(a, p, labels, scale=1.0, head_dim=256).mean()


def _siglip(case: Case, views: Views) -> Built:
    from siglip_kernel import fused_siglip_loss

    log_scale = torch.tensor(1 / TAU, device=views.anchors.device).log()
    bias = torch.tensor(-10.0, device=views.anchors.device)
    return plain(
        lambda a, p: fused_siglip_loss(F.normalize(a, dim=1), F.normalize(p, dim=1), log_scale, bias)
    )(case, views)


def _gpu_only(case: Case) -> str:
    return "" if torch.cuda.is_available() else "needs a GPU"


PLAIN = by_name(
    Contender(OURS, plain(lambda a, p: clusterns.info_nce(a, p, temperature=TAU))),
    Contender("eager", plain(eager_info_nce), matrices=3),
    Contender("torch.compile", compiled(eager_info_nce, 2), no_backward_alone=NO_BACKWARD, matrices=3),
    Contender(
        "linear_cross_entropy",
        on_unit_rows(_linear_cross_entropy),
        refuses=lambda case: (
            "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "not in this torch (needs 2.13)"
        ),
    ),
    Contender("sentence-transformers", _sentence_transformers, "sentence_transformers", matrices=3),
    Contender(
        "pytorch-metric-learning",
        _metric_learning,
        "pytorch_metric_learning",
        lambda case: "its memory grows with B³" if case.batch > 512 else "",
        no_graph="finds pairs by nonzero, which waits for the device",
    ),
    Contender(
        "Liger",
        on_unit_rows(_liger),
        "liger_kernel",
        _gpu_only,
        no_graph="reads counts to the host",
        no_backward_alone="its forward computes the gradients, and its backward overwrites them",
    ),
    Contender(
        "cut-cross-entropy",
        on_unit_rows(_cut_cross_entropy),
        "cut_cross_entropy",
        lambda case: _gpu_only(case) or ("" if case.dtype in HALF else "takes half precision"),
        no_graph="finds valid targets by nonzero, which waits for the device",
    ),
    Contender(
        "Inf-CL",
        on_unit_rows(_inf_cl),
        "inf_cl",
        lambda case: _gpu_only(case) or ("D is no multiple of 256" if case.dim % 256 else ""),
    ),
)
# Not InfoNCE, but sigmoids over pairs with the same three products: timed without parity, and named so.
OTHER_LOSS = by_name(Contender("siglip-kernel (sigmoid loss)", _siglip, "siglip_kernel", _gpu_only))


# --- assignment --------------------------------------------------------------------------------------------


def _our_assignment(case: Case, views: Views) -> Built:
    points, centers = views.anchors.detach(), views.centers.to(case.dtype)
    return Built(lambda: clusterns.nearest_centroids(points, centers).nearest)


def _assignment_by_torch(case: Case, views: Views) -> Built:
    points, centers = views.anchors.detach(), views.centers.to(case.dtype)

    def ids() -> Tensor:
        unit = F.normalize(centers, dim=1).T
        return torch.cat([(chunk @ unit).argmax(dim=1) for chunk in points.split(65536)])

    return Built(ids)


def _flash_kmeans(case: Case, views: Views) -> Built:
    """Its Euclidean assignment on unit rows, made beforehand: their nearest is the nearest by cosine."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    centers = views.centers.to(case.dtype)
    x, c = (F.normalize(z, dim=1)[None] for z in (views.anchors.detach(), centers))
    more = {}
    if "x_sq" in inspect.signature(euclid_assign_triton).parameters:
        more["x_sq"] = x.float().square().sum(dim=2)
    return Built(lambda: euclid_assign_triton(x, c, **more))


ASSIGN = by_name(
    Contender(OURS, _our_assignment),
    Contender("torch in chunks", _assignment_by_torch),
    Contender("flash-kmeans", _flash_kmeans, "flash_kmeans", _gpu_only),
)
KINDS = {
    "step": STEP, "objective": OBJECTIVE, "plain": PLAIN, "other loss": OTHER_LOSS, "assign": ASSIGN,
}  # fmt: skip
