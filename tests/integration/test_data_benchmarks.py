"""bench_data at a size that says nothing about speed: it must measure what it says, and say what it measured."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_data
from pretrain import embedded
from pretrain.shards import fetch_shards, open_shards

TINY = ["--rounds", "2", "--tokens", "20000", "--shards", "130", "--files", "3", "--file_mb", "0.1", "--json"]
CHECKS = {
    "batches_from_cache": "tokens/s",
    "batches_over_memmap_loop": "x",
    "open_epoch_of_130_shards": "s",
    "open_epoch_rss": "MB",
    "download_over_plain_copy": "x",
}


def test_it_measures_every_goal_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "kept.example")
    code = bench_data.main([*TINY, "--dir", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert {check["name"]: check["unit"] for check in found["checks"]} == CHECKS
    assert all(check["value"] > 0 for check in found["checks"])
    assert code == (0 if found["passed"] else 1)
    assert found["passed"] == all(check["passed"] for check in found["checks"])
    rss = next(check["value"] for check in found["checks"] if check["name"] == "open_epoch_rss")
    assert found["open_rss_before_mb"] <= rss
    assert list(tmp_path.iterdir()) == []
    assert "STORAGE_EMULATOR_HOST" not in os.environ and os.environ["NO_PROXY"] == "kept.example"


def test_a_slower_side_shows_and_the_first_turn_goes_round(capsys):
    turns: list[str] = []
    sides = [lambda name=name: turns.append(name) for name in "ab"]
    seconds = bench_data.take_turns("x", sides, 3)
    assert "".join(turns) == "ab" + "ab" + "ba" + "ab" and [len(side) for side in seconds] == [3, 3]
    assert bench_data.ratio_of_speeds([2.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == 0.5


def test_both_loops_copy_windows_of_the_same_shape(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench_data, "SEQ_LEN", 16)
    monkeypatch.setattr(bench_data, "GLOBAL_SIZE", 4)
    store = bench_data.make_shards(tmp_path / "shards", 2, 500)
    shards = fetch_shards(store, bench_data.data_config(tmp_path), vocab_size=bench_data.VOCAB_SIZE).shards
    found = open_shards(store, bench_data.data_config(tmp_path), vocab_size=bench_data.VOCAB_SIZE)
    made: list[tuple[int, ...]] = []
    empty = np.empty

    def counted(shape, *arguments, **options):
        made.append(shape)
        return empty(shape, *arguments, **options)

    loops = [bench_data.our_loop(found, 3), bench_data.bare_loop(shards, 3)]
    monkeypatch.setattr(np, "empty", counted)
    for loop in loops:
        made.clear()
        loop()
        assert made.count((4, 17)) == 3


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--shards", "1"], ["--tokens", "100"], ["--file_mb", "0"]])
def test_sizes_that_measure_nothing_are_refused(wrong):
    with pytest.raises(SystemExit) as ended:
        bench_data.parse_options(wrong)
    assert ended.value.code == 2


def test_a_bucket_that_does_not_start_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embedded, "ROOT", tmp_path)  # where no script is
    monkeypatch.setattr(bench_data, "bench_batches", lambda options, folder: ([], {}))
    monkeypatch.setattr(bench_data, "bench_open", lambda options, folder: ([], {}))
    assert bench_data.main([*TINY, "--dir", str(tmp_path)]) == 4
    assert "storage error: the embedded bucket did not start" in capsys.readouterr().err
