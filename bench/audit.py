"""What do the kernels take on each chip? Compiles all of them ahead of time, no GPU needed, and reads it off.

    python bench/audit.py [--targets sm_90,gfx942] [--output bench/results/audit.csv]

The launches are those of the library, recorded on tensors without storage, so what is compiled here is what
runs. A violation ends in exit status 1: a kernel that does not compile, local memory (spilled registers) or
too much shared memory on an NVIDIA target, a half-precision product on sm_90 without warpgroup instructions.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported: interpreted ones do not compile

import torch
import triton
from audit_launches import record
from machine import machine, write_csv
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clusterns.kernels import launch
from clusterns.kernels.target import Target, assume

HERE = Path(__file__).parent
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Shared memory that one program may take. The smaller chips of a generation (sm_86, sm_89, sm_120) have
# 99 KiB, and they run the same tiles, so that is the limit for all of NVIDIA.
SHARED_LIMITS = {"cuda": 99 * 1024, "hip": 64 * 1024}
# A tile shape of a sweep that is too large for a chip is left out there.
SWEEP_SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TARGETS = {"sm_80": ("cuda", 80), "sm_90": ("cuda", 90), "sm_100": ("cuda", 100), "gfx942": ("hip", "gfx942")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIMENSIONS = (384, 768, 1024)
BATCHES = (512, 2048)  # one for each choice of tiles
WITHOUT_PRODUCTS = ("objective_kernel", "through_norm_kernel")
MATRIX_INSTRUCTIONS = re.compile(r"\b(HGMMA|HMMA|UTC[A-Z]*MMA|v_mfma)")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Case(NamedTuple):
    """One thing to compile."""

    dtype: str
    precision: str  # torch.get_float32_matmul_precision()
    dim: int
    batch: int
    label: str  # in `record`
    candidate: int = -1  # tile shape of a sweep, −1 for the chosen one


def source(recorded: launch.Launch, backend: str) -> ASTSource:
    """What `kernel[grid](...)` would compile for these arguments: types, constants, alignment."""
    values = {**recorded.arguments, **recorded.constants, **recorded.tiles.blocks}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(recorded.kernel.params):
        value, where = values[parameter.name], (position,)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        special = is_int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name], constants[where] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[where] = [["tt.divisibility", 16]]
            if backend == "hip":  # storages below 2 GiB
                attributes[where].append(["tt.pointer_range", 32])
        elif is_int:
            signature[parameter.name] = "i32"
            if special and value % 16 == 0:
                attributes[where] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(recorded.kernel, signature, constants, attributes)


def compile_case(target_name: str, case: Case) -> dict[str, Any]:
    """Compile one launch for one target; the row of the table."""
    backend, arch = TARGETS[target_name]
    torch.set_float32_matmul_precision(case.precision)
    with assume(Target(backend, arch)):
        recorded = record(DTYPES[case.dtype], case.dim, case.batch)[case.label]
        if case.candidate >= 0:
            shape = launch.CANDIDATES[recorded.kernel.__name__][case.candidate]
            recorded = recorded._replace(tiles=launch.with_candidate(recorded.tiles, shape))
        gpu = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        options = recorded.tiles.options(backend)
        row = {
            "kernel": recorded.kernel.__name__,
            "launch": case.label + (" (sweep)" if case.candidate >= 0 else ""),
            "target": target_name,
            "dtype": case.dtype,
            "matmul_precision": case.precision,
            "tiles": " ".join(
                f"{name.removeprefix('BLOCK_')}={size}" for name, size in recorded.tiles.blocks.items()
            ),
            "warps": recorded.tiles.num_warps,
            "stages": recorded.tiles.num_stages,
        }
        try:
            built = triton.compile(source(recorded, backend), target=gpu, options=options)
        except Exception as error:  # whatever the compiler throws is the finding
            return {**row, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}
    read = read_cubin if backend == "cuda" else read_amd
    return {**row, "shared_bytes": built.metadata.shared, **read(built)}


def read_cubin(built: Any) -> dict[str, Any]:
    """Registers, local memory and matrix instructions of a compiled NVIDIA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = [str(NVIDIA_TOOLS / "cuobjdump")]
        usage = subprocess.run(
            [*tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([*tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spills": spills,
        "matrix_instructions": matrix_instructions(code),
    }


def read_amd(built: Any) -> dict[str, Any]:
    """Vector registers, spilled registers and matrix instructions of a compiled AMD kernel."""
    code = built.asm["amdgcn"]
    number = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", code)[1])  # type: ignore[index]
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    }
    return {
        "registers": number["vgpr_count"],
        "stack_bytes": number["private_segment_fixed_size"],
        "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"],
        "matrix_instructions": matrix_instructions(code),
    }


def matrix_instructions(code: str) -> str:
    """Kinds and numbers of matrix instructions in disassembled code."""
    counted = Counter(MATRIX_INSTRUCTIONS.findall(code))
    return " ".join(f"{name}:{count}" for name, count in sorted(counted.items()))


def violations(row: dict[str, Any], shared_limit: int | None = None) -> list[str]:
    """What is wrong with a row."""
    if "error" in row:
        return [row["error"]]
    backend = TARGETS[row["target"]][0]
    limits = SWEEP_SHARED_LIMITS if "(sweep)" in row["launch"] else {}
    limit = shared_limit or limits.get(row["target"], SHARED_LIMITS[backend])
    wrong = []
    if row["kernel"] not in WITHOUT_PRODUCTS and not row["matrix_instructions"]:
        wrong.append("no matrix instructions: the compiler gave up on the products")
    if row["shared_bytes"] > limit:
        wrong.append(f"{row['shared_bytes']} bytes of shared memory, the limit is {limit}")
    if backend == "cuda" and (row["spills"] or row["stack_bytes"]):
        wrong.append(f"{row['spills']} accesses to local memory, a stack of {row['stack_bytes']} bytes")
    half = row["dtype"] != "float32" and row["kernel"] in HALF_PRODUCTS
    if row["target"] == "sm_90" and half and "assignment" not in row["launch"]:
        kinds = row["matrix_instructions"]
        if "HGMMA" not in kinds or re.search(r"\bHMMA", kinds):
            wrong.append(f"half-precision products without warpgroup instructions alone: {kinds or 'none'}")
    return wrong


# Kernels whose products are in half precision for half inputs. Assignment is not: its centroids are float32.
# Nor is the backward of the similarity matrix, whose upstream gradient is float32.
HALF_PRODUCTS = ("cosine_kernel", "centroid_update_kernel", "gradient_kernel")


# Launches with the most code among those that sweep.
SWEPT = ("cosines, negatives, clusters", "gradients, bml, negatives, learned temperature")


def cases(target_name: str) -> dict[Case, list[int]]:
    """Distinct things to compile, each with the dimensions that it serves.

    D is a run-time number: every multiple of 16 gets the same code. Likewise most batches.
    """
    backend, arch = TARGETS[target_name]
    distinct: dict[str, tuple[Case, list[int]]] = {}
    with assume(Target(backend, arch)):
        for name, dtype in DTYPES.items():
            for precision in ("highest", "high") if name == "float32" else ("highest",):
                torch.set_float32_matmul_precision(precision)
                for batch in BATCHES:
                    for dim in DIMENSIONS:
                        for label, each in record(dtype, dim, batch).items():
                            built = source(each, backend)
                            key = repr((each.kernel.__name__, built.signature, built.constants, built.attrs))
                            key += repr((each.tiles.num_warps, each.tiles.num_stages))
                            case = Case(name, precision, dim, batch, label)
                            served = distinct.setdefault(key, (case, []))[1]
                            if dim not in served:
                                served.append(dim)
                if backend == "cuda" and dtype != torch.float32:
                    for label in SWEPT:
                        kernel = record(dtype, DIMENSIONS[0], BATCHES[1])[label].kernel.__name__
                        for number in range(len(launch.CANDIDATES[kernel])):
                            case = Case(name, precision, DIMENSIONS[0], BATCHES[1], label, number)
                            distinct[repr(case)] = (case, list(DIMENSIONS))
    torch.set_float32_matmul_precision("highest")
    return dict(distinct.values())


def main(argv: list[str] | None = None) -> int:
    """Compile, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help="comma-separated, of " + ", ".join(TARGETS)
    )
    parser.add_argument("--output", type=Path, help="CSV file for the table")
    parser.add_argument(
        "--shared-limit", type=int, help="bytes of shared memory allowed, in place of the chip's"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)
    names = arguments.targets.split(",")
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"--targets: expected of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    work = [(name, case, dims) for name in names for case, dims in cases(name).items()]
    rows = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(compile_case, *zip(*((name, case) for name, case, _ in work), strict=True))
        for (_, _, dims), row in tqdm(zip(work, results, strict=True), total=len(work), unit="kernel"):
            rows.append({**row, "dimensions": " ".join(map(str, dims))})
    return report(rows, arguments.output, arguments.shared_limit)


COLUMNS = (
    "kernel", "launch", "target", "dtype", "matmul_precision", "dimensions", "tiles", "warps", "stages",
    "registers", "stack_bytes", "spills", "shared_bytes", "matrix_instructions", "verdict",
)  # fmt: skip


def report(rows: list[dict[str, Any]], output: Path | None, shared_limit: int | None) -> int:
    """Print and write the table, name the violations, return the exit status."""
    bad = 0
    for row in rows:
        wrong = violations(row, shared_limit)
        row["verdict"] = "; ".join(wrong) or "ok"
        bad += bool(wrong)
    shown = (
        "kernel",
        "launch",
        "target",
        "dtype",
        "registers",
        "spills",
        "shared_bytes",
        "matrix_instructions",
    )
    widths = [max(len(name), *(len(str(row.get(name, ""))) for row in rows)) for name in shown]
    print("  ".join(name.ljust(width) for name, width in zip(shown, widths, strict=True)))
    for row in rows:
        line = "  ".join(
            str(row.get(name, "")).ljust(width) for name, width in zip(shown, widths, strict=True)
        )
        print(line.rstrip() + ("" if row["verdict"] == "ok" else f"  <- {row['verdict']}"))
    if output is not None:
        found = machine()
        head = f"# make audit: triton {triton.__version__}, torch {torch.__version__}, "
        head += f"python {found['python']}, commit {found['commit']}, {found['cpu']}\n"
        write_csv(output, COLUMNS, rows, head)
    print(f"{len(rows)} kernels compiled, {bad} violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
