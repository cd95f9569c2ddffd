"""Shards that come while they are trained on: fetched ahead in the order of their turn, and held while they are read.

    feed = ShardFeed(cache, objects, workers=8)
    feed.want(now=[4, 17], ahead=[2, 9, 11])    # indices of objects, in the order of their turn
    feed.tokens(4)                              # waits until it is here

Each rank of a node has a feed of its own, over the same cache. What one fetches, the others find: a shard is fetched by
whoever gets its lock first. What a feed wants and has found it holds, so that no other puts it out; what it no longer
wants it lets go at once.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pretrain.cache import POLL_S, Hold, Shard, ShardCache
from pretrain.room import BUILDING, is_set_aside
from pretrain.storage import ObjectInfo

ROOM_PATIENCE_S = 10.0  # for other ranks to let go of what they read before; then the bound must give way
NO_HURRY_S = 2.0  # until a shard that has no room and is not needed yet is tried again
OTHER_FILES = 512  # that a process has open beside its shards


class FeedClosed(Exception):
    """Somebody waits for tokens of a feed that was closed."""


class ShardFeed:
    """The tokens of the shards of one source.

    Args:
        cache: where they come to.
        objects: the shards, by index.
        workers: threads that fetch.

    Attributes:
        arrived: grows with every piece that arrives: who waits can tell a slow bucket from one that is gone.
    """

    def __init__(self, cache: ShardCache, objects: Sequence[ObjectInfo], workers: int) -> None:
        self.arrived = 0
        self._cache, self._objects, self._workers = cache, tuple(objects), workers
        self._now: tuple[int, ...] = ()
        self._ahead: tuple[int, ...] = ()
        self._asked: tuple[int, ...] = ()
        self._held: dict[int, Hold] = {}
        self._busy: set[int] = set()
        self._not_before: dict[int, float] = {}
        self._without_room: dict[int, float] = {}
        self._closed = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    # ---- for who reads ----

    def want(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Say which shards are read from here on; others are let go.

        Args:
            now: are about to be read.
            ahead: come after them, if there is room.

        Raises:
            ShardError, StorageError: what a shard that was fetched ahead came to.
        """
        with self._changed:
            self._now, self._ahead, self._asked = tuple(now), tuple(ahead), ()
            self._not_before.clear()  # there may be room now
            _allow_open_files(2 * (len(self._now) + len(self._ahead)) + OTHER_FILES)  # a file and its map
            self._let_go()
            self._begin()

    def tokens(self, index: int) -> np.ndarray:
        """The tokens (n,) of a shard, mapped read-only, once it is here; also of one that nobody said to want.

        Raises:
            ShardError: it is damaged, or not what the manifest or the listing said.
            StorageError: it can't be fetched.
            FeedClosed: the feed was closed meanwhile.
        """
        hold = self._held.get(index)
        if hold is not None and self._error is None:
            return hold.tokens
        with self._changed:
            if index not in (*self._now, *self._ahead):
                self._asked = (index,)
                self._let_go()
            elif index not in self._now:
                self._now = (*self._now, index)
            self._begin()
            while index not in self._held:
                self._changed.wait()
                self._check()
            return self._held[index].tokens

    def room_bytes(self, n_shards: int) -> int:
        """Room in the cache that so many shards take at most, while one of them is fetched."""
        return self._cache.room_bytes(self._objects, n_shards)

    def close(self) -> None:
        """Let everything go, for good; what is being fetched is given up, and who waits is told."""
        with self._changed:
            self._closed = True
            self._now = self._ahead = self._asked = ()
            self._let_go()
            self._changed.notify_all()

    def _begin(self) -> None:
        """Start the threads where none run, wake those that do."""
        self._check()
        while len(self._threads) < self._workers:
            # Daemons, not a pool: a pool's threads are waited for at the end, for as long as a bucket keeps silent.
            thread = threading.Thread(target=self._fetch, name=f"fetch-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise FeedClosed

    def _let_go(self) -> None:
        wanted = {*self._now, *self._ahead, *self._asked}
        for index in [index for index in self._held if index not in wanted]:
            self._held.pop(index).release()
        for times in (self._not_before, self._without_room):
            for index in [index for index in list(times) if index not in wanted]:
                del times[index]

    # ---- the threads ----

    def _fetch(self) -> None:
        while True:
            with self._changed:
                while (index := self._next()) is None and not self._closed:
                    self._changed.wait(POLL_S if self._not_before else None)
                if index is None:
                    return
                self._busy.add(index)
            try:
                brought: Hold | float | Exception = self._bring(index)
            except Exception as error:  # noqa: BLE001 - raised again where the tokens are read
                brought = error
            with self._changed:
                self._busy.discard(index)
                self._take(index, brought)
                self._changed.notify_all()

    def _next(self) -> int | None:
        """The first shard of those wanted that can be tried now; where one that is needed has no room, no other."""
        moment = time.monotonic()
        for index in dict.fromkeys((*self._asked, *self._now, *self._ahead)):
            if index in self._held or index in self._busy or self._error is not None:
                continue
            if self._not_before.get(index, 0.0) <= moment:
                return index
            if index in self._without_room and self._is_needed(index):
                return None
        return None

    def _is_needed(self, index: int) -> bool:
        return index in self._asked or index in self._now

    def _take(self, index: int, brought: Hold | float | Exception) -> None:
        """Keep what a thread brought; what nobody wants any more is let go, errors too."""
        is_wanted = index not in self._held and (self._is_needed(index) or index in self._ahead)
        if isinstance(brought, Hold) and not is_wanted:
            brought.release()
        elif isinstance(brought, Hold):
            self._held[index] = brought
            self._not_before.pop(index, None)
            self._without_room.pop(index, None)
        elif isinstance(brought, Exception) and is_wanted:
            self._error = brought
        elif isinstance(brought, float) and is_wanted:
            self._not_before[index] = time.monotonic() + brought
            if index in self._without_room:
                self._make_room()

    def _make_room(self) -> None:
        """Let go the last of the shards that are held ahead: one that is needed has no room."""
        for index in reversed(self._ahead):
            if index in self._held and not self._is_needed(index):
                self._held.pop(index).release()
                self._not_before[index] = time.monotonic() + NO_HURRY_S
                return

    def _bring(self, index: int) -> Hold | float:
        """Its tokens, held; or seconds until it is to be tried again: another process is at it, or there is no room."""
        cache, info = self._cache, self._objects[index]
        if cache.is_known(info):
            cache.shard(info)
        if (hold := cache.hold(info)) is not None:
            return hold
        if (building := cache.lock(info)) is None:
            return POLL_S
        with building:
            if not cache.is_here(info):
                n_bytes = cache.token_bytes(info) + cache.download_bytes(info)
                leaving = self._room_before(index)
                if not cache.room.set_aside(building, n_bytes, must=self._must(index), leaving=leaving):
                    return POLL_S if self._is_needed(index) else NO_HURRY_S
                cache.build(info, self._count)
            cache.shard(info)
            self._count(0)
            return cache.hold(info) or POLL_S

    def _room_before(self, index: int) -> int:
        """Bytes that the shards read before this one still need. Another rank may be about to fetch them: for room that
        this one took it would wait in vain, since it reads on, and lets go of others, only when they are here."""
        if not self._cache.room.limit_bytes:
            return 0
        with self._changed:
            wanted = [*self._asked, *self._now, *self._ahead]
            before = wanted[: wanted.index(index)] if index in wanted else []
            lacking = [self._objects[each] for each in before if each not in self._held]
        cache = self._cache
        infos = [each for each in lacking if not cache.is_here(each) and not is_set_aside(cache.path(each, BUILDING))]
        return sum(cache.token_bytes(info) + cache.download_bytes(info) for info in infos)

    def _must(self, index: int) -> bool:
        """Whether it is needed, and has had no room for so long that the bound gives way."""
        if not self._is_needed(index):
            return False
        since = self._without_room.setdefault(index, time.monotonic())
        return time.monotonic() - since >= ROOM_PATIENCE_S

    def _count(self, _n_bytes: int) -> None:
        self.arrived += 1


def _allow_open_files(count: int) -> None:
    """Have the kernel allow so many, or as many as this user may: 1024 are common, and a group may be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True)
class StreamedShard(Shard):
    """A shard whose tokens come when they are asked for.

    Args:
        feed: that brings them.
        index: in the feed.
    """

    feed: ShardFeed | None = field(default=None, compare=False, repr=False)
    index: int = field(default=0, compare=False)

    def tokens(self) -> np.ndarray:
        """The tokens (n_tokens,), mapped read-only; waits until they are here. Raises as `ShardFeed.tokens`."""
        assert self.feed is not None
        return self.feed.tokens(self.index)


Look = Callable[[int], tuple[Sequence[tuple[ObjectInfo, Shard]], bool]]
"""From how many shards are known to those that were made since, and whether no more will come."""


class GrowingFeed(ShardFeed):
    """A feed of shards that are still being made, in the order in which they are.

    Args:
        cache, workers: as of ShardFeed.
        look: for shards that were made since; what it raises is raised to who asks for more.
        shard_bytes: of the tokens of one, about.
        on_close: called when nobody reads from here any more.
    """

    def __init__(
        self,
        cache: ShardCache,
        workers: int,
        look: Look,
        shard_bytes: int = 0,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(cache, (), workers)
        self._look, self._shard_bytes, self._on_close = look, shard_bytes, on_close
        self._made: tuple[tuple[Shard, ...], bool] = ((), False)
        self._looking = threading.Lock()

    def made(self) -> tuple[tuple[Shard, ...], bool]:
        """All shards that are made by now, and whether there will be no others. Raises what the look does."""
        with self._looking:
            shards, is_all = self._made
            if not is_all:
                found, is_all = self._look(len(shards))
                with self._changed:
                    self._objects += tuple(info for info, _ in found)
                    self.arrived += len(found)
                numbered = enumerate((shard for _, shard in found), len(shards))
                shards += tuple(StreamedShard(**vars(shard), feed=self, index=index) for index, shard in numbered)
                self._made = (shards, is_all)
        return self._made

    def await_more(self, n_shards: int) -> None:
        """Wait until there are more shards than so many, or there will be no others.

        Raises:
            ShardError, StorageError: what the look raised, or a shard that was fetched ahead came to.
            FeedClosed: the feed was closed meanwhile.
        """
        while True:
            shards, is_all = self.made()
            if is_all or len(shards) > n_shards:
                return
            with self._changed:
                self._check()
                self._changed.wait(POLL_S)

    def room_bytes(self, n_shards: int) -> int:
        """See ShardFeed; those that are not made yet count, too."""
        return n_shards * self._shard_bytes

    def close(self) -> None:
        """See ShardFeed; nothing more is made then, either."""
        super().close()
        if self._on_close:
            self._on_close()
