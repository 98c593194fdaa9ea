"""Several real processes must give what one process gives on the concatenated batch, or all fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_torchrun_ends_when_a_rank_dies(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(failure_worker.__file__)), "ring", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=ranks.PATIENCE)
    assert done.returncode != 0
    # It was the death, in the middle of the second step, that ended it.
    assert (tmp_path / "1").read_text(encoding="utf-8") == "dies"
    assert f"exitcode  : {failure_worker.EXIT_CODE}" in done.stderr, done.stderr[-6000:]


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_ranks_raise_by_themselves_when_one_dies(tmp_path, gather):
    found = ranks.start(3, tmp_path / "store", failure_worker.main, gather, str(tmp_path))
    assert ranks.exit_codes(found) == [1, failure_worker.EXIT_CODE, 1]
    notes = [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(3)]
    assert notes == ["step 2 raised RuntimeError", "dies", "step 2 raised RuntimeError"]
