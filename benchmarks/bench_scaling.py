"""What a second rank brings by each engine, measured on this machine, and what pretrain/scaling.py predicts of it.

    python benchmarks/bench_scaling.py [--engines ddp,fsdp,zero1,zero2,zero3] [--rounds 5] [--json] [--save]

Two ranks train the same GPT on as many tokens each, in turn and several times: each for itself, without a word between
them, and together by the engine. The efficiency of an engine is the median ratio of the two: the cores are as busy in
both, so what is missing to 1 is communication. `alone` is one rank while the other waits, against both at once without
communication: what two ranks cost each other in caches and memory, which no engine can help.

The prediction takes the time of the step without communication and the speed of each kind of collective, measured here
in the same round (gloo has no reduce-scatter: torch makes it of an all-reduce); how much longer the engine's step takes
than the plain one on one rank, where nothing is communicated (its `own` work: hooks, copies, bookkeeping; with a model
as small as this one it shows); and what the engine moves. On one machine the "network" is the loopback, which costs the
cores what it moves, so nothing overlaps: the model is told.
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from model import GPT
from pretrain.checks import Check, publish
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine.base import Engine
from pretrain.engine.build import build_engine
from pretrain.engine.native import NativeEngine
from pretrain.errors import ConfigError
from pretrain.memory import Setup
from pretrain.model_config import ModelConfig
from pretrain.plan import make_setup
from pretrain.ranks import Ranks, join, leave
from pretrain.reports import end_at_once
from pretrain.scaling import Rates, collectives, step_time

RANKS = 2
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
MESSAGES = 8  # of each kind, to measure it
ENGINES = {
    "ddp": EngineConfig(name="ddp"),
    "fsdp": EngineConfig(name="fsdp"),
    **{f"zero{stage}": EngineConfig(name="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)},
}
OPTIM = OptimConfig(lr=1e-4, warmup_steps=0)
GOAL, TOLERANCE = 0.5, 0.25
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]

Step = Callable[[], object]


def shape_of(scale: int) -> ModelConfig:
    """A GPT of 5.3M parameters for a scale of 4: it grows with the square and more."""
    return ModelConfig(
        size="custom", n_layer=2 + scale, n_head=4, d_model=64 * scale, vocab_size=2048, seq_len=128, dropout=0.0
    ).resolve()


def batch_of(world_size: int) -> BatchConfig:
    """Two micro-batches of two sequences for each rank."""
    return BatchConfig(global_size=4 * world_size, micro_size=2)


def seconds_of(step: Step, ranks: Ranks) -> float:
    """One step, from the moment that both ranks begin to the moment that the slower one ends."""
    ranks.barrier()
    started = time.perf_counter()
    step()
    ranks.barrier()
    return time.perf_counter() - started


class Bench:
    """The engines of one rank.

    Args:
        names: keys of ENGINES; what can't run here is left out.
    """

    def __init__(self, ranks: Ranks, names: Sequence[str], scale: int) -> None:
        self.ranks = ranks
        self.model = shape_of(scale)
        self._block = sum(p.numel() for p in GPT(self.model, "sdpa").blocks[0].parameters())
        tokens = torch.randint(self.model.vocab_size, (4, self.model.seq_len + 1))
        self._micro_batches = tokens.split(2)
        own = NativeEngine(GPT(self.model, "sdpa"), OPTIM, EngineConfig(name="single"), "fp32", CPU, 1)
        self.alone = self._step_of(own)
        self.together: dict[str, Step] = {}
        batch = batch_of(ranks.world_size)
        for name in names:
            torch.manual_seed(0)
            engine = build_engine(GPT(self.model, "sdpa"), ENGINES[name], OPTIM, batch, "fp32", CPU, ranks)
            if engine.name == ENGINES[name].name:  # not the one that stands in for DeepSpeed without a compiler
                self.together[name] = self._step_of(engine)

    def _step_of(self, engine: Engine) -> Step:
        return lambda: engine.train_step(self._micro_batches, 1e-4)

    def _collectives(self) -> dict[str, float]:
        """Seconds for a byte by kind, in messages as large as a block's weights."""
        whole = torch.ones(self._block - self._block % self.ranks.world_size)
        share = whole.chunk(self.ranks.world_size)[self.ranks.rank].clone()
        kinds: dict[str, Step] = {
            "all_reduce": lambda: dist.all_reduce(whole),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(share, whole),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, share),
        }
        empty = seconds_of(lambda: None, self.ranks)
        n_bytes = MESSAGES * whole.nbytes

        def repeated(send: Step) -> Step:
            return lambda: [send() for _ in range(MESSAGES)]

        return {kind: (seconds_of(repeated(send), self.ranks) - empty) / n_bytes for kind, send in kinds.items()}

    def setup(self, name: str) -> Setup:
        """What is predicted."""
        return make_setup(self.model, batch_of(RANKS), ENGINES[name], OPTIM, "fp32", RANKS)

    def round(self) -> dict[str, float]:
        """Seconds of everything once: solo, apart, each kind of collective for a byte, and each engine."""
        waits: Step = lambda: None  # noqa: E731
        found = {"solo": seconds_of(self.alone if self.ranks.is_first else waits, self.ranks)}
        found["apart"] = seconds_of(self.alone, self.ranks)
        if self.ranks.world_size > 1:
            found |= self._collectives()
        for name, step in self.together.items():
            found[name] = seconds_of(step, self.ranks)
        return found


def predicted(setup: Setup, own: float, measured: dict[str, float]) -> float:
    """Efficiency that the model gives an engine here, from what a round measured without the engine.

    Args:
        own: the engine's step over the plain one, on one rank.
    """
    rates = Rates(*(measured[kind] for kind in KINDS))
    moved, accumulation, apart_s = collectives(setup), setup.batch.accumulation(RANKS), measured["apart"]
    return apart_s / step_time(moved, apart_s * own, accumulation, rates, 0.0, overlap=0.0).total


def own_work(rounds: Sequence[dict[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Each engine's step over the plain one."""
    return {name: statistics.median(each[name] / each["apart"] for each in rounds) for name in names}


def evaluate(
    bench: Bench, rounds: Sequence[dict[str, float]], own: dict[str, float]
) -> tuple[list[Check], dict[str, Any]]:
    """(checks, details)."""

    def median_of(ratio: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(ratio(each) for each in rounds)

    checks, rows = [], {}
    for name in bench.together:
        setup, factor = bench.setup(name), own[name]
        measured = median_of(lambda each: each["apart"] / each[name])  # noqa: B023 (used at once)
        model = median_of(lambda each: predicted(setup, factor, each))  # noqa: B023
        rows[name] = {"measured": round(measured, 3), "predicted": round(model, 3), "own": round(factor, 3)}
        checks.append(Check(f"efficiency_{name}", round(measured, 3), "≥", GOAL, "of 1"))
        checks.append(Check(f"prediction_off_{name}", round(abs(model / measured - 1), 3), "≤", TOLERANCE, "of 1"))
    details = {
        "parameters": bench.model.n_parameters,
        "rounds": len(rounds),
        "efficiency": rows,
        "alone_over_both_at_once": round(median_of(lambda each: each["solo"] / each["apart"]), 3),
        "step_without_communication_ms": round(median_of(lambda each: each["apart"]) * 1e3, 1),
        **{f"{kind}_gb_per_s": round(median_of(lambda e: 1 / e[kind]) / 1e9, 2) for kind in KINDS},  # noqa: B023
    }
    return checks, details


def work(options: argparse.Namespace) -> NoReturn:
    """What a rank does; the first writes what it found: on one rank the engines' own work, on two the checks."""
    ranks = join(CPU, 10)
    bench = Bench(ranks, options.engines, options.scale)
    bench.round()  # first steps allocate, choose kernels and compile
    rounds = [bench.round() for _ in range(options.rounds)]
    result = Path(options.result)
    if ranks.world_size == 1:
        result.write_text(json.dumps(own_work(rounds, bench.together)))
    elif ranks.is_first:
        checks, details = evaluate(bench, rounds, json.loads(options.own))
        result.write_text(json.dumps({"checks": [vars(check) for check in checks], "details": details}))
    leave(ranks)
    end_at_once(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES), help=", ".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=5, help="times that everything runs (5)")
    parser.add_argument("--scale", type=int, default=4, help="of the model; 4 is 5.3M parameters (4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/scaling.json")
    parser.add_argument("--result", default="", help=argparse.SUPPRESS)
    parser.add_argument("--own", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if unknown := sorted(set(options.engines) - set(ENGINES)):
        problem = ConfigError(f"--engines {unknown[0]!r} is none of {', '.join(ENGINES)}")
    elif options.rounds < 1 or options.scale < 1:
        problem = ConfigError("--rounds and --scale must be at least 1")
    else:
        return work(options) if options.result else start(words, options)
    print(problem.line(), file=sys.stderr)
    return problem.exit_code


def start(words: list[str], options: argparse.Namespace) -> int:
    """Measure the engines' own work, then start two ranks, one thread each, and publish what the first found."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"own{number}.json" for number in range(RANKS)]
        alone = [launched(1, [*words, "--result", str(result)]) for result in results]  # so many: as busy as together
        if code := next(filter(None, [process.wait() for process in alone]), 0):
            return code
        found = [json.loads(result.read_text()) for result in results]
        own = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
        result = Path(folder) / "result.json"
        if code := launched(RANKS, [*words, "--result", str(result), "--own", json.dumps(own)]).wait():
            return code
        together = json.loads(result.read_text())
    checks = [Check(**check) for check in together["checks"]]
    return publish("scaling", checks, as_json=options.json, save=options.save, details=together["details"])


def launched(ranks: int, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """This benchmark by so many ranks of one run."""
    launcher = [sys.executable, "-m", "pretrain.launch", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher, str(Path(__file__).resolve()), *words], env=environment, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
