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
# Without Dynamo what is compiled runs as it is: minutes of compilation say nothing about the scripts.
ON_A_CPU = {
    **os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"
}  # fmt: skip


def run(*command: object, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=ON_A_CPU, capture_output=True, encoding="utf-8", check=False, **more,
    )  # fmt: skip


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def run_small(folder: Path, script: str, *arguments: str) -> str:
    """What a script prints, in that folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"):
            patch.setenv(name, ON_A_CPU[name])
        return run_python(
            folder, ROOT / "tests" / "support" / "fixed_corpus.py", str(BENCH / script), *arguments
        )


def test_large_batches_of_the_gpu_script_on_a_cpu(tmp_path):
    pytest.importorskip("triton")
    run_small(tmp_path, "gpu_large_batch.py", "--device", "cpu", "--output", ".")
    content = read(tmp_path / "cpu-machinery-large.json")
    assert not content["skipped"]
    assert (tmp_path / "cpu-machinery-large.png").stat().st_size > 10_000
    rows = content["rows"]
    ours = [row for row in rows if row["contender"] == "clusterns"]
    assert {row["status"] for row in ours} == {"ok"}
    assert {row.get("regime") for row in ours} == {None, "triton", "triton-chunked"}
    assert {row["kind"] for row in ours} == {"step", "plain", "assignment"}
    assert {row["status"] for row in rows} <= {"ok", "left out", "not installed"}


def test_expected_figures_say_that_nobody_measured_them(tmp_path):
    printed = run_small(tmp_path, "gpu_large_batch.py", "--arithmetic")
    assert printed.startswith("ARITHMETIC, NOT MEASURED")
    assert "262,144" in printed
    assert "1,048,576" in printed


def test_exactness_by_every_backend_and_dtype(tmp_path):
    pytest.importorskip("triton")
    table = tmp_path / "exactness.csv"
    small = "--batches 40 --dim 32 --clusters 32".split()
    run_small(tmp_path, "exactness.py", *small, "--output", str(table))
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2  # dtypes, backends, λ
    assert {row["within"] for row in rows} == {row["repeatable"] for row in rows} == {"True"}
    started = f"TRITON_INTERPRET=1 python bench/exactness.py {' '.join(small)} --output "
    assert rows[0]["command"].startswith(started)


def test_training_in_its_parts(tmp_path):
    """With sentences per second of three trainers, and the memory of a step."""
    pytest.importorskip("accelerate")
    small = "--layers 1 --hidden 64 --batch 16 --clusters 8 --steps 6 --rounds 1 --memory-batches 16".split()
    run_small(tmp_path, "training.py", "--device", "cpu", *small, "--output", "training.json")
    content = read(tmp_path / "training.json")
    assert len(content["whole"]) == 3
    assert all(row["sentences_per_second"] > 0 for row in content["whole"].values())
    assert {"data", "encoder", "optimiser", "loss: clusterns", "loss: published"} <= content["parts"].keys()
    assert all(row["peak_mib"] > 0 for row in content["memory"])
    assert len(content["memory"]) == 3


@pytest.mark.parametrize(
    ("stop", "command"),
    [
        (signal.SIGINT, [sys.executable, str(BENCH / "gpu_step.py"), "--device", "cpu", "--output"]),
        (signal.SIGKILL, ["bash", str(BENCH / "gpu.sh")]),
    ],
)
def test_what_was_measured_before_a_stop_is_there(tmp_path, stop, command):
    environment = {**ON_A_CPU, "OUT": str(tmp_path), "PYTHON": sys.executable, "CLUSTERNS_STAGES": "step"}
    with (tmp_path / "printed").open("w+", encoding="utf-8") as printed:
        started = subprocess.Popen(
            [*command, *([str(tmp_path)] if stop == signal.SIGINT else [])],
            env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        results = tmp_path / "cpu-machinery.json"
        try:
            while not (results.exists() and read(results)["rows"]):
                assert started.poll() is None, printed.name
                time.sleep(0.1)
        finally:
            os.killpg(started.pid, stop)
        started.wait()
        printed.seek(0)
        said = printed.read()
    content = read(results)
    assert content["rows"][0]["status"] == "ok"
    assert content["rows"][0]["contender"] == "clusterns"
    if stop == signal.SIGINT:
        assert started.returncode == 0
        assert content["skipped"][0].endswith(": interrupted")
        assert "rows measured" in said
    else:
        log = (tmp_path / "gpu.log").read_text(encoding="utf-8")
        assert "== step, at most" in log
        assert "float32" in log


def test_gpu_tests_need_nothing_that_a_gpu_machine_lacks():
    """All files with tests for a GPU are named in the script, and none needs what is not there."""
    patterns = re.search(r"^gpu_tests=\((.*)\)$", (BENCH / "gpu.sh").read_text(encoding="utf-8"), re.M)[1]
    spread = subprocess.run(
        ["bash", "-c", f"shopt -s nullglob; echo {patterns}"], cwd=ROOT, capture_output=True, check=True
    )
    named = spread.stdout.decode().split()
    for path in (ROOT / "tests").glob("test_*.py"):
        if path != Path(__file__) and "pytest.mark.gpu" in path.read_text(encoding="utf-8"):
            assert f"tests/{path.name}" in named
    absent = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'ruff', 'mypy')))"
    collect = f"{absent}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = run("-c", collect, "--collect-only", "-q", "-p", "no:cacheprovider", *named, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


def test_results_hold_no_path_of_the_machine_that_made_them(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    import machine

    files = [path for path in (BENCH / "results").rglob("*") if path.suffix in {".json", ".csv", ".md"}]
    assert len(files) > 5
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert machine.without_paths(text) == text, path
        assert not re.search(r"/(?:home|root|tmp|Users|var|mnt|opt|srv)/|[A-Z]:\\", text), path
    inside, beside, outside = ROOT / "bench" / "x.json", ROOT.parent / "shared" / "y", "/somewhere/else/z.bin"
    given = f'--output={inside} --data "{beside}" {outside} 1 / 2 a/b ../c https://d/e'
    shown = '--output=bench/x.json --data "../shared/y" z.bin 1 / 2 a/b ../c https://d/e'
    assert machine.without_paths(given) == shown
    machine.write_json(tmp_path / "new" / "x.json", {"λ": str(inside)})
    assert read(tmp_path / "new" / "x.json") == {"λ": "bench/x.json"}
