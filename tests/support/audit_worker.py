"""Checks of bench/audit.py that need the compiler and no interpreter; run by test_audit.py in one process.

Prints which checks hold, one a line, up to the first that does not.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import audit  # of bench/, which test_audit.py puts on the path
import predicted
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from clusterns.kernels.launch import Launch, Tiles
from clusterns.kernels.target import Target, assume

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")]
KERNELS = {name for text in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
SOME = ("update, sum:", "chunk, bml:", "assignment")
# The other kernels multiply in half precision what is given so.
WITHOUT_PRODUCTS = {f"{name}_kernel" for name in "objective member_sums part_sums settle finish".split()}
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
    """A launch of each kernel, of `SOME` the one with most to do, by the kernel's name."""
    recorded = audit.launches(target, dtype, "highest", dim, 512).items()
    recorded = [(label, each) for label, each in recorded if label.startswith(SOME)]
    recorded.sort(key=lambda item: list(item[1].constants.values()).count(True))
    return {each.kernel.__name__: (label, each) for label, each in recorded}


def every_launch_on_a_target():
    """Some of each kernel, in one dtype, for one batch and dimension; `make audit` compiles all there is."""
    audit.DTYPES, audit.BATCHES = {"bfloat16": torch.bfloat16}, audit.BATCHES[:1]
    audit.DIMENSIONS = audit.DIMENSIONS[1:2]
    audit.ProcessPoolExecutor = lambda *_, **__: ThreadPoolExecutor(1)  # to start others takes as long
    all_cases = audit.cases
    audit.cases = lambda target: {
        case: served for case, served in all_cases(target).items() if case.label.startswith(SOME)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = audit.main(["--targets", "sm_90", "--output", str(path)])
        assert "a step with bfloat16 at B = 512, 5 launches, " in printed.getvalue(), printed.getvalue()
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        assert head.startswith("# make audit: triton ")
        rows = list(csv.DictReader(lines))
        assert {row["kernel"] for row in rows} == KERNELS
        assert all(row["dimensions"] == "768" for row in rows)
        in_half = {row["kernel"] for row in rows if row["products"] == "bf16"}
        assert in_half == KERNELS - WITHOUT_PRODUCTS, in_half
        for row in rows:
            if row["launch"].startswith("chunk"):
                continue
            assert 0 < int(row["programs_256"]) <= int(row["programs_512"]), row
            # Their loops go over data.
            of_data = row["kernel"] in ("member_sums_kernel", "part_sums_kernel")
            assert of_data or 3.5 <= float(row["predicted_us_512"]) < 1000, row
        assert not PINNED or status == 0, [row for row in rows if row["verdict"] != "ok"]
        # And with a limit that the table exceeds it fails, and says of which rows.
        for row in rows:
            row |= {name: int(row[name]) for name in ("spills", "stack_bytes", "shared_bytes")}
        with contextlib.redirect_stdout(None):
            assert audit.report(rows, path, 70_000) == 1
        bad = [row for row in rows if row["verdict"] != "ok"]
        assert all("bytes of shared memory, the limit is 70000" in row["verdict"] for row in bad)
        assert path.read_text(encoding="utf-8").count("the limit is 70000") == len(bad) > 0


def launches_agree():
    """Triton's own call path binds what the audit compiles; it is not compiled once more."""
    driver.set_active(Driver())
    with assume(Target("cuda", 90)):
        for label, each in by_kernel("sm_90", "bfloat16", 768).values():
            values = {**each.arguments, **each.constants, **each.tiles.blocks}
            options = each.tiles.options(Target("cuda", 90), each.constants.get("DEPENDENT", False))
            with mock.patch.object(triton.compiler, "compile", lambda src, **_: SimpleNamespace(src=src)):
                built = each.kernel.warmup(**values, **options, grid=each.grid).src
            expected = audit.source(each, "cuda")
            stated = {where: what for where, what in built.attrs.items() if what}
            assert built.signature == expected.signature, label
            assert built.constants == expected.constants, label
            assert stated == expected.attrs, label


def kernels_compile_elsewhere():
    """Kernels on other targets, in other dtypes; not each on all, for the time that would take."""
    for target, dtype, names in (
        ("sm_80", "float32", {"gradient_kernel", "margins_kernel"}),
        ("sm_120", "float16", {"gather_kernel", "assignment_kernel"}),
        ("gfx942", "bfloat16", {"cosine_kernel", "settle_kernel", "weights_kernel"}),
        ("sm_100", "bfloat16", {"weights_kernel"}),
    ):
        kernels = {name: each for name, each in by_kernel(target, dtype).items() if name in names}
        for label, _ in kernels.values():
            row = audit.compile_case(target, audit.Case(dtype, "highest", 384, 512, label))
            assert "error" not in row, row
            assert not PINNED or not audit.violations(row), row


def rules():
    """What is a violation."""
    row = {"kernel": "gradient_kernel", "launch": "x", "target": "sm_90", "dtype": "bfloat16", "spills": 0}
    row |= {"stack_bytes": 0, "shared_bytes": 0, "products": "bf16", "matrix_instructions": "HGMMA:4"}
    assert not audit.violations(row)
    bad = [{"matrix_instructions": "HGMMA:4 HMMA:2"}, {"matrix_instructions": ""}, {"spills": 2}]
    bad += [{"shared_bytes": 99 * 1024 + 1, "target": f"sm_{arch}"} for arch in (80, 89, 100, 120)]
    bad += [{"shared_bytes": 227 * 1024 + 1}]
    for change in (*bad, {"stack_bytes": 8}, {"error": "boom"}, {"unordered": "LDG.E"}):
        assert audit.violations({**row, **change}), change


def amd_waits_for_stores_before_it_counts_arrivals():
    """On gfx9 a barrier does not wait for other waves' stores, so our own wait stands before it."""
    launches = audit.launches("gfx942", "float32", "highest", 768, 512)
    for label in ("bml: 1 cosine_kernel", "plain: 1 objective_kernel"):
        code = audit.compile_launch(launches[label], "gfx942").asm["amdgcn"]
        lines = [line.split()[0] for line in code[code.index("ASMSTART") :].splitlines() if line.split()]
        barrier = lines.index("s_barrier")
        assert "s_waitcnt" in lines[:barrier], label
        assert not [line for line in lines[:barrier] if "store" in line], label
        assert "global_atomic_add" in lines[barrier:], label


@triton.jit
def eager_kernel(x_ptr, y_ptr, DEPENDENT: tl.constexpr):
    x = tl.load(x_ptr)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(y_ptr, x)


def nothing_is_read_before_the_wait():
    """A launch that may overlap the one before waits for it first; the listing of two disassemblers."""
    x = torch.empty(16, device="meta")
    for dependent, found in ((True, "LDG.E"), (False, "no PREEXIT ACQBULK")):
        eager = Launch(eager_kernel, (1,), {"x_ptr": x, "y_ptr": x}, {"DEPENDENT": dependent}, Tiles({}))
        for target in ("sm_90", "sm_120"):
            code, _ = audit.read_cubin(audit.compile_launch(eager, target))
            assert audit.before_the_wait(code) == found, (target, found)
    for (
        each
    ) in "LDG.E.64 LDGSTS.E.128 STG.E ATOM.E.ADD ATOMG.E.ADD RED.E.ADD REDG.E UTMALDG.2D UBLKCP ST.E".split():
        for end in (" ;", "                 &wr=0x1"):
            lines = (f"@!P0 {each} R2, desc[UR4][R2.64]", "PREEXIT", "ACQBULK")
            code = "\n".join(f"        /*{16 * at:04x}*/       {line}{end}" for at, line in enumerate(lines))
            assert audit.before_the_wait(code) == each
            for harmless in ("LDC", "LDS.64", "ATOMS.OR", "REDUX.SUM", "LDGDEPBAR"):
                assert not audit.before_the_wait(code.replace(each, harmless)), harmless


def programs_fit():
    """Into registers (allocated by eights), threads, and shared memory, of which each loses a KiB."""
    for found, given in (
        (4, (128, 4, 0)),  # 65536 / (128 · 128)
        (2, (169, 4, 0)),  # 65536 / (176 · 128)
        (8, (16, 8, 0)),  # 2048 / 256
        (32, (8, 1, 0)),  # the most there are
        (3, (16, 4, 75 * 1024)),  # 228 / 76
        (2, (16, 4, 75 * 1024 + 1)),
        (1, (16, 4, 227 * 1024)),
    ):
        assert audit.programs_per_multiprocessor(*given) == found, given


@triton.jit
def counting_kernel(x_ptr, dim):
    pass


# Of the two branches a program takes one; then a loop of one step, as far as can be known, for all.
LOOPS = """
  tt.func public @counting_kernel(%y: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %count: i32 loc("count")) {
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c127_i32 = arith.constant 127 : i32 loc(#loc1)
    %1 = arith.addi %count, %c127_i32 : i32 loc(#loc1)
    %blocks = arith.divsi %1, %c64_i32 : i32 loc(#loc1)
    scf.if %2 {
      %x = scf.for %start = %c0_i32 to %count step %c64_i32 iter_args(%y = %z) -> (tensor<64x32xf32>)  : i32 {
        scf.for %start = %c0_i32 to %c127_i32 step %c64_i32  : i32 {
          %d = tt.dot %a, %b, %c, inputPrecision = tf32x3 : tensor<64x64xf32> * tensor<64x32xf32> -> t
        }
      }
    }
    scf.if %3 {
      %x = scf.for %start = %c0_i32 to %blocks step %c1_i32  : i32 {
      }
    }
    scf.for %start = %c0_i32 to %loaded step %c64_i32  : i32 {
    }"""


def times_are_predicted():
    """Of a launch whose loops are known; bytes and operations of a real one."""
    label = "similarity, learned temperature: 0 cosine_kernel"
    row = audit.compile_case("sm_90", audit.Case("float32", "highest", 384, 512, label))
    assert row["operations_512"] == 3 * 2 * 512 * 512 * 768, row
    assert row["bytes_512"] == 4 * (2 * 512 * 768 + 512 * 512 + 2 * 512 + 1), row
    assert row["unordered"] == ""

    def loop(length: int, first: str, inner: int = 0) -> list[str]:
        start = len(listing)
        body = [first] + ["NOP"] * (length - 2) + [f"@!P0 BRA 0x{16 * start:x}"]
        body[inner] = f"@P1 BRA 0x{16 * start:x}" if inner else first
        return body

    for length, programs, expected in (
        (40, 132, 3.5 + (13 + 1) * 800 / 1755),  # the shortest steps, of the second branch
        (1000, 264, 3.5 + (12 * 1000 * 3.5 * 2 + 800) / 1755),  # two programs of four warps each
        (1000, 661, 3.5 + 2 * (12 * 1000 * 3.5 * 4 + 800) / 1755),  # four fit: two waves
    ):
        listing = ["NOP", "BRA 0xffff0"]
        listing += loop(length, "HGMMA.64x32x8", inner=30)
        listing += loop(10, "NOP")
        listing += loop(5, "NOP")  # the rest where four steps were unrolled
        listing += loop(9, "NOP")
        code = "\n".join(f"  /*{16 * at:04x}*/  {line} ;" for at, line in enumerate(listing))
        recorded = Launch(counting_kernel, (programs,), {"x_ptr": torch.empty(8), "dim": 768}, {}, Tiles({}))
        row = audit.predict(recorded, LOOPS, code, {"registers": 128, "warps": 4, "shared_bytes": 0})
        assert row["bytes_512"] == 32
        assert row["operations_512"] == 12 * 2 * 3 * 2 * 64 * 64 * 32 * programs
        assert row["waves_512"] == (2 if programs == 661 else 1)
        assert abs(row["predicted_us_512"] - expected) < 0.06, (row, expected)


def large_batches_are_predicted():
    """All launches of a step, no time below that of the operations; not what fits, which takes compiling."""
    used = "", {"registers": 128}
    built = SimpleNamespace(metadata=SimpleNamespace(shared=0))
    with (
        assume(Target("cuda", 90)),
        mock.patch.object(audit, "compile_launch", return_value=built),
        mock.patch.object(audit, "read_cubin", return_value=used),
    ):
        *rows, total, floor = predicted.rows_of(65536, {})
    assert floor["predicted_ms"] == round(6 * 65536**2 * 768 / 790e9, 3)
    assert total["predicted_ms"] > floor["predicted_ms"]
    assert abs(total["predicted_ms"] - sum(row["predicted_ms"] for row in rows)) < 0.01
    kernels = {row["kernel"].split()[0] for row in rows}
    of_small = {f"{name}_kernel" for name in "cosine centroid_update objective gradient".split()}
    assert kernels == KERNELS - of_small | {"product"}, kernels
    for row in rows:
        assert row["predicted_us"] >= 1e6 * max(row["operations"] / 790e12, row["bytes"] / 3e12), row
        once = ("member", "part", "finish_kernel of", "assignment")
        assert row["kernel"].startswith(once) or row["launches"] == row["chunks"] == 12, row


if __name__ == "__main__":
    for check in (
        rules,
        programs_fit,
        nothing_is_read_before_the_wait,
        times_are_predicted,
        large_batches_are_predicted,
        launches_agree,
        kernels_compile_elsewhere,
        amd_waits_for_stores_before_it_counts_arrivals,
        every_launch_on_a_target,
    ):
        check()
        print(check.__name__, flush=True)
