"""The ahead-of-time audit: it covers every kernel, every target compiles, and it fails when it should."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
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


def run(script, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def audit(*arguments):
    return run("bench/audit.py", *arguments)


def test_what_is_audited_is_what_a_launch_compiles():
    done = run("tests/warmup_worker.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "6 launches agree"


def read(path):
    with path.open() as file:
        assert file.readline().startswith("# make audit: triton ")
        return list(csv.DictReader(file))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_on_every_target(target, tmp_path):
    done = audit("--targets", target, "--output", str(tmp_path / "table.csv"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read(tmp_path / "table.csv")
    assert {row["kernel"] for row in rows} == KERNELS
    for dtype in ("float32", "bfloat16", "float16"):
        mine = [row for row in rows if row["dtype"] == dtype]
        assert {row["kernel"] for row in mine} >= KERNELS - {"objective_kernel"}  # it sees float32 alone
        assert all(row["dimensions"] == "384 768 1024" for row in mine)
    assert all(row["verdict"] == "ok" for row in rows)


def test_a_violation_is_named_and_fails(tmp_path):
    done = audit("--targets", "sm_90", "--shared-limit", "70000", "--output", str(tmp_path / "table.csv"))
    assert done.returncode == 1
    bad = [row for row in read(tmp_path / "table.csv") if row["verdict"] != "ok"]
    assert bad
    assert all("bytes of shared memory, the limit is 70000" in row["verdict"] for row in bad)
    assert f"{len(bad)} violations" in done.stdout


def test_rules():
    code = (
        "import audit\n"
        "row = dict(kernel='gradient_kernel', launch='x', target='sm_90', dtype='bfloat16', spills=0,\n"
        "           stack_bytes=0, shared_bytes=0, matrix_instructions='HGMMA:4')\n"
        "assert not audit.violations(row)\n"
        "for bad in (dict(matrix_instructions='HGMMA:4 HMMA:2'), dict(matrix_instructions=''),\n"
        "            dict(spills=2), dict(stack_bytes=8), dict(shared_bytes=10**6), dict(error='boom')):\n"
        "    assert audit.violations({**row, **bad}), bad\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", check=True)


def test_amd_waits_for_stores_before_it_counts_arrivals():
    """On gfx9 a barrier does not wait for other waves' stores, so our own wait stands before it."""
    code = (
        "import audit, triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "with audit.assume(audit.Target('hip', 'gfx942')):\n"
        "    launches = audit.record(audit.torch.float32, 768, 512)\n"
        "    for label in ('assignment', 'objective, plain'):\n"
        "        each = launches[label]\n"
        "        built = triton.compile(audit.source(each, 'hip'), target=GPUTarget('hip', 'gfx942', 64),\n"
        "                               options=each.tiles.options('hip'))\n"
        "        code = built.asm['amdgcn']\n"
        "        ours = code.index('ASMSTART')\n"
        "        lines = [line.split()[0] for line in code[ours:].splitlines() if line.split()]\n"
        "        barrier = lines.index('s_barrier')\n"
        "        assert 's_waitcnt' in lines[:barrier], label\n"
        "        stores = [line for line in lines[:barrier] if 'store' in line]\n"
        "        assert not stores, (label, stores)\n"
        "        assert 'global_atomic_add' in lines[barrier:], label\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_unknown_target_is_refused():
    done = audit("--targets", "sm_90,sm_12")
    assert done.returncode == 2
    assert "--targets: expected of sm_80, sm_90, sm_100, gfx942, got sm_12" in done.stderr
