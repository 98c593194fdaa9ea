"""Clustering state: an online spherical k-means over the batches (method steps 1 to 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count, check_number
from .functional import assign, seed_centroids
from .objective import operators
from .objective.norms import inverse_norms, without_autocast
from .objective.problem import Clusters, Update
from .objective.ranks import Alone

CENTROID_UPDATES = ("sum", "mean", "replace", "adamw")

# The authors' AdamW: transformers' defaults of the time, no weight decay.
_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPSILON = 1e-6


class OnlineKMeans(nn.Module):
    """K centroids that follow the batches, kept in buffers.

    Buffers: `centroids` (K, D), float32 whatever autocast or `.half()` do (float64 once float64 embeddings
    came), raw, not normalised; `initialized`, 0-d bool; for "adamw" also the moments and the step count.

    Args:
        embedding_dim: D ≥ 1.
        num_clusters: K ≥ 0; 0 never clusters.
        centroid_momentum: γ in (0, 1], the share of the batch in an update; for "adamw" the learning rate.
        centroid_update: what a cluster contributes: the "sum" (authors' code) or the "mean" (paper, Eq. 7)
            of its raw members; "replace" puts the sum in the place of the centroid; "adamw" takes a step on
            the mean squared error between each sentence and its centroid.

    """

    centroids: Tensor
    initialized: Tensor
    first_moment: Tensor
    second_moment: Tensor
    update_steps: Tensor

    def __init__(
        self,
        embedding_dim: int,
        num_clusters: int,
        *,
        centroid_momentum: float = 1e-3,
        centroid_update: str = "sum",
    ):
        super().__init__()
        check_count("embedding_dim", embedding_dim, at_least=1)
        check_count("num_clusters", num_clusters, at_least=0)
        check_number("centroid_momentum", centroid_momentum, above=0, at_most=1)
        check_choice("centroid_update", centroid_update, CENTROID_UPDATES)
        self.embedding_dim = embedding_dim
        self.num_clusters = num_clusters
        self.centroid_momentum = centroid_momentum
        self.centroid_update = centroid_update
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # never half precision
        self.register_buffer("centroids", torch.zeros(num_clusters, embedding_dim, dtype=dtype))
        self.register_buffer("initialized", torch.tensor(False))
        if centroid_update == "adamw":
            self.register_buffer("first_moment", torch.zeros_like(self.centroids))
            self.register_buffer("second_moment", torch.zeros_like(self.centroids))
            self.register_buffer("update_steps", torch.zeros((), dtype=dtype))
        self._flag_read: tuple[Tensor, int] | None = None
        self._active = False

    @property
    def clustering_active(self) -> bool:
        """Whether the centroids are in use. Reads the device only after `initialized` was written.

        Under `torch.compile` it is what seeding, loading or the last eager call has left.
        """
        if not torch.compiler.is_compiling() and not self._flag_is_known():
            self._read_flag()
        return self._active

    def _read_flag(self) -> None:
        self._active = bool(self.initialized)
        self._flag_read = (self.initialized, self.initialized._version)

    def _flag_is_known(self) -> bool:
        """Whether `_active` still mirrors the buffer: same tensor, not written since."""
        if self._flag_read is None:
            return False
        flag, version = self._flag_read
        return flag is self.initialized and version == flag._version

    @torch.no_grad()
    def seed(
        self,
        anchors: Tensor,
        positives: Tensor,
        *,
        first: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Take K sentences of the batch as centroids (`seed_centroids`); returns their indices (K,)."""
        centroids, indices = seed_centroids(
            anchors, positives, self.num_clusters, first=first, generator=generator
        )
        self.start_from(centroids)
        return indices

    @torch.no_grad()
    def start_from(self, centroids: Tensor) -> None:
        """Begin clustering with these centroids (K, D)."""
        self._follow_precision(centroids)
        self.centroids.copy_(centroids)
        self.initialized.fill_(True)
        self._active, self._flag_read = True, (self.initialized, self.initialized._version)

    def assign(
        self, points: Tensor, *, update: bool, ranks: Alone | None = None, backend: str = "torch"
    ) -> Clusters:
        """Clusters of points (B, D), by their nearest and runner-up centroid, after an update if wanted.

        The update assigns the points to the old centroids and moves those (method steps 3 and 4). It leaves
        out rows without a direction: zero rows and those with a non-finite value, as mixed precision makes.
        With `ranks`, points are this rank's share and the update is by those of all ranks. On "triton" both
        are left to the kernels of the objective, which compute the cosines anyway, and only told them here.
        """
        self._follow_precision(points)
        on_triton = backend.startswith("triton")
        if backend == "triton" and not (update and self.centroid_update == "adamw"):
            statistic = "mean" if self.centroid_update == "mean" else "sum"
            moves = Update(statistic, self._share) if update else None
            return Clusters(centroids=self.centroids, update=moves)
        with torch.no_grad():
            if update:
                if on_triton:
                    count, total = operators.cluster_sums(points, self.centroids)
                else:
                    count, total = self._sums(points)
                if ranks is not None:
                    count, total = ranks.sum(count), ranks.sum(total)
                self._move(count, total)
            if backend == "triton":
                return Clusters(centroids=self.centroids)
            return assign(points, self.centroids, self.centroids.dtype, backend)

    def _sums(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Members (K,) of each cluster and their sum (K, D), over the points with a direction."""
        points = points.detach().to(self.centroids.dtype)
        nearest = assign(points, self.centroids, points.dtype, "torch").ids
        assert nearest is not None
        valid = inverse_norms(points) > 0  # false for NaN, and 0 is the inverse of an infinite norm
        return cluster_sums(points.masked_fill(~valid[:, None], 0.0), nearest, valid, self.num_clusters)

    @property
    def _share(self) -> float:
        return 1.0 if self.centroid_update == "replace" else self.centroid_momentum

    def _move(self, count: Tensor, total: Tensor) -> None:
        """Move the centroids towards clusters of `count` (K,) members that add up to `total` (K, D)."""
        if self.centroid_update == "adamw":
            moved = self._adamw_step(count, total)
        else:
            count = count[:, None]
            stat = total / count.clamp_min(1) if self.centroid_update == "mean" else total
            moved = torch.where(count > 0, torch.lerp(self.centroids, stat, self._share), self.centroids)
        self.centroids.copy_(moved)

    def _adamw_step(self, count: Tensor, total: Tensor) -> Tensor:
        """One AdamW step on mean((C_near(i) − z_i)²) over B·D entries; returns the moved centroids."""
        beta1, beta2 = _ADAM_BETAS
        entries = count.sum().clamp_min(1) * self.embedding_dim
        gradient = 2 / entries * (count[:, None] * self.centroids - total)
        self.update_steps += 1
        self.first_moment.lerp_(gradient, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size = (
            self.centroid_momentum * (1 - beta2**self.update_steps).sqrt() / (1 - beta1**self.update_steps)
        )
        return self.centroids - step_size * self.first_moment / (self.second_moment.sqrt() + _ADAM_EPSILON)

    def _follow_precision(self, points: Tensor) -> None:
        """Widen the state to float64 when the embeddings are float64."""
        if points.dtype == torch.float64 and self.centroids.dtype != torch.float64:
            self._set_precision(torch.float64)

    def _set_precision(self, dtype: torch.dtype) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(self, name, buffer.to(dtype))

    def _apply(self, fn, recurse=True):
        # .half(), .bfloat16() or .to(dtype) on a whole model must not round the centroids: at γ = 1e-4 the
        # decay would vanish. Their device follows, their precision stays.
        before = dict(self.named_buffers(recurse=False))
        known = self._flag_is_known()
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.is_floating_point() and after.dtype.itemsize < 4:
                setattr(self, name, buffer.to(after.device))
        if known:
            self._flag_read = (self.initialized, self.initialized._version)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *arguments, **keywords):
        saved = state_dict.get(prefix + "centroids")
        if saved is not None and saved.dtype == torch.float64:
            self._set_precision(torch.float64)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)
        if self.centroids.dtype.itemsize < 4:  # loaded with assign=True
            self._set_precision(torch.float32)
        if not self.initialized.is_meta:
            self._read_flag()


def cluster_sums(points: Tensor, nearest: Tensor, valid: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Members (K,) of each cluster and their sum (K, D), over the valid points.

    A product with the membership matrix: unlike atomic additions it gives the same bits every time.
    """
    members = points.new_zeros((len(points), num_clusters))
    members.scatter_(1, nearest[:, None], valid[:, None].to(points.dtype))
    with without_autocast(points.device):
        return members.sum(dim=0), members.T @ points
