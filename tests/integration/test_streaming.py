"""Training while the shards still arrive: from a bucket, into a cache that holds some of them, on 1 and 2 ranks."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.batches import Batches, Position
from pretrain.config import DataConfig, StorageConfig
from pretrain.files import crc32c_of_file
from pretrain.manifest import DataManifest, ShardEntry
from pretrain.npz import read_npz
from pretrain.shards import open_shards
from pretrain.storage import open_store
from tests.fault_proxy import FaultProxy
from tests.runs import ROOT, SEQ_LEN, VOCAB_SIZE, TrainingProcess, losses, metrics, plain_environment, train

GLOBAL_SIZE = 8
N_SHARDS, TOKENS = 6, 1500
SHARD = r"GET /download.*npz"
BOUND = ("--data.cache_gb", "0.000013", "--data.prefetch_shards", "1")  # about half of them
SMALL_STEPS = ("--checkpoint.every_steps", "10", "--no-background-upload")

# train.py, and each rank writes down what it trains on.
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from pretrain.read_ahead import ReadAhead
original = ReadAhead.__next__
def noted(self):
    tokens, position = original(self)
    with open(f"seen-{{os.environ.get('RANK', '0')}}.bin", "ab") as file:
        file.write(tokens.astype("<i8").tobytes())
    return tokens, position
ReadAhead.__next__ = noted
code = train.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


def write_dialects(folder: Path) -> None:
    """Shards in three dialects, padded and nested, with their manifest."""
    folder.mkdir()
    (folder / "nested").mkdir()
    random = np.random.default_rng(5)
    for index in range(N_SHARDS):
        tokens = random.integers(0, VOCAB_SIZE, TOKENS + index).astype(np.uint16)
        if index % 3 == 0:
            np.savez(folder / f"{index}.npz", input_ids=tokens, sequence_lengths=np.array([len(tokens) - 40, 40]))
        elif index % 3 == 1:
            rows = np.zeros((20, 100), dtype=np.int32)
            mask = (np.arange(rows.size) < len(tokens)).reshape(rows.shape)
            rows[mask] = tokens
            np.savez_compressed(
                folder / "nested" / f"{index}.npz", input_ids=rows, attention_mask=mask.astype(np.uint8)
            )
        else:
            np.savez_compressed(folder / f"{index}.npz", tokens=tokens.astype(np.int64)[:, None][None])
    paths = sorted(folder.rglob("*.npz"), key=lambda path: path.relative_to(folder).as_posix())
    entries = tuple(
        ShardEntry(
            path.relative_to(folder).as_posix(), len(read_npz(path)[0]), 1, path.stat().st_size, crc32c_of_file(path)
        )
        for path in paths
    )
    (folder / "manifest.json").write_text(DataManifest("test", VOCAB_SIZE, None, entries).to_json())


@pytest.fixture
def shards_url(tmp_path: Path, bucket_url: str) -> str:
    """The shards in the bucket of `bucket_url`."""
    write_dialects(tmp_path / "local")
    store = open_store(f"{bucket_url}/shards", StorageConfig())
    for path in sorted((tmp_path / "local").rglob("*.*")):
        store.upload(path, path.relative_to(tmp_path / "local").as_posix())
    return f"{bucket_url}/shards"


def all_tokens(folder: Path, url: str) -> np.ndarray:
    """The stream of the first epoch, put together from whole shards."""
    found = open_shards(open_store(url, StorageConfig()), DataConfig(cache_dir=str(folder)), vocab_size=VOCAB_SIZE)
    order = Batches(found.shards, seq_len=SEQ_LEN, global_size=GLOBAL_SIZE, seed=1234, shuffle_shards=2)._epoch(0).order
    return np.concatenate([found.shards[int(index)].tokens() for index in order])


def driver(folder: Path, ranks: int) -> list[str]:
    (folder / "driver.py").write_text(DRIVER)
    launcher = ["-m", "pretrain.launch", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(folder / "driver.py")]


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "cache").rglob("*.bin"))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_epoch_of_three_dialects_through_a_bounded_cache_trains_each_token_once(
    tmp_path, shards_url, fault_proxy: FaultProxy, ranks
):
    steps = sum(TOKENS + index for index in range(N_SHARDS)) // SEQ_LEN // GLOBAL_SIZE
    run = tmp_path / "run"
    run.mkdir()
    options = ("--data", shards_url, "--max-steps", str(steps), *BOUND)
    ended = train(run, *options, command=driver(run, ranks))
    assert ended.code == 0, ended.output
    rows = [
        np.frombuffer((run / f"seen-{rank}.bin").read_bytes(), "<i8").reshape(steps, -1, SEQ_LEN + 1)
        for rank in range(ranks)
    ]
    windows = np.concatenate(rows, axis=1).reshape(-1, SEQ_LEN + 1)
    stream = all_tokens(tmp_path / "whole", shards_url)
    whole = np.stack([stream[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in range((len(stream) - 1) // SEQ_LEN)])
    # Windows of random tokens differ: each trained one is found once in the stream, and at most a step's are left over.
    places = {window.tobytes(): number for number, window in enumerate(whole.astype("<i8"))}
    found = [places[window.tobytes()] for window in windows]
    assert len(set(found)) == len(found) == steps * GLOBAL_SIZE > len(whole) - GLOBAL_SIZE
    assert on_disk(run) <= 13_000 and "above it" not in ended.output
    assert len(list((run / "cache").rglob("*.json"))) == N_SHARDS


@pytest.mark.parametrize(
    ("ranks", "kills"), [(1, (24,)), pytest.param(2, (12, 24), marks=pytest.mark.slow)], ids=["1", "2"]
)
def test_killed_in_mid_epoch_with_shards_put_out_it_goes_on_bit_for_bit_and_fetches_nothing_of_the_past(
    tmp_path, shards_url, fault_proxy: FaultProxy, ranks, kills
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--data", shards_url, "--max-steps", "45", *SMALL_STEPS)  # an epoch is 35
    for folder in (whole, killed):
        folder.mkdir()
    assert train(whole, *options, ranks=ranks).code == 0
    resumed = 0
    for step in kills:
        held = plain_environment(PRETRAIN_FAILPOINT=f"loop.before_step:{step - resumed + 1}:hang")  # or it may be over
        with TrainingProcess(killed, *options, *BOUND, "--resume", "auto", ranks=ranks, environment=held) as training:
            training.until_step(step)
            training.kill()
        resumed = step // 10 * 10
    shutil.rmtree(killed / "cache")  # another machine
    fault_proxy.clear()
    with TrainingProcess(killed, *options, *BOUND, "--resume", "auto", ranks=ranks) as training:
        training.until(lambda: any(re.search(SHARD, request) for request in fault_proxy.requests))
        early = list(fault_proxy.requests)
        ended = training.wait()
    assert ended.code == 0, ended.output
    assert losses(killed) == losses(whole)
    found = open_shards(
        open_store(shards_url, StorageConfig()), DataConfig(cache_dir=str(tmp_path / "c")), vocab_size=VOCAB_SIZE
    )
    batches = Batches(found.shards, seq_len=SEQ_LEN, global_size=GLOBAL_SIZE, seed=1234, shuffle_shards=2)
    position = Position()
    for _ in range(20):
        _, position = batches.take(position, 0, 1)
    past = [found.shards[int(index)].name for index in batches._epoch(0).order[: position.shard // 2 * 2]]
    fetched = [request for request in early if re.search(SHARD, request)]
    assert past and fetched
    assert not [request for request in fetched if any(name.split("/")[-1] in request for name in past)]
    assert len({record["step"] for record in metrics(killed)}) == 45


def test_a_signal_ends_the_wait_for_a_silent_bucket_and_the_wait_is_in_the_metrics(tmp_path, shards_url, fault_proxy):
    run = tmp_path / "run"
    run.mkdir()
    fault_proxy.inject("stall", match=SHARD, skip=3, times=-1)  # step 17 is the first to read of the fourth
    options = ("--data", shards_url, "--max-steps", "20", "--data.prefetch_shards", "0", "--data.shuffle_shards", "1")
    options += ("--storage.timeout_s", "1000")  # the request does not end by itself
    with TrainingProcess(run, *options) as training:
        training.until_step(16)
        training.until(lambda: fault_proxy.broken, "a stalled download")
        training.signal(signal.SIGTERM)
        ended = training.wait()
    assert ended.code == 75, ended.output
    fault_proxy.clear()
    fault_proxy.inject("503", match=SHARD, times=1)  # and asked again, a moment later
    again = train(run, *options, "--resume", "auto")
    assert again.code == 0, again.output
    waits = {record["step"]: record["data_wait_ms"] for record in metrics(run)}
    assert len(waits) == 20 and waits[17] > 5


def test_a_shard_that_is_not_what_the_manifest_says_ends_every_rank_with_one_line_and_3(tmp_path, shards_url):
    run = tmp_path / "run"
    run.mkdir()
    local = tmp_path / "local"
    path = local / "2.npz"
    np.savez(path, tokens=np.arange(7))
    shutil.copytree(local, run / "shards")
    text = (run / "shards" / "manifest.json").read_text()
    entry = DataManifest.from_json(text).shards
    changed = tuple(
        ShardEntry(each.name, each.tokens, each.documents, path.stat().st_size, crc32c_of_file(path))
        if each.name == "2.npz"
        else each
        for each in entry
    )
    (run / "shards" / "manifest.json").write_text(DataManifest("test", VOCAB_SIZE, None, changed).to_json())
    ended = train(run, "--data", str(run / "shards"), "--max-steps", "30", ranks=2)
    assert ended.code == 3, ended.output
    assert len(ended.errors) == 1 and "2.npz: found 7 tokens" in ended.errors[0], ended.output


def test_a_bucket_that_goes_away_in_mid_epoch_is_one_line_and_4(tmp_path, shards_url, fault_proxy):
    run = tmp_path / "run"
    run.mkdir()
    fault_proxy.inject("503", match=SHARD, skip=4, times=-1)
    options = ("--data", shards_url, "--max-steps", "40", "--data.prefetch_shards", "1", "--storage.deadline_s", "3")
    ended = train(run, *options)
    assert ended.code == 4, ended.output
    assert len(ended.errors) == 1 and "503" in ended.errors[0], ended.output
