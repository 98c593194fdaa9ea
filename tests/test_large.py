"""The Triton sweep over a large batch alone; what it shares with the others is in test_contract.

On a GPU where there is one, else the same kernels in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from objective_problems import OPTIONS, exact, fix_clusters, gradients, problem

from clusterns import large
from clusterns.functional import objective
from clusterns.options import Options
from clusterns.sweep import Clusters, sweep_alone

pytest.importorskip("triton")


def test_margins_are_not_lost_in_half_precision():
    """λ/B² beside E/Z: were the slopes added to the bfloat16 weights, they would round away."""
    anchors, positives, arguments = problem(64, 32, 3, dtype=torch.float16)
    fix_clusters(anchors, arguments)
    clusters = Clusters(ids=arguments["cluster_ids"])
    del arguments["centroids"], arguments["hard_negative_ids"]
    arguments["bml_weight"] = 1e-3
    found, truth = [], []
    for mode in ("bml", "keep"):
        options = Options(0.0, mode, *{**OPTIONS, "bml_weight": 1e-3}.values(), 15_000)
        needs, views = (True, False, False, False), (anchors.detach(), positives.detach())
        result = sweep_alone(*views, None, 0.05, clusters, options, needs, "triton-chunked")
        found.append(result.gradients[0].double())  # of float16 in float32, to be rounded when it is scaled
        truth.append(exact(anchors, positives, arguments, false_negatives=mode)[1][0])
    pull = truth[0] - truth[1]
    assert pull.norm() < 0.1 * truth[0].norm()
    assert (found[0] - found[1] - pull).norm() <= 0.01 * pull.norm()


def test_the_workspace_decides_the_chunks(monkeypatch):
    anchors, positives, arguments = problem(70, 24, 5)
    seen = []
    true_weigh = large.launchers.weigh

    def weigh(mode, x, *rest, **more):
        seen.append((mode, len(x)))
        return true_weigh(mode, x, *rest, **more)

    monkeypatch.setattr(large.launchers, "weigh", weigh)
    gradients(anchors, positives, arguments, backend="triton", workspace_bytes=15_000)
    assert {mode for mode, _ in seen} == {"weights"}
    assert max(rows for _, rows in seen) * 70 * 4 < 15_000
    seen.clear()
    with torch.no_grad():
        objective(anchors, positives, **arguments, backend="triton", workspace_bytes=15_000)
    assert {mode for mode, _ in seen} == {"totals"}  # no weights are written for nobody
