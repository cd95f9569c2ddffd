from __future__ import annotations

import dataclasses
import errno
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

from pretrain.config import CheckpointConfig, Config, DataConfig, StorageConfig
from pretrain.config_checks import validate
from pretrain.errors import ConfigError, StorageError
from pretrain.files import PART_SUFFIX
from pretrain.fsspec_store import FsspecStore, _Checksum, _info_of
from pretrain.model_config import ModelConfig
from pretrain.retry import Retry
from pretrain.shards import fetch_shards
from pretrain.storage import LocalStore, ObjectMissing, ObjectStore, crc32c_of_bytes, open_store
from tests.runs import VOCAB_SIZE, make_shards

CONFIG = StorageConfig(deadline_s=60.0, timeout_s=30.0, max_backoff_s=0.01)
OBJECTS = {"b/2.npz": b"two", "b/10.npz": b"ten!", "a file ü.npz": bytes(range(256)) * 9000, "b/c/deep": b""}


class FlakyFileSystem(MemoryFileSystem):
    """The memory's files behind a network: each request first takes the next of `faults`, if any is left."""

    protocol = "flaky"
    faults: list[Any] = []  # noqa: RUF012 - shared, as a server is
    requests = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("flaky://")))

    def _request(self) -> None:
        type(self).requests += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if callable(fault):
            fault()

    def info(self, path: str, **kwargs: Any) -> Any:
        self._request()
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._request()
        return super().ls(path, detail, **kwargs)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


class StatusError(Exception):
    """An error of a client that is none of ours, as they all have one."""

    def __init__(self, status: int, text: str = "") -> None:
        self.status = status
        super().__init__(text or f"status {status}")


class ServerDisconnected(Exception):
    pass


ServerDisconnected.__module__, ServerDisconnected.__qualname__ = "httpx", "TransportError"


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FsspecStore:
    """OBJECTS in a store of each kind."""
    root = f"memory://{secrets.token_hex(4)}" if request.param == "memory" else f"file://{tmp_path}/store"
    for name, data in OBJECTS.items():
        fs, path = fsspec.url_to_fs(f"{root}/{name}")
        fs.makedirs(fs._parent(path), exist_ok=True)
        fs.pipe_file(path, data)
    return FsspecStore(root, CONFIG)


@pytest.fixture
def flaky() -> FsspecStore:
    """One object, `x`, behind a network that has done nothing yet."""
    FlakyFileSystem.faults, FlakyFileSystem.requests = [], 0
    root = secrets.token_hex(4)
    MemoryFileSystem().pipe_file(f"/{root}/x", b"x" * 1000)
    return FsspecStore(f"flaky://{root}", CONFIG, Retry(CONFIG, sleep=lambda seconds: None))


def test_list_is_recursive_sorted_relative_and_agrees_with_stat(store: FsspecStore) -> None:
    infos = store.list()
    assert [info.name for info in infos] == sorted(OBJECTS)
    assert [info.name for info in store.list("b/1")] == ["b/10.npz"]
    for info in infos:
        assert info.size == len(OBJECTS[info.name]) and info.generation > 0
        assert store.stat(info.name) == info
        assert abs(info.created_s - time.time()) < 60


def test_what_is_there_is_read_and_downloaded_with_its_checksum(store: FsspecStore, tmp_path: Path) -> None:
    for name, data in OBJECTS.items():
        assert store.read_bytes(name) == data
        arrived: list[int] = []
        info = store.download(name, tmp_path / "new" / name, arrived.append)
        assert (tmp_path / "new" / name).read_bytes() == data
        assert (info.size, info.crc32c, sum(arrived)) == (len(data), crc32c_of_bytes(data), len(data))
    assert not [path for path in (tmp_path / "new").rglob("*") if path.name.endswith(PART_SUFFIX)]
    with pytest.raises(StorageError, match=r"10.npz has 4 bytes; at most 3"):
        store.read_bytes("b/10.npz", max_bytes=3)


def test_what_is_missing_is_told_and_leaves_nothing(store: FsspecStore, tmp_path: Path) -> None:
    assert store.stat("nothing") is None and store.stat("b") is None
    with pytest.raises(ObjectMissing, match="nothing"):
        store.read_bytes("nothing")
    with pytest.raises(ObjectMissing, match="nothing"):
        store.download("nothing", tmp_path / "new" / "nothing")
    assert not (tmp_path / "new").exists()
    assert FsspecStore(f"{store.url}/empty", CONFIG).list() == []


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a//b", "a\\..\\b"])
def test_names_that_lead_elsewhere_are_refused(store: FsspecStore, name: str, tmp_path: Path) -> None:
    for action in (store.stat, store.read_bytes, lambda name: store.download(name, tmp_path / "x")):
        with pytest.raises(StorageError, match="can't be a file"):
            action(name)


def test_nothing_is_ever_written(store: FsspecStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for write in (
        lambda: store.create("new", b"x"),
        lambda: store.upload(tmp_path / "file", "new"),
        lambda: store.replace("b/2.npz", b"x", 0),
        lambda: store.delete("b/2.npz"),
    ):
        with pytest.raises(ConfigError, match=r"creation that fails where the name is taken.*gs://bucket/prefix"):
            write()
    assert [info.name for info in store.list()] == sorted(OBJECTS)


def test_a_replaced_object_has_another_generation(flaky: FsspecStore) -> None:
    before = flaky.stat("x")
    MemoryFileSystem().pipe_file(f"{flaky._root}/x", b"y" * 1000)
    after = flaky.stat("x")
    assert before and after and before.size == after.size and before.generation != after.generation


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionResetError("reset"),
        TimeoutError(),
        StatusError(503),
        StatusError(429),
        OSError(errno.EBUSY, "SlowDown"),
        ServerDisconnected("gone"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_what_may_pass_is_tried_again(flaky: FsspecStore, fault: Exception, tmp_path: Path) -> None:
    FlakyFileSystem.faults[:] = [fault, fault]
    assert flaky.download("x", tmp_path / "x").crc32c == crc32c_of_bytes(b"x" * 1000)
    FlakyFileSystem.faults[:] = [fault]
    assert [info.name for info in flaky.list()] == ["x"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (PermissionError("Access Denied"), "not allowed"),
        (StatusError(403), "not allowed"),
        (StatusError(400, "https://host/x?X-Amz-Signature=hush is bad"), r"https://host/x\?… is bad"),
        (OSError(errno.EINVAL, "odd"), "odd"),
    ],
    ids=["permission", "403", "400", "os"],
)
def test_what_stays_is_told_at_once_and_without_signatures(flaky: FsspecStore, fault: Exception, message: str) -> None:
    FlakyFileSystem.faults[:] = [fault]
    with pytest.raises(StorageError, match=message) as caught:
        flaky.read_bytes("x")
    assert "hush" not in str(caught.value) and FlakyFileSystem.requests == 1


def test_a_program_at_fault_is_not_called_a_storage_error(flaky: FsspecStore) -> None:
    FlakyFileSystem.faults[:] = [TypeError("a bug")]
    with pytest.raises(TypeError, match="a bug"):
        flaky.read_bytes("x")


def test_patience_ends(flaky: FsspecStore) -> None:
    now = iter(range(10_000))
    hasty = FsspecStore(flaky.url, CONFIG, Retry(CONFIG, clock=lambda: float(next(now)), sleep=lambda seconds: None))
    FlakyFileSystem.faults[:] = [StatusError(503, "over capacity")] * 1000
    with pytest.raises(StorageError, match=r"gave up after \d+ tries .*over capacity.*storage.deadline_s"):
        hasty.read_bytes("x")


def test_an_object_that_changes_while_it_is_read_is_read_again(flaky: FsspecStore, tmp_path: Path) -> None:
    def replace() -> None:
        MemoryFileSystem().pipe_file(f"{flaky._root}/x", b"y" * 500)

    arrived: list[int] = []
    FlakyFileSystem.faults[:] = [None, None, replace]  # at the look after the content came
    info = flaky.download("x", tmp_path / "x", arrived.append)
    assert (tmp_path / "x").read_bytes() == b"y" * 500 and info.crc32c == crc32c_of_bytes(b"y" * 500)
    assert sum(arrived) == 500


def test_a_listing_that_fails_half_way_is_no_shorter_listing(flaky: FsspecStore) -> None:
    MemoryFileSystem().pipe_file(f"{flaky._root}/folder/y", b"y")
    FlakyFileSystem.faults[:] = [None, OSError(errno.EINVAL, "half way")]
    with pytest.raises(StorageError, match="half way"):
        flaky.list()


def test_the_url_of_a_file_is_no_folder(store: FsspecStore) -> None:
    with pytest.raises(StorageError, match=r"2.npz is a file"):
        FsspecStore(f"{store.url}/b/2.npz", CONFIG).list()


def test_a_full_disk_is_told_as_one(store: FsspecStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, block: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pretrain.files.CheckedWriter.write", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        store.download("b/2.npz", tmp_path / "new" / "x")
    assert not list((tmp_path / "new").iterdir())


def test_checksums_that_are_the_contents_are_compared() -> None:
    wrong_md5 = {"content_settings": {"content_md5": bytearray(16)}}
    right_sha256 = {"lfs": {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}}
    for details, fits in ((wrong_md5, False), (right_sha256, True), ({"ETag": '"0123-4"'}, True)):
        checksum = _Checksum(details)
        checksum.update(b"x")
        assert checksum.fits() is fits


def test_a_version_is_the_surest_that_the_backend_names() -> None:
    both = {"name": "x", "size": 1, "ETag": '"a"', "LastModified": 5.0}
    assert _info_of("x", both).generation == _info_of("x", {**both, "LastModified": 6.0}).generation
    assert _info_of("x", both).generation != _info_of("x", {**both, "ETag": '"b"'}).generation
    assert _info_of("x", {"name": "x", "size": 1, "crc32c": "AAAAAA=="}).crc32c == "AAAAAA=="
    assert _info_of("x", {"name": "x", "size": 1, "crc32c": 77}).crc32c == ""
    with pytest.raises(StorageError, match="no size"):
        _info_of("x", {"name": "x", "size": None})


def test_threads_share_a_store(store: FsspecStore, tmp_path: Path) -> None:
    def work(name: str) -> None:
        store.download(name, tmp_path / "copies" / name)

    threads = [threading.Thread(target=work, args=(name,)) for name in OBJECTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: (tmp_path / "copies" / name).read_bytes() for name in OBJECTS} == OBJECTS


def test_other_urls_are_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {"class": "not_installed_fs.FileSystem", "err": "Install it"}
    monkeypatch.setitem(known_implementations, "nowhere", nowhere)
    for url, message in (
        ("nowhere://bucket/x", r"not installed. pip install not_installed_fs"),
        ("quux://bucket/x", r"quux:// is not supported.*gs://bucket/prefix"),
        ("gcs://bucket/x", "Write it gs://bucket/prefix"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_store(url, CONFIG)
    with pytest.raises(ConfigError, match="password") as caught:
        open_store("ftp://me:hush@host/x", CONFIG)
    assert "hush" not in str(caught.value)


def test_checkpoints_are_committed_only_where_that_is_safe() -> None:
    def problems(url: str) -> list[str]:
        config = Config(model=ModelConfig(size="125M").resolve(), data=DataConfig(source="s3://bucket/shards"))
        return validate(dataclasses.replace(config, checkpoint=CheckpointConfig(url=url)), world_size=1)

    for url in ("", "folder", "/folder", "gs://bucket/x", "file:///folder"):
        assert problems(url) == []
    for url in ("s3://bucket/x", "memory://x"):
        (problem,) = problems(url)
        assert problem.startswith(f"checkpoint.url {url}: a commit needs a creation that fails where the name is taken")


def test_a_store_says_what_it_is_read_through(store: ObjectStore) -> None:
    assert store.describe() == f"{store.url} through fsspec {fsspec.__version__}, to read only"


def test_shards_are_the_same_through_fsspec_and_from_a_folder(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", n_shards=3)
    url = f"memory://{secrets.token_hex(4)}"
    fs, root = fsspec.url_to_fs(url)
    for path in folder.iterdir():
        fs.pipe_file(f"{root}/part/{path.name}", path.read_bytes())
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    through = fetch_shards(open_store(url, CONFIG), data, vocab_size=VOCAB_SIZE)
    plain = fetch_shards(LocalStore(folder), data, vocab_size=VOCAB_SIZE)
    assert [shard.name for shard in through.shards] == [f"part/{shard.name}" for shard in plain.shards]
    assert [shard.source_crc32c for shard in through.shards] == [shard.source_crc32c for shard in plain.shards]
