"""What telemetry costs: the same steps with and without it.

    python benchmarks/bench_telemetry.py [--json] [--save]

One model of about 10M parameters is trained by the native engine, on or off in turn, a block of steps each: on is all
that `log.telemetry` turns on (phases, the thread that reads the devices 12 times a second, power.csv, the figures of a
record at every step). The order within a round changes from round to round, so that what drifts meets both alike. The
figure is the median of the rounds' ratios of the time of a median step; every step is synchronised, as in training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import torch
from rich.progress import track

from model import GPT
from pretrain.checks import Check, publish
from pretrain.config import EngineConfig, LogConfig, OptimConfig
from pretrain.engine.base import Engine
from pretrain.engine.native import NativeEngine
from pretrain.errors import ConfigError
from pretrain.model_config import ModelConfig
from pretrain.telemetry import Telemetry, open_telemetry

GOAL = 1.0  # percent of a step
MICRO_BATCHES, MICRO_SIZE, SEQ_LEN, VOCAB = 2, 2, 256, 8192
SEED = 0


def build(device: torch.device) -> Engine:
    """The demo's model under the native engine."""
    shape = ModelConfig(size="custom", n_layer=4, n_head=6, d_model=384, vocab_size=VOCAB, seq_len=SEQ_LEN, dropout=0.0)
    torch.manual_seed(SEED)
    precision = "bf16" if device.type == "cuda" else "fp32"
    model = GPT(shape.resolve()).to(device)
    return NativeEngine(model, OptimConfig(), EngineConfig(name="native"), precision, device, 1)


def median_step_s(engine: Engine, telemetry: Telemetry, steps: int) -> float:
    """Seconds of the median step, with its phases and the figures of its record."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(VOCAB, (MICRO_BATCHES * MICRO_SIZE, SEQ_LEN + 1), generator=generator)
    taken = []
    engine.mark = telemetry.mark
    for step in range(1, steps + 1):
        started = time.perf_counter()
        telemetry.begin_step(step)
        with telemetry.phase("data_wait"):
            batches = tokens.split(MICRO_SIZE)
        float(engine.train_step(batches, 1e-4).loss)  # makes a GPU finish
        telemetry.figures()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(engine: Engine, device: torch.device, steps: int, on: bool, folder: str) -> float:
    """`median_step_s` of one block, with telemetry on or off."""
    config = LogConfig(dir=folder, telemetry=on)
    with open_telemetry(config, "bench", device, rank=0, local_rank=0, local_world_size=1) as telemetry:
        return median_step_s(engine, telemetry, steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block (10)")
    parser.add_argument("--rounds", type=int, default=20, help="times that both sides run (20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/telemetry.json")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.rounds < 1:
        problem = ConfigError("--steps and --rounds must be at least 1")
        print(problem.line(), file=sys.stderr)
        return problem.exit_code
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engine = build(device)
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        measure(engine, device, 3, True, folder)  # first steps choose kernels and allocate
        for number in track(range(options.rounds), "rounds", disable=options.json, transient=True):
            for on in (True, False) if number % 2 else (False, True):
                times[on].append(measure(engine, device, options.steps, on, folder))
    ratios = [on / off for on, off in zip(times[True], times[False], strict=True)]
    overhead = round((statistics.median(ratios) - 1) * 100, 2)
    details = {
        "steps": options.steps,
        "rounds": options.rounds,
        "step_ms": round(statistics.median(times[False]) * 1e3, 2),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    checks = [Check("overhead_of_a_step", overhead, "≤", GOAL, "%")]
    return publish("telemetry", checks, as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
