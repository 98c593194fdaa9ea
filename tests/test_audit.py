"""The ahead-of-time audit: it covers every kernel, every target compiles, and it fails when it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
WORKER = Path(__file__).parent / "support" / "audit_worker.py"
CHECKS = re.findall(r"^def (\w+)\(\):", WORKER.read_text(encoding="utf-8"), re.M)


@pytest.fixture(scope="module")
def checked():
    bench = Path(__file__).resolve().parents[1] / "bench"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(bench)}
    return subprocess.run(
        [sys.executable, str(WORKER)], capture_output=True, encoding="utf-8", check=False, env=environment
    )


@pytest.mark.parametrize("check", CHECKS)
def test_audit(checked, check):
    assert check in checked.stdout.split(), checked.stdout[-2000:] + checked.stderr[-3000:]
