"""What do the kernels take on each chip? Compiles all of them ahead of time, no GPU needed, and reads it off.

    python bench/audit.py [--targets sm_90 gfx942] [--only chunk gradient_kernel] [--output FILE]
    python bench/audit.py --large [--output FILE]    how long may a large batch take? See predicted.py

The launches are those of the library, recorded on tensors without storage, so what is compiled here is what
runs. A violation ends in exit status 1: a kernel that does not compile, local memory (spilled registers) or
too much shared memory on an NVIDIA target, a half-precision product on sm_90 without warpgroup instructions,
an access to global memory before the wait of a launch that may overlap the one before.

`predicted_us_512`, on sm_90 at D = 768: 3.5 µs + waves · Σ over the loops of the longest program of steps ·
max(800 cycles, 3.5 · instructions in the loop · warps on a multiprocessor / 4), or the time of all operations
or bytes if longer. Fitted to an H200 at 2041784: 37 of 38 figures within a factor 1.5, the last 1.6 too long.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import operator
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported: interpreted ones do not compile

import torch
import triton
from report import machine, write_csv
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from clusterns.kernels import cosine_launchers, launch, objective_launchers
from clusterns.kernels.target import Target, assume
from clusterns.objective.problem import Batch, Clusters, Options
from clusterns.objective.sweep import sweep

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Shared memory that one program may take. The smaller chips of a generation (sm_86, sm_89, sm_120) have
# 99 KiB, and they run the same tiles; those of sm_90, which loads tiles by descriptors, no other chip runs.
SHARED_LIMITS = {"cuda": 99 * 1024, "sm_90": 227 * 1024, "hip": 64 * 1024}
TARGETS: dict[str, tuple[str, int | str]] = {f"sm_{arch}": ("cuda", arch) for arch in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = ("hip", "gfx942")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIMENSIONS = (384, 768, 1024)
BATCHES = (512, 256, 2048)  # one for each choice of tiles; a kernel of several counts as the first one's
CLUSTERS, NEGATIVES = 128, 96
MATRIX_INSTRUCTIONS = re.compile(r"\b(HGMMA|HMMA|UTC[A-Z]*MMA|v_mfma)")
# REDUX is not one, and ATOMS is to shared memory.
GLOBAL_ACCESS = re.compile(r"(LDG|LDGSTS|STG|ATOMG?|REDG?|LD|ST|UTMA\w+|UBLK\w+)(\.|$)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)")
BRANCH = re.compile(r"BRA\b.*?\b0x([0-9a-f]+)")
SCALAR = re.compile(r" *%(\w+) = (?:arith|tt)\.(\w+) (.*?) : i(?:32|64)\b")
SCALARS = {"addi": operator.add, "subi": operator.sub, "muli": operator.mul, "divsi": operator.floordiv}
SCALARS |= {"remsi": operator.mod, "minsi": min, "maxsi": max, "extsi": int, "get_program_id": lambda: 0}
LOOP = re.compile(r"scf\.for \S+ = %(\w+) to %(\w+) step %(\w+)")
DOT = re.compile(r"tt\.dot .* : tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x")
# An H100 or H200, per second: cycles, bytes, operations by the type of the factors (float32 as tf32).
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.0e12
RATES = {"bf16": 790e12, "f16": 790e12, "f32": 395e12}
LAUNCH_US, CYCLES, STEP_CYCLES = 3.5, 3.5, 800  # fitted, see above
POINTERS = dict(
    zip(
        [*DTYPES.values(), torch.int8, torch.int32, torch.int64],
        "*fp32 *bf16 *fp16 *i8 *i32 *i64".split(),
        strict=True,
    )
)
SHOWN = """kernel launch target dtype registers spills shared_bytes matrix_instructions predicted_us_512
verdict""".split()
PREDICTED = """programs_512 programs_per_multiprocessor waves_512 bytes_512 operations_512
predicted_us_512""".split()
COLUMNS = """kernel launch target dtype matmul_precision dimensions tiles warps stages registers stack_bytes
spills shared_bytes products matrix_instructions programs_256""".split()
COLUMNS += [*PREDICTED, "verdict"]


# --- what the library launches -----------------------------------------------------------------------------


def record(dtype: torch.dtype, dim: int, batch: int) -> dict[str, launch.Launch]:
    """Every launch that the library makes at this size, by a label: what is asked of it, and the kernel."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, negatives = meta(batch, dim), meta(batch, dim), meta(NEGATIVES, dim)
    centroids, tau = meta(CLUSTERS, dim, dtype=torch.float32), meta(dtype=torch.float32)
    found: dict[str, launch.Launch] = {}

    def a_step(rule: str, others: Any, temperature: Any, known: Any, statistic: str = "") -> None:
        given, clustered = (x, y, others), known is not None
        settings = (known, None, None, temperature, clustered, clustered, True, statistic, rule)
        objective_launchers.forward_steps(*given, *settings)
        needs = (True, True, others is not None)
        objective_launchers.backward_steps(tau, *given, temperature, CLUSTERS * clustered, needs)

    def a_chunk(rule: str, others: Any, temperature: Any, needs: bool, directions: str = "one") -> None:
        ids = meta(batch, dtype=torch.int64)
        clusters, options = Clusters(ids, centroids, ids), Options(0.0, rule, directions=directions)
        sweep(Batch(x, y, others, temperature, clusters, options), (needs,) * 4, "triton-chunked")

    with launch.recording() as recorded:

        def keep(label: str, function: Any, *given: Any) -> None:
            function(*given)
            for number, each in enumerate(each for each in recorded if isinstance(each, launch.Launch)):
                found[f"{label}: {number} {each.kernel.__name__}"] = each
            recorded.clear()

        keep("similarity, learned temperature", cosine_launchers.similarity, x, y, tau)
        keep("assignment", cosine_launchers.nearest_centroids, x, centroids)
        keep("assignment, sums", cosine_launchers.cluster_sums, x, centroids)
        keep("plain", a_step, "keep", None, None, None)
        for statistic in ("sum", "mean"):
            keep(f"update, {statistic}", a_step, "bml", None, None, centroids, statistic)
        for rule in ("bml", "exclude", "keep"):
            keep(f"{rule}", a_step, rule, None, None, centroids)
            keep(f"{rule}, negatives, learned temperature", a_step, rule, negatives, tau, centroids)
            keep(f"chunk, {rule}", a_chunk, rule, None, 0.05, True)
            keep(f"chunk, {rule}, both directions", a_chunk, rule, None, 0.05, True, "both")
            for needs in (False, True):
                label = f"chunk, {rule}, negatives, learned temperature{', gradients' * needs}"
                keep(label, a_chunk, rule, negatives, tau, needs)
    return found


@functools.cache
def launches(target_name: str, dtype: str, precision: str, dim: int, batch: int) -> dict[str, launch.Launch]:
    """`record` for a chip and a precision of float32 products."""
    torch.set_float32_matmul_precision(precision)
    with assume(Target(*TARGETS[target_name])):
        return record(DTYPES[dtype], dim, batch)


class Case(NamedTuple):
    """One thing to compile."""

    dtype: str
    precision: str  # torch.get_float32_matmul_precision()
    dim: int
    batch: int
    label: str  # in `record`


def cases(target_name: str) -> dict[Case, list[int]]:
    """Distinct things to compile, each with the dimensions that it serves.

    D is a run-time number: every multiple of 16 gets the same code. Likewise most batches.
    """
    backend, _ = TARGETS[target_name]
    distinct: dict[str, tuple[Case, list[int]]] = {}
    kinds = [(name, "highest") for name in DTYPES] + [(name, "high") for name in DTYPES if name == "float32"]
    for (name, precision), batch, dim in itertools.product(kinds, BATCHES, DIMENSIONS):
        for label, each in launches(target_name, name, precision, dim, batch).items():
            built, tiles = source(each, backend), each.tiles
            key = (each.kernel.__name__, built.signature, built.constants, built.attrs)
            case = Case(name, precision, dim, batch, label)
            served = distinct.setdefault(repr((*key, tiles.num_warps, tiles.num_stages)), (case, []))[1]
            if dim not in served:
                served.append(dim)
    return dict(distinct.values())


# --- compiling, and reading the code -----------------------------------------------------------------------


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
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[where] = [["tt.divisibility", 16]]
            if backend == "hip":  # storages below 2 GiB
                attributes[where].append(["tt.pointer_range", 32])
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
        elif is_int:
            signature[parameter.name] = "i32"
            if special and value % 16 == 0:
                attributes[where] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(recorded.kernel, signature, constants, attributes)


def compile_launch(recorded: launch.Launch, target_name: str) -> Any:
    """The compiled kernel."""
    backend, arch = TARGETS[target_name]
    gpu = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    dependent = recorded.constants.get("DEPENDENT", False)
    options = recorded.tiles.options(Target(*TARGETS[target_name]), dependent)
    return triton.compile(source(recorded, backend), target=gpu, options=options)


def compile_case(target_name: str, case: Case) -> dict[str, Any]:
    """Compile one launch for one target; the row of the table."""
    label = case.label
    recorded = launches(target_name, case.dtype, case.precision, case.dim, case.batch)[label]
    tiles = recorded.tiles
    row = {
        "kernel": recorded.kernel.__name__,
        "launch": label.split(":")[0],
        "target": target_name,
        "dtype": case.dtype,
        "matmul_precision": case.precision,
        "tiles": " ".join(f"{name.removeprefix('BLOCK_')}={size}" for name, size in tiles.blocks.items()),
        "warps": tiles.num_warps,
        "stages": tiles.num_stages,
    }
    try:
        with assume(Target(*TARGETS[target_name])):
            built = compile_launch(recorded, target_name)
    except Exception as error:  # whatever the compiler throws is the finding
        return {**row, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}
    code, used = (read_cubin if TARGETS[target_name][0] == "cuda" else read_amd)(built)
    counted = sorted(Counter(MATRIX_INSTRUCTIONS.findall(code)).items())
    kinds = " ".join(f"{name}:{count}" for name, count in counted)
    products = " ".join(sorted({found[3] for found in DOT.finditer(built.asm["ttir"])}))  # of these factors
    row |= {"shared_bytes": built.metadata.shared, **used, "products": products, "matrix_instructions": kinds}
    if recorded.constants.get("DEPENDENT"):
        row["unordered"] = before_the_wait(code)
    if target_name == "sm_90" and case.batch == 512 and "chunk" not in label:
        half, whole = (launches("sm_90", *case[:2], 768, batch)[label] for batch in (256, 512))
        if (whole.tiles, whole.constants) == (tiles, recorded.constants):  # else another row has it
            row |= {"programs_256": math.prod(half.grid), **predict(whole, built.asm["ttir"], code, row)}
    return row


def read_cubin(built: Any) -> tuple[str, dict[str, Any]]:
    """Code, registers and local memory of a compiled NVIDIA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(NVIDIA_TOOLS / "cuobjdump"), "-res-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", code)[1]) for name in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return code, {"registers": registers, "stack_bytes": stack, "spills": spills}


def read_amd(built: Any) -> tuple[str, dict[str, Any]]:
    """Code, vector registers and spilled registers of a compiled AMD kernel."""
    code = built.asm["amdgcn"]
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    registers, stack, *spills = (int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in names)
    return code, {"registers": registers, "stack_bytes": stack, "spills": sum(spills)}


def before_the_wait(code: str) -> str:
    """What a kernel that may overlap the one before lacks, or does before it waits: "" if all is well."""
    opcodes = [opcode for _, opcode, _ in INSTRUCTION.findall(code)]
    missing = [each for each in ("PREEXIT", "ACQBULK") if each not in opcodes]
    if missing:
        return f"no {' '.join(missing)}"
    return " ".join(filter(GLOBAL_ACCESS.match, opcodes[: opcodes.index("ACQBULK")]))


# --- how long a launch may take on sm_90 -------------------------------------------------------------------


def programs_per_multiprocessor(registers: int, warps: int, shared_bytes: int) -> int:
    """As many as 65,536 registers, 2,048 threads and 228 KiB hold; each loses 1 KiB, and has 227 at most."""
    of_a_program = math.ceil(registers / 8) * 8 * 32 * warps
    return min(65536 // of_a_program, 2048 // (32 * warps), 32, 228 * 1024 // (shared_bytes + 1024))


def loops_of_code(code: str) -> list[tuple[bool, int]]:
    """The outer loops in their order: whether they hold matrix instructions, and how many instructions."""
    listed = [(int(at, 16), opcode, rest) for at, opcode, rest in INSTRUCTION.findall(code)]
    jumps = [(int(to[1], 16), -at) for at, opcode, rest in listed if (to := BRANCH.match(opcode + rest))]
    loops, last = [], -1
    for start, end in ((to, -at) for to, at in sorted(jumps) if to < -at):
        if start > last:
            last, body = end, [opcode for at, opcode, _ in listed if start <= at <= end]
            loops.append((any(map(MATRIX_INSTRUCTIONS.match, body)), len(body)))
    return loops


def loops_of_source(ttir: str, arguments: list) -> list[list[int]]:
    """The outer loops in their order: whether they hold products, steps of program 0, operations, branch.

    Branch 0 is what every program does, the others exclude each other. A bound from data makes one step, and
    no products then.
    """
    names = re.findall(r"%(\w+): ", re.search(r"tt\.func .*", ttir)[0])  # the compiler may have chosen others
    values, branch, inside, loops = dict(zip(names, arguments, strict=True)), 0, [], []
    for line in ttir.splitlines():
        depth = len(line) - len(line.lstrip())
        branch += depth == 4 and ("scf.if" in line or "} else {" in line)
        inside = [(outer, steps) for outer, steps in inside if outer < depth]
        if found := SCALAR.match(line):
            name, what, rest = found.groups()
            factors = [values.get(each) for each in re.findall(r"%(\w+)", rest)]
            values[name] = int(rest) if what == "constant" else None
            if what in SCALARS and None not in factors:
                values[name] = SCALARS[what](*factors)
        elif found := LOOP.search(line):
            first, end, step = map(values.get, found.groups())
            steps = 0 if None in (first, end, step) else max(1, math.ceil((end - first) / step))
            loops += [] if inside else [[False, max(1, steps), 0, branch if depth > 4 else 0]]
            inside.append((depth, steps))
        elif inside and (found := DOT.search(line)):
            terms = 3 if "tf32x3" in line and found[3] == "f32" else 1
            sizes = (int(found[group]) for group in (1, 2, 4))
            loops[-1][0] = all(steps for _, steps in inside)
            loops[-1][2] += 2 * terms * math.prod(sizes) * math.prod(steps for _, steps in inside)
    return loops


def predict(recorded: launch.Launch, ttir: str, code: str, row: dict[str, Any]) -> dict[str, Any]:
    """The columns PREDICTED, by the model above."""
    programs, warps = math.prod(recorded.grid), row["warps"]
    fitting = programs_per_multiprocessor(row["registers"], warps, row["shared_bytes"])
    waves = math.ceil(programs / MULTIPROCESSORS / fitting)
    warps *= min(fitting, math.ceil(programs / MULTIPROCESSORS))
    passed = [name for name, kind in source(recorded, "cuda").signature.items() if kind != "constexpr"]
    asked = loops_of_source(ttir, [recorded.arguments[name] for name in passed])
    listed = loops_of_code(code)
    for loops in (asked, listed):  # the compiler unrolls small ones, wholly or up to a rest
        while len(loops) > min(len(asked), len(listed)):
            loops.remove(min(loops))
    agree = [loop[0] for loop in asked] == [loop[0] for loop in listed]
    cycles, operations = Counter({1: 0}), Counter({1: 0})
    for (_, steps, count, branch), (_, length) in zip(asked, listed, strict=True):
        cycles[branch] += steps * max(STEP_CYCLES, CYCLES * length * warps / 4)
        operations[branch] += count * programs
    chain, most = (each.pop(0, 0) + max(each.values()) for each in (cycles, operations))
    tensors = [each for each in recorded.arguments.values() if isinstance(each, Tensor)]
    moved = sum(each.numel() * each.itemsize for each in tensors)
    rate = min((RATES[found[3]] for found in DOT.finditer(ttir)), default=1)
    seconds = max(waves * chain / CLOCK, most / rate, moved / BANDWIDTH)
    time = round(LAUNCH_US + 1e6 * seconds, 1) if agree else ""
    return dict(zip(PREDICTED, (programs, fitting, waves, moved, most, time), strict=True))


def violations(row: dict[str, Any], shared_limit: int | None = None) -> list[str]:
    """What is wrong with a row."""
    if "error" in row:
        return [row["error"]]
    backend = TARGETS[row["target"]][0]
    limit = shared_limit or SHARED_LIMITS.get(row["target"], SHARED_LIMITS[backend])
    wrong, kinds = [], row["matrix_instructions"]
    if row["products"] and not kinds:
        wrong.append("no matrix instructions: the compiler gave up on the products")
    if row["shared_bytes"] > limit:
        wrong.append(f"{row['shared_bytes']} bytes of shared memory, the limit is {limit}")
    if backend == "cuda" and (row["spills"] or row["stack_bytes"]):
        wrong.append(f"{row['spills']} accesses to local memory, a stack of {row['stack_bytes']} bytes")
    if row.get("unordered"):
        wrong.append(f"before the wait for the launch before: {row['unordered']}")
    alone = "HGMMA" in kinds and not re.search(r"\bHMMA", kinds)
    if row["target"] == "sm_90" and row["products"] in ("bf16", "f16") and not alone:
        wrong.append(f"half-precision products without warpgroup instructions alone: {kinds or 'none'}")
    return wrong


def report(rows: list[dict[str, Any]], output: Path | None, shared_limit: int | None = None) -> int:
    """Print and write the table, name the violations, return the exit status."""
    for row in rows:
        row["verdict"] = "; ".join(violations(row, shared_limit)) or "ok"
        print("  ".join(f"{name} {row.get(name, '')}" for name in SHOWN))
    bad = sum(row["verdict"] != "ok" for row in rows)
    for dtype in ("float32", "bfloat16"):
        wanted = ("update, sum", dtype, "highest")
        step = [row for row in rows if (row["launch"], row["dtype"], row["matmul_precision"]) == wanted]
        times = [float(row["predicted_us_512"]) for row in step if row.get("predicted_us_512")]
        print(f"predicted: a step with {dtype} at B = 512, {len(times)} launches, {sum(times):.1f} µs")
    if output is not None:
        found = machine()
        head = "# make audit: triton {triton}, torch {torch}, python {python}, commit {commit}, {cpu}\n"
        write_csv(output, COLUMNS, rows, head.format(**found))
    print(f"{len(rows)} kernels compiled, {bad} violations")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Compile, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[""], help="what has one of these in its name")
    parser.add_argument("--large", action="store_true", help="predicted times of large batches instead")
    parser.add_argument("--output", type=Path, help="CSV file for the table")
    wanted = parser.parse_args(argv)
    if wanted.large:
        return import_module("predicted").main(wanted.output)
    work = [
        (name, case, dims)
        for name in wanted.targets
        for case, dims in cases(name).items()
        if any(each in case.label for each in wanted.only)
    ]
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = pool.map(compile_case, *zip(*((name, case) for name, case, _ in work), strict=True))
        for (_, _, dims), row in tqdm(zip(work, results, strict=True), total=len(work), unit="kernel"):
            rows.append({**row, "dimensions": " ".join(map(str, dims))})
    return report(rows, wanted.output)


if __name__ == "__main__":
    sys.exit(main())
