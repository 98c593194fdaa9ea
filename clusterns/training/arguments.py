"""Settings of `clusterns train` from its command line and from config files."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
import types
import typing
from dataclasses import fields
from typing import Any

from ..checks import nearest
from ..files import expanded
from .config import FROM_SCRATCH, GROUPS, TrainConfig, flag, to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, by groups, and --config for a file of them."""
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of settings; flags override it")
    parser.add_argument(
        "--show-config", action="store_true", help="print all settings as they result, as YAML, and exit"
    )
    types_of = typing.get_type_hints(TrainConfig)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["optimiser"].add_argument(
        "--seeds",
        type=int,
        metavar="INT",
        help="train so many times, with the seeds from --seed on, in OUTPUT_DIR/seed-N each: one after "
        "another, or one on each GPU; ends with their mean and standard deviation",
    )
    for item in fields(TrainConfig):
        group, told = groups[item.metadata["group"]], item.metadata
        default = "" if item.default in (None, False) else f" (default {item.default})"
        default += f" (from scratch {FROM_SCRATCH[item.name]})" if item.name in FROM_SCRATCH else ""
        text, kind = meaning(item).replace("%", "%%") + default, _plain_type(types_of[item.name])
        if kind is bool:
            given: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            metavar = None if told["choices"] else kind.__name__.upper()
            given = {"type": kind, "choices": told["choices"], "metavar": metavar}
        group.add_argument(flag(item.name), default=argparse.SUPPRESS, help=text, **given)


def meaning(item: dataclasses.Field) -> str:
    """What a setting means, behind the paper's symbol for it."""
    return ": ".join(filter(None, (item.metadata["symbol"], item.metadata["help"])))


def read_config(arguments: argparse.Namespace) -> TrainConfig:
    """Defaults, overridden by the config file, overridden by the flags given."""
    given = {name: value for name, value in vars(arguments).items() if name in _names()}
    return TrainConfig.from_settings({**_read_file(arguments.config), **given})


def _names() -> set[str]:
    return {item.name for item in fields(TrainConfig)}


def _plain_type(annotation: Any) -> Any:
    """The type behind `X | None`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _read_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    file = expanded(path, "--config")
    if not file.is_file():
        raise FileNotFoundError(f"--config: expected a YAML or JSON file, found none at {path}")
    try:
        text = file.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config {path}: expected YAML or JSON, got {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise ValueError(f"--config {path}: expected settings by name, got {got}")
    assert isinstance(tree, yaml.MappingNode)
    keys = [str(key.value) for key, _ in tree.value]  # of which the content has the last of a name
    for number, key in enumerate(keys):
        if key.replace("-", "_") in (other.replace("-", "_") for other in keys[:number]):
            raise ValueError(f"--config {path}: expected each setting once, got {key!r} twice")
    types_of = typing.get_type_hints(TrainConfig)
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in types_of:
            likely = nearest(name, types_of)
            raise ValueError(f"--config {path}: expected a setting of `clusterns train`, got {key!r}{likely}")
        settings[name] = _convert(path, name, value, _plain_type(types_of[name]))
        choices = TrainConfig.__dataclass_fields__[name].metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ValueError(f"--config {path}: {name}: expected one of {', '.join(choices)}, got {value!r}")
    return settings


def _convert(path: str, name: str, value: Any, kind: Any) -> Any:
    """Accept exact types, whole numbers for real ones, and YAML's 5e-5, which it reads as a string."""
    if value is None and TrainConfig.__dataclass_fields__[name].default is None:
        return None
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    elif kind is str and isinstance(value, (bool, int, float)):  # as a label is
        return str(value)
    elif kind is str and isinstance(value, list) and all(isinstance(item, str) for item in value):
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(value)
        return line.getvalue()
    raise ValueError(f"--config {path}: {name}: expected {kind.__name__}, got {value!r}")


def show_config(config: TrainConfig) -> str:
    """The settings as YAML, which `--config` reads, each with its meaning as a comment."""
    import yaml

    lines, values = [], to_dict(config)
    for group in GROUPS:
        lines.append(f"# {group}")
        for item in (item for item in fields(config) if item.metadata["group"] == group):
            line = yaml.safe_dump({item.name: values[item.name]}, allow_unicode=True, width=math.inf)
            lines.append(f"{line.removesuffix(chr(10))}  # {meaning(item)}")
    return "\n".join([*lines, ""])
