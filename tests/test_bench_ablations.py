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
    assert sum(line.startswith("|") for line in lines) == 4  # head, rule, two variants
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("model.safetensors"))[1:]  # but for the model that all start from

    refused = ablations(data, tmp_path, *two, "1", "--steps", "6", status=1)
    assert "expected runs of" in refused.splitlines()[-1]


def test_the_search_sees_dev_alone(data, tmp_path):
    ablations(data, tmp_path, "--search", "--seeds", "1")
    found = rows(tmp_path / "search.csv")
    assert found[0].keys() == {"settings", "seed", "dev", "clustering_started"}
    dev = [float(row["dev"]) for row in found]
    assert dev == sorted(dev, reverse=True)
    ranked = [row["settings"] for row in found]
    assert sum("SimCSE" in name for name in ranked) == 3
    assert {row["seed"] for row in found} == {"1000"}
    result = next((tmp_path / "search").rglob("result.json")).read_text(encoding="utf-8")
    assert '"test"' not in result

    ablations(data, tmp_path, "--search", "--seeds", "2", "--best", "2")
    more = rows(tmp_path / "search.csv")
    again = {row["settings"] for row in more if row["seed"] == "1001"}
    best_simcse = next(name for name in ranked if name.startswith("SimCSE"))
    assert again == {*ranked[:2], best_simcse}
    assert len(more) == len(found) + len(again)
