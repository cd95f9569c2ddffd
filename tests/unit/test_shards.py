from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest

from pretrain import shards as shards_module
from pretrain.batches import Batches, Position
from pretrain.config import DataConfig
from pretrain.errors import ShardError, StorageError
from pretrain.files import crc32c_of_file
from pretrain.manifest import DataManifest, ShardEntry
from pretrain.shards import fetch_shards, open_shards
from pretrain.storage import LocalStore, ObjectInfo


class RemoteStore:
    """A bucket as shards.py sees it: objects that must be downloaded, with checksums; it counts the downloads."""

    url = "gs://bucket/data"

    def __init__(self, root):
        self.root = root
        self.local = LocalStore(root)
        self.downloaded = []

    def list(self, prefix=""):
        infos = self.local.list(prefix)
        return [dataclasses.replace(info, crc32c=crc32c_of_file(self.root / info.name), generation=1) for info in infos]

    def read_bytes(self, name, max_bytes=0):
        return self.local.read_bytes(name, max_bytes)

    def download(self, name, path, on_bytes=None):
        self.downloaded.append(name)
        return self.local.download(name, path, on_bytes)


@pytest.fixture
def source(tmp_path):
    """Three shards of 100, 101 and 102 tokens in three dialects, one of them in a nested folder."""
    root = tmp_path / "source"
    (root / "b").mkdir(parents=True)
    np.savez(root / "a_0.npz", input_ids=np.arange(100, dtype=np.uint16), sequence_lengths=np.array([60, 40]))
    rows = np.full((2, 90), -1)
    rows[0, :90], rows[1, :11] = np.arange(90), np.arange(11)
    np.savez_compressed(root / "b" / "a_1.npz", input_ids=rows, attention_mask=rows >= 0)
    np.savez_compressed(root / "c_2.npz", tokens=np.arange(102).reshape(2, 51, 1))
    return root


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), download_workers=2)


def files(folder, pattern):
    return sorted(path for path in folder.rglob(pattern))


def write_manifest(root, **changes):
    counts = {"a_0.npz": 100, "b/a_1.npz": 101, "c_2.npz": 102}
    entries = tuple(
        ShardEntry(name, tokens, 2, (root / name).stat().st_size, crc32c_of_file(root / name))
        for name, tokens in counts.items()
    )
    manifest = dataclasses.replace(DataManifest("bpe-103", 103, 0, entries, 4.5), **changes)
    (root / "manifest.json").write_text(manifest.to_json())
    return manifest


@pytest.mark.parametrize("kind", [LocalStore, RemoteStore])
def test_shards_are_cached_once_and_mapped_from_then_on(source, data, tmp_path, kind):
    store = kind(source)
    first = fetch_shards(store, data, vocab_size=103)
    assert [(shard.name, shard.n_tokens, shard.dtype) for shard in first.shards] == [
        ("a_0.npz", 100, "uint16"),
        ("b/a_1.npz", 101, "uint16"),
        ("c_2.npz", 102, "uint16"),
    ]
    assert first.n_tokens == 303 and first.skipped == () and first.manifest is None
    assert first.shards[1].tokens().tolist() == [*range(90), *range(11)]
    assert not first.shards[0].tokens().flags.writeable
    assert len(files(tmp_path / "cache", "*.*")) == 6  # .bin and .json of each; no .npz, nothing temporary
    written = [path.stat().st_mtime_ns for path in files(tmp_path / "cache", "*.bin")]
    again = kind(source)
    assert fetch_shards(again, data, vocab_size=103) == first
    assert [path.stat().st_mtime_ns for path in files(tmp_path / "cache", "*.bin")] == written
    assert getattr(again, "downloaded", []) == []


def test_the_source_folder_is_only_read(source, data):
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    fetch_shards(LocalStore(source), data, vocab_size=103)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


def test_pattern_and_max_files_choose_by_name(source, data):
    (source / "notes.txt").write_text("not a shard")

    def names(**changes):
        found = fetch_shards(LocalStore(source), dataclasses.replace(data, **changes), vocab_size=103)
        return [shard.name for shard in found.shards]

    assert names(pattern="a_*") == ["a_0.npz", "b/a_1.npz"]
    assert names(max_files=2) == ["a_0.npz", "b/a_1.npz"]
    assert names(pattern="*") == ["a_0.npz", "b/a_1.npz", "c_2.npz"]


def test_no_shards_says_what_is_there_instead(source, data, tmp_path):
    with pytest.raises(ShardError, match=r"match 'x_\*', found 3 other objects, such as a_0\.npz, b/a_1\.npz"):
        fetch_shards(LocalStore(source), dataclasses.replace(data, pattern="x_*"), vocab_size=103)
    with pytest.raises(ShardError, match=r"nowhere.*found nothing"):
        fetch_shards(LocalStore(tmp_path / "nowhere"), data, vocab_size=103)


@pytest.mark.parametrize("damage", ["short", "gone", "no record", "torn record"])
def test_a_torn_cache_file_is_rebuilt(source, data, tmp_path, damage):
    first = fetch_shards(LocalStore(source), data, vocab_size=103)
    binary = first.shards[0].path
    record = binary.with_suffix(".json")
    if damage == "short":
        os.truncate(binary, 50)
    elif damage == "torn record":
        record.write_text(record.read_text()[:20])
    else:
        (binary if damage == "gone" else record).unlink()
    assert fetch_shards(LocalStore(source), data, vocab_size=103) == first
    assert first.shards[0].tokens().tolist() == list(range(100))


def test_a_replaced_object_is_read_again(source, data):
    first = fetch_shards(RemoteStore(source), data, vocab_size=103)
    np.savez(source / "a_0.npz", input_ids=np.arange(50))
    store = RemoteStore(source)
    second = fetch_shards(store, data, vocab_size=103)
    assert store.downloaded == ["a_0.npz"] and second.shards[0].n_tokens == 50
    assert second.fingerprint != first.fingerprint


def test_another_pad_token_is_another_shard(source, data):
    np.savez(source / "a_0.npz", input_ids=np.array([[1, 2, 9, 9]]))
    padded = fetch_shards(LocalStore(source), data, vocab_size=103)
    stripped = fetch_shards(LocalStore(source), dataclasses.replace(data, pad_token_id=9), vocab_size=103)
    assert (padded.shards[0].n_tokens, stripped.shards[0].n_tokens) == (4, 2)


def test_the_fingerprint_is_of_the_files_not_of_where_they_are_or_what_counts_their_tokens(source, data, tmp_path):
    first = fetch_shards(LocalStore(source), data, vocab_size=103)
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    write_manifest(copy)
    assert fetch_shards(RemoteStore(copy), data, vocab_size=103).fingerprint == first.fingerprint
    fresh = dataclasses.replace(data, cache_dir=str(tmp_path / "another cache"))
    assert open_shards(RemoteStore(copy), fresh, vocab_size=103).fingerprint == first.fingerprint
    (copy / "manifest.json").unlink()
    shutil.move(copy / "c_2.npz", copy / "d_2.npz")
    assert fetch_shards(RemoteStore(copy), data, vocab_size=103).fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", [LocalStore, RemoteStore])
def test_a_bad_shard_stops_the_run_or_is_left_out(source, data, kind):
    (source / "b" / "a_1.npz").write_bytes(b"no zip")
    for _ in range(2):  # the second time the verdict comes from the cache
        with pytest.raises(ShardError, match=r"b/a_1\.npz: found not a readable \.npz"):
            fetch_shards(kind(source), data, vocab_size=103)
        kept = fetch_shards(kind(source), dataclasses.replace(data, on_bad_shard="skip"), vocab_size=103)
        assert kept.skipped == ("b/a_1.npz",)
        assert [shard.name for shard in kept.shards] == ["a_0.npz", "c_2.npz"]


def test_ids_outside_the_vocabulary_follow_the_same_policy(source, data):
    for _ in range(2):
        with pytest.raises(ShardError, match=r"c_2\.npz: found token id 101 at offset 101 .*vocabulary of 101"):
            fetch_shards(LocalStore(source), data, vocab_size=101)
    kept = fetch_shards(LocalStore(source), dataclasses.replace(data, on_bad_shard="skip"), vocab_size=101)
    assert kept.skipped == ("c_2.npz",)
    assert fetch_shards(LocalStore(source), data, vocab_size=102).skipped == ()


def test_nothing_but_bad_shards_is_an_error_even_when_skipping(source, data):
    with pytest.raises(ShardError, match="all 3 shards are bad"):
        fetch_shards(LocalStore(source), dataclasses.replace(data, on_bad_shard="skip"), vocab_size=2)


def test_the_manifest_comes_along_and_its_vocabulary_must_be_the_models(source, data):
    manifest = write_manifest(source)
    assert fetch_shards(LocalStore(source), data, vocab_size=103).manifest == manifest
    with pytest.raises(
        ShardError, match=r"vocab_size 103 \(tokenizer bpe-103\).*model\.vocab_size 104.*vocab_size 103"
    ):
        fetch_shards(LocalStore(source), data, vocab_size=104)
    write_manifest(source, vocab_size=0)
    fetch_shards(LocalStore(source), data, vocab_size=104)


@pytest.mark.parametrize("kind", [LocalStore, RemoteStore])
def test_a_shard_that_is_not_the_manifests_is_bad(source, data, kind):
    write_manifest(source)
    np.savez(source / "a_0.npz", input_ids=np.arange(99))
    with pytest.raises(ShardError, match=r"a_0\.npz: found 99 tokens .*expected 100 "):
        fetch_shards(kind(source), data, vocab_size=103)
    assert fetch_shards(kind(source), dataclasses.replace(data, on_bad_shard="skip"), vocab_size=103).skipped == (
        "a_0.npz",
    )


def test_a_shard_that_the_manifest_names_must_be_there(source, data):
    write_manifest(source)
    (source / "a_0.npz").unlink()
    with pytest.raises(ShardError, match=r"names 1 shards that are not there, such as a_0\.npz"):
        fetch_shards(LocalStore(source), data, vocab_size=103)
    kept = fetch_shards(LocalStore(source), dataclasses.replace(data, on_bad_shard="skip"), vocab_size=103)
    assert kept.skipped == ("a_0.npz",)
    fetch_shards(LocalStore(source), dataclasses.replace(data, pattern="c_*"), vocab_size=103)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "list, expected an object"),
        ('{"tokenizer": "x", "vocab_size": "8192", "shards": []}', "vocab_size is '8192', expected a count"),
        ('{"tokenizer": "x", "vocab_size": -1, "shards": []}', "expected a count"),
        ('{"tokenizer": "x", "vocab_size": 1, "shards": [{"name": "a"}]}', r"shards\[0\]: tokens is None"),
        ('{"tokenizer": "x", "vocab_size": 1, "shards": [], "unigram_entropy": NaN}', "finite"),
    ],
)
def test_a_damaged_manifest_is_named(source, data, text, says):
    (source / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=rf"manifest\.json.*{says}"):
        fetch_shards(LocalStore(source), data, vocab_size=103)


def test_a_manifest_is_read_back_equal_and_unknown_fields_are_passed_over(source):
    manifest = write_manifest(source, eot_id=None, unigram_entropy=None)
    tree = json.loads(manifest.to_json()) | {"written_by": "a later version"}
    assert DataManifest.from_json(json.dumps(tree)) == manifest
    assert manifest.n_tokens == 303


def test_a_disk_without_room_is_refused_before_anything_is_downloaded(source, data, monkeypatch):
    monkeypatch.setattr("pretrain.cache.free_disk_bytes", lambda folder: 400)
    store = RemoteStore(source)
    with pytest.raises(StorageError, match=r"MiB free, 3 shards need about .* --data\.cache_dir"):
        fetch_shards(store, data, vocab_size=103)
    assert store.downloaded == []


def test_the_room_needed_is_exact_where_a_manifest_counts_the_tokens(source, data, monkeypatch):
    write_manifest(source)
    monkeypatch.setattr("pretrain.cache.free_disk_bytes", lambda folder: 303 * 2)
    fetch_shards(LocalStore(source), data, vocab_size=103)


def run_ranks(store, data, n_ranks, **options):
    """What fetch_shards gave or raised on each rank of one node."""
    results = [None] * n_ranks

    def rank(local_rank):
        try:
            results[local_rank] = fetch_shards(store, data, local_rank=local_rank, local_world_size=n_ranks, **options)
        except (ShardError, StorageError) as error:
            results[local_rank] = error

    threads = [threading.Thread(target=rank, args=(local_rank,)) for local_rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.mark.parametrize("n_ranks", [2, 5])
def test_the_ranks_of_a_node_download_each_shard_once_and_see_the_same(source, data, n_ranks, monkeypatch):
    monkeypatch.setattr(shards_module, "SIBLING_POLL_S", 0.005)
    store = RemoteStore(source)
    results = run_ranks(store, data, n_ranks, vocab_size=103)
    assert sorted(store.downloaded) == ["a_0.npz", "b/a_1.npz", "c_2.npz"]
    assert [len(result.shards) for result in results] == [3] * n_ranks
    assert len({result.fingerprint for result in results}) == 1


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_shard_that_is_bad_on_one_rank_is_bad_on_all(source, data, policy, monkeypatch):
    monkeypatch.setattr(shards_module, "SIBLING_POLL_S", 0.005)
    (source / "b" / "a_1.npz").write_bytes(b"no zip")
    results = run_ranks(RemoteStore(source), dataclasses.replace(data, on_bad_shard=policy), 3, vocab_size=103)
    if policy == "stop":
        assert {str(result) for result in results} == {str(results[0])}
        assert "not a readable .npz" in str(results[0])
    else:
        assert [result.skipped for result in results] == [("b/a_1.npz",)] * 3


def test_a_sibling_that_never_comes_ends_the_wait(source, data, monkeypatch):
    monkeypatch.setattr(shards_module, "SIBLING_POLL_S", 0.005)
    monkeypatch.setattr(shards_module, "SIBLING_PATIENCE_S", 0.02)
    with pytest.raises(StorageError, match=r"1 shards that other ranks .* such as b/a_1\.npz"):
        fetch_shards(RemoteStore(source), data, vocab_size=103, local_rank=0, local_world_size=2)


def test_progress_counts_shards_and_bytes(source, data):
    seen = []
    fetch_shards(RemoteStore(source), data, vocab_size=103, on_progress=lambda *counts: seen.append(counts))
    n_bytes = sum(path.stat().st_size for path in files(source, "*.npz"))
    assert [counts[:2] for counts in seen[:3]] == [(1, 3), (2, 3), (3, 3)]
    assert seen[2][2] == n_bytes


def test_a_failed_download_leaves_nothing_and_raises(source, data, tmp_path):
    class Broken(RemoteStore):
        def download(self, name, path, on_bytes=None):
            raise StorageError(f"gs://bucket/data/{name}: 503", "try again")

    with pytest.raises(StorageError, match="503"):
        fetch_shards(Broken(source), data, vocab_size=103)
    assert files(tmp_path / "cache", "*.*") == []


def test_leftovers_of_killed_processes_go_after_a_day(source, data, tmp_path):
    folder = fetch_shards(LocalStore(source), data, vocab_size=103).shards[0].path.parent
    old, fresh = folder / ".a.123.npz.part", folder / ".b.123.npz.part"
    old.touch()
    fresh.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    fetch_shards(LocalStore(source), data, vocab_size=103)
    assert not old.exists() and fresh.exists()


def test_shards_of_one_name_in_two_folders_do_not_collide(tmp_path, data):
    for folder, first in (("x", 0), ("y", 100)):
        (tmp_path / "s" / folder).mkdir(parents=True)
        np.savez(tmp_path / "s" / folder / "same.npz", input_ids=np.arange(first, first + 10))
    found = fetch_shards(LocalStore(tmp_path / "s"), data, vocab_size=200)
    assert [int(shard.tokens()[0]) for shard in found.shards] == [0, 100]


def test_padding_never_reaches_a_target(tmp_path, data):
    """End to end: every token that was written is a target as often as it was written, and the pad never is."""
    generator = np.random.default_rng(0)
    written = []
    (tmp_path / "s").mkdir()
    for index in range(4):
        lengths = generator.integers(0, 33, size=20)
        rows = np.full((20, 32), 999, dtype=np.int32)
        for row, length in enumerate(lengths):
            rows[row, :length] = generator.integers(0, 500, size=length)
            written.extend(rows[row, :length].tolist())
        mask = (np.arange(32) < lengths[:, None]).astype(np.int64)
        kept = [{"attention_mask": mask}, {"sequence_lengths": lengths}][index % 2]
        np.savez_compressed(tmp_path / "s" / f"{index}.npz", input_ids=rows, **kept)
    found = fetch_shards(LocalStore(tmp_path / "s"), data, vocab_size=1000)
    assert found.n_tokens == len(written)
    batches = Batches(found.shards, seq_len=1, global_size=1, seed=0)
    targets, position = [], Position()
    while position.epoch == 0:
        rows, position = batches.take(position, 0, 1)
        targets.append(int(rows[0, 1]))
    first = found.shards[batches._epoch(0).order[0]].tokens()[0]
    assert sorted([*targets, int(first)]) == sorted(written)


def test_an_object_info_without_checksum_is_enough_for_a_key(source, data):
    class Bare(RemoteStore):
        def list(self, prefix=""):
            return [ObjectInfo(info.name, info.size) for info in self.local.list(prefix)]

    assert len(fetch_shards(Bare(source), data, vocab_size=103).shards) == 3
