from __future__ import annotations

import threading

import numpy as np
import pytest

from pretrain.batches import Batches, Position, validation_batches
from pretrain.errors import ShardError
from pretrain.shards import Shard


def make_shards(folder, *lengths, dtype="uint16"):
    """Shards whose tokens are 0, 1, 2, … across all of them, so that a token tells where it comes from."""
    shards, first = [], 0
    for index, length in enumerate(lengths):
        path = folder / f"{index}.bin"
        np.arange(first, first + length).astype(np.dtype(dtype)).tofile(path)
        shards.append(Shard(f"{index}.npz", length, path, dtype))
        first += length
    return shards


def steps(batches, position, count, world_size=1):
    """`count` global batches from `position`, the ranks' parts put together, and the position after each."""
    taken = []
    for _ in range(count):
        parts = [batches.take(position, rank, world_size) for rank in range(world_size)]
        assert len({after for _, after in parts}) == 1
        position = parts[0][1]
        taken.append((np.concatenate([part for part, _ in parts]), position))
    return taken


def epoch_windows(batches, epoch=0):
    """All windows of one epoch, read one at a time."""
    one_by_one = Batches(
        batches.shards,
        seq_len=batches.seq_len,
        global_size=1,
        seed=batches.seed,
        shuffle_shards=batches.shuffle_shards,
    )
    return np.concatenate([rows for rows, _ in steps(one_by_one, Position(epoch), one_by_one.windows_per_epoch)])


def random_shape(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 40, size=generator.integers(1, 9))
    seq_len = int(generator.integers(1, 12))
    return [int(n) for n in lengths] + [60], seq_len, int(generator.integers(1, 4)), int(generator.integers(1, 5))


@pytest.mark.parametrize("seed", range(30))
def test_every_token_but_the_first_is_a_target_exactly_once_an_epoch(tmp_path, seed):
    lengths, seq_len, global_size, group = random_shape(seed)
    batches = Batches(
        make_shards(tmp_path, *lengths), seq_len=seq_len, global_size=global_size, seed=seed, shuffle_shards=group
    )
    stream = np.concatenate([batches.shards[index].tokens() for index in batches._epoch(0).order])
    windows = epoch_windows(batches)
    targets = windows[:, 1:].ravel()
    assert len(windows) == batches.windows_per_epoch == (sum(lengths) - 1) // seq_len
    assert sorted(targets) == sorted(stream[1 : 1 + len(windows) * seq_len])
    follower = dict(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
    for window in windows.tolist():
        assert [follower[token] for token in window[:-1]] == window[1:]


@pytest.mark.parametrize("seed", range(8))
def test_a_group_is_taken_to_its_end_before_the_next_begins(tmp_path, seed):
    lengths, seq_len, _, group = random_shape(seed)
    batches = Batches(make_shards(tmp_path, *lengths), seq_len=seq_len, global_size=1, seed=seed, shuffle_shards=group)
    order = batches._epoch(0).order
    owner = np.repeat(np.arange(len(lengths)), lengths)  # shard of each token
    turn = np.argsort(order)[owner]  # place of that shard in the epoch
    groups = [int(turn[window[0]]) // group for window in epoch_windows(batches)]
    assert groups == sorted(groups)


def test_windows_inside_a_shard_are_shuffled_and_shards_are_permuted(tmp_path):
    batches = Batches(make_shards(tmp_path, *[400] * 8), seq_len=4, global_size=1, seed=0)
    firsts = epoch_windows(batches)[:, 0]
    in_stream = np.concatenate([batches.shards[index].tokens() for index in batches._epoch(0).order])[:-4:4]
    assert sorted(firsts) == sorted(in_stream)
    assert (firsts[:100] != in_stream[:100]).mean() > 0.9
    assert batches._epoch(0).order.tolist() != list(range(8))


def test_every_group_is_shuffled_its_own_way(tmp_path):
    batches = Batches(make_shards(tmp_path, *[400] * 4), seq_len=4, global_size=1, seed=0)
    starts = batches._epoch(0).order * 400
    firsts = epoch_windows(batches)[:396, 0]
    orders = {tuple(firsts[shard * 100 : shard * 100 + 96] - starts[shard]) for shard in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("group", [1, 3])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(tmp_path, world_size, group):
    batches = Batches(make_shards(tmp_path, 50, 7, 90, 1, 33), seq_len=5, global_size=8, seed=3, shuffle_shards=group)
    alone, split = steps(batches, Position(), 12), steps(batches, Position(), 12, world_size)
    for (one, one_after), (many, many_after) in zip(alone, split, strict=True):
        assert one.tolist() == many.tolist() and one_after == many_after
        assert one.shape == (8, 6) and one.dtype == np.int64


@pytest.mark.parametrize("group", [1, 2, 100])
def test_a_resume_from_any_position_continues_identically(tmp_path, group):
    shards = make_shards(tmp_path, 50, 7, 90, 1, 33)
    options = {"seq_len": 5, "global_size": 8, "seed": 3, "shuffle_shards": group}
    whole = steps(Batches(shards, **options), Position(), 15)
    assert whole[-1][1].epoch >= 3
    for index, (_, position) in enumerate(whole[:-1]):
        rows, after = Batches(shards, **options).take(position, 0, 1)
        assert rows.tolist() == whole[index + 1][0].tolist() and after == whole[index + 1][1]


def test_steps_go_over_the_end_of_an_epoch_without_losing_a_window(tmp_path):
    batches = Batches(make_shards(tmp_path, 50, 7, 90, 1, 33), seq_len=5, global_size=8, seed=3)
    assert batches.windows_per_epoch == 36
    rows = np.concatenate([rows for rows, _ in steps(batches, Position(), 9)])
    assert rows.tolist() == np.concatenate([epoch_windows(batches, 0), epoch_windows(batches, 1)]).tolist()


def test_order_depends_on_seed_and_epoch(tmp_path):
    shards = make_shards(tmp_path, *[60] * 6)
    orders = [
        epoch_windows(Batches(shards, seq_len=5, global_size=1, seed=seed), epoch)[:, 0].tolist()
        for seed in (0, 1, -1, 2**40)
        for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_is_what_it_always_was(tmp_path):
    batches = Batches(make_shards(tmp_path, *[20] * 6), seq_len=4, global_size=1, seed=1234, shuffle_shards=2)
    assert batches._epoch(0).order.tolist() == [5, 3, 4, 1, 2, 0]
    assert epoch_windows(batches)[:10, 0].tolist() == [68, 112, 100, 108, 116, 64, 60, 104, 76, 72]


def test_positions_count_shards_when_all_their_windows_are_taken(tmp_path):
    batches = Batches(make_shards(tmp_path, 40, 40, 40), seq_len=4, global_size=1, seed=0)
    assert batches.windows_per_epoch == 29  # 10 begin in the first two shards, 9 in the last
    places = [position for _, position in steps(batches, Position(), 30)]
    assert [batches.files_processed(place) for place in places] == [0] * 9 + [1] * 10 + [2] * 9 + [3] * 2
    assert places[8] == Position(0, 0, 9) and places[9] == Position(0, 1, 0)
    assert places[28] == Position(1, 0, 0) and places[29] == Position(1, 0, 1)


def test_a_shard_too_short_for_a_window_is_passed_over_but_read(tmp_path):
    batches = Batches(make_shards(tmp_path, 1, 1, 1, 30, 2), seq_len=10, global_size=1, seed=0)
    taken = steps(batches, Position(), 3)
    assert batches.files_processed(taken[-1][1]) == 5
    stream = np.concatenate([batches.shards[index].tokens() for index in batches._epoch(0).order])
    assert sorted(np.concatenate([rows[0, 1:] for rows, _ in taken])) == sorted(stream[1:31])


def test_shards_of_both_dtypes_mix(tmp_path):
    small = make_shards(tmp_path, 20)[0]
    np.arange(70_000, 70_020).astype(np.uint32).tofile(tmp_path / "wide.bin")
    wide = Shard("wide.npz", 20, tmp_path / "wide.bin", "uint32")
    rows = epoch_windows(Batches([small, wide], seq_len=39, global_size=1, seed=0))
    assert sorted(rows[0]) == [*range(20), *range(70_000, 70_020)]


def test_more_shards_than_open_maps(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.batches.MAX_OPEN_SHARDS", 2)
    batches = Batches(make_shards(tmp_path, *[30] * 9), seq_len=5, global_size=1, seed=0, shuffle_shards=9)
    assert batches._reader._tokens.cache_info().maxsize == 2
    assert len(set(epoch_windows(batches)[:, 1:].ravel().tolist())) == 53 * 5


def test_too_few_tokens_for_one_step_is_a_shard_error_with_the_numbers(tmp_path):
    shards = make_shards(tmp_path, 20, 20)
    Batches(shards, seq_len=13, global_size=3, seed=0)
    with pytest.raises(
        ShardError, match=r"40 tokens in all give 3 windows.*seq_len 13.*global_size 4.*at least 53 tokens"
    ):
        Batches(shards, seq_len=13, global_size=4, seed=0)
    with pytest.raises(ShardError):
        Batches([], seq_len=4, global_size=1, seed=0)


@pytest.mark.parametrize("position", [Position(0, 5), Position(0, 0, 37), Position(0, -1), Position(0, 0, -1)])
def test_positions_of_other_data_are_refused(tmp_path, position):
    batches = Batches(make_shards(tmp_path, 50, 7, 90, 1, 33), seq_len=5, global_size=8, seed=3)
    with pytest.raises(ValueError, match="Position"):
        batches.take(position, 0, 1)


def test_ranks_that_do_not_divide_the_batch_are_refused(tmp_path):
    batches = Batches(make_shards(tmp_path, 50), seq_len=5, global_size=8, seed=3)
    with pytest.raises(ValueError, match="rank 0 of 3"):
        batches.take(Position(), 0, 3)


def test_the_stream_is_take_for_ever(tmp_path):
    batches = Batches(make_shards(tmp_path, 50, 7, 90), seq_len=5, global_size=4, seed=3)
    stream = batches.stream(Position(), 1, 2, prefetch=3)
    position = Position()
    for _ in range(20):
        expected, position = batches.take(position, 1, 2)
        rows, after = next(stream)
        assert rows.tolist() == expected.tolist() and after == position
    stream.close()
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}


def test_the_stream_reads_no_further_ahead_than_told(tmp_path):
    batches = Batches(make_shards(tmp_path, 500), seq_len=5, global_size=1, seed=3)
    taken, original, third = [], batches.take, threading.Event()

    def counted(*args):
        taken.append(args)
        if len(taken) == 3:
            third.set()
        return original(*args)

    batches.take = counted
    stream = batches.stream(Position(), 0, 1, prefetch=2)
    next(stream)
    assert third.wait(120)
    stream.close()
    assert len(taken) == 3


def test_what_the_thread_raises_reaches_the_consumer(tmp_path):
    shards = make_shards(tmp_path, 50)
    batches = Batches(shards, seq_len=5, global_size=4, seed=3)
    shards[0].path.unlink()
    with pytest.raises(FileNotFoundError):
        next(batches.stream(Position(), 0, 1))
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}


def test_validation_takes_the_first_windows_in_order(tmp_path):
    shards = make_shards(tmp_path, 7, 3, 9)
    rows = validation_batches(shards, 4, 2)  # of the windows at 0, 4, 8 and 12
    assert rows.tolist() == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12]] and rows.dtype == np.int64
    assert validation_batches(shards, 4, 3).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    assert validation_batches(shards, 4, 100).shape == (4, 5)
    with pytest.raises(ShardError, match="19 tokens give no window"):
        validation_batches(shards, 19, 1)
