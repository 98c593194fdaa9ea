"""The loss in the Trainer of sentence-transformers, with all that one asks of it, over save and resume."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="needs pip install sentence-transformers[train]")

from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MatryoshkaLoss
from sentence_transformers_worker import PHRASES, make_model
from tiny import assert_close

from clusterns.sentence_transformers import STATE_FILE, ClusteringState, ClusterNSLoss

TEXTS = Dataset.from_dict({"text": PHRASES})
PAIRS = Dataset.from_dict({"anchor": PHRASES[:12], "positive": PHRASES[6:]})
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the two views of every"),
]


@pytest.fixture
def fresh(tmp_path):
    """The same model each time."""
    make_model(tmp_path / "model", dropout=0.1)
    return lambda: SentenceTransformer(str(tmp_path / "model"), device="cpu")


def make_loss(model, **settings):
    return ClusterNSLoss(model, 4, start_cosine=1.0, centroid_momentum=0.1, **settings)


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
    state.unlink()
    with pytest.raises(FileNotFoundError, match="expected the clustering state of the checkpoint"):
        run(str(state.parent))


@pytest.mark.parametrize("together", [True, False])
def test_each_of_two_losses_keeps_its_clusters(fresh, tmp_path, together):
    """One callback with what the Trainer has as loss, or one for each of them; one loss at two widths."""
    folder = tmp_path / "run"

    def run(resume=None, **more):
        model = fresh()
        losses = {"a": make_loss(model), "b/c": make_loss(model)}
        given = {"a": losses["a"], "b/c": MatryoshkaLoss(model, losses["b/c"], [16, 8])}
        callbacks = [ClusteringState(loss) for loss in ([given] if together else losses.values())]
        more |= {"callbacks": callbacks, "multi_dataset_batch_sampler": "round_robin"}
        trainer = make_trainer(given, folder, DatasetDict({"a": TEXTS, "b/c": PAIRS}), max_steps=4, **more)
        trainer.train(resume_from_checkpoint=resume)
        return list(losses.values())

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


@pytest.mark.parametrize(
    ("callbacks", "clusters", "save_strategy", "times"),
    [
        ("none", 4, "steps", 1),
        ("other", 4, "steps", 1),
        ("own", 4, "steps", 0),
        ("none", 4, "no", 0),
        ("none", 0, "steps", 0),
    ],
)
def test_checkpoints_without_clusters_are_warned_of(
    fresh, tmp_path, recwarn, callbacks, clusters, save_strategy, times
):
    model = fresh()
    loss = ClusterNSLoss(model, clusters, hard_negatives=clusters > 0)
    given = {"none": [], "other": [ClusteringState(make_loss(model))], "own": [ClusteringState(loss)]}
    more = {"save_strategy": save_strategy, "max_steps": 1}
    make_trainer(loss, tmp_path / "run", callbacks=given[callbacks], **more).train()
    assert sum("callbacks=[ClusteringState(loss)]" in str(each.message) for each in recwarn) == times


def test_a_new_model_begins_without_clusters(fresh, tmp_path):
    """As each trial of a hyperparameter search does."""
    loss = make_loss(fresh())
    make_trainer(loss, tmp_path / "run").train()
    assert loss.objective.initialized
    loss.model = torch.nn.Sequential(loss.model)  # wrapped
    assert loss.objective.initialized
    loss.model = fresh()
    assert not loss.objective.initialized


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
