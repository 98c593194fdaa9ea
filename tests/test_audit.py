"""The ahead-of-time audit: it covers every kernel, every target compiles, and it fails when it should."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
# What spills depends on the compiler: promised is the one that `make` installs.
PINNED = f"triton=={triton.__version__};" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
KERNELS = {
    "centroid_update_kernel",
    "cosine_kernel",
    "gradient_kernel",
    "margins_kernel",
    "objective_kernel",
    "similarity_gradient_kernel",
    "through_norm_kernel",
    "weights_kernel",
}
CHECKS = [  # of audit_worker.py
    "launches_agree",
    "every_kernel_compiles_elsewhere",
    "rules",
    "a_violation_is_named_and_fails",
    "amd_waits_for_stores_before_it_counts_arrivals",
    "an_unknown_target_is_refused",
]


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "bench")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)


# All launches of one dtype, for one batch, without what is swept; `make audit` compiles all there is.
PART = (
    "import audit, sys; audit.DTYPES = {'bfloat16': audit.DTYPES['bfloat16']}; audit.SWEPT = (); "
    "audit.BATCHES = audit.BATCHES[:1]; sys.exit(audit.main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "table.csv"
    return path, run("-c", PART, "--targets", "sm_90", "--output", path)


@pytest.fixture(scope="module")
def checked(table):
    return run(ROOT / "tests" / "support" / "audit_worker.py", table[0], "pinned" if PINNED else "other")


def test_every_launch_on_a_target(table):
    path, done = table
    assert done.returncode == 0 or not PINNED, done.stdout[-3000:] + done.stderr[-3000:]
    with path.open(encoding="utf-8") as file:
        assert file.readline().startswith("# make audit: triton ")
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["dimensions"] == "384 768 1024" for row in rows)
    assert not PINNED or all(row["verdict"] == "ok" for row in rows)


@pytest.mark.parametrize("check", CHECKS)
def test_the_rest_of_the_audit(checked, check):
    assert check in checked.stdout.split(), checked.stderr[-3000:]
