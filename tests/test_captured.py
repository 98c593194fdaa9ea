"""`ClusterNSLoss.capture`: a replayed step is the step that the launches would have made.

Without a GPU the graphs are a stand-in, which runs the recorded function again and overwrites its outputs.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from conftest import DEVICE
from objective_problems import problem

from clusterns import ClusterNSLoss, captured

pytest.importorskip("triton")

ROWS, DIM = 16, 8


def stand_in(device, runs):
    def replay(run, given, outputs):
        for into, found in zip(outputs, run(*given), strict=True):
            if into is not None:
                into.data.copy_(found)  # a graph does not count versions either

    found, outputs = [], ()
    for run in runs:
        given, outputs = outputs, run(*outputs)
        found.append((lambda run=run, given=given, outputs=outputs: replay(run, given, outputs), outputs))
    return found


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """What was replayed, in order; what is told is an error unless a test expects it."""
    names, record = [], captured.record if DEVICE == "cuda" else stand_in

    def counting(device, runs):
        replays = zip(("forward", "backward"), record(device, runs), strict=False)
        return [(lambda n=n, r=r: (names.append(n), r()), outputs) for n, (r, outputs) in replays]

    monkeypatch.setattr(captured, "record", counting)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield names


def started(clusters=6, seed=9, update="sum", **settings):
    loss_fn = ClusterNSLoss(DIM, clusters, backend="triton", centroid_update=update, **settings).to(DEVICE)
    if clusters:
        loss_fn.start_from(batch_of(seed, clusters)[0])
    return loss_fn


def batch_of(seed, rows=ROWS, negatives=0, dtype=torch.float32):
    anchors, positives, others = problem(rows, DIM, 0, negatives, dtype, seed)
    return [anchors, positives, *([others["negatives"]] if negatives else [])]


def pair(ran, batch=None, **settings):
    """A captured loss, and its twin without."""
    settings = {"centroid_momentum": 0.3, "hard_negative_weight": 0.2, "bml_weight": 0.3} | settings
    plain = started(**settings)
    ours = copy.deepcopy(plain)
    ours.capture(*(batch or batch_of(7)))
    ran.clear()
    return ours, plain


def step(loss_fn, batch, upstream=1.0):
    """Whatever comes out of a step."""
    version = loss_fn.centroids._version
    loss = loss_fn(*batch)
    wanted = [z for z in (*batch, *loss_fn.parameters()) if z.requires_grad]
    gradients = torch.autograd.grad(loss * upstream, wanted) if loss.requires_grad else ()
    counted = torch.tensor(loss_fn.centroids._version - version)
    return [loss, *gradients, *loss_fn.last.values(), counted, *(z.clone() for z in loss_fn.buffers())]


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(
        torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(found, expected, strict=True)
    )


def assert_same_steps(ours, plain, batches):
    found = [step(ours, batch) for batch in batches]  # looked at after the last has run
    for one, batch in zip(found, batches, strict=True):
        assert_same(one, step(plain, batch))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ({}, {"update": "sum"}),
        ({"negatives": 5}, {"update": "mean", "temperature": 0.1}),
        ({"dtype": torch.bfloat16}, {"update": "replace", "hard_negatives": False}),
        ({"negatives": 3, "dtype": torch.float16}, {"update": "adamw", "false_negatives": "exclude"}),
        ({}, {"temperature": "learned", "false_negatives": "keep"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_a_replay_is_the_step(ran, kind, settings):
    if settings.get("temperature") == "learned":
        settings = settings | {"temperature": torch.nn.Parameter(torch.tensor(0.07))}
    ours, plain = pair(ran, batch_of(7, **kind), **settings)
    batches = [batch_of(seed, **kind) for seed in range(2)]
    batches[1][0] = batches[1][0].detach().T.contiguous().T.requires_grad_()  # strides do not matter
    assert_same_steps(ours, plain, batches)
    with torch.no_grad():
        for parameter in (*ours.parameters(), *plain.parameters()):
            parameter.mul_(1.5)  # as an optimizer does
    assert_same_steps(ours, plain, batches[:1])
    assert ran == ["forward", "backward"] * 3


def test_without_clusters_and_without_gradients(ran):
    plain = started(0, hard_negatives=False, false_negatives="keep")
    ours, batches = copy.deepcopy(plain), [[z.detach() for z in batch_of(seed)] for seed in range(3)]
    ours.capture(*batches[2])
    ran.clear()
    assert_same_steps(ours, plain, batches)
    assert ran == ["forward"] * 3
    assert len(ours._captured.replays) == 1  # no backward


def test_capture_changes_nothing(ran):
    loss_fn, batch = started(centroid_momentum=0.3), batch_of(1)
    step(loss_fn, batch)
    before, last = copy.deepcopy(loss_fn.state_dict()), dict(loss_fn.last)
    kept = [each.clone() for each in last.values()]
    loss_fn.capture(*batch)
    assert "backward" not in ran
    assert_same(list(loss_fn.state_dict().values()), list(before.values()))
    assert all(loss_fn.last[name] is each for name, each in last.items())
    assert_same(list(last.values()), kept)
    assert batch[0].grad is None


@pytest.mark.parametrize("order", ["one after the other", "sum", "backwards"])
def test_accumulation(ran, order):
    ours, plain = pair(ran)
    results = []
    for loss_fn in (ours, plain):
        factor = torch.full((), 0.5, device=DEVICE, requires_grad=True)
        batches = [[z.detach() + factor for z in batch_of(seed)] for seed in range(2)]
        if order == "one after the other":
            losses = [loss_fn(*batches[0])]
            losses[0].backward(retain_graph=True)
            losses.append(loss_fn(*batches[1]))
            losses[1].backward()
        else:
            losses = [loss_fn(*batch) for batch in batches]
            for loss in {"sum": [sum(losses)], "backwards": losses[::-1]}[order]:
                loss.backward()
        results.append([*losses, factor.grad, loss_fn.centroids])
    assert_same(*results)
    assert ran == ["forward", "backward"] * (2 if order == "one after the other" else 1)
    assert_same_steps(ours, plain, [batch_of(3)])
    assert ran[-2:] == ["forward", "backward"]


def test_a_loss_that_is_dropped_or_raises_frees_the_graph(ran):
    ours, plain = pair(ran)
    for loss_fn in (ours, plain):
        batch = batch_of(0)
        loss = loss_fn(*batch)
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, batch, create_graph=True)
        del loss
    assert_same_steps(ours, plain, [batch_of(1)])
    assert ran == ["forward", "forward", "backward"]


def test_each_upstream(ran):
    ours, plain = pair(ran)
    for seed, upstream in enumerate((3.5, -0.25)):
        batch = batch_of(seed)
        assert_same(step(ours, batch, upstream), step(plain, batch, upstream))
    losses = [loss_fn(*batch) for loss_fn in (ours, plain)]
    for loss in losses:
        loss /= 3  # it is the caller's
    assert_same(*(torch.autograd.grad(loss, batch) for loss in losses))
    assert ran.count("backward") == 3


def test_a_repeated_backward(ran):
    ours, plain = pair(ran)
    batch = batch_of(0)
    mine, theirs = ours(*batch), plain(*batch)
    expected = torch.autograd.grad(theirs, batch)
    assert_same(torch.autograd.grad(mine, batch[1:], retain_graph=True), expected[1:])  # of some only
    for _ in range(2):
        assert_same(torch.autograd.grad(mine, batch, retain_graph=True), expected)
    ours.eval()(*batch)  # no replay
    assert_same(torch.autograd.grad(mine, batch, retain_graph=True), expected)
    later = ours.train()(*batch)
    with pytest.raises(RuntimeError, match="retain_graph: expected .*, got 1, which"):
        torch.autograd.grad(mine, batch)
    assert_same(torch.autograd.grad(later, batch), torch.autograd.grad(plain(*batch), batch))


def test_the_other_mode_and_a_new_state(ran):
    """Evaluation is silent, without the graph; the next replay is of a state that was loaded or started."""
    ours, plain = pair(ran)
    assert_same_steps(ours.eval(), plain.eval(), [batch_of(0)])
    assert not ran
    state = copy.deepcopy(started(seed=5).state_dict())
    rows = torch.randn(6, DIM)
    for loss_fn, change in [
        (each, way) for way in ("load", "start") for each in (ours.train(), plain.train())
    ]:
        loss_fn.load_state_dict(state) if change == "load" else loss_fn.start_from(rows)
        if loss_fn is plain:
            assert_same_steps(ours, plain, [batch_of(1), batch_of(2)])
    assert ran == ["forward", "backward"] * 4


def set_to(**values):
    return lambda loss_fn: [setattr(loss_fn, name, value) for name, value in values.items()]


def to_another_storage(loss_fn):
    loss_fn.load_state_dict(copy.deepcopy(loss_fn.state_dict()), assign=True)


@pytest.mark.parametrize(
    ("change", "batch", "told"),
    [
        (None, {"rows": 9}, r"the shape of anchors is \(9, 8\), captured was \(16, 8\); this step runs"),
        (None, {"negatives": 4}, r"the shape of negatives is \(4, 8\), captured was None"),
        (to_another_storage, {}, "the storage of centroids is"),
        (lambda loss_fn: loss_fn.initialized.fill_(False), {}, "the storage of centroids is None"),
        (set_to(temperature=0.06), {}, "the temperature is 0.06, captured was 0.05"),
        (set_to(temperature=torch.tensor(0.05, device=DEVICE)), {}, "the storage of temperature is"),
        (set_to(centroid_momentum=0.4), {}, "the centroid_momentum is 0.4, captured was 0.3"),
        (set_to(false_negatives="exclude"), {}, "the false_negatives is exclude"),
        (set_to(bml_beta=0.3), {}, "the bml_beta is 0.3"),
        (set_to(backend="torch"), {}, "the backend is torch, captured was triton"),
        (set_to(workspace_bytes=1000), {}, "the backend is triton-chunked"),
    ],
)  # fmt: skip
def test_what_does_not_fit_runs_without_the_graph(ran, change, batch, told):
    ours, plain = pair(ran)
    for loss_fn in (ours, plain):
        loss_fn.start_cosine = -1.0  # nothing seeds
        if change is not None:
            change(loss_fn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        found = step(ours, batch_of(0, **batch))
    assert len(seen) == 1
    assert re.match(f"capture: {told}", str(seen[0].message))
    assert seen[0].filename == __file__
    assert_same(found, step(plain, batch_of(0, **batch)))
    assert not ran
    if change is None:
        assert_same_steps(ours, plain, [batch_of(1, **batch)])  # said once
        assert not ran
        assert_same_steps(ours, plain, [batch_of(2)])
        assert ran == ["forward", "backward"]


def test_needs_and_precision_count(ran, monkeypatch):
    ours, plain = pair(ran)
    batch = [batch_of(0)[0], batch_of(0)[1].detach()]
    with pytest.warns(
        UserWarning, match=r"gradients is \(True, False, False\), captured was \(True, True, False\)"
    ):
        found = step(ours, batch)
    assert_same(found, step(plain, batch))
    monkeypatch.setattr("clusterns.kernels.target.Target.precision", lambda *_, **__: "tf32")
    with pytest.warns(UserWarning, match="the precision of products is tf32, captured was"):
        ours(*batch_of(0))
    assert not ran


def test_copies_are_not_captured(ran):
    ours, plain = pair(ran)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(step(other, batch_of(0)), step(copy.deepcopy(plain), batch_of(0)))
    assert not ran
    assert_same_steps(ours, plain, [batch_of(0)])
    assert ran == ["forward", "backward"]


def test_compiled_it_ignores_the_graph(ran):
    ours, plain = pair(ran)
    torch._dynamo.reset()
    found = step(torch.compile(ours, fullgraph=True, backend="aot_eager"), batch_of(0))
    assert_same(found[:3], step(plain, batch_of(0))[:3])
    assert not ran


@pytest.mark.parametrize(
    ("settings", "kind", "error", "told"),
    [
        ({"start": False}, {}, RuntimeError, "clustering_active: expected True .*, got False"),
        ({"process_group": object()}, {}, ValueError, "process_group: expected None"),
        ({"false_negatives": lambda pairs: None}, {}, ValueError, "false_negatives: expected a word"),
        ({"backend": "torch"}, {}, ValueError, "anchors: expected .* 'triton' .*, got .* for 'torch'"),
        ({"workspace_bytes": 1000}, {}, ValueError, "anchors: expected .* for 'triton-chunked'"),
        ({}, {"dtype": torch.float64}, RuntimeError, "backend: 'triton' cannot run, float64"),
        ({"centroids": torch.ones(DIM, 6, device=DEVICE).T}, {}, ValueError, "centroids: expected float32"),
        ({"embedding_dim": 7}, {}, ValueError, "anchors: expected embedding_dim 7"),
    ],
)  # fmt: skip
def test_refusals(ran, settings, kind, error, told):
    loss_fn = started()
    if not settings.pop("start", True):
        loss_fn.initialized.fill_(False)
    set_to(**settings)(loss_fn)
    with pytest.raises(error, match=told) as refused:
        loss_fn.capture(*batch_of(0, **kind))
    assert "\n" not in str(refused.value)
    assert not ran


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_off_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.undo()
    loss_fn = started(centroid_momentum=0.3)
    before = loss_fn.centroids.clone()
    with pytest.raises(ValueError, match="anchors: expected a CUDA device to capture on, got cpu"):
        loss_fn.capture(*batch_of(0))
    assert_same_steps(loss_fn, copy.deepcopy(loss_fn), [batch_of(0)])
    assert not torch.equal(loss_fn.centroids, before)
