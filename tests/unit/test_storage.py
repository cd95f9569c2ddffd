from __future__ import annotations

import base64
import errno
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain import credentials, files
from pretrain.config import StorageConfig
from pretrain.credentials import PROJECT_ROOT
from pretrain.errors import ConfigError, StorageError
from pretrain.storage import (
    LocalStore,
    ObjectExists,
    ObjectInfo,
    ObjectMissing,
    ObjectStore,
    crc32c_of_bytes,
    crc32c_of_file,
    free_disk_bytes,
    open_store,
)
from tests.emulators import Emulator, embedded_bucket

CONFIG = StorageConfig(deadline_s=60.0, timeout_s=30.0, max_backoff_s=0.01)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with embedded_bucket(tmp_path_factory.mktemp("embedded")) as emulator:
        yield emulator


@pytest.fixture(params=["folder", "embedded", "fake-gcs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty store of each kind: one contract, three implementations."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"), CONFIG)
    emulator: Emulator = request.getfixturevalue("gcs" if request.param == "fake-gcs" else "embedded")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.endpoint)
    return open_store(f"gs://{emulator.bucket}/{secrets.token_hex(4)}", CONFIG)


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(files.PART_SUFFIX)]


def test_crc32c_is_written_as_gcs_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "digits"
    path.write_bytes(b"123456789")
    assert base64.b64decode(crc32c_of_file(path)) == bytes.fromhex("e3069283")  # the check value of CRC-32C
    assert crc32c_of_bytes(b"123456789") == crc32c_of_file(path)
    assert crc32c_of_bytes(b"") == "AAAAAA=="


def test_free_disk_bytes_of_a_folder_that_is_still_to_be_made(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "not" / "yet") > 0


def test_importing_storage_does_not_import_the_google_client() -> None:
    code = "import sys, pretrain.storage; sys.exit(any(name.startswith('google.cloud') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0


def test_an_empty_store(store: ObjectStore, tmp_path: Path) -> None:
    assert store.list() == []
    assert store.stat("nothing") is None
    assert store.delete("nothing") is False
    with pytest.raises(ObjectMissing, match="nothing"):
        store.read_bytes("nothing")
    with pytest.raises(ObjectMissing, match="nothing"):
        store.download("nothing", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n", b"--x\r\n", bytes(range(256)) * 5000], ids=len)
def test_what_goes_in_comes_out(store: ObjectStore, data: bytes, tmp_path: Path) -> None:
    created = store.create("folder/a file ü.bin", data)
    assert (created.name, created.size, created.crc32c) == ("folder/a file ü.bin", len(data), crc32c_of_bytes(data))
    assert created.generation > 0
    assert store.read_bytes("folder/a file ü.bin") == data
    info = store.download("folder/a file ü.bin", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == data
    assert (info.size, info.crc32c) == (len(data), crc32c_of_bytes(data))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


def test_list_is_recursive_sorted_and_relative(store: ObjectStore) -> None:
    for name in ("b/2.npz", "b/10.npz", "a.npz", "b/c/deep.npz"):
        store.create(name, name.encode())
    assert [info.name for info in store.list()] == ["a.npz", "b/10.npz", "b/2.npz", "b/c/deep.npz"]
    assert [info.name for info in store.list("b/")] == ["b/10.npz", "b/2.npz", "b/c/deep.npz"]
    assert [info.name for info in store.list("b/1")] == ["b/10.npz"]
    for info in store.list():
        assert info.size == len(info.name)
        assert info.crc32c in ("", crc32c_of_bytes(info.name.encode()))
        found = store.stat(info.name)
        assert found is not None
        assert (found.size, found.generation) == (info.size, info.generation)


def test_a_listing_tells_when_an_object_was_written(store: ObjectStore) -> None:
    before = time.time()
    store.create("a", b"x")
    [info] = store.list()
    assert before - 2 <= info.created_s <= time.time() + 2


def test_upload_gives_size_and_crc32c_and_may_be_repeated(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 << 20))
    wanted = ObjectInfo("x/file", 3 << 20, crc32c_of_file(path))
    for _ in range(2):
        info = store.upload(path, "x/file")
        assert (info.name, info.size, info.crc32c) == (wanted.name, wanted.size, wanted.crc32c)
    assert store.read_bytes("x/file") == path.read_bytes()


@pytest.mark.parametrize("store", ["folder", "fake-gcs"], indirect=True)
def test_nothing_is_ever_overwritten(store: ObjectStore, tmp_path: Path) -> None:
    first = store.create("commit", b"one")
    assert store.create("commit", b"one").generation == first.generation
    for other in (b"two", b"longer"):
        with pytest.raises(ObjectExists, match="commit"):
            store.create("commit", other)
        (tmp_path / "file").write_bytes(other)
        with pytest.raises(ObjectExists, match="commit"):
            store.upload(tmp_path / "file", "commit")
    assert store.read_bytes("commit") == b"one"
    assert [info.name for info in store.list()] == ["commit"]


def test_replace_takes_the_place_of_what_was_there(store: ObjectStore) -> None:
    first = store.replace("logs/x", b"one", 0)
    second = store.replace("logs/x", b"two, longer", first.generation)
    assert second.generation != first.generation
    assert (second.size, second.crc32c) == (11, crc32c_of_bytes(b"two, longer"))
    assert store.read_bytes("logs/x") == b"two, longer"
    found = store.stat("logs/x")
    assert found and found.generation == second.generation


@pytest.mark.parametrize("store", ["folder", "fake-gcs"], indirect=True)
def test_replace_leaves_another_generation_alone(store: ObjectStore) -> None:
    ours = store.replace("logs/x", b"one", 0)
    theirs = store.replace("logs/x", b"two", ours.generation)
    for generation in (ours.generation, 0):
        with pytest.raises(ObjectExists, match="logs/x"):
            store.replace("logs/x", b"three", generation)
    assert store.read_bytes("logs/x") == b"two"
    store.delete("logs/x")
    with pytest.raises(StorageError):
        store.replace("logs/x", b"four", theirs.generation)
    assert store.stat("logs/x") is None


@pytest.mark.parametrize("store", ["folder", "fake-gcs"], indirect=True)
def test_of_eight_racing_creates_one_wins(store: ObjectStore) -> None:
    outcomes: dict[int, str] = {}
    start = threading.Barrier(8)

    def race(number: int) -> None:
        start.wait()
        try:
            store.create("commit", f"attempt {number}".encode())
            outcomes[number] = "won"
        except ObjectExists:
            outcomes[number] = "lost"

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, outcome in outcomes.items() if outcome == "won"]
    assert len(outcomes) == 8
    assert len(winners) == 1
    assert store.read_bytes("commit") == f"attempt {winners[0]}".encode()


def test_threads_share_a_store(store: ObjectStore, tmp_path: Path) -> None:
    def work(number: int) -> None:
        data = bytes([number]) * 200_000
        store.create(f"shard-{number}", data)
        store.download(f"shard-{number}", tmp_path / f"copy-{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((tmp_path / f"copy-{n}").read_bytes() == bytes([n]) * 200_000 for n in range(12))


def test_read_bytes_checks_the_size_first(store: ObjectStore) -> None:
    store.create("big", b"x" * 100)
    assert store.read_bytes("big", max_bytes=100) == b"x" * 100
    with pytest.raises(StorageError, match=r"big has 100 bytes; at most 99"):
        store.read_bytes("big", max_bytes=99)


def test_delete(store: ObjectStore) -> None:
    store.create("a/b", b"x")
    assert store.delete("a/b") is True
    assert store.delete("a/b") is False
    assert store.list() == []


def test_delete_of_another_generation_leaves_the_object(local: LocalStore) -> None:
    generation = local.create("a", b"x").generation
    assert local.delete("a", generation + 1) is False
    assert local.delete("a", generation) is True


def test_download_reports_its_bytes(store: ObjectStore, tmp_path: Path) -> None:
    store.create("x", b"x" * 3_000_000)
    arrived: list[int] = []
    store.download("x", tmp_path / "x", arrived.append)
    assert sum(arrived) == 3_000_000
    assert len(arrived) > 1


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\..\\b", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(store: ObjectStore, name: str, tmp_path: Path) -> None:
    for action in (
        lambda: store.create(name, b"x"),
        lambda: store.stat(name),
        lambda: store.read_bytes(name),
        lambda: store.download(name, tmp_path / "x"),
        lambda: store.replace(name, b"x", 0),
        lambda: store.delete(name),
    ):
        with pytest.raises(StorageError):
            action()


def test_describe_names_endpoint_and_identity(store: ObjectStore) -> None:
    text = store.describe()
    assert store.url in text
    if store.url.startswith("gs://"):
        assert "http://127.0.0.1:" in text
        assert "anonymous" in text


def test_a_download_replaces_an_older_file_only_when_it_is_complete(local: LocalStore, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    local.create("x", b"new" * 1_000_000)
    seen: list[bytes] = []
    local.download("x", target, lambda _: seen.append(target.read_bytes()))
    assert set(seen) == {b"old"}
    assert target.read_bytes() == b"new" * 1_000_000


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"target: the disk is full \(\d+ MiB free\). Free space there"),
        (errno.EACCES, r"target: Permission denied: this user can't .* Choose another folder"),
        (errno.EROFS, r"target: Read-only file system: this user can't .* ls -ld"),
    ],
)
def test_a_disk_that_refuses_is_one_clear_error_and_leaves_nothing(
    code: int, message: str, local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.create("x", b"data")

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=message):
        local.download("x", tmp_path / "target" / "x")
    with pytest.raises(StorageError, match=message.replace("target", "store")):
        local.create("y", b"data")
    assert not (tmp_path / "target" / "x").exists()
    assert local.stat("y") is None
    assert not leftovers(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(local: LocalStore, tmp_path: Path) -> None:
    local.create("x", b"data")
    with pytest.raises(StorageError, match="ls -ld /proc"):
        local.download("x", Path("/proc/nowhere/x"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        local.download("x", tmp_path / "file" / "x")


def test_a_failed_block_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), files.new_file(tmp_path / "x") as file:
        file.write(b"half")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_store_follows_links_and_skips_partial_files(local: LocalStore, tmp_path: Path) -> None:
    local.create("own", b"x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked").write_bytes(b"y")
    (local.root / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(elsewhere)
    (local.root / f".own.1234{files.PART_SUFFIX}").write_bytes(b"half")
    assert [info.name for info in local.list()] == ["link/linked", "own"]


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    assert open_store(str(tmp_path), CONFIG).url == str(tmp_path)
    assert open_store(f"file://{tmp_path}", CONFIG).url == str(tmp_path)
    assert isinstance(open_store(f"local://{tmp_path}", CONFIG), LocalStore)
    assert open_store("memory://some/prefix/", CONFIG).url == "memory://some/prefix"
    assert open_store("gs://bucket", CONFIG).url == "gs://bucket"
    assert open_store("gs://bucket/some/prefix/", CONFIG).url == "gs://bucket/some/prefix"


@pytest.mark.parametrize("url", ["quux://bucket/x", "gs://", "gs:///x", ""])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="gs://bucket/prefix"):
        open_store(url, CONFIG)


@pytest.mark.parametrize("address", ["127.0.0.1:9023", "http://127.0.0.1:9023/", "localhost", "http://"])
def test_an_emulator_address_the_client_would_misread_is_refused(address: str, monkeypatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    with pytest.raises(ConfigError, match="STORAGE_EMULATOR_HOST=http://"):
        open_store("gs://bucket", CONFIG)


def test_a_key_inside_the_project_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(PROJECT_ROOT / "credentials" / "key.json"))
    with pytest.raises(ConfigError, match="inside the project's folder"):
        open_store("gs://bucket", CONFIG)


def test_a_broken_key_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    key.write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with pytest.raises(StorageError, match=r"key\.json, which can't be used"):
        open_store("gs://bucket", CONFIG)


def test_only_a_machine_of_another_maker_is_spared_the_metadata_server(monkeypatch, tmp_path: Path) -> None:
    model = tmp_path / "product_name"
    monkeypatch.setattr(credentials, "_MACHINE_MODEL", model)
    assert credentials._may_be_google_machine()  # unknown: the google client finds out
    model.write_text("Google Compute Engine\n")
    assert credentials._may_be_google_machine()
    model.write_text("Precision 5570\n")
    assert not credentials._may_be_google_machine()
    monkeypatch.setenv("GCE_METADATA_HOST", "metadata.example")
    assert credentials._may_be_google_machine()


def test_identities_are_named_as_gcloud_takes_them() -> None:
    robot = "trainer@project.iam.gserviceaccount.com"
    assert credentials._names(SimpleNamespace(service_account_email=robot)) == (robot, f"serviceAccount:{robot}")
    assert credentials._names(SimpleNamespace(account="me@example.org")) == ("me@example.org", "user:me@example.org")
    assert credentials._names(SimpleNamespace(service_account_email="default"))[0] == "this machine's service account"
    assert credentials._names(SimpleNamespace())[1] == "user:YOUR_EMAIL"


def test_without_credentials_reading_is_anonymous_and_writing_names_the_mend(monkeypatch, tmp_path: Path) -> None:
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    def none_found(**_: object) -> None:
        raise DefaultCredentialsError("none")

    monkeypatch.setattr(google.auth, "default", none_found)
    store = open_store("gs://bucket/public", CONFIG)
    assert store.describe() == "gs://bucket/public at https://storage.googleapis.com as anonymous"
    (tmp_path / "x").write_bytes(b"x")
    for write in (
        lambda: store.create("x", b"x"),
        lambda: store.upload(tmp_path / "x", "x"),
        lambda: store.replace("x", b"x", 0),
        lambda: store.delete("x"),
    ):
        with pytest.raises(StorageError, match="gcloud auth application-default login"):
            write()
