"""What telemetry costs: the same steps with and without it.

    python benchmarks/bench_telemetry.py [--json] [--save]

One model of about 10M parameters is trained by the native engine, on or off in turn, a block of steps each: on is all
that `log.telemetry` turns on (phases, the thread that reads the devices 12 times a second, power.csv, the figures of a
record at every step). The order within a round changes from round to round, so that what drifts meets both alike, and
every step is synchronised, as in training. Two figures come of it:

- counted: seconds inside telemetry's calls, and the processor's seconds of its thread, as if nothing ran beside it,
  over the time of the steps;
- compared: the mean of the rounds' ratios of the time of a median step, less twice its standard error, so what the
  machine's own noise doesn't explain. The ratio and the error are printed with it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


class Costs:
    """Adds up what telemetry takes: its calls, timed one by one, and the thread that reads the devices."""

    def __init__(self) -> None:
        self.calls_s = self.thread_s = self.steps_s = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time added."""

        def counted(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.calls_s += time.perf_counter() - started

        return counted

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        """The block's share of the processor's time of telemetry's thread, where there is one."""
        readers = [each.ident for each in threading.enumerate() if each.name == "telemetry" and each.ident]
        clocks = [time.pthread_getcpuclockid(reader) for reader in readers]
        before = sum(map(time.clock_gettime, clocks))
        yield
        self.thread_s += sum(map(time.clock_gettime, clocks)) - before

    @property
    def percent(self) -> float:
        """Of the steps' time."""
        return (self.calls_s + self.thread_s) / self.steps_s * 100


def median_step_s(engine: Engine, telemetry: Telemetry, steps: int, costs: Costs) -> float:
    """Seconds of the median step, with its phases and the figures of its record."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(VOCAB, (MICRO_BATCHES * MICRO_SIZE, SEQ_LEN + 1), generator=generator)
    taken = []
    engine.mark = costs.timed(telemetry.mark)
    for step in range(1, steps + 1):
        started = time.perf_counter()
        costs.timed(telemetry.begin_step)(step)
        phase = costs.timed(telemetry.phase)("data_wait")
        costs.timed(phase.__enter__)()
        batches = tokens.split(MICRO_SIZE)
        costs.timed(phase.__exit__)(None, None, None)
        float(engine.train_step(batches, 1e-4).loss)  # makes a GPU finish
        costs.timed(telemetry.figures)()
        taken.append(time.perf_counter() - started)
    costs.steps_s += sum(taken)
    return statistics.median(taken)


def measure(engine: Engine, device: torch.device, steps: int, folder: str, costs: Costs | None) -> float:
    """`median_step_s` of one block: with telemetry, whose costs are added; without it where nobody counts."""
    config = LogConfig(dir=folder, telemetry=costs is not None)
    counted = costs or Costs()
    telemetry = open_telemetry(config, "bench", device, rank=0, local_rank=0, local_world_size=1)
    with telemetry, counted.reader():
        return median_step_s(engine, telemetry, steps, counted)


def checks_of(costs: Costs, ratios: Sequence[float]) -> tuple[list[Check], dict[str, Any]]:
    """The figures against their goals, and what they were made of."""
    mean = (statistics.fmean(ratios) - 1) * 100
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 * 100
    checks = [
        Check("counted_of_a_step", round(costs.percent, 3), "≤", GOAL, "%"),
        Check("compared_beyond_noise", round(mean - 2 * error, 2), "≤", GOAL, "%"),
    ]
    details = {
        "compared_percent": round(mean, 2),
        "standard_error_percent": round(error, 2),
        "calls_percent": round(costs.calls_s / costs.steps_s * 100, 3),
        "thread_percent": round(costs.thread_s / costs.steps_s * 100, 3),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    return checks, details


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps of a block (5)")
    parser.add_argument("--rounds", type=int, default=20, help="times that both sides run, 2 or more (20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/telemetry.json")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.rounds < 2:
        problem = ConfigError("--steps must be at least 1, --rounds at least 2")
        print(problem.line(), file=sys.stderr)
        return problem.exit_code
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engine = build(device)
    times: dict[bool, list[float]] = {True: [], False: []}
    costs = Costs()
    with tempfile.TemporaryDirectory() as folder:
        measure(engine, device, 3, folder, Costs())  # first steps choose kernels and allocate
        for number in track(range(options.rounds), "rounds", disable=options.json, transient=True):
            for on in (True, False) if number % 2 else (False, True):
                times[on].append(measure(engine, device, options.steps, folder, costs if on else None))
    checks, details = checks_of(costs, [on / off for on, off in zip(times[True], times[False], strict=True)])
    details |= {
        "steps": options.steps,
        "rounds": options.rounds,
        "step_ms": round(statistics.median(times[False]) * 1e3, 2),
    }
    if not options.json:
        print("on against off: {compared_percent:+.2f} % ± {standard_error_percent:.2f} %".format(**details), end="; ")
        print("counted: calls {calls_percent} %, thread {thread_percent} % of a step".format(**details))
    return publish("telemetry", checks, as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
