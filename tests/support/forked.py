"""Python in processes of its own, forked from one that has torch, transformers and the package loaded."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Of the first that starts one in a process of tests; what another needs besides is loaded when it is needed.
PRELOADED = [
    "clusterns.train",
    "clusterns.evaluate",
    "clusterns.evaluation.figure",
    "clusterns.evaluation.report",
    "clusterns.sentence_transformers",
    "clusterns.training.figure",
    "matplotlib.pyplot",
    "sklearn.decomposition",
    "transformers.models.bert.modeling_bert",
    "triton.runtime.interpreter",
]


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """A process that calls a function of a module, with one thread: what is this small needs no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_call, args=(dict(os.environ), function, *arguments))
    with pytest.MonkeyPatch.context() as patch:  # else it loads a package of the working directory
        patch.setenv("PYTHONSAFEPATH", "1")
        process.start()
    return process


def _call(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> None:
    gc.freeze()  # what is loaded stays, and is not looked through again by each collection
    os.environ.clear()
    os.environ.update(environment)  # may have changed since the first
    torch.set_num_threads(1)
    function(*arguments)


def run_python(folder: Path, code: str | Path, *arguments: str, status: int = 0) -> str:
    """What `python -c code` or `python script` prints in a folder; it must end with the status."""
    out = folder / "printed.txt"
    process = start(_python, folder, code, arguments, out)
    process.join()
    printed = out.read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == status, printed[-6000:]
    return printed


def _python(folder: Path, code: str | Path, arguments: tuple[str, ...], out: Path) -> None:
    os.chdir(folder)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError, AttributeError):
            import quick_interpreter  # noqa: F401
    sys.argv = [str(code), *arguments]
    if isinstance(code, Path):
        sys.path.insert(0, str(code.parent))
        runpy.run_path(str(code), run_name="__main__")
    else:
        exec(code, {"__name__": "__main__"})
