"""Fixtures that several test files share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # imported where they are used: tests/gpu runs where the emulators' packages are not
    from tests.emulators import Emulator
    from tests.fault_proxy import FaultProxy


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a real bucket in the name of whoever runs it."""
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """An emulator that honours generation preconditions, shared by all tests."""
    from tests.emulators import fake_gcs

    root: Path = tmp_path_factory.mktemp("fake-gcs")
    with fake_gcs(root) as emulator:
        yield emulator


@pytest.fixture
def bucket_url(gcs: Emulator, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix of the emulator's bucket; STORAGE_EMULATOR_HOST names the emulator."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
    return f"gs://{gcs.bucket}/{secrets.token_hex(4)}"


@pytest.fixture
def fault_proxy(gcs: Emulator, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of `bucket_url`'s emulator; STORAGE_EMULATOR_HOST names the proxy from here on."""
    from tests.fault_proxy import FaultProxy

    with FaultProxy(gcs.endpoint) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        yield proxy
