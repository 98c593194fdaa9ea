"""Checks of bench/audit.py that need the compiler and no interpreter; run by test_audit.py in one process.

Prints which checks hold, one a line, up to the first that does not.
"""

from __future__ import annotations

import csv
import re
import tempfile
from pathlib import Path

import audit  # of bench/, which test_audit.py puts on the path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from clusterns.kernels.target import Target, assume

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")]
KERNELS = {name for text in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
# What spills depends on the compiler: promised is the one that `make` installs.
PINNED = f"triton=={triton.__version__};" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


class Driver:
    """An sm_90 that can be compiled for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def by_kernel(target: str, dtype: str, dim: int = 384) -> dict:
    """A launch of each kernel, the last of it, which has most to do, by the kernel's name."""
    recorded = audit.launches(target, dtype, "highest", dim, 512)
    return {each.kernel.__name__: (label, each) for label, each in recorded.items()}


def every_launch_on_a_target():
    """All of one dtype, for one batch and dimension; `make audit` compiles all there is."""
    audit.DTYPES, audit.BATCHES = {"bfloat16": torch.bfloat16}, audit.BATCHES[:1]
    audit.DIMENSIONS = audit.DIMENSIONS[1:2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        status = audit.main(["--targets", "sm_90", "--output", str(path)])
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        assert head.startswith("# make audit: triton ")
        rows = list(csv.DictReader(lines))
        assert {row["kernel"] for row in rows} == KERNELS
        assert all(row["dimensions"] == "768" for row in rows)
        assert not PINNED or status == 0, [row for row in rows if row["verdict"] != "ok"]
        # And with a limit that the table exceeds it fails, and says of which rows.
        for row in rows:
            row |= {name: int(row[name]) for name in ("spills", "stack_bytes", "shared_bytes")}
        assert audit.report(rows, path, 70_000) == 1
        bad = [row for row in rows if row["verdict"] != "ok"]
        assert all("bytes of shared memory, the limit is 70000" in row["verdict"] for row in bad)
        assert path.read_text(encoding="utf-8").count("the limit is 70000") == len(bad) > 0


def launches_agree():
    """Triton's own call path binds what the audit compiles, up to the compiled kernel."""
    driver.set_active(Driver())
    with assume(Target("cuda", 90)):
        for label, each in by_kernel("sm_90", "bfloat16", 768).values():
            values = {**each.arguments, **each.constants, **each.tiles.blocks}
            built = each.kernel.warmup(**values, **each.tiles.options("cuda"), grid=each.grid).src
            expected = audit.source(each, "cuda")
            stated = {where: what for where, what in built.attrs.items() if what}
            assert built.signature == expected.signature, label
            assert built.constants == expected.constants, label
            assert stated == expected.attrs, label


def every_kernel_compiles_elsewhere():
    """One launch of each kernel on other targets and in other dtypes."""
    others = (("sm_80", "float32"), ("sm_90", "float16"), ("sm_100", "bfloat16"), ("gfx942", "bfloat16"))
    for target, dtype in others:
        for label, _ in by_kernel(target, dtype).values():
            row = audit.compile_case(target, audit.Case(dtype, "highest", 384, 512, label))
            assert "error" not in row, row
            assert not PINNED or not audit.violations(row), row


def rules():
    """What is a violation."""
    row = {"kernel": "gradient_kernel", "launch": "x", "target": "sm_90", "dtype": "bfloat16", "spills": 0}
    row |= {"stack_bytes": 0, "shared_bytes": 0, "matrix_instructions": "HGMMA:4"}
    assert not audit.violations(row)
    bad = [{"matrix_instructions": "HGMMA:4 HMMA:2"}, {"matrix_instructions": ""}, {"spills": 2}]
    for change in (*bad, {"stack_bytes": 8}, {"shared_bytes": 10**6}, {"error": "boom"}):
        assert audit.violations({**row, **change}), change


def amd_waits_for_stores_before_it_counts_arrivals():
    """On gfx9 a barrier does not wait for other waves' stores, so our own wait stands before it."""
    launches = audit.launches("gfx942", "float32", "highest", 768, 512)
    for label, kernel in (("assignment", "cosine_kernel"), ("plain", "objective_kernel")):
        wanted = (launches[each] for each in launches if each.startswith(f"{label}:") and kernel in each)
        code = audit.compile_launch(next(wanted), "gfx942").asm["amdgcn"]
        lines = [line.split()[0] for line in code[code.index("ASMSTART") :].splitlines() if line.split()]
        barrier = lines.index("s_barrier")
        assert "s_waitcnt" in lines[:barrier], label
        assert not [line for line in lines[:barrier] if "store" in line], label
        assert "global_atomic_add" in lines[barrier:], label


if __name__ == "__main__":
    for check in (
        rules,
        launches_agree,
        every_kernel_compiles_elsewhere,
        amd_waits_for_stores_before_it_counts_arrivals,
        every_launch_on_a_target,
    ):
        check()
        print(check.__name__, flush=True)
