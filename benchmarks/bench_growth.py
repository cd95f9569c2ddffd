"""How the cost grows with the work: step time against batch, sequence, depth and ranks, opening against shards.

    python benchmarks/bench_growth.py [--rounds 7] [--scale 4] [--only batch,ranks] [--json] [--save]

Of each kind of growth four or five sizes are taken, in turn and several times, and the exponent is fitted: 1 where
twice the size takes twice the time. Beside it stands the exponent of the arithmetic over the same sizes, tokens ×
(6 N + 12 L d T), as the model counts it (for shards: of reading a list, 1). It may grow more slowly, where something is
paid once a step. That it grows faster by more than 0.1 means that some term of our own is at work. Each
round gives an exponent of its own, whose sizes were measured within seconds of each other; the value is the median.

Ranks: from one rank to two of `ddp` on gloo, each with the tokens that it had alone; both are measured by
benchmarks/bench_scaling.py, which also predicts what the communication should cost from an all-reduce. The arithmetic
of a rank stays as it is, so its exponent is that of the prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from model import GPT
from pretrain.batches import Batches, Position
from pretrain.checks import Check, publish
from pretrain.config import DataConfig, EngineConfig, OptimConfig
from pretrain.engine.lean import leave_compiler_out
from pretrain.engine.native import NativeEngine
from pretrain.errors import ConfigError, TrainerError
from pretrain.listings import print_table
from pretrain.model_config import ModelConfig
from pretrain.shards import open_shards
from pretrain.storage import LocalStore

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE, RANKS_TOLERANCE = 0.1, 0.3
VOCAB_SIZE, SEQ_LEN, DEPTH, BATCH, SHARD_TOKENS = 2048, 128, 4, 4, 2000
KINDS = ("batch", "sequence", "depth", "shards", "ranks")


@dataclass(frozen=True)
class Growth:
    """One thing that grows.

    Args:
        sizes: of it, ascending.
        measure: seconds that a size takes, once.
        arithmetic: of a size, in any unit.
    """

    name: str
    sizes: Sequence[int]
    measure: Callable[[int], float]
    arithmetic: Callable[[int], float]


@dataclass(frozen=True)
class Found:
    """What came of a growth: seconds of each size (median), and the two exponents."""

    name: str
    seconds: dict[int, float]
    exponent: float
    arithmetic: float


def exponent_of(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the line nearest to the logarithms: p of value = c · size^p."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def fit(growth: Growth, rounds: int) -> Found:
    """Measure every size once a round, after one round that allocates and warms up."""
    for size in growth.sizes:
        growth.measure(size)
    turns = [[growth.measure(size) for size in growth.sizes] for _ in range(rounds)]
    exponent = statistics.median(exponent_of(growth.sizes, turn) for turn in turns)
    seconds = {
        size: statistics.median(column) for size, column in zip(growth.sizes, zip(*turns, strict=True), strict=True)
    }
    due = exponent_of(growth.sizes, [growth.arithmetic(size) for size in growth.sizes])
    return Found(growth.name, seconds, exponent, due)


# ---- steps ----


def shape_of(scale: int, depth: int = DEPTH, seq_len: int = SEQ_LEN) -> ModelConfig:
    """A GPT of so many layers, 64 · scale wide."""
    return ModelConfig(
        size="custom", n_layer=depth, n_head=4, d_model=64 * scale, vocab_size=VOCAB_SIZE, seq_len=seq_len, dropout=0.0
    ).resolve()


class Steps:
    """Optimizer steps of the native engine, one engine for each shape.

    Args:
        device: where.
        scale: of the model's width.
    """

    def __init__(self, device: torch.device, scale: int) -> None:
        self._device, self._scale = device, scale
        self._precision = "bf16" if device.type == "cuda" else "fp32"
        self._engines: dict[ModelConfig, NativeEngine] = {}

    def _engine(self, shape: ModelConfig) -> NativeEngine:
        if shape not in self._engines:
            model = GPT(shape, "sdpa")
            one = EngineConfig(name="single")
            self._engines[shape] = NativeEngine(model, OptimConfig(lr=1e-4), one, self._precision, self._device, 1)
        return self._engines[shape]

    def seconds(self, shape: ModelConfig, batch: int) -> float:
        """Of one step of one micro-batch; the gradient norm in its result is on the host, so the device is done."""
        engine = self._engine(shape)
        tokens = torch.randint(VOCAB_SIZE, (batch, shape.seq_len + 1))
        began = time.perf_counter()
        engine.train_step([tokens], 1e-4)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def growths(self, factor: int = 1) -> list[Growth]:
        """By batch, sequence and depth; `factor` multiplies the sequences of a batch, for a device that is wide."""

        def flops(shape: ModelConfig, batch: int) -> float:
            return batch * shape.seq_len * shape.flops_per_token

        def longer(seq_len: int) -> ModelConfig:
            return shape_of(self._scale, seq_len=seq_len)

        def deeper(depth: int) -> ModelConfig:
            return shape_of(self._scale, depth=depth)

        plain, few, some = shape_of(self._scale), 2 * factor, BATCH * factor
        return [
            Growth(
                "batch",
                [factor * size for size in (1, 2, 4, 8, 16)],
                lambda size: self.seconds(plain, size),
                lambda size: flops(plain, size),
            ),
            Growth(
                "sequence",
                [128, 256, 512, 1024],
                lambda size: self.seconds(longer(size), few),
                lambda size: flops(longer(size), few),
            ),
            Growth(
                "depth",
                [2, 4, 8, 16],
                lambda size: self.seconds(deeper(size), some),
                lambda size: flops(deeper(size), some),
            ),
        ]


# ---- shards ----


class Openings:
    """Epochs of cached shards, opened up to their first batch."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder = folder
        tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, SHARD_TOKENS, dtype=np.uint16)
        for size in sizes:
            place = folder / str(size)
            place.mkdir()
            for number in range(size):
                np.savez(place / f"shard_{number:05d}.npz", input_ids=tokens)

    def seconds(self, size: int) -> float:
        """Of one opening; the first one fills the cache."""
        place = self._folder / str(size)
        began = time.perf_counter()
        found = open_shards(LocalStore(place), DataConfig(cache_dir=f"{place}-cache"), vocab_size=VOCAB_SIZE)
        Batches(found.shards, seq_len=SEQ_LEN, global_size=8, seed=0, feed=found.feed).take(Position(), 0, 1)
        seconds = time.perf_counter() - began
        if found.feed:
            found.feed.close()
        return seconds


# ---- ranks ----


def measure_ranks(rounds: int, scale: int) -> Found:
    """From one rank to two, by bench_scaling.

    Raises:
        TrainerError: it failed.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_scaling.py"), "--engines", "ddp", "--json"]
    command += ["--rounds", str(rounds), "--scale", str(scale)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not ended.stdout:
        raise TrainerError(f"bench_scaling.py ended with {ended.returncode}", "See what it printed above")
    tree = json.loads(ended.stdout)
    row, apart_s = tree["efficiency"]["ddp"], tree["step_without_communication_ms"] / 1e3
    seconds = {1: apart_s, 2: apart_s / row["measured"]}
    return Found("ranks", seconds, math.log2(1 / row["measured"]), math.log2(1 / row["predicted"]))


# ---- all of it ----


def checks_of(found: Sequence[Found]) -> list[Check]:
    """No exponent above that of the arithmetic by more than the tolerance."""
    tolerances = {"ranks": RANKS_TOLERANCE}
    return [
        Check(f"{each.name}_over_arithmetic", round(each.exponent - each.arithmetic, 3), "≤", goal, "exponent")
        for each in found
        for goal in [tolerances.get(each.name, TOLERANCE)]
    ]


def show(found: Sequence[Found]) -> None:
    """The table, on stderr."""
    rows = [
        [
            each.name,
            " ".join(f"{size}: {seconds * 1e3:.1f}" for size, seconds in each.seconds.items()),
            f"{each.exponent:.2f}",
            f"{each.arithmetic:.2f}",
        ]
        for each in found
    ]
    titles = ("growth", "size: ms", "exponent", "arithmetic")
    print_table(titles, rows, Console(stderr=True), right=("exponent", "arithmetic"))


def run(options: argparse.Namespace) -> list[Found]:
    """Everything that is asked for."""
    leave_compiler_out()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = Steps(device, options.scale)
    found = [fit(each, options.rounds) for each in steps.growths(options.factor) if each.name in options.only]
    if "shards" in options.only:
        sizes = [options.shards // 16, options.shards // 4, options.shards]
        with tempfile.TemporaryDirectory(prefix="bench_growth-") as folder:
            openings = Openings(Path(folder), sizes)
            found.append(fit(Growth("shards", sizes, openings.seconds, float), options.rounds))
    if "ranks" in options.only:
        found.append(measure_ranks(options.rounds, options.scale))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="times that every size has its turn (7)")
    add("--scale", type=int, default=4, help="of the model's width, 64 each (4)")
    add("--factor", type=int, default=1, help="of the sequences in a batch; 64 or so fills a GPU (1)")
    add("--shards", type=int, default=1024, help="of the largest epoch that is opened (1024)")
    add("--only", type=lambda text: text.split(","), default=list(KINDS), metavar="A,B", help=", ".join(KINDS))
    add("--json", action="store_true", help="print one JSON object to stdout")
    add("--save", action="store_true", help="write benchmarks/results/DEVICE/growth.json")
    options = parser.parse_args(argv)
    try:
        if unknown := sorted(set(options.only) - set(KINDS)):
            raise ConfigError(f"--only {unknown[0]!r} is none of {', '.join(KINDS)}")
        if min(options.rounds, options.scale, options.factor) < 1 or options.shards < 64:
            raise ConfigError("--rounds, --scale and --factor must be at least 1, --shards at least 64")
        found = run(options)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    show(found)
    details: dict[str, Any] = {
        "rounds": options.rounds,
        "growths": {
            each.name: {
                "exponent": round(each.exponent, 3),
                "arithmetic": round(each.arithmetic, 3),
                "ms": {str(size): round(seconds * 1e3, 2) for size, seconds in each.seconds.items()},
            }
            for each in found
        },
    }
    return publish("growth", checks_of(found), as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
