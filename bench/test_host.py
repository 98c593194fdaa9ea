"""`make bench`: what run.py measures on a CPU, under pytest-benchmark, which adds its own statistics.

A whole run writes bench/results/cpu.json; a part (-k, single files) writes to runs/bench: it is not to
take the place of them all.
"""

from __future__ import annotations

import pytest
import torch
from contenders import Case, rivals
from corpus import CASES
from measure import Clock
from report import RESULTS, ROOT, Results, machine
from run import BOTH, Bench

PUBLISHED, LARGE = ({"batch": 256}, {"batch": 32768, "dim": 256})
LOSSES = [
    Case(kind, **size, dtype=torch.float32) for size in (PUBLISHED, LARGE) for kind in ("objective", "plain")
]


@pytest.fixture(scope="module")
def bench(request):
    in_part = request.config.option.keyword or len(request.session.items) < len(PARAMETERS)
    folder = ROOT / "runs" / "bench" if in_part else RESULTS
    results = Results(folder, machine() | {"command": "make bench"}, "", on_gpu=False)
    clock = Clock(block_seconds=5e-3, rounds=200, seconds=4.0)
    return Bench(results, clock)


PARAMETERS = [
    pytest.param(case, name, marks=pytest.mark.benchmark(group=str(case)), id=f"{case} {name}")
    for case in [*LOSSES, *CASES]
    for name in rivals(case.kind)
]


@pytest.mark.parametrize(("case", "name"), PARAMETERS)
def test_contender(benchmark, bench, case, name):
    bench.measure(case, name, BOTH)
    row = bench.results.rows[-1]
    if row["status"] in ("left out", "not installed"):
        pytest.skip(row["note"])
    assert row["status"] == "ok", row["note"]
    benchmark.extra_info |= row
    rounds = max(1, min(row["rounds"], int(5e6 / row["device_us"])))
    benchmark.pedantic(bench.last.run(), rounds=rounds, warmup_rounds=0)
