from __future__ import annotations

import argparse
import json
import shlex

import pytest

from clusterns.training.arguments import add_arguments, read_config
from clusterns.training.config import FROM_SCRATCH, TrainConfig
from clusterns.training.presets import PRESETS

PATHS = ("config", "model", "train-file", "output-dir", "sts-dir")


def parse(*arguments: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_config(parser.parse_args(list(arguments)))


def test_defaults():
    assert parse("--model", "somewhere") == TrainConfig(model="somewhere")


def test_from_scratch_has_its_own_defaults():
    config = parse("--batch-size", "96")
    assert config.from_scratch
    assert config == TrainConfig(**{**FROM_SCRATCH, "batch_size": 96})
    with pytest.raises(ValueError, match="--model: expected an encoder to train on lines.txt, got none"):
        parse("--train-file", "lines.txt")


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


def test_no_clusters_is_simcse():
    loss = parse("--num-clusters", "0").build_loss(8)
    assert not loss.hard_negatives
    assert loss.num_clusters == 0


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_config_file_and_flags_over_it(tmp_path, suffix):
    settings = {"batch-size": 64, "learning_rate": 3, "hard-negatives": False, "sts_dir": None}
    path = tmp_path / f"run.{suffix}"
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.items())
    path.write_text(json.dumps(settings) if suffix == "json" else lines + "\ntemperature: 5e-2\n")
    config = parse("--config", str(path), "--batch-size", "96")
    assert config.batch_size == 96
    assert config.learning_rate == 3.0
    assert config.temperature == 0.05
    assert config.hard_negatives is False
    path.write_text(json.dumps({"model": "m", "text_columns": ["a, b", "c"], "positive_label": 1}))
    config = parse("--config", str(path))
    assert (config.text_columns, config.positive_label) == ('"a, b",c', "1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_sise: 3", "expected a setting of `clusterns train`, got 'batch_sise'"),
        ("batch_size: many", "batch_size: expected int, got 'many'"),
        ("batch_size: 2.5", "batch_size: expected int, got 2.5"),
        ("batch_size: true", "batch_size: expected int, got True"),
        ("hard_negatives: 1", "hard_negatives: expected bool, got 1"),
        ("temperature: warm", "temperature: expected float, got 'warm'"),
        ("temperature: true", "temperature: expected float, got True"),
        ("temperature: null", "temperature: expected float, got None"),
        ("false_negatives: drop", "false_negatives: expected one of bml, exclude, keep, got 'drop'"),
        ("- batch_size", "expected settings by name, got list"),
        ("a: [", "expected YAML or JSON"),
        ("", "expected settings by name, got an empty file"),
        ("# later\n", "expected settings by name, got an empty file"),
        ("seed: 1\nepochs: 2\nseed: 2", "expected each setting once, got 'seed' twice"),
        ('{"batch-size": 8, "batch_size": 9}', "expected each setting once, got 'batch_size' twice"),
    ],
)
def test_bad_config_file(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="--config .*" + message.replace("`", ".")) as caught:
        parse("--config", str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="--config: expected a YAML or JSON file, found none"):
        parse("--config", str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 0", "batch_size: expected at least 2, got 0"),
        ("--max-steps 0", "max_steps: expected at least 1, got 0"),
        ("--patience -1", "patience: expected at least 0, got -1"),
        ("--learning-rate 0", "learning_rate.*got 0"),
        ("--learning-rate nan", "learning_rate.*got nan"),
        ("--max-grad-norm -1", "max_grad_norm.*-1"),
        ("--seed -1", "--seed: expected at least 0, got -1"),
        ("--learn-temperature --temperature 0.005", "--temperature to learn: expected .* got 0.005"),
        ("--model ~nosuchuser/x", "--model: expected the home folder of a user that exists, got ~nosuch"),
        *((f"--{name} ''", f"^--{name}: expected a path, got an empty one$") for name in PATHS),
    ],
)
def test_settings_out_of_range(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*shlex.split(flags))


def test_settings_without_effect_are_told():
    def told(*arguments: str) -> list[str]:
        return [
            line.split(" has no effect ")[0] for line in parse("--model", "m", *arguments).without_effect()
        ]

    assert told("--train-file", "f", "--sts-dir", "s", "--epochs", "2", "--patience", "0") == []
    assert told("--epochs", "2", "--max-steps", "9", "--keep-checkpoints", "3") == [
        "--epochs",
        "--keep-checkpoints",
    ]
    assert told("--train-file", "f", "--eval-steps", "9") == ["--eval-steps"]
    assert told("--text-columns", "a", "--min-score", "1") == ["--text-columns", "--min-score"]
    assert told("--num-clusters", "0", "--bml-alpha", "0.3", "--false-negatives", "keep") == [
        "--false-negatives",
        "--bml-alpha",
    ]
    assert told("--false-negatives", "keep", "--bml-alpha", "0.3") == ["--bml-alpha"]
    for preset in PRESETS:
        assert told("--preset", preset) == [], preset
    assert list(parse().without_effect()) == []
