"""Shards that come while they are read: in which order, how often, how much of the disk they take, and what fails."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain import cache as cache_module
from pretrain import shard_feed
from pretrain.batches import Batches, Position
from pretrain.config import DataConfig
from pretrain.errors import ConfigError, ShardError, StorageError
from pretrain.files import crc32c_of_file, crc32c_of_open
from pretrain.manifest import DataManifest, ShardEntry
from pretrain.room import Room
from pretrain.shard_feed import FeedClosed
from pretrain.shards import fetch_shards, open_shards
from pretrain.storage import LocalStore

N_SHARDS, TOKENS = 8, 1000
SHARD_BYTES = 2 * TOKENS
BOUND = {"cache_gb": 14_000 / 1e9}  # holds six or seven of the eight


class Bucket:
    """Objects that must be downloaded; counts them, lets each through when told, and breaks some."""

    url = "gs://bucket/data"

    def __init__(self, root):
        self.root, self.local = root, LocalStore(root)
        self.downloaded: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}

    def list(self, prefix=""):
        infos = self.local.list(prefix)
        return [dataclasses.replace(info, crc32c=crc32c_of_file(self.root / info.name), generation=1) for info in infos]

    def read_bytes(self, name, max_bytes=0):
        return self.local.read_bytes(name, max_bytes)

    def download(self, name, path, on_bytes=None):
        self.downloaded.append(name)
        if name in self.gates:
            assert self.gates[name].wait(120)
        if name in self.broken:
            raise self.broken[name]
        return self.local.download(name, path, on_bytes)


def name_of(index):
    return f"{index}.npz"


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(shard_feed, "POLL_S", 0.005)
    monkeypatch.setattr(shard_feed, "NO_HURRY_S", 0.01)
    monkeypatch.setattr(cache_module, "POLL_S", 0.005)


@pytest.fixture
def source(tmp_path):
    """Eight shards of 1000 tokens each, a different number in every place, and their manifest."""
    root = tmp_path / "source"
    root.mkdir()
    for index, tokens in enumerate(np.split(np.arange(N_SHARDS * TOKENS, dtype=np.uint16), N_SHARDS)):
        np.savez(root / name_of(index), input_ids=tokens)
    write_manifest(root)
    return root


def write_manifest(root, **changed):
    entries = [
        ShardEntry(path.name, TOKENS, 1, path.stat().st_size, crc32c_of_file(path))
        for path in sorted(root.glob("*.npz"))
    ]
    entries = [dataclasses.replace(entry, **changed.get(entry.name, {})) for entry in entries]
    (root / "manifest.json").write_text(DataManifest("test", 0, None, tuple(entries)).to_json())


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), download_workers=1)


def opened(source, data, vocab_size=2**16, bucket=None, **more):
    bucket = bucket or Bucket(source)
    return bucket, open_shards(bucket, data, vocab_size=vocab_size, **more)


def on_disk(folder):
    """Bytes of all tokens and unfinished files."""
    sizes = []
    for path in [*folder.rglob("*.bin"), *folder.rglob("*.bin.*.part"), *folder.rglob("*.npz.*part")]:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def until(is_true):
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def batches_of(found, data, **changes):
    options = {"seq_len": 10, "global_size": 8, "seed": 3, "prefetch_shards": data.prefetch_shards, "feed": found.feed}
    return Batches(found.shards, **{**options, "shuffle_shards": data.shuffle_shards, **changes})


def test_nothing_is_fetched_before_it_is_wanted_and_then_in_the_order_of_its_turn(source, data):
    bucket, found = opened(source, data)
    assert bucket.downloaded == [] and found.n_tokens == N_SHARDS * TOKENS
    found.feed.want([5, 2], [7, 0])
    assert found.shards[2].tokens()[:3].tolist() == [2000, 2001, 2002]
    until(lambda: len(bucket.downloaded) == 4)
    assert bucket.downloaded == [name_of(index) for index in (5, 2, 7, 0)]
    found.feed.close()


@pytest.mark.parametrize("at", [0, 999, -1])
def test_a_bit_that_has_turned_in_the_cache_is_never_trained_on(source, data, caplog, at):
    def read(bucket):
        _, found = opened(source, data, bucket=bucket)
        found.feed.want([3], [])
        tokens, path = found.shards[3].tokens().tolist(), found.shards[3].path
        found.feed.close()
        return tokens, path

    first, again = Bucket(source), Bucket(source)
    tokens, path = read(first)
    turned = bytearray(path.read_bytes())
    turned[at] ^= 4
    path.write_bytes(turned)
    assert read(again) == (tokens, path)
    assert first.downloaded == again.downloaded == [name_of(3)]
    assert f"{path} has crc32c" in caplog.text
    read(again)
    assert again.downloaded == [name_of(3)]


def test_the_checksum_of_a_shards_tokens_is_compared_once(source, data, monkeypatch):
    compared = []

    def count(file):
        compared.append(file.name)
        return crc32c_of_open(file)

    monkeypatch.setattr(cache_module, "crc32c_of_open", count)
    _, found = opened(source, data)
    for wanted in ([1], [2], [1], [2]):
        found.feed.want(wanted, [])
        assert len(found.shards[wanted[0]].tokens()) == TOKENS
    assert len(compared) == 2
    found.feed.close()


def test_who_reads_waits_for_the_shard_and_for_no_other(source, data):
    bucket = Bucket(source)
    bucket.gates = {name_of(index): threading.Event() for index in range(N_SHARDS)}
    _, found = opened(source, dataclasses.replace(data, download_workers=2), bucket=bucket)
    found.feed.want([0, 1], [2])
    got = []
    reader = threading.Thread(target=lambda: got.append(found.shards[1].tokens()[0]))
    reader.start()
    until(lambda: len(bucket.downloaded) == 2)
    assert got == []
    bucket.gates[name_of(1)].set()
    reader.join(120)
    assert got == [1000]
    for gate in bucket.gates.values():
        gate.set()
    found.feed.close()


def test_a_resume_fetches_nothing_of_the_past(source, data):
    bucket, found = opened(source, data)
    batches = batches_of(found, dataclasses.replace(data, prefetch_shards=1))
    order = batches._epoch(0).order.tolist()
    batches.take(Position(0, 5, 3), 0, 1)
    until(lambda: len(bucket.downloaded) == 3)
    found.feed.close()
    # the shard of the position, the one that its last window goes on in, and one ahead
    assert bucket.downloaded == [name_of(index) for index in order[5:8]]


def test_at_the_end_of_an_epoch_the_next_ones_first_shards_come(source, data):
    bucket, found = opened(source, data)
    batches = batches_of(found, dataclasses.replace(data, prefetch_shards=2))
    batches.take(Position(0, 7, 0), 0, 1)
    wanted = [batches._epoch(0).order[7], *batches._epoch(1).order[:2]]
    until(lambda: len(bucket.downloaded) == len(set(wanted)))
    assert bucket.downloaded == [name_of(index) for index in dict.fromkeys(wanted)]
    found.feed.close()


@pytest.mark.parametrize("shuffle_shards", [1, 3])
@pytest.mark.parametrize("kind", [Bucket, LocalStore])
def test_under_a_bound_every_batch_is_the_same_and_the_bound_holds(source, data, tmp_path, shuffle_shards, kind):
    whole = fetch_shards(
        LocalStore(source), dataclasses.replace(data, cache_dir=str(tmp_path / "whole")), vocab_size=9999
    )
    data = dataclasses.replace(data, shuffle_shards=shuffle_shards, download_workers=2, **BOUND)
    found = open_shards(kind(source), data, vocab_size=9999)
    assert found.fingerprint == whole.fingerprint
    plain, streamed = batches_of(whole, data, feed=None), batches_of(found, data)
    most, position = 0, Position()
    while position.epoch < 2:
        expected, after = plain.take(position, 0, 1)
        rows, position = streamed.take(position, 0, 1)
        assert position == after and rows.tolist() == expected.tolist()
        most = max(most, on_disk(tmp_path / "cache"))
    assert SHARD_BYTES * shuffle_shards < most <= 14_000
    found.feed.close()


@pytest.mark.parametrize("bound", [{}, BOUND])
def test_the_ranks_of_a_node_fetch_each_shard_once(source, data, bound):
    """Feeds of one process stand for those of several: locks are held against one another all the same."""
    data = dataclasses.replace(data, download_workers=2, **bound)
    bucket, rows = Bucket(source), [[], []]

    def rank(number):
        _, found = opened(source, data, bucket=bucket, local_rank=number, local_world_size=2)
        batches, position = batches_of(found, data), Position()
        while position.epoch == 0:
            taken, position = batches.take(position, number, 2)
            rows[number].append(taken)
            barrier.wait(120)
        found.feed.close()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    targets = np.concatenate([np.concatenate(each) for each in rows])[:, 1:]
    assert len(np.unique(targets)) >= targets.size - 8 * 10  # the last step goes on in the next epoch
    if not bound:
        assert sorted(bucket.downloaded) == [name_of(index) for index in range(N_SHARDS)]
    assert set(bucket.downloaded) == {name_of(index) for index in range(N_SHARDS)}


def test_what_is_known_of_a_shard_outlives_its_tokens(source, data, tmp_path):
    (source / "manifest.json").unlink()
    data = dataclasses.replace(data, **BOUND)
    bucket, found = opened(source, data)
    assert sorted(bucket.downloaded) == [name_of(index) for index in range(N_SHARDS)]  # once, for their counts
    assert len(list((tmp_path / "cache").rglob("*.bin"))) < N_SHARDS
    again, second = opened(source, data)
    assert again.downloaded == [] and second.fingerprint == found.fingerprint
    assert [shard.tokens()[0] for shard in second.shards] == [1000 * index for index in range(N_SHARDS)]
    second.feed.close()


def test_to_skip_damaged_shards_all_are_read_first_and_every_machine_agrees(source, data, tmp_path):
    (source / name_of(3)).write_bytes(b"no zip")
    write_manifest(source)
    data = dataclasses.replace(data, on_bad_shard="skip")
    bucket, found = opened(source, data)
    assert found.skipped == (name_of(3),) and len(set(bucket.downloaded)) == N_SHARDS
    _, elsewhere = opened(source, dataclasses.replace(data, cache_dir=str(tmp_path / "another"), **BOUND))
    assert elsewhere.skipped == found.skipped and elsewhere.fingerprint == found.fingerprint
    plain = fetch_shards(LocalStore(source), dataclasses.replace(data, cache_dir=str(tmp_path / "w")), vocab_size=9999)
    whole, streamed, position = batches_of(plain, data, feed=None), batches_of(elsewhere, data), Position()
    while position.epoch == 0:
        expected, _ = whole.take(position, 0, 1)
        rows, position = streamed.take(position, 0, 1)
        assert rows.tolist() == expected.tolist()
    assert elsewhere.shards[3].tokens()[0] == 4000
    elsewhere.feed.close()


def test_a_shard_that_is_damaged_ends_the_stream_before_its_turn(source, data):
    (source / name_of(6)).write_bytes(b"no zip")
    write_manifest(source)
    _, found = opened(source, data)
    assert len(found.shards) == N_SHARDS
    found.feed.want([1], [6])
    with pytest.raises(ShardError, match=r"6\.npz: found not a readable \.npz"):
        until(lambda: found.shards[1].tokens() is None)
    with pytest.raises(ShardError, match=r"6\.npz"):
        found.feed.want([2], [])


def test_a_count_that_is_not_the_manifests_is_a_shard_error(source, data):
    write_manifest(source, **{name_of(2): {"tokens": 1001}})
    _, found = opened(source, data)
    assert found.n_tokens == N_SHARDS * TOKENS + 1
    with pytest.raises(ShardError, match=r"2\.npz: found 1000 tokens .*expected 1001"):
        found.shards[2].tokens()


def test_an_object_that_is_not_the_manifests_is_told_before_the_first_step(source, data):
    write_manifest(source, **{name_of(2): {"crc32c": "AAAAAA=="}})
    with pytest.raises(ShardError, match=r"2\.npz: found 2\d+ bytes and crc32c .*expected 2\d+ and AAAAAA=="):
        opened(source, data)


def test_ids_outside_the_vocabulary_are_found_when_they_come_and_after_they_are_gone(source, data, tmp_path):
    _, found = opened(source, data, vocab_size=7000)
    with pytest.raises(ShardError, match=r"7\.npz: found token id 7000 at offset 0 .*vocabulary of 7000"):
        found.shards[7].tokens()
    next((tmp_path / "cache").rglob("7.*.bin")).unlink()
    with pytest.raises(ShardError, match=r"7\.npz: found token id 7999, expected ids below 7000"):
        opened(source, data, vocab_size=7000)


@pytest.mark.parametrize("kind", [Bucket, LocalStore])
def test_a_shard_that_changes_under_way_is_told(source, data, kind):
    store = kind(source)
    found = open_shards(store, data, vocab_size=2**16)
    np.savez(source / name_of(4), input_ids=np.arange(TOKENS, dtype=np.uint16))  # as many tokens, others
    with pytest.raises(ShardError, match=r"4\.npz changed since it was listed"):
        found.shards[4].tokens()
    assert not list(Path(data.cache_dir).rglob("4.*.*[!k]"))  # nothing vouches for what was read


def test_a_shard_that_comes_back_with_other_tokens_is_told(source, data, tmp_path):
    """A store without checksums and generations can't tell, and yet an epoch must be what the last one was."""

    class Bare(Bucket):
        def list(self, prefix=""):
            return [dataclasses.replace(info, crc32c="", generation=0) for info in self.local.list(prefix)]

    (source / "manifest.json").unlink()
    _, found = opened(source, data, bucket=Bare(source))
    np.savez(source / name_of(4), input_ids=np.arange(TOKENS, dtype=np.uint16))
    next((tmp_path / "cache").rglob("4.*.bin")).unlink()
    with pytest.raises(ShardError, match=r"4\.npz changed since it was last here"):
        found.shards[4].tokens()


def test_a_bucket_that_fails_is_a_storage_error_and_what_nobody_wants_any_more_is_none(source, data):
    bucket = Bucket(source)
    bucket.broken[name_of(6)] = StorageError("503", "try again")
    bucket.gates[name_of(6)] = threading.Event()
    _, found = opened(source, dataclasses.replace(data, download_workers=2), bucket=bucket)
    found.feed.want([1], [6])
    until(lambda: name_of(6) in bucket.downloaded)
    found.feed.want([1], [])
    bucket.gates[name_of(6)].set()
    assert found.shards[2].tokens()[0] == 2000
    with pytest.raises(StorageError, match="503"):
        found.shards[6].tokens()


def test_closing_wakes_who_waits_and_waits_for_no_download(source, data):
    bucket = Bucket(source)
    bucket.gates = {name_of(index): threading.Event() for index in range(N_SHARDS)}
    _, found = opened(source, data, bucket=bucket)
    stream = batches_of(found, data).stream(Position(), 0, 1)
    until(lambda: bucket.downloaded)
    assert not stream.ready(0.01)
    stream.close()
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(FeedClosed):
        found.shards[0].tokens()
    for gate in bucket.gates.values():
        gate.set()


def test_a_group_of_more_shards_than_files_may_be_open_is_held_all_the_same(tmp_path, data):
    root = tmp_path / "many"
    root.mkdir()
    for index in range(40):
        np.savez(root / f"{index:02d}.npz", input_ids=np.full(100, index))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, before[1]))
    try:
        found = open_shards(LocalStore(root), data, vocab_size=100)
        batches = batches_of(found, data, shuffle_shards=40)
        position = Position()
        while position.epoch == 0:
            _, position = batches.take(position, 0, 1)
        found.feed.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_who_waits_can_tell_that_data_arrives(source, data):
    _, found = opened(source, data)
    batches = batches_of(found, data)
    assert batches.arrived == 0
    batches.take(Position(), 0, 1)
    assert batches.arrived > 0
    found.feed.close()


def test_a_bound_below_what_is_read_at_once_is_refused_with_the_number(source, data):
    small = dataclasses.replace(data, cache_gb=8e-6, shuffle_shards=4)
    with pytest.raises(
        ConfigError, match=r"data\.cache_gb 8e-06 can't hold the 5 shards .*Set --data\.cache_gb to 1\.\de-05"
    ):
        opened(source, small)


def test_what_is_needed_and_has_no_room_for_long_comes_all_the_same(source, data, monkeypatch, caplog):
    data = dataclasses.replace(data, **BOUND)
    _, other = opened(source, data)
    other.feed.want(range(4), [])  # another run, on the same cache
    for index in range(4):
        other.shards[index].tokens()
    _, found = opened(source, data)
    monkeypatch.setattr(shard_feed, "ROOM_PATIENCE_S", 0.05)
    found.feed.want([5, 6, 7], [0])
    assert [found.shards[index].tokens()[0] for index in (5, 6, 7)] == [5000, 6000, 7000]
    assert "above it" in caplog.text
    other.feed.close()
    found.feed.close()


@pytest.mark.parametrize(("now", "ahead"), [([], [4, 5]), ([4, 5], [])], ids=["ahead", "now"])
def test_no_shard_takes_room_that_an_earlier_one_needs(source, data, monkeypatch, now, ahead):
    data = dataclasses.replace(data, **BOUND)
    _, other = opened(source, data)
    other.feed.want(range(4), [])  # leaves room for one more
    for index in range(4):
        other.shards[index].tokens()
    bucket, found = opened(source, data)
    monkeypatch.setattr(shard_feed, "ROOM_PATIENCE_S", 1000.0)  # then the bound would give way
    refused, set_aside = [], Room.set_aside

    def watched(room, *arguments, **options):
        refused.append(not set_aside(room, *arguments, **options))
        return not refused[-1]

    monkeypatch.setattr(Room, "set_aside", watched)
    with found.feed._cache.lock(found.feed._objects[4]):  # another rank is at it, and has no room yet
        found.feed.want(now, ahead)
        until(lambda: refused)
        assert bucket.downloaded == []
    until(lambda: bucket.downloaded)
    assert bucket.downloaded == [name_of(4)]
    other.feed.close()
    found.feed.close()


def test_a_disk_that_fills_up_under_way_is_one_line_and_leaves_nothing_half_written(
    source, data, tmp_path, monkeypatch
):
    def full(self, block):
        raise OSError(errno.ENOSPC, "No space left on device")

    _, found = opened(source, data)
    monkeypatch.setattr("pretrain.cache.CheckedWriter.write", full)
    with pytest.raises(StorageError, match=r"the disk is full"):
        found.shards[2].tokens()
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    until(lambda: not [path for path in left if path.exists() and path.name != ".room.lock"])
