from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import StorageConfig
from pretrain.storage import ObjectStore, open_store
from tests.emulators import REPOSITORY, Emulator, embedded_bucket

CONFIG = StorageConfig(deadline_s=60.0, timeout_s=30.0, max_backoff_s=0.01)


def start(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The script with options that make it end by itself."""
    command = [sys.executable, "scripts/embedded_bucket.py", "--root", str(root), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


def store_at(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.endpoint)
    return open_store(f"gs://{emulator.bucket}", CONFIG)


def test_its_state_survives_a_kill_and_it_ends_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded_bucket(tmp_path) as emulator:
        created = store_at(emulator, monkeypatch).create("a/b", b"data")
        emulator.process.kill()
        emulator.process.wait()
    with embedded_bucket(tmp_path) as emulator:
        store = store_at(emulator, monkeypatch)
        assert store.list() == [created]
        assert store.read_bytes("a/b") == b"data"
        emulator.process.send_signal(signal.SIGTERM)
        assert emulator.process.wait(120) == 0


def test_what_was_deleted_leaves_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded_bucket(tmp_path) as emulator:
        store = store_at(emulator, monkeypatch)
        store.create("a", b"x" * 12345)
        sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        assert 12345 in sizes
        store.delete("a")
    assert 12345 not in [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]


def test_a_port_in_use_is_one_line_and_exit_code_4(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = start(tmp_path, "--port", str(port), "--endpoint-file", str(tmp_path / "endpoint"))
    assert ended.returncode == 4
    assert ended.stderr.startswith(f"storage error: port {port} on 127.0.0.1 can't be used (Address already in use)")
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "endpoint").exists()


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".cloudstorage").mkdir()
    (tmp_path / ".cloudstorage" / ".meta").write_text("{")
    ended = start(tmp_path, "--endpoint-file", str(tmp_path / "endpoint"))
    assert (ended.returncode, len(ended.stderr.splitlines())) == (4, 1)
    assert "is damaged" in ended.stderr


def test_it_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ended = start(tmp_path, "--endpoint-file", str(tmp_path / "endpoint"), "--parent-pid", str(gone.pid))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert (tmp_path / "endpoint").read_text().startswith("http://127.0.0.1:")
