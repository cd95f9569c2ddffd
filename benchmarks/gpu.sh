#!/usr/bin/env bash
# Everything here that needs a GPU, in one command inside ten minutes and offline: the tests marked gpu, then the tables.
#
#   bash benchmarks/gpu.sh --wheels      beforehand, with a network: what such a machine lacks, into WHEELS
#   bash benchmarks/gpu.sh               on a machine with a CUDA device
#   bash benchmarks/gpu.sh --rehearse    each piece on the CPU, small; what it then says of speed means nothing
#   bash benchmarks/gpu.sh tests train   some of its pieces: tests, train, engines, memory, growth
#
#   PYTHON=python3           an interpreter with torch (2.11 or newer), numpy, pytest, pytest-timeout, PyYAML, rich,
#                            psutil and safetensors; the first of .venv/bin/python and python3 unless told
#   WHEELS=wheels            folder of wheels that it lacks; they are put on the path of this run alone
#   WHEELS_FOR=3.12          the Python that --wheels fetches them for
#   OUT=benchmarks/results   where gpu.log goes, and a copy of the results; they are in benchmarks/results/nvidia-…
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

# What train.py and DeepSpeed import that a bare machine with torch lacks; tests/integration/test_benchmarks.py holds it.
NEEDED=(jsonargparse docstring-parser typeshed-client typing-extensions packaging tenacity tokenizers
    google-cloud-storage google-cloud-core google-api-core google-auth google-resumable-media google-crc32c
    googleapis-common-protos proto-plus protobuf requests certifi charset-normalizer idna urllib3 pyasn1 pyasn1-modules
    cryptography cffi pycparser deepspeed einops hjson msgpack ninja py-cpuinfo tqdm pydantic pydantic-core
    annotated-types typing-inspection tensorboard tensorboard-data-server absl-py grpcio markdown werkzeug markupsafe)

# fetch_wheels: the versions of requirements.lock, and torchao's; DeepSpeed has no wheel, so it is built
fetch_wheels() {
    local for_python="${WHEELS_FOR:-3.12}" name pins=() platform platforms=()
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${platform}_x86_64")
    done
    for name in "${NEEDED[@]}"; do
        if [[ "$name" != deepspeed ]]; then pins+=("$(sed -n "s/^\($name==[^ ;]*\).*/\1/p" requirements.lock | tail -n 1)"); fi
    done
    pins+=("$(sed -n '/^torchao==/p' requirements-fp8.txt)")
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$for_python" --implementation cp \
        "${platforms[@]}" --dest "$WHEELS" "${pins[@]}"
    "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$WHEELS" \
        "$(sed -n 's/^\(deepspeed==[^ ;]*\).*/\1/p' requirements.lock)"
    say "$(find "$WHEELS" -name '*.whl' | wc -l) wheels in $WHEELS, $(du -sm "$WHEELS" | cut -f1) MB, for Python $for_python"
}

rehearses=false fetches=false pieces=" "
for argument in "$@"; do
    case "$argument" in
    --rehearse) rehearses=true ;;
    --wheels) fetches=true ;;
    tests | train | engines | memory | growth) pieces+="$argument " ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' benchmarks/gpu.sh && exit 0 ;;
    *) die "unknown option $argument" "There is --rehearse; see the head of benchmarks/gpu.sh" ;;
    esac
done
if [[ "$pieces" == " " ]]; then pieces=" tests train engines memory growth "; fi

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
OUT="${OUT:-benchmarks/results}" LIMIT_S="${LIMIT_S:-570}" WHEELS="${WHEELS:-wheels}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if $fetches; then
    fetch_wheels
    exit
fi
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
        cat "$result" >>"$log"
        say "$name: ran in $((SECONDS - began)) s, and missed a goal; see $log"
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
    save=()
    memory=(--only 125M_fp32) growth=(--only batch --rounds 1 --scale 1) train=(--rounds 1) configs=(tiny)
    engines=(--configs tiny --rounds 1 --engines ddp)
else
    save=(--save)
    marked+=(tests/unit/test_hardware.py tests/unit/test_phases.py tests/unit/test_sensors.py)
    memory=() growth=(--only batch,sequence,depth --factor 64 --scale 16) train=(--rounds 3) configs=(125M 350M 760M 1.2B)
    engines=(--configs 125M,1.2B --rounds 2 --engines)
fi
piece tests "$scratch/tests" "$PYTHON" -m pytest -m gpu "${marked[@]}"
if [[ -e "$scratch/tests" ]]; then tee -a "$log" <"$scratch/tests" | tail -n 30; fi
for config in "${configs[@]}"; do # one at a time: what the clock ends keeps what was measured before
    piece "train-$config" "$scratch/train-$config.json" \
        "$PYTHON" benchmarks/bench_train.py --json "${save[@]}" --configs "$config" "${train[@]}"
done
if ! $rehearses && "$PYTHON" -c 'import torchao' 2>/dev/null; then
    piece train-fp8 "$scratch/train-fp8.json" \
        "$PYTHON" benchmarks/bench_train.py --json "${save[@]}" --configs 1.2B --precision fp8 "${train[@]}"
fi
piece engines "$scratch/engines.json" "$PYTHON" benchmarks/bench_train.py --json "${save[@]}" "${engines[@]}"
piece memory "$scratch/memory.json" "$PYTHON" benchmarks/bench_memory.py --json "${save[@]}" "${memory[@]}"
piece growth "$scratch/growth.json" "$PYTHON" benchmarks/bench_growth.py --json "${save[@]}" "${growth[@]}"
if $rehearses; then
    say "this was a rehearsal: no GPU was there"
    cp "$scratch"/*.json "$OUT" 2>/dev/null || true
elif [[ ! "$OUT" -ef benchmarks/results ]]; then
    cp -r benchmarks/results/nvidia-* "$OUT"
fi
say "results in $OUT, after $SECONDS s"
exit $failed
