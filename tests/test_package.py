"""What an install promises: names, signatures, no import that needs a GPU, README code that runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import clusterns
from clusterns.cli import main

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_live_inside_the_package():
    """The bare name `kernels` belongs to another package, which transformers probes for."""
    installed = run("import clusterns.kernels as k; print(k.__file__)")
    assert Path(installed).resolve() == ROOT / "kernels" / "__init__.py"
    assert (metadata.distribution("clusterns").read_text("top_level.txt") or "").split() == ["clusterns"]
    assert run("import importlib.util as u; print(u.find_spec('kernels'))") == "None"


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


def test_import_does_not_load_triton():
    assert run("import sys, clusterns; print('triton' in sys.modules)") == "False"


def test_version_is_stated_once():
    assert clusterns.__version__ == metadata.version("clusterns")
    assert f"version: {clusterns.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {clusterns.__version__}" in (ROOT / "CHANGELOG.md").read_text()


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


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_code_runs():
    printed = [run(block) for block in readme_blocks("python")]
    assert len(printed) == 3
    assert all("info_nce" in text for text in printed[:2])
    assert "(20, 64)" in printed[2]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_readme_flags_exist(command, capsys):
    """Every flag that the README shows is one the command knows."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    help_text = capsys.readouterr().out
    shell = "\n".join(readme_blocks("sh")).replace("\\\n", " ")
    lines = [line for line in shell.splitlines() if f"clusterns {command}" in line]
    assert lines
    for flag in {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)}:
        assert flag in help_text, flag
