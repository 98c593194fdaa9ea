"""The loss in sentence-transformers: as theirs where it should be, whole or in mini-batches, at any width."""

from __future__ import annotations

import copy

import pytest
import ranks
import torch
import torch.nn.functional as F

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="needs pip install sentence-transformers[train]")

import sentence_transformers_worker as worker
from sentence_transformers import SentenceTransformer, losses
from sentence_transformers.models import Router
from sentence_transformers_worker import PHRASES, make_model, preprocess
from tiny import assert_close, assert_gradients_close, make_tokenizer

import clusterns
from clusterns.sentence_transformers import ClusteringState, ClusterNSLoss, StaticEmbedding

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the two views of every"),
]
CLUSTERED = {"start_cosine": 1.0, "centroid_momentum": 0.1}
BOTH_WAYS = pytest.mark.parametrize("mini_batch_size", [None, 2])


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


COLUMNS = [
    (PHRASES[:7], PHRASES[7:14]),
    # Negatives of two lengths.
    (PHRASES[:5], PHRASES[5:10], PHRASES[10:15], ["bird"] * 4 + ["the dog ran"]),
]


@pytest.mark.parametrize("columns", COLUMNS, ids=len)
@BOTH_WAYS
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
    """Without dropout they are the same, which is warned of."""
    column = features(still, PHRASES[:6])
    noisy = ClusterNSLoss(make_model(tmp_path / "model", dropout=0.1).train(), 0, hard_negatives=False)
    noisy(column)
    assert float(noisy.last["positive_cosine"]) < 1 - 1e-4
    for mini_batch_size in (None, 2):
        loss = ClusterNSLoss(still.train(), 3, mini_batch_size=mini_batch_size)
        with pytest.warns(UserWarning, match="the two views of every sentence are the same.*dropout"):
            loss(column)
        assert float(loss.last["positive_cosine"]) > 1 - 1e-4


def test_router_takes_each_column_its_way(tmp_path):
    """Columns differ in what their features hold beside tensors; mini-batches of 3 lie across two of them."""
    routes = [list(make_model(tmp_path / name, seed=seed).children()) for seed, name in enumerate("qd")]
    model = SentenceTransformer(modules=[Router.for_query_document(*routes)], device="cpu")
    tasks = ["query", "document", "document", "query"]
    texts = [PHRASES[:4], PHRASES[4:8], PHRASES[8:12], ["bird", "far far home", "a", "mat"]]
    columns = [preprocess(model, some, task=task) for some, task in zip(texts, tasks, strict=True)]
    whole, loss = steps(model, columns)
    for route in ("query", "document"):
        assert sum(route in name and g.abs().max() > 1e-3 for name, g in whole[2][1].items()) > 10
    parts, cached = steps(model, columns, mini_batch_size=3)
    assert_steps_close(parts, whole)
    assert_states_close(cached, loss)


@BOTH_WAYS
def test_modules_may_change_features_in_place(still, mini_batch_size):
    """As pooling without the prompt does with the mask, in sentence-transformers 5."""
    seen = []

    def change(module, inputs, output):
        seen.append(inputs[0]["notes"].pop())
        inputs[0]["attention_mask"][:, 2:] = 0

    column = {**features(still, PHRASES[:6])[0], "notes": ["kept"]}
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
            cut = [F.normalize(rows) for rows in cut] if normalize else cut
            total = total + weight * of_widths[width](*cut)
        total.backward()
        found.append((total.item(), gradients(model)))
    return found, of_widths


@BOTH_WAYS
def test_matryoshka_has_centroids_for_each_width(still, mini_batch_size):
    widths = {16: 1.0, 8: 0.5, 4: 2.0}
    columns = features(still, PHRASES[:6], PHRASES[6:12], PHRASES[12:18])

    def wrap(loss):
        return losses.MatryoshkaLoss(still, loss, [4, 16, 8], [2.0, 1.0, 0.5])

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
        losses.MatryoshkaLoss(still.eval(), again, [16, 4])(columns, None)
    assert_states_close(again, loss)


@BOTH_WAYS
def test_truncate_dim_is_what_is_trained(tmp_path, mini_batch_size):
    model = make_model(tmp_path / "model", truncate_dim=8)
    columns = features(model, PHRASES[:6], PHRASES[6:12])
    found, loss = steps(model, columns, mini_batch_size=mini_batch_size)
    expected, of_widths = by_hand(model, columns, {8: 1.0}, normalize=False)
    assert_steps_close(found, expected)
    assert_close(loss.objective.centroids, of_widths[8].centroids)


def test_embeddings_in_place_of_features(still):
    """Also with mini-batches, which concern the model alone."""
    rows = torch.randn(2, 6, 16)
    for mini_batch_size in (None, 2):
        loss = ClusterNSLoss(still, 3, mini_batch_size=mini_batch_size)
        expected = clusterns.ClusterNSLoss(16, 3)(*rows)
        assert torch.equal(loss.compute_loss_from_embeddings([*rows]), expected)


def test_what_is_refused(still):
    columns = features(still, PHRASES[:6], PHRASES[6:12])
    # Such as texts flattened into one.
    flat = {"input_ids": torch.tensor([[2, 4, 3, 2, 5, 3]]), "cu_seq_lens_q": torch.tensor([0, 3, 6])}
    ours, learned = ClusterNSLoss(still, 3), torch.nn.Parameter(torch.tensor(0.05))
    in_parts, of_embeddings = ClusterNSLoss(still, mini_batch_size=2), ours.compute_loss_from_embeddings
    layers, one_outside = losses.AdaptiveLayerLoss, "loss: expected one outside of AdaptiveLayerLoss"
    module = StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=16)
    static = SentenceTransformer(modules=[module], device="cpu")
    steps(static, features(static, PHRASES[:6], PHRASES[6:12]))
    for call, words in (
        (lambda: ClusterNSLoss(768), "model: expected a SentenceTransformer, got int; .* clusterns.Cluster"),
        (lambda: ClusterNSLoss(still, temperature=learned), "temperature: expected a number"),
        (lambda: ClusterNSLoss(still, process_group=None), "process_group: expected gather_across_devices"),
        (lambda: ClusterNSLoss(still, mini_batch_size=0), "mini_batch_size: expected"),
        (lambda: ClusterNSLoss(static, mini_batch_size=2), "mini_batch_size: .* StaticEmbedding.*got 2"),
        (lambda: in_parts([flat, flat]), "mini_batch_size: .* equally many rows"),
        (lambda: of_embeddings([torch.ones(2, 16)]), "embeddings: .* at least 2 .*, got 1"),
        # But within MatryoshkaLoss.
        (lambda: of_embeddings([torch.ones(2, 8)] * 2), ".* embedding_dim 16, got shape"),
        (lambda: ClusteringState(clusterns.ClusterNSLoss(16)), "loss: expected a clusterns.sentence_transf"),
        (lambda: layers(still, ours)(columns, None), one_outside),
        (lambda: losses.Matryoshka2dLoss(still, ours, [16, 8])(columns, None), one_outside),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{words}"):
            call()


def test_ranks_equal_one_process(still, tmp_path):
    found = ranks.start(2, tmp_path / "met", worker.compare, str(tmp_path / "still"))
    assert ranks.exit_codes(found) == [0, 0]
