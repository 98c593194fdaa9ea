"""What an install promises: names, signatures, no import that needs a GPU."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import clusterns

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, *, without: str = "") -> str:
    """What code prints in a process without some packages."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in without.split())
    command = [sys.executable, "-c", f"import sys\nsys.stderr = sys.stdout\n{blocked}{code}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("triton", ["triton", ""])
def test_what_import_needs(triton):
    """Triton is not loaded before it is needed, and the bare name `kernels` belongs to another package,
    which transformers probes for. Without what training needs, the extra that brings it is named."""
    code = """
import torch, clusterns
from importlib.util import find_spec
print(sys.modules.get("triton"), find_spec("kernels"))
import clusterns.kernels, clusterns.cli
print(clusterns.kernels.__file__)
x = torch.randn(8, 4, requires_grad=True)
loss = clusterns.ClusterNSLoss(4, 2, start_cosine=1.0)(x, x.detach().flip(0))
loss.backward()
print(bool(loss.isfinite()))
for command in ("train", "evaluate m --sts-dir d"):
    print(clusterns.cli.main(command.split()))
"""
    of_training = "transformers datasets scipy matplotlib pyarrow sklearn sentence_transformers"
    said = run(code, without=f"{triton} {of_training}")
    loaded, installed, finite, *refusals = said.splitlines()
    assert (loaded, finite) == ("None None", "True")
    assert Path(installed).resolve() == ROOT / "kernels" / "__init__.py"
    assert refusals[1::2] == ["2", "2"]
    for extra, line in zip(("train", "evaluate"), refusals[::2], strict=True):
        assert f'which is not installed; pip install "clusterns[{extra}]"' in line
    assert (metadata.distribution("clusterns").read_text("top_level.txt") or "").split() == ["clusterns"]


def test_version_is_stated_once():
    assert clusterns.__version__ == metadata.version("clusterns")
    assert f"version: {clusterns.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {clusterns.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def described(function) -> str:
    """Names and defaults of the arguments."""
    signature = inspect.signature(function)
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_public_signatures():
    """Others build on these names and defaults."""
    assert described(clusterns.ClusterNSLoss) == (
        "(embedding_dim, num_clusters=128, *, temperature=0.05, start_cosine=0.4, centroid_momentum=0.001, "
        "centroid_update='sum', hard_negatives=True, hard_negative_weight=0.0, false_negatives='bml', "
        "bml_weight=0.0001, bml_alpha=0.2, bml_beta=0.5, directions='one', dimension_weight=0.0, "
        "dimension_temperature=0.5, backend='auto', process_group=None, gather='all', workspace_bytes=None)"
    )
    assert described(clusterns.ClusterNSLoss.forward) == "(self, anchors, positives, negatives=None)"
    seeding = "(anchors, positives, num_clusters, *, first=None, generator=None)"
    assert described(clusterns.seed_centroids) == seeding
    assert described(clusterns.nearest_centroids) == "(points, centroids)"
    assert described(clusterns.cosine_similarity_matrix) == "(a, b, temperature=1.0)"
