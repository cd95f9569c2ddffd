from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.batches import Batches, Position
from pretrain.cache import Shard
from pretrain.config import DataConfig, StorageConfig
from pretrain.errors import CheckpointError, ConfigError, ShardError
from pretrain.lookup import (
    Detour,
    DocumentPart,
    Saved,
    document_lengths,
    documents_in,
    planned,
    recorded,
    windows_at,
    windows_before,
)
from pretrain.shards import fetch_shards
from pretrain.storage import LocalStore, open_store

LENGTHS = [70, 3, 41, 1, 95, 30]  # tokens: some shards are shorter than a window
SEQ_LEN, GLOBAL_SIZE = 8, 4


def make_batches(folder: Path, global_size: int = GLOBAL_SIZE) -> Batches:
    shards = []
    for index, n_tokens in enumerate(LENGTHS):
        path = folder / f"{index}.bin"
        (np.arange(n_tokens, dtype="<u2") + 1000 * index).tofile(path)
        shards.append(Shard(f"{index}.npz", n_tokens, path, "uint16"))
    return Batches(shards, seq_len=SEQ_LEN, global_size=global_size, seed=5, shuffle_shards=2)


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    return make_batches(tmp_path)


def walk(batches: Batches, steps: int) -> list[Position]:
    """Positions before step 1, 2, … as training goes through them."""
    positions = [Position()]
    for _ in range(steps):
        positions.append(batches.take(positions[-1], 0, 1)[1])
    return positions


def test_windows_are_those_that_training_takes_over_two_epochs(batches: Batches) -> None:
    n_steps = 2 * batches.windows_per_epoch // GLOBAL_SIZE + 2
    crossed = 0
    for step, position in enumerate(walk(batches, n_steps)[:-1], 1):
        assert planned(batches, step) == position
        windows = windows_at(batches, position)
        taken, _ = batches.take(position, 0, 1)
        assert [window.row for window in windows] == list(range(GLOBAL_SIZE))
        assert np.array_equal([window.tokens() for window in windows], taken)
        crossed += len({window.epoch for window in windows}) == 2
    assert crossed  # a step that belongs to two epochs was among them


def test_parts_name_their_shard_and_place(batches: Batches) -> None:
    for step in range(1, 8):
        for window in windows_at(batches, planned(batches, step)):
            assert sum(part.end - part.begin for part in window.parts) == SEQ_LEN + 1
            for part in window.parts:
                first = 1000 * int(part.shard.name.removesuffix(".npz"))
                found = part.shard.tokens()[part.begin : part.end]
                assert found.tolist() == list(range(first + part.begin, first + part.end))


def test_positions_and_counts_are_each_others_reverse(batches: Batches) -> None:
    for windows in range(3 * batches.windows_per_epoch):
        assert windows_before(batches, batches.position_after(windows)) == windows
    with pytest.raises(CheckpointError, match="of other data"):
        windows_before(batches, Position(0, 99, 0))
    with pytest.raises(ConfigError, match="no step 0"):
        planned(batches, 0)


def simulate(batches: Batches, events: list[tuple[int, int]], last: int) -> tuple[dict[int, int], Saved]:
    """(windows taken before each step was taken the last time, the last state) of a run that rolls back.

    Args:
        events: (from_step, to_step) in the order in which they happen.
    """
    step = cursor = 0
    begins: dict[int, int] = {}
    detours: list[Detour] = []
    waiting = list(events)
    while step < last or waiting:
        begins[step + 1] = cursor
        step, cursor = step + 1, cursor + batches.global_size
        if waiting and step == waiting[0][0]:
            _, to_step = waiting.pop(0)
            detours.append(Detour(step, to_step, (step - to_step) * batches.global_size))
            step = to_step
    return begins, Saved("newest", step, batches.position_after(cursor), tuple(detours))


@pytest.mark.parametrize(
    "events",
    [[], [(9, 6)], [(9, 6), (12, 10)], [(20, 15), (18, 5)], [(4, 0), (4, 2), (9, 3), (5, 4)]],
    ids=str,
)
def test_roll_backs_shift_the_steps_after_them(batches: Batches, events: list[tuple[int, int]]) -> None:
    begins, newest = simulate(batches, events, last=24)
    for step in range(1, newest.step + 5):
        expected = begins.get(step, begins[newest.step] + (step - newest.step) * GLOBAL_SIZE)
        assert windows_before(batches, recorded(batches, step, newest)) == expected, step


def test_a_changed_batch_is_found_by_the_checkpoints_around_the_step(tmp_path: Path) -> None:
    batches = make_batches(tmp_path, global_size=4)
    # ten steps of 2 windows, then steps of 4: what a resume with another batch.global_size does
    at_10 = Saved("a", 10, batches.position_after(20), ())
    at_14 = Saved("b", 14, batches.position_after(36), ())
    assert recorded(batches, 12, at_14, [at_10]) == batches.position_after(24)
    assert recorded(batches, 16, at_14, [at_10]) == batches.position_after(40)
    for step, older in ((9, [at_10]), (12, [])):
        with pytest.raises(CheckpointError, match=r"batch.global_size was changed.*leave out --run"):
            recorded(batches, step, at_14, older)
    at_5 = Saved("c", 5, batches.position_after(10), ())
    with pytest.raises(CheckpointError, match="step 8 can't be found"):
        recorded(batches, 8, at_10, [at_5])


def test_what_a_checkpoint_says_is_read_and_checked() -> None:
    state = {
        "progress": {"step": 7, "position": {"epoch": 1, "shard": 2, "window": 3}, "files": 9},
        "divergence": {"passed_over": [{"from_step": 6, "to_step": 2, "windows": 16, "shards": []}]},
    }
    assert Saved.from_state(state, "x") == Saved("x", 7, Position(1, 2, 3), (Detour(6, 2, 16),))
    assert Saved.from_state({**state, "divergence": {}}, "x").windows_passed_over == 0
    with pytest.raises(CheckpointError, match="x: its trainer_state"):
        Saved.from_state({"progress": {"step": 7}}, "x")


def test_documents_are_found_by_their_lengths() -> None:
    lengths = np.array([5, 1, 10])
    assert documents_in(lengths, 0, 16) == [
        DocumentPart(0, 0, 5, 5),
        DocumentPart(1, 0, 1, 1),
        DocumentPart(2, 0, 10, 10),
    ]
    assert documents_in(lengths, 4, 7) == [
        DocumentPart(0, 4, 5, 5),
        DocumentPart(1, 0, 1, 1),
        DocumentPart(2, 0, 1, 10),
    ]
    assert documents_in(lengths, 6, 9) == [DocumentPart(2, 0, 3, 10)]


def test_document_lengths_come_from_the_shard_itself(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    rows = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    np.savez(tmp_path / "shards" / "rows.npz", input_ids=rows, attention_mask=(rows > 0).astype(np.int8))
    store = open_store(str(tmp_path / "shards"), StorageConfig())
    assert isinstance(store, LocalStore)
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    (shard,) = fetch_shards(store, data, vocab_size=9).shards
    assert document_lengths(store, shard, -1).tolist() == [3, 1]
    np.savez(tmp_path / "shards" / "rows.npz", input_ids=np.arange(9))
    with pytest.raises(ShardError, match="found 9 tokens, the cache has 4"):
        document_lengths(store, shard, -1)


def test_document_lengths_of_a_bucket_leave_no_copy(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.arange(9), sequence_lengths=np.array([4, 5]))
    store = open_store(bucket_url, StorageConfig())
    store.upload(tmp_path / "a.npz", "part/a.npz")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    shard = Shard("part/a.npz", 9, tmp_path / "none.bin", "uint16")
    assert document_lengths(store, shard, -1).tolist() == [4, 5]
    assert not list((tmp_path / "scratch").iterdir())
