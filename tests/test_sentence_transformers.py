"""The loss in sentence-transformers: equal to theirs where it should be, in their Trainer, over a resume."""

from __future__ import annotations

import pytest
import sentence_transformers_worker as worker
import torch
from forked import start
from tiny import assert_close, assert_gradients_close, make_encoder

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="needs pip install sentence-transformers[train]")

from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from clusterns.sentence_transformers import STATE_FILE, ClusteringState, ClusterNSLoss

TEXTS = [f"{a} {b} {c}" for a in ("a", "the", "bird") for b in ("cat", "dog", "mat") for c in ("sat", "ran")]
pytestmark = pytest.mark.usefixtures("one_thread")
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@pytest.fixture
def model(tmp_path):
    make_encoder().save(tmp_path / "model")
    return SentenceTransformer(str(tmp_path / "model"), device="cpu")


@pytest.fixture
def still(tmp_path):
    """Without dropout."""
    encoder = make_encoder()
    for name in DROPOUTS:
        setattr(encoder.transformer.config, name, 0.0)
    encoder.save(tmp_path / "still")
    return SentenceTransformer(str(tmp_path / "still"), device="cpu")


def features(model, *columns):
    return [dict(model.preprocess(list(column))) for column in columns]


def loss_and_gradients(loss, model, *columns):
    model.zero_grad()
    model.train()
    value = loss(features(model, *columns), None)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


COLUMNS = {
    "pairs": (TEXTS[:7], TEXTS[7:14]),
    "a negative": (TEXTS[:6], TEXTS[6:12], TEXTS[12:18]),
    "negatives of two lengths": (TEXTS[:5], TEXTS[5:10], TEXTS[10:15], ["bird"] * 4 + ["the dog ran"]),
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_without_clusters_it_is_their_loss(still, columns, mini_batch_size):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    settings = {"hard_negatives": False, "mini_batch_size": mini_batch_size}
    ours, of_ours = loss_and_gradients(ClusterNSLoss(still, 0, **settings), still, *columns)
    theirs, of_theirs = loss_and_gradients(MultipleNegativesRankingLoss(still), still, *columns)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(of_ours) == list(of_theirs)
    assert any(gradient.abs().max() > 1e-3 for gradient in of_theirs.values())
    assert_gradients_close(of_ours.values(), of_theirs.values())


def test_one_column_is_two_dropout_views(model, still):
    for each, same in ((model, False), (still, True)):
        each.train()
        loss = ClusterNSLoss(each, 0, hard_negatives=False)
        loss(features(each, TEXTS[:6]))
        assert (float(loss.last["positive_cosine"]) > 1 - 1e-4) == same


def run(model, folder, *, steps, seed=3, resume=False, save_steps=1000, **more):
    loss = ClusterNSLoss(model, 4, start_cosine=1.0, centroid_momentum=0.1, **more)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=6,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=save_steps,
        logging_steps=1,
        report_to="none",
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        loss=loss,
        callbacks=[ClusteringState(loss)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return loss, trainer


def test_in_their_trainer(model, tmp_path):
    loss, trainer = run(model, tmp_path / "run", steps=8)
    assert bool(loss.objective.initialized)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 8
    before = loss.objective.centroids.clone()
    assert "eval_loss" in trainer.evaluate()
    assert torch.equal(loss.objective.centroids, before)
    model.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "deng-etal-2023-clustering" in card
    assert '"num_clusters": 4' in card
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_close(again.encode(TEXTS, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True))


def test_resume_keeps_the_clusters(tmp_path):
    """Their Trainer brings back model, optimiser and random numbers, the callback the centroids."""
    make_encoder().save(tmp_path / "model")

    def fresh():
        torch.manual_seed(0)
        return SentenceTransformer(str(tmp_path / "model"), device="cpu")

    folder = tmp_path / "run"
    whole, _ = run(fresh(), folder, steps=6, save_steps=3)
    kept = load_file(folder / "checkpoint-3" / STATE_FILE)
    assert not torch.equal(kept["centroids"], whole.objective.centroids)
    again, _ = run(fresh(), folder, steps=6, resume=str(folder / "checkpoint-3"), save_steps=1000)
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(again.objective.state_dict()[name], value), name
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)

    (folder / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="expected the clustering state of the checkpoint"):
        run(fresh(), folder, steps=6, resume=str(folder / "checkpoint-3"))


def test_bad_settings(model):
    with pytest.raises(ValueError, match="temperature: expected a number"):
        ClusterNSLoss(model, temperature=torch.nn.Parameter(torch.tensor(0.05)))
    with pytest.raises(ValueError, match="process_group: expected gather_across_devices"):
        ClusterNSLoss(model, process_group=None)
    with pytest.raises(ValueError, match="mini_batch_size: expected"):
        ClusterNSLoss(model, mini_batch_size=0)
    with pytest.raises(ValueError, match="embeddings: expected at least 2 tensors, got 1"):
        ClusterNSLoss(model).compute_loss_from_embeddings([torch.ones(2, 16)])
    cached = ClusterNSLoss(model, mini_batch_size=2)
    with pytest.raises(ValueError, match="mini_batch_size: expected None for a loss from embeddings"):
        cached.compute_loss_from_embeddings([torch.ones(2, 16)] * 2)


def test_ranks_equal_one_process(still, tmp_path):
    ranks = [start(worker.compare, rank, str(tmp_path / "still"), str(tmp_path / "met")) for rank in (0, 1)]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
