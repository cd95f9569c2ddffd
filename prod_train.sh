#!/usr/bin/env bash
# The real job: one process a GPU on one or several nodes, supervised. After a crash, a hang, a kill or a bucket that
# was away it starts again by itself, from the newest verified checkpoint; so does a start after a stop.
#
#   CHECKPOINTS=gs://bucket/Checkpoints bash prod_train.sh
#   bash prod_train.sh --dry-run      print the launch command and the resolved config, start nothing
#   bash prod_train.sh --skip-doctor  start without a look at the machine, the bucket and the shards first
#
#   GPUS=8                    processes on this node (without a GPU: ranks on the CPU, a rehearsal)
#   NNODES=1  NODE_RANK=0     nodes in all, and which one this is; run this script on each of them. NNODES=1:4 is
#                             elastic: it goes on with as many as are there
#   MASTER_ADDR  MASTER_PORT  node 0's address, and a port free there (29500)
#   HOSTFILE                  DeepSpeed's hostfile instead of these: lines of NAME slots=GPUS, the same on every node
#   MEET_S                    seconds that nodes wait for each other (600; 20 where node 0's address leads nowhere)
#   DATA=data/training        shards: the folder of setup_prod.sh, or gs://bucket/prefix
#   VAL_DATA                  validation shards
#   CHECKPOINTS               where checkpoints are committed; unset: they stay on this machine
#   PRECISION                 fp16, bf16, fp8 or fp32 (what the config says)
#   CONFIG=production         configs/NAME.yaml or a path
#   RUN                       name of the run (the config's name)
#   MAX_RESTARTS=3            restarts in a row without a new checkpoint before it gives up; 0: none
#   GRACE_S=0                 seconds from SIGTERM to SIGKILL; 0: as long as the save takes. Spot VMs give 15 to 30
#
# scripts/doctor.py looks at everything first: what fails there ends this script with its exit code. A warning does not,
# nor does storage alone (4): a bucket may come back, and the restarts wait for it.
# Further arguments pass on to train.py and win. Its exit code is this script's: 75 means "start me again". SIGTERM and
# Ctrl+C save at the next step and end with 75; a second one ends at once. See python -m pretrain.supervise --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
say() { printf 'prod_train: %s\n' "$*" >&2; }
# die WHAT MEND
die() {
    printf 'prod_train error: %s. %s\n' "$1" "$2" >&2
    exit 2
}

if [[ -n "${HOSTFILE:-}" ]]; then
    for name in GPUS NNODES MASTER_ADDR; do
        [[ -z "${!name:-}" ]] || die "HOSTFILE and $name are both set" "Unset $name: the hostfile tells it"
    done
    bash setup_env.sh >&2
    told=$(.venv/bin/python -m pretrain.hostfile "$HOSTFILE")
    read -r GPUS NNODES NODE_RANK MASTER_ADDR <<<"$told"
fi
gpus_given="${GPUS:-}"
GPUS="${GPUS:-8}" NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}" MASTER_PORT="${MASTER_PORT:-29500}"
CONFIG="${CONFIG:-production}" MAX_RESTARTS="${MAX_RESTARTS:-3}" GRACE_S="${GRACE_S:-0}"

dry_run=false doctor=true resumes=false arguments=()
for argument in "$@"; do
    case "$argument" in
    --dry-run) dry_run=true && continue ;;
    --skip-doctor) doctor=false && continue ;;
    --resume | --resume=* | --checkpoint.resume | --checkpoint.resume=*) resumes=true ;;
    esac
    arguments+=("$argument")
done

whole='^[0-9]+$'
[[ "$GPUS" =~ $whole && "$GPUS" -ge 1 ]] || die "GPUS=$GPUS is not a number of processes" "Give GPUS=8, say"
MIN_NODES="${NNODES%%:*}" MAX_NODES="${NNODES##*:}"
[[ "$NNODES" =~ ^[0-9]+(:[0-9]+)?$ && "$MIN_NODES" -ge 1 && "$MAX_NODES" -ge "$MIN_NODES" ]] ||
    die "NNODES=$NNODES is not a number of nodes" "Give NNODES=1, say, or NNODES=1:4"
[[ "$NODE_RANK" =~ $whole && "$NODE_RANK" -lt "$MAX_NODES" ]] ||
    die "NODE_RANK=$NODE_RANK is not one of $MAX_NODES nodes" "Number the nodes from 0 to $((MAX_NODES - 1))"
[[ "${MEET_S:-1}" =~ $whole ]] || die "MEET_S=$MEET_S is not a number of seconds" "Give MEET_S=600, say"
[[ "$MAX_NODES" -eq 1 || -n "${MASTER_ADDR:-}" ]] || die "NNODES=$NNODES needs MASTER_ADDR" \
    "Give node 0's address on every node: MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NODE_RANK=0, 1, …"
[[ "$MAX_RESTARTS" =~ $whole ]] || die "MAX_RESTARTS=$MAX_RESTARTS is not a number of restarts" \
    "Give MAX_RESTARTS=3, say"
[[ "$GRACE_S" =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "GRACE_S=$GRACE_S is not a number of seconds" "Give GRACE_S=20, say"
if [[ -z "${DATA:-}" ]]; then
    if grep -qs '^ *sources:' "$CONFIG" "configs/$CONFIG.yaml"; then
        DATA="" # a mixture, which the config names
    else
        [[ -d data/training ]] || die "DATA is not set and there is no folder data/training" \
            "Run DATA=gs://bucket/prefix bash setup_prod.sh first, or give DATA=gs://bucket/prefix here"
        DATA=data/training
    fi
fi

bash setup_env.sh >&2

count_gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true; }
if ! $dry_run; then
    found=$(count_gpus)
    if [[ "$found" -gt 0 && "$GPUS" -gt "$found" ]]; then
        die "GPUS=$GPUS, but this machine has $found" "Give GPUS=$found"
    elif [[ "$found" -eq 0 && -z "$gpus_given" ]]; then
        die "there is no NVIDIA GPU on this machine" "Check nvidia-smi; to rehearse on the CPU: GPUS=2 PRECISION=bf16"
    fi
fi

supervise=(.venv/bin/python -m pretrain.supervise "--max-restarts=$MAX_RESTARTS" "--grace-s=$GRACE_S" --)
launch=(.venv/bin/python -m pretrain.launch "--nproc_per_node=$GPUS")
if [[ "$MAX_NODES" -gt 1 ]]; then
    launch+=("--nnodes=$NNODES" "--node_rank=$NODE_RANK" "--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT")
    if [[ -n "${MEET_S:-}" ]]; then launch+=("--rdzv_conf=join_timeout=$MEET_S"); fi
fi
train=(train.py --config "$CONFIG")
if [[ -n "$DATA" ]]; then train+=(--data "$DATA"); fi
if [[ -n "${VAL_DATA:-}" ]]; then train+=(--data.val_source "$VAL_DATA"); fi
if [[ -n "${PRECISION:-}" ]]; then train+=(--precision "$PRECISION"); fi
if [[ -n "${RUN:-}" ]]; then train+=(--run "$RUN"); fi
if [[ -n "${CHECKPOINTS:-}" ]]; then
    train+=(--checkpoints "$CHECKPOINTS")
else
    say "no CHECKPOINTS: they stay on this machine"
fi
if ! $resumes; then train+=(--resume auto); fi # starts afresh only where nothing was ever committed
train+=("${arguments[@]}")

if $dry_run; then
    echo "# launch command"
    printf '%q ' "${supervise[@]}" "${launch[@]}" "${train[@]}"
    printf '\n\n# resolved config on %d ranks\n' $((GPUS * MAX_NODES))
    WORLD_SIZE=$((GPUS * MAX_NODES)) exec .venv/bin/python "${train[@]}" --print_config
fi
if $doctor; then # once, and not at every restart; each node looks at itself. Its exit code is train.py's
    say "is this machine ready? (--skip-doctor leaves this out)"
    code=0
    .venv/bin/python scripts/doctor.py "--ranks=$GPUS" "--nodes=$MAX_NODES" "${train[@]:1}" >&2 || code=$?
    if [[ "$code" -eq 4 ]]; then # the lowest code of what failed: nothing but storage did, and that may come back
        say "storage failed, and nothing else: starting all the same, for it may come back"
    elif [[ "$code" -ne 0 ]]; then
        say "not started; see above what to mend, or give --skip-doctor"
        exit "$code"
    fi
fi
exec "${supervise[@]}" "${launch[@]}" "${train[@]}"
