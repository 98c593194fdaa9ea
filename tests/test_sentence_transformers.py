"""The loss in sentence-transformers: theirs where it should be, in mini-batches, and in their Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="needs pip install sentence-transformers[train]")

from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.models import Router
from tiny import assert_close, assert_gradients_close, make_encoder, make_tokenizer

import clusterns
from clusterns.sentence_transformers import STATE_FILE, ClusteringState, ClusterNSLoss, StaticEmbedding

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the two views of every"),
]
# Of three words each, none twice.
PHRASES = [
    f"{a} {b} {c}" for a in ("a", "the", "bird") for b in ("cat", "dog", "mat") for c in ("sat", "ran")
]
TEXTS = Dataset.from_dict({"text": PHRASES})
PAIRS = Dataset.from_dict({"anchor": PHRASES[:12], "positive": PHRASES[6:]})
CLUSTERED = {"start_cosine": 1.0, "centroid_momentum": 0.1}
BOTH_WAYS = pytest.mark.parametrize("mini_batch_size", [None, 2])


def make_model(
    folder: Path, *, dropout: float = 0.0, seed: int = 0, pooling: str = "cls"
) -> SentenceTransformer:
    encoder = make_encoder(seed, pooling)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(encoder.transformer.config, name, dropout)
    encoder.save(folder)
    return SentenceTransformer(str(folder), device="cpu")


def preprocess(model: SentenceTransformer, texts: list[str], **settings: object) -> dict:
    # Its name before version 5.4.
    call = getattr(model, "preprocess", None) or model.tokenize
    return dict(call(list(texts), **settings))


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
@pytest.mark.parametrize("directions", ["one", "both"])
@BOTH_WAYS
def test_without_clusters_it_is_their_loss(still, columns, directions, mini_batch_size):
    columns = features(still, *columns)
    settings = {"hard_negatives": False, "mini_batch_size": mini_batch_size, "directions": directions}
    their = losses.MultipleNegativesRankingLoss
    if directions == "both":
        their = losses.MultipleNegativesSymmetricRankingLoss
    ours, of_ours = loss_and_gradients(ClusterNSLoss(still, 0, **settings), still, columns)
    theirs, of_theirs = loss_and_gradients(their(still), still, columns)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(of_ours) == list(of_theirs)
    assert any(gradient.abs().max() > 1e-3 for gradient in of_theirs.values())
    assert_gradients_close(of_ours.values(), of_theirs.values())


def test_one_column_is_two_dropout_views(still, tmp_path):
    """Without dropout they are the same, which is warned of."""
    column = features(still, PHRASES[:6])
    noisy = ClusterNSLoss(make_model(tmp_path / "model", dropout=0.1).train(), 0)
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


def by_hand(model, columns, widths):
    """Values and gradients of three steps, from a `clusterns.ClusterNSLoss` for each width."""
    of_widths = {width: clusterns.ClusterNSLoss(width, 3, **CLUSTERED) for width in widths}
    found = []
    for number in range(3):
        torch.manual_seed(number)
        model.zero_grad()
        embeddings = [model(dict(column))["sentence_embedding"] for column in columns]
        total = torch.zeros(())
        for width, weight in widths.items():
            cut = [F.normalize(rows[:, :width]) for rows in embeddings]
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


def test_what_is_refused(still):
    columns = features(still, PHRASES[:6], PHRASES[6:12])
    ours, learned = ClusterNSLoss(still, 3), torch.nn.Parameter(torch.tensor(0.05))
    layers, one_outside = losses.AdaptiveLayerLoss, "loss: expected one outside of AdaptiveLayerLoss"
    module = StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=16)
    static = SentenceTransformer(modules=[module], device="cpu")
    steps(static, features(static, PHRASES[:6], PHRASES[6:12]))
    for call, words in (
        (lambda: ClusterNSLoss(768), "model: expected a SentenceTransformer, got int; .* clusterns.Cluster"),
        (lambda: ClusterNSLoss(still, temperature=learned), "temperature: expected a number"),
        (lambda: ClusterNSLoss(still, mini_batch_size=0), "mini_batch_size: expected"),
        (lambda: ClusterNSLoss(static, mini_batch_size=2), "mini_batch_size: .* StaticEmbedding.*got 2"),
        (lambda: ClusteringState(clusterns.ClusterNSLoss(16)), "loss: expected a clusterns.sentence_transf"),
        (lambda: layers(still, ours)(columns, None), one_outside),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{words}"):
            call()


def compare_ranks(folder):
    """On each of two ranks: steps of the loss over both, as ragged as a last batch, and of one process."""
    columns = (PHRASES[:8], PHRASES[8:16])
    rows = (slice(0, 3), slice(3, 8))[dist.get_rank()]
    for mini_batch_size in (None, 3):
        settings = {**CLUSTERED, "mini_batch_size": mini_batch_size}
        alone, shared = (SentenceTransformer(folder, device="cpu") for _ in range(2))
        wrapped = DistributedDataParallel(shared, find_unused_parameters=True)
        of_one = ClusterNSLoss(alone, 3, **settings)
        of_all = ClusterNSLoss(shared, 3, gather_across_devices=True, **settings)
        of_all.model = wrapped  # as the Trainer does
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for number in range(3):
                torch.manual_seed(number)  # of the first pick
                value, expected = loss_and_gradients(of_one, alone, features(alone, *columns))
                torch.manual_seed(number)
                share = features(shared, *(column[rows] for column in columns))
                found, averaged = loss_and_gradients(of_all, wrapped, share)
                assert found == pytest.approx(value, rel=1e-4)
                assert_gradients_close(averaged.values(), expected.values())
        assert_states_close(of_all, of_one)
        cures = [warning for warning in warned if "gather_across_devices=True" in str(warning.message)]
        assert len(cures) == (dist.get_rank() == 0)  # of the loss without it


def test_ranks_equal_one_process(still, tmp_path):
    found = ranks.start(2, tmp_path / "met", compare_ranks, str(tmp_path / "still"))
    assert ranks.exit_codes(found) == [0, 0]


@pytest.fixture
def fresh(tmp_path):
    """The same model each time."""
    make_model(tmp_path / "model", dropout=0.1)
    return lambda: SentenceTransformer(str(tmp_path / "model"), device="cpu")


def make_loss(model, **settings):
    return ClusterNSLoss(model, 4, **CLUSTERED, **settings)


def make_trainer(loss, folder, data=TEXTS, *, callbacks=None, eval_dataset=None, **more):
    """Of the loss's model, or that of a dict's first loss; with training arguments."""
    model = (next(iter(loss.values())) if isinstance(loss, dict) else loss).model
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_steps": 1000,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    } | more
    return SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data,
        eval_dataset=eval_dataset,
        loss=loss,
        callbacks=[ClusteringState(loss)] if callbacks is None else callbacks,
    )


def assert_same(found, expected):
    for name, value in expected.objective.state_dict().items():
        assert torch.equal(found.objective.state_dict()[name], value), name
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resume_keeps_the_clusters(fresh, tmp_path):
    """Their Trainer brings back model, optimiser and random numbers, the callback the centroids."""
    folder = tmp_path / "run"

    def run(resume=None, **more):
        loss = make_loss(fresh())
        trainer = make_trainer(loss, folder, max_steps=6, eval_dataset=TEXTS, **more)
        trainer.train(resume_from_checkpoint=resume)
        return loss, trainer

    whole, trainer = run(save_steps=3)
    before = whole.objective.centroids.clone()
    assert "eval_loss" in trainer.evaluate()
    assert torch.equal(whole.objective.centroids, before)
    kept = load_file(folder / "checkpoint-3" / STATE_FILE)
    assert not torch.equal(kept["centroids"], before)
    assert sorted(path.name for path in (folder / "checkpoint-3").glob("*clusterns*")) == [STATE_FILE]
    assert_same(run(str(folder / "checkpoint-3"))[0], whole)

    whole.model.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "deng-etal-2023-clustering" in card
    assert '"num_clusters": 4' in card
    state = folder / "checkpoint-3" / STATE_FILE
    state.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="expected the clustering state of 4 clusters of dimension 16, got:"):
        run(str(state.parent))


@pytest.mark.parametrize("together", [True, False])
def test_each_of_two_losses_keeps_its_clusters(fresh, tmp_path, together):
    """One callback with what the Trainer has as loss, or one for each of them; one loss at two widths."""
    folder = tmp_path / "run"

    def run(resume=None, **more):
        model = fresh()
        a, b = make_loss(model), make_loss(model)
        given = {"a": a, "b/c": losses.MatryoshkaLoss(model, b, [16, 8])}
        callbacks = [ClusteringState(loss) for loss in ([given] if together else [a, b])]
        more |= {"callbacks": callbacks, "multi_dataset_batch_sampler": "round_robin"}
        trainer = make_trainer(given, folder, DatasetDict({"a": TEXTS, "b/c": PAIRS}), max_steps=4, **more)
        trainer.train(resume_from_checkpoint=resume)
        return a, b

    whole = run(save_steps=2)
    names = sorted(path.name for path in (folder / "checkpoint-2").glob("clusterns*"))
    assert names == ["clusterns_loss-a.safetensors", "clusterns_loss-b%2Fc.loss.safetensors"]
    kept = load_file(folder / "checkpoint-2" / names[1])
    assert sorted(kept) == ["8.centroids", "8.initialized", "centroids", "initialized"]
    for each, name in zip(whole, names, strict=True):
        assert each.objective.initialized
        assert torch.equal(each.objective.centroids, load_file(folder / "checkpoint-4" / name)["centroids"])
    assert not torch.equal(whole[0].objective.centroids, whole[1].objective.centroids)
    for found, expected in zip(run(str(folder / "checkpoint-2")), whole, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(("callbacks", "times"), [("none", 1), ("other", 1), ("own", 0)])
def test_checkpoints_without_clusters_are_warned_of(fresh, tmp_path, recwarn, callbacks, times):
    model = fresh()
    loss = make_loss(model)
    given = {"none": [], "other": [ClusteringState(make_loss(model))], "own": [ClusteringState(loss)]}
    make_trainer(loss, tmp_path / "run", callbacks=given[callbacks], max_steps=1).train()
    assert sum("callbacks=[ClusteringState(loss)]" in str(each.message) for each in recwarn) == times


def test_prompts_left_out_of_the_mean(tmp_path):
    """Whole and in mini-batches alike."""
    make_model(tmp_path / "mean", pooling="mean")
    found = []
    for mini_batch_size in (None, 2):
        model = SentenceTransformer(str(tmp_path / "mean"), device="cpu")
        model.set_pooling_include_prompt(False)
        loss = make_loss(model, mini_batch_size=mini_batch_size)
        loss.objective.start_from(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
        prompts = {"anchor": "the ", "positive": "far far "}
        make_trainer(loss, tmp_path / "run", PAIRS, prompts=prompts, optim="sgd").train()
        found.append(loss)
    whole, parts = found
    assert_close(parts.objective.centroids, whole.objective.centroids)
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert_close(one, other, 1e-3, least=1e-3)
