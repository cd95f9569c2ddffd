#!/usr/bin/env bash
# The main job, small and whole: set-up, shards in a bucket, download, DeepSpeed training, checkpoints in the bucket.
#
#   bash test_train.sh                    a demo: an emulated bucket on this machine, a corpus made on the spot
#   bash test_train.sh --resume auto      go on from its newest checkpoint instead of starting over
#   DATA=gs://bucket/prefix CHECKPOINTS=gs://bucket/prefix bash test_train.sh
#                                         25 of your shards, your bucket, your credentials
#
#   GPUS=1               processes (GPUs, or ranks on a CPU)
#   RUN=name             name of the run (default: test, or test-DATE with DATA)
#   VAL_DATA=gs://…      validation shards, with DATA
#   VOCAB_SIZE=50257     of the tokenizer that made your shards, with DATA
#   DEMO_DIR=demo        where the demo's bucket and corpus are kept
#
# Further arguments pass on to train.py and win, for example --max-steps 20. Its exit code is this script's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
GPUS="${GPUS:-1}" DEMO_DIR="${DEMO_DIR:-demo}"
PYTHON_BIN=.venv/bin/python

say() { printf 'test_train: %s\n' "$*"; }
# die CODE WHAT MEND
die() {
    printf 'test_train error: %s. %s\n' "$2" "$3" >&2
    exit "$1"
}

[[ -z "${CHECKPOINTS:-}" || -n "${DATA:-}" ]] || die 2 "CHECKPOINTS is given without DATA" \
    "Give DATA=gs://bucket/prefix too, or neither for the demo"
resumes=false previous=""
for argument in "$@"; do
    case "$argument" in
    --resume | --resume=* | --checkpoint.resume | --checkpoint.resume=*) resumes=true ;;
    --run=* | --run.name=*) RUN="${argument#*=}" ;;
    esac
    if [[ "$previous" == --run || "$previous" == --run.name ]]; then RUN="$argument"; fi
    previous="$argument"
done

# The demo's bucket: Google's storage API on a free loopback port, its objects in DEMO_DIR/bucket.
start_bucket() {
    local endpoint="$DEMO_DIR/endpoint" waits
    mkdir -p "$DEMO_DIR" || die 4 "the folder $DEMO_DIR can't be made" "Choose another: DEMO_DIR=/path/to/folder"
    rm -f "$endpoint"
    "$PYTHON_BIN" scripts/embedded_bucket.py --root "$DEMO_DIR/bucket" --bucket demo --port 0 \
        --endpoint-file "$endpoint" --parent-pid $$ >"$DEMO_DIR/bucket.log" 2>&1 &
    bucket_pid=$!
    trap stop_bucket EXIT
    for ((waits = 0; waits < 600; waits++)); do
        if [[ -s "$endpoint" ]]; then break; fi
        kill -0 "$bucket_pid" 2>/dev/null || break
        sleep 0.1
    done
    [[ -s "$endpoint" ]] || die 4 "no embedded bucket: $(tail -n 1 "$DEMO_DIR/bucket.log")" "See $DEMO_DIR/bucket.log"
    STORAGE_EMULATOR_HOST=$(cat "$endpoint")
    export STORAGE_EMULATOR_HOST
    export NO_PROXY="127.0.0.1${NO_PROXY:+,$NO_PROXY}" no_proxy="127.0.0.1${no_proxy:+,$no_proxy}"
    say "embedded bucket gs://demo at $STORAGE_EMULATOR_HOST, objects in $DEMO_DIR/bucket"
}

stop_bucket() {
    local code=0
    if kill "$bucket_pid" 2>/dev/null; then
        wait "$bucket_pid" 2>/dev/null || true
    else
        wait "$bucket_pid" 2>/dev/null || code=$?
        say "the embedded bucket had ended before, with exit code $code: see $DEMO_DIR/bucket.log" >&2
    fi
}

# A demo that does not resume starts over, in the bucket too.
forget_demo() {
    local bucket="$DEMO_DIR/bucket"
    if [[ -e "$bucket" || -e "checkpoints/$RUN" || -e "logs/$RUN" ]]; then
        say "removing the earlier demo: $bucket, checkpoints/$RUN, logs/$RUN (--resume auto would continue it)"
        rm -rf "$bucket" "checkpoints/$RUN" "logs/$RUN"
    fi
}

# Run a command in a process group of its own and pass signals on to it, once each; a terminal's Ctrl+C would reach
# every process here by itself, the bucket included, which must outlive the last upload.
run_and_forward() {
    local child code
    "$@" &
    child=$!
    trap 'signalled=true; kill -INT "$child"' INT
    trap 'signalled=true; kill -TERM "$child"' TERM HUP
    while :; do
        signalled=false
        code=0
        wait "$child" || code=$?
        if ! $signalled; then return "$code"; fi
    done
}

bash setup_env.sh
set -m # a process group for each job

if [[ -z "${DATA:-}" ]]; then
    RUN="${RUN:-test}"
    [[ "$RUN" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] || die 2 "RUN=$RUN is no folder name" "Take letters, digits, - and _"
    if ! $resumes; then forget_demo; fi
    start_bucket
    "$PYTHON_BIN" scripts/make_demo_data.py --output_dir "$DEMO_DIR" --upload gs://demo/data
    where=(--data gs://demo/data/shards --data.val_source gs://demo/data/val --checkpoints gs://demo/Checkpoints)
else
    if [[ -z "${RUN:-}" ]] && $resumes; then
        RUN=$(find logs -mindepth 1 -maxdepth 1 -type d -name 'test-*' -printf '%f\n' 2>/dev/null | sort | tail -n 1)
        [[ -n "$RUN" ]] || die 5 "there is no run to resume: no folder logs/test-*" "Name one: RUN=name"
    fi
    RUN="${RUN:-test-$(date +%Y%m%d-%H%M%S)}"
    where=(--data "$DATA" --max-files 25 --model.vocab_size "${VOCAB_SIZE:-50257}")
    if [[ -n "${VAL_DATA:-}" ]]; then where+=(--data.val_source "$VAL_DATA"); fi
    if [[ -n "${CHECKPOINTS:-}" ]]; then
        where+=(--checkpoints "$CHECKPOINTS")
    else
        say "no CHECKPOINTS: they stay in checkpoints/$RUN"
    fi
fi

scale=()
if "$PYTHON_BIN" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "a GPU is here: the 125M model, fp16"
    scale=(--model.size 125M --model.n_layer 0 --model.n_head 0 --model.d_model 0 --model.seq_len 1024 --precision fp16)
fi
run_and_forward "$PYTHON_BIN" -m pretrain.launch "--nproc_per_node=$GPUS" \
    train.py --config test --run "$RUN" "${where[@]}" "${scale[@]}" "$@"
