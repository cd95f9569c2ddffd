"""The cache of shards on this machine: each is read once, checked, and kept as a file of raw tokens to map.

NAME.KEY.bin holds the tokens, NAME.KEY.json what is known of them, NAME.KEY.bad why there are none. The key holds
everything that the tokens depend on, so a verdict, good or bad, stays true for ever and is the same for every rank.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pretrain.config import DataConfig
from pretrain.errors import ShardError, StorageError
from pretrain.failpoints import failpoint
from pretrain.files import (
    BLOCK_BYTES,
    PART_SUFFIX,
    CheckedWriter,
    crc32c_of_file,
    free_disk_bytes,
    make_writable,
    new_file,
)
from pretrain.manifest import MANIFEST_NAME, DataManifest, ShardEntry
from pretrain.npz import check_vocab, read_npz
from pretrain.storage import LocalStore, ObjectInfo, ObjectStore

CACHE_FORMAT = 1  # part of every key: raise it when a shard's tokens would be read or written differently
LEFTOVER_AGE_S = 86400.0
ESTIMATED_INFLATION = 1.5  # raw tokens per compressed byte, where no manifest says how many there are


@dataclass(frozen=True)
class Shard:
    """One shard's tokens in the cache."""

    name: str
    """The object's name, relative to the source."""
    n_tokens: int
    path: Path
    """Raw little-endian tokens."""
    dtype: str
    """uint16 or uint32."""
    crc32c: str = ""
    """Checksum of the raw tokens: the same whatever dialect, file or bucket they came from."""

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


class ShardCache:
    """The files of one source in data.cache_dir."""

    def __init__(self, store: ObjectStore, data: DataConfig, vocab_size: int, manifest: DataManifest | None) -> None:
        self.store = store
        self.folder = Path(data.cache_dir).absolute() / digest(store.url)[:16]
        self.pad_token_id = data.pad_token_id
        self.on_bad_shard = data.on_bad_shard
        self.download_workers = data.download_workers
        self.vocab_size = vocab_size
        self.manifest = manifest
        self.entries: dict[str, ShardEntry] = {entry.name: entry for entry in manifest.shards} if manifest else {}

    def path(self, info: ObjectInfo, suffix: str) -> Path:
        key = digest([CACHE_FORMAT, info.name, info.size, info.crc32c, info.generation, self.pad_token_id])[:16]
        return self.folder / f"{PurePosixPath(info.name).stem[:150]}.{key}{suffix}"

    def record(self, info: ObjectInfo) -> _Record | None:
        """The record of a shard whose tokens are whole; None where it must be built."""
        try:
            record = _Record(**json.loads(self.path(info, ".json").read_text(encoding="utf-8")))
            n_bytes = self.path(info, ".bin").stat().st_size
            return record if n_bytes == record.n_tokens * np.dtype(record.dtype).itemsize else None
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def bad_reason(self, info: ObjectInfo) -> str | None:
        try:
            return self.path(info, ".bad").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def fetch(self, info: ObjectInfo) -> int:
        """Make one shard ready or mark it bad; the bytes downloaded. With on_bad_shard=stop a bad one raises."""
        n_bytes = 0
        if self.record(info) is None and self.bad_reason(info) is None:
            n_bytes = self._build(info)
        if self.on_bad_shard == "stop":
            self.shard(info)
        return n_bytes

    def shard(self, info: ObjectInfo) -> Shard:
        """The shard, if it can be trained on. Raises ShardError."""
        reason = self.bad_reason(info)
        record = self.record(info)
        if reason is not None or record is None:
            raise ShardError(reason or f"shard {info.name} vanished from {self.folder}", "")
        shard = Shard(info.name, record.n_tokens, self.path(info, ".bin"), record.dtype, record.crc32c)
        if record.max_token_id >= self.vocab_size:
            check_vocab(shard.tokens(), self.vocab_size, self._title(info))
        entry = self.entries.get(info.name)
        if entry and (entry.tokens, entry.crc32c) != (record.n_tokens, record.source_crc32c):
            raise ShardError(
                f"shard {self._title(info)}: found {record.n_tokens} tokens and crc32c {record.source_crc32c}, "
                f"expected {entry.tokens} and {entry.crc32c} as {MANIFEST_NAME} says",
                f"Restore the shard, or delete that {MANIFEST_NAME}",
            )
        return shard

    def _build(self, info: ObjectInfo) -> int:
        """Read the object and write its tokens, or its .bad file; the bytes downloaded."""
        if isinstance(self.store, LocalStore):
            self._convert(info, self.store.root / info.name)
            return 0
        local = self.folder / f".{digest(info.name)[:16]}.{secrets.token_hex(4)}.npz{PART_SUFFIX}"
        try:
            self.store.download(info.name, local)
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
        raw = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).view(np.uint8)
        with new_file(self.path(info, ".bin")) as file:
            writer = CheckedWriter(file)
            for first in range(0, len(raw), BLOCK_BYTES):
                writer.write(raw[first : first + BLOCK_BYTES].data)
            failpoint("cache.after_write")
        source_crc32c = info.crc32c or crc32c_of_file(npz)
        record = _Record(len(tokens), len(lengths), tokens.dtype.name, int(tokens.max()), writer.crc32c, source_crc32c)
        with new_file(self.path(info, ".json")) as file:
            failpoint("cache.after_rename")
            file.write(json.dumps(asdict(record)).encode())

    def _title(self, info: ObjectInfo) -> str:
        return f"{self.store.url.rstrip('/')}/{info.name}"

    def check_room(self, objects: Sequence[ObjectInfo]) -> None:
        """Refuse to begin what the folder can't take. Raises StorageError."""
        make_writable(self.folder, "--data.cache_dir")
        absent = [info for info in objects if self.record(info) is None and self.bad_reason(info) is None]
        if not absent:
            return
        token_bytes = 2 if self.vocab_size <= 2**16 else 4
        needed = 0
        for info in absent:
            entry = self.entries.get(info.name)
            needed += entry.tokens * token_bytes if entry else int(info.size * ESTIMATED_INFLATION)
        if not isinstance(self.store, LocalStore):
            needed += sum(sorted(info.size for info in absent)[-self.download_workers :])  # in flight
        free = free_disk_bytes(self.folder)
        if free < needed:
            raise StorageError(
                f"{self.folder} has {free / 2**20:,.1f} MiB free, "
                f"{len(absent)} shards need about {needed / 2**20:,.1f} MiB",
                "Free some, or set --data.cache_dir to a larger disk or --data.max_files to fewer shards",
            )

    def remove_leftovers(self) -> None:
        """Delete temporary files of processes that were killed more than a day ago."""
        for path in self.folder.glob(f".*{PART_SUFFIX}"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                    path.unlink()


def digest(key: object) -> str:
    """A hash of a JSON-like value."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
