#!/usr/bin/env bash
# Tests and benchmarks of the GPU path in one call, with no network: bash bench/gpu.sh
#   OUT                     folder for logs, JSON, CSV and plot (default bench/results/gpu)
#   CLUSTERNS_SECONDS       time for everything (default 540)
#   CLUSTERNS_TEST_SECONDS  most of it for the tests (default a third)
#   CLUSTERNS_LARGE_SECONDS most of it for the large batches (default a third, at most 300)
#   CLUSTERNS_STAGES        some of "tests step large exactness training" (default the first three); one call each gives
#                           each all the time: CLUSTERNS_STAGES="large exactness" CLUSTERNS_LARGE_SECONDS=300
#   PYTHON                  the interpreter that has torch (default python3)
# Wheels in .whl/ (rivals that are not installed) are used from a temporary folder.
# A failing test does not stop the benchmarks; the exit status is non-zero then.
set -uo pipefail
python=$(command -v "${PYTHON:-python3}") || { echo "PYTHON: expected an interpreter, got ${PYTHON:-python3}" >&2 && exit 2; }
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac # a link stays one
cd "$(dirname "$0")/.." || exit 1
began=$SECONDS
total=${CLUSTERNS_SECONDS:-540}
test_seconds=${CLUSTERNS_TEST_SECONDS:-$((total / 3))}
stages=" ${CLUSTERNS_STAGES:-tests step large} "
for stage in $stages; do
    case $stage in
        tests | step | large | exactness | training) ;;
        *) echo "CLUSTERNS_STAGES: expected some of 'tests step large exactness training', got $stage" >&2 && exit 2 ;;
    esac
done
wants() { [[ $stages == *" $1 "* ]]; }
wants tests || test_seconds=0
large_seconds=0
if wants large; then
    large_seconds=${CLUSTERNS_LARGE_SECONDS:-$((total / 3))}
    if ((large_seconds > 300)); then large_seconds=300; fi
fi
scratch=$(mktemp -d)
path=() # options of the interpreter for pytest
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1
left() { echo $((total - (SECONDS - began) - ${1:-0})); }
status=0

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu=1
    out=${OUT:-bench/results/gpu}
else
    gpu=0
    out=${OUT:-runs/gpu-machinery} # not where GPU results lie
    echo "NO GPU HERE: the tests run as on any such machine, the benchmark machinery runs on the CPU at tiny"
    echo "sizes, and no GPU figure is written."
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
export CLUSTERNS_RESULTS="$out"

echo "== machine"
if ((gpu)); then nvidia-smi || true; fi
"$python" - <<'PY'
import platform
from importlib import metadata
print("python", platform.python_version())
names = "torch triton transformers sentence-transformers setuptools pytest pytest-benchmark matplotlib"
for name in names.split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "not installed")
PY

echo "== package"
ours() { (cd / && "$python" -c '
import os, sys, clusterns, clusterns.kernels
here = [os.path.realpath(module.__file__) for module in (clusterns, clusterns.kernels)]
sys.exit(here != [os.path.realpath(os.path.join(sys.argv[1], *p)) for p in
                  (("clusterns", "__init__.py"), ("kernels", "__init__.py"))])' "$1" 2>/dev/null); }
if ours "$PWD"; then
    echo "this checkout is installed already"
elif "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e . && ours "$PWD"; then
    echo "installed"
else
    echo "not installable here: imported from the checkout through links"
    mkdir -p "$scratch/site/clusterns"
    ln -s "$PWD"/clusterns/* "$scratch/site/clusterns/"
    ln -sfn "$PWD/kernels" "$scratch/site/clusterns/kernels"
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
    path=(-P) # else `-m pytest` finds clusterns/ of this folder first, which has no clusterns.kernels
    (cd / && "$python" -c 'import clusterns.kernels; print(clusterns.__file__)') || exit 1
fi
if compgen -G ".whl/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/rivals" .whl/*.whl &&
        export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$scratch/rivals"
fi

tests() { # name, seconds, arguments of pytest
    local name=$1 seconds=$2 code
    shift 2
    timeout --kill-after=10 "$seconds" "$python" "${path[@]}" -m pytest -p no:cacheprovider -ra \
        --continue-on-collection-errors "$@" >"$scratch/log" 2>&1
    code=$?
    { echo "== $name" && cat "$scratch/log"; } >>"$out/tests.log"
    tail -n 25 "$scratch/log"
    if ((code == 124 || code == 137)); then echo "$name: NOT FINISHED in $seconds s"; fi
    if ((code != 0 && code != 5)); then status=1; fi # 5: nothing was selected
    echo "$name: pytest ended with $code after $((SECONDS - began)) s in all"
}
shopt -s nullglob
if wants tests; then
    echo "== tests, at most $test_seconds s"
    rm -f "$out/tests.log"
    kernel_tests=(tests/test_kernels*.py tests/test_fused*.py tests/test_large*.py)
    first=$SECONDS
    tests tests-gpu-marker "$test_seconds" tests -m gpu
    rest=$((test_seconds - (SECONDS - first)))
    if ((rest > 5)); then
        tests tests-kernels "$rest" "${kernel_tests[@]}" -m "not gpu" # those with the marker have run
    else
        echo "tests-kernels: NOT RUN, no time left for them" && status=1
    fi
fi

if ((gpu)); then arguments=(--device cuda); else arguments=(--device cpu); fi
benchmark() { # script, seconds, name of its logs, more arguments
    local script=$1 seconds=$2 name=$3
    shift 3
    if ((seconds < 10)); then
        echo "$script: NOT RUN, no time left" && status=1
        return
    fi
    echo "== $script, $seconds s"
    # TERM lets it write its report; the budget inside ends it before that unless one row takes long.
    timeout --kill-after=15 $((seconds + 10)) "$python" "bench/$script" "${arguments[@]}" --seconds "$seconds" \
        --output "$out" "$@" 2>"$out/$name-errors.log" | tee "$out/$name.log"
    if ((PIPESTATUS[0] != 0)); then
        status=1
        tail -n 15 "$out/$name-errors.log"
    fi
}
quick=()
if ((!gpu)); then quick=(--quick); fi
if wants step; then benchmark gpu_step.py "$(left $((35 + large_seconds)))" benchmark "${quick[@]}"; fi
if wants large; then
    seconds=$(left 35)
    if ((seconds > large_seconds)); then seconds=$large_seconds; fi
    ((gpu)) || export TRITON_INTERPRET=1
    benchmark gpu_large_batch.py "$seconds" large
fi

if wants exactness && (($(left 20) > 30)); then
    echo "== exactness, $(left 20) s"
    batches=64,300
    if ((gpu)); then batches=64,300,1024,4096,16384,65536; else export TRITON_INTERPRET=1; fi
    timeout --kill-after=5 "$(left 20)" "$python" bench/exactness.py "${arguments[@]}" --batches $batches \
        --output "$out/exactness.csv" 2>"$out/exactness-errors.log" | tee "$out/exactness.log"
    if ((PIPESTATUS[0] != 0)); then status=1; fi
fi

if wants training && (($(left 20) > 60)); then
    echo "== training, $(left 20) s"
    sizes=(--layers 12 --hidden 768 --batch 256 --steps 210 --rounds 1) # BERT-base, its published batch
    if ((!gpu)); then sizes=(--layers 1 --hidden 64 --batch 32 --clusters 8 --steps 6 --rounds 1 --memory-batches 32); fi
    timeout --kill-after=5 "$(left 20)" "$python" bench/training.py "${arguments[@]}" "${sizes[@]}" \
        --output "$out/training.json" 2>"$out/training-errors.log" | tee "$out/training.log"
    if ((PIPESTATUS[0] != 0)); then status=1; fi
fi

if wants step && ((gpu && $(left) > 90)); then
    echo "== host view by pytest-benchmark"
    timeout --kill-after=5 $(($(left) - 10)) "$python" "${path[@]}" -m pytest -p no:cacheprovider \
        bench/test_gpu_step.py --benchmark-only -s >>"$out/benchmark.log" 2>&1 || status=1
fi
echo "== in $out after $((SECONDS - began)) s, exit status $status"
ls "$out"
exit $status
