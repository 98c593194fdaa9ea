"""Does a large batch stay small in memory, and what does that cost in time?"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
from contenders import OBJECTIVE, PLAIN, problem, step

from clusterns.options import WORKSPACE_BYTES

BATCH, CLUSTERS, DIM = 32768, 128, 256
# float32 matrices (B, B) that are alive at once: from the peaks that were measured at B = 16,384.
EAGER_MATRICES = {"eager": 3, "eager formula": 7.5}


def measure(benchmark, peak_memory, kind, contenders, contender):
    """Time rounds with ours back to back in each, then peak memory in a process of its own."""
    wanted = EAGER_MATRICES.get(contender, 0) * 4 * BATCH**2
    if 1.3 * wanted > available_bytes():
        pytest.skip(
            f"needs about {wanted / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are available"
        )
    views = problem(BATCH, DIM, CLUSTERS)
    small = tuple(z.detach()[: BATCH // 8] for z in views[:2])
    value, expected = (float(contenders[name](*small, views[2])) for name in (contender, "clusterns"))
    assert value == pytest.approx(expected, rel=1e-3)
    benchmark.extra_info["loss"] = value
    benchmark.extra_info["loss_of_rows"] = BATCH // 8
    theirs, ours = (step(contenders[name], *views) for name in (contender, "clusterns"))
    of_ours = []

    def before_each_round() -> None:
        began = time.perf_counter()
        ours()
        of_ours.append(time.perf_counter() - began)

    benchmark.pedantic(theirs, setup=before_each_round, rounds=1 if wanted else 5)
    pairs = zip(benchmark.stats.stats.data, of_ours[-len(benchmark.stats.stats.data) :], strict=True)
    ratios = sorted(theirs_took / ours_took for theirs_took, ours_took in pairs)
    benchmark.extra_info["time_ratio"] = statistics.median(ratios)
    benchmark.extra_info["time_ratios"] = ratios
    peak = peak_memory(f"{kind}:{contender}", BATCH, DIM, CLUSTERS)
    benchmark.extra_info["peak_mib"] = peak
    if contender == "clusterns":
        benchmark.extra_info["workspace_limit_mib"] = WORKSPACE_BYTES / 2**20
        benchmark.extra_info["within_workspace"] = peak <= WORKSPACE_BYTES / 2**20


def available_bytes() -> int:
    """Memory that this machine can give now."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.benchmark(group=f"objective, forward + backward, B={BATCH} K={CLUSTERS} D={DIM}")
@pytest.mark.parametrize("contender", [name for name in OBJECTIVE if not name.startswith("published")])
def test_objective(benchmark, peak_memory, contender):
    measure(benchmark, peak_memory, "objective", OBJECTIVE, contender)


@pytest.mark.benchmark(group=f"plain InfoNCE, forward + backward, B={BATCH} D={DIM}")
@pytest.mark.parametrize("contender", list(PLAIN))
def test_plain(benchmark, peak_memory, contender):
    measure(benchmark, peak_memory, "plain", PLAIN, contender)
