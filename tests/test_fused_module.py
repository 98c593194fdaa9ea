"""The Triton path under `ClusterNSLoss`: its state, its launches, its operators, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import assert_close_to_truth
from conftest import DEVICE
from objective_problems import problem, started
from torch.utils._python_dispatch import TorchDispatchMode

from clusterns import ClusterNSLoss, info_nce, nearest_centroids

pytest.importorskip("triton")
from clusterns.kernels import launch


class NotFree(TorchDispatchMode):
    """Notes what is neither an allocation nor a view."""

    seen: frozenset = frozenset()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in str(function):
            self.seen |= {str(function)}
        return function(*args, **(kwargs or {}))


def in_float64(loss_fn):
    """The reference with the same settings and the same state."""
    exact = copy.deepcopy(loss_fn)
    exact.backend = "reference"
    for name, value in loss_fn.named_buffers():
        if value.is_floating_point():
            setattr(exact, name, value.double())
    return exact


def assert_same_step(ours, theirs, batch, wide=lambda z: z):
    """Loss, gradients, centroids and terms of two losses on one batch."""
    results = []
    for loss_fn, inputs in ((ours, batch), (theirs, [wide(z.detach()).requires_grad_() for z in batch])):
        loss = loss_fn(*inputs)
        wanted = (*inputs, *loss_fn.parameters())
        gradients = torch.autograd.grad(loss, wanted)
        results.append(
            {"loss": loss, "centroids": loss_fn.centroids, **dict(enumerate(gradients)), **loss_fn.last}
        )
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        least = 1.0 if name in ours.last else 0.0
        assert_close_to_truth(value, results[1][name], condition=24, least=least, what=name)


@pytest.mark.parametrize(
    ("update", "hard", "how"),
    [
        ("sum", True, {}),
        ("adamw", False, {}),
        ("mean", True, {"workspace_bytes": 6_000}),  # in chunks
    ],
)
def test_module_agrees_with_the_reference(update, hard, how):
    ours = started(update, centroid_momentum=0.1, hard_negatives=hard, hard_negative_weight=0.3, **how)
    theirs = in_float64(ours)
    for training in (True, False):
        anchors, positives, arguments = problem(37, 12, 0, 5, seed=int(training))
        batch = (anchors, positives, arguments["negatives"])
        assert_same_step(ours.train(training), theirs.train(training), batch, torch.Tensor.double)


@pytest.mark.parametrize(("update", "first_training"), [("sum", True), ("sum", False), ("adamw", True)])
def test_backward_after_the_centroids_have_moved_on(update, first_training):
    """Two losses, then one backward: the first step's gradient is that of its own centroids."""
    loss_fn = started(update, centroid_momentum=0.9)
    one, two = problem(30, 12, 0, seed=1), problem(30, 12, 0, seed=2)
    state = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    expected = torch.autograd.grad(loss_fn.train(first_training)(*one[:2]), one[0])[0]
    loss_fn.load_state_dict(state)
    first = loss_fn.train(first_training)(*one[:2])
    second = loss_fn.train()(*two[:2])
    assert_close_to_truth(torch.autograd.grad(first + second, one[0])[0], expected, condition=24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_centroids_move_whatever_their_layout(dtype):
    """A state that came in another dtype or layout is still the one that is updated."""
    loss_fn = ClusterNSLoss(12, 6, backend="triton", centroid_momentum=0.5).to(DEVICE)
    state = loss_fn.state_dict()
    state["centroids"] = torch.randn(12, 6, device=DEVICE, dtype=dtype).T
    state["initialized"] = torch.tensor(True, device=DEVICE)
    loss_fn.load_state_dict(state, assign=True)
    before, exact = loss_fn.centroids.clone(), in_float64(loss_fn)
    anchors, positives, _ = problem(30, 12, 0)
    loss_fn(anchors, positives)
    exact(anchors.double(), positives.double())
    assert loss_fn.centroids.dtype == torch.float32
    assert not torch.equal(loss_fn.centroids, before)
    assert_close_to_truth(loss_fn.centroids, exact.centroids)


def test_launches():
    """Assign, update, re-assign, loss: four launches; the backward one.

    Between them there are only allocations and views: nothing that starts a kernel or waits.
    """
    loss_fn = started()
    anchors, positives, arguments = problem(64, 12, 0, 4)
    batch, one = (anchors, positives, arguments["negatives"]), torch.ones((), device=DEVICE)
    loss_fn(*batch).backward(one)
    with launch.recording() as forward, NotFree() as others:
        loss = loss_fn(*batch)
    with launch.recording() as backward, others:
        torch.autograd.grad(loss, batch, one)
    with launch.recording() as plain:
        info_nce(anchors, positives, backend="triton")
    assert not others.seen
    names = [
        [each.kernel.__name__.removesuffix("_kernel") for each in run] for run in (forward, backward, plain)
    ]
    assert names[0] == ["cosine", "centroid_update", "cosine", "objective"]
    assert names[1:] == [["gradient"], ["cosine", "objective"]]


def operator_samples():
    anchors, positives, arguments = problem(20, 8, 5, 3)
    views = [z.detach() for z in (anchors, positives, arguments["negatives"])]
    centroids, alone = arguments["centroids"], (*views[:2], None)
    nearest, runner_up, *_ = nearest_centroids(anchors, centroids)
    learned, numbers = (1.0, torch.tensor(0.05, device=DEVICE)), (0.2, "bml", 0.3, 0.1, 0.3)
    moves = (centroids.clone(), None, None, None, 0.05, True, True, True, "sum", 0.1, *numbers)
    loss, _, workspace = torch.ops.clusterns.forward(*views, *moves)
    return {
        "forward": (*views, *moves),
        "forward given": (
            *alone, centroids, nearest, runner_up, learned[1], 1.0, True, True, True, "", 0.0, *numbers
        ),
        "backward": (loss, *views, None, 0.05, len(centroids), [True, False, True], workspace),
        "similarity": (*alone[:2], 0.3, None),
        "nearest_centroids": (anchors.detach(), centroids),
        "cluster_sums": (anchors.detach(), centroids),
        "sweep": (
            *views, 0.05, None, nearest, centroids, runner_up, *numbers, 2**20, "one",
            [True, False, True, False], "triton-chunked",
        ),
        "sweep learned": (
            *alone, *learned, None, None, None, *numbers, None, "both", [True, True, False, True],
            "triton-chunked",
        ),
    }  # fmt: skip


def test_operators_are_well_defined():
    """Schemas, and the shapes, strides and dtypes that a compiler is told."""
    samples = operator_samples()
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "clusterns::" in name}
    assert {name.split()[0] for name in samples} == defined
    for name, sample in samples.items():
        operator = getattr(torch.ops.clusterns, name.split()[0]).default
        torch.library.opcheck(operator, sample, test_utils=("test_schema", "test_faketensor"))


def test_module_compiles_whole():
    tau = torch.nn.Parameter(torch.tensor(0.05, device=DEVICE))
    plain, whole = (started("adamw", temperature=tau, centroid_momentum=0.1) for _ in range(2))
    whole.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    fast = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        assert_same_step(fast, plain, problem(40 + seed, 12, 0, seed=seed)[:2])
