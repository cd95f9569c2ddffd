"""Objects in a bucket or in a folder, behind one contract: nothing half-written, nothing clobbered, all of it checked.

    store = open_store("gs://bucket/prefix", config.storage)
    for info in store.list():
        store.download(info.name, cache / info.name)

Here are the contract, the folder (`LocalStore`) and what the stores share. The bucket is `gcs.py`, which is imported
only when a gs:// url is opened: importing the google client takes about a second. Other schemes are `fsspec_store.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, StorageError
from pretrain.files import (
    BLOCK_BYTES,
    PART_SUFFIX,
    CheckedWriter,
    crc32c_of_bytes,
    crc32c_of_file,
    disk_explained,
    free_disk_bytes,
    new_file,
)

__all__ = [
    "Listing",
    "LocalStore",
    "ObjectExists",
    "ObjectInfo",
    "ObjectMissing",
    "ObjectStore",
    "checked_name",
    "crc32c_of_bytes",
    "crc32c_of_file",
    "exists",
    "free_disk_bytes",
    "open_store",
    "too_big",
]


@dataclass(frozen=True)
class ObjectInfo:
    """One object as the store describes it."""

    name: str
    """Relative to the store's root, forward slashes."""
    size: int
    """Bytes."""
    crc32c: str = ""
    """Base64 of the big-endian checksum, as GCS writes it; empty where unknown."""
    generation: int = 0
    """Changes whenever the object is replaced; 0 where unknown."""
    created_s: float = field(default=0.0, compare=False)
    """When it was written, in seconds since 1970; 0 where unknown."""


Listing: TypeAlias = list[ObjectInfo]  # inside the stores, `list` is their method


class ObjectExists(StorageError):
    """Another object is already there under the name that was to be created."""


class ObjectMissing(StorageError):
    """There is no object under that name."""


class ObjectStore(Protocol):
    """What a bucket and a folder both do. Every method may raise StorageError; all may be called from several threads.

    Names are relative to `url`, use forward slashes and never lead outside: `..` and absolute names are refused.
    """

    url: str

    def describe(self) -> str:
        """One line for the log: the endpoint and the identity in use, never a secret."""
        ...

    def list(self, prefix: str = "") -> Listing:
        """Every object, in nested folders too, whose name begins with `prefix`, sorted by name."""
        ...

    def stat(self, name: str) -> ObjectInfo | None:
        """The object's description, or None where there is none."""
        ...

    def read_bytes(self, name: str, max_bytes: int = 16 << 20) -> bytes:
        """The content of a small object; its size is checked before it is read. Raises ObjectMissing."""
        ...

    def download(self, name: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        """The object as the file `path`, which appears complete, checked and on disk, or not at all.

        Args:
            on_bytes: called with the bytes that arrived since the last call; a try that failed takes its bytes back
                with a negative number.

        Raises:
            ObjectMissing: there is no such object.
        """
        ...

    def upload(self, path: Path, name: str, on_progress: Callable[[], None] | None = None) -> ObjectInfo:
        """The file `path` as a new object, its size and crc32c checked. The same content already there is success.

        Args:
            on_progress: called whenever some more of it has arrived.

        Raises:
            ObjectExists: another content is there; nothing was changed.
        """
        ...

    def create(self, name: str, data: bytes) -> ObjectInfo:
        """`data` as a new object, all at once: of several that race, one wins. The same content there is success.

        Raises:
            ObjectExists: another content is there; nothing was changed.
        """
        ...

    def replace(self, name: str, data: bytes, generation: int) -> ObjectInfo:
        """`data` in place of that generation of the object, all at once; 0: as a new object.

        Raises:
            ObjectExists: another generation is there; nothing was changed.
        """
        ...

    def delete(self, name: str, generation: int = 0) -> bool:
        """Whether the object was there to delete; with a generation, only that generation is deleted."""
        ...


def open_store(url: str, config: StorageConfig) -> ObjectStore:
    """The store at gs://bucket/prefix, at file:///folder or in a folder; of other schemes, one to read from.

    Raises:
        ConfigError: the url, the emulator's address or the place of the credentials can't be right, or the package of
            that scheme is not installed.
        StorageError: the credentials can't be used.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise ConfigError("the storage url is empty", "Give gs://bucket/prefix or a folder.")
        return LocalStore(Path(url))
    if scheme in ("file", "local"):
        return LocalStore(Path(unquote(urlsplit(url).path)))
    if scheme != "gs":
        from pretrain.fsspec_store import FsspecStore  # here, for the few who have such a bucket

        return FsspecStore(url, config)
    from pretrain.gcs import GcsStore  # here, because importing the google client takes about a second

    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{url} names no bucket", "Give gs://bucket/prefix.")
    return GcsStore(bucket, prefix.strip("/"), config)


def checked_name(name: str) -> str:
    """`name`, if it stays below the store's root: a name from a bucket becomes a path on this machine."""
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"object name {name!r} can't be a file below a folder", "Rename or move that object.")
    return name


class LocalStore:
    """A folder as an object store. A folder that is missing is an empty one, as a prefix is in a bucket.

    `generation` is the file's modification time in ns; `list` and `stat` leave crc32c empty rather than read the files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def describe(self) -> str:
        """See ObjectStore."""
        return f"folder {self.root}"

    def list(self, prefix: str = "") -> Listing:
        """See ObjectStore."""
        infos = []
        with disk_explained(self.root):
            for name in self._walk():
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    if name.startswith(prefix):
                        infos.append(self._info(name, self.root / name))
        return sorted(infos, key=lambda info: info.name)

    def stat(self, name: str) -> ObjectInfo | None:
        """See ObjectStore."""
        path = self._path(name)
        with disk_explained(path.parent):
            return self._info(name, path) if path.is_file() else None

    def read_bytes(self, name: str, max_bytes: int = 16 << 20) -> bytes:
        """See ObjectStore."""
        with self._reading(name) as (file, size):
            if size > max_bytes:
                raise too_big(f"{self.root / name}", size, max_bytes)
            return file.read(max_bytes)

    def download(self, name: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        """See ObjectStore."""
        with self._reading(name) as (source, size), new_file(path) as file:
            writer = CheckedWriter(file, on_bytes)
            shutil.copyfileobj(source, writer, BLOCK_BYTES)
            if writer.size != size:
                raise StorageError(
                    f"{self.root / name} changed while it was read", "Let its writer end, and try again."
                )
            generation = os.fstat(source.fileno()).st_mtime_ns
        return ObjectInfo(name, writer.size, writer.crc32c, generation)

    def upload(self, path: Path, name: str, on_progress: Callable[[], None] | None = None) -> ObjectInfo:
        """See ObjectStore."""
        with disk_explained(path.parent), path.open("rb") as source:
            return self._create(name, source, on_progress)

    def create(self, name: str, data: bytes) -> ObjectInfo:
        """See ObjectStore."""
        return self._create(name, io.BytesIO(data))

    def replace(self, name: str, data: bytes, generation: int) -> ObjectInfo:
        """See ObjectStore."""
        path = self._path(name)
        with disk_explained(path.parent):
            if not generation:
                return self.create(name, data)
            if not path.exists() or path.stat().st_mtime_ns != generation:
                raise exists(f"{path}")
            with new_file(path) as file:
                file.write(data)
            return ObjectInfo(name, len(data), crc32c_of_bytes(data), path.stat().st_mtime_ns)

    def delete(self, name: str, generation: int = 0) -> bool:
        """See ObjectStore."""
        path = self._path(name)
        with disk_explained(path.parent):
            try:
                if generation and path.stat().st_mtime_ns != generation:
                    return False
                path.unlink()
            except FileNotFoundError:
                return False
            return True

    def _create(self, name: str, source: IO[bytes], on_progress: Callable[[], None] | None = None) -> ObjectInfo:
        path = self._path(name)
        try:
            with new_file(path, replace=False) as file:
                writer = CheckedWriter(file, on_progress and (lambda _: on_progress()))
                shutil.copyfileobj(source, writer, BLOCK_BYTES)
        except FileExistsError as error:
            with disk_explained(path.parent):
                if path.stat().st_size != writer.size or crc32c_of_file(path) != writer.crc32c:
                    raise exists(f"{path}") from error
        return ObjectInfo(name, writer.size, writer.crc32c, path.stat().st_mtime_ns)

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    def _info(self, name: str, path: Path) -> ObjectInfo:
        status = path.stat()
        return ObjectInfo(name, status.st_size, "", status.st_mtime_ns, status.st_mtime)

    def _walk(self) -> Iterator[str]:
        """Names of all files; linked folders are followed, each real folder once."""
        seen = set()
        for folder, folders, files in os.walk(self.root, onerror=self._unless_missing, followlinks=True):
            try:
                status = os.stat(folder)
            except FileNotFoundError:  # deleted meanwhile
                continue
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for file in files:
                path = Path(folder, file)
                if not file.endswith(PART_SUFFIX) and path.is_file():
                    yield path.relative_to(self.root).as_posix()

    def _unless_missing(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """The open file and its size in bytes."""
        path = self._path(name)
        with disk_explained(path.parent):
            if not path.is_file():
                raise ObjectMissing(f"there is no file {path}", f"See what is there: ls {path.parent}")
            with path.open("rb") as file:
                yield file, os.fstat(file.fileno()).st_size


def too_big(where: str, size: int, max_bytes: int) -> StorageError:
    """The error for an object that is too big to be what was asked for."""
    return StorageError(f"{where} has {size} bytes; at most {max_bytes} were expected", "Is it the right file?")


def exists(where: str) -> ObjectExists:
    """The error for a name that is taken."""
    return ObjectExists(f"{where} is already there with another content", "Does another run write to the same place?")
