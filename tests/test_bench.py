"""The scripts of bench/ that no GPU has run yet, or that make a published table: from end to end, small."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import run_python

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
SMALL = "--device cpu --batch 16 40 --dim 16 --clusters 8 --rounds 2".split()
# Without Dynamo what is compiled runs as it is: minutes of compilation say nothing about the scripts.
ON_A_CPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    for name, value in ON_A_CPU.items():
        monkeypatch.setenv(name, value)


def run(folder: Path, script: str, *arguments: str, status: int = 0) -> str:
    """What a script prints, in that folder."""
    corpus = ROOT / "tests" / "support" / "fixed_corpus.py"
    return run_python(folder, corpus, str(BENCH / script), *arguments, status=status)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_kind_of_contender_on_a_cpu(tmp_path):
    ours = ["clusterns whole", "clusterns in chunks", "clusterns backend=torch"]
    theirs = ["eager", "published", "torch.compile", "linear_cross_entropy", "Liger"]
    run(tmp_path, "run.py", "large", *SMALL, "--contenders", *ours, *theirs, "--output", ".")
    content = read(tmp_path / "cpu-large.json")
    assert not content["skipped"]
    assert content["machine"]["matrix rate"]
    assert (tmp_path / "cpu-large.png").stat().st_size > 10_000
    assert {row["contender"] for row in content["rows"]} == {"clusterns", *ours, *theirs}
    for row in content["rows"]:
        assert row["status"] == ("not installed" if row["contender"] == "Liger" else "ok"), row
        assert row["contender"] in ("clusterns", "Liger") or row["ratio_device"] > 0, row
        assert row["status"] != "ok" or row["loss_error"] < 1e-4, row


def test_the_kernels_and_another_checkout_beside_ours(tmp_path):
    pytest.importorskip("triton")
    names = ["--contenders", "clusterns backend=triton", "before", "--before", str(ROOT)]
    run(tmp_path, "run.py", "objective", *SMALL, "--batch", "16", *names, "--output", ".")
    rows = read(tmp_path / "cpu-objective.json")["rows"]
    assert [(row["contender"], row["status"]) for row in rows] == [
        ("clusterns", "ok"),
        ("clusterns backend=triton", "ok"),
        ("before", "ok"),
    ]
    assert rows[2]["ratio_device"] > 0


def test_a_row_of_ours_that_fails_is_said_and_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTERNS_DISABLE_TRITON", "1")
    contenders = ["--contenders", "clusterns backend=triton", "eager"]
    said = run(tmp_path, "run.py", "step", *SMALL, *contenders, "--output", ".", status=1)
    assert "failed RuntimeError: backend: 'triton' cannot run" in said
    assert [row["status"] for row in read(tmp_path / "cpu-step.json")["rows"]] == ["ok", "failed", "ok"] * 2


@pytest.mark.parametrize("question", ["step", "large", "assign", "k-means", "evaluate", "training"])
def test_questions_have_lists_headline_first(tmp_path, question):
    lines = run(tmp_path, "run.py", question, "--device", "cuda", "--list").splitlines()
    assert lines[0].startswith("training step" if question == "training" else "clusterns ")
    assert question not in ("step", "large") or lines[1].startswith("eager ")


def test_expected_figures_say_that_nobody_measured_them(tmp_path):
    printed = run(tmp_path, "run.py", "large", "--arithmetic")
    assert printed.startswith("ARITHMETIC, NOT MEASURED")
    assert "262,144" in printed


def test_exactness_by_every_backend_and_dtype(tmp_path):
    pytest.importorskip("triton")
    small = "--batches 40 --dim 32 --clusters 32".split()
    run(tmp_path, "exactness.py", *small, "--output", str(tmp_path / "exactness.csv"))
    with (tmp_path / "exactness.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2  # dtypes, backends, λ
    assert {row["within"] for row in rows} == {row["repeatable"] for row in rows} == {"True"}
    started = f"TRITON_INTERPRET=1 python bench/exactness.py {' '.join(small)} --output "
    assert rows[0]["command"].startswith(started)


def test_training_in_its_parts(tmp_path):
    """With sentences per second of three trainers, the memory of a step, and what the loss adds to one."""
    pytest.importorskip("accelerate")
    small = "--layers 1 --hidden 64 --batch 16 --clusters 8 --steps 6 --rounds 1 --memory-batches 16".split()
    run(tmp_path, "training.py", "--device", "cpu", *small, "--output", "training.json")
    content = read(tmp_path / "training.json")
    assert [row["sentences_per_second"] > 0 for row in content["whole"].values()] == [True] * 3
    assert {"data", "encoder", "optimiser", "loss: clusterns", "loss: published"} <= content["parts"].keys()
    assert [row["peak_mib"] > 0 for row in content["memory"]] == [True] * 3
    run(tmp_path, "run.py", "training", "--device", "cpu", "--output", ".")
    rows = read(tmp_path / "cpu-training.json")["rows"]
    assert [row["contender"] for row in rows if "adds_percent" in row][3] == "ClusterNS"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_what_was_measured_before_a_stop_is_there(tmp_path, stop):
    command = [sys.executable, str(BENCH / "run.py"), "step", *SMALL, "--output", str(tmp_path)]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "CLUSTERNS_STAGES": "step"}
    with (tmp_path / "printed").open("w+", encoding="utf-8") as printed:
        started = subprocess.Popen(
            command if stop == signal.SIGINT else ["bash", str(BENCH / "gpu.sh")],
            env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        results = tmp_path / "cpu-step.json"
        try:
            while not (results.exists() and read(results)["rows"]):
                assert started.poll() is None, printed.name
                time.sleep(0.01)
        finally:
            os.killpg(started.pid, stop)
        started.wait()
        printed.seek(0)
        said = printed.read()
    content = read(results)
    assert (content["rows"][0]["status"], content["rows"][0]["contender"]) == ("ok", "clusterns")
    if stop == signal.SIGINT:
        assert started.returncode == 0
        assert content["skipped"][0].endswith(": interrupted")
        assert "rows measured" in said
    else:
        assert "== step, at most" in (tmp_path / "gpu.log").read_text(encoding="utf-8")


def test_gpu_tests_need_nothing_that_a_gpu_machine_lacks():
    """All files with tests for a GPU are named in the script, and none needs what is not there."""
    patterns = re.search(r"^gpu_tests=\((.*)\)$", (BENCH / "gpu.sh").read_text(encoding="utf-8"), re.M)[1]
    spread = ["bash", "-c", f"shopt -s nullglob; echo {patterns}"]
    named = subprocess.run(spread, cwd=ROOT, capture_output=True, check=True).stdout.decode().split()
    for path in (ROOT / "tests").glob("test_*.py"):
        if path != Path(__file__) and "pytest.mark.gpu" in path.read_text(encoding="utf-8"):
            assert f"tests/{path.name}" in named
    absent = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'ruff', 'mypy')))"
    collect = f"{absent}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", collect, "--collect-only", "-q", "-p", "no:cacheprovider", *named]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_results_hold_no_path_of_the_machine_that_made_them(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    import report

    files = [path for path in (BENCH / "results").rglob("*") if path.suffix in {".json", ".csv", ".md"}]
    assert len(files) > 5
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert report.without_paths(text) == text, path
        assert not re.search(r"/(?:home|root|tmp|Users|var|mnt|opt|srv)/|[A-Z]:\\", text), path
    inside, beside, outside = ROOT / "bench" / "x.json", ROOT.parent / "shared" / "y", "/somewhere/else/z.bin"
    given = f'--output={inside} --data "{beside}" {outside} 1 / 2 a/b ../c https://d/e'
    shown = '--output=bench/x.json --data "../shared/y" z.bin 1 / 2 a/b ../c https://d/e'
    assert report.without_paths(given) == shown
    report.write_json(tmp_path / "new" / "x.json", {"λ": str(inside), "none": float("nan")})
    assert read(tmp_path / "new" / "x.json") == {"λ": "bench/x.json", "none": None}
