"""One rank of the tests in test_distributed.py.

Every rank builds the whole batch from a seed, and so has the single process to compare with at hand: the
plain formulas of `reference` on the concatenated batch.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from compare import assert_close_to_truth
from largest import LargestTensor
from torch.utils.flop_counter import FlopCounterMode

from clusterns import ClusterNSLoss
from clusterns.functional import seed_centroids
from clusterns.objective import torch_products
from clusterns.objective.ranks import meet, seeding_chain
from clusterns.objective.torch_products import TorchProducts
from clusterns.rules import CloseMates, Decision, Pairs

WIDTH, CLUSTERS, STEPS = 8, 5, 3
ROWS = (13, 1, 11, 6)  # ragged on purpose
NEGATIVE_ROWS = (3, 7, 1, 2)


class Setting(NamedTuple):
    """One way to use the loss."""

    name: str
    loss: dict  # arguments of ClusterNSLoss
    negatives: bool = False
    dtype: torch.dtype = torch.float64
    learned: float | None = None  # τ as a parameter
    wants: str = "apn"  # which embeddings want a gradient
    wants_on: int | None = None  # ... on this rank only
    upstream: float = 1.0
    cluster_order: bool = False  # the route of large batches
    evaluate: bool = False


def known_pairs(pairs: Pairs) -> Decision:
    """Some pairs are out and others held, by their places in the whole batch alone."""
    i, j = pairs.places
    return Decision(out=(i + 2 * j) % 5 == 0, held=(i + 2 * j) % 5 == 1)


known_pairs.needs_clusters = False  # type: ignore[attr-defined]
BOTH = {"directions": "both"}
EXCLUDE = {"false_negatives": "exclude", "hard_negative_weight": 0.7}
TINY = {"workspace_bytes": 2_000}  # a few rows of logits in a chunk
SETTINGS = [
    Setting("plain", {"num_clusters": 0, "hard_negatives": False}, upstream=3.0),
    Setting("bml", {"hard_negative_weight": 0.7}, negatives=True, upstream=-0.5),
    Setting("close mates", {"false_negatives": CloseMates(), **TINY}, negatives=True, learned=0.05),
    Setting("bml in order", {**TINY, "hard_negative_weight": -0.7}, negatives=True, cluster_order=True),
    Setting("places", {"false_negatives": known_pairs, **TINY}, negatives=True),
    Setting("odd margins", {"bml_alpha": -0.1, "bml_beta": -0.2, "hard_negatives": False}, wants="p"),
    Setting("bml, learned τ", {"centroid_update": "adamw"}, True, learned=0.07, upstream=2.0),
    Setting("exclude, float32", {**EXCLUDE, "temperature": 0.01, **TINY}, dtype=torch.float32),
    Setting("exclude in order", EXCLUDE, True, learned=0.05, cluster_order=True, wants="an"),
    Setting("anchors detached", {"centroid_update": "mean", **TINY}, negatives=True, wants="pn"),
    Setting("one rank wants all", {"temperature": 0.01}, negatives=True, wants_on=1),
    Setting("bfloat16", {}, negatives=True, dtype=torch.bfloat16),
    Setting("float16, maximum", {"temperature": 0.01}, dtype=torch.float16, upstream=64.0),
    Setting("both directions", {**BOTH, "hard_negative_weight": 0.7}, True, learned=0.05, evaluate=True),
    Setting("both, exclude in order", {**BOTH, **EXCLUDE, **TINY}, negatives=True, cluster_order=True),
    Setting("both, places", BOTH | TINY | {"false_negatives": known_pairs, "temperature": 0.003}, wants_on=1),
    Setting("evaluation", {}, negatives=True, learned=0.05, evaluate=True),
]


def batch(step: int, size: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Anchors, positives and negatives of a batch, each split by rank; norms far from 1."""
    generator = torch.Generator().manual_seed(step)
    split = []
    noise = torch.randn(sum(ROWS), WIDTH, generator=generator, dtype=torch.float64)
    for index, counts in enumerate((ROWS[:size], ROWS[:size], NEGATIVE_ROWS[:size])):
        z = torch.randn(sum(counts), WIDTH, generator=generator, dtype=torch.float64)
        z = z + (noise[: len(z)] if index < 2 else 0.0)
        z = z * (0.2 + 3 * torch.rand(len(z), 1, generator=generator, dtype=torch.float64))
        split.append(list(z.to(dtype).split(counts)))
    return split


def make_loss(setting: Setting, **distributed) -> ClusterNSLoss:
    arguments = {"num_clusters": CLUSTERS, "start_cosine": 1.0, "centroid_momentum": 0.1, "bml_weight": 0.3}
    arguments |= setting.loss | distributed
    if setting.learned is not None:
        arguments["temperature"] = torch.nn.Parameter(torch.tensor(setting.learned, dtype=torch.float64))
    return ClusterNSLoss(WIDTH, **arguments)


def run_steps(setting: Setting, loss_fn: ClusterNSLoss, batches, wanted: set[str]) -> list[dict]:
    """What the loss gives in each of a few steps: the first seeds, the others are clustered."""
    results = []
    for step, views in enumerate(batches):
        leaves = {
            name: z.clone().requires_grad_(name in wanted) for name, z in zip("apn", views, strict=True)
        }
        anchors, positives, negatives = leaves.values()
        evaluate = setting.evaluate and step == len(batches) - 1
        loss_fn.train(not evaluate)
        with torch.set_grad_enabled(not evaluate):
            loss = loss_fn(anchors, positives, negatives if setting.negatives else None)
        temperature = loss_fn.temperature
        if loss.requires_grad:
            (loss * setting.upstream).backward()
        found = {"loss": loss.detach(), "centroids": loss_fn.centroids.clone()}
        found |= {f"last {name}": term for name, term in loss_fn.last.items()}
        found |= {f"gradient {name}": z.grad for name, z in leaves.items() if z.grad is not None}
        if isinstance(temperature, torch.nn.Parameter) and temperature.grad is not None:
            found["gradient τ"], temperature.grad = temperature.grad, None
        results.append(found)
    return results


def same_everywhere(group, tensor: torch.Tensor, what: str) -> None:
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, tensor.contiguous(), group=group)
    assert all(torch.equal(other, every[0]) for other in every), f"ranks hold different {what}: {every}"


def check_setting(setting: Setting, group) -> None:
    """Both ways to gather against one process."""
    batches = [batch(step, dist.get_world_size(group), setting.dtype) for step in range(STEPS)]
    whole = [[torch.cat(parts).double() for parts in views] for views in batches]
    torch.manual_seed(100)  # the generator of rank 0
    alone = run_steps(setting, make_loss(setting, backend="reference"), whole, set(setting.wants))
    gather = ""
    try:
        for gather in ("all", "ring"):
            check_gather(setting, gather, group, batches, alone)
    except Exception:
        print(f"rank {dist.get_rank()}, gather {gather!r}, {setting.name!r}:", file=sys.stderr)
        raise


def check_gather(setting: Setting, gather: str, group, batches, alone: list[dict]) -> None:
    """Loss, terms, centroids and gradients as those of one process; the same bits when three repeat it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    shares = [[parts[rank] for parts in views] for views in batches]
    wanted = set(setting.wants)
    own_wanted = wanted if setting.wants_on in (None, rank) else set()
    with mock.patch.object(torch_products, "_SORTED_BATCH", 1 if setting.cluster_order else 10**9):
        runs = []
        for _ in range(2 if size == 3 else 1):
            torch.manual_seed(100 + rank)  # others draw other first picks unless they take rank 0's
            loss_fn = make_loss(setting, process_group=group, gather=gather)
            runs.append(run_steps(setting, loss_fn, shares, own_wanted))
    assert loss_fn.clustering_active == (loss_fn.num_clusters > 0)

    condition = 4 + 1 / (setting.learned or setting.loss.get("temperature", 0.05))
    places = dict(zip("apn", (ROWS, ROWS, NEGATIVE_ROWS), strict=True))
    for step, (found, again, expected) in enumerate(zip(runs[0], runs[-1], alone, strict=True)):
        if own_wanted == wanted:
            assert found.keys() == expected.keys(), (step, found.keys(), expected.keys())
        same_everywhere(group, found["loss"], "losses")
        same_everywhere(group, found["centroids"], "centroids")
        for name, value in found.items():
            assert torch.equal(value, again[name]), f"step {step}: {name} differs when repeated"
            reference = expected[name]
            least = max(float(reference.norm()), 0.01)
            if name in ("gradient a", "gradient p", "gradient n"):
                reference = reference.split(places[name[-1]][:size])[rank]
                value = value / size
            assert_close_to_truth(
                value, reference, condition=condition, least=least, dtype=found["loss"].dtype,
                what=f"step {step}, {name}",
            )  # fmt: skip


def check_memory(group) -> None:
    """A ring meets one block after another, and makes nothing as long as the batch."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    width, counts = 29, [40 + index for index in range(size)]
    z = torch.randn(2, counts[rank], width, generator=torch.Generator().manual_seed(rank))
    largest = {}
    for gather in ("all", "ring"):
        loss_fn = ClusterNSLoss(width, 3, start_cosine=1.0, process_group=group, gather=gather)
        blocks: list[int] = []

        def open_block(products, block, *rest, blocks=blocks, plain=TorchProducts.open):
            blocks.append(len(block.positives))
            return plain(products, block, *rest)

        seen = LargestTensor(lambda z: z.numel() // width if z.ndim > 1 and z.shape[-1] == width else 0)
        with mock.patch.object(TorchProducts, "open", open_block), seen:
            for _ in range(2):
                loss_fn(z[0].clone().requires_grad_(), z[1].clone().requires_grad_()).backward()
        largest[gather] = seen.seen
        each = [sum(counts)] if gather == "all" else counts * 2  # the ring goes around twice
        assert Counter(blocks) == Counter(each * 2), f"{gather}: {blocks}"
    assert largest["all"] >= sum(counts)
    assert largest["ring"] <= max(counts) + 3, largest  # the centroids are columns of the own block


def check_cost(batch: int, width: int) -> None:
    """What a rank computes and sends is what docs/performance.md says, and a ring sends while it computes."""
    size = dist.get_world_size()
    z = torch.randn(2, batch // size, width, dtype=torch.bfloat16)
    computed: list[str] = []
    meanwhile: Counter = Counter()  # what was computed while something was on its way
    sent: Counter = Counter()  # bytes by dtype

    def exchange(operations, plain=dist.batch_isend_irecv):
        for each in operations:
            sent[each.tensor.dtype] += each.tensor.nbytes * (each.op is dist.isend)
        begun = len(computed)

        def wait(work):
            meanwhile[tuple(computed[begun:])] += 1
            work.wait()

        return [SimpleNamespace(wait=partial(wait, work)) for work in plain(operations)]

    def noted(name):
        plain = getattr(TorchProducts, name)

        def product(*arguments):
            computed.append(name)
            return plain(*arguments)

        return mock.patch.object(TorchProducts, name, product)

    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}  # unknown to torch
    with mock.patch.object(dist, "batch_isend_irecv", exchange), noted("weigh"), noted("differentiate"):
        for gather, operations in (("all", 6), ("ring", 8)):
            loss_fn = ClusterNSLoss(width, 0, process_group=dist.group.WORLD, gather=gather)
            with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
                loss_fn(*(each.clone().requires_grad_() for each in z)).backward()
            assert counter.get_total_flops() == operations * batch**2 * width / size, gather
    numbers, trips = batch * width // size, size - 1
    assert sent == {torch.bfloat16: 2 * trips * numbers * 2, torch.float32: size * numbers * 4}
    # One block each time, but for the last trip of the gradients. One waits for what leaves and what comes.
    assert meanwhile == {("weigh",): 2 * trips, ("weigh", "differentiate"): 4 * trips, (): 2}, meanwhile


def check_ranks(group) -> None:
    """The seeds of one process, on every rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    anchors, positives, _ = batch(0, size, torch.float32)
    ranks = meet(group, "all", anchors[rank], positives[rank], None, 0.05)
    assert ranks.batch == sum(ROWS[:size])
    assert ranks.first == sum(ROWS[:rank])
    for seed, num_clusters in itertools.product(range(2), (1, 4, ranks.batch)):
        torch.manual_seed(seed + 100 * rank)
        first = int(torch.randint(ranks.batch, (1,)))
        found, _ = seeding_chain(anchors[rank], positives[rank], num_clusters, first, ranks)
        whole = torch.cat(anchors), torch.cat(positives)
        expected, _ = seed_centroids(*whole, num_clusters, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, expected), f"seeds of {num_clusters} clusters"


Z = torch.randn(4, 8)
OTHER, DOUBLE = Z[:, :5], Z.double()
BAD_INPUTS = [
    ((Z, Z[:3]), ValueError, r"positives: expected shape (4, 8) to match anchors, got (3, 8)"),
    ((Z.tolist(), Z), TypeError, "anchors: expected a tensor of shape (rows, dim), got list"),
    ((Z, Z, OTHER), ValueError, "negatives: expected shape (rows, 8)"),
]
DISAGREEMENTS = [
    ((Z, DOUBLE), 8, "the same dtype on every rank", "float64"),
    ((OTHER, OTHER), 5, "the same embedding dimension on every rank", "5"),
    ((Z, Z, Z[:1]), 8, "the same negatives on every rank", "some of torch.float32"),
]


def check_refusals(group) -> None:
    """Each rank gets its error, none waits, and the group is as good as before."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1

    def error(gather: str, culprit: int, inputs, width: int = 8) -> Exception | None:
        inputs, width = (inputs, width) if rank == culprit else ((Z, Z), 8)
        try:
            ClusterNSLoss(width, 2, process_group=group, gather=gather)(*inputs)
        except Exception as found:
            return found
        return None

    for gather in ("all", "ring"):
        for culprit, (inputs, kind, words) in itertools.product({0, last}, BAD_INPUTS):
            found = error(gather, culprit, inputs)
            if rank != culprit:
                kind, words = ValueError, f"anchors: expected valid input on every rank, rank {culprit} has"
            assert type(found) is kind, repr(found)
            assert str(found).startswith(words), repr(found)
        for inputs, width, words, got in DISAGREEMENTS:
            found = error(gather, last, inputs, width)
            assert type(found) is ValueError, repr(found)
            assert words in str(found), repr(found)
            assert str(found).endswith(got), repr(found)
        assert error(gather, last, (Z, Z)) is None  # and the group goes on


def run(folder: str) -> None:
    """Leave a note in `folder` for each group, whose ranks may have other numbers among all of them.

    All settings for three ranks, a fifth of them for two and another for four.
    """
    for members, settings in (([0, 1, 2, 3], SETTINGS[::5]), ([1, 2, 3], SETTINGS), ([0, 2], SETTINGS[1::5])):
        group = dist.new_group(members)
        if dist.get_rank() in members:
            for setting in settings:
                check_setting(setting, group)
            check_memory(group)
            check_ranks(group)
            check_refusals(group)
        if dist.get_rank() == members[-1]:
            (Path(folder) / f"{len(members)} ranks").touch()
