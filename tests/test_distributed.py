"""Several real processes must give what one process gives on the concatenated batch, or all fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import failure_worker
import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size):
    command = [*TORCHRUN, str(world_size), str(Path(distributed_worker.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-6000:]
    settings = len(distributed_worker.settings_for(world_size))
    assert f"{world_size} ranks, {settings} settings: as one process" in done.stdout


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_torchrun_ends_when_a_rank_dies(tmp_path, gather):
    command = [*TORCHRUN, "2", str(Path(failure_worker.__file__)), gather, "env://", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode != 0
    # It was the death, in the middle of the second step, that ended it.
    assert (tmp_path / "1").read_text() == "dies"
    assert f"exitcode  : {failure_worker.EXIT_CODE}" in done.stderr, done.stderr[-6000:]


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_ranks_raise_by_themselves_when_one_dies(tmp_path, gather):
    size, meeting = 3, f"file://{tmp_path / 'store'}"
    ranks = []
    try:
        for rank in range(size):
            environment = {**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(size)}
            command = [sys.executable, failure_worker.__file__, gather, meeting, str(tmp_path)]
            ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        errors = [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert ranks[1].returncode == failure_worker.EXIT_CODE, errors[1]
    assert (tmp_path / "1").read_text() == "dies"
    for rank in (0, 2):
        assert ranks[rank].returncode == 1, errors[rank]
        assert (tmp_path / str(rank)).read_text() == "step 2 raised RuntimeError", errors[rank]
