"""The experiment of bench/ablations.py, tiny: what it writes, that it goes on, and shares its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixed_corpus import rows, run
from tiny import make_tokenizer, write_sts_folder
from train_problems import sentences
from transformers import DistilBertConfig, DistilBertModel

from clusterns.encoder import SentenceEncoder
from clusterns.files import holding


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=16, n_layers=3, n_heads=2, hidden_dim=32, initializer_range=0.5
    )
    encoder = SentenceEncoder(DistilBertModel(config), tokenizer, pooling="cls", head="none")
    encoder.save(root / "models" / "distilbert-base-cased-gec")
    (root / "wiki_sentences.txt").write_text("\n".join(sentences(200)) + "\n", encoding="utf-8")
    write_sts_folder(root / "sts_raw")
    return root


def ablations(data: Path, output: Path, *more: str, status: int = 0) -> str:
    small = "--layers 1 --batch 32 --steps 4 --eval-steps 2 --learning-rate 1e-3".split()
    arguments = ("--data", str(data), "--output", str(output), *small, *more)
    return run(output, "ablations.py", *arguments, status=status)


def test_runs_are_made_once_and_shared(data, tmp_path):
    two = ["--variants", "SimCSE", "random clusters", "--seeds"]
    (tmp_path / "simcse" / "1").mkdir(parents=True)
    with holding(tmp_path / "simcse" / "1" / ".lock"):  # as while another process is at this run
        ablations(data, tmp_path, *two, "1")
    assert not (tmp_path / "simcse" / "1" / "result.json").exists()
    first = tmp_path / "random-clusters" / "1" / "result.json"
    before = first.read_bytes()

    ablations(data, tmp_path, *two, "2")
    assert first.read_bytes() == before
    runs = [(row["variant"], row["seed"]) for row in rows(tmp_path / "comparison.csv")]
    assert runs == [(name, seed) for name in ("SimCSE", "random clusters") for seed in "12"]
    lines = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("|") for line in lines) == 8  # two variants, differences of two scores
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("model.safetensors"))[1:]  # but for the model that all start from

    refused = ablations(data, tmp_path, *two, "1", "--steps", "6", status=1)
    assert "expected runs of" in refused.splitlines()[-1]


def test_the_search_sees_dev_alone(data, tmp_path):
    settings = ["num_clusters=0,learning_rate=2e-5", "num_clusters=4", "published settings"]
    ablations(data, tmp_path, "--search", "--seeds", "1", "--variants", *settings)
    found = rows(tmp_path / "search.csv")
    assert [(row["variant"], row["seed"]) for row in found] == [(name, "1000") for name in settings]
    assert not {"avg", "STS12"} & found[0].keys()
    result = next((tmp_path / "search").rglob("result.json")).read_text(encoding="utf-8")
    assert '"test"' not in result
