"""From the command to the end of the first step: the main job of test_train.sh, its cache warm, in seconds by phase.

    python benchmarks/bench_startup.py [--rounds 3] [--ranks 1] [--compile] [--json] [--save]

The same command each time: pretrain.launch starts train.py with configs/test.yaml, shards and checkpoints in the
embedded bucket. A first start fills the cache of the shards, DeepSpeed's small op and, with --compile, torch's cache;
it is told beside the others and not counted among them. Then everything is found there.

The clock runs here, from before the launcher is started until the trainer has said that its first step is done; the
trainer's own account of its phases (`startup_seconds` in summary.json) must add up to that. In turn with the starts
Python imports torch and nothing else: no start of a trainer can take less, and under a launcher that imports it too,
none takes less than twice that. The ratio says of a busy machine what the seconds can't.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from pretrain.checks import Check, publish
from pretrain.config import StorageConfig
from pretrain.embedded import embedded_bucket
from pretrain.errors import ConfigError, TrainerError
from pretrain.listings import print_table
from pretrain.storage import open_store

ROOT = Path(__file__).resolve().parents[1]
GOAL_S, RATIO_GOAL, UNEXPLAINED_GOAL = 10.0, 6.0, 0.1
BUCKET, RUN, SAID = "bench", "startup", "start-up: "
N_SHARDS, TOKENS_EACH, VOCAB_SIZE = 25, 32_769, 8192  # as scripts/make_demo_data.py makes them


@dataclass(frozen=True)
class Start:
    """One start.

    Args:
        seconds: from the command to the end of the first step, by the clock of this process.
        phases: the same by the trainer's account, seconds.
    """

    seconds: float
    phases: dict[str, float]

    @property
    def unexplained(self) -> float:
        """The part of the time that the phases do not add up to, 0 to 1."""
        return abs(1 - sum(self.phases.values()) / self.seconds)


def fill_bucket(folder: Path) -> None:
    """Shards of random ids: nothing here depends on what they say."""
    generator, store = np.random.default_rng(0), open_store(f"gs://{BUCKET}/data", StorageConfig())
    for number in range(N_SHARDS):
        path = folder / f"shard_{number:05d}.npz"
        np.savez(path, input_ids=generator.integers(0, VOCAB_SIZE, TOKENS_EACH, dtype=np.uint16))
        store.upload(path, path.name)
        path.unlink()


def start(folder: Path, options: argparse.Namespace, number: int) -> Start:
    """One start in a folder that keeps the caches.

    Raises:
        TrainerError: it took no step.
    """
    run = f"{RUN}-{number}"
    launcher = [sys.executable, "-m", "pretrain.launch", f"--nproc_per_node={options.ranks}"]
    words = [*launcher, str(ROOT / "train.py"), "--config", "test", "--run-name", run]
    words += ["--data", f"gs://{BUCKET}/data", "--checkpoints", f"gs://{BUCKET}/Checkpoints", "--max-steps", "1"]
    words += ["--no-version-check", *(["--compile"] if options.compile else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    began = time.perf_counter()
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed, seconds = [], 0.0
        for line in process.stdout:
            printed.append(line)
            if SAID in line and not seconds:
                seconds = time.perf_counter() - began
    if process.returncode or not seconds:
        sys.stderr.writelines(printed[-20:])
        raise TrainerError(f"train.py ended with {process.returncode} before its first step", "It printed the above")
    summary = json.loads((folder / "logs" / run / "summary.json").read_text(encoding="utf-8"))
    return Start(seconds, summary["startup_seconds"])


def import_torch_s() -> float:
    """Seconds that Python takes to import torch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def evaluate(starts: Sequence[Start], floors: Sequence[float], compiles: bool) -> list[Check]:
    """The checks; of a compiled start, whose time is the compiler's, only that its phases add up.

    Args:
        floors: seconds of importing torch, before each start.
    """
    seconds = statistics.median(each.seconds for each in starts)
    unexplained = statistics.median(each.unexplained for each in starts)
    ratio = statistics.median(each.seconds / floor for each, floor in zip(starts, floors, strict=True))
    goals = [
        Check("first_step_after", round(seconds, 2), "≤", GOAL_S, "s"),
        Check("first_step_over_import_of_torch", round(ratio, 2), "≤", RATIO_GOAL, "x"),
    ]
    goals = [] if compiles else goals
    return [*goals, Check("not_in_a_phase", round(unexplained, 3), "≤", UNEXPLAINED_GOAL, "of 1")]


def medians(starts: Sequence[Start]) -> dict[str, float]:
    """Seconds of each phase."""
    return {name: round(statistics.median(each.phases[name] for each in starts), 3) for name in starts[0].phases}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="starts with a warm cache (3)")
    parser.add_argument("--ranks", type=int, default=1, help="of the run (1, as test_train.sh)")
    parser.add_argument("--compile", action="store_true", help="of a run that compiles its model")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/startup.json")
    options = parser.parse_args(argv)
    try:
        if options.rounds < 1 or options.ranks < 1:
            raise ConfigError("--rounds and --ranks must be at least 1")
        with tempfile.TemporaryDirectory(prefix="bench_startup-") as temporary:
            folder = Path(temporary)
            with embedded_bucket(folder / "bucket", BUCKET):
                fill_bucket(folder)
                cold = start(folder, options, 0)
                starts, floors = [], []
                for number in range(1, options.rounds + 1):
                    floors.append(import_torch_s())
                    starts.append(start(folder, options, number))
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    phases, floor = medians(starts), statistics.median(floors)
    rows = [[name, f"{cold.phases.get(name, 0.0):.2f}", f"{seconds:.2f}"] for name, seconds in phases.items()]
    rows.append(["import torch alone", "", f"{floor:.2f}"])
    print_table(("phase", "first, s", "warm, s"), rows, Console(stderr=True), right=("first, s", "warm, s"))
    details = {
        "ranks": options.ranks,
        "compiled": options.compile,
        "rounds": options.rounds,
        "phases_s": phases,
        "first_start_s": round(cold.seconds, 2),
        "each_round_s": [round(each.seconds, 2) for each in starts],
        "import_torch_s": round(floor, 2),
    }
    name = "startup_compiled" if options.compile else "startup"
    checks = evaluate(starts, floors, options.compile)
    return publish(name, checks, as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
