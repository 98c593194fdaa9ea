"""The experiment of bench/ablations.py, tiny: its variants, what it writes, going on, and its budget."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from fixed_corpus import BENCH, rows, run
from tiny import make_tokenizer, write_sts_folder
from train_problems import sentences
from transformers import DistilBertConfig, DistilBertModel

from clusterns import reference
from clusterns.encoder import SentenceEncoder
from clusterns.files import holding
from clusterns.train import train
from clusterns.training.config import TrainConfig

SCRIPT = runpy.run_path(str(BENCH / "variants.py"))
GROUPS = SCRIPT["GROUPS"]
VARIANTS = {name: variant for group in GROUPS.values() for name, variant in group.items()}
SMALL = "--layers 1 --batch 32 --steps 4 --eval-steps 2 --learning-rate 1e-3 --processes 1".split()
# Those that are the loss of another one in all but where their random numbers or centroids come from.
LIKE = dict.fromkeys(GROUPS["spread"], "ClusterNS") | {
    "other masks": "SimCSE",
    "early start": "ClusterNS",
    "mean update": "ClusterNS",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        initializer_range=0.5,
        dropout=0.0,
        attention_dropout=0.0,
    )
    encoder = SentenceEncoder(DistilBertModel(config), tokenizer, pooling="cls", head="none")
    encoder.save(root / "models" / "distilbert-base-cased-gec")
    texts = sentences(200)
    (root / "wiki_sentences.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    lines = ["sent0,sent1,hard_neg", *(",".join(texts[i : i + 3]) for i in range(150))]
    (root / "snli_triplets.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "clustering").mkdir()
    lines = [f"{1 + i % 2}\t{text}" for i, text in enumerate(texts)]
    (root / "clustering" / "AgNews.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_sts_folder(root / "sts_raw")
    return root


def ablations(data: Path, output: Path, *more: str, status: int = 0) -> str:
    output.mkdir(exist_ok=True)
    arguments = ("--data", str(data), "--output", str(output), *SMALL, *more)
    return run(output, "ablations.py", *arguments, status=status)


def losses(name: str, steps: int = 3) -> list[float]:
    """Losses of a variant over steps of like batches, clustering from the first on."""
    loss, settings = VARIANTS[name]
    torch.manual_seed(0)
    settings = {"num_clusters": 8, "bml_weight": 0.1, **settings, "start_cosine": 1.0}
    loss_fn = loss(16, **settings, backend="torch")
    found = []
    for step in range(steps):
        with torch.random.fork_rng():
            torch.manual_seed(step)
            base = torch.randn(32, 16)
            views = [(base + 0.5 * torch.randn(32, 16)).requires_grad_() for _ in range(2)]
        value = loss_fn(*views)
        value.backward()
        assert value.isfinite()
        assert all(view.grad is not None and view.grad.isfinite().all() for view in views)
        assert float(loss_fn.last["loss"]) == pytest.approx(float(value.detach()))
        found.append(float(value.detach()))
    assert loss_fn.clustering_active == bool(settings["num_clusters"])
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_differs(name):
    found = losses(name)
    for other in {"SimCSE", "ClusterNS", "no hard negatives"} - {name, LIKE.get(name)}:
        assert found[1:] != pytest.approx(losses(other)[1:], abs=1e-6)


def picked(name: str, seed: int) -> torch.Tensor:
    """Centroids (K, D) that a variant takes from one batch."""
    generator = torch.Generator().manual_seed(5)
    batch = [torch.randn(32, 16, generator=generator) for _ in range(2)]
    torch.manual_seed(seed)
    loss_fn = VARIANTS[name].loss(16, 8, start_cosine=1.0, backend="torch")
    loss_fn(*batch)
    return loss_fn.centroids


def test_ways_to_seed():
    assert not torch.equal(picked("ClusterNS", 0), picked("ClusterNS", 1))
    fixed = [name for name in GROUPS["spread"] if "masks" not in name]
    assert all(torch.equal(picked(name, 0), picked(name, 1)) for name in fixed)
    # One batch is all that is buffered here.
    assert torch.equal(picked("buffered seeds", 0), picked("central pick", 0))
    firsts = [picked(f"first pick {number}", 0)[0] for number in range(4)]
    assert len({tuple(row.tolist()) for row in firsts}) == 4
    spread = [float((rows @ rows.T).mean()) for rows in map(reference.unit, [*map(chain, range(32))])]
    best = reference.unit(picked("best chain", 0))
    assert float((best @ best.T).mean()) == pytest.approx(min(spread[::4]))


def chain(first: int) -> torch.Tensor:
    """Centroids of the chain that begins there, of the batch of `picked`."""
    generator = torch.Generator().manual_seed(5)
    return reference.seed_centroids(*(torch.randn(32, 16, generator=generator) for _ in range(2)), 8, first)[
        0
    ]


def test_settings_of_a_variant():
    name = "angular margin,degrees=20,max_grad_norm=0.5"
    loss, settings = SCRIPT["chosen"]([name])[name]
    assert (loss.degrees, VARIANTS["angular margin"].loss.degrees) == (20, 10)
    assert settings == {"num_clusters": 0, "max_grad_norm": 0.5}


def test_runs_are_those_of_train(data, tmp_path):
    # Without dropout the last layer's [CLS] is the same to rounding, whether the others are computed or not.
    ablations(
        data, tmp_path / "out", "--seeds", "1", "--layers", "2", "--variants", "ClusterNS,start_cosine=1"
    )
    result = json.loads((tmp_path / "out/clusterns-start_cosine-1/1/result.json").read_text(encoding="utf-8"))
    config = TrainConfig.from_settings(
        {
            "model": str(data / "models/distilbert-base-cased-gec"),
            "train_file": str(data / "wiki_sentences.txt"),
            "sts_dir": str(data / "sts_raw"),
            "output_dir": str(tmp_path / "run"),
            **{
                "pooling": "cls",
                "head": "none",
                "seed": 1,
                "batch_size": 32,
                "max_steps": 4,
                "eval_steps": 2,
            },
            **{"learning_rate": 1e-3, "num_clusters": 16, "start_cosine": 1.0, "backend": "torch"},
            **{"bml_weight": 1e-3, "bml_alpha": 0.0, "bml_beta": 0.3, "patience": 0, "report_to": "none"},
        }
    )
    scores = train(config)
    assert result["dev"] == pytest.approx(scores["after"]["spearman"], abs=1e-3)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    last = [record for record in log if "loss" in record][-1]
    assert result["last"]["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert result["clustering_started"] == 1


def test_runs_are_made_once_and_shared(data, tmp_path):
    two = ["--variants", "SimCSE", "random clusters", "--seeds"]
    (tmp_path / "simcse" / "1").mkdir(parents=True)
    with holding(tmp_path / "simcse" / "1" / ".lock"):  # as while another process is at this run
        ablations(data, tmp_path, *two, "1")
    assert not (tmp_path / "simcse" / "1" / "result.json").exists()
    first = tmp_path / "random-clusters" / "1" / "result.json"
    before = first.read_bytes()

    ablations(data, tmp_path, *two, "2", "--processes", "2")
    assert first.read_bytes() == before
    runs = [(row["variant"], row["seed"]) for row in rows(tmp_path / "comparison.csv")]
    assert runs == [(name, seed) for name in ("SimCSE", "random clusters") for seed in "12"]
    lines = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("|") for line in lines) == 8  # two variants, differences of two scores
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("model.safetensors"))

    refused = ablations(data, tmp_path, *two, "1", "--steps", "6", status=1)
    assert "expected runs of" in refused.splitlines()[-1]
    assert first.read_bytes() == before
    result = json.loads(before)
    result["settings"]["bml_beta"] = 0.4  # as of a script that had another one
    first.write_text(json.dumps(result), encoding="utf-8")
    assert "'bml_beta': 0.4" in ablations(data, tmp_path, *two, "1", status=1).splitlines()[-1]


def test_the_search_sees_dev_alone(data, tmp_path):
    names = ["SimCSE,learning_rate=2e-5", "ClusterNS,num_clusters=4", "exclude"]
    ablations(data, tmp_path, "--search", "--seeds", "1", "--variants", *names)
    found = rows(tmp_path / "search.csv")
    assert [(row["variant"], row["seed"]) for row in found] == [(name, "1000") for name in names]
    assert not {"avg", "STS12"} & found[0].keys()
    result = next((tmp_path / "search").rglob("result.json")).read_text(encoding="utf-8")
    assert '"test"' not in result


@pytest.mark.parametrize(("text", "figure"), [("snli", "avg"), ("AgNews", "accuracy")])
def test_other_texts(data, tmp_path, text, figure):
    ablations(data, tmp_path, "--text", text, "--seeds", "1", "--variants", "SimCSE", "ClusterNS")
    found = rows(tmp_path / "comparison.csv")
    assert [row["variant"] for row in found] == ["SimCSE", "ClusterNS"]
    assert all(math.isfinite(float(row[figure])) for row in found)


def test_every_variant_runs(data, tmp_path):
    ablations(data, tmp_path, "--search", "--seeds", "1", "--variants", *GROUPS)
    assert [row["variant"] for row in rows(tmp_path / "search.csv")] == list(VARIANTS)


def test_a_rule_that_fails_stops_no_other(data, tmp_path):
    names = ["SimCSE,learning_rate=1e38", "SimCSE"]
    ablations(data, tmp_path, "--seeds", "1", "--variants", *names)
    assert [row["variant"] for row in rows(tmp_path / "comparison.csv")] == ["SimCSE"]
    assert "learning_rate=1e38, seed 1, has no figures" in (tmp_path / "comparison.md").read_text("utf-8")
    assert "has no figures" in ablations(data, tmp_path, "--seeds", "1", "--variants", names[0])


def test_minutes(data, tmp_path):
    short = ablations(data, tmp_path, "--minutes", "1e-6", "--variants", "SimCSE", status=1)
    assert "--minutes: expected at least" in short
    assert "Traceback" not in short
    assert not list(tmp_path.rglob("result.json"))
    ablations(data, tmp_path, "--minutes", "0.1", "--variants", "SimCSE", "no BML")
    found = [(int(row["seed"]), row["variant"]) for row in rows(tmp_path / "comparison.csv")]
    seeds = [[seed for seed, variant in found if variant == name] for name in ("SimCSE", "no BML")]
    assert len(seeds[0]) - len(seeds[1]) in (0, 1)  # all variants one seed, then the next
    assert seeds[0] == list(range(1, len(seeds[0]) + 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "SimSCE"], "--variants: expected some of parts"),
        (["--variants", "SimCSE,foo=1"], "expected settings of the loss or the optimiser, got foo"),
        (["--variants", "angular margin,num_clusters=8"], "angular margin: expected num_clusters=0"),
        (["--batch", "1"], "batch_size: expected"),
        (["--text", "SearchSnippets"], "--data: expected a folder with clustering/SearchSnippets.tsv"),
        (["--layers", "3"], "--layers: expected 1 to 2, got 3"),
        (["--minutes", "0"], "--minutes: expected a number above 0"),
    ],
)
def test_bad_arguments(data, tmp_path, arguments, words):
    status = 1 if words.startswith(("--variants", "expected settings")) else 2
    assert words in ablations(data, tmp_path, *arguments, status=status).splitlines()[-1]
