"""How fast is a step at the published batch size, against the published formulation and plain torch?"""

from __future__ import annotations

import pytest
from contenders import OBJECTIVE, PLAIN, SETTINGS, paired_ratio, problem, step

from clusterns import reference
from clusterns.functional import nearest_centroids

BATCH, CLUSTERS, DIM = 256, 128, 768


def exact_loss(anchors, positives, centroids, plain: bool) -> float:
    """The reference in float64."""
    a, p, c = (z.detach().double() for z in (anchors, positives, centroids))
    if plain:
        return float(reference.objective(a, p, temperature=SETTINGS.temperature).loss)
    assigned = nearest_centroids(anchors, centroids)
    return float(
        reference.objective(
            a,
            p,
            temperature=SETTINGS.temperature,
            centroids=c,
            hard_negative_ids=assigned.runner_up,
            cluster_ids=assigned.nearest,
            false_negatives="bml",
            bml_weight=SETTINGS.bml_weight,
            bml_alpha=SETTINGS.bml_alpha,
            bml_beta=SETTINGS.bml_beta,
        ).loss
    )


def check(loss, ours, views, plain, benchmark) -> None:
    """Parity of loss and gradients before anything is timed."""
    anchors, positives, _ = views
    value = float(loss(*views).detach())
    assert value == pytest.approx(exact_loss(*views, plain), rel=1e-3)
    benchmark.extra_info["loss"] = value
    gradients = []
    for candidate in (loss, ours):
        step(candidate, *views)()
        gradients.append((anchors.grad, positives.grad))
    for theirs, mine in zip(*gradients, strict=True):
        assert (theirs - mine).norm() <= 1e-3 * mine.norm()


@pytest.mark.benchmark(group=f"objective, forward + backward, B={BATCH} K={CLUSTERS} D={DIM}")
@pytest.mark.parametrize("contender", list(OBJECTIVE))
def test_objective(benchmark, contender):
    loss, views = OBJECTIVE[contender], problem(BATCH, DIM, CLUSTERS)
    check(loss, OBJECTIVE["clusterns"], views, False, benchmark)
    slow = contender.startswith("published")
    benchmark.pedantic(step(loss, *views), rounds=5 if slow else 200, warmup_rounds=1 if slow else 20)
    ours = step(OBJECTIVE["clusterns"], *views)
    benchmark.extra_info["time_ratio"] = paired_ratio(step(loss, *views), ours, 3 if slow else 200)


@pytest.mark.benchmark(group=f"plain InfoNCE, forward + backward, B={BATCH} D={DIM}")
@pytest.mark.parametrize("contender", list(PLAIN))
def test_plain(benchmark, contender):
    loss, views = PLAIN[contender], problem(BATCH, DIM, CLUSTERS)
    check(loss, PLAIN["clusterns"], views, True, benchmark)
    benchmark.pedantic(step(loss, *views), rounds=200, warmup_rounds=20)
    ours = step(PLAIN["clusterns"], *views)
    benchmark.extra_info["time_ratio"] = paired_ratio(step(loss, *views), ours, 200)
