"""Does the large-batch stage of bench/gpu.sh run from end to end, before a GPU is lent for it?"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_dry_run_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "gpu_large_batch.py"), "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    content = json.loads((tmp_path / "cpu-machinery-large.json").read_text())
    assert not content["skipped"]
    assert (tmp_path / "cpu-machinery-large.png").stat().st_size > 10_000
    with (tmp_path / "cpu-machinery-large.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["contender"] == "clusterns"]
    assert {row["status"] for row in ours} == {"ok"}
    assert {row["regime"] for row in ours} == {"", "triton", "triton-chunked"}
    assert {row["kind"] for row in ours} == {"step", "plain", "assignment"}
    assert {row["status"] for row in rows} <= {"ok", "left out", "not installed"}


def test_expected_figures_say_that_nobody_measured_them() -> None:
    command = [sys.executable, str(HERE / "gpu_large_batch.py"), "--arithmetic"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ARITHMETIC, NOT MEASURED")
    assert "262,144" in done.stdout
    assert "1,048,576" in done.stdout
