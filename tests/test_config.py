"""Settings of a training: from flags, file and preset; the published runs, setting by setting."""

from __future__ import annotations

import argparse
import json
import shlex

import pytest
import yaml

from clusterns.cli import main
from clusterns.corpus.sources import HUB_FILES
from clusterns.models.prompts import Prompt
from clusterns.training.arguments import add_arguments, read_config
from clusterns.training.config import FROM_SCRATCH, GROUPS, TrainConfig
from clusterns.training.presets import PRESETS

# The paper's table: model, batch, learning rate, K, γ, σ, hard negatives, λ, α, β.
TABLE = {
    "bert-base": ("bert-base-uncased", 256, 5e-5, 128, 1e-3, 0.4, True, 1e-3, 0, 0.3),
    "bert-large": ("bert-large-uncased", 512, 5e-5, 128, 1e-3, 0.5, True, 5e-5, 0.25, 0.3),
    "roberta-base": ("roberta-base", 512, 5e-5, 128, 1e-3, 0.4, True, 1e-4, 0.2, 0.5),
    "roberta-large": ("roberta-large", 512, 5e-5, 128, 5e-4, 0.4, True, 0, None, None),
    "prompt-bert-base": ("bert-base-uncased", 512, 5e-5, 96, 5e-4, 0.4, True, 1e-2, 0, 0.2),
    "prompt-bert-large": ("bert-large-uncased", 256, 3e-5, 96, 1e-4, 0.2, True, 5e-4, 0.25, 0.3),
    "prompt-roberta-base": ("roberta-base", 512, 5e-5, 128, 1e-3, 0.4, False, 1e-2, 0.2, 0.6),
    "simcse-bert-base": ("bert-base-uncased", 64, 3e-5, 0, None, None, None, None, None, None),
    # Ours: the row above, and a second InfoNCE.
    "dimensions-bert-base": ("bert-base-uncased", 64, 3e-5, 0, None, None, None, None, None, None),
    "promptbert-base": ("bert-base-uncased", 256, 1e-5, 0, None, None, None, None, None, None),
}
NAMES = (
    "model batch_size learning_rate num_clusters centroid_momentum start_cosine hard_negatives bml_weight "
    "bml_alpha bml_beta"
).split()
# What they have in common.
COMMON = {
    **{"epochs": 1, "max_length": 32, "eval_steps": 125, "seed": 42, "warmup_steps": 0},
    **{"weight_decay": 0, "max_grad_norm": 1, "temperature": 0.05, "head": "train", "mlm_weight": 0},
    **{"centroid_update": "sum", "false_negatives": "bml", "hard_negative_weight": 0},
}


def parse(*arguments: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_config(parser.parse_args(list(arguments)))


def shown(capsys, *flags: str) -> dict:
    """What --show-config prints."""
    assert main(["train", *flags, "--show-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_defaults():
    assert parse("--model", "somewhere") == TrainConfig(model="somewhere")
    from_scratch = parse("--batch-size", "96")
    assert from_scratch.from_scratch
    assert from_scratch == TrainConfig(**{**FROM_SCRATCH, "batch_size": 96})


def test_every_loss_option_is_reachable():
    config = parse(
        *"--num-clusters 7 --temperature 0.1 --start-cosine 0.3 --centroid-momentum 0.01".split(),
        *"--centroid-update adamw --no-hard-negatives --hard-negative-weight 0.5".split(),
        *"--model m --false-negatives exclude --bml-weight 0.02 --bml-alpha 0.1".split(),
        *"--bml-beta 0.4 --backend torch".split(),
    )
    loss = config.build_loss(16)
    assert loss.embedding_dim == 16
    for name in (
        "num_clusters temperature start_cosine centroid_momentum centroid_update hard_negatives "
        "hard_negative_weight false_negatives bml_weight bml_alpha bml_beta backend"
    ).split():
        assert getattr(loss, name) == getattr(config, name) != getattr(TrainConfig(), name), name


@pytest.mark.parametrize(("flag", "likely"), [("--num-cluster", "--num-clusters"), ("--dve=x", "--dev")])
def test_an_unknown_flag_is_never_part_of_a_known_one(flag, likely, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", flag, "3"])
    error = capsys.readouterr().err
    assert f"got an unknown one; did you mean {likely}?" in error
    assert error.count("\n") == 1


def test_shown_settings_say_what_they_mean(capsys):
    assert main(["train", "--num-clusters", "0", "--show-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "num_clusters: 0  # K: clusters; 0 is plain SimCSE" in lines
    assert [line for line in lines if line.startswith("#")] == [f"# {group}" for group in GROUPS]


@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump])
def test_flags_over_file_over_preset(tmp_path, capsys, dump):
    """And what is shown, read back, is the same run."""
    file = tmp_path / "run.yaml"
    given = {"preset": "bert-base", "batch-size": 320, "bml_beta": 0.9, "hard-negatives": False, "epochs": 3}
    given |= {"sts_dir": None, "learning_rate": 3, "text_columns": ["a, b", "c"], "positive_label": 1}
    file.write_text(dump(given))
    if dump is yaml.safe_dump:
        file.write_text(dump(given) + "temperature: 5e-2\n")  # which YAML takes for a text
    settings = shown(capsys, "--config", str(file), "--bml-beta", "0.7", "--model", "elsewhere")
    expected = {"preset": "bert-base", "model": "elsewhere", "batch_size": 320, "bml_beta": 0.7}
    expected |= {"bml_weight": 1e-3, "temperature": 0.05, "learning_rate": 3.0, "hard_negatives": False}
    expected |= {"text_columns": '"a, b",c', "positive_label": "1"}
    assert expected.items() <= settings.items()
    file.write_text(dump(settings))
    assert shown(capsys, "--config", str(file)) == settings


@pytest.mark.parametrize("name", TABLE)
def test_each_column_of_the_table(name, capsys):
    settings = shown(capsys, "--preset", name)
    for setting, value in zip(NAMES, TABLE[name], strict=True):
        assert value is None or settings[setting] == value, setting
    assert {key: settings[key] for key in COMMON} == COMMON
    assert settings["output_dir"] == f"runs/{name}"
    assert HUB_FILES[settings["train_file"]][1] == "wiki1m_for_simcse.txt"
    config = TrainConfig.from_settings({"preset": name})
    loss, clusters = config.build_loss(8), settings["num_clusters"]
    assert settings["patience"] == (3 if clusters else 0)
    assert loss.dimension_weight == (3 if name == "dimensions-bert-base" else 0)
    assert (loss.num_clusters, loss.hard_negatives) == (clusters, clusters > 0 and settings["hard_negatives"])
    assert (config.build_prompt() == Prompt("auto", denoising="trained")) == name.startswith("prompt")
    assert settings["pooling"] == ("mask" if name.startswith("prompt") else "cls")


def test_the_table_is_all_presets_and_a_template_replaces_theirs():
    assert PRESETS.keys() == TABLE.keys()
    settings = {"preset": "prompt-bert-base", "template": "[X] [MASK]", "second_template": "[MASK] [X]"}
    assert TrainConfig.from_settings(settings).build_prompt().templates == ("[X] [MASK]", "[MASK] [X]")


BAD_FILES = {
    "batch_sise: 3": "expected a setting of `clusterns train`, got 'batch_sise'; did you mean batch_size",
    "batch_size: many": "batch_size: expected int, got 'many'",
    "temperature: true": "temperature: expected float, got True",
    "false_negatives: drop": "false_negatives: expected one of bml, exclude, keep, got 'drop'",
    "seed: 1\nepochs: 2\nseed: 2": "expected each setting once, got 'seed' twice",
    '{"batch-size": 8, "batch_size": 9}': "expected each setting once, got 'batch_size' twice",
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.items(), ids=BAD_FILES)
def test_bad_config_file(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="--config .*" + message.replace("`", ".")) as caught:
        parse("--config", str(path))
    assert "\n" not in str(caught.value)


BAD_FLAGS = {
    "--seed -1": "--seed: expected at least 0, got -1",
    "--learn-temperature --temperature 2": "number at least 0.01 and at most 1, got 2.0",
    "--batch-size 16 --num-clusters 32": "--num-clusters: expected at most --batch-size 16, of which the",
    "--prompt bert --template [X][MASK]": "template: expected none with the prompt 'bert'",
    "--denoise frozen": "denoise: expected 'none' without a prompt",
    "--mlm-weight 0.1 --mini-batch-size 8": "mlm_weight: expected 0 with mini_batch_size",
    "--resume --overwrite-output-dir": "--resume: expected no --overwrite-output-dir with it",
    "--model ~nosuchuser/x": "--model: expected the home folder of a user that exists, got ~nosuch",
    "--config absent.yaml": "--config: expected a YAML or JSON file, found none",
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.items(), ids=BAD_FLAGS)
def test_settings_out_of_range_or_not_to_go_together(flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse("--model", "m", *shlex.split(flags))


def test_a_file_needs_a_model():
    with pytest.raises(ValueError, match="--model: expected an encoder to train on lines.txt, got none"):
        parse("--train-file", "lines.txt")


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ("--train-file f --sts-dir s --epochs 2 --patience 0", ""),
        ("--epochs 2 --max-steps 9 --keep-checkpoints 3", "--epochs --keep-checkpoints"),
        ("--text-columns a --min-score 1", "--text-columns --min-score"),
        ("--num-clusters 0 --bml-alpha 0.3 --false-negatives keep", "--false-negatives --bml-alpha"),
        *((f"--preset {preset}", "") for preset in PRESETS),
    ],
)
def test_settings_without_effect_are_told(given, idle):
    told = parse("--model", "m", *given.split()).without_effect()
    assert [line.split(" has no effect ")[0] for line in told] == idle.split()
    assert list(parse().without_effect()) == []
