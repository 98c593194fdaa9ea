"""The step on a GPU as the host sees it: wall time per call, waiting for the device.

`gpu_step.py` also takes device time, graphs and memory.
"""

from __future__ import annotations

import pytest
import torch
from contenders import paired_ratio
from gpu_contenders import CONTENDERS, OURS, Case, make_views
from gpu_parity import errors, expected, failure, tolerance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEP = Case("step", 512)
PLAIN = Case("plain", 512)


def measure(benchmark, case, contender):
    """Parity first, then the time, and the ratio to ours in calls taken in turn."""
    reason = CONTENDERS[case.kind][contender].unavailable(case)
    if reason:
        pytest.skip(reason)
    views = make_views(case, torch.device("cuda"))
    ours, theirs = (CONTENDERS[case.kind][name].build(case, views) for name in (OURS, contender))
    found = errors(theirs.step(), theirs, expected(case, views))
    assert not failure(found, tolerance(case))
    benchmark.extra_info["loss"] = found["loss"]

    def wait(built):
        def run():
            built.step()
            torch.cuda.synchronize()

        return run

    rounds = 5 if contender.startswith("published") else 200
    benchmark.pedantic(wait(theirs), rounds=rounds, warmup_rounds=min(20, rounds))
    benchmark.extra_info["time_ratio"] = paired_ratio(wait(theirs), wait(ours), rounds)


@pytest.mark.benchmark(group=f"GPU host view, step, forward + backward, {STEP}")
@pytest.mark.parametrize("contender", list(CONTENDERS["step"]))
def test_step(benchmark, contender):
    measure(benchmark, STEP, contender)


@pytest.mark.benchmark(group=f"GPU host view, plain InfoNCE, forward + backward, {PLAIN}")
@pytest.mark.parametrize("contender", list(CONTENDERS["plain"]))
def test_plain(benchmark, contender):
    measure(benchmark, PLAIN, contender)
