"""The scripts of bench/ that no GPU has run yet, or that make a published table: from end to end, small."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixed_corpus import BENCH, ROOT, rows, run

SMALL = "--device cpu --batch 16 40 --dim 16 --clusters 8 --rounds 2".split()


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_every_kind_of_contender_on_a_cpu(tmp_path):
    ours = ["clusterns whole", "clusterns in chunks", "clusterns torch"]
    theirs = ["eager", "published", "torch.compile", "linear_cross_entropy"]
    run(tmp_path, "run.py", "large", *SMALL, "--batch", "40", "--contenders", *ours, *theirs, "--output", ".")
    content = json.loads((tmp_path / "cpu-large.json").read_text("utf-8"))
    assert not content["skipped"]
    assert content["machine"]["matrix rate"]
    assert {row["contender"] for row in content["rows"]} == {"clusterns", *ours, *theirs}
    for row in content["rows"]:
        assert row["status"] == "ok", row
        assert row["contender"] == "clusterns" or row["ratio_device"] > 0, row
        assert row["loss_error"] < 1e-4, row
        assert row["loss"] > 0


def test_the_kernels_and_another_checkout_beside_ours(tmp_path):
    pytest.importorskip("triton")
    names = ["--contenders", "clusterns triton", "before", "--before", str(ROOT)]
    run(tmp_path, "run.py", "objective", *SMALL, "--batch", "16", *names, "--output", ".")
    found = rows(tmp_path / "cpu-objective.json")
    assert [row["contender"] for row in found] == ["clusterns", "clusterns triton", "before"]
    assert {row["status"] for row in found} == {"ok"}
    assert found[2]["ratio_device"] > 0


def test_a_row_of_ours_that_fails_is_said_and_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTERNS_DISABLE_TRITON", "1")
    contenders = ["--contenders", "clusterns triton", "eager"]
    said = run(tmp_path, "run.py", "step", *SMALL, *contenders, "--output", ".", status=1)
    assert "failed RuntimeError: backend: 'triton' cannot run" in said
    assert [row["status"] for row in rows(tmp_path / "cpu-step.json")] == ["ok", "failed", "ok"] * 2


def test_exactness_by_every_backend(tmp_path):
    pytest.importorskip("triton")
    command = "exactness --batch 20 --dim 16 --clusters 8 --dtype bfloat16 --output .".split()
    run(tmp_path, "run.py", *command)
    content = json.loads((tmp_path / "cpu-exactness.json").read_text("utf-8"))
    assert len(content["rows"]) == 4 * 2  # backends with a workspace, λ
    for row in content["rows"]:
        assert row["status"] == "ok", row
        assert row["gradient_error"] <= row["eager_gradient_error"] + row["tolerance"]
    assert content["machine"]["command"].startswith(
        "TRITON_INTERPRET=1 python bench/run.py exactness --batch"
    )


def test_where_the_paths_cross(tmp_path, monkeypatch):
    """In the middle of two sizes on logarithmic scales; and the real paths, in the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(BENCH)
    import crossover
    from contenders import FP32, Case
    from measure import Clock
    from report import Results

    points = [
        {"cells": cells, "ratio_chunks": ratio} for cells, ratio in ((4, 8), (100, 2), (400, 0.5), (900, 0.1))
    ]
    assert crossover.crossing(points) == 200
    assert crossover.crossing(points[:2]) is None
    assert crossover.crossing(points[3:]) is None
    results = Results(tmp_path, {}, "crossover", on_gpu=False)
    crossover.measure(
        results, Clock(rounds=1, block_seconds=0, seconds=0), Case("objective", 20, 16, 8, FP32)
    )
    content = json.loads((tmp_path / "cpu-crossover.json").read_text("utf-8"))
    assert content["rows"][0]["cells"] == 20 * 28
    assert min(content["rows"][0][f"{path}_us"] for path in crossover.PATHS) > 0
    assert "crossover objective 16 8 float32 highest" in content["machine"]


@pytest.mark.parametrize("what", ["crossover", "tiles"])
def test_a_question_for_a_gpu(tmp_path, what):
    """Asked without one it says so in one line; what it would measure can be listed."""
    said = run(tmp_path, "run.py", what, "--device", "cpu", "--output", ".", status=1)
    assert (
        said.splitlines()[-1] == f"{what}: expected a GPU, there is none; --list shows what would be measured"
    )
    assert "B=16384" in run(tmp_path, "run.py", what, "--list", "--device", "cuda", "--output", ".")


def test_training_as_a_whole(tmp_path):
    """Four trainings, and the memory of a step."""
    pytest.importorskip("accelerate")
    small = "--layers 1 --dim 64 --batch 16 --clusters 8 --steps 6 --rounds 1 --output .".split()
    run(tmp_path, "run.py", "training", "--device", "cpu", *small)
    kinds: dict[str, list[dict]] = {}
    for row in rows(tmp_path / "cpu-training.json"):
        assert row["status"] == "ok", row
        kinds.setdefault(row["kind"], []).append(row)
    assert [min(row["sentences_per_second"], row["loss"]) > 0 for row in kinds["trainer"]] == [True] * 4
    assert [row["peak_mib"] > 0 for row in kinds["step memory"]] == [True] * 3


def test_what_was_measured_before_a_stop_is_there(tmp_path):
    command = [sys.executable, str(BENCH / "run.py"), "step", *SMALL, "--output", str(tmp_path)]
    with (tmp_path / "printed").open("w+", encoding="utf-8") as printed:
        started = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        results = tmp_path / "cpu-step.json"
        try:
            while not (results.exists() and rows(results)):
                assert started.poll() is None, printed.name
                time.sleep(0.01)
        finally:
            os.killpg(started.pid, signal.SIGINT)
        assert started.wait() == 0
        printed.seek(0)
        assert "rows measured" in printed.read()
    content = json.loads(results.read_text("utf-8"))
    assert (content["rows"][0]["status"], content["rows"][0]["contender"]) == ("ok", "clusterns")
    assert content["skipped"][0].endswith(": interrupted")


def test_gpu_tests_need_nothing_that_a_gpu_machine_lacks():
    """All files with tests for a GPU are named in the script, and none needs what is not there."""
    patterns = re.search(r"^gpu_tests=\((.*)\)$", (BENCH / "gpu.sh").read_text(encoding="utf-8"), re.M)[1]
    spread = ["bash", "-c", f"shopt -s nullglob; echo {patterns}"]
    named = subprocess.run(spread, cwd=ROOT, capture_output=True, check=True).stdout.decode().split()
    for path in (ROOT / "tests").glob("test_*.py"):
        if path != Path(__file__) and "pytest.mark.gpu" in path.read_text(encoding="utf-8"):
            assert f"tests/{path.name}" in named
    absent = "sys.modules.update(dict.fromkeys(('datasets', 'ruff', 'mypy')))"
    collect = f"import sys; {absent}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", collect, "--collect-only", "-q", "-p", "no:cacheprovider", *named]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_results_hold_no_path_of_the_machine_that_made_them(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import report

    files = [path for path in (BENCH / "results").rglob("*") if path.suffix in {".json", ".csv", ".md"}]
    assert len(files) > 5
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert report.without_paths(text) == text, path
        assert not re.search(r"/(?:home|root|tmp|Users|var|mnt|opt|srv)/|[A-Z]:\\", text), path
