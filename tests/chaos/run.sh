#!/usr/bin/env bash
# Every fault the trainer must survive, with real processes: a table of 18 scenarios; exit 0 only if all of them passed.
#
#   bash tests/chaos/run.sh                 20 random kills, and the other repeated scenarios in proportion
#   bash tests/chaos/run.sh 100             100 of them: about an hour on two cores
#   bash tests/chaos/run.sh 20 --json       one JSON object on stdout instead of the table
#   bash tests/chaos/run.sh 20 --save       writes benchmarks/results/{device}/chaos.json, too
#   bash tests/chaos/run.sh 20 --only 1,7   these scenarios
#   bash tests/chaos/run.sh 20 --seed 5     other random moments; 0 where it is not given
#
# The scenario of the full disk mounts a small one; a user who may not does so in a namespace of his own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

CHAOS_N=20 CHAOS_SEED=0 only="" report=()
while (($#)); do
    case "$1" in
        --json | --save) report+=("$1") ;;
        --only) only="$2"; report+=(--only "$2"); shift ;;
        --seed) CHAOS_SEED="$2"; shift ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *[!0-9]* | "") echo "config error: $1 is neither a number nor an option; see --help" >&2; exit 2 ;;
        *) CHAOS_N="$1" ;;
    esac
    shift
done
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export CHAOS_N CHAOS_SEED CHAOS_RESULTS="$scratch/results.jsonl" CHAOS_ONLY="$only"
touch "$CHAOS_RESULTS"

namespace=()
if [ "$(id -u)" != 0 ] && unshare --user --map-root-user --mount true 2>/dev/null; then
    namespace=(unshare --user --map-root-user --mount)
fi
code=0
"${namespace[@]}" .venv/bin/python -m pytest tests/chaos -v -k "not few" -o timeout=3600 -p no:cacheprovider --basetemp="$scratch/runs" >&2 || code=$?
.venv/bin/python -m tests.chaos.report "$CHAOS_RESULTS" "${report[@]}" || exit
[ "$code" = 0 ]  # an error outside of the tests
