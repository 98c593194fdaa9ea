#!/usr/bin/env bash
# Tests and benchmarks of the GPU path in one call, with no network: bash bench/gpu.sh
#   OUT                folder for the log and the JSON files (default bench/results/gpu)
#   CLUSTERNS_SECONDS  time for everything (default 540); a stage gets an equal part of what is left
#   CLUSTERNS_STAGES   some of "tests step large exactness training ablations" (default the first three)
#   CLUSTERNS_DATA     the folder of the ablations (default .gpu/data.tar.xz, unpacked)
#   CLUSTERNS_COMMIT   the commit, where the tree is a copy without .git
#   PYTHON             the interpreter that has torch (default python3)
# Killed at any moment it leaves every row measured so far, and the log. Status 1: a test or a row of ours
# failed, or a stage did not finish; 2: nothing can be measured here.
set -uo pipefail
python=$(command -v "${PYTHON:-python3}") || { echo "PYTHON: no interpreter ${PYTHON:-python3}" >&2 && exit 2; }
[[ $python == /* ]] || python=$PWD/$python # not resolved: a virtual environment's is a link
cd "$(dirname "$0")/.." || exit 2
total=${CLUSTERNS_SECONDS:-540}
read -ra stages <<<"${CLUSTERNS_STAGES:-tests step large}"
for stage in "${stages[@]}"; do
    [[ " tests step large exactness training ablations " == *" $stage "* ]] && continue
    echo "CLUSTERNS_STAGES: expected some of 'tests step large exactness training ablations', got $stage" >&2 && exit 2
done
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 2
out=${OUT:-$([[ $device == cuda ]] && echo bench/results/gpu || echo runs/gpu-machinery)}
site=$PWD/runs/gpu-site # the package as it installs, by links
mkdir -p "$out" "$site/clusterns" && ln -sfn "$PWD"/clusterns/* "$PWD/kernels" "$site/clusterns/" || exit 2
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10
[[ $device == cuda ]] || export TRITON_INTERPRET=1
shopt -s nullglob
# Those that launch kernels; none needs datasets, ruff or mypy.
gpu_tests=(tests/test_gpu*.py tests/test_contract*.py tests/test_{kernels,fused,captured}*.py tests/test_cached*.py)

measure() { # the stage's command, which ends by itself, or is interrupted and reports, or is killed
    timeout --foreground --signal=INT --kill-after=20 "$seconds" "$python" "$@"
    local code=$?
    ((code == 0)) || status=1
    if ((code == 124 || code == 137)); then echo "$stage: NOT FINISHED in $seconds s"; fi
    echo "$stage: ended with $code after $SECONDS s in all"
}

main() {
    local stage seconds status=0 left=${#stages[@]} workers parallel=() tiny=() sizes data
    [[ $device == cuda ]] || tiny=(--batch 16 32 --dim 64 --clusters 8 --layers 1 --steps 6 --rounds 1)
    "$python" -P - <<'PY' || return 2
import json, os, pathlib, shutil, sys, sysconfig
sys.path.insert(0, "bench")
from report import machine
found = machine()
print(json.dumps(found, indent=1))
compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
header = pathlib.Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
if not compiler or not header.is_file():
    print(f"Triton launches nothing without a C compiler (found: {compiler}) and {header}")
    sys.exit(0 if found["gpu"] == "none" else 2)
PY
    if [[ $device == cuda ]]; then nvidia-smi; else echo "NO GPU HERE: tiny sizes on the CPU, no GPU figures"; fi
    workers=$("$python" -c 'import os, xdist; print(min(14, os.cpu_count()))') &&
        parallel=(-n "$workers" --maxschedchunk=1) # one test at a time: those for a GPU alone come first
    for stage in "${stages[@]}"; do
        seconds=$(((total - SECONDS) / left-- - 20)) # 20 for what follows the interrupt
        if ((seconds < 40)); then
            echo "$stage: NOT RUN, no time left" && status=1
            continue
        fi
        echo "== $stage, at most $seconds s"
        local budget=(--device "$device" --output "$out" --seconds "$((seconds - 30))")
        case $stage in
            tests) measure -P -m pytest -p no:cacheprovider -vv -ra "${parallel[@]}" "${gpu_tests[@]}" ;;
            ablations)
                sizes=() data=${CLUSTERNS_DATA:-runs/gpu-data}
                [[ -f $data/wiki_sentences.txt ]] || { mkdir -p "$data" && tar xJf .gpu/data.tar.xz -C "$data"; }
                [[ $device == cuda ]] ||
                    sizes=(--layers 1 --batch 16 --steps 2 --eval-steps 2 --seeds 1)
                # $OUT takes few files: the runs come back as one
                measure bench/ablations.py --data "$data" --output runs/gpu-ablations --variants parts "over dimensions" \
                    --minutes "$(awk "BEGIN { print ($seconds - 30) / 60 }")" "${sizes[@]}"
                cp runs/gpu-ablations/comparison.* "$out"
                tar czf "$out/gpu-ablations.tar.gz" -C runs gpu-ablations
                ;;
            *)
                sizes=() # each question's own, but:
                [[ $stage == exactness ]] && sizes=(--batch 64 300 1024 4096 16384 65536)
                # BERT-base as published
                [[ $stage == training ]] && sizes=(--layers 12 --dim 768 --batch 256 1024 4096 --steps 70 --rounds 3)
                measure bench/run.py "$stage" "${budget[@]}" "${sizes[@]}" "${tiny[@]}"
                ;;
        esac
    done
    echo "== in $out after $SECONDS s, exit status $status: $(ls "$out" | tr '\n' ' ')"
    return $status
}
main 2>&1 | tee -i "$out/gpu.log"
exit "${PIPESTATUS[0]}"
