"""Several real processes must give what one process gives on the concatenated batch, or all fail."""

from __future__ import annotations

import distributed_worker
import failure_worker
import pytest
import ranks


def test_ranks_equal_one_process(tmp_path):
    """Four of them, three and two."""
    found = ranks.start(4, tmp_path / "store", distributed_worker.run, str(tmp_path))
    assert ranks.exit_codes(found) == [0] * 4
    checked = sorted(path.name for path in tmp_path.glob("* ranks"))
    assert checked == ["2 ranks", "3 ranks", "4 ranks"]


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_ranks_raise_by_themselves_when_one_dies(tmp_path, gather):
    found = ranks.start(3, tmp_path / "store", failure_worker.main, gather, str(tmp_path))
    assert ranks.exit_codes(found) == [1, failure_worker.EXIT_CODE, 1]
    notes = [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(3)]
    assert notes == ["step 2 raised RuntimeError", "dies", "step 2 raised RuntimeError"]
