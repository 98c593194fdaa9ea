"""Cases, and everything that is measured in them: ours, eager torch, published code, other libraries.

A contender is built for a case and its views, and is then a call without arguments. One list for the CPU and
the GPU. Only for benchmarks: none of the losses here is the product.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import Clock, Run, Timer
from report import OURS, short
from torch import Tensor, nn

import clusterns

WORKSPACE_BYTES: int = inspect.signature(clusterns.info_nce).parameters["workspace_bytes"].default
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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

    @property
    def is_loss(self) -> bool:
        """Whether there are gradients."""
        return self.kind in ("step", "objective", "plain")

    def columns(self) -> dict[str, object]:
        """The case as columns of a row."""
        return {
            "kind": self.kind,
            "B": self.batch,
            "D": self.dim,
            "K": 0 if self.kind == "plain" else self.clusters,
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
    """A contender ready to run in a case: of a loss the "forward", the "backward" or "both"."""

    def __init__(self, contender: Contender, case: Case, views: Any):
        made = contender.build(case, views)
        self.call, self.centroids = made if isinstance(made, tuple) else (made, None)
        self.contender, self.views, self.is_loss = contender, views, case.is_loss
        self.upstream: Tensor | None = None
        self._runs: dict[str, Run] = {}
        self._graphs: dict[str, Run | str] = {}

    def run(self, what: str = "both") -> Run:
        """A call without arguments, prepared once."""
        if what not in self._runs:
            self._runs[what] = self.make(what)
        return self._runs[what]

    def make(self, what: str) -> Run:
        """Prepare a run; for the backward that is a forward of its own."""
        if what == "forward" or not self.is_loss:
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

    def graph(self, what: str, clock: Clock) -> Run | str:
        """The captured run, or why there is none."""
        if what not in self._graphs:
            self._graphs[what] = self.contender.no_graph or self._capture(what, clock)
        return self._graphs[what]

    def _capture(self, what: str, clock: Clock) -> Run | str:
        try:
            return clock.capture(lambda: self.make(what))
        except Exception as error:  # a rival may do anything while it is captured
            with contextlib.suppress(RuntimeError):  # the broken capture reports itself once more
                clock.synchronize()
            return f"not captured: {short(error)}"

    def timer(self, what: str, view: str, clock: Clock) -> Timer | None:
        """A timer of a run as the "device" or the "host" sees it, or of its "graph" where there is one."""
        if view == "host":
            return clock.host_timer(self.run(what))
        if view == "device":
            return clock.timer(self.run(what))
        graph = self.graph(what, clock)
        return clock.timer(graph) if callable(graph) else None


@dataclass(frozen=True)
class Contender:
    """How to build a contender, and what it cannot do, in words.

    `build(case, views)` gives the call, of a loss that moves centroids the pair of call and centroids.
    """

    build: Callable[[Case, Any], Any]
    name: str
    package: str = "torch"
    gpu_only: bool = False
    refuses: Callable[[Case], str] = field(default=lambda case: "")
    no_graph: str = ""
    no_backward_alone: str = ""
    matrices: float = 0.0  # (B, B) in the dtype that are alive at once on a CPU, from peaks measured there

    def unavailable(self, case: Case) -> str:
        """Why it is left out of a case; empty if it takes part."""
        if util.find_spec(self.package) is None:
            return "not installed"
        return "needs a GPU" if self.gpu_only and not torch.cuda.is_available() else self.refuses(case)


KINDS: dict[str, dict[str, Contender]] = {}


def rivals(kind: str) -> list[str]:
    """Names of a kind's contenders but for ours with other settings."""
    return [name for name in KINDS[kind] if not name.startswith(f"{OURS} ")]


def contender(kind: str, name: str, **more: Any) -> Callable[[Callable], Callable]:
    """Enter the builder below in the list of a kind."""

    def enter(build: Callable) -> Callable:
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
    )
    loss.to(centers.device).centroids.copy_(centers)
    loss.initialized.fill_(True)
    return loss.train()


NO_BACKWARD = {"no_backward_alone": "a compiled backward gives its buffers away, so it runs once per forward"}
PUBLISHED: dict[str, Any] = {
    "no_graph": "reads the mean cosine to the host and builds its weights there",
    "refuses": lambda case: "its B×B×D tensors outgrow the device" if case.batch > 1024 else "",
}
OURS_WITH: dict[str, dict[str, Any]] = {
    OURS: {},
    "clusterns backend=torch": {"backend": "torch"},
    "clusterns backend=triton": {"backend": "triton"},
    "clusterns whole": {"workspace_bytes": 2**40},
    "clusterns in chunks": {"workspace_bytes": 2**20},
    "clusterns 2 GiB workspace": {"workspace_bytes": 2**31},
}


def _ours_with(name: str, more: dict[str, Any]) -> None:
    @contender("step", name)
    def step(case: Case, views: Views):
        loss = our_loss(case.dim, case.clusters, views.centers, **more)
        return (lambda: loss(*views[:2])), loss.centroids

    @contender("objective", name)
    def objective(case: Case, views: Views):
        a, p, c = *views[:2], views.centers.to(case.dtype)
        settings = {"temperature": TAU, "false_negatives": "bml", **MARGINS, **more}
        return lambda: clusterns.info_nce(a, p, centroids=c, **settings)

    @contender("plain", name)
    def plain(case: Case, views: Views):
        return lambda: clusterns.info_nce(*views[:2], temperature=TAU, **more)


for name, settings in OURS_WITH.items():
    _ours_with(name, settings)


@contender("step", "eager", matrices=7.5)
def eager_step(case: Case, views: Views):
    """The best eager step."""
    step = EagerStep(views.centers)
    return (lambda: step(*views[:2])), step.centroids


@contender("step", "published", **PUBLISHED)
def _published(case: Case, views: Views):
    """Half precision under autocast, as it was trained."""
    centroids = views.centers.clone()

    def loss() -> Tensor:
        with torch.autocast(centroids.device.type, case.dtype, enabled=case.dtype in HALF):
            return published_step(*views[:2], centroids)

    return loss, centroids


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile`, afresh for each shape: fixed sizes, and no recompile limit."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


@contender("step", "torch.compile", matrices=7.5, **NO_BACKWARD)
def _compiled_step(case: Case, views: Views):
    step = EagerStep(views.centers)
    run = compiled(step)
    return (lambda: run(*views[:2])), step.centroids


def formula(function: Callable[..., Tensor], of: str, wrap: Callable = lambda function: function) -> Callable:
    """Builder from a function of raw views and, for the "objective", centroids."""

    def build(case: Case, views: Views):
        run = wrap(function)
        given = views[:2] if of == "plain" else (*views[:2], views.centers.to(case.dtype))
        return lambda: run(*given)

    return build


contender("objective", "eager", matrices=7.5)(formula(eager_formula, "objective"))
contender("objective", "published", **PUBLISHED)(formula(published_formulation, "objective"))
contender("objective", "torch.compile", matrices=7.5, **NO_BACKWARD)(
    formula(eager_formula, "objective", compiled)
)


# --- plain InfoNCE -----------------------------------------------------------------------------------------


contender("plain", "eager", matrices=3)(formula(eager_info_nce, "plain"))
contender("plain", "torch.compile", matrices=3, **NO_BACKWARD)(formula(eager_info_nce, "plain", compiled))


@contender("plain", "sentence-transformers", package="sentence_transformers", matrices=3)
def _sentence_transformers(case: Case, views: Views):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(None, scale=1 / TAU)
    return lambda: loss.compute_loss_from_embeddings(list(views[:2]), None)


def on_unit_rows(name: str, **more: Any) -> Callable[[Callable], Callable]:
    """Enter what the function below gives for a case: a plain loss of (a/τ, p, labels), rows normalised."""

    def enter(build: Callable[[Case], Callable[..., Tensor]]) -> Callable:
        @contender("plain", name, **more)
        def plain(case: Case, views: Views):
            loss, labels = build(case), torch.arange(case.batch, device=views.anchors.device)

            def run() -> Tensor:
                a, p = (F.normalize(z, dim=1) for z in views[:2])
                return loss(a / TAU, p, labels)

            return run

        return build

    return enter


@on_unit_rows(
    "linear_cross_entropy",
    refuses=lambda case: (
        "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "not in this torch (needs 2.13)"
    ),
    no_backward_alone="its chunked backward runs once per forward",
)
def _linear_cross_entropy(case: Case):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(case.batch, 1024))
    return partial(F.linear_cross_entropy, options=options)


@on_unit_rows(
    "Liger",
    package="liger_kernel",
    gpu_only=True,
    no_graph="reads counts to the host",
    no_backward_alone="its forward computes the gradients, and its backward overwrites them",
)
def _liger(case: Case):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda a, p, labels: loss(p, a, labels)


@on_unit_rows(
    "cut-cross-entropy",
    package="cut_cross_entropy",
    gpu_only=True,
    refuses=lambda case: "" if case.dtype in HALF else "takes half precision",
    no_graph="finds valid targets by nonzero, which waits for the device",
)
def _cut_cross_entropy(case: Case):
    from cut_cross_entropy import linear_cross_entropy

    return partial(linear_cross_entropy, impl="cce")


@on_unit_rows(
    "Inf-CL",
    package="inf_cl",
    gpu_only=True,
    refuses=lambda case: "D is no multiple of 256" if case.dim % 256 else "",
)
def _inf_cl(case: Case):
    from inf_cl import cal_flash_loss

    return lambda a, p, labels: cal_flash_loss(a, p, labels, scale=1.0, head_dim=256).mean()


# --- assignment --------------------------------------------------------------------------------------------


@contender("assign", OURS)
def _our_assignment(case: Case, views: Views):
    points, centers = views.anchors.detach(), views.centers.to(case.dtype)
    return lambda: clusterns.nearest_centroids(points, centers).nearest


@contender("assign", "torch in chunks")
def _assignment_by_torch(case: Case, views: Views):
    points, centers = views.anchors.detach(), views.centers.to(case.dtype)

    def ids() -> Tensor:
        unit = F.normalize(centers, dim=1).T
        return torch.cat([(chunk @ unit).argmax(dim=1) for chunk in points.split(65536)])

    return ids


@contender("assign", "flash-kmeans", package="flash_kmeans", gpu_only=True)
def _flash_kmeans(case: Case, views: Views):
    """Its Euclidean assignment on unit rows, made beforehand: their nearest is the nearest by cosine."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    centers = views.centers.to(case.dtype)
    x, c = (F.normalize(z, dim=1)[None] for z in (views.anchors.detach(), centers))
    more = {}
    if "x_sq" in inspect.signature(euclid_assign_triton).parameters:
        more["x_sq"] = x.float().square().sum(dim=2)
    return lambda: euclid_assign_triton(x, c, **more)
