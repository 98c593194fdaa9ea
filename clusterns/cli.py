"""The command `clusterns`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__
from .config import add_arguments, read_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends in one line on stderr and exit status 2."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        given.command(given)
    except KeyboardInterrupt:
        print("clusterns: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("CLUSTERNS_TRACEBACK"):
            raise
        print(f"clusterns: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="clusterns",
        description="Train and evaluate sentence encoders with clustering-aware negatives.",
        epilog="CLUSTERNS_TRACEBACK=1 shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"clusterns {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train an encoder on sentences",
        description="Train a sentence encoder. With no arguments: a small BERT from scratch on the "
        "documentation strings of this machine's Python packages, in about two minutes.",
    )
    add_arguments(train)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="score an encoder on the seven STS sets")
    evaluate.add_argument("model", metavar="MODEL", help="folder or hub name of an encoder")
    evaluate.add_argument("--sts-dir", required=True, metavar="DIR", help="STS sets in SentEval's layout")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures there")
    evaluate.add_argument(
        "--pooling", choices=("cls", "mean"), help="default: what the model's files say, else cls"
    )
    evaluate.add_argument("--batch-size", type=int, default=64, metavar="INT", help="default 64")
    evaluate.add_argument("--max-length", type=int, metavar="INT", help="default: what the model takes")
    evaluate.set_defaults(command=_evaluate)
    return parser


def _train(given: argparse.Namespace) -> None:
    config = read_config(given)
    _quiet_transformers()
    from .train import train  # late: --help should not load transformers

    train(config)


def _evaluate(given: argparse.Namespace) -> None:
    _quiet_transformers()
    from .evaluate import run

    run(
        given.model,
        given.sts_dir,
        pooling=given.pooling,
        json_file=given.json,
        batch_size=given.batch_size,
        max_length=given.max_length,
    )


def _quiet_transformers() -> None:
    """Leave the terminal to our own lines: no loading bars, no report on an absent pooler."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
