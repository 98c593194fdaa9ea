"""What an install promises: names, signatures, no import that needs a GPU."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import clusterns

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_are_where_they_belong():
    """Triton is not loaded before it is needed, and the bare name `kernels` belongs to another package,
    which transformers probes for."""
    code = """
import sys, clusterns
from importlib.util import find_spec
print("triton" in sys.modules, find_spec("kernels"))
import clusterns.kernels
print(clusterns.kernels.__file__)
"""
    loaded, installed = run(code).splitlines()
    assert loaded == "False None"
    assert Path(installed).resolve() == ROOT / "kernels" / "__init__.py"
    assert (metadata.distribution("clusterns").read_text("top_level.txt") or "").split() == ["clusterns"]


def test_import_needs_neither_triton_nor_what_training_needs():
    absent = ["triton", "transformers", "datasets", "scipy", "matplotlib", "sentence_transformers"]
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in absent)
    code = (
        f"import sys; {blocked}; import torch, clusterns, clusterns.kernels, clusterns.cli; "
        "x = torch.randn(8, 4, requires_grad=True); "
        "loss = clusterns.ClusterNSLoss(4, 2, start_cosine=1.0)(x, x.detach()); "
        "loss.backward(); print(bool(loss.isfinite()))"
    )
    assert run(code) == "True"


def test_without_what_training_needs_the_extra_is_named():
    absent = ["transformers", "datasets", "scipy", "matplotlib", "pyarrow", "sklearn"]
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in absent)
    start = f"import sys; {blocked}; sys.stderr = sys.stdout; from clusterns.cli import main"
    for arguments, extra in (("train", "train"), ("evaluate m --sts-dir d", "evaluate")):
        said = run(f"{start}; print(main({arguments.split()}))")
        assert 'which is not installed; pip install "clusterns[' + extra + ']"' in said
        assert said.endswith("2")


def test_an_interrupt_while_torch_is_loaded():
    code = """
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.stderr = sys.stdout
from clusterns.cli import main
print(main(["train"]))
"""
    assert run(code).splitlines() == ["clusterns: interrupted", "130"]


def test_version_is_stated_once():
    assert clusterns.__version__ == metadata.version("clusterns")
    assert f"version: {clusterns.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {clusterns.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_public_signatures():
    """Others build on these names and defaults."""
    loss = inspect.signature(clusterns.ClusterNSLoss).parameters
    defaults = {name: p.default for name, p in loss.items() if p.default is not p.empty}
    assert defaults == {
        "num_clusters": 128,
        "temperature": 0.05,
        "start_cosine": 0.4,
        "centroid_momentum": 1e-3,
        "centroid_update": "sum",
        "hard_negatives": True,
        "hard_negative_weight": 0.0,
        "false_negatives": "bml",
        "bml_weight": 1e-4,
        "bml_alpha": 0.2,
        "bml_beta": 0.5,
        "backend": "auto",
        "process_group": None,
        "gather": "all",
        "workspace_bytes": 256 * 2**20,
    }
    assert list(loss)[:2] == ["embedding_dim", "num_clusters"]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in loss.items() if name not in list(loss)[:2])
    assert list(inspect.signature(clusterns.ClusterNSLoss.forward).parameters)[1:] == [
        "anchors",
        "positives",
        "negatives",
    ]
    seed = inspect.signature(clusterns.seed_centroids).parameters
    assert list(seed) == ["anchors", "positives", "num_clusters", "first", "generator"]
    assert list(inspect.signature(clusterns.nearest_centroids).parameters) == ["points", "centroids"]
    similarity = inspect.signature(clusterns.cosine_similarity_matrix).parameters
    assert list(similarity) == ["a", "b", "temperature"]
    assert similarity["temperature"].default == 1.0
