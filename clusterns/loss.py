"""`ClusterNSLoss`: the whole objective as a module to drop into a training loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .backend import check_backend, choose_backend
from .captured import Captured
from .centroids import OnlineKMeans
from .checks import (
    check_choice,
    check_embeddings,
    check_like,
    check_number,
    check_temperature,
    check_transforms,
    in_short,
    under_functorch,
    warn,
)
from .functional import check_options, evaluate, info_nce
from .objective.operators import shares
from .objective.problem import Batch, Clusters, Options
from .objective.ranks import GATHERS, Ranks, meet, seeding_chain
from .rules import Rule, check_has_clusters

_NOT_STARTED = (
    "fullgraph: expected clustering_active, or eval mode, for a whole graph, as until then each step reads "
    "the mean cosine; run the steps up to the start without fullgraph=True, and with it from then on"
)
_FOR_MODELS = "the loss that takes a model, for its Trainer, is clusterns.sentence_transformers.ClusterNSLoss"


class ClusterNSLoss(OnlineKMeans):
    """Clustering-aware InfoNCE (Deng et al., Findings of ACL 2023).

    Until the first step on which the mean cosine over all pairs of the batch is at most `start_cosine`, the
    loss is plain InfoNCE; on that step the centroids are seeded from the batch, and from the next step on
    they move with every batch, give every sentence its runner-up centroid as hard negative, and mark
    sentences of one cluster as false negatives of each other.

    In `eval()` mode the clustering state is used but not changed. After clustering has started a step does
    not wait for the device; the first in training mode does, to see whether the two views differ.

    What makes training pointless is a UserWarning, once each: views that are the same, a batch of one without
    negatives, a batch too small to seed from, a temperature that looks like a scale or will not be trained,
    ranks that do not share their batch.

    Args:
        embedding_dim: D.
        num_clusters: K; 0 is plain InfoNCE, that is SimCSE.
        temperature: τ > 0: a number, or an `nn.Parameter` to learn it.
        start_cosine: σ.
        centroid_momentum: γ, see `OnlineKMeans`; the published values (1e-3 … 1e-4) belong to "sum".
        centroid_update: "sum", "mean", "replace" or "adamw", see `OnlineKMeans`.
        hard_negatives: use the runner-up centroids as hard negatives (K = 1 has none).
        hard_negative_weight: w, added to the logit of a sentence's own hard negative.
        false_negatives: "bml" (margin loss), "exclude" (out of the denominator) or "keep"; or a rule, a
            function that says which pairs are false negatives and what becomes of them (`clusterns.rules`).
        bml_weight, bml_alpha, bml_beta: λ, α, β of the margin loss.
        directions: "one" has anchors look for positives; "both" is the mean of that and of positives looking
            for anchors, see `info_nce`. The margin loss stays that of the anchors, as in the paper.
        dimension_weight, dimension_temperature: weight ≥ 0 and temperature of a second InfoNCE, over the D
            dimensions: what each says of the B sentences in one view, against what each says in the other,
            which keeps them apart. After SimCSE++ (Xu et al., EMNLP 2023), by cosine. Not with a process
            group.
        backend: "auto" (Triton on a GPU, torch elsewhere), "triton", "torch" or "reference".
        workspace_bytes: memory for logits and their temporaries, whatever the batch size; if None 256 MiB, on
            a GPU 896 MiB or less where that is over a quarter of what is free.
        process_group: ranks of `torch.distributed` that share one batch. The loss is then that of the
            concatenated batch, and the gradient is such that DistributedDataParallel, which averages over
            the ranks, gives that of a single process. Each rank computes its own rows; they may differ in
            number. Clustering state stays the same, bit for bit, on all ranks.
        gather: with a process group, "all" brings all positives to every rank; "ring" passes them around, so
            that no rank ever holds them all, for a third more operations in one direction. See
            `clusterns.objective.ranks`.

    Attributes:
        centroids, initialized: buffers, see `OnlineKMeans`.
        last: detached terms of the last call, 0-d tensors on the device: `loss`, `info_nce`, `bml`,
            `mean_cosine` (all B² pairs), `positive_cosine`; with a dimension weight `dimensions`; with
            clustering active also `nearest_cosine`,
            `hard_negative_cosine` and `with_mates` (share of sentences that have a cluster-mate).

    """

    # What a warning tells to do where several ranks train and each sees its own rows only.
    lone_ranks_cure: str = "process_group=torch.distributed.group.WORLD"

    def __init__(
        self,
        embedding_dim: int,
        num_clusters: int = 128,
        *,
        temperature: float | Tensor = 0.05,
        start_cosine: float = 0.4,
        centroid_momentum: float = 1e-3,
        centroid_update: str = "sum",
        hard_negatives: bool = True,
        hard_negative_weight: float = 0.0,
        false_negatives: str | Rule = "bml",
        bml_weight: float = 1e-4,
        bml_alpha: float = 0.2,
        bml_beta: float = 0.5,
        directions: str = "one",
        dimension_weight: float = 0.0,
        dimension_temperature: float = 0.5,
        backend: str = "auto",
        process_group: torch.distributed.ProcessGroup | None = None,
        gather: str = "all",
        workspace_bytes: int | None = None,
    ):
        if isinstance(embedding_dim, nn.Module):
            kind = type(embedding_dim).__name__
            raise TypeError(f"embedding_dim: expected an integer, got the model {kind}; {_FOR_MODELS}")
        super().__init__(
            embedding_dim,
            num_clusters,
            centroid_momentum=centroid_momentum,
            centroid_update=centroid_update,
        )
        check_temperature(temperature)
        check_number("start_cosine", start_cosine, at_least=-1, at_most=1)
        check_backend(backend)
        check_choice("gather", gather, GATHERS)
        check_number("dimension_weight", dimension_weight, at_least=0)
        check_number("dimension_temperature", dimension_temperature, above=0)
        if process_group is not None and backend == "reference":
            raise ValueError(
                "backend: expected 'auto', 'triton' or 'torch' with a process_group, got 'reference'"
            )
        if hard_negatives and num_clusters == 1:
            raise ValueError(
                "num_clusters: expected 0, or at least 2 with hard_negatives=True (a runner-up), got 1"
            )
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.start_cosine = start_cosine
        self.hard_negatives = hard_negatives and num_clusters > 0
        self.hard_negative_weight = hard_negative_weight
        self.false_negatives = false_negatives
        self.bml_weight = bml_weight
        self.bml_alpha = bml_alpha
        self.bml_beta = bml_beta
        self.directions = directions
        self.dimension_weight = dimension_weight
        self.dimension_temperature = dimension_temperature
        self.backend = backend
        self.process_group = process_group
        self.gather = gather
        self.workspace_bytes = workspace_bytes
        check_options(self._options)
        check_has_clusters(false_negatives, num_clusters > 0)
        self.last: dict[str, Tensor] = {}
        self._begun = False
        self._told: set[str] = set()
        self._captured: Captured | None = None
        self._look_at_temperature()

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of one batch, 0-d float32 (float64 for float64 embeddings); see the class.

        Args:
            anchors: (B, D) embeddings of the first views, raw.
            positives: (B, D) embeddings of the second views.
            negatives: (N, D) mined hard negatives of the user, seen by every anchor beside the centroids.

        Raises:
            TypeError, ValueError: one line that names the argument, what was expected and what came.
            RuntimeError: as `info_nce`; within `torch.func` also in training mode, as centroids cannot move.

        """
        ranks = None
        if self.process_group is None:
            self._check(anchors, positives, negatives)
        else:
            if self.dimension_weight:
                raise ValueError(
                    f"dimension_weight: expected 0 with a process_group, got {self.dimension_weight:g}"
                )
            ranks = self._meet(self.process_group, anchors, positives, negatives)
        clustered = self.clustering_active
        inputs = (anchors, positives, negatives)
        backend = choose_backend(
            self.backend,
            *inputs,
            self.centroids if clustered else None,
            self._options,
            shared=ranks is not None,
        )
        check_transforms(backend)
        if self.training and self.num_clusters and under_functorch():
            raise RuntimeError(
                "training: expected eval mode within torch.func, where centroids cannot move; call .eval()"
            )
        clusters, cosines = Clusters(), {}
        if clustered:
            clusters = self.assign(anchors, update=self.training, ranks=ranks, backend=backend)
            cosines = self._describe(clusters, ranks)
            if not self.hard_negatives:
                clusters = _without_hard_negatives(clusters)
        captured = self._captured
        if captured is not None and (torch.compiler.is_compiling() or captured.training != self.training):
            captured = None
        terms = evaluate(Batch(*inputs, self.temperature, clusters, self._options), backend, ranks, captured)
        if captured is not None:
            captured.say(backend, self._tell)
        found = {
            name: term.detach() if term.requires_grad else term
            for name, term in zip(terms._fields, terms, strict=True)
            if term is not None
        }
        loss = terms.loss
        if self.dimension_weight:
            across = info_nce(
                anchors.T.contiguous(),
                positives.T.contiguous(),
                temperature=self.dimension_temperature,
                backend="reference" if backend == "reference" else "torch" if backend == "torch" else "auto",
            )
            loss = loss + self.dimension_weight * across
            found |= {"loss": loss.detach(), "dimensions": across.detach()}
        self.last = found | cosines
        after_step = self._after_step
        if torch.compiler.is_compiling():
            if not (self.training and self.num_clusters and not clustered):
                return loss
            torch._dynamo.graph_break(msg=_NOT_STARTED)
            # Else the K picks are unrolled into a graph. No decorator: it would load Triton at import.
            after_step = torch.compiler.disable(after_step)
        if self.training:
            after_step(*inputs, terms.mean_cosine, ranks)
        return loss

    def capture(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> None:
        """Record a step as CUDA graphs, one forward and one backward, which later calls replay.

        They serve batches of the shapes, dtypes, device and need of gradients of this one, in the mode and
        with the settings of now, on one stream. Any other runs without a graph, which is said once for each
        reason, though not of the mode; so does a step while the loss of another waits for its backward.
        Results and state are the same, and this call changes no state. The graphs keep a copy of a batch, its
        gradients and the cosines; a copy, a pickle and the state dict of the loss have no graph.

        A backward with `retain_graph=True` can be repeated before the next step; after it, RuntimeError.

        Args:
            anchors: (B, D) embeddings of the first views; they require a gradient if later ones do.
            positives: (B, D) embeddings of the second views.
            negatives: (N, D) mined hard negatives, if there will be some.

        Raises:
            TypeError, ValueError: as `forward`; also off a GPU, for a batch that is not for "triton", a rule
                of your own, or a process group.
            RuntimeError: as `forward`; also before clustering has started.

        """
        self._check(anchors, positives, negatives)
        if self.process_group is not None:
            raise ValueError("process_group: expected None to capture, got a group")
        if not isinstance(self.false_negatives, str):
            raise ValueError(
                f"false_negatives: expected a word to capture, got {in_short(self.false_negatives)}"
            )
        clustered = self.clustering_active
        if self.num_clusters and not clustered:
            raise RuntimeError(
                "clustering_active: expected True to capture, got False; call it after clustering has started"
            )
        state, inputs = self.centroids, (anchors, positives, negatives)
        backend = choose_backend(self.backend, *inputs, state if clustered else None, self._options)
        if backend != "triton":
            raise ValueError(
                f"anchors: expected a batch for backend 'triton' to capture, got {tuple(anchors.shape)} of "
                f"{anchors.dtype} on {anchors.device} for {backend!r}"
            )
        if clustered and not shares(state):
            raise ValueError(
                f"centroids: expected float32 rows to capture, got {state.dtype} of strides {state.stride()}"
            )
        clusters = Clusters()
        if clustered:  # "adamw" moves the centroids outside of the graph
            moves = self.training and self.centroid_update != "adamw"
            clusters = self.assign(anchors, update=moves, backend=backend)
            if not self.hard_negatives:
                clusters = _without_hard_negatives(clusters)
        captured, before = Captured(self.training), state.clone()
        try:
            evaluate(Batch(*inputs, self.temperature, clusters, self._options), backend, captured=captured)
        finally:
            with torch.no_grad():
                state.copy_(before)
        self._captured = captured

    @property
    def _options(self) -> Options:
        """The numbers as they stand: they may be changed between steps."""
        return Options(
            self.hard_negative_weight,
            self.false_negatives,
            self.bml_weight,
            self.bml_alpha,
            self.bml_beta,
            self.workspace_bytes,
            self.directions,
        )

    def _meet(
        self,
        group: torch.distributed.ProcessGroup,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
    ) -> Ranks:
        """Agree with the other ranks on the batch; a rank with bad input lets them know."""
        refused: Exception | None = None
        try:
            self._check(anchors, positives, negatives)
        except (TypeError, ValueError) as error:
            refused = error
        # Bad anchors may be no tensor, or on the wrong device: the others would wait in vain.
        of_loss = refused is not None and (self.num_clusters > 0 or not isinstance(anchors, Tensor))
        device = self.centroids.device if of_loss else anchors.device
        return meet(group, self.gather, anchors, positives, negatives, self.temperature, refused, device)

    def _check(self, anchors: Tensor, positives: Tensor, negatives: Tensor | None) -> None:
        if isinstance(anchors, (list, tuple)) and anchors and isinstance(anchors[0], Mapping):
            raise TypeError(f"anchors: expected a tensor of shape (rows, dim), got features; {_FOR_MODELS}")
        check_embeddings("anchors", anchors)
        check_like("positives", positives, "anchors", anchors, same_rows=True)
        if negatives is not None:
            check_like("negatives", negatives, "anchors", anchors)
        if anchors.shape[1] != self.embedding_dim:
            raise ValueError(
                f"anchors: expected embedding_dim {self.embedding_dim}, got shape {tuple(anchors.shape)}"
            )
        if self.num_clusters and anchors.device != self.centroids.device:
            raise ValueError(
                f"anchors: expected the device of the loss, {self.centroids.device}, got {anchors.device}; "
                "move the loss with .to(device)"
            )
        check_temperature(self.temperature, "anchors", anchors)

    def _after_step(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        mean_cosine: Tensor,
        ranks: Ranks | None,
    ) -> None:
        """What the host does in training: warnings, and the start rule.

        The only place that waits for the device: in the first step, and until clustering has started.
        """
        clustered = self.clustering_active
        batch = anchors.shape[0] if ranks is None else ranks.batch
        if batch == 1 and negatives is None and not (clustered and self.hard_negatives):
            self._tell(
                "alone",
                "a batch of one has no negatives, its loss is always 0; use a larger batch, and "
                "drop_last=True in the DataLoader against a last one of one row",
            )
        if self.num_clusters and not torch.is_grad_enabled():
            self._tell(
                "no grad",
                "training: a step without gradient moves the centroids as any other; call the loss's .eval() "
                "to evaluate",
            )
        if not self._begun:
            self._begun = True
            self._look_at_ranks()
            if batch > 1 and _are_same(anchors, positives):
                self._tell(
                    "same views",
                    "the two views of every sentence are the same, there is nothing to learn from: the "
                    "encoder has no dropout or is in eval mode; call its .train(), set its dropout (in its "
                    "configuration, as hidden_dropout_prob=0.1), or give pairs of sentences",
                )
        if self.num_clusters and not clustered and bool(mean_cosine <= self.start_cosine):
            self._seed_from(anchors, positives, batch, ranks)

    def _look_at_temperature(self) -> None:
        tau = self.temperature
        if isinstance(tau, Tensor):
            if tau.requires_grad and not isinstance(tau, nn.Parameter):
                self._tell(
                    "temperature without parameter",
                    "temperature: a tensor that requires a gradient but is no torch.nn.Parameter becomes a "
                    "buffer, which no optimizer is given; to learn it pass torch.nn.Parameter(...)",
                )
            tau = float(tau.detach()) if tau.device.type == "cpu" else 0.0
        if tau > 1:
            self._tell(
                "large temperature",
                f"temperature: {tau:g} looks like the scale of other libraries, which is 1/temperature: "
                f"pass temperature={1 / tau:g}",
            )

    def _look_at_ranks(self) -> None:
        size = torch.distributed.get_world_size() if _is_distributed() else 1
        if size > 1 and self.process_group is None:
            self._tell(
                "lone ranks",
                f"each of the {size} ranks sees its own rows only; to share one batch pass "
                f"{self.lone_ranks_cure}",
            )

    def _tell(self, name: str, text: str) -> None:
        """Warn, once of each name, at the line that called the loss; of several ranks the first one does."""
        if name in self._told or (_is_distributed() and torch.distributed.get_rank(self.process_group) > 0):
            return
        self._told.add(name)
        warn(text)

    def _seed_from(self, anchors: Tensor, positives: Tensor, batch: int, ranks: Ranks | None) -> None:
        """Start clustering from a batch, if it is large enough."""
        if batch < self.num_clusters:
            self._tell(
                "small batch",
                f"clustering waits: a batch of {batch} cannot seed "
                f"num_clusters={self.num_clusters}; use a larger batch or fewer clusters",
            )
            return
        # Not of the stream of dropout masks, which are so those of SimCSE with the same seed.
        with torch.random.fork_rng([]):
            first = int(torch.randint(batch, (1,)))
        if ranks is None:
            self.seed(anchors, positives, first=first)
        else:
            self.start_from(seeding_chain(anchors, positives, self.num_clusters, first, ranks)[0])

    def _describe(self, clusters: Clusters, ranks: Ranks | None) -> dict[str, Tensor]:
        """Means over the batch that `last` has of its clusters, 0-d; the kernels compute their own."""
        nearest, cosine, hard = clusters.ids, clusters.nearest_cosine, clusters.runner_up_cosine
        if nearest is None or cosine is None or hard is None:
            return {}
        counts = torch.zeros_like(self.centroids[:, 0]).scatter_add_(
            0, nearest, torch.ones_like(nearest, dtype=self.centroids.dtype)
        )
        if ranks is not None:
            counts = ranks.sum(counts)
        with_mates = (counts[nearest] > 1).to(counts.dtype)
        sums = {"nearest_cosine": cosine, "with_mates": with_mates}
        if self.hard_negatives:
            sums["hard_negative_cosine"] = hard
        total, batch = torch.stack([each.sum() for each in sums.values()]), len(nearest)
        if ranks is not None:
            total, batch = ranks.sum(total), ranks.batch
        return dict(zip(sums, (total / batch).unbind(), strict=True))

    def extra_repr(self) -> str:
        """Settings shown by `print(loss)`."""
        temperature = self.temperature if isinstance(self.temperature, float) else "learned"
        return (
            f"embedding_dim={self.embedding_dim}, num_clusters={self.num_clusters}, "
            f"temperature={temperature}, start_cosine={self.start_cosine}, "
            f"centroid_momentum={self.centroid_momentum}, "
            f"centroid_update={self.centroid_update!r}, hard_negatives={self.hard_negatives}, "
            f"false_negatives={self.false_negatives!r}, bml_weight={self.bml_weight}, "
            f"bml_alpha={self.bml_alpha}, bml_beta={self.bml_beta}, directions={self.directions!r}, "
            f"dimension_weight={self.dimension_weight}, dimension_temperature={self.dimension_temperature}, "
            f"backend={self.backend!r}"
        )


def _without_hard_negatives(clusters: Clusters) -> Clusters:
    # No `_replace`: torch 2.11 does not compile it.
    ids, centroids, _, nearest_cosine, runner_up_cosine, known, _, update = clusters
    return Clusters(ids, centroids, None, nearest_cosine, runner_up_cosine, known, False, update)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _are_same(anchors: Tensor, positives: Tensor) -> bool:
    """Whether the mean cosine of paired rows (B, D) is 1 to rounding; reads it from the device."""
    if anchors.is_meta or under_functorch() or (anchors.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    wide = (anchors.detach().float(), positives.detach().float())
    rounding = max(1e-6, torch.finfo(anchors.dtype).eps ** 2)
    return bool(torch.cosine_similarity(*wide).mean() > 1 - rounding)
