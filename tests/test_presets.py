"""The published runs, setting by setting."""

from __future__ import annotations

import json

import pytest
import yaml

from clusterns.cli import main
from clusterns.corpus.sources import HUB_FILES
from clusterns.models.prompts import Prompt
from clusterns.training.config import TrainConfig
from clusterns.training.presets import PRESETS

# The paper's table: batch, learning rate, K, γ, σ, hard negatives, λ, α, β.
TABLE = {
    "bert-base": (256, 5e-5, 128, 1e-3, 0.4, True, 1e-3, 0, 0.3),
    "bert-large": (512, 5e-5, 128, 1e-3, 0.5, True, 5e-5, 0.25, 0.3),
    "roberta-base": (512, 5e-5, 128, 1e-3, 0.4, True, 1e-4, 0.2, 0.5),
    "roberta-large": (512, 5e-5, 128, 5e-4, 0.4, True, 0, None, None),
    "prompt-bert-base": (512, 5e-5, 96, 5e-4, 0.4, True, 1e-2, 0, 0.2),
    "prompt-bert-large": (256, 3e-5, 96, 1e-4, 0.2, True, 5e-4, 0.25, 0.3),
    "prompt-roberta-base": (512, 5e-5, 128, 1e-3, 0.4, False, 1e-2, 0.2, 0.6),
}
NAMES = (
    "batch_size learning_rate num_clusters centroid_momentum start_cosine hard_negatives bml_weight "
    "bml_alpha bml_beta"
).split()


def shown(capsys, *flags: str) -> dict:
    """What --show-config prints."""
    assert main(["train", *flags, "--show-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", TABLE)
def test_each_column_of_the_table(name, capsys):
    settings = shown(capsys, "--preset", name)
    for setting, value in zip(NAMES, TABLE[name], strict=True):
        assert value is None or settings[setting] == value, setting
    model = name.removeprefix("prompt-")
    assert settings["model"] == (f"{model}-uncased" if "roberta" not in model else model)
    common = {
        "epochs": 1,
        "max_length": 32,
        "eval_steps": 125,
        "patience": 3,
        "seed": 42,
        "warmup_steps": 0,
        "weight_decay": 0,
        "max_grad_norm": 1,
        "temperature": 0.05,
        "head": "train",
        "centroid_update": "sum",
        "false_negatives": "bml",
        "hard_negative_weight": 0,
        "output_dir": f"runs/{name}",
        "mlm_weight": 0,
    }
    assert {key: settings[key] for key in common} == common
    assert HUB_FILES[settings["train_file"]][1] == "wiki1m_for_simcse.txt"
    loss = TrainConfig.from_settings({"preset": name}).build_loss(8)
    assert (loss.num_clusters, loss.hard_negatives) == (settings["num_clusters"], settings["hard_negatives"])
    prompt = TrainConfig.from_settings({"preset": name}).build_prompt()
    assert (prompt == Prompt("auto", denoising="trained")) == name.startswith("prompt-")
    assert settings["pooling"] == ("mask" if name.startswith("prompt-") else "cls")


def test_baselines_do_not_cluster(capsys):
    assert set(PRESETS) == {*TABLE, "simcse-bert-base", "promptbert-base"}
    for name, batch_size, learning_rate in (("simcse-bert-base", 64, 3e-5), ("promptbert-base", 256, 1e-5)):
        settings = shown(capsys, "--preset", name)
        assert settings["num_clusters"] == 0
        assert (settings["batch_size"], settings["learning_rate"]) == (batch_size, learning_rate)
        loss = TrainConfig.from_settings({"preset": name}).build_loss(8)
        assert not loss.hard_negatives


def test_flags_over_file_over_preset(tmp_path, capsys):
    """And what is shown, read back, is the same run."""
    file = tmp_path / "run.yaml"
    file.write_text("preset: bert-base\nbatch_size: 320\nbml_beta: 0.9\n")
    settings = shown(capsys, "--config", str(file), "--bml-beta", "0.7", "--model", "elsewhere")
    assert (settings["preset"], settings["model"]) == ("bert-base", "elsewhere")
    assert (settings["batch_size"], settings["bml_beta"], settings["bml_weight"]) == (320, 0.7, 1e-3)
    file.write_text(yaml.safe_dump(settings))
    assert shown(capsys, "--config", str(file)) == settings
    file.write_text(json.dumps(settings))
    assert shown(capsys, "--config", str(file)) == settings


def test_a_template_of_ones_own_replaces_the_published_ones():
    settings = {"preset": "prompt-bert-base", "template": "[X] [MASK]", "second_template": "[MASK] [X]"}
    assert TrainConfig.from_settings(settings).build_prompt().templates == ("[X] [MASK]", "[MASK] [X]")


def test_unknown_preset(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("preset: bert-huge\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "preset: expected one of bert-base, bert-large" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt bert --template [X][MASK]", "template: expected none with the prompt 'bert'"),
        ("--second-template [X][MASK]", "second_template: expected a template for view 1"),
        ("--denoise frozen", "denoise: expected 'none' without a prompt"),
        ("--mlm-weight 0.1 --mini-batch-size 8", "mlm_weight: expected 0 with mini_batch_size"),
        ("--mlm-probability 1", "mlm_probability: expected a finite number above 0 and at most 0.99"),
        ("--keep-checkpoints 0", "keep_checkpoints: expected at least 1"),
        ("--accumulation-steps 0", "accumulation_steps: expected at least 1"),
        ("--backend triton --device cpu --template [MASK]", "template: expected one [X] for the sentence"),
    ],
)
def test_settings_that_do_not_go_together(flags, message, tmp_path, capsys):
    given = ["train", "--model", "m", "--output-dir", str(tmp_path / "run"), *flags.split()]
    assert main(given) == 2
    assert message in capsys.readouterr().err
