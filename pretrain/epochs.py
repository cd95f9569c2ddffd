"""The order of one epoch: shards one behind the other, and inside a group of them windows in a seeded order.

epoch = Epoch(0, np.array([500, 300, 400]), seq_len=32, seed=1, group_size=2)
epoch.windows(taken=7, count=4)      # indexes in the epoch's stream of tokens
epoch.position(7)                    # the same place as a Position
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Position:
    """What has been taken so far; the beginning of a run is all zeros."""

    epoch: int = 0
    shard: int = 0
    """Index in the epoch's seeded order of shards."""
    window: int = 0
    """Windows taken since that shard's began."""


class Epoch:
    """One epoch's seeded order, of the shards that are known.

    Args:
        number: of the epoch, from 0.
        lengths: (n_shards,) int64 tokens of each shard.
        seq_len: target tokens in a window.
        seed: of the order.
        group_size: consecutive shards whose windows are shuffled together.
        in_order: the shards come in their own order instead of a seeded one.
    """

    def __init__(
        self, number: int, lengths: np.ndarray, *, seq_len: int, seed: int, group_size: int, in_order: bool = False
    ) -> None:
        self.number = number
        n_shards = len(lengths)
        self.order = np.arange(n_shards) if in_order else shuffled(n_shards, seed, number, 0)
        lengths = lengths[self.order]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # (n_shards + 1,) first token of each shard
        self.n_windows = max(int(self.starts[-1]) - 1, 0) // seq_len
        # (n_shards + 1,) windows that begin before each shard: also how many are taken when its turn comes
        self.bounds = np.minimum(-(-self.starts // seq_len), self.n_windows)
        self._seq_len = seq_len
        self._seed = seed
        self._group_size = group_size
        self._group: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, dtype=np.int64))

    @property
    def n_settled(self) -> int:
        """Windows of whole groups that have the tokens of a window behind them: shards to come change none of these."""
        ends = self.starts[self._group_size :: self._group_size]
        n_groups = int(np.searchsorted(ends + self._seq_len, self.starts[-1], side="right"))
        return int(self.bounds[n_groups * self._group_size])

    def has(self, position: Position) -> bool:
        """Whether `position` is within these shards, and stays what it is whatever comes behind them."""
        if not 0 <= position.shard < len(self.order):
            return False
        before = -(-int(self.starts[position.shard]) // self._seq_len)
        return 0 <= position.window <= self.n_windows - before

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
        current, first, order = self._group
        if current != group:
            first = int(self.bounds[group * self._group_size])
            end = int(self.bounds[min((group + 1) * self._group_size, len(self.order))])
            order = shuffled(end - first, self._seed, self.number, group + 1)
            self._group = (group, first, order)
        return first + order[taken - first : taken - first + count]


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) (count,) int64 that depends on `key` alone.

    Sorting raw bits rather than calling `Generator.permutation`: numpy promises the bits of PCG64 for ever, but may
    change what its generators make of them, and a resume would then go on in another order.
    """
    bits = np.random.PCG64(np.random.SeedSequence([part % 2**64 for part in key])).random_raw(count)
    return np.argsort(bits, kind="stable")
