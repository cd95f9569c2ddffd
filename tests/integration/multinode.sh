#!/usr/bin/env bash
# Two hosts on this machine, in network namespaces of their own, that share nothing but a bucket: prod_train.sh on each,
# one rank a host. One host is killed and started again, one is gone for good (NNODES=1:2) and comes back later, a wire
# is cut and mended. Needs root and iproute2; elsewhere it says what is missing and ends with 0.
#
#   bash tests/integration/multinode.sh            arguments pass on to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash setup_env.sh --dev >&2
reason=$(.venv/bin/python -c 'from tests.namespaces import why_not; print(why_not())')
if [[ -n "$reason" ]]; then
    echo "multinode: skipped: $reason"
    exit 0
fi
exec .venv/bin/python -m pytest -v -m "slow or not slow" tests/integration/test_multinode.py "$@"
