"""The same calls under pytest-benchmark: its statistics of forward and backward, ours beside eager torch.

python -m pytest bench --benchmark-only
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contenders import FP32, KINDS, OURS, Case
from harness import Bench
from measure import clock_of
from report import Results


@pytest.mark.parametrize("name", [OURS, "eager"])
@pytest.mark.parametrize("kind", ["step", "objective", "plain"])
@pytest.mark.parametrize("size", [(64, 384), (256, 768)], ids=str)
def test_call(benchmark, kind, size, name):
    clock = clock_of("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(Results(Path(), {}, "host", on_gpu=False), clock)
    bench.start(Case(kind, *size, dtype=FP32))
    built, _, problem = bench.build(KINDS[kind][name])
    assert not problem, problem
    benchmark.group = str(bench.case)
    benchmark(lambda: (built.run(), clock.synchronize()))
