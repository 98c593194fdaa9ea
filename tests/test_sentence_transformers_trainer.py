"""The loss in the Trainer of sentence-transformers, with all that one asks of it, over save and resume."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="needs pip install sentence-transformers[train]")

import sentence_transformers
import transformers
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MatryoshkaLoss
from sentence_transformers_worker import make_model
from tiny import assert_close
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend

import clusterns
from clusterns.sentence_transformers import STATE_FILE, ClusteringState, ClusterNSLoss

if sentence_transformers.__version__ < "5.2" and transformers.__version__ >= "5":
    pytest.skip("sentence-transformers before 5.2 trains with transformers 4 alone", allow_module_level=True)

TEXTS = [f"{a} {b} {c}" for a in ("a", "the", "bird") for b in ("cat", "dog", "mat") for c in ("sat", "ran")]
PAIRS = {"anchor": TEXTS[:12], "positive": TEXTS[6:]}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the two views of every"),
]


@pytest.fixture
def fresh(tmp_path):
    """The same model each time."""
    make_model(tmp_path / "model", dropout=0.1)
    return lambda: SentenceTransformer(str(tmp_path / "model"), device="cpu")


@pytest.fixture
def still(tmp_path):
    """The same each time, without dropout."""
    make_model(tmp_path / "still")
    return lambda: SentenceTransformer(str(tmp_path / "still"), device="cpu")


def make_loss(model, **settings):
    return ClusterNSLoss(model, 4, start_cosine=1.0, centroid_momentum=0.1, **settings)


def make_trainer(
    model, loss, folder, data=None, *, callbacks=None, eval_dataset=None, model_init=None, **more
):
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
        train_dataset=Dataset.from_dict({"text": TEXTS}) if data is None else data,
        eval_dataset=eval_dataset,
        loss=loss,
        model_init=model_init,
        callbacks=[ClusteringState(loss)] if callbacks is None else callbacks,
    )


def assert_same(found, expected):
    for name, value in expected.objective.state_dict().items():
        assert torch.equal(found.objective.state_dict()[name], value), name
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_in_their_trainer(fresh, tmp_path):
    model = fresh()
    loss = make_loss(model)
    data = Dataset.from_dict({"text": TEXTS})
    trainer = make_trainer(model, loss, tmp_path / "run", data, eval_dataset=data, max_steps=8)
    trainer.train()
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


def test_resume_keeps_the_clusters(fresh, tmp_path):
    """Their Trainer brings back model, optimiser and random numbers, the callback the centroids."""
    folder = tmp_path / "run"

    def run(resume=None, **more):
        loss = make_loss(fresh())
        make_trainer(loss.model, loss, folder, max_steps=6, **more).train(resume_from_checkpoint=resume)
        return loss

    whole = run(save_steps=3)
    kept = load_file(folder / "checkpoint-3" / STATE_FILE)
    assert not torch.equal(kept["centroids"], whole.objective.centroids)
    assert sorted(path.name for path in (folder / "checkpoint-3").glob("*clusterns*")) == [STATE_FILE]
    assert_same(run(str(folder / "checkpoint-3")), whole)

    (folder / "checkpoint-3" / STATE_FILE).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="expected the clustering state of 4 clusters of dimension 16, got:"):
        run(str(folder / "checkpoint-3"))
    (folder / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="expected the clustering state of the checkpoint"):
        run(str(folder / "checkpoint-3"))


@pytest.mark.parametrize(("sampler", "together"), [("round_robin", True), ("proportional", False)])
def test_each_of_two_losses_keeps_its_clusters(fresh, tmp_path, sampler, together):
    """One callback with what the Trainer has as loss, or one for each of them; one loss at two widths."""
    folder = tmp_path / "run"
    data = DatasetDict({"a": Dataset.from_dict({"text": TEXTS}), "b/c": Dataset.from_dict(PAIRS)})

    def run(steps, resume=None, **more):
        model = fresh()
        losses = {"a": make_loss(model), "b/c": make_loss(model)}
        given = {"a": losses["a"], "b/c": MatryoshkaLoss(model, losses["b/c"], [16, 8])}
        callbacks = [ClusteringState(loss) for loss in ([given] if together else losses.values())]
        trainer = make_trainer(
            model,
            given,
            folder,
            data,
            callbacks=callbacks,
            max_steps=steps,
            multi_dataset_batch_sampler=sampler,
            **more,
        )
        trainer.train(resume_from_checkpoint=resume)
        return list(losses.values())

    whole = run(8, save_steps=4)
    names = sorted(path.name for path in (folder / "checkpoint-4").glob("clusterns*"))
    assert names == ["clusterns_loss-a.safetensors", "clusterns_loss-b%2Fc.loss.safetensors"]
    assert sorted(load_file(folder / "checkpoint-4" / names[1])) == [
        "8.centroids",
        "8.initialized",
        "centroids",
        "initialized",
    ]
    for each, name in zip(whole, names, strict=True):
        assert each.objective.initialized
        assert torch.equal(each.objective.centroids, load_file(folder / "checkpoint-8" / name)["centroids"])
    assert not torch.equal(whole[0].objective.centroids, whole[1].objective.centroids)
    for found, expected in zip(run(8, str(folder / "checkpoint-4")), whole, strict=True):
        assert_same(found, expected)


def test_checkpoints_without_clusters_are_warned_of(fresh, tmp_path):
    def warned(*, state=None, save_strategy="steps", clusters=True):
        model = fresh()
        loss = make_loss(model) if clusters else ClusterNSLoss(model, 0, hard_negatives=False)
        callbacks = (
            [] if state is None else [ClusteringState({"own": loss, "other": make_loss(model)}[state])]
        )
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            make_trainer(
                model, loss, tmp_path / "run", callbacks=callbacks, save_strategy=save_strategy
            ).train()
        return sum("callbacks=[ClusteringState(loss)]" in str(each.message) for each in found)

    assert warned() == warned(state="other") == 1
    assert warned(state="own") == warned(save_strategy="no") == warned(clusters=False) == 0
    model = fresh().train()
    with warnings.catch_warnings(record=True) as found:  # a loop of one's own
        warnings.simplefilter("always")
        make_loss(model)([model.preprocess(TEXTS) if hasattr(model, "preprocess") else model.tokenize(TEXTS)])
    assert not found


class Backend:
    """Of a hyperparameter search in two trials."""

    name = "optuna"

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction):
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={}))


def test_hyperparameter_search(fresh, tmp_path, monkeypatch):
    """Each trial has a folder and a model of its own, and begins without clusters."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    loss = make_loss(fresh())
    trainer = make_trainer(None, loss, tmp_path / "run", model_init=fresh, save_steps=1)
    trainer.hyperparameter_search(lambda trial: {}, n_trials=2, backend="optuna")
    folders = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(STATE_FILE))
    assert folders == [f"run/run-{number}/checkpoint-{step}" for number in (0, 1) for step in (1, 2)]
    first, second = (
        load_file(tmp_path / "run" / f"run-{number}" / "checkpoint-2" / STATE_FILE) for number in (0, 1)
    )
    assert first["initialized"]
    assert torch.equal(first["centroids"], second["centroids"])  # the same trial again


class Recorder:
    """Features of each call of a model in training, as they come."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(self.record)

    def record(self, module, inputs):
        if module.training:
            self.calls.append(copy.deepcopy(inputs[0]))


def test_gradient_accumulation_is_by_hand(still, tmp_path):
    model, again = still(), still().train()
    loss = make_loss(model)
    by_hand = clusterns.ClusterNSLoss(16, 4, centroid_momentum=0.1)
    for objective in (loss.objective, by_hand):
        objective.start_from(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    recorder = Recorder(model)
    data = Dataset.from_dict(PAIRS)
    make_trainer(
        model,
        loss,
        tmp_path / "run",
        data,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.01,
        max_grad_norm=0.0,
        per_device_train_batch_size=3,
    ).train()
    columns = recorder.calls
    assert len(columns) == 8
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in again.parameters()]
    for number in range(0, 8, 2):
        pair = [again(dict(column))["sentence_embedding"] for column in columns[number : number + 2]]
        (by_hand(*pair) / 2).backward()
        if number % 4 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(loss.objective.centroids, by_hand.centroids)
    moved = 0
    for found, expected, start in zip(model.parameters(), again.parameters(), before, strict=True):
        assert_close(found - start, expected - start, 1e-2, least=1e-4)
        moved += bool((expected - start).abs().max() > 1e-4)
    assert moved > 10


PROMPTS = {
    "of a column": ({"anchor": "the ", "positive": "far "}, None, ["the", "far"]),
    "of a data set": ({"a": "home "}, "a", ["home", "home"]),
    "of a column of a data set": ({"a": {"positive": "far "}}, "a", [None, "far"]),
}


@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS)
def test_prompts(tmp_path, case):
    """Also where they are left out of the mean; whole and in mini-batches alike."""
    make_model(tmp_path / "mean", pooling="mean")
    prompts, name, words = case
    data = Dataset.from_dict(PAIRS)
    found = []
    for mini_batch_size in (None, 2):
        model = SentenceTransformer(str(tmp_path / "mean"), device="cpu")
        model.set_pooling_include_prompt(False)
        loss, recorder = make_loss(model, mini_batch_size=mini_batch_size), Recorder(model)
        loss.objective.start_from(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
        given = loss if name is None else {name: loss}
        make_trainer(
            model,
            given,
            tmp_path / "run",
            data if name is None else DatasetDict({name: data}),
            prompts=prompts,
            optim="sgd",
        ).train()
        found.append(loss)
        if mini_batch_size is None:
            begins = [
                model.tokenizer.convert_ids_to_tokens(call["input_ids"][:, 1]) for call in recorder.calls[:2]
            ]
            for begin, word in zip(begins, words, strict=True):
                assert (set(begin) == {word}) if word else (len(set(begin)) > 1)
    assert_close(found[1].objective.centroids, found[0].objective.centroids)
    for one, other in zip(found[1].model.parameters(), found[0].model.parameters(), strict=True):
        assert_close(one, other, 1e-3, least=1e-3)


@pytest.mark.parametrize(("precision", "mini_batch_size"), [("bf16", 2), ("fp16", None)])
def test_half_precision(still, tmp_path, precision, mini_batch_size):
    losses = []
    for more in ({}, {precision: True}):
        loss = make_loss(still(), mini_batch_size=mini_batch_size)
        trainer = make_trainer(loss.model, loss, tmp_path / "run", Dataset.from_dict(PAIRS), **more)
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
        assert loss.objective.initialized
        assert loss.objective.centroids.dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0] or precision == "fp16"  # which transformers 5 leaves out on a CPU
