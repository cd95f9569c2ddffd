#!/usr/bin/env bash
# Set up .venv with the exact packages of requirements.lock and verify that they work. Needs no root and no compiler;
# a second run sees that everything is in place and takes no time. Each package must have the sha256 that the lock
# gives it; torch comes by version, because its build differs from machine to machine.
#
#   bash setup_env.sh            what training needs
#   bash setup_env.sh --dev      and what tests/run.sh needs
#
#   PYTHON=python3.12            the interpreter (default: python3, or the newest python3.x that is at least 3.10)
#   TORCH_INDEX_URL=https://…    where torch comes from, to have another build of it (CPU, another CUDA)
#   FLASH_ATTN=1                 also build the flash-attn package (needs the CUDA toolkit, takes long)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONNOUSERSITE=1

FLASH_ATTN_PIN="flash-attn==2.8.3"
VENV=.venv

say() { printf 'setup: %s\n' "$*"; }
# die CODE WHAT MEND
die() {
    printf 'setup error: %s. %s\n' "$2" "$3" >&2
    exit "$1"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# The first interpreter that runs and is at least 3.10.
find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_new_enough "$PYTHON" || die 2 "PYTHON=$PYTHON does not run or is older than 3.10" "Name another one"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die 2 "there is no Python >= 3.10 on the PATH" "Install one, or name it: PYTHON=/path/to/python3 bash setup_env.sh"
}

# Whether .venv has the interpreter that PYTHON names, where it names one.
is_wanted_python() {
    [[ -z "${PYTHON:-}" || "$("$PYTHON" --version 2>&1)" == "$("$VENV/bin/python" --version 2>&1)" ]]
}

make_venv() {
    local python
    if is_new_enough "$VENV/bin/python" && is_wanted_python && "$VENV/bin/python" -m pip >/dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV" ||
        die 1 "$python can't make a virtual environment" \
            "Install its venv module (Debian, Ubuntu: apt install python3-venv), or name another: PYTHON=/path/to/it"
}

# pip_install WHAT ARGUMENTS…
pip_install() {
    local errors="$VENV/.pip_errors"
    say "installing $1"
    if { "$VENV/bin/python" -m pip install --quiet "${@:2}" 2>&1 >&3 | tee "$errors" >&2; } 3>&1; then return; fi
    if grep -q "DO NOT MATCH THE HASHES" "$errors"; then
        die 1 "a download for $1 is not the file that was tested, its sha256 differs (see above); none was installed" \
            "Get it from another index (pip config list shows yours), or restore the pins: git checkout requirements*"
    fi
    die 1 "pip could not install $1 (its own words are above)" \
        "Check the network and the free disk space and run this again; what is installed already stays"
}

# pip_install_locked WHAT ENTRIES ARGUMENTS…: by hash, and nothing that the lock doesn't name
pip_install_locked() { pip_install "$1" --require-hashes --no-deps "${@:3}" -r "$2"; }

# The entries of the lock in two files: DeepSpeed looks at the installed torch when it is built, so it comes last.
split_lock() {
    awk -v here="$VENV" '/^[a-z]/ { out = here (/^deepspeed==/ ? "/.deepspeed.lock" : "/.packages.lock") }
        out { print >out }' requirements.lock
}

pin() { grep -m1 "^$1==" requirements.txt; }

# The index torch came from last time counts until another one is named.
torch_index() { echo "${TORCH_INDEX_URL:-$(cat "$VENV/.torch_index_url" 2>/dev/null)}"; }

is_wanted_torch() { [[ "$(torch_index)" == "$(cat "$VENV/.torch_index_url" 2>/dev/null)" ]]; }

install_torch() {
    local index
    index=$(torch_index)
    # pip takes any build of the pinned version for the one asked for, so another build's goes first
    is_wanted_torch || "$VENV/bin/python" -m pip uninstall --quiet --yes torch
    pip_install "$(pin torch) (a CUDA build is a download of some GB)" ${index:+--index-url "$index"} "$(pin torch)"
    echo "$index" >"$VENV/.torch_index_url"
}

install_base() {
    make_venv
    split_lock
    # before torch, which then finds what it shares with us in place and brings no copy that nobody checked
    pip_install_locked "the packages of requirements.lock" "$VENV/.packages.lock" --only-binary :all:
    install_torch
    # without prebuilt ops it needs no compiler here
    DS_BUILD_OPS=0 pip_install_locked "$(pin deepspeed)" "$VENV/.deepspeed.lock" --no-build-isolation
    pip_install "this project, editable" --no-deps --no-build-isolation --editable .
    verify
}

install_dev() {
    pip_install "requirements-dev.txt" -r requirements-dev.txt
    pip_install_locked "requirements-fake-gcs.txt" requirements-fake-gcs.txt
}

install_flash() {
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        die 2 "FLASH_ATTN=1 needs a CUDA build of torch, this one is for the CPU" "Name one with TORCH_INDEX_URL"
    # each of its compiler processes takes several GB of memory
    MAX_JOBS="${MAX_JOBS:-4}" pip_install "$FLASH_ATTN_PIN (many minutes)" --no-build-isolation "$FLASH_ATTN_PIN"
}

verify() {
    say "verifying"
    "$VENV/bin/python" - <<'PYTHON' || die 1 "the packages are installed but don't work together (see above)" \
        "Remove the folder .venv and run this again"
import contextlib
import importlib.metadata
import io
import platform

import torch
import google.cloud.storage
import tokenizers

with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
    import deepspeed

print(f"  python {platform.python_version()}")
for package in ("torch", "deepspeed", "google-cloud-storage", "tokenizers"):
    print(f"  {package} {importlib.metadata.version(package)}")
count = torch.cuda.device_count()
print(f"  device: {count} × {torch.cuda.get_device_name(0)}" if count else "  device: CPU (no CUDA device)")
PYTHON
}

# What an installation depends on: the pins, the interpreter, and the place (a venv can't be moved).
fingerprint() {
    {
        cat requirements*.txt requirements.lock pyproject.toml setup_env.sh
        pwd
        "$VENV/bin/python" --version
    } 2>&1 | sha256sum
}

# in_place STAGE: whether this stage was finished for exactly these pins
in_place() { [[ -x "$VENV/bin/python" && "$(cat "$VENV/.done_$1" 2>/dev/null)" == "$(fingerprint)" ]]; }

# stage NAME: run install_NAME unless it is in place; the stamp is written only after it succeeded
stage() {
    in_place "$1" && return
    rm -f "$VENV/.done_$1"
    "install_$1"
    fingerprint >"$VENV/.done_$1"
}

dev=false
for argument in "$@"; do
    case "$argument" in
    --dev) dev=true ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' setup_env.sh && exit 0 ;;
    *) die 2 "unknown option $argument" "There is --dev; see the head of setup_env.sh" ;;
    esac
done
cuda="${CUDA_HOME:-/usr/local/cuda}"
if [[ "${FLASH_ATTN:-0}" == 1 && ! -x "$cuda/bin/nvcc" ]] && ! command -v nvcc >/dev/null; then
    die 2 "FLASH_ATTN=1 needs nvcc, which is neither on the PATH nor in $cuda/bin" \
        "Install the CUDA toolkit, or leave FLASH_ATTN out: torch's own fused kernels are used then"
fi
if [[ -n "${PYTHON:-}" ]]; then find_python >/dev/null; fi
is_wanted_torch && is_wanted_python || rm -f "$VENV"/.done_*

stage base
if $dev; then stage dev; fi
if [[ "${FLASH_ATTN:-0}" == 1 ]]; then stage flash; fi
say "ready: $("$VENV/bin/python" --version) in $VENV"
