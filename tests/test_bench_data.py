"""The benchmark of the data path from end to end, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_data_throughput(tmp_path):
    pytest.importorskip("sentence_transformers")
    options = "--kinds sentences --rows 300 --batch-size 32 --rounds 1 --steps 2 --output data.json".split()
    scripts = [str(ROOT / name) for name in ("tests/support/fixed_corpus.py", "bench/data.py")]
    command = [sys.executable, *scripts, *options]  # no fork: its loaders start workers of their own
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    content = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert "python bench/data.py --kinds sentences " in content["machine"]["command"]
    rows = content["kinds"]["sentences"]
    assert {name.split(",")[0] for name in rows} == {"clusterns", "sentence-transformers", "datasets.map"}
    for row in rows.values():
        assert row["rows"] == 300
        assert row["rows_per_second"] > 0
        assert row["wait_ms"] > 0
