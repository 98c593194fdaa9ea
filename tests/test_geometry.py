"""Alignment, uniformity and anisotropy against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from clusterns.evaluation.geometry import alignment, first_component_share, mean_cosine, uniformity


def test_alignment_and_uniformity_against_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(11, 5), torch.randn(11, 5)
    unit_x, unit_y = ([row / row.norm() for row in rows.double()] for rows in (x, y))
    for alpha in (1, 2, 3):
        expected = sum(float((a - b).norm()) ** alpha for a, b in zip(unit_x, unit_y, strict=True)) / 11
        assert alignment(x, y, alpha) == pytest.approx(expected, rel=1e-9)
    for t in (0.5, 2, 2000):
        kernel = [-t * float((a - b).square().sum()) for a, b in itertools.combinations(unit_x, 2)]
        largest = max(kernel)
        expected = largest + math.log(sum(math.exp(k - largest) for k in kernel) / 55)
        for rows in (1, 4, 11, 1024):
            monkeypatch.setattr("clusterns.evaluation.geometry.UNIFORMITY_ROWS", rows)
            assert uniformity(x, t) == pytest.approx(expected, rel=1e-9)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-9)


def test_mean_cosine_is_over_all_pairs() -> None:
    x = torch.randn(9, 4) * torch.rand(9, 1) * 10 + 1
    pairs = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(x.double(), 2)]
    assert mean_cosine(x) == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)


def test_what_has_no_geometry() -> None:
    with pytest.raises(ValueError, match=r"^x, y: expected two"):
        alignment(torch.ones(4, 3), torch.ones(3, 3))
    broken = torch.ones(4, 3)
    broken[1, 0], broken[2] = math.nan, math.inf
    line = r"^x: expected finite embeddings, got 2 rows with NaN or infinity$"
    with pytest.raises(ValueError, match=line):
        alignment(torch.ones(4, 3), broken)
    for figure in (mean_cosine, uniformity, first_component_share):
        with pytest.raises(ValueError, match=line):
            figure(broken)
        with pytest.raises(ValueError, match=r"^x: expected an \(N ≥ 2, D\) tensor, got \(1, 3\)$"):
            figure(broken[:1])


@pytest.mark.parametrize("shape", [(40, 6), (5, 12)])
def test_first_component_share_is_that_of_a_principal_component_analysis(shape: tuple[int, int]) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = torch.randn(shape) * torch.arange(1, shape[1] + 1)
    unit = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    expected = decomposition.PCA().fit(unit).explained_variance_ratio_[0]
    assert first_component_share(x) == pytest.approx(expected, rel=1e-9)
    assert first_component_share(torch.ones(4, 3)) == 0
    assert first_component_share(torch.from_numpy(np.eye(4))) == pytest.approx(1 / 3)
