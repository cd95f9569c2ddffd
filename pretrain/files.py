"""Files that are complete, checked and on disk, or not there at all."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import google_crc32c

from pretrain.errors import StorageError

BLOCK_BYTES = 1 << 20  # a checksum, a write and a progress report per MiB cost nothing beside the transfer
PART_SUFFIX = ".part"
# Some network and FUSE file systems know no locks; NFS knows them, but not those of folders.
_NO_LOCKS = frozenset((errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF))
_UNUSABLE = frozenset(
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG)
)


def crc32c_of_file(path: Path) -> str:
    """The file's crc32c, as GCS writes it. Raises OSError."""
    with path.open("rb") as file:
        return crc32c_of_open(file)


def crc32c_of_open(file: IO[bytes]) -> str:
    """The crc32c of what is still to be read of a file, as GCS writes it. Raises OSError."""
    checksum = google_crc32c.Checksum()
    while block := file.read(BLOCK_BYTES):
        checksum.update(block)
    return base64.b64encode(checksum.digest()).decode()


def crc32c_of_bytes(data: bytes) -> str:
    """The crc32c of `data`, as GCS writes it."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def digest(key: object) -> str:
    """A hash of a JSON-like value."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def free_disk_bytes(folder: Path) -> int:
    """Bytes that this user can still write in `folder`, or in its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class CheckedWriter(io.RawIOBase):
    """Writes through to `file`, and knows the size and the crc32c of what went through."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], None] | None = None) -> None:
        self.file = file
        self.size = 0
        self.checksum = google_crc32c.Checksum()
        self.on_bytes = on_bytes or (lambda n_bytes: None)

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        n_bytes = len(block)
        self.file.write(block)
        self.checksum.update(bytes(block))
        self.size += n_bytes
        self.on_bytes(n_bytes)
        return n_bytes

    @property
    def crc32c(self) -> str:
        return base64.b64encode(self.checksum.digest()).decode()


@contextlib.contextmanager
def new_file(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """A file open for writing under a temporary name beside `path`; it takes its name when the block ends well.

    The content is on disk before it has the name, and the name is on disk before the caller goes on. Where the block
    raises, nothing is left.

    Raises:
        FileExistsError: `path` is there and `replace` is false.
        StorageError: the folder is full, can't be written or can't be made.
    """
    # Its own name for each writer: two processes that fetch the same file never write into one another's.
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}{PART_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # unlike a rename, it fails where the name is taken
        sync(path.parent)
    except OSError as error:
        if isinstance(error, FileExistsError) and not replace and path.exists():
            raise
        if problem := disk_problem(error, path.parent):
            raise problem from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def make_writable(folder: Path, option: str) -> None:
    """Make `folder` where it is missing and try to write there, before hours of work depend on it.

    Args:
        option: of train.py, which chooses another folder.

    Raises:
        StorageError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise StorageError(
            f"{folder} can't be written: {error.strerror or error}", f"Choose another folder with {option}."
        ) from error


def sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk: they survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, kind: int) -> bool:
    """Lock an open file or folder, as flock; False where its file system knows no such locks.

    Raises:
        BlockingIOError: somebody else has it, and `kind` does not wait.
    """
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextlib.contextmanager
def disk_explained(folder: Path) -> Iterator[None]:
    """Where the block meets an error of this machine's disk, a StorageError in a user's words; see disk_problem."""
    try:
        yield
    except OSError as error:
        if problem := disk_problem(error, folder):
            raise problem from error
        raise


def disk_problem(error: OSError, folder: Path) -> StorageError | None:
    """An error of this machine's disk in a user's words; None for others (a network error is OSError too)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{folder}: the disk is full ({free_disk_bytes(folder) >> 20} MiB free)"
        return StorageError(what, "Free space there, or use another disk.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"{error.filename or folder}: {error.strerror}: this user can't read or write there",
            f"Choose another folder, or mend it: ls -ld {folder}",
        )
    if error.errno in _UNUSABLE:
        return StorageError(f"{error.filename or folder}: {error.strerror}", f"Look at it: ls -ld {folder}")
    return None
