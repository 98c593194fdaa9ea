"""The scripts of bench/ that no GPU has run yet, or that make a published table: from end to end, small."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def test_large_batches_of_the_gpu_script_on_a_cpu(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCH / "gpu_large_batch.py"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
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


def test_expected_figures_say_that_nobody_measured_them():
    command = [sys.executable, str(BENCH / "gpu_large_batch.py"), "--arithmetic"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ARITHMETIC, NOT MEASURED")
    assert "262,144" in done.stdout
    assert "1,048,576" in done.stdout


def test_exactness_by_every_backend_and_dtype(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    table = tmp_path / "exactness.csv"
    command = [sys.executable, str(BENCH / "exactness.py"), "--batches", "64", "--dim", "64"]
    done = subprocess.run(
        [*command, "--output", str(table)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2  # dtypes, backends, λ
    assert {row["within"] for row in rows} == {row["repeatable"] for row in rows} == {"True"}
    assert rows[0]["command"].startswith("TRITON_INTERPRET=1 python ")


def test_training_in_its_parts(tmp_path):
    """With sentences per second of three trainers, and the memory of a step."""
    pytest.importorskip("accelerate")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    small = "--layers 1 --hidden 64 --batch 16 --clusters 8 --steps 6 --rounds 1 --memory-batches 16".split()
    command = [
        sys.executable,
        str(BENCH / "training.py"),
        *small,
        "--output",
        str(tmp_path / "training.json"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    content = json.loads((tmp_path / "training.json").read_text())
    assert len(content["whole"]) == 3
    assert all(row["sentences_per_second"] > 0 for row in content["whole"].values())
    assert {"data", "encoder", "optimiser", "loss: clusterns", "loss: published"} <= content["parts"].keys()
    assert all(row["peak_mib"] > 0 for row in content["memory"])
    assert len(content["memory"]) == 3
