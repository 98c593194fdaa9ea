"""Processes of one group for the tests; they start with all modules loaded."""

from __future__ import annotations

import gc
from datetime import timedelta

import forked
import torch.distributed as dist

PATIENCE = 600.0  # seconds that a test waits, on a machine however busy


def start(size, meeting, function, *arguments):
    """Processes that run `function(*arguments)` as ranks of a group that meets in a new file `meeting`."""
    return [forked.start(_run, rank, size, str(meeting), function, arguments) for rank in range(size)]


def exit_codes(ranks):
    """How the ranks end; what has not ended by then is killed."""
    try:
        for process in ranks:
            process.join(PATIENCE)
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def _run(rank, size, meeting, function, arguments):
    """Leave the group cleanly.

    Its threads must end while the interpreter lives, or the process may abort as it exits. They end with the
    last reference to the group, and DistributedDataParallel holds some in a cycle.
    """
    # Longer than the tests wait: a rank must notice the death of another itself, not that time has passed.
    patience = timedelta(seconds=2 * PATIENCE)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=patience
    )
    function(*arguments)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
