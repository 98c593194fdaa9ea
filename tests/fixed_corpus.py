"""Run a script of bench/ on these sentences, not on the docstrings that this machine happens to have."""

from __future__ import annotations

import runpy
import sys
from itertools import pairwise
from pathlib import Path

from train_problems import sentences

from clusterns.corpus import docstrings

LINES = [f"{line.capitalize()}." for line in sentences(400)]
CORPUS = docstrings.DocstringCorpus(LINES, [], [], list(pairwise(LINES)))

if __name__ == "__main__":
    docstrings.docstring_corpus = lambda *_, **__: CORPUS
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
