"""How fast training data comes: batches out of the cache, a cached epoch's opening, downloads.

    python benchmarks/bench_data.py [--rounds 5] [--json] [--save]

    batches   Batches.take in one thread, against a bare loop that copies windows at random places out of np.memmap
              into the same kind of array. Rates count target tokens; the files are in the page cache for both.
    open      from nothing to the first batch of an epoch whose shards are all cached, in a process of its own; the
              imports are not counted in its time, but are in its memory.
    download  the store's download (checksum, fsync, rename) by a pool of threads, against the google client's plain
              download_to_filename and an fsync by the same pool, from one embedded bucket: both until it is on disk.
              What the copy reaches without the fsync is told as well.

The sides of a comparison take turns, each round another is first, and the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import track

from pretrain.batches import Batches, Position
from pretrain.checks import Check, publish
from pretrain.config import DataConfig, StorageConfig
from pretrain.credentials import connect
from pretrain.embedded import embedded_bucket
from pretrain.errors import TrainerError
from pretrain.files import sync
from pretrain.shards import Shard, ShardSet, fetch_shards, open_shards
from pretrain.storage import LocalStore, open_store

ROOT = Path(__file__).resolve().parent.parent
RATE_GOAL, MEMMAP_GOAL, OPEN_GOAL, RSS_GOAL, DOWNLOAD_GOAL = 20e6, 0.8, 1.0, 500.0, 0.8
VOCAB_SIZE, SEED = 50257, 1234
SEQ_LEN, GLOBAL_SIZE, STEPS = 2048, 64, 16  # of one side's turn: 2 M tokens
SHARDS = 8
BUCKET = "bench"


def make_shards(folder: Path, n_shards: int, tokens_each: int) -> LocalStore:
    """Shards of random ids: nothing here depends on what they say."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(SEED)
    for number in range(n_shards):
        tokens = generator.integers(0, VOCAB_SIZE, tokens_each, dtype=np.uint16)
        np.savez(folder / f"shard_{number:05d}.npz", input_ids=tokens)
    return LocalStore(folder)


def data_config(folder: Path) -> DataConfig:
    """Settings whose cache lies in a folder."""
    return DataConfig(cache_dir=str(folder / "cache"))


# ---- batches ----


def bare_loop(shards: Sequence[Shard], n_steps: int) -> Callable[[], None]:
    """What a trainer without an order of its own does: windows at random places, chosen before the clock runs."""
    generator = np.random.default_rng(SEED)
    maps = [np.memmap(shard.path, dtype=shard.dtype, mode="r") for shard in shards]
    chosen = generator.integers(0, len(maps), (n_steps, GLOBAL_SIZE)).tolist()
    starts = generator.integers(0, min(map(len, maps)) - SEQ_LEN - 1, (n_steps, GLOBAL_SIZE)).tolist()

    def turn() -> None:
        for step in range(n_steps):
            batch = np.empty((GLOBAL_SIZE, SEQ_LEN + 1), dtype=np.int64)
            for row in range(GLOBAL_SIZE):
                start = starts[step][row]
                batch[row] = maps[chosen[step][row]][start : start + SEQ_LEN + 1]

    return turn


def our_loop(found: ShardSet, n_steps: int) -> Callable[[], None]:
    """The same number of windows in the seeded order of a run, each turn further on, by its feed."""
    batches = Batches(found.shards, seq_len=SEQ_LEN, global_size=GLOBAL_SIZE, seed=SEED, feed=found.feed)
    position = Position()

    def turn() -> None:
        nonlocal position
        for _ in range(n_steps):
            _, position = batches.take(position, 0, 1)

    return turn


def bench_batches(options: argparse.Namespace, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """The rate of batches, and what it is to a bare loop's."""
    store = make_shards(folder / "batches", SHARDS, options.tokens)
    shards = fetch_shards(store, data_config(folder), vocab_size=VOCAB_SIZE).shards
    found = open_shards(store, data_config(folder), vocab_size=VOCAB_SIZE)
    tokens = STEPS * GLOBAL_SIZE * SEQ_LEN
    ours, bare = our_loop(found, STEPS), bare_loop(shards, STEPS)
    seconds = take_turns("batches", (ours, bare), options.rounds)
    rate = tokens / statistics.median(seconds[0])
    checks = [
        Check("batches_from_cache", round(rate), "≥", RATE_GOAL, "tokens/s"),
        Check("batches_over_memmap_loop", ratio_of_speeds(*seconds), "≥", MEMMAP_GOAL, "x"),
    ]
    return checks, {"memmap_loop_tokens_per_second": round(tokens / statistics.median(seconds[1]))}


def take_turns(title: str, sides: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each side in every round, after one round that isn't counted; each round another side is first."""
    seconds: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    for number in track(range(rounds), title, console=Console(stderr=True), transient=True):
        for place in range(len(sides)):
            which = (number + place) % len(sides)
            started = time.perf_counter()
            sides[which]()
            seconds[which].append(time.perf_counter() - started)
    return seconds


def ratio_of_speeds(ours_s: Sequence[float], other_s: Sequence[float]) -> float:
    """Median over the rounds of our speed over the other's."""
    return round(statistics.median(other / ours for ours, other in zip(ours_s, other_s, strict=True)), 3)


# ---- opening ----


def bench_open(options: argparse.Namespace, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """Time and memory of opening a cached epoch, each round in a new process."""
    store = make_shards(folder / "epoch", options.shards, SEQ_LEN)
    fetch_shards(store, data_config(folder), vocab_size=VOCAB_SIZE)
    command = [sys.executable, str(Path(__file__).resolve()), "--open", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = []
    for _ in track(range(options.rounds), "open", console=Console(stderr=True), transient=True):
        ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        found.append(json.loads(ended.stdout))
    seconds, rss_mb = (statistics.median(each[key] for each in found) for key in ("seconds", "rss_mb"))
    checks = [
        Check(f"open_epoch_of_{options.shards}_shards", round(seconds, 3), "≤", OPEN_GOAL, "s"),
        Check("open_epoch_rss", round(rss_mb, 1), "≤", RSS_GOAL, "MB"),
    ]
    return checks, {"open_rss_before_mb": round(statistics.median(each["before_mb"] for each in found), 1)}


def open_epoch(folder: Path) -> None:
    """In the new process: open what `bench_open` has put there, and print how long it took."""
    before_mb = psutil.Process().memory_info().rss / 1e6
    started = time.perf_counter()
    found = open_shards(LocalStore(folder / "epoch"), data_config(folder), vocab_size=VOCAB_SIZE)
    size = min(GLOBAL_SIZE, len(found.shards) // 2)
    Batches(found.shards, seq_len=SEQ_LEN, global_size=size, seed=SEED, feed=found.feed).take(Position(), 0, 1)
    seconds = time.perf_counter() - started
    rss_mb = psutil.Process().memory_info().rss / 1e6
    print(json.dumps({"seconds": seconds, "rss_mb": rss_mb, "before_mb": before_mb}))


# ---- downloads ----


def bench_download(options: argparse.Namespace, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """The store's downloads against the google client's."""
    source, target = folder / "object", folder / "downloads"
    source.write_bytes(np.random.default_rng(SEED).bytes(int(options.file_mb * 1e6)))
    names = [f"shards/{number:03d}.npz" for number in range(options.files)]
    with embedded_bucket(folder / "bucket", BUCKET), ThreadPoolExecutor(DataConfig().download_workers) as pool:
        store = open_store(f"gs://{BUCKET}", StorageConfig())
        for name in names:
            store.upload(source, name)
        bucket = connect().client.bucket(BUCKET)
        target.mkdir()

        def ours(name: str) -> None:
            store.download(name, target / Path(name).name)

        def plain(name: str) -> None:
            bucket.blob(name).download_to_filename(target / Path(name).name)

        def plain_synced(name: str) -> None:
            plain(name)
            sync(target / Path(name).name)

        def turn_of(download: Callable[[str], None]) -> Callable[[], None]:
            def turn() -> None:
                list(pool.map(download, names))
                for path in target.iterdir():
                    path.unlink()

            return turn

        sides = [turn_of(side) for side in (ours, plain_synced, plain)]
        seconds = take_turns("download", sides, options.rounds)
    megabytes = options.files * options.file_mb
    rates = [round(megabytes / statistics.median(side), 1) for side in seconds]
    check = Check("download_over_plain_copy", ratio_of_speeds(*seconds[:2]), "≥", DOWNLOAD_GOAL, "x")
    figures = ("download", "plain_copy", "plain_copy_not_on_disk")
    return [check], {f"{name}_mb_per_second": rate for name, rate in zip(figures, rates, strict=True)}


# ---- all of it ----


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="times that every side has its turn (5)")
    add(
        "--tokens", type=int, default=4_000_000, help=f"of each of the {SHARDS} shards that batches come from (4000000)"
    )
    add("--shards", type=int, default=1000, help="of the epoch that is opened (1000)")
    add("--files", type=int, default=24, help="that are downloaded (24)")
    add("--file_mb", type=float, default=8.0, help="size of each in MB (8)")
    add("--dir", type=Path, metavar="FOLDER", help="on the disk to be measured (a temporary one)")
    add("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    add("--save", action="store_true", help="write benchmarks/results/DEVICE/data.json")
    add("--open", type=Path, help=argparse.SUPPRESS)  # how it starts itself to measure the opening
    options = parser.parse_args(argv)
    if min(options.rounds, options.files) < 1 or options.shards < 4 or options.file_mb <= 0:
        parser.error("--rounds and --files must be at least 1, --shards at least 4, --file_mb positive")
    if options.tokens * SHARDS <= GLOBAL_SIZE * SEQ_LEN or options.tokens < 2 * SEQ_LEN:
        parser.error(f"--tokens must be above {GLOBAL_SIZE * SEQ_LEN // SHARDS}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse_options(argv)
    if options.open:
        open_epoch(options.open)
        return 0
    checks: list[Check] = []
    details: dict[str, Any] = {key: getattr(options, key) for key in ("rounds", "tokens", "files", "file_mb")}
    try:
        for bench in (bench_batches, bench_open, bench_download):
            with tempfile.TemporaryDirectory(prefix="bench_data-", dir=options.dir) as folder:
                found, figures = bench(options, Path(folder))
            checks += found
            details |= figures
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return publish("data", checks, as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
