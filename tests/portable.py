"""The numeric tests under disguises: other processors, libraries, threads, locales and folders, played here.

`make test-portable`, or python tests/portable.py [--jobs 2] [--only WORD]: the disguises whose name has WORD.
One that this machine cannot wear, or that changes nothing on it, is named and skipped. No file is left.
"""

from __future__ import annotations

import argparse
import json
import locale
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# Files whose tests start processes, or are of texts and files.
OTHERS = """architecture audit bad_input bench bench_ablations cached checkpoint compile config
data data_page distributed docs docstrings evaluate evaluated_model files gpu killed load_sts
model_settings package report scratch shapes sources train_distributed""".split()
NUMERIC = sorted(path for path in TESTS.glob("test_*.py") if path.stem.removeprefix("test_") not in OTHERS)
PLAIN = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
LATIN = "en_US.ISO-8859-1"
CORES = ("Prescott", "Nehalem", "Haswell", "Zen", "SkylakeX")
DISGUISES: dict[str, dict[str, str]] = {
    **{f"ATen {level}": {"ATEN_CPU_CAPABILITY": level} for level in ("default", "avx2")},
    **{f"OpenBLAS {core}": {"OPENBLAS_CORETYPE": core} for core in CORES},
    **{f"oneDNN {level}": {"ONEDNN_MAX_CPU_ISA": level} for level in ("SSE41", "AVX2")},
    **{f"MKL {level}": {"MKL_CBWR": level} for level in ("COMPATIBLE", "AVX2")},
    **{f"{count} threads": {"OMP_NUM_THREADS": count, "MKL_DYNAMIC": "FALSE"} for count in ("2", "4")},
    # Not plain C: torch.compile reads sources in the locale's encoding, and ASCII does not do for them.
    "Latin-1 locale": {"LC_ALL": LATIN, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "hash seed": {"PYTHONHASHSEED": "1"},
    "other folder": {},
    "read-only checkout": {},
}
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd "$0" && exec "$@"'


def machine() -> dict:
    """What a disguise may change: bits of products and functions, and how and where Python runs."""
    x = torch.linspace(-3, 3, 97 * 61, dtype=torch.float64).sin().float().view(97, 61)
    y = x.T.contiguous()
    results = [x @ y, x.bfloat16() @ y.bfloat16(), x.exp(), x.softmax(1), torch.linalg.svdvals(x)]
    results += [torch.nn.functional.linear(x, x), torch.nn.functional.linear(x.bfloat16(), x.bfloat16())]
    arrays = [*(result.float().numpy() for result in results), x.numpy() @ y.numpy()]
    return {
        "bits": [zlib.crc32(array.tobytes()) for array in arrays],
        "threads": torch.get_num_threads(),
        "encoding": locale.getpreferredencoding(False),
        "hash": hash("a"),
        "elsewhere": Path.cwd() != ROOT,
        "read-only": bool(os.statvfs(ROOT).f_flag & os.ST_RDONLY),
    }


def python(name: str, scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a disguise, "plain" for none, with a folder of its own for what it writes."""
    place = scratch / name.replace(" ", "-")
    place.mkdir(exist_ok=True)
    command = [sys.executable, *arguments]
    if name == "read-only checkout":
        user = [] if os.geteuid() == 0 else ["-r"]
        command = ["unshare", "-m", *user, "sh", "-c", READ_ONLY, str(ROOT), *command]
    folders = {
        "PYTHONPATH": TESTS,
        "LOCPATH": scratch,
        "TMPDIR": place,
        "HYPOTHESIS_STORAGE_DIRECTORY": place,
    }
    return subprocess.run(
        command,
        env={
            **os.environ,
            **PLAIN,
            **{key: str(path) for key, path in folders.items()},
            **DISGUISES.get(name, {}),
        },
        cwd=place if name == "other folder" else ROOT,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def probe(name: str, scratch: Path) -> dict | None:
    """What the disguise makes of this machine; None where Python does not run in it."""
    done = python(name, scratch, "-c", "import json, portable; print(json.dumps(portable.machine()))")
    return None if done.returncode else json.loads(done.stdout)


def test(name: str, scratch: Path) -> tuple[str, int, list[str], float]:
    """Name, passed tests, failures in a line each, and seconds."""
    began = time.monotonic()
    options = ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--tb=no", "-m", "not slow"]
    done = python(name, scratch, "-m", "pytest", *options, *map(str, NUMERIC))
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode and not failures:
        failures = [f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-1000:]}"]
    passed = re.search(r"(\d+) passed", done.stdout)
    return name, int(passed[1]) if passed else 0, failures, time.monotonic() - began


def main() -> int:
    """Print a table, a row as soon as it is there; 1 where a test failed in any disguise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, help="disguises side by side, a core each")
    parser.add_argument("--only", default="", help="part of the names of the disguises to wear")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(wanted.jobs) as pool:
        scratch = Path(folder)
        if shutil.which("localedef"):
            subprocess.run(
                ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(scratch / LATIN)], check=False
            )
        names = ["plain", *(name for name in DISGUISES if wanted.only in name)]
        worn: dict[str, dict] = {}
        print(f"{'disguise':<20} {'passed':>7} {'failed':>7} {'seconds':>8}")
        for name, found in zip(names, pool.map(lambda name: probe(name, scratch), names), strict=True):
            alike = next((other for other in worn if worn[other] == found), None)
            if found is None or alike:
                print(f"{name:<20} {f'the same as {alike} here' if found else 'cannot be worn here'}")
            else:
                worn[name] = found
        failures = {}
        for name, passed, failed, seconds in pool.map(lambda name: test(name, scratch), worn):
            print(f"{name:<20} {passed:>7} {len(failed):>7} {seconds:>8.0f}", flush=True)
            failures[name] = failed
    for name, lines in failures.items():
        print("".join(f"\n{name}: {line}" for line in lines), end="")
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
