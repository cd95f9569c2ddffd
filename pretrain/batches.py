"""Which tokens a step trains on: a function of (seed, epoch, position), whatever the ranks, micro batch or engine.

An epoch is one stream: the shards in a seeded order, one behind the other. Window i of it is the tokens
[i·T, i·T + T + 1), so every token but the first is a target once, across documents and across shards. A window belongs
to the shard its first token lies in; inside a group of `shuffle_shards` shards the windows are taken in a seeded order.
A resume needs three integers and reads nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pretrain.errors import ShardError
from pretrain.read_ahead import ReadAhead
from pretrain.shard_feed import ShardFeed
from pretrain.shards import Shard

MAX_OPEN_SHARDS = 256  # each memory map holds a file descriptor, and a process often has 1024


@dataclass(frozen=True)
class Position:
    """What has been taken so far; the beginning of a run is all zeros."""

    epoch: int = 0
    shard: int = 0
    """Index in the epoch's seeded order of shards."""
    window: int = 0
    """Windows taken since that shard's began."""


class Batches:
    """The batches of a run, in order.

    Args:
        shards: the training shards; their order here is part of what the seed means, so give them sorted by name.
        seq_len: T, target tokens in a window.
        global_size: windows in one optimizer step, over all ranks.
        seed: of the order of shards and windows.
        shuffle_shards: consecutive shards whose windows are shuffled together.
        feed: brings the shards, where they are not here yet: it is told which ones come next.
        prefetch_shards: shards that it fetches ahead of those which are read.

    Raises:
        ShardError: the shards hold fewer windows than one step takes.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        seq_len: int,
        global_size: int,
        seed: int,
        shuffle_shards: int = 1,
        feed: ShardFeed | None = None,
        prefetch_shards: int = 0,
    ) -> None:
        self.shards = tuple(shards)
        self.seq_len = seq_len
        self.global_size = global_size
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self.n_tokens = sum(shard.n_tokens for shard in self.shards)
        self.windows_per_epoch = max(self.n_tokens - 1, 0) // seq_len
        if self.windows_per_epoch < global_size:
            raise ShardError(
                f"{len(self.shards)} shards of {self.n_tokens} tokens in all give {self.windows_per_epoch} windows of "
                f"model.seq_len {seq_len}, fewer than one step of batch.global_size {global_size} takes",
                f"Give at least {global_size * seq_len + 1} tokens, or lower model.seq_len or batch.global_size",
            )
        self._epoch_cache: _Epoch | None = None
        self.feeds: tuple[ShardFeed, ...] = () if feed is None else (feed,)
        self._prefetch_shards = prefetch_shards
        self._wanted = (-1, -1)  # (epoch, group of shards) that the feed was told of
        self._reader = _Reader(self.shards, keep_open=feed is None)

    def files_processed(self, position: Position) -> int:
        """Shards taken to the end since the run began."""
        return position.epoch * len(self.shards) + position.shard

    def windows_before(self, position: Position) -> int:
        """Windows taken since the run began. Raises ValueError where this data doesn't have the position."""
        return position.epoch * self.windows_per_epoch + self._epoch(position.epoch).taken(position)

    def position_after(self, windows: int) -> Position:
        """The reverse of `windows_before`; it names the shard whose windows come next."""
        epoch, taken = divmod(windows, self.windows_per_epoch)
        return self._epoch(epoch).position(taken)

    def origins(self, position: Position) -> list[tuple[str, Batches, int]]:
        """Of each window of the step at `position`: its source's name ('' where there is one only), that source, and
        how many windows of it were taken before."""
        first = self.windows_before(position)
        return [("", self, first + row) for row in range(self.global_size)]

    def shards_between(self, begin: Position, end: Position) -> list[str]:
        """Names of the shards that the windows from one position up to another begin in, in the order they come."""
        names: dict[str, None] = {}
        epoch, last = self._epoch(begin.epoch), self._epoch(end.epoch).taken(end)
        taken = epoch.taken(begin)
        while (epoch.number, taken) < (end.epoch, last):
            if taken >= self.windows_per_epoch:
                epoch, taken = self._epoch(epoch.number + 1), 0
                continue
            shard = int(np.searchsorted(epoch.starts, epoch.window(taken) * self.seq_len, side="right")) - 1
            names[self.shards[int(epoch.order[shard])].name] = None
            taken += 1
        return list(names)

    def take(self, position: Position, rank: int, world_size: int) -> tuple[np.ndarray, Position]:
        """One rank's windows of the step at `position`, and the position after the step.

        Returns:
            tokens (global_size // world_size, seq_len + 1) int64: inputs are [:, :-1], targets [:, 1:]. Ranks hold
            contiguous parts of the global batch, rank 0 the first.

        Raises:
            ValueError: global_size is not divisible by world_size, or a position that this data doesn't have.
        """
        if self.global_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} can't split a global batch of {self.global_size}")
        count, first = self.global_size // world_size, self.windows_before(position)
        return self.read(first + rank * count, count), self.position_after(first + self.global_size)

    def read(self, first: int, count: int) -> np.ndarray:
        """The `count` windows taken after `first` others since the run began: (count, seq_len + 1) int64."""
        batch = np.empty((count, self.seq_len + 1), dtype=np.int64)
        number, taken = divmod(first, self.windows_per_epoch)
        epoch, row = self._epoch(number), 0
        while row < count:
            if taken >= self.windows_per_epoch:
                # They may cross the end of an epoch: it goes on with the next one's first windows.
                epoch, taken = self._epoch(epoch.number + 1), taken - self.windows_per_epoch
            begins = epoch.windows(taken, count - row) * self.seq_len
            self._tell_feed(epoch, taken)
            self._reader.read_rows(epoch.order, epoch.starts, begins, batch[row : row + len(begins)])
            row, taken = row + len(begins), taken + len(begins)
        return batch

    def stream(self, position: Position, rank: int, world_size: int, prefetch: int = 4) -> ReadAhead[Position]:
        """`take` for ever, read up to `prefetch` steps ahead by a background thread.

        The thread ends when the stream is closed, and what feeds it too; what it raises is raised here.
        """

        def interrupt() -> None:
            for feed in self.feeds:
                feed.close()

        return ReadAhead(lambda at: self.take(at, rank, world_size), position, prefetch, interrupt)

    @property
    def arrived(self) -> int:
        """Grows as long as data arrives."""
        return sum(feed.arrived for feed in self.feeds)

    def _tell_feed(self, epoch: _Epoch, taken: int) -> None:
        """Have the shards fetched that the windows after `taken` others are read from, and those that come then."""
        group = epoch.group(taken)
        if not self.feeds or self._wanted == (epoch.number, group):
            return
        self._wanted = (epoch.number, group)
        first, end = group * self.shuffle_shards, min((group + 1) * self.shuffle_shards, len(epoch.order))
        # The last windows of a group go on in the shards behind it.
        stop = int(np.searchsorted(epoch.starts[:-1], epoch.starts[end] + self.seq_len, side="left"))
        ahead = epoch.order[stop : stop + self._prefetch_shards]
        if (lacking := self._prefetch_shards - len(ahead)) > 0:
            ahead = np.concatenate([ahead, _shuffled(len(epoch.order), self.seed, epoch.number + 1, 0)[:lacking]])
        self.feeds[0].want(epoch.order[first:stop].tolist(), ahead.tolist())

    def _epoch(self, number: int) -> _Epoch:
        # One is kept: the read-ahead thread and a caller may both replace it, and either result is right.
        epoch = self._epoch_cache
        if epoch is None or epoch.number != number:
            epoch = _Epoch(self, number)
            self._epoch_cache = epoch
        return epoch


class _Epoch:
    """One epoch's seeded order."""

    def __init__(self, batches: Batches, number: int) -> None:
        self.number = number
        self.order = _shuffled(len(batches.shards), batches.seed, number, 0)
        lengths = np.array([batches.shards[index].n_tokens for index in self.order], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # (n_shards + 1,) first token of each shard
        # (n_shards + 1,) windows that begin before each shard: also how many are taken when its turn comes
        self.bounds = np.minimum(-(-self.starts // batches.seq_len), batches.windows_per_epoch)
        self._seed = batches.seed
        self._group_size = batches.shuffle_shards
        self._group: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, dtype=np.int64))

    def taken(self, position: Position) -> int:
        """Windows of this epoch taken before `position`."""
        n_shards = len(self.order)
        is_here = 0 <= position.shard < n_shards
        if not is_here or not 0 <= position.window <= self.bounds[-1] - self.bounds[position.shard]:
            raise ValueError(f"{position} is not in an epoch of {n_shards} shards and {self.bounds[-1]} windows")
        return int(self.bounds[position.shard]) + position.window

    def position(self, taken: int) -> Position:
        """The reverse of `taken`; a shard too short for a window of its own is passed over."""
        shard = int(np.searchsorted(self.bounds, taken, side="right")) - 1
        return Position(self.number, shard, taken - int(self.bounds[shard]))

    def window(self, taken: int) -> int:
        """Index in the stream of the window taken after `taken` others."""
        return int(self.windows(taken, 1)[0])

    def group(self, taken: int) -> int:
        """The group of shards that the window taken after `taken` others begins in."""
        return (int(np.searchsorted(self.bounds, taken, side="right")) - 1) // self._group_size

    def windows(self, taken: int, count: int) -> np.ndarray:
        """Indexes of the windows taken after `taken` others (n,) int64: `count` of them, or up to their group's end."""
        group = self.group(taken)
        current, first, shuffled = self._group
        if current != group:
            first = int(self.bounds[group * self._group_size])
            end = int(self.bounds[min((group + 1) * self._group_size, len(self.order))])
            shuffled = _shuffled(end - first, self._seed, self.number, group + 1)
            self._group = (group, first, shuffled)
        return first + shuffled[taken - first : taken - first + count]


class _Reader:
    """Tokens of a stream of shards, one after the other, out of the memory-mapped files."""

    def __init__(self, shards: tuple[Shard, ...], keep_open: bool = True) -> None:
        def tokens(index: int) -> np.ndarray:
            return shards[index].tokens()

        # A feed keeps them open itself: a map that outlives its turn would keep its place on the disk.
        self._tokens = lru_cache(maxsize=MAX_OPEN_SHARDS)(tokens) if keep_open else tokens

    def read_rows(self, order: np.ndarray, starts: np.ndarray, begins: np.ndarray, out: np.ndarray) -> None:
        """Fill each row of `out` (rows, n) with the n tokens of the stream from its own of `begins` (rows,).

        All places are looked up at once: one by one they cost more than the copies.
        """
        places = np.searchsorted(starts[: len(order)], begins, side="right") - 1
        offsets = (begins - starts[places]).tolist()
        for row, (index, offset) in enumerate(zip(order[places].tolist(), offsets, strict=True)):
            piece = self._tokens(index)[offset : offset + out.shape[1]]
            if len(piece) == out.shape[1]:
                out[row] = piece
            else:  # it goes on in the next shard
                self.read(order, starts, int(begins[row]), out[row])

    def read(self, order: np.ndarray, starts: np.ndarray, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with the tokens [start, start + n) of the stream.

        Args:
            order: (shards,) index of each shard in stream order.
            starts: (shards + 1,) or (shards,) where each begins in the stream.
        """
        shard = int(np.searchsorted(starts[: len(order)], start, side="right")) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - int(starts[shard])
            piece = self._tokens(int(order[shard]))[offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1


def validation_batches(shards: Sequence[Shard], seq_len: int, n_sequences: int) -> np.ndarray:
    """`n_sequences` windows spread evenly over the shards, or all where there are fewer: (n, seq_len + 1) int64.

    Raises:
        ShardError: not even one window.
    """
    lengths = [shard.n_tokens for shard in shards]
    n_windows = (sum(lengths) - 1) // seq_len
    count = min(n_sequences, n_windows)
    if count < 1:
        raise ShardError(
            f"{len(shards)} validation shards of {sum(lengths)} tokens give no window of model.seq_len {seq_len}",
            f"Give data.val_source at least {seq_len + 1} tokens, or leave it empty",
        )
    reader, order = _Reader(tuple(shards)), np.arange(len(shards))
    starts = np.cumsum([0, *lengths[:-1]])
    windows = np.empty((count, seq_len + 1), dtype=np.int64)
    for row in range(count):
        reader.read(order, starts, row * n_windows // count * seq_len, windows[row])
    return windows


def _shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) (count,) int64 that depends on `key` alone.

    Sorting raw bits rather than calling `Generator.permutation`: numpy promises the bits of PCG64 for ever, but may
    change what its generators make of them, and a resume would then go on in another order.
    """
    bits = np.random.PCG64(np.random.SeedSequence([part % 2**64 for part in key])).random_raw(count)
    return np.argsort(bits, kind="stable")
