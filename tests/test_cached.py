"""Mini-batches encoded twice must give what one graph over all of them gives, bit by bit of dropout."""

from __future__ import annotations

import contextlib
from collections import UserDict
from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
from compare import ROOM, assert_close_to_truth
from small_files import cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clusterns import CachedClusterNSLoss, ClusterNSLoss

DIM, WIDTH, CLUSTERS = 6, 8, 3


class Encoder(nn.Module):
    """An MLP with dropout that notes every call."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layers = nn.Sequential(nn.Linear(DIM, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, WIDTH))
        self.to(dtype)
        self.calls: list[tuple[int, bool]] = []  # rows, and whether a graph was built

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(inputs), torch.is_grad_enabled()))
        return self.layers(inputs)


def rows(count: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64).to(dtype)


def make_loss(mini_batch_size=4, **settings):
    """Clustering starts with the first batch."""
    settings = {"start_cosine": 1.0, "bml_weight": 0.1, "centroid_momentum": 0.05, **settings}
    return CachedClusterNSLoss(WIDTH, CLUSTERS, mini_batch_size=mini_batch_size, **settings)


def whole(loss_fn, encode, *parts):
    """The oracle: the same mini-batches in the same order, all in one graph."""
    views = (torch.cat([encode(rows) for rows in part.split(loss_fn.mini_batch_size)]) for part in parts)
    return ClusterNSLoss.forward(loss_fn, *views)


def check(step, rounding=0.0, dtype=torch.float64, place="cpu", **settings):
    """`step(loss_of_batch, encoder)` must leave with the cached loss what it leaves with the oracle."""
    results = []
    for cached in (False, True):
        tau = nn.Parameter(torch.tensor(0.1, dtype=dtype))
        encoder, loss_fn = Encoder(dtype).to(place), make_loss(temperature=tau, **settings).to(place)
        torch.manual_seed(1)
        losses = step(partial(loss_fn if cached else partial(whole, loss_fn), encoder), encoder)
        assert loss_fn.clustering_active
        parameters = [*encoder.named_parameters(), *loss_fn.named_parameters()]
        found = {f"gradient {name}": parameter.grad for name, parameter in parameters}
        assert all(gradient.abs().sum() > 0 for gradient in found.values())
        found |= {"losses": losses, **loss_fn.state_dict(), **loss_fn.last}
        results.append((found, torch.get_rng_state()))
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].keys() == results[1][0].keys()
    for name, truth in results[0][0].items():  # sums over mini-batches go in another order
        assert_close_to_truth(results[1][0][name], truth, condition=100, rounding=rounding, what=name)


@pytest.mark.parametrize(
    ("mini_batch_size", "mined", "directions"), [(1, 7, "one"), (3, 0, "one"), (3, 7, "both"), (64, 7, "one")]
)
def test_equals_the_graph_over_the_whole_batch(mini_batch_size, mined, directions):
    """Real dropout, three steps over the start of clustering, gradients added to those there are."""

    def step(loss_of, encoder):
        losses = []
        for seed in range(3):
            parts = [rows(10, seed), rows(10, seed + 50)] + [rows(mined, seed + 90)] * bool(mined)
            losses.append(loss_of(*parts))
            (losses[-1] * 3 + 1).backward()
        return torch.stack(losses).detach()

    check(step, mini_batch_size=mini_batch_size, directions=directions)


@pytest.mark.parametrize(("enabled", "at_backward"), [(True, None), (True, False), (False, True)])
def test_autocast_is_that_of_the_forward(enabled, at_backward):
    seen = set()

    def step(loss_of, encoder):
        encoder.layers[0].register_forward_hook(lambda *call: seen.add(call[-1].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(rows(10, dtype=torch.float32), rows(10, 1, dtype=torch.float32))
            if at_backward is None:  # inside the same one, whose cache holds what the first pass has cast
                loss.backward()
        if at_backward is not None:
            with torch.autocast("cpu", torch.bfloat16, enabled=at_backward):
                loss.backward()
        return loss.detach()

    check(step, ROOM * torch.finfo(torch.bfloat16).eps if enabled else 0.0, torch.float32)
    assert seen == {torch.bfloat16 if enabled else torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_dropout_is_replayed_on_a_gpu(place):
    """The GPU's own generator; and inputs on the CPU that `encode` moves."""

    def step(loss_of, encoder):
        encoder.register_forward_pre_hook(lambda _, inputs: inputs[0].cuda())
        loss = loss_of(*(rows(10, seed, torch.float32).to(place) for seed in range(2)))
        before = torch.cuda.get_rng_state()
        loss.backward()
        assert torch.equal(torch.cuda.get_rng_state(), before)
        return loss.detach()

    check(step, dtype=torch.float32, place="cuda")


def test_each_mini_batch_is_encoded_again_at_every_backward():
    tau = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    encoder, loss_fn = Encoder(), make_loss(temperature=tau)
    loss = loss_fn(encoder, rows(10), rows(10), rows(5))
    first = [(count, False) for count in (4, 4, 2, 4, 4, 2, 4, 1)]
    assert torch.autograd.grad(loss, tau, retain_graph=True)[0].abs() > 0
    assert encoder.calls == first  # the temperature alone needs no encoder
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in encoder.parameters()]
    assert encoder.calls == first + [(count, True) for count, _ in first]
    loss.backward()
    for parameter, gradient in zip(encoder.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_without_a_backward_pass_nothing_is_encoded_twice(mode):
    encoder, loss_fn = Encoder().eval(), make_loss()
    loss_fn(encoder, rows(10), rows(10, 1))
    loss_fn.eval()
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    encoder.calls.clear()
    with mode():
        loss = loss_fn(encoder, rows(10, 1), rows(10, 2))
        assert encoder.calls == [(count, False) for count in 2 * (4, 4, 2)]
        torch.testing.assert_close(loss, whole(loss_fn, encoder, rows(10, 1), rows(10, 2)))
    assert loss.requires_grad == (mode is contextlib.nullcontext)
    assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda *x: UserDict(x=x[0], mask=x[1]),  # a mapping that is no dict, as BatchEncoding
        lambda *x: (x[0], {"mask": x[1]}),
        lambda *x: [*x],
    ],
)
def test_forms_of_input(wrap):
    """`encode` gets what the loss got, some rows of it; each part may be padded to another length."""
    encoder, parts = Encoder().eval(), [rows(10), rows(10, 1), rows(3, 2)]

    def encode(inputs):
        assert type(inputs) is (dict if type(wrap(1, 2)) is UserDict else type(wrap(1, 2)))
        x, mask = inputs.values() if isinstance(inputs, dict) else inputs
        assert len(mask["mask"] if isinstance(mask, dict) else mask) == len(x) <= 4
        return encoder(x)

    inputs = [wrap(part, torch.ones(len(part), 1 + number)) for number, part in enumerate(parts)]
    loss = make_loss()(encode, *inputs)
    torch.testing.assert_close(loss, whole(make_loss(), encoder, *parts))
    loss.backward()


X, ENCODER = rows(6), Encoder()
NEEDS_GRAD = X.clone().requires_grad_()
REFUSED = [
    ((X, X, X), "encode: expected a function of inputs, got Tensor"),
    ((ENCODER, X, {"x": X, "length": 3}), "positives: expected a tensor, .* got int"),
    ((ENCODER, (X, X[1:]), X), r"anchors: expected tensors of equally many rows, got \[6, 5\]"),
    ((ENCODER, X, X[1:]), "positives: expected 6 rows to match anchors, got 5"),
    ((ENCODER, NEEDS_GRAD, X), "anchors: expected inputs that require no gradient, got a tensor that does"),
    ((lambda x: x[:1], X, X), "encode: expected 4 embeddings for 4 rows, got 1"),
    ((lambda x: x.to("meta"), X, X), "encode: expected embeddings on the device of the loss .* got meta"),
]


@cases("arguments message", REFUSED)
def test_bad_inputs_and_embeddings(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        make_loss()(*arguments)
    assert "\n" not in str(caught.value)
    assert ENCODER.calls == []


def test_other_refusals():
    encoder, x = Encoder(), rows(6)
    loss, frozen = make_loss()(encoder, x, x), make_loss()(torch.no_grad()(encoder), x, x)
    for call, message in (
        (lambda: make_loss(mini_batch_size=0), "mini_batch_size: expected at least 1, got 0"),
        (lambda: torch.func.vmap(partial(make_loss(), encoder))(X[None], X[None]), "within torch.func, got"),
        (lambda: loss.backward(create_graph=True, retain_graph=True), "create_graph: expected False"),
        (frozen.backward, "encode: expected embeddings that require a gradient"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    x.mul_(2)  # other inputs than those the loss was computed on
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ROWS, STEPS = (13, 7), 4  # of each rank: four mini-batches and two of each part


def train(output: str | None = None) -> dict:
    """What a few optimiser steps end with: of all rows, or of a rank's share, which rank 0 writes."""
    torch.manual_seed(5)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(DIM, 12), nn.Tanh(), nn.BatchNorm1d(12), nn.Linear(12, WIDTH)).double()
    model.eval()  # with a buffer, which DistributedDataParallel broadcasts
    settings = {"start_cosine": 1.0, "bml_weight": 0.1}
    all_reduces: list[int] = []
    if output is None:
        rank, loss_fn = 0, ClusterNSLoss(WIDTH, 4, **settings)
        loss_of = lambda *parts: loss_fn(*map(model, parts))  # noqa: E731
    else:
        rank, encode = dist.get_rank(), DistributedDataParallel(model)
        settings |= {"mini_batch_size": 4, "process_group": dist.group.WORLD}
        loss_fn = CachedClusterNSLoss(WIDTH, 4, **settings)
        loss_of = partial(loss_fn, encode)

        def count_and_average(state, bucket):
            all_reduces.append(bucket.index())
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        encode.register_comm_hook(None, count_and_average)
    torch.manual_seed(100 + rank)  # ranks draw different first picks unless rank 0's is broadcast
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        both = [rows(sum(ROWS), 3 * step + part) for part in range(3)]
        loss = loss_of(*(both if output is None else [part.split(ROWS)[rank] for part in both]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert loss_fn.clustering_active
    found = {"losses": torch.stack(losses), "centroids": loss_fn.centroids, "weights": model.state_dict()}
    if output is not None:
        assert len(all_reduces) == STEPS  # one a step, not one a mini-batch
        if rank == 0:
            torch.save(found, output)
    return found


def test_ranks_equal_one_process(tmp_path):
    """Two processes with DistributedDataParallel, one of them with more mini-batches than the other."""
    output = tmp_path / "rank0.pt"
    found = ranks.start(2, tmp_path / "store", train, str(output))
    assert ranks.exit_codes(found) == [0, 0]
    torch.testing.assert_close(torch.load(output, weights_only=True), train())
