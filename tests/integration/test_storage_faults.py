"""The real google client against an emulator behind a proxy that breaks its requests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from pretrain import gcs as gcs_module
from pretrain.config import StorageConfig
from pretrain.errors import StorageError
from pretrain.retry import Retry
from pretrain.storage import ObjectExists, ObjectStore, open_store
from tests.emulators import Emulator, embedded_bucket
from tests.fault_proxy import FaultProxy

CONFIG = StorageConfig(deadline_s=60.0, timeout_s=30.0, max_backoff_s=0.001)
SMALL = os.urandom(300_000)
BIG = os.urandom(9 << 20)  # above 8 MiB the client uploads in chunks, within a resumable session

DOWNLOAD, UPLOAD, CHUNK, LIST = "GET /download", "POST /upload", "PUT /upload", r"GET /storage/v1/b/\w+/o\?"
STAT = r"GET /storage/v1/b/\w+/o/"
ANSWERS = ["503", "429", "500", "408"]
BREAKS = ["reset", "stall", "truncate", "lost-reply"]


@pytest.fixture
def store(
    request: pytest.FixtureRequest, bucket_url: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    """A store behind the proxy; patient, except where the test is about a stall."""
    monkeypatch.setattr(gcs_module, "CHUNK_BYTES", 4 << 20)
    stalls = "stall" in request.node.name
    return open_store(bucket_url, replace(CONFIG, timeout_s=1.0) if stalls else CONFIG)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_asked(fault_proxy: FaultProxy, fault: str, expected: dict[str, int]) -> None:
    """So many requests came; where one second without an answer is a failed try, a slow machine may add some."""
    counts = {match: fault_proxy.count(match) for match in expected}
    assert counts == expected or (fault == "stall" and all(counts[match] >= expected[match] for match in counts))


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS, "corrupt"])
def test_a_download_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    store.create("x", SMALL)
    fault_proxy.clear()
    fault_proxy.inject(fault, DOWNLOAD, times=2)
    arrived: list[int] = []
    visible: list[bool] = []
    target = tmp_path / "x"

    def note(n_bytes: int) -> None:
        arrived.append(n_bytes)
        visible.append(target.exists())

    info = store.download("x", target, note)
    assert target.read_bytes() == SMALL
    assert info.size == sum(arrived) == len(SMALL)
    assert not any(visible)
    assert_asked(fault_proxy, fault, {STAT: 1, DOWNLOAD: 3, "": 4})
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
    assert fault_proxy.pending() == 0
    assert_asked(fault_proxy, fault, {UPLOAD: 3})
    assert store.read_bytes("commit") == SMALL


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS, "corrupt"])
def test_a_replacement_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy) -> None:
    first = store.replace("log", b"first", 0)
    fault_proxy.inject(fault, UPLOAD, times=2)
    second = store.replace("log", SMALL, first.generation)
    assert fault_proxy.pending() == 0 and store.read_bytes("log") == SMALL
    assert store.replace("log", b"third", second.generation).size == 5


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS])  # a listing has no checksum: TLS guards it
def test_a_listing_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy) -> None:
    names = ["a", "b/c", "b/d"]
    for name in names:
        store.create(name, b"x")
    fault_proxy.inject(fault, LIST, times=2)
    assert [info.name for info in store.list()] == names
    assert_asked(fault_proxy, fault, {LIST: 3})


@pytest.mark.parametrize("fault", [*ANSWERS, *BREAKS])
def test_a_delete_survives(fault: str, store: ObjectStore, fault_proxy: FaultProxy) -> None:
    store.create("x", b"x")
    fault_proxy.inject(fault, "DELETE", times=1)
    store.delete("x")
    assert store.stat("x") is None
    assert_asked(fault_proxy, fault, {"DELETE": 2})


@pytest.mark.parametrize("status", ["401", "403", "404", "400"])
@pytest.mark.parametrize("action", ["list", "stat", "download", "read", "upload", "create", "delete"])
def test_a_lasting_refusal_is_asked_once(
    action: str, status: str, store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(SMALL)
    fault_proxy.inject(status, times=-1)
    if (action, status) in (("stat", "404"), ("delete", "404")):
        assert not request(store, action, tmp_path)
    else:
        with pytest.raises(StorageError) as caught:
            request(store, action, tmp_path)
        assert caught.value.exit_code == 4
        assert re.search(MENDS[status].get(action, MENDS[status][""]), caught.value.line()), caught.value.line()
        assert "\n" not in caught.value.line()
    assert fault_proxy.count() == 1
    assert files_in(tmp_path) == ["file"]


MENDS: dict[str, dict[str, str]] = {
    "400": {"": "injected 400"},
    "401": {"": "gcloud auth application-default login"},
    "404": {
        "": r"there is no bucket fake at http://127.*gcloud storage ls",
        "download": r"there is no object gs://fake/\w+/file.*gcloud storage ls gs://fake/",
        "read": r"there is no object gs://fake/\w+/file.*gcloud storage ls gs://fake/",
    },
    "403": {
        "": r"lacks storage.objects.get .*policy-binding gs://fake --member=\S+ --role=roles/storage.objectViewer",
        "list": r"lacks storage.objects.list .*--role=roles/storage.objectViewer",
        "upload": r"lacks storage.objects.create .*--role=roles/storage.objectUser",
        "create": r"anonymous \(emulator\) lacks storage.objects.create .*--role=roles/storage.objectUser",
        "delete": r"lacks storage.objects.delete .*--role=roles/storage.objectUser",
    },
}


def request(store: ObjectStore, action: str, folder: Path) -> object:
    actions: dict[str, Callable[[], object]] = {
        "list": store.list,
        "stat": lambda: store.stat("file"),
        "download": lambda: store.download("file", folder / "copy"),
        "read": lambda: store.read_bytes("file"),
        "upload": lambda: store.upload(folder / "file", "file"),
        "create": lambda: store.create("file", SMALL),
        "delete": lambda: store.delete("file"),
    }
    return actions[action]()


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_it_gives_up_at_the_deadline_with_the_count_of_its_tries(
    fault: str, bucket_url: str, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    store = open_store(bucket_url, StorageConfig(deadline_s=0.5, timeout_s=30.0, max_backoff_s=0.02))
    fault_proxy.inject(fault, times=-1)
    (tmp_path / "file").write_bytes(SMALL)
    for action in ("list", "stat", "download", "read", "upload", "create", "delete"):
        asked = fault_proxy.count()
        with pytest.raises(StorageError, match=r"gave up after \d+ tries in \d+ s: .*storage.deadline_s") as caught:
            request(store, action, tmp_path)
        tries = fault_proxy.count() - asked
        assert f"after {tries} tries" in caught.value.line()
        assert tries >= 2
    assert files_in(tmp_path) == ["file"]


def test_another_content_behind_a_lost_reply_is_found_out(store: ObjectStore, fault_proxy: FaultProxy) -> None:
    store.create("commit", b"theirs")
    fault_proxy.inject("lost-reply", UPLOAD)
    with pytest.raises(ObjectExists):
        store.create("commit", b"mine!!")
    assert store.read_bytes("commit") == b"theirs"


def test_a_download_never_mixes_two_generations(store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    store.create("x", SMALL)
    fault_proxy.inject("truncate", DOWNLOAD)
    replaced: list[int] = []

    def replace_once(n_bytes: int) -> None:
        if not replaced:  # what the first try has brought stays, and the rest of it must not be another's
            replaced.append(n_bytes)
            store.delete("x")
            store.create("x", SMALL[::-1])

    with pytest.raises(StorageError, match="there is no object"):
        store.download("x", tmp_path / "x", replace_once)
    assert files_in(tmp_path) == []


def as_slow(store: ObjectStore) -> ObjectStore:
    """The same, whose pauses take two thirds of the deadline: a second failure in one budget gives up."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += CONFIG.deadline_s * 2 / 3

    store._retry = Retry(CONFIG, clock=lambda: clock[0], sleep=sleep)  # type: ignore[attr-defined]
    return store


@pytest.mark.parametrize(
    ("fault", "between", "sent_again"),
    [("503", 3, 1), ("lost-reply", 2, 0)],  # what has arrived is not sent again, though nobody said so
)
def test_a_large_upload_whose_every_second_chunk_fails_sends_no_others_again(
    fault: str,
    between: int,
    sent_again: int,
    store: ObjectStore,
    fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    chunk = 1 << 20
    monkeypatch.setattr(gcs_module, "CHUNK_BYTES", chunk)
    path = tmp_path / "file"
    path.write_bytes(BIG)
    for number in range(4):
        fault_proxy.inject(fault, CHUNK, skip=1 + between * number)  # the question what has arrived passes, too
    assert as_slow(store).upload(path, "file").size == len(BIG)
    assert fault_proxy.pending() == 0 and fault_proxy.count(UPLOAD) == 1
    sent = len(BIG) + 4 * chunk * sent_again
    assert sent <= fault_proxy.bytes_sent < sent + 10_000
    assert store.read_bytes("file") == BIG


def test_a_large_download_that_breaks_off_again_and_again_fetches_each_byte_once(
    store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(BIG)
    store.upload(path, "file")
    fault_proxy.clear()
    fault_proxy.inject("truncate", DOWNLOAD, times=3)  # each in the middle of what was still to come
    arrived: list[int] = []
    as_slow(store).download("file", tmp_path / "copy", arrived.append)
    assert (tmp_path / "copy").read_bytes() == BIG
    assert fault_proxy.pending() == 0 and fault_proxy.count(DOWNLOAD) == 4
    assert min(arrived) > 0 and sum(arrived) == len(BIG)
    assert len(BIG) <= fault_proxy.bytes_got < len(BIG) + 10_000


def test_a_gzipped_object_is_refused_with_the_mend(store: ObjectStore, tmp_path: Path) -> None:
    store.create("x", b"x")
    blob = store._bucket.blob(f"{store._root}gz")  # type: ignore[attr-defined]
    blob.content_encoding = "gzip"
    blob.upload_from_string(b"not really")
    with pytest.raises(StorageError, match=r"Content-Encoding: gzip.*Upload it again"):
        store.download("gz", tmp_path / "gz")


def test_nothing_is_asked_behind_our_back(store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    store.create("x", b"x")
    store.list()
    store.stat("x")
    store.download("x", tmp_path / "x")
    store.delete("x")
    store.stat("x")
    assert fault_proxy.count() == 7  # a download asks for the description first


def test_the_embedded_bucket_survives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs_module, "CHUNK_BYTES", 4 << 20)
    path = tmp_path / "file"
    path.write_bytes(BIG)
    with embedded_bucket(tmp_path / "root") as emulator, FaultProxy(emulator.endpoint, asks_backend=True) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        store = open_store("gs://demo/prefix", CONFIG)
        for fault in ("503", "reset", "truncate", "lost-reply", "corrupt"):
            for skip in (0, 1):  # where nothing has arrived yet, and where something has
                proxy.inject(fault, CHUNK, skip=skip)
                store.upload(path, f"{fault}-big{skip}")
                assert proxy.pending() == 0
            proxy.inject(fault, UPLOAD)
            store.create(f"{fault}-small", SMALL)
            proxy.inject(fault, DOWNLOAD)
            store.download(f"{fault}-big0", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == BIG
            assert store.read_bytes(f"{fault}-small") == SMALL
            assert proxy.pending() == 0
        assert len(store.list()) == 15


def test_the_proxy_passes_chunked_bodies_and_keeps_connections(gcs: Emulator, fault_proxy: FaultProxy) -> None:
    url = f"{fault_proxy.endpoint}/upload/storage/v1/b/{gcs.bucket}/o?uploadType=media&name=chunked"
    with requests.Session() as session:
        sent = session.post(url, data=iter([b"first ", b"second"]), timeout=120)
        assert sent.json()["size"] == "12"
        assert gcs.endpoint not in sent.text
        got = session.get(f"{fault_proxy.endpoint}/download/storage/v1/b/{gcs.bucket}/o/chunked?alt=media", timeout=120)
        assert got.content == b"first second"
