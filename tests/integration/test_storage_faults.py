"""The real google client against an emulator behind a proxy that breaks its requests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import gcs as gcs_module
from pretrain.config import StorageConfig
from pretrain.errors import StorageError
from pretrain.storage import ObjectExists, ObjectStore, open_store
from tests.fault_proxy import FaultProxy

CONFIG = StorageConfig(deadline_s=20.0, timeout_s=0.5, max_backoff_s=0.001)
SMALL = os.urandom(300_000)
BIG = os.urandom(9 << 20)  # above 8 MiB the client uploads in chunks, within a resumable session

DOWNLOAD, UPLOAD, CHUNK, LIST = "GET /download", "POST /upload", "PUT /upload", r"GET /storage/v1/b/\w+/o\?"
STAT = r"GET /storage/v1/b/\w+/o/"
ANSWERS = ["503", "429", "500", "408"]
BREAKS = ["reset", "stall", "truncate", "lost-reply"]


@pytest.fixture
def store(bucket_url: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setattr(gcs_module, "CHUNK_BYTES", 4 << 20)
    return open_store(bucket_url, CONFIG)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS, "corrupt"])
def test_a_download_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    store.create("x", SMALL)
    fault_proxy.clear()
    fault_proxy.inject(fault, DOWNLOAD, times=2)
    arrived: list[int] = []
    visible: list[bool] = []
    target = tmp_path / "x"
    info = store.download("x", target, lambda n: (arrived.append(n), visible.append(target.exists())))
    assert target.read_bytes() == SMALL
    assert info.size == sum(arrived) == len(SMALL)
    assert not any(visible)
    assert (fault_proxy.count(STAT), fault_proxy.count(DOWNLOAD), fault_proxy.count()) == (1, 3, 4)
    assert files_in(tmp_path) == ["x"]


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS, "corrupt"])
@pytest.mark.parametrize("size", ["small", "big"])
def test_an_upload_survives(fault: str, size: str, store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(SMALL if size == "small" else BIG)
    fault_proxy.inject(fault, UPLOAD if size == "small" else CHUNK, times=2, skip=0 if size == "small" else 1)
    info = store.upload(path, "file")
    assert (info.size, fault_proxy.pending()) == (path.stat().st_size, 0)
    assert store.read_bytes("file") == path.read_bytes()


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS, "corrupt"])
def test_a_create_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject(fault, UPLOAD, times=2)
    assert store.create("commit", SMALL).size == len(SMALL)
    assert (fault_proxy.count(UPLOAD), fault_proxy.pending()) == (
        2 if fault in ("lost-reply", "truncate") else 3,
        0,
    ) or (fault in ("lost-reply", "truncate") and fault_proxy.count(UPLOAD) == 3)
    assert store.read_bytes("commit") == SMALL


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS])  # a listing has no checksum: TLS guards it
def test_a_listing_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy) -> None:
    names = ["a", "b/c", "b/d"]
    for name in names:
        store.create(name, b"x")
    fault_proxy.inject(fault, LIST, times=2)
    assert [info.name for info in store.list()] == names
    assert fault_proxy.count(LIST) == 3


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS])
def test_a_delete_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy) -> None:
    store.create("x", b"x")
    fault_proxy.inject(fault, "DELETE", times=1)
    store.delete("x")
    assert store.stat("x") is None
    assert fault_proxy.count("DELETE") == 2
