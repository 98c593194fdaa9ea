"""Mini-batches encoded twice must give what one graph over all of them gives, bit by bit of dropout."""

from __future__ import annotations

import contextlib

import cached_worker as worker
import pytest
import ranks
import torch
from compare import ROOM, assert_close_to_truth
from torch import nn

from clusterns import ClusterNSLoss
from clusterns.cached import CachedClusterNSLoss

DIM, WIDTH, CLUSTERS = 6, 8, 3


class Encoder(nn.Module):
    """An MLP with dropout that notes every call."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(DIM, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, WIDTH))
        self.to(dtype)
        torch.set_rng_state(generator_state)
        self.calls: list[tuple[int, bool]] = []  # rows, and whether a graph was built

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(inputs), torch.is_grad_enabled()))
        return self.layers(inputs)


def rows(count: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64).to(dtype)


def make_loss(kind=CachedClusterNSLoss, **settings):
    """Clustering starts with the first batch."""
    settings = {"start_cosine": 1.0, "bml_weight": 0.1, "centroid_momentum": 0.05, **settings}
    return kind(WIDTH, CLUSTERS, **settings)


def whole(loss_fn, encode, *parts, mini_batch_size):
    """The oracle: the same mini-batches in the same order, all in one graph."""
    size = mini_batch_size
    views = (torch.cat([encode(rows) for rows in part.split(size)]) for part in parts)
    return ClusterNSLoss.forward(loss_fn, *views)


def run_both(step, mini_batch_size, **settings):
    """Results of `step(loss_of_batch, encoder, loss_fn)` with the oracle and with the cached loss."""
    results = []
    for cached in (False, True):
        encoder = Encoder(settings.get("dtype", torch.float64))
        arguments = {name: value for name, value in settings.items() if name != "dtype"}
        if "temperature" in arguments:
            arguments["temperature"] = nn.Parameter(arguments["temperature"].clone())
        loss_fn = make_loss(
            *(() if cached else (ClusterNSLoss,)),
            **({"mini_batch_size": mini_batch_size} if cached else {}),
            **arguments,
        )

        def loss_of(*parts, cached=cached, encoder=encoder, loss_fn=loss_fn):
            if cached:
                return loss_fn(encoder, *parts)
            return whole(loss_fn, encoder, *parts, mini_batch_size=mini_batch_size)

        torch.manual_seed(1)
        losses = step(loss_of, encoder, loss_fn)
        gradients = {name: p.grad for name, p in (*encoder.named_parameters(), *loss_fn.named_parameters())}
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
        results.append(
            {
                "losses": losses,
                "gradients": gradients,
                "state": dict(loss_fn.state_dict()),
                "last": dict(loss_fn.last),
                "random": torch.get_rng_state(),
            }
        )
    return results


def assert_same(results, rounding=0.0):
    """Sums over mini-batches go in another order."""
    oracle, cached = results
    assert torch.equal(cached["random"], oracle["random"])
    pairs = [("losses", cached["losses"], oracle["losses"])]
    for part in ("gradients", "state", "last"):
        assert oracle[part].keys() == cached[part].keys()
        pairs += [(name, value, oracle[part][name]) for name, value in cached[part].items()]
    for name, found, truth in pairs:
        assert_close_to_truth(found, truth, condition=100, rounding=rounding, what=name)


@pytest.mark.parametrize("mini_batch_size", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("mined", [0, 7])
def test_equals_the_graph_over_the_whole_batch(mini_batch_size, mined):
    """Real dropout, three steps over the start of clustering, gradients added to those there are."""

    def step(loss_of, encoder, loss_fn):
        losses = []
        for seed in range(3):
            parts = [rows(10, seed), rows(10, seed + 50)] + [rows(mined, seed + 90)] * bool(mined)
            loss = loss_of(*parts)
            (loss * 3 + 1).backward()
            losses.append(loss.detach())
        assert loss_fn.clustering_active
        return torch.stack(losses)

    assert_same(run_both(step, mini_batch_size, temperature=torch.tensor(0.1, dtype=torch.float64)))


def test_dropout_matters_here():
    """Were the random numbers not replayed, the test above would see it."""
    encoder, loss_fn = Encoder(), make_loss(mini_batch_size=4)
    gradients = []
    for other_seed in (False, True):
        encoder.zero_grad()
        torch.manual_seed(1)
        loss = make_loss(mini_batch_size=4)(encoder, rows(10), rows(10))
        torch.manual_seed(2 if other_seed else 1)  # what the generator holds at backward is no matter
        loss.backward()
        gradients.append(encoder.layers[0].weight.grad.clone())
    assert_close_to_truth(*gradients, condition=100)
    encoder.zero_grad()
    torch.manual_seed(2)
    loss_fn(encoder, rows(10), rows(10)).backward()
    assert not torch.allclose(encoder.layers[0].weight.grad, gradients[0], rtol=0.05)


def test_backward_leaves_the_generator_alone():
    encoder, loss_fn = Encoder(), make_loss(mini_batch_size=4)
    loss = loss_fn(encoder, rows(10), rows(10))
    torch.manual_seed(77)
    before = torch.get_rng_state()
    loss.backward(retain_graph=True)
    assert torch.equal(torch.get_rng_state(), before)
    encoder.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_mini_batch_is_larger_and_each_is_encoded_twice():
    encoder, loss_fn = Encoder(), make_loss(mini_batch_size=4)
    loss = loss_fn(encoder, rows(10), rows(10), rows(5))
    first = [(count, False) for count in (4, 4, 2, 4, 4, 2, 4, 1)]
    assert encoder.calls == first
    loss.backward()
    assert encoder.calls == first + [(count, True) for count, _ in first]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "eval"])
def test_without_a_backward_pass_nothing_is_encoded_twice(mode):
    encoder, loss_fn = Encoder().eval(), make_loss(mini_batch_size=4)
    loss_fn(encoder, rows(10), rows(10))
    loss_fn.eval()
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    encoder.calls.clear()
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts.get(mode, contextlib.nullcontext)():
        loss = loss_fn(encoder, rows(10, 1), rows(10, 2))
        expected = whole(loss_fn, encoder, rows(10, 1), rows(10, 2), mini_batch_size=4)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == (mode == "eval")
    assert encoder.calls == [
        (count, mode == "eval" and late) for late in (False, True) for count in 2 * (4, 4, 2)
    ]
    assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("at_backward", [None, True, False])
def test_autocast_is_that_of_the_forward(enabled, at_backward):
    seen = []

    def step(loss_of, encoder, loss_fn):
        hook = encoder.layers[0].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(rows(10, dtype=torch.float32), rows(10, 1, dtype=torch.float32))
            if at_backward is None:  # inside the same one, whose cache holds what the first pass has cast
                loss.backward()
        if at_backward is not None:
            with torch.autocast("cpu", torch.bfloat16, enabled=at_backward):
                loss.backward()
        hook.remove()
        return loss.detach()

    results = run_both(step, 4, dtype=torch.float32)
    assert set(seen) == {torch.bfloat16 if enabled else torch.float32}
    assert_same(results, ROOM * torch.finfo(torch.bfloat16).eps if enabled else 0.0)


def test_gradient_scaler():
    def step(loss_of, encoder, loss_fn):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        loss = loss_of(rows(10), rows(10, 1))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return loss.detach()

    assert_same(run_both(step, 4))


def test_backward_twice():
    encoder, loss_fn = Encoder(), make_loss(mini_batch_size=4)
    loss = loss_fn(encoder, rows(10), rows(10))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in encoder.parameters()]
    loss.backward()
    for parameter, gradient in zip(encoder.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: {"x": x, "mask": torch.ones(len(x), dtype=torch.bool)},
        lambda x: (x, {"mask": torch.ones(len(x), dtype=torch.bool)}),
        lambda x: [x],
    ],
)
def test_forms_of_input(wrap):
    """`encode` gets what the loss got, some rows of it."""
    encoder, seen = Encoder().eval(), []

    def encode(inputs):
        seen.append(type(inputs))
        x = inputs if isinstance(inputs, torch.Tensor) else next(iter(dict(enumerate(inputs)).values()))
        x = inputs["x"] if isinstance(inputs, dict) else x
        mask = inputs.get("mask") if isinstance(inputs, dict) else None
        assert mask is None or len(mask) == len(x) <= 4
        return encoder(x)

    loss = make_loss(mini_batch_size=4)(encode, wrap(rows(10)), wrap(rows(10, 1)), wrap(rows(3, 2)))
    expected = make_loss(ClusterNSLoss)(
        *(encoder(rows(*arguments)) for arguments in ((10,), (10, 1), (3, 2)))
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert set(seen) == {type(wrap(rows(1)))}


def test_a_tokenizers_batch():
    """BatchEncoding of transformers; the two parts may be padded to different lengths."""
    from tiny import SENTENCES, make_encoder, make_tokenizer

    encoder, tokenizer = make_encoder(), make_tokenizer()
    parts = [tokenizer(texts, padding=True, return_tensors="pt") for texts in (SENTENCES[:3], SENTENCES[3:6])]
    loss = CachedClusterNSLoss(16, 2, mini_batch_size=2)(encoder, *parts)
    assert_close_to_truth(loss, ClusterNSLoss(16, 2)(*(encoder(part) for part in parts)), condition=100)
    loss.backward()
    assert encoder.transformer.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_state_dicts_interchange():
    cached, plain = make_loss(mini_batch_size=4), make_loss(ClusterNSLoss)
    cached(Encoder(), rows(10), rows(10))
    assert list(cached.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(cached.state_dict())
    assert plain.clustering_active
    assert torch.equal(plain.centroids, cached.centroids)
    make_loss(mini_batch_size=7).load_state_dict(plain.state_dict())
    assert "mini_batch_size=4" in repr(cached)


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_settings_and_inputs():
    refused(ValueError, "mini_batch_size: expected at least 1, got 0", lambda: make_loss(mini_batch_size=0))
    refused(TypeError, "mini_batch_size: expected an integer", lambda: make_loss(mini_batch_size=2.0))
    refused(TypeError, "unexpected keyword argument 'tau'", lambda: make_loss(tau=1))
    loss_fn, encoder, x = make_loss(mini_batch_size=4), Encoder(), rows(6)
    wrong = [
        (TypeError, "encode: expected a function of inputs, got Tensor", (x, x, x)),
        (
            TypeError,
            "anchors: expected a tensor, or a dict or tuple of tensors, got str",
            (encoder, "text", x),
        ),
        (TypeError, "positives: expected a tensor, .* got int", (encoder, x, {"x": x, "length": 3})),
        (ValueError, "anchors: expected tensors of at least one row, got none", (encoder, x[:0], x)),
        (ValueError, "negatives: expected tensors of at least one row, got none", (encoder, x, x, {})),
        (ValueError, r"anchors: expected tensors of shape \(rows, ...\), got a 0-dim", (encoder, x.sum(), x)),
        (
            ValueError,
            r"anchors: expected tensors of equally many rows, got \[6, 5\]",
            (encoder, (x, x[1:]), x),
        ),
        (ValueError, "positives: expected 6 rows to match anchors, got 5", (encoder, x, x[1:])),
        (
            ValueError,
            "anchors: expected inputs that require no gradient, got a tensor that does",
            (encoder, x.clone().requires_grad_(), x),
        ),
    ]
    for kind, message, arguments in wrong:
        refused(kind, message, lambda arguments=arguments: loss_fn(*arguments))
    assert encoder.calls == []


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda x: [x], "encode: expected a tensor of shape .* got list"),
        (lambda x: x[None], r"encode: expected 2 dimensions .* got shape \(1, 4, 6\)"),
        (lambda x: x[:1], "encode: expected 4 embeddings for 4 rows, got 1"),
        (lambda x: x.long(), "encode: expected float16, .* got torch.int64"),
        (lambda x: x.to("meta"), "encode: expected embeddings on the device of the loss .* got meta"),
        (lambda x: x, r"anchors: expected embedding_dim 8, got shape \(6, 6\)"),
    ],
)
def test_bad_embeddings(encode, message):
    refused(
        (TypeError, ValueError), message, lambda: make_loss(mini_batch_size=4)(encode, rows(6), rows(6, 1))
    )


def test_what_the_backward_pass_refuses():
    encoder, x = Encoder(), rows(6)
    loss = make_loss(mini_batch_size=4)(encoder, x, x)
    refused(
        RuntimeError,
        "create_graph: expected False",
        lambda: loss.backward(create_graph=True, retain_graph=True),
    )
    frozen = make_loss(mini_batch_size=4)(torch.no_grad()(encoder), x, x)
    refused(RuntimeError, "encode: expected embeddings that require a gradient", frozen.backward)
    loss = make_loss(mini_batch_size=4)(encoder, x, x)
    x.mul_(2)  # other inputs than those the loss was computed on
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_encoder_learns_a_temperature_only_if_asked():
    """`torch.autograd.grad` for the temperature alone does not encode again."""
    encoder = Encoder()
    temperature = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    loss = make_loss(mini_batch_size=4, temperature=temperature)(encoder, rows(10), rows(10, 1))
    calls = len(encoder.calls)
    (gradient,) = torch.autograd.grad(loss, temperature)
    assert gradient.abs() > 0
    assert len(encoder.calls) == calls


def test_ranks_equal_one_process(tmp_path):
    """Two processes with DistributedDataParallel, one of them with more mini-batches than the other."""
    output = tmp_path / "rank0.pt"
    found = ranks.start(2, tmp_path / "store", worker.run, str(output))
    assert ranks.exit_codes(found) == [0, 0]
    for how, result in torch.load(output, weights_only=True).items():
        torch.manual_seed(100)  # rank 0's generator
        model = worker.Encoder()
        torch.manual_seed(100)
        loss_fn = ClusterNSLoss(worker.WIDTH, 4, start_cosine=1.0, bml_weight=0.1)
        batches = [[torch.cat(part) for part in worker.data(step)] for step in range(worker.STEPS)]
        losses = worker.train(model, lambda *parts: loss_fn(*(model(part) for part in parts)), batches)  # noqa: B023
        assert loss_fn.clustering_active
        torch.testing.assert_close(result["losses"], losses)
        torch.testing.assert_close(result["weights"], dict(model.named_parameters()), msg=how)
        torch.testing.assert_close(result["centroids"], loss_fn.centroids)
        assert result["all_reduces"] == worker.STEPS, how  # one a step, not one a mini-batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_dropout_is_replayed_on_a_gpu():
    """The GPU's own generator, as in the first test; and inputs on the CPU that `encode` moves."""
    for place in ("cuda", "cpu"):
        gradients = []
        for cached in (False, True):
            encoder = Encoder(torch.float32).cuda()
            loss_fn = make_loss(CachedClusterNSLoss if cached else ClusterNSLoss).cuda()
            parts = [rows(10, seed, torch.float32).to(place) for seed in range(2)]
            encode = lambda x, encoder=encoder: encoder(x.cuda())  # noqa: E731
            torch.manual_seed(1)
            if cached:
                loss_fn.mini_batch_size = 4
                loss = loss_fn(encode, *parts)
            else:
                loss = whole(loss_fn, encode, *parts, mini_batch_size=4)
            before = torch.cuda.get_rng_state()
            loss.backward()
            assert torch.equal(torch.cuda.get_rng_state(), before)
            gradients.append(encoder.layers[0].weight.grad)
        assert_close_to_truth(*gradients, condition=100)
