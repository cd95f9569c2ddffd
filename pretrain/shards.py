"""Shards from a store into verified, memory-mapped files of raw tokens: once per node, and only once.

    shards = fetch_shards(open_store(url, config.storage), config.data, vocab_size=8192)
    shards.shards[0].tokens()    # (n_tokens,) uint16, mapped: reading it costs no memory

`open_shards` does the same for training, which begins before all are here: tokens come when their turn comes. The order
of an epoch depends on how many tokens each shard has, so these are known first: from the manifest, or from what the
cache has seen. Shards of which neither knows are all read once before the first step. So they are where damaged ones
are to be left out (data.on_bad_shard=skip): which ones these are decides the order, and the manifest can't know.

Each rank of a node fetches its part and then waits for its siblings' files to appear. What a shard is worth is decided
from files that all ranks see, so that all of them train on the same set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import PurePosixPath

from pretrain import log
from pretrain.cache import Shard, ShardCache
from pretrain.config import DataConfig
from pretrain.errors import ShardError, StorageError
from pretrain.files import digest
from pretrain.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, DataManifest
from pretrain.room import TOKENS, remove_leftovers
from pretrain.shard_feed import ShardFeed, StreamedShard
from pretrain.storage import ObjectInfo, ObjectStore

__all__ = ["Shard", "ShardSet", "fetch_shards", "missing_shards", "open_shards", "read_manifest", "select_shards"]

logger = log.get(__name__)

SIBLING_PATIENCE_S = 1800.0  # without any new shard; a single one takes seconds to minutes
SIBLING_POLL_S = 0.2

OnProgress = Callable[[int, int, int], None]
"""Called with (shards ready, shards in all, bytes downloaded by this process)."""


@dataclass(frozen=True)
class ShardSet:
    """What a run trains on."""

    shards: tuple[Shard, ...]
    """Sorted by name."""
    skipped: tuple[str, ...] = ()
    """Names left out by data.on_bad_shard=skip."""
    manifest: DataManifest | None = None
    """The manifest beside the shards, where there is one."""
    feed: ShardFeed | None = field(default=None, compare=False)
    """What brings them; None where all of them are here."""
    recipe: str = ""
    """Hash of what decides them, where they are still being made; the feed knows those that are."""

    @property
    def n_tokens(self) -> int:
        return sum(shard.n_tokens for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, token counts and files, or of their recipe: equal on every rank, and after a resume, or the
        batches differ."""
        return self.recipe or digest([(shard.name, shard.n_tokens, shard.source_crc32c) for shard in self.shards])


def fetch_shards(
    store: ObjectStore,
    data: DataConfig,
    *,
    vocab_size: int,
    may_be_larger: bool = False,
    local_rank: int = 0,
    local_world_size: int = 1,
    on_progress: OnProgress | None = None,
) -> ShardSet:
    """The shards of `store` that `data` names, checked and in the cache. Every rank of a node calls it.

    Args:
        vocab_size: every token id must be below it.
        may_be_larger: whether it may exceed the vocabulary of the manifest.
        local_rank: of this process on its node, 0 to local_world_size - 1.

    Raises:
        ShardError: no shards, a damaged one (with data.on_bad_shard=stop), or a manifest that disagrees.
        StorageError: the store or the cache folder can't be used, has no room, or a sibling rank gave up.
    """
    cache, objects, missing = _find(store, data, vocab_size, may_be_larger, local_rank)
    cache.check_room(objects)
    workers = max(1, data.download_workers // local_world_size)
    _fetch_own(cache, objects[local_rank::local_world_size], len(objects), workers, on_progress, keep=True)
    _await_siblings(cache, objects, on_progress, keep=True)
    return _judge(cache, objects, missing, cache.shard)


def open_shards(
    store: ObjectStore,
    data: DataConfig,
    *,
    vocab_size: int,
    may_be_larger: bool = False,
    local_rank: int = 0,
    local_world_size: int = 1,
    at_once: bool = False,
) -> ShardSet:
    """The shards that `data` names, in numbers; their tokens come when they are asked for. As `fetch_shards` else.

    Args:
        at_once: all of them are read soon: fetch them now, as many as there is room for.

    Raises:
        ConfigError: data.cache_gb can't hold what is read at the same time.
        ShardError: as `fetch_shards`; later, by the tokens of a shard, where it is not what the manifest says.
        StorageError: as `fetch_shards`; later, by the tokens of a shard that can't be fetched.
    """
    cache, objects, missing = _find(store, data, vocab_size, may_be_larger, local_rank)
    cache.check_room(objects, 1 if at_once else data.shuffle_shards)
    workers = max(1, data.download_workers // local_world_size)
    if at_once:
        _fetch_own(cache, objects[local_rank::local_world_size], len(objects), workers, None, keep=True)
    elif unknown := [info for info in objects if not _is_counted(cache, info)]:
        why = "data.on_bad_shard is skip" if cache.manifest else f"no {MANIFEST_NAME} counts their tokens"
        mend = "" if cache.manifest else "; scripts/download_data.py writes one"
        logger.info("data: %d shards are read once before the first step: %s%s", len(unknown), why, mend)
        mine = [info for info in objects[local_rank::local_world_size] if not _is_counted(cache, info)]
        _fetch_own(cache, mine, len(unknown), workers, None, keep=False)
    _await_siblings(cache, [info for info in objects if not _is_counted(cache, info)], None, keep=False)
    found = _judge(cache, objects, missing, lambda info: _counted(cache, info))
    infos = {info.name: info for info in objects}
    feed = ShardFeed(cache, [infos[shard.name] for shard in found.shards], workers)  # in the numbers of the set
    shards = [StreamedShard(**vars(shard), feed=feed, index=index) for index, shard in enumerate(found.shards)]
    return replace(found, shards=tuple(shards), feed=feed)


def _is_counted(cache: ShardCache, info: ObjectInfo) -> bool:
    """Whether the number of its tokens can be relied on."""
    return cache.is_known(info) or (cache.on_bad_shard == "stop" and info.name in cache.entries)


def _counted(cache: ShardCache, info: ObjectInfo) -> Shard:
    """A shard by what is known of it. Raises ShardError where that is that it is bad."""
    if cache.is_known(info):
        return cache.shard(info)
    entry, path = cache.entries[info.name], cache.path(info, TOKENS)
    if info.size != entry.bytes or info.crc32c not in ("", entry.crc32c):
        raise ShardError(
            f"shard {cache.store.url.rstrip('/')}/{info.name}: found {info.size} bytes and crc32c "
            f"{info.crc32c or 'unknown'}, expected {entry.bytes} and {entry.crc32c} as {MANIFEST_NAME} says",
            f"Restore the shard, or delete that {MANIFEST_NAME}",
        )
    return Shard(info.name, entry.tokens, path, "", entry.crc32c)


def _find(
    store: ObjectStore, data: DataConfig, vocab_size: int, may_be_larger: bool, local_rank: int
) -> tuple[ShardCache, list[ObjectInfo], list[str]]:
    """The cache of the source, its shards, and the names of those that are missing."""
    listed = store.list()
    objects = select_shards(listed, data.pattern, data.max_files, store.url)
    manifest = read_manifest(store, listed)
    if manifest:
        manifest.check_vocab_size(vocab_size, f"{store.url.rstrip('/')}/{MANIFEST_NAME}", may_be_larger)
    cache = ShardCache(store, data, vocab_size, manifest)
    if local_rank == 0:
        remove_leftovers(cache.folder)
    missing = missing_shards(manifest, objects, data.pattern, data.max_files)
    if missing and data.on_bad_shard == "stop":
        raise ShardError(
            f"{store.url}: {MANIFEST_NAME} names {len(missing)} shards that are not there, such as {missing[0]}",
            f"Restore them, or delete that {MANIFEST_NAME}",
        )
    return cache, objects, missing


def select_shards(listed: Sequence[ObjectInfo], pattern: str, max_files: int, url: str) -> list[ObjectInfo]:
    """The first `max_files` (0: all) `.npz` objects by name whose base name matches `pattern`.

    Raises:
        ShardError: there is none; it says what is there instead.
    """
    names = {info.name: PurePosixPath(info.name).name for info in listed}
    chosen = [info for info in listed if info.name.endswith(".npz") and fnmatchcase(names[info.name], pattern)]
    if not chosen:
        others = ", ".join(info.name for info in listed[:3])
        found = f"{len(listed)} other objects, such as {others}" if listed else "nothing"
        raise ShardError(
            f"no shards under {url}: expected .npz files that match {pattern!r}, found {found}",
            "Check that address and data.pattern; raw text needs --data.tokenizer",
        )
    chosen.sort(key=lambda info: info.name)
    return chosen[:max_files] if max_files else chosen


def read_manifest(store: ObjectStore, listed: Sequence[ObjectInfo]) -> DataManifest | None:
    """The manifest.json at the store's root, or None where the listing has none."""
    if not any(info.name == MANIFEST_NAME for info in listed):
        return None
    text = store.read_bytes(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    return DataManifest.from_json(text, f"{store.url.rstrip('/')}/{MANIFEST_NAME}")


def _fetch_own(
    cache: ShardCache,
    own: Sequence[ObjectInfo],
    n_total: int,
    workers: int,
    on_progress: OnProgress | None,
    *,
    keep: bool,
) -> None:
    """Read this rank's shards, and keep them in the cache; with on_bad_shard=stop the first bad one ends it."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fetch")
    try:
        futures = [pool.submit(cache.fetch, info, keep) for info in own]
        n_bytes = 0
        for done, future in enumerate(as_completed(futures), 1):
            n_bytes += future.result()
            if on_progress:
                on_progress(done, n_total, n_bytes)
    finally:
        pool.shutdown(cancel_futures=True)


def _await_siblings(
    cache: ShardCache, objects: Sequence[ObjectInfo], on_progress: OnProgress | None, *, keep: bool
) -> None:
    """Wait until every shard is in the cache, or with `keep` false was, or is marked bad.

    The limit is on the time without any progress.
    """
    pending = list(objects)
    deadline = time.monotonic() + SIBLING_PATIENCE_S
    while True:
        still = [info for info in pending if not cache.is_settled(info, keep)]
        if len(still) < len(pending):
            deadline = time.monotonic() + SIBLING_PATIENCE_S
            if on_progress:
                on_progress(len(objects) - len(still), len(objects), 0)
        if not still:
            return
        if time.monotonic() > deadline:
            raise StorageError(
                f"{len(still)} shards that other ranks of this node fetch did not appear in {cache.folder}, "
                f"such as {still[0].name}",
                "See the other ranks' log; all ranks of a node must see the same data.cache_dir",
            )
        pending = still
        time.sleep(SIBLING_POLL_S)


def missing_shards(
    manifest: DataManifest | None, objects: Sequence[ObjectInfo], pattern: str, max_files: int
) -> list[str]:
    """Names in the manifest that `select_shards` should have found."""
    if manifest is None:
        return []
    names = sorted(entry.name for entry in manifest.shards if fnmatchcase(PurePosixPath(entry.name).name, pattern))
    found = {info.name for info in objects}
    return [name for name in (names[:max_files] if max_files else names) if name not in found]


def _judge(
    cache: ShardCache,
    objects: Sequence[ObjectInfo],
    missing: Sequence[str],
    judged: Callable[[ObjectInfo], Shard],
) -> ShardSet:
    """The set that every rank comes to from what lies in the cache; `judged` raises ShardError for a bad one."""
    shards: list[Shard] = []
    skipped = list(missing)
    for info in objects:
        try:
            shards.append(judged(info))
        except ShardError as error:
            if cache.on_bad_shard == "stop":
                raise
            skipped.append(info.name)
            logger.warning("left out: %s", error.what)
    if not shards:
        raise ShardError(f"all {len(objects)} shards are bad, such as {skipped[0]}", "Set --data.on_bad_shard stop")
    return ShardSet(tuple(shards), tuple(sorted(skipped)), cache.manifest)
