#!/usr/bin/env bash
# Every check of the project, from a fresh machine: set-up, ruff, mypy, pytest. Less than 15 minutes on two cores.
#
#   bash tests/run.sh                  the suite without the slow tests, two files at a time
#   bash tests/run.sh -n 0             one file after the other (-n 4: four at a time)
#   bash tests/run.sh -m slow          extra arguments pass on to pytest; a -m of yours replaces the selection, and what
#                                      it selects has the machine for itself
#
# Tests marked gpu run only where there is a CUDA device, one after the other behind the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash setup_env.sh --dev

# DeepSpeed's first use compiles an operation, half a minute and more: before the tests, behind what follows here.
.venv/bin/python - >/dev/null 2>&1 <<'PYTHON' &
import torch
from pretrain.engine import zero

zero.prepare_import(torch.device("cpu"))
zero.cpu_op_problem()  # the tests say what it is, where there is one
PYTHON
compiling=$!

echo "== ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .

echo "== mypy"
.venv/bin/mypy
wait "$compiling" || true

echo "== pytest"
for argument in "$@"; do
    if [[ "$argument" == -m* ]]; then exec .venv/bin/python -m pytest "$@"; fi
done
# Files stay whole, so that what their tests share is made once; they are begun in their order, the longest first. One
# thread a process: what the tests compute is too small for more.
code=0
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder \
    "$@" || code=$?
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "== pytest, on the GPU"
    on_gpu=0
    .venv/bin/python -m pytest -m "gpu and not slow" "$@" || on_gpu=$?
    # 5: none of the files that were asked for has such a test
    if ((code == 0 && on_gpu != 5)); then code=$on_gpu; fi
fi
exit "$code"
