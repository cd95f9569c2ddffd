#!/usr/bin/env bash
# Everything here that needs a GPU, in one command inside ten minutes and offline: the tests marked gpu, then the tables.
#
#   bash benchmarks/gpu.sh               on a machine with a CUDA device
#   bash benchmarks/gpu.sh --rehearse    each piece on the CPU, small; what it then says of speed means nothing
#   bash benchmarks/gpu.sh tests train   some of its pieces: tests, train, memory, growth
#
#   PYTHON=python3           an interpreter with torch (2.11 or newer), numpy, pytest, pytest-timeout, PyYAML, rich,
#                            psutil and safetensors; the first of .venv/bin/python and python3 unless told
#   WHEELS=wheels            folder of wheels that it lacks (DeepSpeed and its needs, torchao); they are put on the path
#                            of this run alone. What is not there is left out, and the end of the tests' log says so
#   OUT=benchmarks/results/gpu   where the results, NAME.json, and gpu.log go
#   LIMIT_S=570              seconds in all; a piece that is not done by then is ended
#
# Exit code 0: every piece ran and passed; 1: one did not; 2: there is no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'gpu: %s\n' "$*"; }
# die WHAT MEND
die() {
    printf 'gpu error: %s. %s\n' "$1" "$2" >&2
    exit 2
}

rehearses=false pieces=" "
for argument in "$@"; do
    case "$argument" in
    --rehearse) rehearses=true ;;
    tests | train | memory | growth) pieces+="$argument " ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' benchmarks/gpu.sh && exit 0 ;;
    *) die "unknown option $argument" "There is --rehearse; see the head of benchmarks/gpu.sh" ;;
    esac
done
if [[ "$pieces" == " " ]]; then pieces=" tests train memory growth "; fi

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
OUT="${OUT:-benchmarks/results/gpu}" LIMIT_S="${LIMIT_S:-570}" WHEELS="${WHEELS:-wheels}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

compgen -G "$WHEELS/*.whl" >/dev/null && {
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$WHEELS"/*.whl ||
        die "the wheels in $WHEELS can't be installed" "They must be of this Python's version, and one of each package"
    export PYTHONPATH="$scratch/site:$PYTHONPATH"
}
if $rehearses; then export CUDA_VISIBLE_DEVICES="" GPU_REHEARSAL=1; fi
sees=$("$PYTHON" -c 'import torch; print("a GPU" if torch.cuda.is_available() else "none")' 2>/dev/null) ||
    die "$PYTHON has no torch" "Name another interpreter: PYTHON=/path/to/python"
if [[ "$sees" == none ]] && ! $rehearses; then
    die "torch sees no GPU on this machine, so nothing was tested and nothing measured" \
        "bash benchmarks/gpu.sh --rehearse runs its pieces on the CPU"
fi
mkdir -p "$OUT"

failed=0 log="$OUT/gpu.log"
: >"$log"
# piece NAME RESULT COMMAND…: run it, where it is asked for, in what is left of the time; its stdout goes to RESULT
piece() {
    local name="$1" result="$2" began=$SECONDS code=0 left=$((LIMIT_S - SECONDS))
    shift 2
    if [[ "$pieces" != *" ${name%%-*} "* ]]; then return; fi
    if ((left < 10)); then
        say "$name: NOT RUN, the time is up"
        failed=1
        return
    fi
    printf '== %s\n' "$name" >>"$log"
    timeout -k 10 "$left" "$@" >"$result" 2>>"$log" || code=$?
    if ((code == 1)) && [[ "$result" == *.json && -s "$result" ]]; then # it has measured, and missed a goal
        say "$name: ran in $((SECONDS - began)) s, and missed a goal; see $result"
        if ! $rehearses; then failed=1; fi
        return
    fi
    case $code in
    0) say "$name: passed in $((SECONDS - began)) s" ;;
    124 | 137) say "$name: ENDED after $((SECONDS - began)) s, the time is up; see $log" ;;
    *) say "$name: FAILED with $code in $((SECONDS - began)) s; see $log" ;;
    esac
    if ((code != 0)); then failed=1; fi
}

marked=(tests/gpu)
if $rehearses; then
    memory=(--only 125M_fp32) growth=(--only batch --rounds 1 --scale 1) train=(--rounds 1) configs=(tiny)
else
    marked+=(tests/unit/test_hardware.py tests/unit/test_phases.py tests/unit/test_sensors.py)
    memory=() growth=(--only batch,sequence,depth --factor 64 --scale 16) train=(--rounds 3) configs=(125M 350M 760M 1.2B)
fi
piece tests "$scratch/tests" "$PYTHON" -m pytest -m gpu "${marked[@]}"
if [[ -e "$scratch/tests" ]]; then tee -a "$log" <"$scratch/tests" | tail -n 30; fi
for config in "${configs[@]}"; do # one at a time: what the clock ends keeps what was measured before
    piece "train-$config" "$OUT/train-$config.json" \
        "$PYTHON" benchmarks/bench_train.py --json --configs "$config" "${train[@]}"
done
piece memory "$OUT/memory.json" "$PYTHON" benchmarks/bench_memory.py --json "${memory[@]}"
piece growth "$OUT/growth.json" "$PYTHON" benchmarks/bench_growth.py --json "${growth[@]}"
if $rehearses; then say "this was a rehearsal: no GPU was there"; fi
say "results in $OUT, after $SECONDS s"
exit $failed
