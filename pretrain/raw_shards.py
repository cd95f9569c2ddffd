"""The shards of raw text that are made so far, for those who train on them while others are made.

    shards = open_made(data, vocab_size=50257)
    shards.feed.await_more(0)        # until the first one is there

Whoever prepares the text, a process beside this one, of another node with the same disk or of an earlier start, names
each shard in its journal once it is there for good; the manifest at the end names all. What they hold is decided by the
recipe, which is known from the beginning: its hash stands for the shards in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.cache import Shard, ShardCache
from pretrain.config import DataConfig
from pretrain.errors import ShardError
from pretrain.files import make_writable
from pretrain.manifest import MANIFEST_NAME, DataManifest, ShardEntry
from pretrain.parts import token_dtype
from pretrain.raw_source import claim_of, folder_of, not_prepared, prepared
from pretrain.room import TOKENS, remove_leftovers
from pretrain.shard_feed import GrowingFeed
from pretrain.shard_writer import SPLITS, closed_shards
from pretrain.shards import ShardSet, read_manifest
from pretrain.storage import LocalStore, ObjectInfo
from pretrain.work_folder import OPEN_SHARDS, work_folder


def open_made(
    data: DataConfig,
    *,
    vocab_size: int,
    local_rank: int = 0,
    local_world_size: int = 1,
    is_in_work: bool = True,
    on_close: Callable[[], None] | None = None,
) -> ShardSet:
    """The shards of raw text as a set without any, and a feed that learns of each when it is made.

    Every rank of a node calls it, once the text has its recipe and its tokenizer.

    Args:
        data: of one source of raw text.
        vocab_size: the model's.
        is_in_work: whether somebody makes what is missing; else who asks for it gets an error.
        on_close: called when nobody reads any more.

    Raises:
        ConfigError: data.cache_gb can't hold what is read at the same time.
        ShardError: nobody has begun to prepare the text.
        StorageError: data.cache_dir can't be used.
    """
    recipe, manifest = claim_of(data)
    store = LocalStore(folder_of(data) / SPLITS[0])
    # What the policy allows to leave out is text; a shard of our own that is damaged is an error.
    shards = DataConfig(**{**vars(prepared(data)), "on_bad_shard": "stop"})
    cache = ShardCache(store, shards, vocab_size, None)
    make_writable(cache.folder, "--data.cache_dir")
    if local_rank == 0:
        remove_leftovers(cache.folder)
    shard_bytes, n_shards = data.raw_shard_tokens * token_dtype(vocab_size).itemsize, data.shuffle_shards + 1
    cache.check_bound(n_shards, n_shards * shard_bytes)
    look = _Look(data, cache, is_in_work)
    workers = max(1, data.download_workers // local_world_size)
    return ShardSet((), manifest=manifest, recipe=recipe, feed=GrowingFeed(cache, workers, look, shard_bytes, on_close))


class _Look:
    """Finds what was made since; see shard_feed.Look."""

    def __init__(self, data: DataConfig, cache: ShardCache, is_in_work: bool) -> None:
        self._data, self._cache, self._is_in_work = data, cache, is_in_work
        self._store = LocalStore(folder_of(data) / SPLITS[0])
        self._open = work_folder("", LocalStore(folder_of(data))) / OPEN_SHARDS

    def __call__(self, n_known: int) -> tuple[list[tuple[ObjectInfo, Shard]], bool]:
        entries, is_all = self._entries()
        if self._data.max_files and len(entries) >= self._data.max_files:
            entries, is_all = entries[: self._data.max_files], True
        if not is_all and not self._is_in_work and len(entries) == n_known:
            raise not_prepared(self._data, f"prepared up to shard {n_known} only")
        return [self._shard(entry) for entry in entries[n_known:]], is_all

    def _entries(self) -> tuple[tuple[ShardEntry, ...], bool]:
        """All shards that are made, and whether no others follow."""
        # First the manifest: when it is there, the journal goes.
        manifest = self._manifest()
        if manifest is None and (made := closed_shards(self._open, SPLITS[0])):
            return made, False
        return (manifest.shards, True) if manifest else ((), False)

    def _manifest(self) -> DataManifest | None:
        info = self._store.stat(MANIFEST_NAME)
        return read_manifest(self._store, [info]) if info else None

    def _shard(self, entry: ShardEntry) -> tuple[ObjectInfo, Shard]:
        info = self._store.stat(entry.name)
        if info is None or info.size != entry.bytes:
            raise ShardError(
                f"{Path(self._store.url) / entry.name} was made of raw text, and is missing now or has another size",
                f"Delete {folder_of(self._data)}: it is made again, the same",
            )
        self._cache.entries[entry.name] = entry
        return info, Shard(entry.name, entry.tokens, self._cache.path(info, TOKENS), "", entry.crc32c)
