"""Writes docs/settings.md from the code: the fields of `TrainConfig`, the presets, the other commands' flags.

python docs/make_settings.py
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from pathlib import Path
from typing import Any

from clusterns import ClusterNSLoss
from clusterns.cli import build_parser
from clusterns.training.config import FROM_SCRATCH, GROUPS, TrainConfig, flag
from clusterns.training.presets import PRESETS

PAGE = Path(__file__).with_name("settings.md")
BEGINNING = """# Settings

Made from the code by `python docs/make_settings.py`. The same words stand in `clusterns train --help`, and
behind each line of `clusterns train --show-config`.

A setting has one name everywhere: `--num-clusters` on the command line, `num_clusters` in a `--config` file
and in Python, as `TrainConfig.from_settings({"num_clusters": 64})`. `ClusterNSLoss` takes those marked ● too.
"Published" is what the presets have, where one of them has not the default.
"""


def settings_page() -> str:
    """The page, Markdown."""
    of_loss = inspect.signature(ClusterNSLoss).parameters
    parts = [BEGINNING]
    for group in GROUPS:
        rows = [
            [
                f"`{flag(item.name)}`",
                f"`{item.name}`" + (" ●" if item.name in of_loss else ""),
                item.metadata["symbol"],
                item.metadata["help"] + _choices(item.metadata["choices"]),
                _default(item),
                _published(item),
                item.metadata["when"],
            ]
            for item in dataclasses.fields(TrainConfig)
            if item.metadata["group"] == group
        ]
        header = ["flag", "Python", "symbol", "meaning", "default", "published", "change it when"]
        used = [place for place, _ in enumerate(header) if any(row[place] for row in rows)]
        parts += [
            f"## {group.capitalize()}",
            _table([[row[place] for place in used] for row in [header, *rows]]),
        ]
    actions = build_parser()._actions
    commands = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
    own = [action for action in commands.choices["train"]._actions if action.default != argparse.SUPPRESS]
    parts += ["## Beside these", "Of the command line of `clusterns train` alone.", _flags(own)]
    for name, parser in commands.choices.items():
        if name != "train":
            parts += [f"## clusterns {name}", parser.description or "", _flags(parser._actions)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _choices(words: tuple[str, ...] | None) -> str:
    return f" ({', '.join(words)})" if words and len(words) < 7 else ""


def _default(item: dataclasses.Field) -> str:
    usual = "" if item.default is None else _value(item.default)
    if item.name not in FROM_SCRATCH:
        return usual
    return f"{usual or 'none'}; from scratch {_value(FROM_SCRATCH[item.name])}"


def _published(item: dataclasses.Field) -> str:
    """The values of the presets, where one of them has another than the default, and whose they are."""
    if item.name in ("preset", "model", "train_file"):
        return ""
    values: dict[Any, list[str]] = {}
    for preset, settings in PRESETS.items():
        value = settings.get(item.name, item.default)
        if not (settings.get("num_clusters") == 0 and item.name not in settings):
            values.setdefault(value, []).append(preset)
    if set(values) <= {item.default}:
        return ""
    most = max(values, key=lambda value: len(values[value]))
    others = [f"{_value(value)} ({', '.join(names)})" for value, names in values.items() if value != most]
    return f"{_value(most)}, but {'; '.join(others)}" if others else _value(most)


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return value if isinstance(value, str) else f"{value:g}"


def _flags(actions: list[argparse.Action]) -> str:
    rows = [
        [
            "`" + (", ".join(action.option_strings) or f"{action.metavar}") + "`",
            (action.help or "").replace("%%", "%"),
        ]
        for action in actions
        if not isinstance(action, argparse._HelpAction)
    ]
    return _table([["flag", "meaning"], *rows])


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
