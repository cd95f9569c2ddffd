#!/usr/bin/env bash
# Stage every training shard on this machine: set-up, disk check, download, verification, manifest. A second run fetches
# only what is missing or damaged.
#
#   DATA=gs://bucket/prefix bash setup_prod.sh
#
#   DATA_DIR=data/training   where they go; nested folders are kept
#   MAX_FILES=100            only the first so many
#   WORKERS=16               parallel downloads
#
# Further arguments pass on to scripts/download_data.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
DATA_DIR="${DATA_DIR:-data/training}"

if [[ -z "${DATA:-}" ]]; then
    echo "setup_prod error: DATA is not set. Say where the shards are: DATA=gs://bucket/prefix bash setup_prod.sh" >&2
    exit 2
fi

bash setup_env.sh
arguments=(--data "$DATA" --output_dir "$DATA_DIR")
if [[ -n "${MAX_FILES:-}" ]]; then arguments+=(--max_files "$MAX_FILES"); fi
if [[ -n "${WORKERS:-}" ]]; then arguments+=(--workers "$WORKERS"); fi
.venv/bin/python scripts/download_data.py "${arguments[@]}" "$@"

if [[ " $* " == *" --dry_run "* ]]; then exit 0; fi
echo
echo "The shards are staged. Train with:"
printf '  DATA=%q CHECKPOINTS=gs://your-bucket/Checkpoints bash prod_train.sh\n' "$DATA_DIR"
