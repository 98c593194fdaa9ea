"""Run a script of bench/ on these sentences, not on the docstrings that this machine happens to have.

And without Dynamo, so that what is compiled runs as it is: minutes of compilation say nothing about a script;
without the picture of a training, most of the time of a tiny one; its processes forked, not started anew.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import torch._dynamo
from forked import run_python
from train_problems import sentences

from clusterns import train
from clusterns.corpus import docstrings

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
LINES = [f"{line.capitalize()}." for line in sentences(400)]
CORPUS = docstrings.DocstringCorpus(LINES, [], [], list(pairwise(LINES)))


def run(folder: Path, script: str, *arguments: str, status: int = 0) -> str:
    """What a script of bench/ prints, in that folder."""
    return run_python(folder, Path(__file__), str(BENCH / script), *arguments, status=status)


def rows(path: Path) -> list[dict]:
    """Rows of a table, or of the results of a run."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else json.load(file)["rows"]


if __name__ == "__main__":
    torch._dynamo.config.disable = True
    docstrings.docstring_corpus = lambda *_, **__: CORPUS
    train.draw_run = lambda records, path, *_: path.touch()
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda _=None: forked
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
