"""Run a script of bench/ on these sentences, not on the docstrings that this machine happens to have.

And without Dynamo, so that what is compiled runs as it is: minutes of compilation say nothing about a script;
and without the picture of a training, most of the time of a tiny one.
"""

from __future__ import annotations

import runpy
import sys
from itertools import pairwise
from pathlib import Path

import torch._dynamo
from train_problems import sentences

from clusterns import train
from clusterns.corpus import docstrings

LINES = [f"{line.capitalize()}." for line in sentences(400)]
CORPUS = docstrings.DocstringCorpus(LINES, [], [], list(pairwise(LINES)))

if __name__ == "__main__":
    torch._dynamo.config.disable = True
    docstrings.docstring_corpus = lambda *_, **__: CORPUS
    train.draw_run = lambda records, path: path.touch()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
