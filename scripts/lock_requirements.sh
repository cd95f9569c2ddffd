#!/usr/bin/env bash
# Write requirements.lock: every package that requirements.txt leads to, each with the sha256 of all its files, for
# every Python from 3.10 on. Run it after a change to requirements.txt; pins that can stay do.
#
#   bash scripts/lock_requirements.sh               what changed in requirements.txt
#   bash scripts/lock_requirements.sh --upgrade     and newer versions of what it leads to (arguments pass on to uv)
#
# torch and what only its CUDA builds bring (nvidia-*, cuda-*, triton) are left out: setup_env.sh installs torch by
# version, because its build differs from machine to machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_PIN="uv==0.13.8"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "$UV_PIN"

if [[ -f requirements.lock ]]; then cp requirements.lock "$work/requirements.lock"; fi
"$work/venv/bin/uv" pip compile --quiet --no-header --universal --python-version 3.10 --generate-hashes \
    --default-index https://pypi.org/simple --output-file "$work/requirements.lock" "$@" requirements.txt
{
    echo "# Every package that requirements.txt leads to, but torch and its CUDA packages, with the sha256 of its files."
    echo "# Made by: bash scripts/lock_requirements.sh. Installed by setup_env.sh. Not to be edited by hand."
    awk '/^[a-z]/ { drop = /^(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==/ && !/^nvidia-ml-py==/ } !/^#/ && !drop' \
        "$work/requirements.lock"
} >"$work/filtered.lock"
mv "$work/filtered.lock" requirements.lock
echo "requirements.lock: $(grep -c '^[a-z]' requirements.lock) pins, $(grep -c -- '--hash=' requirements.lock) hashes"
