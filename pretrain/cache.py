"""The cache of shards on this machine: each is read once, checked, and kept as a file of raw tokens to map.

NAME.KEY.bin holds the tokens, NAME.KEY.json what is known of them, NAME.KEY.bad why there are none. The key holds
everything that the tokens depend on, so a verdict, good or bad, stays true for ever and is the same for every rank.
Where data.cache_gb bounds the cache, tokens may go to make room for others (`room`); what is known of them stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from pretrain import log
from pretrain.config import DataConfig
from pretrain.errors import ConfigError, ShardError, StorageError
from pretrain.failpoints import failpoint
from pretrain.files import (
    BLOCK_BYTES,
    PART_SUFFIX,
    CheckedWriter,
    crc32c_of_file,
    crc32c_of_open,
    digest,
    disk_explained,
    free_disk_bytes,
    make_writable,
    new_file,
)
from pretrain.manifest import MANIFEST_NAME, DataManifest, ShardEntry
from pretrain.npz import check_vocab, read_npz
from pretrain.room import BUILDING, RECORD, TOKENS, FileLock, Room, is_at, lock, remove_unfinished, unfinished
from pretrain.storage import LocalStore, ObjectInfo, ObjectStore

CACHE_FORMAT = 1  # part of every key: raise it when a shard's tokens would be read or written differently
ESTIMATED_INFLATION = 1.5  # raw tokens per compressed byte, where no manifest says how many there are
PATIENCE_S = 1800.0  # for another process that fetches the same shard; it takes seconds to minutes
POLL_S = 0.2

OnBytes = Callable[[int], None]

logger = log.get(__name__)


@dataclass(frozen=True)
class Shard:
    """One shard's tokens in the cache."""

    name: str
    """The object's name, relative to the source."""
    n_tokens: int
    path: Path
    """Raw little-endian tokens."""
    dtype: str
    """uint16 or uint32; empty where the shard was never here."""
    source_crc32c: str = ""
    """Checksum of the .npz file."""

    def tokens(self) -> np.ndarray:
        """The tokens (n_tokens,), mapped read-only."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        return np.asarray(np.memmap(self.path, dtype=dtype, mode="r", shape=(self.n_tokens,)))


@dataclass(frozen=True)
class _Record:
    """What the cache knows of one shard; its file is written after the tokens and vouches for them."""

    n_tokens: int
    n_documents: int
    dtype: str
    max_token_id: int
    crc32c: str
    source_crc32c: str

    @property
    def n_bytes(self) -> int:
        """Of the tokens."""
        return self.n_tokens * np.dtype(self.dtype).itemsize


class Hold:
    """A shard's tokens, mapped: while they are held, nobody on this machine puts them out."""

    def __init__(self, file: IO[bytes], record: _Record) -> None:
        dtype = np.dtype(record.dtype).newbyteorder("<")
        self.tokens: np.ndarray = np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(record.n_tokens,)))
        self._file = file

    def release(self) -> None:
        """Let them go; arrays that were handed out stay valid."""
        with suppress(PermissionError):  # another user's file, in a cache that several share
            os.utime(self._file.fileno())
        lock(self._file.fileno(), fcntl.LOCK_UN)  # the map has a descriptor of its own: closing ours is not enough
        self._file.close()


class ShardCache:
    """The files of one source in data.cache_dir."""

    def __init__(self, store: ObjectStore, data: DataConfig, vocab_size: int, manifest: DataManifest | None) -> None:
        self.store = store
        self.folder = Path(data.cache_dir).absolute() / digest(store.url)[:16]
        self.room = Room(self.folder.parent, int(data.cache_gb * 1e9))
        self.pad_token_id = data.pad_token_id
        self.on_bad_shard = data.on_bad_shard
        self.download_workers = data.download_workers
        self.vocab_size = vocab_size
        self.manifest = manifest
        self.entries: dict[str, ShardEntry] = {entry.name: entry for entry in manifest.shards} if manifest else {}
        self._compared: set[tuple[Path, int]] = set()  # tokens whose checksum this process has compared, with the inode

    def path(self, info: ObjectInfo, suffix: str) -> Path:
        key = digest([CACHE_FORMAT, info.name, info.size, info.crc32c, info.generation, self.pad_token_id])[:16]
        return self.folder / f"{PurePosixPath(info.name).stem[:150]}.{key}{suffix}"

    # ---- what is known ----

    def record(self, info: ObjectInfo) -> _Record | None:
        """What is known of a good shard, whether its tokens are here or not; None where it was never read."""
        try:
            return _Record(**json.loads(self.path(info, RECORD).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def bad_reason(self, info: ObjectInfo) -> str | None:
        try:
            return self.path(info, ".bad").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def is_known(self, info: ObjectInfo) -> bool:
        """Whether it was read before, and found good or bad."""
        return self.record(info) is not None or self.bad_reason(info) is not None

    def is_here(self, info: ObjectInfo) -> bool:
        """Whether its tokens are here, whole."""
        record = self.record(info)
        try:
            return record is not None and self.path(info, TOKENS).stat().st_size == record.n_bytes
        except FileNotFoundError:
            return False

    def is_settled(self, info: ObjectInfo, keep: bool) -> bool:
        """Whether nothing is left to `fetch`."""
        return self.bad_reason(info) is not None or (self.is_here(info) if keep else self.record(info) is not None)

    def shard(self, info: ObjectInfo) -> Shard:
        """The shard, if it can be trained on. Raises ShardError."""
        reason = self.bad_reason(info)
        record = self.record(info)
        if reason is not None or record is None:
            raise ShardError(reason or f"shard {info.name} vanished from {self.folder}", "")
        path, title = self.path(info, TOKENS), self._title(info)
        shard = Shard(info.name, record.n_tokens, path, record.dtype, record.source_crc32c)
        if record.max_token_id >= self.vocab_size:
            if (hold := self.hold(info)) is not None:
                hold.release()
                check_vocab(hold.tokens, self.vocab_size, title)
            raise ShardError(
                f"shard {title}: found token id {record.max_token_id}, expected ids below {self.vocab_size}",
                f"Set --model.vocab_size to the tokenizer's, at least {record.max_token_id + 1}",
            )
        entry = self.entries.get(info.name)
        if entry and (entry.tokens, entry.crc32c) != (record.n_tokens, record.source_crc32c):
            raise ShardError(
                f"shard {title}: found {record.n_tokens} tokens and crc32c {record.source_crc32c}, "
                f"expected {entry.tokens} and {entry.crc32c} as {MANIFEST_NAME} says",
                f"Restore the shard, or delete that {MANIFEST_NAME}",
            )
        return shard

    # ---- fetching ----

    def fetch(self, info: ObjectInfo, keep: bool = True) -> int:
        """Make one shard ready or mark it bad; the bytes downloaded. With on_bad_shard=stop a bad one raises.

        Args:
            keep: its tokens must be here afterwards; else it is enough that the shard is known.

        Raises:
            StorageError: it can't be read or written, or another process holds it or its room for too long.
        """
        n_bytes, deadline = 0, time.monotonic() + PATIENCE_S
        while not self.is_settled(info, keep):
            if (building := self.lock(info)) is not None:
                with building:
                    if self.is_settled(info, keep):
                        break
                    if self.room.set_aside(building, self.token_bytes(info) + self.download_bytes(info), must=False):
                        n_bytes = self.build(info)
                        break
            if time.monotonic() > deadline:
                raise StorageError(
                    f"shard {info.name}: another process has held it, or all room of data.cache_gb, for "
                    f"{PATIENCE_S / 60:.0f} minutes in {self.folder}",
                    "End it, or raise --data.cache_gb",
                )
            time.sleep(POLL_S)
        if self.on_bad_shard == "stop":
            self.shard(info)
        return n_bytes

    def lock(self, info: ObjectInfo) -> FileLock | None:
        """The right to fetch a shard, for one thread of one process; None where another has it."""
        return FileLock.take(self.path(info, BUILDING))

    def hold(self, info: ObjectInfo) -> Hold | None:
        """Its tokens, mapped and held; None where they are not here, or not as they were: that is compared once."""
        record, path = self.record(info), self.path(info, TOKENS)
        if record is None or not path.exists():
            return None
        try:
            file = path.open("rb")
        except FileNotFoundError:  # put out since
            return None
        lock(file.fileno(), fcntl.LOCK_SH)
        if not is_at(file.fileno(), path) or os.fstat(file.fileno()).st_size != record.n_bytes:
            file.close()
            return None
        key = path, os.fstat(file.fileno()).st_ino
        if key not in self._compared and (found := crc32c_of_open(file)) != record.crc32c:
            file.close()
            logger.warning("%s has crc32c %s instead of %s: the shard is read again", path, found, record.crc32c)
            with disk_explained(path.parent):
                path.unlink(missing_ok=True)
            return None
        self._compared.add(key)
        with suppress(PermissionError):
            os.utime(file.fileno())  # the time of its last use
        return Hold(file, record)

    def build(self, info: ObjectInfo, on_bytes: OnBytes | None = None) -> int:
        """Read the object and write its tokens, or its .bad file; the bytes downloaded. For who has its lock.

        Raises:
            ShardError: it changed since it was listed, or since it was here before.
            StorageError: it can't be read or written.
        """
        remove_unfinished(self.path(info, BUILDING))
        if isinstance(self.store, LocalStore):
            self._convert(info, self.store.root / info.name)
            now = self.store.stat(info.name)
            if now is None or (now.size, now.generation) != (info.size, info.generation or now.generation):
                for suffix in (RECORD, TOKENS, ".bad"):  # what was read is not what this key stands for
                    self.path(info, suffix).unlink(missing_ok=True)
                raise self._changed(info, "it was listed")
            return 0
        local = self.folder / f"{unfinished(self.path(info, BUILDING))}.npz{PART_SUFFIX}"
        try:
            now = self.store.download(info.name, local, on_bytes)
            if now.size != info.size or (info.crc32c and now.crc32c not in ("", info.crc32c)):
                raise self._changed(info, "it was listed")
            self._convert(info, local)
        finally:
            with suppress(FileNotFoundError):
                local.unlink()
        return info.size

    def _convert(self, info: ObjectInfo, npz: Path) -> None:
        try:
            tokens, lengths = read_npz(npz, pad_token_id=self.pad_token_id, name=self._title(info))
        except ShardError as error:
            with new_file(self.path(info, ".bad")) as file:
                file.write(str(error).encode())
            return
        before = self.record(info)
        raw = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).view(np.uint8)
        with new_file(self.path(info, TOKENS)) as file:
            writer = CheckedWriter(file)
            for first in range(0, len(raw), BLOCK_BYTES):
                writer.write(raw[first : first + BLOCK_BYTES].data)
            failpoint("cache.after_write")
            source_crc32c = info.crc32c or crc32c_of_file(npz)
            largest = int(tokens.max())
            record = _Record(len(tokens), len(lengths), tokens.dtype.name, largest, writer.crc32c, source_crc32c)
            if before is not None and before != record:
                raise self._changed(info, "it was last here")
        with new_file(self.path(info, RECORD)) as file:
            failpoint("cache.after_rename")
            file.write(json.dumps(asdict(record)).encode())

    def _changed(self, info: ObjectInfo, since: str) -> ShardError:
        mend = f"Let its writer end, or restore it. To begin anew with what is there now, delete {self.folder}"
        return ShardError(f"shard {self._title(info)} changed since {since}", mend)

    def _title(self, info: ObjectInfo) -> str:
        return f"{self.store.url.rstrip('/')}/{info.name}"

    # ---- room ----

    def token_bytes(self, info: ObjectInfo) -> int:
        """Of a shard's tokens, as far as is known."""
        if (record := self.record(info)) is not None:
            return record.n_bytes
        entry = self.entries.get(info.name)
        return entry.tokens * (2 if self.vocab_size <= 2**16 else 4) if entry else int(info.size * ESTIMATED_INFLATION)

    def download_bytes(self, info: ObjectInfo) -> int:
        """Room that a shard takes beside its tokens while it is fetched."""
        return 0 if isinstance(self.store, LocalStore) else info.size

    def room_bytes(self, objects: Sequence[ObjectInfo], n_shards: int) -> int:
        """Room that so many of these shards take at most, while one of them is fetched."""
        sizes = sorted(self.token_bytes(info) for info in objects)
        return sum(sizes[-n_shards:]) + max(self.download_bytes(info) for info in objects)

    def check_room(self, objects: Sequence[ObjectInfo], at_once: int = 1) -> None:
        """Refuse to begin what the folder or data.cache_gb can't take.

        Args:
            at_once: shards that are read from at the same time.

        Raises:
            ConfigError: data.cache_gb is too small.
            StorageError: the disk is.
        """
        make_writable(self.folder, "--data.cache_dir")
        limit, n_shards = self.room.limit_bytes, min(at_once + 1, len(objects))  # with the one that comes next
        if limit:
            self.check_bound(n_shards, self.room_bytes(objects, n_shards))
        absent = [info for info in objects if not self.is_settled(info, keep=True)]
        downloads = sorted(self.download_bytes(info) for info in absent)
        needed = sum(self.token_bytes(info) for info in absent) + sum(downloads[-self.download_workers :])
        if limit:
            needed = min(needed, limit - self.room.used_bytes())
        free = free_disk_bytes(self.folder)
        if free < needed:
            raise StorageError(
                f"{self.folder} has {free / 2**20:,.1f} MiB free, "
                f"{len(absent)} shards need about {needed / 2**20:,.1f} MiB",
                "Free some, set --data.cache_dir to a larger disk, or bound the cache with --data.cache_gb",
            )

    def check_bound(self, n_shards: int, least: int) -> None:
        """Refuse a bound below the `least` bytes of so many shards that are needed at once. Raises ConfigError."""
        if 0 < self.room.limit_bytes < least:
            raise ConfigError(
                f"data.cache_gb {self.room.limit_bytes / 1e9:g} can't hold the {n_shards} shards that are needed "
                f"at the same time, {least / 1e9:.3g} GB",
                f"Set --data.cache_gb to {least / 1e9 * 1.05:.2g} or more, or lower --data.shuffle_shards",
            )
