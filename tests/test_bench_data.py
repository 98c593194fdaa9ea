"""The benchmark of the data path from end to end, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def test_data_throughput(tmp_path):
    pytest.importorskip("sentence_transformers")
    options = "--kinds sentences --rows 300 --batch-size 32 --rounds 1 --steps 2".split()
    command = [sys.executable, str(BENCH / "data_throughput.py"), *options]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "data.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    rows = json.loads((tmp_path / "data.json").read_text())["kinds"]["sentences"]
    assert {name.split(",")[0] for name in rows} == {"clusterns", "sentence-transformers", "datasets.map"}
    for row in rows.values():
        assert row["rows"] == 300
        assert row["rows_per_second"] > 0
        assert row["wait_ms"] > 0
