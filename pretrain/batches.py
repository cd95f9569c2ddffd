"""Which tokens a step trains on: a function of (seed, epoch, position), whatever the ranks, micro batch or engine.

An epoch is one stream: the shards in a seeded order, one behind the other. Window i of it is the tokens
[i·T, i·T + T + 1), so every token but the first is a target once, across documents and across shards. A window belongs
to the shard its first token lies in; inside a group of `shuffle_shards` shards the windows are taken in a seeded order.
A resume needs three integers and reads nothing again.

Shards may still be in the making. Then the first epoch takes them in the order in which they are made: what stands in
its first groups follows from the shards of these groups alone. Who asks for more than there is waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from pretrain.epochs import Epoch, Position, shuffled
from pretrain.errors import ShardError
from pretrain.read_ahead import ReadAhead
from pretrain.shard_feed import GrowingFeed, ShardFeed
from pretrain.shards import Shard

__all__ = ["Batches", "Position", "validation_batches"]

MAX_OPEN_SHARDS = 256  # each memory map holds a file descriptor, and a process often has 1024


class Batches:
    """The batches of a run, in order.

    Args:
        shards: the training shards; their order here is part of what the seed means, so give them sorted by name.
        seq_len: T, target tokens in a window.
        global_size: windows in one optimizer step, over all ranks.
        seed: of the order of shards and windows.
        shuffle_shards: consecutive shards whose windows are shuffled together.
        feed: brings the shards, where they are not here yet: it is told which ones come next. From one that grows
            come the shards themselves, as they are made, and `shards` is empty.
        prefetch_shards: shards that it fetches ahead of those which are read.
        in_order: the first epoch takes the shards in their own order instead of a seeded one.

    Raises:
        ShardError: the shards hold fewer windows than one step takes; of shards in the making, by who waits for more.
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
        in_order: bool = False,
    ) -> None:
        self.seq_len = seq_len
        self.global_size = global_size
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self.in_order = in_order
        self.feeds: tuple[ShardFeed, ...] = () if feed is None else (feed,)
        self._epoch_cache: Epoch | None = None
        self._prefetch_shards = prefetch_shards
        self._wanted = (-1, -1)  # (epoch, group of shards) that the feed was told of
        self._growing = feed if isinstance(feed, GrowingFeed) else None
        self._take_over(tuple(shards), is_complete=self._growing is None)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The training shards; so far, where they are still being made."""
        return self._shards

    @property
    def n_tokens(self) -> int:
        """Of all `shards`."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def windows_per_epoch(self) -> int:
        """Windows of all `shards`."""
        return self._windows_per_epoch

    @property
    def is_complete(self) -> bool:
        """Whether `shards` are all that there will be."""
        return self._is_complete

    def files_processed(self, position: Position) -> int:
        """Shards taken to the end since the run began."""
        return position.epoch * len(self.shards) + position.shard

    def windows_before(self, position: Position) -> int:
        """Windows taken since the run began. Raises ValueError where this data doesn't have the position."""
        self._await(lambda epoch: position.epoch == 0 and epoch.has(position))
        return position.epoch * self.windows_per_epoch + self._epoch(position.epoch).taken(position)

    def position_after(self, windows: int) -> Position:
        """The reverse of `windows_before`; it names the shard whose windows come next."""
        self._await(lambda epoch: windows < epoch.n_windows)
        epoch, taken = self._split(windows)
        return epoch.position(taken)

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
        row = 0
        while row < count:
            # They may cross the end of an epoch: it goes on with the next one's first windows.
            epoch, taken = self.located(first + row)
            begins = epoch.windows(taken, count - row) * self.seq_len
            self._tell_feed(epoch, taken)
            self._reader.read_rows(epoch.order, epoch.starts, begins, batch[row : row + len(begins)])
            row += len(begins)
        return batch

    def located(self, windows: int) -> tuple[Epoch, int]:
        """The epoch of the window taken after `windows` others since the run began, and how many of these it has."""
        self._await(lambda epoch: windows < epoch.n_settled)
        return self._split(windows)

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

    def _tell_feed(self, epoch: Epoch, taken: int) -> None:
        """Have the shards fetched that the windows after `taken` others are read from, and those that come then."""
        group = epoch.group(taken)
        if not self.feeds or self._wanted == (epoch.number, group):
            return
        self._wanted = (epoch.number, group)
        if not self.is_complete:
            self._grow()
            epoch = self._epoch(0)
        first, end = group * self.shuffle_shards, min((group + 1) * self.shuffle_shards, len(epoch.order))
        # The last windows of a group go on in the shards behind it.
        stop = int(np.searchsorted(epoch.starts[:-1], epoch.starts[end] + self.seq_len, side="left"))
        ahead = epoch.order[stop : stop + self._prefetch_shards]
        if (lacking := self._prefetch_shards - len(ahead)) > 0 and self.is_complete:
            ahead = np.concatenate([ahead, shuffled(len(epoch.order), self.seed, epoch.number + 1, 0)[:lacking]])
        self.feeds[0].want(epoch.order[first:stop].tolist(), ahead.tolist())

    def _epoch(self, number: int) -> Epoch:
        # One is kept: the read-ahead thread and a caller may both replace it, and either result is right.
        epoch, shards = self._epoch_cache, self.shards
        if epoch is None or epoch.number != number or len(epoch.order) != len(shards):
            how = {"seq_len": self.seq_len, "seed": self.seed, "group_size": self.shuffle_shards}
            lengths = np.array([shard.n_tokens for shard in shards], dtype=np.int64)
            epoch = Epoch(number, lengths, **how, in_order=self.in_order and number == 0)
            self._epoch_cache = epoch
        return epoch

    def _split(self, windows: int) -> tuple[Epoch, int]:
        """As `located`, without waiting."""
        number, taken = divmod(windows, self.windows_per_epoch) if self.is_complete else (0, windows)
        return self._epoch(number), taken

    # ---- shards in the making ----

    def _await(self, is_enough: Callable[[Epoch], bool]) -> None:
        """Wait until the first epoch is enough, or nothing is left to be made. Raises as `GrowingFeed.await_more`."""
        while self._growing and not self.is_complete and not is_enough(self._epoch(0)):
            self._growing.await_more(len(self.shards))
            self._grow()

    def _grow(self) -> None:
        """Take over what was made since."""
        if self._growing:
            self._take_over(*self._growing.made())

    def _take_over(self, shards: tuple[Shard, ...], is_complete: bool) -> None:
        self._shards = shards
        self._reader = _Reader(shards, keep_open=not self.feeds)
        self._windows_per_epoch = max(self.n_tokens - 1, 0) // self.seq_len
        if is_complete and self.windows_per_epoch < self.global_size:
            raise ShardError(
                f"{len(shards)} shards of {self.n_tokens} tokens in all give {self.windows_per_epoch} windows of "
                f"model.seq_len {self.seq_len}, fewer than one step of batch.global_size {self.global_size} takes",
                f"Give at least {self.global_size * self.seq_len + 1} tokens, or lower model.seq_len or "
                "batch.global_size",
            )
        self._is_complete = is_complete  # last: another thread may look


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
