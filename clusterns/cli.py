"""The command `clusterns`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from . import __version__

# What a write says whose file has no room or no reader; it does not name the file.
_UNWRITTEN = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EPIPE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends in one line on stderr and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # λ in another locale is a question mark, not an error
        sys.stdout.reconfigure(errors="replace")
    try:
        with _one_interrupt(), _flushed():
            given = build_parser().parse_args(arguments)
            with warnings.catch_warnings():
                warnings.showwarning = _say_warning
                return given.command(given) or 0
    except KeyboardInterrupt as interrupt:
        print("clusterns: interrupted", *interrupt.args, sep="\n", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("CLUSTERNS_TRACEBACK"):
            raise
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
        text = " ".join(_words(error).split())
        if isinstance(error, ModuleNotFoundError) and error.name:
            text = f"expected the package {error.name}, which is not installed"
            extra = "train" if "train" in (arguments or sys.argv[1:])[:1] else "evaluate"
            text += f'; pip install "clusterns[{extra}]"'
        print(f"clusterns: error: {rank}{text}", file=sys.stderr)
        _forget_output()
        return 2


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Of Ctrl-C only the first counts: what a command then clears away is not to be interrupted too."""

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """What is printed is written before the command ends; also where argparse ends it."""
    try:
        yield
    finally:
        print(end="", flush=True)


def _words(error: BaseException) -> str:
    """Of an error; one of the operating system without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.filename is None and error.errno in _UNWRITTEN:
        return f"the output cannot be written, got {error.strerror}"
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)


def _forget_output() -> None:
    """Where it cannot be written, else Python tries once more at its end, and complains."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and takes no part of a flag for the flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """No flag is unknown: here, as the parser of a command knows what its flags are called."""
        given, unknown = super().parse_known_args(args, namespace)
        if unknown:
            from .checks import nearest  # late, as it needs torch

            flag = unknown[0].partition("=")[0]
            likely = nearest(flag, self._option_string_actions)
            self.error(f"{flag}: expected a flag or argument of `{self.prog}`, got an unknown one{likely}")
        return given, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"clusterns: error: {' '.join(message.split())}\n")


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In one line, without the place in the code; once for all ranks, which read the same."""
    if os.environ.get("RANK", "0") == "0":
        print(f"clusterns: warning: {' '.join(str(message).split())}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = _Parser(
        prog="clusterns",
        description="Train and evaluate sentence encoders with clustering-aware negatives.",
        epilog="CLUSTERNS_TRACEBACK=1 shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"clusterns {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    from .training.arguments import add_arguments  # late, as it needs torch

    train = commands.add_parser(
        "train",
        usage="clusterns train [--config FILE] [FLAG ...]",
        help="train an encoder on sentences",
        description="Train a sentence encoder. With no arguments: a small BERT from scratch on the "
        "documentation strings of this machine's Python packages, in about two minutes. Several GPUs: "
        "torchrun --nproc-per-node W -m clusterns train ...",
    )
    add_arguments(train)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="score encoders on STS sets and data of your own",
        description="Score encoders: Spearman correlations on STS sets with bootstrap intervals, geometry of "
        "the embeddings; on scored pairs, labelled texts or queries of your own; several models also against "
        "each other.",
    )
    _add_evaluate_arguments(evaluate)
    evaluate.set_defaults(command=_evaluate)

    compare = commands.add_parser(
        "compare",
        help="compare groups of trainings over their seeds",
        description="Compare trainings over seeds: mean and standard deviation of each group, and the paired "
        "differences of each later group to the first, with intervals. A group is the runs in one folder, as "
        "`clusterns train --seeds` leaves them.",
    )
    _add_compare_arguments(compare)
    compare.set_defaults(command=_compare)

    report = commands.add_parser(
        "report",
        help="look inside the clusters of a run or model",
        description="Write one HTML page on how sentences cluster: verdicts, a map, the clusters by "
        "name, hard and false negatives, the run's curves; and all rows as CSV.",
    )
    _add_report_arguments(report)
    report.set_defaults(command=_report)

    encode = commands.add_parser(
        "encode",
        help="write the embeddings of a file's texts",
        description="Write the embedding of every text of a file, in the file's order, as numpy or parquet.",
    )
    _add_encode_arguments(encode)
    encode.set_defaults(command=_encode)
    return parser


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """What a command was given, by the names of its function's arguments."""
    return {name: value for name, value in vars(given).items() if name != "command"}


def _train(given: argparse.Namespace) -> None:
    from .training.arguments import read_config, show_config

    config = read_config(given)
    if given.show_config:
        print(show_config(config), end="")
        return
    _quiet_transformers()
    if given.seeds is None:
        from .train import train  # late: --help should not load transformers

        train(config)
        return
    from .compare import run
    from .training.seeds import train_seeds

    folders = train_seeds(config, given.seeds)
    if config.is_judged:
        run([str(folder) for folder in folders])


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="folder or hub name of an encoder")
    add(
        "--sts-dir",
        metavar="SOURCE",
        help="folder of STS sets in SentEval's layout; or hub:senteval; or hub:mteb, whose SICK-R is another",
    )
    add(
        "--sts-sets",
        dest="sets",
        nargs="+",
        metavar="SET",
        help="STS12 ... STS16, STS-B, SICK-R, STS-B-dev, SICK-R-dev; default all of these",
    )
    add(
        "--data",
        nargs="+",
        default=(),
        metavar="FILE",
        help="files of your own: scored pairs, labelled texts, or queries with their passages; which of "
        "them is found from the columns of each",
    )
    add("--data-kind", metavar="KIND", help="pairs, labels or queries, where the columns do not tell")
    add(
        "--data-columns",
        metavar="NAMES",
        help="their columns, as sentence1,sentence2,score or text,label or query,passage; names, or numbers "
        "from 1",
    )
    add("--data-corpus", metavar="FILE", help="more passages, among which those of --data are to be found")
    _add_file_arguments(parser)
    add(
        "--kmeans",
        choices=("kmeans", "spherical"),
        default="kmeans",
        help="scikit-learn's on the embeddings as they are, as in the paper (default), or by cosine",
    )
    add(
        "--cluster-seeds",
        type=int,
        default=5,
        metavar="INT",
        help="runs of k-means on labelled texts (default 5)",
    )
    add(
        "--pooling",
        type=lambda text: text.split(","),
        metavar="NAME",
        help="cls, mean ...; default auto: what the model's files say; by commas one for each model",
    )
    add("--max-length", type=int, metavar="INT", help="tokens; default: what the model takes")
    add("--batch-size", type=int, default=64, metavar="INT", help="default 64")
    _add_precision(parser)
    add(
        "--resamples",
        type=int,
        default=1000,
        metavar="INT",
        help="of the bootstrap (default 1000); 0 for no intervals",
    )
    add("--seed", type=int, default=42, metavar="INT", help="of bootstrap and k-means (default 42)")
    _add_result_arguments(add)


def _add_result_arguments(add: Any) -> None:
    """Files for what came out."""
    add("--json", dest="json_file", metavar="FILE", help="write all figures there")
    add("--markdown", dest="markdown_file", metavar="FILE", help="write the tables there, with all details")
    add("--figure", dest="figure_file", metavar="FILE", help="draw the figures there (png, svg, pdf)")


def _add_file_arguments(parser: argparse.ArgumentParser, texts: str | None = None) -> None:
    """How to read a file, as `clusterns train` has it; of `texts` also which column they are."""
    if texts is not None:
        parser.add_argument(
            "--text-columns", metavar="NAME", help=f"column of {texts}, by its name or number from 1"
        )
    parser.add_argument(
        "--delimiter",
        metavar="WORD",
        help="comma, semicolon, tab, bar, none or a character; default: found out",
    )
    parser.add_argument(
        "--header",
        action=argparse.BooleanOptionalAction,
        help="whether the first line names the columns; default: found out",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 autocast is fast where the device computes in it; the second decimal may change",
    )


def _evaluate(given: argparse.Namespace) -> int:
    settings = _settings(given)
    _quiet_transformers()
    from .evaluate import run  # late: --help should not load transformers

    return run(settings.pop("models"), **settings)


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", metavar="RUN", nargs="+", help="output folder of a training, or a folder of such")
    add(
        "--scores",
        metavar="FILE",
        help="what `clusterns evaluate RUN ... --json FILE` wrote of them; default: their dev scores",
    )
    _add_result_arguments(add)


def _compare(given: argparse.Namespace) -> int:
    settings = _settings(given)
    from .compare import run

    return run(settings.pop("folders"), **settings)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="RUN_OR_MODEL", help="output folder of a training run, or any encoder")
    add("--sentences", required=True, metavar="FILE", help="txt, csv, tsv, json, jsonl or parquet file")
    _add_file_arguments(parser, "the sentences")
    add("--output", required=True, metavar="PAGE.html", help="the page")
    add(
        "--csv",
        dest="csv_file",
        metavar="FILE",
        help="every row with its cluster, cosine, runner-up and mates; default: PAGE.csv, as the page is "
        "called; the examples stand beside it, in PAGE-examples.csv",
    )
    add(
        "--rows",
        type=_rows,
        default=5000,
        metavar="INT|all",
        help="rows of the file at most, from the beginning (default 5000)",
    )
    add(
        "--num-clusters",
        type=int,
        metavar="INT",
        help="cluster the sentences anew into so many; default: a run's own centroids, else one for 40",
    )
    for flag, default, text in (
        ("--map-sentences", 3000, "of their sentences on the map, at most"),
        ("--examples", 20, "sentences shown with their negatives"),
        ("--nearest", 5, "sentences shown for each centroid"),
        ("--batch-size", 64, "sentences encoded at a time"),
        ("--seed", 42, "of sample, map and k-means"),
    ):
        add(flag, type=int, default=default, metavar="INT", help=f"{text} (default {default})")
    add("--map", dest="map_method", choices=("tsne", "pca"), default="tsne", help="default tsne")
    add("--pooling", metavar="NAME", help="cls, mean ...; default: what the model's files say")


def _rows(text: str) -> int | None:
    """A number, or None for all."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or all, got {text!r}") from None


def _report(given: argparse.Namespace) -> int:
    settings = _settings(given)
    _quiet_transformers()
    from .evaluation.report import write_report

    return write_report(**settings)


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub name of an encoder")
    add("file", metavar="FILE", help="txt, csv, tsv, json, jsonl or parquet file, or a hub dataset")
    add(
        "--output",
        required=True,
        metavar="FILE",
        help=".npy, float32, a row for each text; or .parquet, with the columns text and embedding",
    )
    _add_file_arguments(parser, "the texts")
    add("--pooling", metavar="NAME", help="cls, mean ...; default: what the model's files say")
    add("--max-length", type=int, metavar="INT", help="tokens; default: what the model's files say")
    add("--batch-size", type=int, default=64, metavar="INT", help="default 64")
    _add_precision(parser)


def _encode(given: argparse.Namespace) -> None:
    settings = _settings(given)
    _quiet_transformers()
    from .encode import encode_file

    encode_file(**settings)


def _quiet_transformers() -> None:
    """Leave the terminal to our own lines: no loading bars, no report on an absent pooler."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
