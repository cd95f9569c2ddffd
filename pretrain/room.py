"""Room for shards on this machine's disk: a bound on all of a cache, and locks that end with whoever holds them.

The locks are the kernel's, on files of the cache: a process that is killed leaves nothing locked. A shard's tokens are
locked, shared, by everyone who has them mapped, and whoever makes room passes over them. A shard that is being fetched
has a NAME.KEY.lock, whose length is the room that was set aside for it. Where a file system knows no locks nothing gets
lost: a shard may then be fetched twice, or put out while it is mapped, which a mapping survives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pretrain import files, log
from pretrain.files import disk_problem

TOKENS, RECORD, BUILDING = ".bin", ".json", ".lock"
SOURCE_FOLDER = re.compile(r"[0-9a-f]{16}")
ROOM_LOCK = ".room.lock"
LEFTOVER_AGE_S = 86400.0

logger = log.get(__name__)


class FileLock:
    """A file that this process alone holds, until `release`; the file goes with it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> FileLock | None:
        """The lock, or None where somebody else has it. Raises StorageError where the file can't be made."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                if problem := disk_problem(error, path.parent):
                    raise problem from error
                raise
            if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.close(descriptor)
                return None
            if is_at(descriptor, path):
                return cls(path, descriptor)
            os.close(descriptor)  # its holder removed it in between

    def set_aside(self, n_bytes: int) -> None:
        """Say how much room the holder is about to fill; nothing is written."""
        os.ftruncate(self._descriptor, n_bytes)

    def release(self) -> None:
        """Let others in."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_set_aside(building: Path) -> bool:
    """Whether somebody fetches a shard, by the path of its lock, and has its room already."""
    try:
        return building.stat().st_size > 0
    except FileNotFoundError:
        return False


def lock(descriptor: int, kind: int) -> bool:
    """Lock an open file, as flock; False where somebody else has it and `kind` does not wait. Where there are no locks
    it counts as locked."""
    try:
        files.lock(descriptor, kind)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class Room:
    """The bound on all shards below a folder, whichever sources and runs they are of.

    Args:
        folder: data.cache_dir; each source has a folder in it.
        limit_bytes: of tokens and of downloads under way; 0: no bound.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._has_warned = False

    def set_aside(self, building: FileLock, n_bytes: int, *, must: bool, leaving: int = 0) -> bool:
        """Make room for a shard by putting out the least recently used ones that nobody has mapped.

        Args:
            must: take the room beyond the bound where there is none.
            leaving: bytes that must stay free beside it.

        Returns:
            whether the shard may be fetched.
        """
        if not self.limit_bytes:
            return True
        with self._alone():
            lacking = self.used_bytes() + n_bytes + leaving - self.limit_bytes
            if lacking > 0:
                lacking -= self._put_out(lacking)
            if lacking > 0 and not must:
                return False
            if lacking > 0 and not self._has_warned:
                self._has_warned = True
                words = "more shards are in use at once than data.cache_gb %.3g holds: %.3g GB above it"
                logger.warning(words, self.limit_bytes / 1e9, lacking / 1e9)
            building.set_aside(n_bytes)
        return True

    def used_bytes(self) -> int:
        """Bytes of all tokens that are here, and of what is set aside; what a killed process left is cleared away."""
        used = sum(size for _, size, _ in self._tokens())
        for path in self._files(BUILDING):
            if left := FileLock.take(path):
                remove_unfinished(path)
                left.release()
            else:
                with contextlib.suppress(FileNotFoundError):
                    used += path.stat().st_size
        return used

    def _put_out(self, n_bytes: int) -> int:
        """Remove tokens until so many bytes are free; the bytes that are. The records of the shards stay."""
        freed = 0
        for path, size, _ in sorted(self._tokens(), key=lambda item: item[2]):
            if freed >= n_bytes:
                break
            if self._remove(path):
                freed += size
        return freed

    def _remove(self, path: Path) -> bool:
        """Remove a shard's tokens; False where they are in use, fetched just now or vouched for by no record."""
        if not path.with_suffix(RECORD).exists() or (building := FileLock.take(path.with_suffix(BUILDING))) is None:
            return False
        with building:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return False
            try:
                if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    return False
                path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
        return True

    def _tokens(self) -> Iterator[tuple[Path, int, int]]:
        """(path, bytes, time of the last use in ns) of the tokens of every shard."""
        for path in self._files(TOKENS):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield path, status.st_size, status.st_mtime_ns

    def _files(self, suffix: str) -> Iterator[Path]:
        for folder in self.folder.iterdir():
            if SOURCE_FOLDER.fullmatch(folder.name) and folder.is_dir():
                yield from folder.glob(f"*{suffix}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process, and one thread of it, at a time."""
        descriptor = os.open(self.folder / ROOM_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of processes that were killed more than a day ago."""
    for path in folder.glob(f".*{files.PART_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                path.unlink()


def unfinished(building: Path) -> str:
    """What the names of the temporary files of a shard begin with, by the path of its lock."""
    return f".{building.name.removesuffix(BUILDING)}"


def remove_unfinished(building: Path) -> None:
    """Remove what a killed process had begun to fetch; for who holds the shard's lock."""
    start = unfinished(building)
    for path in building.parent.glob(".*.part"):
        if path.name.startswith(start) or path.name.startswith(f".{start}"):
            path.unlink(missing_ok=True)
