"""The options of the loop: what each changes, what it logs, and how it ends where it cannot go on."""

from __future__ import annotations

import csv
import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import assert_close
from train_problems import flags, log_of, refused, save_tiny_model, sentences, write_dev

from clusterns import ClusterNSLoss
from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.train import Run
from clusterns.training.checkpoint import Checkpoints
from clusterns.training.devices import Precision

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, one without dropout, sentences, triplets and a dev set."""
    root = tmp_path_factory.mktemp("options")
    save_tiny_model(root / "model", pooling="mean", std=0.2)
    save_tiny_model(root / "still", dropout=0.0, pooling="mean", std=0.2)
    texts = sentences(390)
    (root / "sentences.txt").write_text("\n".join(texts) + "\n")
    with (root / "triplets.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sent0", "sent1", "hard_neg"])
        rows.writerows(zip(texts[:130], texts[130:260], texts[260:], strict=True))
    write_dev(root / "sts")
    return root


def run(place, output, more: str, *, model: str = "model", file: str = "sentences.txt") -> list[dict]:
    """The figures of a run's steps."""
    given = [*more.split(), *([] if "tensorboard" in more else ["--no-tensorboard"])]
    assert main(flags(place / model, place / file, output, *given)) == 0
    return [record for record in log_of(output) if "loss" in record]


def test_three_columns_are_pairs_and_hard_negatives(place, tmp_path, monkeypatch):
    seen = []
    whole = ClusterNSLoss.forward

    def forward(self, anchors, positives, negatives=None):
        seen.append((anchors, positives, negatives))
        return whole(self, anchors, positives, negatives)

    monkeypatch.setattr(ClusterNSLoss, "forward", forward)
    more = "--max-steps 2 --text-columns sent0,sent1,hard_neg"
    run(place, tmp_path / "triplets", more, model="still", file="triplets.csv")
    with (place / "triplets.csv").open(newline="") as file:
        rows = [(row["sent0"], row["sent1"], row["hard_neg"]) for row in csv.DictReader(file)]
    encoder = SentenceEncoder.from_pretrained(place / "still").eval()
    # The first step's embeddings, through the head: those of 32 rows, each with its own pair and negative.
    anchors, positives, negatives = seen[0]
    assert anchors.shape == positives.shape == negatives.shape == (32, 32)
    with torch.no_grad():
        every = [encoder.project(encoder.encode(list(column))) for column in zip(*rows, strict=True)]
    for views in zip(anchors, positives, negatives, strict=True):
        distances = torch.stack(
            [(z - table).abs().amax(dim=1) for z, table in zip(views, every, strict=True)]
        )
        assert (distances < 1e-4).all(dim=0).sum() == 1
    seen.clear()
    run(place, tmp_path / "pairs", "--max-steps 1 --text-columns sent0,sent1", file="triplets.csv")
    assert seen[0][2] is None
    pairs_only = run(
        place, tmp_path / "cached", f"{more} --mini-batch-size 7", model="still", file="triplets.csv"
    )
    assert "effective_negatives" in pairs_only[0]


def test_accumulated_batches_are_averaged(place, tmp_path, monkeypatch):
    """One step over two batches has the mean of the gradients that each has alone."""
    gradients = {}
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, max_norm):
        gradients.setdefault(name, []).append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    # Steps so small that the second batch meets the same weights.
    for name, more in {"two": "--max-steps 1 --accumulation-steps 2", "one": "--max-steps 2"}.items():
        run(place, tmp_path / name, f"{more} --learning-rate 1e-12 --num-clusters 0", model="still")
    first, second = gradients["one"]
    assert_close(gradients["two"][0], (first + second) / 2, 1e-3)
    assert (first - second).norm() > 0.1 * first.norm()


def test_mlm_leaves_the_contrastive_input_alone(place, tmp_path):
    """Without dropout the first step's contrastive terms are those of a run without MLM."""
    without, with_mlm = (
        run(place, tmp_path / name, f"--max-steps 3 {more}", model="still")
        for name, more in (("without", ""), ("with", "--mlm-weight 0.1 --mlm-probability 0.3"))
    )
    for term in ("info_nce", "bml", "mean_cosine", "positive_cosine"):
        assert with_mlm[0][term] == pytest.approx(without[0][term], rel=1e-4)
    assert 4 < with_mlm[0]["mlm"] < 8  # log(500) = 6.2
    assert with_mlm[0]["loss"] == pytest.approx(without[0]["loss"] + 0.1 * with_mlm[0]["mlm"])
    assert with_mlm[2]["info_nce"] != without[2]["info_nce"]
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("without", "with")]
    assert names[0] == names[1]


def test_learned_temperature(place, tmp_path):
    records = run(place, tmp_path / "run", "--max-steps 4 --learn-temperature --temperature 0.1")
    values = [record["temperature"] for record in records]
    assert all(0.09 < value < 0.11 for value in values)
    assert len(set(values)) == 4
    assert float(load_file(tmp_path / "run" / "loss.safetensors")["temperature"]) == pytest.approx(values[-1])
    assert "temperature" not in run(place, tmp_path / "fixed", "--max-steps 1")[0]


@pytest.mark.parametrize(
    "more", ["--pooling mean-first-last", "--pooling cls-before-pooler", "--head always"]
)
def test_poolings_and_heads_are_saved(place, tmp_path, more):
    run(place, tmp_path / "run", f"--max-steps 1 {more}")
    encoder = SentenceEncoder.from_pretrained(tmp_path / "run")
    name, value = more.removeprefix("--").split()
    assert {"pooling": encoder.pooling, "head": encoder.head_use}[name] == value


def test_a_prompt_model_is_saved_with_its_templates(place, tmp_path):
    output = tmp_path / "run"
    texts = ["--template", 'about "[X]" : [MASK] .', "--second-template", "[MASK] says [X] ."]
    given = flags(place / "model", place / "sentences.txt", output, *texts, "--denoise", "frozen")
    assert main([*given, "--max-steps", "2", "--pooling", "mask", "--no-tensorboard"]) == 0
    encoder = SentenceEncoder.from_pretrained(output)
    assert encoder.prompt.templates == ('about "[X]" : [MASK] .', "[MASK] says [X] .")
    assert encoder.prompt.denoising == "frozen"
    assert encoder.pooling == "mask"


def test_tensorboard_has_the_figures_of_the_log(place, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = f"--max-steps 4 --eval-steps 2 --tensorboard --sts-dir {place / 'sts'}"
    records = run(place, tmp_path / "run", more)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    cosines = "positive nearest hard_negative mates mean centroids".split()
    assert {f"cosine/{name}" for name in cosines} < tags
    assert {"clusters/empty_clusters", "clusters/cluster_entropy", "clusters/with_mates"} < tags
    assert {"negatives/effective_negatives", "dev/spearman", "training/gradient_norm"} < tags
    entropy = [event.value for event in events.Scalars("clusters/cluster_entropy")]
    assert entropy == pytest.approx([r["cluster_entropy"] for r in records if "cluster_entropy" in r])


def test_compiled(place, tmp_path, monkeypatch):
    """The same run up to rounding, and files without a trace of it. Without code generation, for time."""
    compiling = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    more = "--max-steps 3 --num-clusters 0"
    plain, compiled = (
        [record["loss"] for record in run(place, tmp_path / name, f"{more}{flag}", model="still")]
        for name, flag in (("plain", ""), ("compiled", " --compile"))
    )
    assert compiled == pytest.approx(plain, rel=1e-3)
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("plain", "compiled")]
    assert names[0] == names[1]


def test_half_precision_with_a_scaled_loss(place, tmp_path, monkeypatch):
    """The path that CUDA takes, on the CPU: the loss is scaled, gradients are not; a checkpoint holds it."""
    half = Precision(torch.device("cpu"), torch.float16)
    plain = run(place, tmp_path / "fp32", "--max-steps 4 --num-clusters 0", model="still")
    monkeypatch.setattr(Precision, "choose", classmethod(lambda cls, name, device: half))
    more = "--max-steps 4 --num-clusters 0 --checkpoint-steps 2"
    records = run(place, tmp_path / "fp16", more, model="still")
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in plain], rel=0.05, abs=0.01)
    assert records[0]["gradient_norm"] == pytest.approx(plain[0]["gradient_norm"], rel=0.05)
    checkpoints = Checkpoints(tmp_path / "fp16", keep=2)
    last = checkpoints.last()
    assert checkpoints.read(last, "log.jsonl").training["scaler"]["scale"] == 65536
    shutil.rmtree(last)
    (tmp_path / "fp16" / "training.json").write_text("{}")
    before = load_file(tmp_path / "fp16" / "model.safetensors")
    assert run(place, tmp_path / "fp16", f"{more} --resume", model="still")[:2] == records[:2]
    after = load_file(tmp_path / "fp16" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_workers_change_nothing(place, tmp_path):
    for name, workers in (("none", "0"), ("two", "2")):
        more = f"--max-steps 5 --text-columns sent0 --num-workers {workers}"  # into a second epoch
        run(place, tmp_path / name, more, file="triplets.csv")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_equal_sentences_are_reported(place, tmp_path, capsys):
    texts = sentences(60)
    (tmp_path / "twice.txt").write_text("\n".join(texts + texts[:40]) + "\n")
    given = flags(place / "model", tmp_path / "twice.txt", tmp_path / "run", "--no-tensorboard")
    assert main(given) == 0
    record = next(record for record in log_of(tmp_path / "run") if record.get("event") == "equal texts")
    assert record["rows"] > 0
    assert f"{record['rows']} rows waited for a batch without an equal text" in capsys.readouterr().out


def test_clustering_that_cannot_start_is_told(place, tmp_path, capsys):
    run(place, tmp_path / "run", "--max-steps 3 --start-cosine -0.9")
    (record,) = [record for record in log_of(tmp_path / "run") if "event" in record]
    assert record["event"] == "clustering never started"
    assert "raise it above" in capsys.readouterr().out


def failing_at(monkeypatch, step: int, error: Exception) -> None:
    whole = Run.train_step

    def train_step(self, *, watched):
        if self.step == step:
            raise error
        return whole(self, watched=watched)

    monkeypatch.setattr(Run, "train_step", train_step)


def test_full_memory_says_what_helps(place, tmp_path, capsys, monkeypatch):
    failing_at(monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"))
    given = flags(place / "model", place / "sentences.txt", tmp_path / "run", "--no-tensorboard")
    message = refused(capsys, [*given, "--max-steps", "9"])
    assert "step 3: out of memory with --batch-size 32; what helps: --mini-batch-size 8" in message
    assert "--precision bf16" in message
    message = refused(
        capsys, [*given, "--max-steps", "9", "--overwrite-output-dir", "--mini-batch-size", "6"]
    )
    assert "what helps: --mini-batch-size 1" in message


def test_an_interrupt_says_what_is_left(place, tmp_path, capsys, monkeypatch):
    failing_at(monkeypatch, 3, KeyboardInterrupt())
    given = flags(place / "model", place / "sentences.txt", tmp_path / "run", "--no-tensorboard")
    assert main(given) == 130
    left = "step 3: no model was saved; --checkpoint-steps with --resume keeps more"
    assert capsys.readouterr().err.splitlines()[-2:] == ["clusterns: interrupted", left]
    assert main([*given, "--overwrite-output-dir", "--checkpoint-steps", "2"]) == 130
    last = tmp_path / "run" / "checkpoints" / "step-00000002"
    left = f"step 3: no model was saved; the last good checkpoint is {last}; --resume goes on from it"
    assert capsys.readouterr().err.splitlines()[-1] == left


def test_a_loss_that_turns_nan_names_step_and_checkpoint(place, tmp_path, capsys, monkeypatch):
    """The weights are spoilt in step 5, between two logged steps: the loss of step 6 is no number."""
    whole = Run.train_step

    def train_step(self, *, watched):
        terms = whole(self, watched=watched)
        if self.step == 5:
            with torch.no_grad():
                next(self.encoder.transformer.parameters()).fill_(float("nan"))
        return terms

    monkeypatch.setattr(Run, "train_step", train_step)
    output = tmp_path / "run"
    more = f"--max-steps 20 --eval-steps 3 --checkpoint-steps 2 --log-steps 8 --sts-dir {place / 'sts'}"
    given = flags(place / "model", place / "sentences.txt", output, *more.split(), "--no-tensorboard")
    message = refused(capsys, given)
    assert (
        "step 6: expected a finite loss and gradient, got NaN or infinity; the best model so far" in message
    )
    assert f"the last good checkpoint is {output / 'checkpoints' / 'step-00000004'}" in message
    kept = load_file(output / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    # Without the fault it goes on from there.
    monkeypatch.setattr(Run, "train_step", whole)
    assert main([*given, "--resume"]) == 0
    assert json.loads((output / "training.json").read_text())["finished"]


def test_models_that_are_none(place, tmp_path, capsys):
    for name, file in (("weights", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        shutil.copytree(place / "model", tmp_path / name)
        (tmp_path / name / file).unlink()
        given = flags(tmp_path / name, place / "sentences.txt", tmp_path / f"run-{name}")
        assert f"model: expected {name} (" in refused(capsys, given)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--precision fp16", "--precision: expected bf16 or fp32 on cpu, got fp16"),
        ("--template [X]", "template: expected one [MASK] or <mask>, got none"),
        ("--text-columns a,b", "text"),
        ("--backend triton", "backend: 'triton' cannot run"),
        ("--batch-size 500", "--batch-size: expected at most the 390 rows of"),
    ],
)
def test_options_that_cannot_be_had(place, tmp_path, capsys, more, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CLUSTERNS_DISABLE_TRITON", "1")
    given = flags(place / "model", place / "sentences.txt", tmp_path / "run", *more.split())
    assert message in refused(capsys, given)
