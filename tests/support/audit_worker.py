"""Checks of bench/audit.py that need the compiler and no interpreter; run by test_audit.py in one process.

Takes the table of a whole target and prints which checks hold, one a line, up to the first that does not.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import audit

from clusterns.kernels.target import Target, assume


class Driver:
    """An sm_90 that can be compiled for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def launches_agree():
    """Triton's own call path binds what the audit compiles, up to the compiled kernel."""
    labels = (
        "cosines, negatives, clusters",
        "update, sum",
        "assignment",
        "objective, bml, negatives, learned temperature",
        "gradients, bml, negatives, learned temperature",
        "similarity, backward",
    )
    driver.set_active(Driver())
    with assume(Target("cuda", 90)):
        launches = audit.record(torch.bfloat16, 768, 512)
        for label in labels:
            each = launches[label]
            values = {**each.arguments, **each.constants, **each.tiles.blocks}
            built = each.kernel.warmup(**values, **each.tiles.options("cuda"), grid=each.grid).src
            expected = audit.source(each, "cuda")
            stated = {where: what for where, what in built.attrs.items() if what}
            assert built.signature == expected.signature, label
            assert built.constants == expected.constants, label
            assert stated == expected.attrs, label


def every_kernel_compiles_elsewhere():
    """One launch of each kernel on other targets and in other dtypes; `make audit` compiles them all."""
    others = (("sm_80", "float32"), ("sm_90", "float16"), ("sm_100", "bfloat16"), ("gfx942", "bfloat16"))
    for target, dtype in others:
        backend, arch = audit.TARGETS[target]
        with assume(Target(backend, arch)):
            recorded = audit.record(audit.DTYPES[dtype], 384, 512)
        labels = {each.kernel.__name__: label for label, each in recorded.items()}
        assert len(labels) == 8
        for label in labels.values():
            row = audit.compile_case(target, audit.Case(dtype, "highest", 384, 512, label))
            assert "error" not in row, row
            assert not pinned or not audit.violations(row), row


def rules():
    """What is a violation."""
    row = {"kernel": "gradient_kernel", "launch": "x", "target": "sm_90", "dtype": "bfloat16", "spills": 0}
    row |= {"stack_bytes": 0, "shared_bytes": 0, "matrix_instructions": "HGMMA:4"}
    assert not audit.violations(row)
    bad = [{"matrix_instructions": "HGMMA:4 HMMA:2"}, {"matrix_instructions": ""}, {"spills": 2}]
    for change in (*bad, {"stack_bytes": 8}, {"shared_bytes": 10**6}, {"error": "boom"}):
        assert audit.violations({**row, **change}), change


def a_violation_is_named_and_fails():
    """With a limit that the table exceeds."""
    rows = []
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines()[1:]):
        numbers = {name: int(row[name]) for name in ("spills", "stack_bytes", "shared_bytes")}
        rows.append({**row, **numbers})
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "table.csv"
        assert audit.report(rows, output, 70_000) == 1
        bad = [row for row in rows if row["verdict"] != "ok"]
        assert all("bytes of shared memory, the limit is 70000" in row["verdict"] for row in bad)
        assert sum("the limit is 70000" in line for line in output.read_text().splitlines()) == len(bad) > 0


def amd_waits_for_stores_before_it_counts_arrivals():
    """On gfx9 a barrier does not wait for other waves' stores, so our own wait stands before it."""
    with assume(audit.Target("hip", "gfx942")):
        launches = audit.record(torch.float32, 768, 512)
        for label in ("assignment", "objective, plain"):
            each = launches[label]
            built = triton.compile(
                audit.source(each, "hip"),
                target=GPUTarget("hip", "gfx942", 64),
                options=each.tiles.options("hip"),
            )
            code = built.asm["amdgcn"]
            ours = code.index("ASMSTART")
            lines = [line.split()[0] for line in code[ours:].splitlines() if line.split()]
            barrier = lines.index("s_barrier")
            assert "s_waitcnt" in lines[:barrier], label
            stores = [line for line in lines[:barrier] if "store" in line]
            assert not stores, (label, stores)
            assert "global_atomic_add" in lines[barrier:], label


def an_unknown_target_is_refused():
    """In a line that names those there are."""
    said = io.StringIO()
    with pytest.raises(SystemExit, match="2"), contextlib.redirect_stderr(said):
        audit.main(["--targets", "sm_90,sm_12"])
    assert "--targets: expected of sm_80, sm_90, sm_100, gfx942, got sm_12" in said.getvalue()


CHECKS = (
    launches_agree,
    every_kernel_compiles_elsewhere,
    rules,
    a_violation_is_named_and_fails,
    amd_waits_for_stores_before_it_counts_arrivals,
    an_unknown_target_is_refused,
)

if __name__ == "__main__":
    table, pinned = Path(sys.argv[1]), sys.argv[2] == "pinned"
    for check in CHECKS:
        check()
        print(check.__name__)
