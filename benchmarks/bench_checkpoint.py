"""What a checkpoint costs: ours against torch.save, DeepSpeed's own and torch's asynchronous one.

    python benchmarks/bench_checkpoint.py [--parameters 30e6] [--json] [--save]

One model under DeepSpeed ZeRO-2, one process; in each round every side saves the state of that engine once, in turn,
and the figures are medians of the rounds' ratios. A first round warms up and isn't counted.

    stall   how long training waits: until the call returns. The others' includes no fsync, as they are used. To ours
            is added what the next step's update waits for the copy, in a step that is taken right after another save.
    total   until the checkpoint is whole and on disk. Ours checksums (crc32c) and syncs every file and commits; what
            the others write is synced afterwards, within their time, and not checksummed.

torch.save and async_save are given the same named fp32 tensors that ours writes, and gathering them counts, as it does
in ours. async_save has no goal: it is there to compare with.

On a CPU a copy beside a step shares its cores and memory (a GPU copies by itself): `slower_step_ms` is how much longer
save and step together take than the step alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import async_save

from model import GPT
from pretrain.checkpoint_manifest import CheckpointName
from pretrain.checks import Check, publish
from pretrain.config import BatchConfig, CheckpointConfig, EngineConfig, OptimConfig, StorageConfig
from pretrain.engine.base import Engine
from pretrain.engine.build import build_engine
from pretrain.errors import ConfigError, TrainerError
from pretrain.files import sync
from pretrain.hardware import resolve_device
from pretrain.keeper import Keeper
from pretrain.kernels import choose_attention
from pretrain.listings import print_table
from pretrain.model_config import ModelConfig
from pretrain.ranks import Ranks, join, leave, local_ranks

STALL_GOAL, TOTAL_GOAL, SHARE_GOAL, BYTES_GOAL = 0.1, 1.0, 1.0, 12.1
SECONDS_BETWEEN_SAVES = 60
RUN = "bench"
BATCH, SEQ_LEN, VOCAB_SIZE = 4, 128, 8192
Field = Literal["stall", "total"]
OURS, TORCH, DEEPSPEED, ASYNC = "ours", "torch.save", "deepspeed", "dcp.async_save"


@dataclass(frozen=True)
class Cost:
    """One save.

    Args:
        stall_ms: training waited.
        total_ms: until it was on disk.
    """

    stall_ms: float
    total_ms: float

    def ms(self, field: Field) -> float:
        """One of the two."""
        return self.stall_ms if field == "stall" else self.total_ms


def shape_of(n_parameters: float) -> ModelConfig:
    """A GPT of about so many parameters; its vocabulary has no padding, so that all of it counts."""
    d_model = 512 if n_parameters >= 1e7 else 64
    vocab_size = VOCAB_SIZE if n_parameters >= 1e7 else 128
    n_layer = max(1, round((n_parameters - vocab_size * d_model) / (12 * d_model**2)))
    model = ModelConfig(
        size="custom", n_layer=n_layer, n_head=8, d_model=d_model, vocab_size=vocab_size, seq_len=SEQ_LEN, dropout=0.0
    )
    return model.resolve()


def build(shape: ModelConfig, device: torch.device, precision: str, ranks: Ranks) -> Engine:
    """The model under ZeRO-2 after one step, so that its moments are not zero.

    Raises:
        ConfigError: DeepSpeed can't run here.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    attention, _ = choose_attention("auto", device, dtype, shape.head_dim)
    torch.manual_seed(0)
    batch = BatchConfig(global_size=BATCH, micro_size=BATCH)
    engine = build_engine(GPT(shape, attention), EngineConfig(), OptimConfig(), batch, precision, device, ranks)
    if engine.name != DEEPSPEED:
        raise ConfigError("DeepSpeed can't run on this machine, so there is nothing to compare with")
    step(engine, shape)
    return engine


def step(engine: Engine, shape: ModelConfig) -> float:
    """Take one step; its seconds."""
    started = time.perf_counter()
    engine.train_step([torch.randint(shape.vocab_size, (BATCH, shape.seq_len + 1))], lr=1e-3)
    return time.perf_counter() - started


class Bench:
    """Every side's save of one engine's state, below one folder.

    Args:
        keeper: ours; it writes to `folder`/checkpoints.
    """

    def __init__(
        self, engine: Engine, shape: ModelConfig, keeper: Keeper, folder: Path, ranks: Ranks, device: torch.device
    ) -> None:
        self.engine = engine
        self.shape = shape
        self.ranks = ranks
        self.keeper = keeper
        self.folder = folder
        self.device = device
        self.saves = 0
        self.slower_step_ms: list[float] = []
        self.bytes: dict[str, int] = {}
        self.sides: dict[str, Callable[[], Cost]] = {
            OURS: self.ours,
            TORCH: self.by_torch,
            DEEPSPEED: self.by_deepspeed,
            ASYNC: self.by_dcp,
        }

    def round(self) -> dict[str, Cost]:
        """Each side once; its files are measured and removed, outside of its time."""
        costs = {}
        for name, save in self.sides.items():
            os.sync()  # what one side left to the system to write is not the next one's business
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            costs[name] = save()
            [written] = self.folder.glob("checkpoints/*/checkpoint-*" if name == OURS else name)
            self.bytes[name] = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
            shutil.rmtree(written)
        return costs

    def ours(self) -> Cost:
        started = time.perf_counter()
        self._save()
        stalled = time.perf_counter()
        self.keeper.wait()
        cost = _cost(started, stalled)
        self.keeper.check()
        shutil.rmtree(self.folder / "checkpoints" / RUN / str(self._name))
        return Cost(cost.stall_ms + self._waiting_update_ms(), cost.total_ms)

    def _save(self) -> None:
        self.saves += 1
        self._name = CheckpointName(0, self.saves, self.saves)
        self.keeper.save(self._name, self.engine, {})

    def _waiting_update_ms(self) -> float:
        """What the update of a step waits that is taken right after a save."""
        alone_s = step(self.engine, self.shape)
        waited_s = 0.0
        started = time.perf_counter()
        self._save()
        wait = self.engine.before_update

        def timed() -> None:
            nonlocal waited_s
            begin = time.perf_counter()
            wait()
            waited_s += time.perf_counter() - begin

        self.engine.before_update = timed
        step(self.engine, self.shape)
        self.slower_step_ms.append((time.perf_counter() - started - alone_s) * 1e3)
        self.keeper.wait()
        return waited_s * 1e3

    def by_torch(self) -> Cost:
        path = self.folder / TORCH / "state.pt"
        path.parent.mkdir()
        started = time.perf_counter()
        torch.save(self._named_state(), path)
        return self._synced(path.parent, started)

    def by_deepspeed(self) -> Cost:
        folder = self.folder / DEEPSPEED
        started = time.perf_counter()
        # the one DeepSpeed engine under ours; there is no other way to its own format
        self.engine._engine.save_checkpoint(str(folder), tag="step")  # type: ignore[attr-defined]
        return self._synced(folder, started)

    def by_dcp(self) -> Cost:
        folder = self.folder / ASYNC
        started = time.perf_counter()
        future = async_save(self._named_state(), checkpoint_id=folder, process_group=self.ranks.control)
        stalled = time.perf_counter()
        assert isinstance(future, Future)  # the other form is of a stager that isn't asked for
        future.result()  # its writer syncs by itself
        return _cost(started, stalled)

    def _named_state(self) -> dict[str, Tensor]:
        """Weights and moments under the names that ours writes."""
        states = self.engine.parameter_states()
        return {f"{kind}/{name}": tensor.detach() for name, state in states for kind, tensor in state.items()}

    def _synced(self, folder: Path, started: float) -> Cost:
        """The cost of a save that has just returned: training goes on here, the disk is not done."""
        stalled = time.perf_counter()
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        return _cost(started, stalled)


def _cost(started: float, stalled: float) -> Cost:
    return Cost((stalled - started) * 1e3, (time.perf_counter() - started) * 1e3)


def median_ratio(rounds: Sequence[dict[str, Cost]], other: str, field: Field) -> float:
    """Median over the rounds of our figure over another side's."""
    return statistics.median(each[OURS].ms(field) / each[other].ms(field) for each in rounds)


def median_ms(rounds: Sequence[dict[str, Cost]], side: str, field: Field) -> float:
    """Median over the rounds of one side's figure."""
    return round(statistics.median(each[side].ms(field) for each in rounds), 2)


def checks_of(rounds: Sequence[dict[str, Cost]], bytes_per_parameter: float) -> list[Check]:
    """The figures against their goals."""
    found = []
    for other in (TORCH, DEEPSPEED):
        name = other.replace(".", "_")
        found += [
            Check(f"stall_over_{name}", round(median_ratio(rounds, other, "stall"), 4), "≤", STALL_GOAL, "x"),
            Check(f"total_over_{name}", round(median_ratio(rounds, other, "total"), 3), "≤", TOTAL_GOAL, "x"),
        ]
    share = median_ms(rounds, OURS, "stall") / (SECONDS_BETWEEN_SAVES * 1e3) * 100
    return [
        *found,
        Check("stall_share_at_a_save_a_minute", round(share, 4), "≤", SHARE_GOAL, "%"),
        Check("bytes_per_parameter", round(bytes_per_parameter, 4), "≤", BYTES_GOAL, "bytes"),
    ]


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=30e6, metavar="N", help="of the model, about (30e6)")
    parser.add_argument("--rounds", type=int, default=5, help="times that every side saves (5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the training (bf16)")
    parser.add_argument("--dir", type=Path, metavar="FOLDER", help="on the disk to be measured (a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/checkpoint.json")
    options = parser.parse_args(argv)
    if options.rounds < 1 or not 1e4 <= options.parameters <= 1e11:
        parser.error("--rounds must be at least 1, --parameters between 1e4 and 1e11")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse_options(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="bench_checkpoint-", dir=options.dir) as folder:
            return bench(options, Path(folder))
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code


def bench(options: argparse.Namespace, folder: Path) -> int:
    """Save in turn, tell the figures; the exit code."""
    shape = shape_of(options.parameters)
    device = resolve_device(local_ranks()[0])
    ranks = join(device, timeout_minutes=5)
    engine = build(shape, device, options.precision, ranks)
    keeper = Keeper(CheckpointConfig(dir=str(folder / "checkpoints"), keep=0), StorageConfig(), RUN, ranks)
    measured = Bench(engine, shape, keeper, folder, ranks, device)
    measured.round()  # buffers are made, files' blocks are found
    measured.slower_step_ms.clear()
    console = Console(stderr=True)
    rounds = [measured.round() for _ in track(range(options.rounds), "rounds", console=console, transient=True)]
    keeper.close()
    leave(ranks)
    fields: tuple[Field, ...] = ("stall", "total")
    figures = {side: {f"{field}_ms": median_ms(rounds, side, field) for field in fields} for side in measured.sides}
    per_parameter = {side: size / shape.n_parameters for side, size in measured.bytes.items()}
    rows = [
        [side, *(f"{ms:,.1f}" for ms in cost.values()), f"{per_parameter[side]:.2f}"] for side, cost in figures.items()
    ]
    columns = ("side", "stall ms", "total ms", "bytes per parameter")
    console = Console(stderr=options.json, highlight=False)
    print_table(columns, rows, console, right=columns[1:], title=f"{shape.n_parameters:,} parameters")
    slower = statistics.median(measured.slower_step_ms)
    console.print(f"ours beside a step: save and step take {slower:,.1f} ms more than the step alone")
    console.print()
    details = {
        "parameters": shape.n_parameters,
        "precision": options.precision,
        "rounds": options.rounds,
        "sides": {
            side: {**cost, "bytes_per_parameter": round(per_parameter[side], 3)} for side, cost in figures.items()
        },
        "slower_step_ms": round(statistics.median(measured.slower_step_ms), 2),
        "each_round": [{side: [round(c.stall_ms, 2), round(c.total_ms, 2)] for side, c in r.items()} for r in rounds],
    }
    checks = checks_of(rounds, per_parameter[OURS])
    return publish("checkpoint", checks, as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
