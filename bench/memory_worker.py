"""Peak memory of one contender, run by bench/conftest.py in a process of its own (Linux).

Prints JSON: the highest resident set during one forward and backward, above inputs and their gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from contenders import OBJECTIVE, PLAIN, problem, step


def resident_kib(field: str) -> int:
    """A line of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status: expected a line {field}")


def main(contender: str, batch: int, dim: int, clusters: int) -> None:
    """Measure and print."""
    kind, _, name = contender.partition(":")
    loss = (OBJECTIVE if kind == "objective" else PLAIN)[name]
    step(loss, *problem(64, dim, clusters))()  # libraries loaded, thread pools started
    anchors, positives, centroids = problem(batch, dim, clusters)
    held = [torch.ones_like(anchors), torch.ones_like(positives)]  # the gradients' own place
    before = resident_kib("VmRSS")
    del held
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step(loss, anchors, positives, centroids)()
    print(json.dumps({"peak_mib": (resident_kib("VmHWM") - before) / 1024}))


if __name__ == "__main__":
    main(sys.argv[1], *(int(value) for value in sys.argv[2:]))
