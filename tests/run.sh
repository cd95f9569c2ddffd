#!/usr/bin/env bash
# Every check of the project, from a fresh machine: set-up, ruff, mypy, pytest.
#
#   bash tests/run.sh                  the suite without the slow tests
#   bash tests/run.sh -m slow          extra arguments pass on to pytest; a -m of yours replaces the selection
#
# Tests marked gpu run only where there is a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash setup_env.sh --dev

echo "== ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .

echo "== mypy"
.venv/bin/mypy

echo "== pytest"
selection="not slow"
if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    selection="not slow and not gpu"
fi
exec .venv/bin/python -m pytest -m "$selection" "$@"
