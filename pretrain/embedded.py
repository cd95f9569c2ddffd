"""The bucket of test_train.sh for as long as a block lasts: what a benchmark stores must go through a real client."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.credentials import EMULATOR_VARIABLE
from pretrain.errors import StorageError

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S, LOOK_AGAIN_S = 60.0, 0.02


@contextlib.contextmanager
def embedded_bucket(folder: Path, bucket: str) -> Iterator[None]:
    """scripts/embedded_bucket.py in a process of its own; the google client speaks to it while the block lasts, here
    and in processes that are started here.

    Args:
        folder: new; it holds the objects.

    Raises:
        StorageError: it does not start.
    """
    folder.mkdir()
    endpoint = folder / "endpoint"
    command = [sys.executable, str(ROOT / "scripts" / "embedded_bucket.py"), "--root", str(folder), "--bucket", bucket]
    command += ["--endpoint-file", str(endpoint), "--parent-pid", str(os.getpid())]
    kept = {name: os.environ.get(name) for name in (EMULATOR_VARIABLE, "NO_PROXY", "no_proxy")}
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (endpoint.exists() and endpoint.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise StorageError("the embedded bucket did not start", "See what it printed above")
            time.sleep(LOOK_AGAIN_S)
        os.environ |= {EMULATOR_VARIABLE: endpoint.read_text(), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        yield
    finally:
        process.terminate()
        process.wait()
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
