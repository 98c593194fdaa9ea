"""`clusterns train` on a tiny encoder: what it writes, what options change, how it ends, what it refuses."""

from __future__ import annotations

import csv
import functools
import io
import shutil
import sys

import pytest
import torch
import train_problems
from safetensors.torch import load_file
from test_docstrings import write_packages
from tiny import assert_close
from train_problems import command, log_of, refused, run, same_bits, summary_of, write_place

from clusterns import ClusterNSLoss
from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.files import holding
from clusterns.train import Run
from clusterns.training import task
from clusterns.training.checkpoint import Checkpoints
from clusterns.training.devices import Precision
from clusterns.training.figure import draw_run

pytestmark = pytest.mark.usefixtures("one_thread", "no_picture")


SIMCSE = "--max-steps 4 --num-clusters 0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def clustered(place, no_picture):
    """A run without dropout, whose masks depend on the order of the passes; others are held against it."""
    return run(place, place / "clustered", "--max-steps 6", model="still")


@pytest.fixture(scope="module")
def plain(place, no_picture):
    return run(place, place / "plain", SIMCSE, model="still")


def test_a_run_writes_what_it_says(place, tmp_path, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("clusterns.train.draw_run", draw_run)
    output = tmp_path / "run"
    terms = run(place, output, "STS --max-steps 12 --eval-steps 4 --patience 0 --report-to tensorboard")
    records = log_of(output)
    assert [record["step"] for record in terms] == list(range(1, 13))
    assert [record["step"] for record in records if "dev" in record] == [0, 4, 8, 12]
    assert [r["step"] for r in records if r.get("event") == "clustering starts"] == [1]
    assert ["nearest_cosine" in record for record in terms] == [False] + [True] * 11
    assert records[-1]["dev"].keys() == {"spearman", "alignment", "uniformity"}

    summary = summary_of(output)
    assert summary["settings"]["num_clusters"] == 4
    best = max(records, key=lambda r: r.get("dev", {}).get("spearman", -100))
    assert (summary["best_step"], summary["scores"]["after"]) == (best["step"], best["dev"])
    assert "before" in (printed := capsys.readouterr().out)
    assert "after" in printed
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert load_file(output / "loss.safetensors")["centroids"].shape == (4, 32)
    assert list(output.glob(".*")) == []
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    cosines = "positive nearest hard_negative mates mean centroids".split()
    others = "clusters/empty_clusters clusters/cluster_entropy clusters/with_mates dev/spearman"
    others += " negatives/effective_negatives training/gradient_norm"
    assert {*(f"cosine/{name}" for name in cosines), *others.split()} < set(events.Tags()["scalars"])
    entropy = [event.value for event in events.Scalars("clusters/cluster_entropy")]
    assert entropy == pytest.approx([r["cluster_entropy"] for r in terms if "cluster_entropy" in r])


def test_the_default_run_in_short(tmp_path, monkeypatch, capsys):
    """`clusterns train` with no model: documentation, its vocabulary and a new BERT, a few steps."""
    corpus, packages = task.docstring_corpus, write_packages(tmp_path / "packages")
    monkeypatch.setattr(task, "docstring_corpus", lambda seed: corpus(roots=[packages], seed=seed, pairs=20))
    output = tmp_path / "run"
    short = "--max-steps 20 --batch-size 32 --num-clusters 8 --eval-steps 20 --start-cosine 0.9".split()
    assert main(["train", "--output-dir", str(output), "--device", "cpu", *short]) == 0
    before, after = (record["dev"]["mrr"] for record in log_of(output) if "dev" in record)
    assert 0 < before < after
    settings = summary_of(output)["settings"]
    assert (settings["pooling"], settings["learning_rate"], settings["batch_size"]) == ("mean", 1e-3, 32)
    printed = capsys.readouterr().out
    assert "clustering starts with 8 centroids" in printed
    assert "clusterns train --model MODEL --train-file FILE" in printed


def test_the_same_bits_again_whoever_tokenises(place, tmp_path):
    """Into a second epoch, the temperature learned."""
    more = "--max-steps 5 --text-columns sent0 --learn-temperature --temperature 0.1 --num-workers"
    one, two = (
        run(place, tmp_path / workers, f"{more} {workers}", file="triplets.csv") for workers in ("0", "2")
    )
    for file in ("model.safetensors", "head.safetensors", "loss.safetensors"):
        assert same_bits(tmp_path / "0" / file, tmp_path / "2" / file)
    assert not same_bits(tmp_path / "0" / "head.safetensors", place / "model" / "head.safetensors")
    values = [record["temperature"] for record in one]
    assert values == [record["temperature"] for record in two]
    assert len(set(values)) == 5
    assert all(0.09 < value < 0.11 for value in values)
    assert float(load_file(tmp_path / "0" / "loss.safetensors")["temperature"]) == pytest.approx(values[-1])


def test_early_stop_keeps_the_best(place, tmp_path, monkeypatch):
    """A dev score that only falls ends the run after `patience` evaluations and keeps the first model."""
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(task, "sts_dev", lambda encoder, sts_dir: {"spearman": float(next(falling))})
    terms = run(place, tmp_path / "run", "STS --max-steps 50 --eval-steps 2 --patience 3")
    assert terms[-1]["step"] == 6
    assert same_bits(*(folder / "head.safetensors" for folder in (tmp_path / "run", place / "model")))


def test_mini_batches_train_as_the_whole_batch_does(place, clustered, tmp_path, monkeypatch):
    lengths = set()
    forward = SentenceEncoder.forward

    def watched(self, inputs, **options):
        lengths.add(len(inputs["input_ids"]))
        return forward(self, inputs, **options)

    monkeypatch.setattr(SentenceEncoder, "forward", watched)
    records = run(place, tmp_path, "--max-steps 6 --mini-batch-size 5", model="still")
    assert max(lengths) == 5
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in clustered], rel=2e-4)
    train_problems.assert_trained_alike(place / "still", place / "clustered", tmp_path)


@pytest.mark.parametrize("more", ["", " --mini-batch-size 8"])
def test_gradient_checkpointing_changes_no_bit(place, tmp_path, monkeypatch, more):
    """With dropout; the activations within the layers are not kept, but when they are computed again."""
    kept = {}
    for name in ("plain", "checkpointing"):
        seen = kept[name] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            flag = " --gradient-checkpointing" if name == "checkpointing" else ""
            run(place, tmp_path / name, f"--max-steps 3{more}{flag}")
    assert same_bits(tmp_path / "plain", tmp_path / "checkpointing")
    assert log_of(tmp_path / "plain")[-1]["loss"] == log_of(tmp_path / "checkpointing")[-1]["loss"]
    assert sum(kept["checkpointing"]) < sum(kept["plain"]) / 2


def test_a_model_that_cannot_compute_again(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.BertModel.supports_gradient_checkpointing", False)
    message = refused(capsys, command(place, tmp_path / "run", "--gradient-checkpointing"))
    assert "--gradient-checkpointing: expected a model that " in message
    assert "got BertModel; --mini-batch-size" in message
    assert not (tmp_path / "run").exists()


def test_three_columns_are_pairs_and_hard_negatives(place, tmp_path, monkeypatch):
    seen = []
    whole = ClusterNSLoss.forward

    def forward(self, anchors, positives, negatives=None):
        seen.append((anchors, positives, negatives))
        return whole(self, anchors, positives, negatives)

    monkeypatch.setattr(ClusterNSLoss, "forward", forward)
    names = {"model": "still", "file": "triplets.csv"}
    more = "--max-steps 1 --batch-size 130 --text-columns sent0,sent1"
    run(place, tmp_path / "triplets", f"{more},hard_neg", **names)
    run(place, tmp_path / "pairs", more, **names)
    with (place / "triplets.csv").open(newline="") as file:
        columns = list(zip(*list(csv.reader(file))[1:], strict=True))
    encoder = SentenceEncoder.from_pretrained(place / "still").eval()
    with torch.no_grad():
        every = torch.cat([encoder.project(encoder.encode(column)) for column in columns], dim=1)
    # One batch of all rows in another order, through the head, each with its own pair and negative.
    rows = torch.cat(seen[0], dim=1)
    order = torch.cdist(rows, every).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(130))
    assert_close(rows, every[order], 1e-3)
    assert seen[1][2] is None


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


def test_mlm_leaves_the_contrastive_input_alone(place, clustered, tmp_path):
    records = run(place, tmp_path, "--max-steps 6 --mlm-weight 0.1 --mlm-probability 0.3", model="still")
    for term in ("info_nce", "bml", "mean_cosine", "positive_cosine"):
        assert records[0][term] == pytest.approx(clustered[0][term], rel=1e-4)
    assert 4 < records[0]["mlm"] < 8  # log(500) = 6.2
    assert records[0]["loss"] == pytest.approx(clustered[0]["loss"] + 0.1 * records[0]["mlm"])
    assert records[2]["info_nce"] != clustered[2]["info_nce"]
    names = [load_file(folder / "model.safetensors").keys() for folder in (place / "clustered", tmp_path)]
    assert names[0] == names[1]


def test_pooling_head_and_prompt_are_those_of_the_saved_model(place, tmp_path):
    templates = ('about"[X]":[MASK].', "[MASK]says[X].")
    prompt = f"--pooling mask --denoise frozen --template {templates[0]} --second-template {templates[1]}"
    for number, (more, pooling, head) in enumerate(
        (
            ("--pooling mean-first-last --head always", "mean-first-last", "always"),
            ("--head none", "mean", "none"),
            (prompt, "mask", "train"),
        )
    ):
        output = tmp_path / str(number)
        assert "temperature" not in run(place, output, f"--max-steps 2 {more}")[0]
        encoder = SentenceEncoder.from_pretrained(output)
        assert (encoder.pooling, encoder.head_use) == (pooling, head)
        assert (output / "head.safetensors").exists() == (head != "none")
    assert (encoder.prompt.templates, encoder.prompt.denoising) == (templates, "frozen")


def test_compiled(place, plain, tmp_path, monkeypatch):
    """The same run up to rounding, and files without a trace of it. Without code generation, for time."""
    compiling = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    records = run(place, tmp_path, f"{SIMCSE} --compile", model="still")
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in plain], rel=1e-3)
    names = [load_file(folder / "model.safetensors").keys() for folder in (place / "plain", tmp_path)]
    assert names[0] == names[1]
    assert not any("event" in record for record in log_of(tmp_path))  # SimCSE never clusters


def test_half_precision_with_a_scaled_loss(place, plain, tmp_path, monkeypatch):
    """The path that CUDA takes, on the CPU: the loss is scaled, gradients are not; a checkpoint holds it."""
    half, output = Precision(torch.device("cpu"), torch.float16), tmp_path / "fp16"
    monkeypatch.setattr(Precision, "choose", classmethod(lambda cls, name, device: half))
    more = f"{SIMCSE} --checkpoint-steps 2"
    records = run(place, output, more, model="still")
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in plain], rel=0.05, abs=0.01)
    assert records[0]["gradient_norm"] == pytest.approx(plain[0]["gradient_norm"], rel=0.05)
    checkpoints = Checkpoints(output, keep=2)
    last = checkpoints.last()
    assert checkpoints.read(last, "log.jsonl").training["scaler"]["scale"] == 65536
    shutil.rmtree(last)
    (output / "training.json").write_text("{}")
    before = (output / "model.safetensors").rename(tmp_path / "before.safetensors")
    assert run(place, output, f"{more} --resume", model="still")[:2] == records[:2]
    assert same_bits(before, output / "model.safetensors")


def test_output_folder_is_guarded(place, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    given = command(place, output, "--max-steps 1 --checkpoint-steps 1 --seed 1")
    assert main(given) == 0
    before = (output / "model.safetensors").read_bytes()
    assert "holds files; choose another or pass --overwrite-output-dir" in refused(capsys, given)
    assert (output / "model.safetensors").read_bytes() == before
    with holding(output / ".lock"):
        assert "in use by a running training" in refused(capsys, [*given, "--overwrite-output-dir"])
    (tmp_path / "link").symlink_to(output)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(command(place, "~/link", "--overwrite-output-dir --max-steps 1")) == 0
    assert (tmp_path / "link").is_symlink()
    assert (output / "model.safetensors").read_bytes() != before
    model, long = place / "model", tmp_path / "x" / ("y" * 300)
    best = output / "checkpoints" / "step-00000001" / "best"
    for start, folder, words in (
        (model, place / "sentences.txt", "--output-dir: expected a folder, got the file"),
        (model, model, f"--output-dir: expected another folder than that of --model {model}, got"),
        (best, output, "--output-dir: expected another folder than that of --model"),
        (model, long, f"--output-dir: expected a folder that can be written to, got {long} ("),
    ):
        message = refused(capsys, command(place, folder, "--overwrite-output-dir", model=start))
        assert words in message
        assert "Errno" not in message
    assert not (tmp_path / "x").exists()


def test_what_a_failed_start_leaves(place, tmp_path, capsys, monkeypatch):
    """Nothing, whether it fails at once or in the first step."""

    def fail(*_, **__):
        raise ValueError("expected to go on")

    given = command(place, tmp_path / "a" / "b", "STS --max-steps 1")
    for owner, name in ((task, "load_sts"), (Run, "train_step")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            assert "expected to go on" in refused(capsys, given)
        assert not list((tmp_path).iterdir())
    assert main(given) == 0


REFUSED = {
    "--num-clusters 1": "num_clusters: expected 0, or at least 2 with hard_negatives",
    "--accumulation-steps 13": "accumulation_steps: expected at most 12, the batches of 32 in 1 epochs",
    "--device toaster": "--device: expected a device of this machine, got 'toaster'",
    "--precision fp16": "--precision: expected bf16 or fp32 on cpu, got fp16",
    "--backend triton --template [X]": "template: expected one [MASK] or <mask>, got none",
    "--backend triton": "backend: 'triton' cannot run",
    "--train-file few.txt": "--batch-size: expected at most the 2 rows of",
    "--model absent-model": "absent-model",
    "--model bare": "model: expected weights (",
    "--model nan": "step 1: expected a finite loss and gradient, got NaN or infinity; no model was saved",
    # The first step makes the weights so large that dev is no number.
    "STS --learning-rate 1e30 --eval-steps 1": "; lower --learning-rate",
}


@pytest.fixture(scope="module")
def faulty(place):
    """A folder of files and models that are none."""
    folder = place / "faulty"
    shutil.copytree(place / "model", folder / "bare", ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "few.txt").write_text("a b\n\nc d\n")
    encoder = SentenceEncoder.from_pretrained(place / "model")
    torch.nn.init.constant_(next(encoder.transformer.parameters()), torch.nan)
    encoder.save(folder / "nan")
    return folder


@pytest.mark.parametrize(("more", "words"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_had(place, faulty, tmp_path, capsys, more, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CLUSTERNS_DISABLE_TRITON", "1")
    monkeypatch.chdir(faulty)
    message = refused(capsys, command(place, tmp_path / "run", more))
    assert words in message
    assert (tmp_path / "run").exists() == ("step 1" in message)


def failing_at(monkeypatch, step: int, error: BaseException) -> None:
    whole = Run.train_step

    def train_step(self, *, watched):
        if self.step == step:
            raise error
        return whole(self, watched=watched)

    monkeypatch.setattr(Run, "train_step", train_step)


def test_what_is_said_of_full_memory_and_an_interrupt(place, tmp_path, capsys, monkeypatch):
    """What helps, and what is left."""
    output, more = tmp_path / "run", "--overwrite-output-dir"
    with monkeypatch.context() as patch:
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        failing_at(patch, 3, error)
        message = refused(capsys, command(place, output))
        assert "step 3: out of memory with --batch-size 32; what helps: --mini-batch-size 8" in message
    failing_at(monkeypatch, 3, KeyboardInterrupt())
    assert main(command(place, output, more)) == 130
    left = "step 3: no model was saved; --checkpoint-steps with --resume keeps more"
    assert capsys.readouterr().err.splitlines()[-2:] == ["clusterns: interrupted", left]
    assert main(command(place, output, f"{more} --checkpoint-steps 2")) == 130
    last = output / "checkpoints" / "step-00000002"
    left = f"step 3: no model was saved; the last good checkpoint is {last}; --resume goes on from it"
    assert capsys.readouterr().err.splitlines()[-1] == left


def test_a_loss_that_turns_nan_names_step_and_checkpoint(place, tmp_path, capsys, monkeypatch):
    """The weights are spoilt in step 5, between two logged steps: the loss of step 6 is no number."""
    whole = Run.train_step

    def train_step(self, *, watched):
        terms = whole(self, watched=watched)
        if self.step == 5:
            torch.nn.init.constant_(next(self.encoder.transformer.parameters()), torch.nan)
        return terms

    output = tmp_path / "run"
    given = command(place, output, "STS --max-steps 20 --eval-steps 4 --checkpoint-steps 4 --log-steps 8")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", train_step)
        message = refused(capsys, given)
    assert (
        "step 6: expected a finite loss and gradient, got NaN or infinity; the best model so far" in message
    )
    assert f"the last good checkpoint is {output / 'checkpoints' / 'step-00000004'}" in message
    kept = load_file(output / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    # Without the fault it goes on from there.
    assert main([*given, "--resume"]) == 0
    assert summary_of(output)["finished"]


@pytest.mark.parametrize("given", ["--help", "train --help", "evaluate --help", "--version"])
def test_help_and_version(given, monkeypatch):
    """Also in a locale without Greek letters."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main(given.split())
    assert ended.value.code == 0
    sys.stdout.flush()
    assert (b"--bml-weight" in sys.stdout.buffer.getvalue()) == (given == "train --help")


NO_COMMANDS = {
    "train --batch 8": "--batch: expected a flag or argument of `cluster",  # a part of a flag is no flag
    "report m --out page.html --sentences s.txt": "the following arguments are required: --output",
}


@pytest.mark.parametrize(("given", "words"), NO_COMMANDS.items(), ids=NO_COMMANDS)
def test_bad_command_lines_are_one_line(capsys, given, words):
    with pytest.raises(SystemExit) as ended:
        main(given.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clusterns: error: {words}")
