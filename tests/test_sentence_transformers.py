"""The loss in sentence-transformers: as theirs where it should be, whole or in mini-batches, at any width."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="needs pip install sentence-transformers[train]")

import sentence_transformers
import sentence_transformers_worker as worker
from forked import start
from sentence_transformers import SentenceTransformer, losses
from sentence_transformers_worker import make_model, preprocess
from tiny import assert_close, assert_gradients_close, make_tokenizer

import clusterns
from clusterns.sentence_transformers import ClusteringState, ClusterNSLoss, StaticEmbedding

TEXTS = [f"{a} {b} {c}" for a in ("a", "the", "bird") for b in ("cat", "dog", "mat") for c in ("sat", "ran")]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the two views of every"),
]
CLUSTERED = {"start_cosine": 1.0, "centroid_momentum": 0.1}
VERSION = tuple(int(number) for number in sentence_transformers.__version__.split(".")[:2])


@pytest.fixture
def still(tmp_path):
    """Without dropout."""
    return make_model(tmp_path / "still")


def features(model, *columns):
    return [preprocess(model, column) for column in columns]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(loss, model, columns):
    model.zero_grad()
    model.train()
    value = loss(columns, None)
    value.backward()
    return value.item(), gradients(model)


def steps(model, columns, *, wrap=lambda loss: loss, **settings):
    """Values and gradients of three steps, the second and third with clusters; and the loss."""
    loss = ClusterNSLoss(model, 3, **CLUSTERED, **settings)
    outer, found = wrap(loss), []
    for number in range(3):
        torch.manual_seed(number)  # of the first pick
        found.append(loss_and_gradients(outer, model, columns))
    return found, loss


def assert_steps_close(found, expected):
    for (ours, of_ours), (theirs, of_theirs) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert list(of_ours) == list(of_theirs)
        assert_gradients_close(of_ours.values(), of_theirs.values())
    assert found[0][0] != pytest.approx(found[2][0], rel=1e-3)  # clusters count


def assert_states_close(found, expected):
    assert list(found.objective.state_dict()) == list(expected.objective.state_dict())
    for name, value in expected.objective.state_dict().items():
        if name.endswith("initialized"):
            assert found.objective.state_dict()[name]
        else:
            assert_close(found.objective.state_dict()[name], value)


COLUMNS = {
    "pairs": (TEXTS[:7], TEXTS[7:14]),
    "a negative": (TEXTS[:6], TEXTS[6:12], TEXTS[12:18]),
    "negatives of two lengths": (TEXTS[:5], TEXTS[5:10], TEXTS[10:15], ["bird"] * 4 + ["the dog ran"]),
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_without_clusters_it_is_their_loss(still, columns, mini_batch_size):
    columns = features(still, *columns)
    settings = {"hard_negatives": False, "mini_batch_size": mini_batch_size}
    ours, of_ours = loss_and_gradients(ClusterNSLoss(still, 0, **settings), still, columns)
    theirs, of_theirs = loss_and_gradients(losses.MultipleNegativesRankingLoss(still), still, columns)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(of_ours) == list(of_theirs)
    assert any(gradient.abs().max() > 1e-3 for gradient in of_theirs.values())
    assert_gradients_close(of_ours.values(), of_theirs.values())


def test_one_column_is_two_dropout_views(still, tmp_path):
    for model, same in ((make_model(tmp_path / "model", dropout=0.1), False), (still, True)):
        model.train()
        loss = ClusterNSLoss(model, 0, hard_negatives=False)
        loss(features(model, TEXTS[:6]))
        assert (float(loss.last["positive_cosine"]) > 1 - 1e-4) == same


def test_one_column_without_dropout_is_warned_of(still):
    still.train()
    for mini_batch_size in (None, 2):
        loss = ClusterNSLoss(still, 3, mini_batch_size=mini_batch_size)
        with pytest.warns(UserWarning, match="the two views of every sentence are the same.*dropout"):
            loss(features(still, TEXTS[:6]))


def test_router_takes_each_column_its_way(tmp_path):
    """Columns differ in what their features hold beside tensors; mini-batches of 3 lie across two of them."""
    try:
        from sentence_transformers.base.modules import Router
    except ImportError:
        from sentence_transformers.models import Router

    routes = [list(make_model(tmp_path / name, seed=seed).children()) for seed, name in enumerate("qd")]
    model = SentenceTransformer(modules=[Router.for_query_document(*routes)], device="cpu")
    tasks = ["query", "document", "document", "query"]
    columns = [
        preprocess(model, TEXTS[4 * number : 4 * number + 4], task=task) for number, task in enumerate(tasks)
    ]
    columns[3] = preprocess(model, ["bird", "far far home", "a", "mat"], task="query")
    whole, loss = steps(model, columns)
    for route in ("query", "document"):
        assert sum(route in name and g.abs().max() > 1e-3 for name, g in whole[2][1].items()) > 10
    for mini_batch_size in (2, 3):
        parts, cached = steps(model, columns, mini_batch_size=mini_batch_size)
        assert_steps_close(parts, whole)
        assert_states_close(cached, loss)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_modules_may_change_features_in_place(still, mini_batch_size):
    """As pooling without the prompt does with the mask, in sentence-transformers 5."""
    seen = []

    def change(module, inputs, output):
        seen.append(inputs[0]["notes"].pop())
        inputs[0]["attention_mask"][:, 2:] = 0

    column = {**features(still, TEXTS[:6])[0], "notes": ["kept"]}
    before = copy.deepcopy(column)
    whole, _ = steps(still, [column])
    still.register_forward_hook(change)
    spoilt, loss = steps(still, [column], mini_batch_size=mini_batch_size)
    assert len(seen) == (6 if mini_batch_size is None else 36)
    assert_steps_close(spoilt, whole)
    assert float(loss.last["positive_cosine"]) > 1 - 1e-4
    assert column["notes"] == ["kept"]
    assert list(column) == list(before)
    assert torch.equal(column["input_ids"], before["input_ids"])
    assert torch.equal(column["attention_mask"], before["attention_mask"])


def by_hand(model, columns, widths, *, normalize=True):
    """Values and gradients of three steps, from a `clusterns.ClusterNSLoss` for each width."""
    of_widths = {width: clusterns.ClusterNSLoss(width, 3, **CLUSTERED) for width in widths}
    found = []
    for number in range(3):
        torch.manual_seed(number)
        model.zero_grad()
        embeddings = [model(dict(column))["sentence_embedding"] for column in columns]
        total = torch.zeros(())
        for width, weight in widths.items():
            cut = [rows[:, :width] for rows in embeddings]
            total = total + weight * of_widths[width](
                *([F.normalize(rows) for rows in cut] if normalize else cut)
            )
        total.backward()
        found.append((total.item(), gradients(model)))
    return found, of_widths


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_matryoshka_has_centroids_for_each_width(still, mini_batch_size):
    widths = {16: 1.0, 8: 0.5, 4: 2.0}
    columns = features(still, TEXTS[:6], TEXTS[6:12], TEXTS[12:18])

    def wrap(loss):
        return losses.MatryoshkaLoss(still, loss, [4, 16, 8], [2.0, 1.0, 0.5])

    if mini_batch_size is not None and VERSION < (5, 7):
        with pytest.raises(ValueError, match="mini_batch_size: expected None within MatryoshkaLoss"):
            steps(still, columns, wrap=wrap, mini_batch_size=mini_batch_size)
        return
    found, loss = steps(still, columns, wrap=wrap, mini_batch_size=mini_batch_size)
    expected, of_widths = by_hand(still, columns, widths)
    assert_steps_close(found, expected)
    for width, other in of_widths.items():
        assert_close(loss.objective.of_width(width).centroids, other.centroids)
    again = ClusterNSLoss(still, 3, **CLUSTERED)
    again.objective.load_state_dict(loss.objective.state_dict())
    assert_states_close(again, loss)
    assert len(again.objective.state_dict()) == 6
    with torch.no_grad():  # as in evaluation
        still.eval()
        value = losses.MatryoshkaLoss(still, again, [16, 4])(columns, None)
    assert_states_close(again, loss)
    assert value > 0


def test_matryoshka_moves_only_the_drawn_width(still):
    columns = features(still, TEXTS[:6], TEXTS[6:12])
    loss = ClusterNSLoss(still, 3, **CLUSTERED)
    outer = losses.MatryoshkaLoss(still, loss, [8, 4], n_dims_per_step=1)
    random.seed(0)  # which draws the widths
    still.train()
    for _ in range(6):
        outer(columns, None)
    before = {width: loss.objective.of_width(width).centroids.clone() for width in (8, 4)}
    assert all(value.any() for value in before.values())
    assert not loss.objective.centroids.any()
    outer(columns, None)
    assert sum(torch.equal(loss.objective.of_width(width).centroids, before[width]) for width in (8, 4)) == 1


@pytest.mark.parametrize("wrapper", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_layers_are_refused(still, wrapper):
    more = [[16, 8]] if wrapper == "Matryoshka2dLoss" else []
    outer = getattr(losses, wrapper)(still, ClusterNSLoss(still, 3), *more)
    with pytest.raises(ValueError, match="loss: expected one outside of AdaptiveLayerLoss"):
        outer(features(still, TEXTS[:6], TEXTS[6:12]), None)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_truncate_dim_is_what_is_trained(tmp_path, mini_batch_size):
    model = make_model(tmp_path / "model", truncate_dim=8)
    columns = features(model, TEXTS[:6], TEXTS[6:12])
    found, loss = steps(model, columns, mini_batch_size=mini_batch_size)
    expected, of_widths = by_hand(model, columns, {8: 1.0}, normalize=False)
    assert_steps_close(found, expected)
    assert_close(loss.objective.centroids, of_widths[8].centroids)


def test_static_embeddings_take_a_column_whole():
    model = SentenceTransformer(
        modules=[StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=16)], device="cpu"
    )
    found, _ = steps(model, features(model, TEXTS[:6], TEXTS[6:12]))
    assert found[2][1]
    with pytest.raises(
        ValueError, match="mini_batch_size: expected None for a model with a StaticEmbedding.*got 2"
    ):
        ClusterNSLoss(model, mini_batch_size=2)


def test_features_without_rows_are_refused(still):
    """Such as texts flattened into one."""
    column = {"input_ids": torch.tensor([[2, 4, 3, 2, 5, 3]]), "cu_seq_lens_q": torch.tensor([0, 3, 6])}
    with pytest.raises(
        ValueError, match="mini_batch_size: expected None for features without equally many rows"
    ):
        ClusterNSLoss(still, 0, hard_negatives=False, mini_batch_size=2)([column, column])


def test_embeddings_in_place_of_features(still):
    """Also with mini-batches, which concern the model alone."""
    rows = torch.randn(2, 6, 16)
    for mini_batch_size in (None, 2):
        loss = ClusterNSLoss(still, 3, mini_batch_size=mini_batch_size)
        expected = clusterns.ClusterNSLoss(16, 3)(*rows)
        assert torch.equal(loss.compute_loss_from_embeddings([*rows]), expected)


def test_bad_settings(still):
    with pytest.raises(
        TypeError, match="model: expected a SentenceTransformer, got int; .* clusterns.ClusterNSLoss"
    ):
        ClusterNSLoss(768)
    with pytest.raises(ValueError, match="temperature: expected a number"):
        ClusterNSLoss(still, temperature=torch.nn.Parameter(torch.tensor(0.05)))
    with pytest.raises(ValueError, match="process_group: expected gather_across_devices"):
        ClusterNSLoss(still, process_group=None)
    with pytest.raises(ValueError, match="mini_batch_size: expected"):
        ClusterNSLoss(still, mini_batch_size=0)
    with pytest.raises(ValueError, match="embeddings: expected at least 2 tensors, got 1"):
        ClusterNSLoss(still).compute_loss_from_embeddings([torch.ones(2, 16)])
    with pytest.raises(ValueError, match="expected embedding_dim 16, got shape"):  # outside of MatryoshkaLoss
        ClusterNSLoss(still).compute_loss_from_embeddings([torch.ones(2, 8)] * 2)
    with pytest.raises(TypeError, match="loss: expected a clusterns.sentence_transformers.ClusterNSLoss"):
        ClusteringState(clusterns.ClusterNSLoss(16))


def test_ranks_equal_one_process(still, tmp_path):
    ranks = [start(worker.compare, rank, str(tmp_path / "still"), str(tmp_path / "met")) for rank in (0, 1)]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
