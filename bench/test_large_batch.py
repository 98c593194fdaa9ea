"""Does a large batch stay small in memory, and what does that cost in time?"""

from __future__ import annotations

import pytest
from contenders import OBJECTIVE, PLAIN, paired_ratio, problem, step

BATCH, CLUSTERS, DIM = 16384, 128, 256


def measure(benchmark, peak_memory, kind, contenders, contender):
    """Time three rounds, then peak memory in a process of its own."""
    views = problem(BATCH, DIM, CLUSTERS)
    value = float(contenders[contender](*views).detach())
    expected = float(contenders["clusterns"](*views).detach())
    assert value == pytest.approx(expected, rel=1e-3)
    benchmark.extra_info["loss"] = value
    theirs, ours = (step(contenders[name], *views) for name in (contender, "clusterns"))
    benchmark.pedantic(theirs, rounds=3, warmup_rounds=1)
    benchmark.extra_info["time_ratio"] = paired_ratio(theirs, ours, 3)
    benchmark.extra_info["peak_mib"] = peak_memory(f"{kind}:{contender}", BATCH, DIM, CLUSTERS)


@pytest.mark.benchmark(group=f"objective, forward + backward, B={BATCH} K={CLUSTERS} D={DIM}")
@pytest.mark.parametrize("contender", [name for name in OBJECTIVE if not name.startswith("published")])
def test_objective(benchmark, peak_memory, contender):
    measure(benchmark, peak_memory, "objective", OBJECTIVE, contender)


@pytest.mark.benchmark(group=f"plain InfoNCE, forward + backward, B={BATCH} D={DIM}")
@pytest.mark.parametrize("contender", list(PLAIN))
def test_plain(benchmark, peak_memory, contender):
    measure(benchmark, peak_memory, "plain", PLAIN, contender)
