"""Cases and contenders of the GPU benchmarks: whole steps, and plain InfoNCE against other libraries.

A contender is built for a case and its views, and is then a call without arguments that gives the loss.
Parity with the float64 reference is decided here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from baselines import (
    EagerStep,
    eager_info_nce,
    linear_cross_entropy_info_nce,
    published_step,
)
from contenders import SETTINGS
from torch import Tensor

import clusterns
from clusterns.options import WORKSPACE_BYTES

OURS = "clusterns"
TAU = SETTINGS.temperature
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One shape to measure: a whole training "step" with clustering active, or "plain" InfoNCE."""

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
            "K": self.clusters if self.kind == "step" else 0,
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


@dataclass
class Built:
    """A contender ready to run: the loss of the views, and the centroids that it moves, if it does."""

    loss: Callable[[], Tensor]
    views: Views
    centroids: Tensor | None = None
    upstream: Tensor | None = None

    @torch.no_grad()
    def reset(self) -> None:
        """Put the centroids back where every contender's started."""
        if self.centroids is not None:
            self.centroids.copy_(self.views.centers)

    def step(self) -> tuple[Tensor, ...]:
        """Loss and both gradients."""
        loss = self.loss()
        return loss.detach(), *self.gradients(loss)

    def gradients(self, loss: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        """Gradients of the views; with `keep` the loss can be differentiated again."""
        if self.upstream is None:  # made once, else the engine makes it in every backward
            self.upstream = torch.ones_like(loss)
        return torch.autograd.grad(loss, self.views[:2], self.upstream, retain_graph=keep)


@dataclass(frozen=True)
class Contender:
    """How to build a contender, and what it cannot do, in words."""

    name: str
    build: Callable[[Case, Views], Built]
    package: str = "torch"
    refuses: Callable[[Case], str] = field(default=lambda case: "")
    no_graph: str = ""
    no_backward_alone: str = ""
    own_graphs: bool = False  # it replays graphs itself, whose memory the allocator does not show

    def unavailable(self, case: Case) -> str:
        """Why it is left out of a case; empty if it takes part."""
        return self.refuses(case) if is_installed(self.package) else "not installed"


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return util.find_spec(package) is not None


# --- whole steps -------------------------------------------------------------------------------------------


def our_step(
    case: Case, views: Views, backend: str = "auto", workspace_bytes: int = WORKSPACE_BYTES
) -> Built:
    """`ClusterNSLoss` in training mode with clustering active."""
    loss = clusterns.ClusterNSLoss(
        case.dim,
        case.clusters,
        temperature=TAU,
        centroid_momentum=SETTINGS.centroid_momentum,
        bml_weight=SETTINGS.bml_weight,
        bml_alpha=SETTINGS.bml_alpha,
        bml_beta=SETTINGS.bml_beta,
        backend=backend,
        workspace_bytes=workspace_bytes,
    ).to(views.anchors.device)
    loss.centroids.copy_(views.centers)
    loss.initialized.fill_(True)
    loss.train()
    return Built(lambda: loss(views.anchors, views.positives), views, loss.centroids)


def eager_step(case: Case, views: Views) -> Built:
    """The best eager step."""
    step = EagerStep(views.centers, SETTINGS)
    return Built(lambda: step(views.anchors, views.positives), views, step.centroids)


def compiled_step(mode: str) -> Callable[[Case, Views], Built]:
    """The best eager step through `torch.compile`."""

    def build(case: Case, views: Views) -> Built:
        torch._dynamo.reset()  # a fresh compilation per shape: fixed sizes, and no recompile limit
        step = EagerStep(views.centers, SETTINGS)
        compiled = torch.compile(step, mode=mode, dynamic=False)
        return Built(lambda: compiled(views.anchors, views.positives), views, step.centroids)

    return build


def published(case: Case, views: Views) -> Built:
    """The published step; half precision under autocast, as it was trained."""
    centroids = views.centers.clone()

    def loss() -> Tensor:
        with autocast(case, views):
            return published_step(views.anchors, views.positives, centroids, SETTINGS)

    return Built(loss, views, centroids)


def autocast(case: Case, views: Views) -> contextlib.AbstractContextManager:
    """Autocast for half precision, nothing for float32."""
    if case.dtype not in HALF:
        return contextlib.nullcontext()
    return torch.autocast(views.anchors.device.type, case.dtype)


NO_BACKWARD = "a compiled backward gives its buffers away, so it runs once per forward"
STEP = [
    Contender(OURS, our_step),
    Contender("eager step", eager_step),
    Contender(
        "published step",
        published,
        refuses=lambda case: "its B×B×D tensors outgrow the GPU" if case.batch > 1024 else "",
        no_graph="reads the mean cosine to the host and builds its weights there",
    ),
    Contender("torch.compile", compiled_step("default"), no_backward_alone=NO_BACKWARD),
    Contender(
        "torch.compile reduce-overhead",
        compiled_step("reduce-overhead"),
        no_backward_alone=NO_BACKWARD,
        own_graphs=True,
    ),
    Contender("clusterns backend=torch", lambda case, views: our_step(case, views, "torch")),
]


# --- plain InfoNCE -----------------------------------------------------------------------------------------


def plain(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, Views], Built]:
    """Contender without state from a loss of raw views."""
    return lambda case, views: Built(lambda: loss(views.anchors, views.positives), views)


def on_unit_rows(make: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]):
    """Contender from a maker of a loss of (a/τ, p, labels), rows normalised."""

    def build(case: Case, views: Views) -> Built:
        loss = make()

        def run() -> Tensor:
            a, p = F.normalize(views.anchors, dim=1), F.normalize(views.positives, dim=1)
            return loss(a / TAU, p, torch.arange(len(a), device=a.device))

        return Built(run, views)

    return build


def compiled_plain(case: Case, views: Views) -> Built:
    """Eager InfoNCE through `torch.compile`."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, p: eager_info_nce(a, p, SETTINGS), dynamic=False)
    return Built(lambda: compiled(views.anchors, views.positives), views)


def torch_linear_cross_entropy(case: Case, views: Views) -> Built:
    """torch's chunked linear cross-entropy."""
    loss = linear_cross_entropy_info_nce(min(case.batch, 1024))
    return Built(lambda: loss(views.anchors, views.positives, SETTINGS), views)


def sentence_transformers(case: Case, views: Views) -> Built:
    """MultipleNegativesRankingLoss."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(None, scale=1 / TAU)
    return Built(lambda: loss.compute_loss_from_embeddings([views.anchors, views.positives], None), views)


def metric_learning(case: Case, views: Views) -> Built:
    """pytorch-metric-learning."""
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return plain(SelfSupervisedLoss(NTXentLoss(TAU), symmetric=False))(case, views)


def _cut_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda a, p, labels: linear_cross_entropy(a, p, labels, impl="cce")


def _liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda a, p, labels: loss(p, a, labels)


def _inf_cl() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from inf_cl import cal_flash_loss

    return lambda a, p, labels: cal_flash_loss(a, p, labels, scale=1.0, head_dim=256).mean()


def _gpu_only(case: Case) -> str:
    return "" if torch.cuda.is_available() else "needs a GPU"


PLAIN = [
    Contender(OURS, plain(lambda a, p: clusterns.info_nce(a, p, temperature=TAU))),
    Contender("eager", plain(lambda a, p: eager_info_nce(a, p, SETTINGS))),
    Contender("torch.compile", compiled_plain, no_backward_alone=NO_BACKWARD),
    Contender(
        "linear_cross_entropy",
        torch_linear_cross_entropy,
        refuses=lambda case: (
            "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "not in this torch (needs 2.13)"
        ),
    ),
    Contender("sentence-transformers", sentence_transformers, "sentence_transformers"),
    Contender(
        "pytorch-metric-learning",
        metric_learning,
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
]


def siglip(case: Case, views: Views) -> Built:
    """siglip-kernel: another loss, sigmoids over pairs, with the same three products."""
    from siglip_kernel import fused_siglip_loss

    log_scale = torch.tensor(1 / TAU, device=views.anchors.device).log()
    bias = torch.tensor(-10.0, device=views.anchors.device)

    def run() -> Tensor:
        a, p = F.normalize(views.anchors, dim=1), F.normalize(views.positives, dim=1)
        return fused_siglip_loss(a, p, log_scale, bias)

    return Built(run, views)


# Not InfoNCE: timed without parity, and named so.
OTHER_LOSS = [Contender("siglip-kernel (sigmoid loss)", siglip, "siglip_kernel", _gpu_only)]
CONTENDERS = {
    kind: {each.name: each for each in contenders}
    for kind, contenders in (("step", STEP), ("plain", PLAIN), ("other loss", OTHER_LOSS))
}
