"""Scenario 14: a disk that fills up while checkpoints are saved and while shards are cached."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import damaged_files
from pretrain.discovery import take_inventory
from tests.chaos.chain import INTERVAL, OPTIONS, STEPS, Chain
from tests.chaos.score import Score
from tests.runs import RUN, make_shards, train


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB: two checkpoints of the tiny run, not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.decode().strip()}")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        yield disk


def check_full(chain: Chain, disk: Path) -> None:
    """The start stopped with the contract's code and one line that names the disk and its mend."""
    with chain.start() as training:
        ended = training.wait()
    assert ended.code == 4 and "Traceback" not in ended.output and len(ended.errors) == 1, ended.output
    assert str(disk) in ended.errors[0] and "No space left" in ended.errors[0], ended.output
    chain.interrupted()


@pytest.mark.chaos(14)
@pytest.mark.parametrize(
    "with_bucket",
    # test_faults.py fills one in the ordinary suite
    [pytest.param(False, id="local", marks=pytest.mark.slow), pytest.param(True, id="bucket", marks=pytest.mark.slow)],
)
def test_a_disk_full_of_checkpoints_stops_the_run_and_loses_none(
    folder, small_disk, bucket_url, baseline, score: Score, with_bucket
):
    options = (*OPTIONS, "--checkpoint.dir", str(small_disk), "--checkpoint.keep", "0")
    chain = Chain(folder, options, bucket_url if with_bucket else "")
    (folder / "checkpoints").symlink_to(small_disk)
    with score.run():
        check_full(chain, small_disk)
        inventory = take_inventory(small_disk / RUN, None, RUN)
        whole = [n for n, m in inventory.local.items() if not damaged_files(m, small_disk / RUN / str(n))]
        score.count("checkpoints_kept", len(whole), "checkpoints")
        assert whole and len(whole) == len(list((small_disk / RUN).glob("*/"))), "half a checkpoint is left"
    with score.run():
        subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
        chain.finish()
        # The training doesn't wait for a save: what it took meanwhile is at most two saves more.
        chain.check_resumed(score, 3 * INTERVAL)
        chain.compare(baseline(*OPTIONS), score)


@pytest.mark.chaos(14)
@pytest.mark.slow  # test_faults.py fills one in the ordinary suite
def test_a_disk_full_of_shards_stops_the_start_and_leaves_no_half_of_one(folder, small_disk, baseline, score: Score):
    make_shards(folder / "shards", 6, 200_000)  # 2.4 MB of tokens
    cache = small_disk / "cache"
    options = ("--data.cache_dir", str(cache), "--max-steps", str(STEPS))
    (small_disk / "fill").write_bytes(bytes(200 << 10))
    with score.run():
        refused = train(folder, *options)
        assert refused.code == 4 and len(refused.errors) == 1 and str(cache) in refused.errors[0], refused.output
    left = [path for path in cache.rglob("*") if path.is_file()]
    score.equal("half_shards", len(left), 0, "files", left)
    with score.run():
        subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
        ended = train(folder, *options)
        assert ended.code == 0, ended.output
