"""Shards in the making: the order is the same however many there are when a step is taken, and who waits is told."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from pretrain import shard_feed
from pretrain.batches import Batches, Position
from pretrain.cache import ShardCache
from pretrain.config import DataConfig
from pretrain.errors import ShardError, StorageError
from pretrain.mixture import Mixture
from pretrain.shard_feed import FeedClosed, GrowingFeed
from pretrain.shards import fetch_shards
from pretrain.storage import LocalStore

LENGTHS = (50, 7, 90, 1, 33, 64, 5, 5, 41)


class Maker:
    """Shards of which each look finds one more; `allowed` of them at most."""

    def __init__(self, folder: Path, lengths: tuple[int, ...] = LENGTHS, allowed: int = 99) -> None:
        (folder / "shards").mkdir(parents=True)
        numbers = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])
        for index, tokens in enumerate(numbers):
            np.savez(folder / "shards" / f"{index:03d}.npz", input_ids=tokens)
        store, data = LocalStore(folder / "shards"), DataConfig(cache_dir=str(folder / "cache"))
        self.whole = fetch_shards(store, data, vocab_size=2**16).shards
        self.cache = ShardCache(store, data, 2**16, None)
        self.infos, self.allowed, self.looks = store.list(), allowed, 0

    def __call__(self, n_known: int) -> tuple[list, bool]:
        self.looks += 1
        stop = min(n_known + 1, self.allowed)
        return list(zip(self.infos, self.whole, strict=True))[n_known:stop], stop == len(self.whole)

    @property
    def feed(self) -> GrowingFeed:
        return GrowingFeed(self.cache, 1, self)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(shard_feed, "POLL_S", 0.001)


def taken(batches: Batches, position: Position, n_steps: int, ranks: int = 1) -> list[tuple[list, Position]]:
    steps = []
    for _ in range(n_steps):
        parts = [batches.take(position, rank, ranks) for rank in range(ranks)]
        position = parts[0][1]
        steps.append((np.concatenate([rows for rows, _ in parts]).tolist(), position))
    return steps


@pytest.mark.parametrize(("group", "seq_len"), [(1, 4), (2, 13), (4, 4), (20, 13)])
def test_the_order_is_that_of_the_whole_from_every_position_on_any_ranks(tmp_path, group, seq_len):
    maker = Maker(tmp_path)
    how = {"seq_len": seq_len, "global_size": 2, "seed": 3, "shuffle_shards": group, "in_order": True}
    whole = taken(Batches(maker.whole, **how), Position(), 60)
    assert whole[-1][1].epoch >= 1
    for begin, ranks in ((0, 1), (0, 2), (5, 1), (9, 2), (30, 1)):
        position = whole[begin - 1][1] if begin else Position()
        feed = maker.feed
        growing = Batches((), **how, feed=feed, prefetch_shards=2)
        assert taken(growing, position, 60 - begin, ranks) == whole[begin:]
        assert growing.is_complete and growing.windows_per_epoch == Batches(maker.whole, **how).windows_per_epoch
        feed.close()


def test_a_step_waits_for_its_group_and_a_window_more_and_for_no_others(tmp_path):
    maker = Maker(tmp_path, (40,) * 8, allowed=3)
    feed = maker.feed
    how = {"seq_len": 4, "global_size": 5, "seed": 3, "shuffle_shards": 2}
    batches = Batches((), **how, in_order=True, feed=feed)
    steps = taken(batches, Position(), 3)
    assert len(batches.shards) == 3 and not batches.is_complete
    first_group = [row[0] for rows, _ in steps for row in rows]
    assert set(first_group) < set(range(0, 80, 4)) and first_group != sorted(first_group)
    failed: list[Exception] = []

    def more() -> None:
        try:
            taken(batches, steps[-1][1], 2)
        except FeedClosed as error:
            failed.append(error)

    thread = threading.Thread(target=more)
    thread.start()
    looks = maker.looks
    while maker.looks < looks + 3:  # it asks again and again
        pass
    feed.close()
    thread.join()
    assert failed
    feed = maker.feed
    maker.allowed = 99
    assert taken(Batches((), **how, in_order=True, feed=feed), steps[-1][1], 2)
    feed.close()


def test_what_the_look_meets_and_too_few_tokens_reach_who_waits(tmp_path):
    def full(_n_known: int) -> tuple[list, bool]:
        raise StorageError("full", "")

    maker = Maker(tmp_path)
    broken = Batches((), seq_len=4, global_size=1, seed=0, feed=GrowingFeed(maker.cache, 1, full))
    with pytest.raises(StorageError, match="full"):
        broken.take(Position(), 0, 1)
    few = Batches((), seq_len=200, global_size=4, seed=0, feed=maker.feed)
    with pytest.raises(ShardError, match=r"9 shards of 296 tokens in all give 1 windows"):
        few.take(Position(), 0, 1)


def test_the_later_epochs_have_a_seeded_order_and_the_first_its_own(tmp_path):
    maker = Maker(tmp_path, (40,) * 8)
    batches = Batches(maker.whole, seq_len=4, global_size=1, seed=1, in_order=True)
    assert batches._epoch(0).order.tolist() == list(range(8))
    assert (
        batches._epoch(1).order.tolist()
        == Batches(maker.whole, seq_len=4, global_size=1, seed=1)._epoch(1).order.tolist()
    )
    seeded = Batches(maker.whole, seq_len=4, global_size=1, seed=1)
    for number in (1, 2):
        order = batches._epoch(number).order.tolist()
        assert order == seeded._epoch(number).order.tolist() and order != list(range(8))


def test_a_mixture_grows_with_its_sources(tmp_path):
    makers = {name: Maker(tmp_path / name) for name in ("code", "web")}
    weights, how = {"web": 0.7, "code": 0.3}, {"seq_len": 4, "global_size": 4, "seed": 3, "in_order": True}
    whole = Mixture([(name, each.whole) for name, each in makers.items()], weights, **how)
    feeds = {name: each.feed for name, each in makers.items()}
    growing = Mixture([(name, ()) for name in makers], weights, **how, feeds=feeds)
    assert "is not known yet" in growing.outlook(40)[0] and growing.windows_per_epoch == 0
    assert taken(growing, Position(), 40) == taken(whole, Position(), 40)
    names = [shard.name for shard in growing.shards]
    assert names == [shard.name for shard in whole.shards] and growing.outlook(40) == whole.outlook(40)
    for feed in feeds.values():
        feed.close()
