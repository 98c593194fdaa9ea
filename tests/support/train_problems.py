"""What the tests of training share: sentences, a tiny model on disk, a dev set, and how to call it."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from clusterns.cli import main
from clusterns.encoder import SentenceEncoder
from clusterns.training.scratch import small_bert, train_tokenizer

WORDS = "a cat dog bird sees hears eats likes the red blue old young small house tree river car".split()


def sentences(count: int) -> list[str]:
    """Distinct ones, the same each time."""
    generator = random.Random(1)
    distinct: dict[str, None] = {}
    while len(distinct) < count:
        distinct[" ".join(generator.choices(WORDS, k=generator.randint(4, 9)))] = None
    return list(distinct)


def save_tiny_model(folder: Path, *, dropout: float = 0.1, pooling: str = "cls", std: float = 0.02) -> Path:
    """Folder of a random two-layer BERT with a vocabulary for `sentences`.

    With "mean" pooling and words of a larger deviation it tells sentences apart before it is trained.
    """
    tokenizer = train_tokenizer(sentences(400), vocab_size=500)
    torch.manual_seed(0)
    bert = small_bert(tokenizer, seed=0, hidden_size=32, layers=2, heads=2, dropout=dropout, word_std=std)
    SentenceEncoder(bert, tokenizer, pooling=pooling).save(folder)
    return folder


def write_dev(root: Path) -> Path:
    """STS-B dev whose gold score is the share of common words."""
    folder = root / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    texts = sentences(120)
    rows = []
    for first, second in zip(texts[::2], texts[1::2], strict=True):
        common = len(set(first.split()) & set(second.split())) / len(set(first.split() + second.split()))
        rows.append(f"main\tsource\t2015\t0\t{min(5.0, 10 * common):.3f}\t{first}\t{second}")
        rows.append(f"main\tsource\t2015\t0\t5.000\t{first}\t{first} too")
    (folder / "sts-dev.csv").write_text("\n".join(rows) + "\n")
    return root


def write_place(root: Path) -> Path:
    """A folder with a model, the same without dropout, sentences, triplets and a dev set."""
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


def command(
    place: Path, output: Path, more: str = "", *, model: str = "model", file: str = "sentences.txt"
) -> list[str]:
    """A command line for what `write_place` wrote, overridden by `more`, where "STS" is for the dev set."""
    fixed = "--batch-size 32 --learning-rate 1e-3 --num-clusters 4 --start-cosine 1 --log-steps 1"
    fixed += " --precision fp32 --device cpu --report-to none"
    paths = ["--model", str(place / model), "--train-file", str(place / file), "--output-dir", str(output)]
    return ["train", *paths, *fixed.split(), *more.replace("STS", f"--sts-dir {place / 'sts'}").split()]


def run(place: Path, output: Path, more: str = "", **names: str) -> list[dict]:
    """The figures of each step of such a run."""
    assert main(command(place, output, more, **names)) == 0
    return [record for record in log_of(output) if "loss" in record]


def log_of(output: Path) -> list[dict]:
    """The records of log.jsonl."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def summary_of(output: Path) -> dict:
    """What training.json holds."""
    return json.loads((output / "training.json").read_text(encoding="utf-8"))


def refused(capsys, arguments: list[str]) -> str:
    """The one line that the command ends with."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    message = lines[-1]
    assert message.startswith("clusterns: error: ")
    assert "Traceback" not in "\n".join(lines)
    return message


def same_bits(one: Path, other: Path) -> bool:
    """Whether two .safetensors files, or the models of two folders, hold the same tensors."""
    paths = [path / "model.safetensors" if path.is_dir() else path for path in (one, other)]
    ours, theirs = map(load_file, paths)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_ends_alike(one: Path, other: Path) -> None:
    """Same files, and to the bit the same weights, centroids, log, best model, summary and checkpoints."""
    ours, theirs = (
        sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) for root in (one, other)
    )
    assert ours == theirs
    for name in ours:
        if name.suffix == ".safetensors":
            assert same_bits(one / name, other / name), name
        elif name.name == "log.jsonl":
            logs = [log_of((root / name).parent) for root in (one, other)]
            for records in zip(*logs, strict=True):
                assert {**records[0], "seconds": 0} == {**records[1], "seconds": 0}, name
    summaries = [summary_of(folder) for folder in (one, other)]
    for key in ("finished", "scores", "best_step"):
        assert summaries[0][key] == summaries[1][key]


def assert_trained_alike(start: Path, one: Path, other: Path, share: float = 0.005) -> None:
    """Two runs from a model end with the same weights, but for rounding.

    AdamW makes large what is rounding in a gradient: not each weight, but all together end alike. A bias of
    attention's keys has the gradient 0 and walks at random, as the last bias does under denoising.
    share: of what the weights moved, so much they may be apart.
    """
    before, ours, theirs = (load_file(folder / "model.safetensors") for folder in (start, one, other))
    assert ours.keys() == theirs.keys()
    names = [name for name in before if not name.endswith(("key.bias", "layer.1.output.LayerNorm.bias"))]
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in names]).norm()
    moved = torch.cat([(theirs[name] - before[name]).flatten() for name in names]).norm()
    assert apart < share * moved, (one.name, apart, moved)
