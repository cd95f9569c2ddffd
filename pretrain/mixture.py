"""Several sources mixed by weight, exact to the window over any stretch of a run.

    mixture = Mixture([("web", web_shards), ("code", code_shards)], {"web": 0.7, "code": 0.3}, seq_len=…, …)

After n windows of a run a source of share w has given ⌊w·n⌋ or ⌈w·n⌉ of them. Its window j (from 0) may not come before
⌊j/w⌋ others were taken and has to be among the first ⌈(j + 1)/w⌉; of the sources that may give one, the one that has to
do so first comes next. That keeps every deadline: unit jobs by earliest deadline, as Pfair schedules them (Baruah et
al. 1996). To take the source that lags most, the simpler rule, can leave one of many more than a window behind.

Each source has an epoch and a seeded order of its own, as if it were alone: what is mixed with it changes neither. The
position holds every source's, and the order is a function of it alone, whatever the ranks, micro batch or engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np

from pretrain.batches import Batches, Position
from pretrain.config import DataConfig, StorageConfig
from pretrain.errors import ShardError
from pretrain.manifest import MANIFEST_NAME, DataManifest
from pretrain.raw_shards import open_made
from pretrain.raw_source import check_prepared, prepared
from pretrain.shard_feed import GrowingFeed, ShardFeed
from pretrain.shards import Shard, ShardSet, open_shards
from pretrain.storage import open_store


@dataclass(frozen=True)
class MixturePosition(Position):
    """What has been taken of a mixture so far: `window` in all, `epoch` whole passes over every source."""

    sources: tuple[Position, ...] = ()
    """What has been taken of each source, in the order of their names."""


def position_from(tree: Mapping[str, Any]) -> Position:
    """A position, of a mixture or not, as JSON holds it. Raises TypeError or KeyError where it is none."""
    if "sources" not in tree:
        return Position(**tree)
    return MixturePosition(**{**tree, "sources": tuple(Position(**each) for each in tree["sources"])})


def as_given(data: DataConfig) -> list[tuple[str, DataConfig]]:
    """Each source as the settings of a run that has no other, by name in order; without a mixture, the one under ''."""
    if not data.sources:
        return [("", data)]
    ordered = sorted(data.sources, key=lambda each: each.title)
    return [(each.title, replace(data, source=each.source, sources=())) for each in ordered]


def alone(data: DataConfig) -> list[tuple[str, DataConfig]]:
    """As `as_given`; of raw text, the shards that are made of it."""
    return [(name, prepared(one)) for name, one in as_given(data)]


def open_for_a_look(
    data: DataConfig, storage: StorageConfig, *, vocab_size: int, may_be_larger: bool
) -> dict[str, ShardSet]:
    """The shards of each source by its name, beside a training or after it; of raw text those that are made.

    Args:
        vocab_size, may_be_larger: as of `open_shards`.

    Raises:
        ShardError: there are none, or raw text is not prepared; where it is prepared ahead, by who asks for more of it
            than there is.
    """
    if data.prepares_ahead:
        return {name: open_made(one, vocab_size=vocab_size, is_in_work=False) for name, one in as_given(data)}
    for _, one in as_given(data):
        check_prepared(one)
    how: dict[str, Any] = {"vocab_size": vocab_size, "may_be_larger": may_be_larger}
    return {name: open_shards(open_store(one.source, storage), one, **how) for name, one in alone(data)}


def shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as exact shares of 1: those of the decimals that were written, not of the nearest floats."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


class Schedule:
    """Which source gives the next window.

    Args:
        parts: the share of each source; they add up to 1.
    """

    def __init__(self, parts: Sequence[Fraction]) -> None:
        self.period = lcm(*(part.denominator for part in parts))  # after so many windows every share is exact
        self.parts = [int(part * self.period) for part in parts]

    def after(self, counts: Sequence[int], windows: int) -> np.ndarray:
        """The sources (windows,) int64 of the windows that follow where each has given `counts`."""
        taken, done = sum(counts), list(counts)
        chosen = np.empty(windows, dtype=np.int64)
        ready = [count * self.period // part for count, part in zip(done, self.parts, strict=True)]
        due = [-(-(count + 1) * self.period // part) for count, part in zip(done, self.parts, strict=True)]
        everyone = range(len(self.parts))
        for place in range(windows):
            source = min((each for each in everyone if ready[each] <= taken + place), key=due.__getitem__)
            chosen[place] = source
            done[source] += 1
            ready[source] = done[source] * self.period // self.parts[source]
            due[source] = -(-(done[source] + 1) * self.period // self.parts[source])
        return chosen

    def counts(self, windows: int) -> list[int]:
        """Windows of each source among the first so many: whole periods are counted, the rest is gone through."""
        periods, rest = divmod(windows, self.period)
        given = np.bincount(self.after([0] * len(self.parts), rest), minlength=len(self.parts))
        return [periods * part + int(count) for part, count in zip(self.parts, given, strict=True)]


class Mixture(Batches):
    """The batches of a run on several sources; see Batches for the methods.

    Args:
        sources: (name, its shards sorted by name), in the order of the names.
        weights: of each name.
        seq_len, global_size, seed, shuffle_shards, prefetch_shards, in_order: as of Batches; each source has the same
            seed.
        feeds: what brings the shards of a name, where they are not here yet.

    Raises:
        ShardError: a source holds not even one window.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Sequence[Shard]]],
        weights: Mapping[str, float],
        *,
        seq_len: int,
        global_size: int,
        seed: int,
        shuffle_shards: int = 1,
        feeds: Mapping[str, ShardFeed] | None = None,
        prefetch_shards: int = 0,
        in_order: bool = False,
    ) -> None:
        self.seq_len, self.global_size, self.seed, self.shuffle_shards = seq_len, global_size, seed, shuffle_shards
        self.names = tuple(name for name, _ in sources)
        how: dict[str, Any] = {"seq_len": seq_len, "global_size": 1, "seed": seed, "in_order": in_order}
        how |= {"shuffle_shards": shuffle_shards, "prefetch_shards": prefetch_shards}
        for name, shards in sources:
            is_growing = isinstance((feeds or {}).get(name), GrowingFeed)
            if (n_tokens := sum(shard.n_tokens for shard in shards)) <= seq_len and not is_growing:
                raise ShardError(
                    f"source {name} of the mixture has {n_tokens} tokens, no window of model.seq_len {seq_len}",
                    f"Give it at least {seq_len + 1}, or leave it out",
                )
        self.sources = tuple(Batches(shards, **how, feed=(feeds or {}).get(name)) for name, shards in sources)
        self.feeds = tuple(feed for source in self.sources for feed in source.feeds)
        self.shares = [shares(weights)[name] for name in self.names]
        self._schedule = Schedule(self.shares)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Of all sources; so far, where they are still being made."""
        return tuple(shard for source in self.sources for shard in source.shards)

    @property
    def windows_per_epoch(self) -> int:
        """Windows of all `shards`."""
        return sum(source.windows_per_epoch for source in self.sources)

    @property
    def is_complete(self) -> bool:
        """Whether `shards` are all that there will be."""
        return all(source.is_complete for source in self.sources)

    def windows_of(self, position: Position) -> dict[str, int]:
        """Windows taken of each source since the run began. Raises ValueError where there is no such position."""
        return dict(zip(self.names, self._counts(position), strict=True))

    def outlook(self, steps: int) -> list[str]:
        """A line on each source: its share, and how often a run of so many steps will have seen it."""
        lines = []
        for name, share, source in zip(self.names, self.shares, self.sources, strict=True):
            windows = float(share) * steps * self.global_size
            line = f"source {name}: {float(share):.2%} of the windows, "
            if source.is_complete:
                epochs = windows / source.windows_per_epoch
                line += f"{source.windows_per_epoch:,} of its own, so about {epochs:.2f} epochs by step {steps:,}"
            else:
                line += f"about {windows:,.0f} by step {steps:,}; how many it has is not known yet"
            lines.append(line)
        return lines

    def files_processed(self, position: Position) -> int:
        """Shards of all sources taken to the end since the run began."""
        return sum(
            source.files_processed(each) for source, each in zip(self.sources, self._of_each(position), strict=True)
        )

    def windows_before(self, position: Position) -> int:
        """Windows taken since the run began. Raises ValueError where this data doesn't have the position."""
        return sum(self._counts(position))

    def position_after(self, windows: int) -> Position:
        """The reverse of `windows_before`."""
        return self._position(self._schedule.counts(windows))

    def origins(self, position: Position) -> list[tuple[str, Batches, int]]:
        """Of each window of the step at `position`: its source's name, that source, and its windows taken before."""
        counts, found = self._counts(position), []
        for source in self._schedule.after(counts, self.global_size).tolist():
            found.append((self.names[source], self.sources[source], counts[source]))
            counts[source] += 1
        return found

    def shards_between(self, begin: Position, end: Position) -> list[str]:
        """SOURCE/SHARD of the shards that the windows from one position up to another begin in, source by source."""
        both = zip(self.names, self.sources, self._of_each(begin), self._of_each(end), strict=True)
        return [f"{name}/{shard}" for name, source, first, last in both for shard in source.shards_between(first, last)]

    def take(self, position: Position, rank: int, world_size: int) -> tuple[np.ndarray, Position]:
        """One rank's windows of the step at `position`, and the position after it; see Batches.take."""
        if self.global_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} can't split a global batch of {self.global_size}")
        counts, count = self._counts(position), self.global_size // world_size
        chosen = self._schedule.after(counts, self.global_size)
        before, mine = chosen[: rank * count], chosen[rank * count :][:count]
        batch = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(mine == number)
            if len(rows):
                batch[rows] = source.read(counts[number] + int((before == number).sum()), len(rows))
        given = np.bincount(chosen, minlength=len(counts)).tolist()
        return batch, self._position([had + more for had, more in zip(counts, given, strict=True)])

    def _of_each(self, position: Position) -> tuple[Position, ...]:
        """The position of each source."""
        if isinstance(position, MixturePosition) and len(position.sources) == len(self.sources):
            return position.sources
        if position == Position():
            return (Position(),) * len(self.sources)
        raise ValueError(f"{position} is not one of a mixture of {len(self.sources)} sources")

    def _counts(self, position: Position) -> list[int]:
        return [source.windows_before(each) for source, each in zip(self.sources, self._of_each(position), strict=True)]

    def _position(self, counts: Sequence[int]) -> MixturePosition:
        each = tuple(source.position_after(count) for source, count in zip(self.sources, counts, strict=True))
        return MixturePosition(min(at.epoch for at in each), 0, sum(counts), each)


def lay_out(data: DataConfig, shards: Mapping[str, ShardSet], *, seq_len: int, global_size: int, seed: int) -> Batches:
    """The batches of a run on what was found under each name of `alone`.

    Raises:
        ShardError: too few tokens.
    """
    how: dict[str, Any] = {"seq_len": seq_len, "global_size": global_size, "seed": seed}
    how |= {"shuffle_shards": data.shuffle_shards, "prefetch_shards": data.prefetch_shards}
    how["in_order"] = data.prepares_ahead
    if not data.sources:
        return Batches(shards[""].shards, **how, feed=shards[""].feed)
    feeds = {name: each.feed for name, each in shards.items() if each.feed}
    weights = {each.title: each.weight for each in data.sources}
    return Mixture([(name, each.shards) for name, each in shards.items()], weights, **how, feeds=feeds)


def check_same_tokenizer(manifests: Mapping[str, DataManifest | None], tokenizers: Mapping[str, str | None]) -> None:
    """Refuse sources whose tokens mean different things.

    Args:
        manifests: of each source by its address; None where it has none.
        tokenizers: the content of the tokenizer.json of each; None where it has none.

    Raises:
        ShardError: naming two sources that differ, and in what.
    """
    told = {"tokenizer": "", "vocab_size": 0, "eot_id": None}  # what a manifest says that doesn't know
    for field, unknown in told.items():
        known = {at: getattr(each, field) for at, each in manifests.items() if each and getattr(each, field) != unknown}
        for at, value in known.items():
            first = next(iter(known))
            if value != known[first]:
                _differ(f"{first}: {MANIFEST_NAME} says {field} {known[first]}, {at}: {value}")
    texts = {at: text for at, text in tokenizers.items() if text is not None}
    for at, text in texts.items():
        if text != texts[first := next(iter(texts))]:
            _differ(f"{first} and {at} have different tokenizer.json files")


def _differ(what: str) -> None:
    mend = "Prepare them with one: scripts/prepare_data.py --tokenizer"
    raise ShardError(f"data.sources of different tokenizers: {what}", mend)
