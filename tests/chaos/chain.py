"""A run that is interrupted again and again, and the same run left alone: every loss and every weight compared.

alone = baseline(*OPTIONS)
chain = Chain(folder, OPTIONS, url=bucket_url)
with chain.start() as training:
    training.until_step(7)
    chain.kill(training, "worker", score)
...
chain.finish()
chain.compare(alone, score)
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from pretrain.checkpoint import whole_saves
from pretrain.checkpoint_manifest import Manifest
from pretrain.discovery import damaged_objects, take_inventory
from pretrain.uploads import list_commits
from tests.chaos.score import Score
from tests.runs import (
    ROOT,
    RUN,
    Ended,
    TrainingProcess,
    differing,
    final_state,
    losses,
    make_shards,
    plain_environment,
    store_of,
    train,
)

STEPS, INTERVAL = 60, 5
OPTIONS = ("--max-steps", str(STEPS), "--checkpoint.every_steps", str(INTERVAL))
ZERO2_BF16 = ("--engine", "deepspeed", "--precision", "bf16")
ORPHANS_GONE_S = 20.0
_RESUMED = re.compile(r"resumed checkpoint-\S+: step (\d+),")


@dataclass(frozen=True)
class Baseline:
    """A run that nobody disturbed.

    Args:
        losses: step -> (loss, gradient norm, learning rate).
        state: weights and moments of its last checkpoint.
    """

    losses: Mapping[int, tuple[float, float, float]]
    state: Mapping[str, np.ndarray]


def run_alone(folder: Path, *options: str, ranks: int = 1) -> Baseline:
    """Train to the end, with local checkpoints only."""
    make_shards(folder / "shards")
    ended = train(folder, *options, ranks=ranks)
    assert ended.code == 0, ended.output
    return Baseline(losses(folder), final_state(folder))


def launched(ranks: int) -> list[str]:
    """The command of a run under the launcher, for one rank, too."""
    return [sys.executable, "-m", "pretrain.launch", f"--nproc_per_node={ranks}", str(ROOT / "train.py")]


@dataclass
class Chain:
    """One run in one folder, over all its starts.

    Args:
        folder: a machine's disk, with shards.
        options: of train.py, beside where and how to resume.
        url: bucket of the checkpoints; empty: they stay local.
        ranks: more than 0 start under the launcher, 0 is train.py by itself.
    """

    folder: Path
    options: tuple[str, ...] = OPTIONS
    url: str = ""
    ranks: int = 0
    starts: list[TrainingProcess] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(
        default_factory=list
    )  # (last step taken, newest commit) of each interrupted one

    def start(self, **environment: str) -> TrainingProcess:
        """The next start, from the newest checkpoint."""
        options = (*self.options, "--resume", "auto", *(("--checkpoints", self.url) if self.url else ()))
        command = launched(self.ranks) if self.ranks else None
        training = TrainingProcess(self.folder, *options, command=command, environment=plain_environment(**environment))
        self.starts.append(training)
        return training

    def finish(self) -> Ended:
        """A last start that nobody disturbs; it ends with 0."""
        with self.start() as training:
            ended = training.wait()
        assert ended.code == 0, ended.output
        return ended

    # ---- what there is to go on from ----

    def newest_step(self) -> int:
        """Step of the newest commit, here or in the bucket, or of a save that is whole and has not its name yet, which
        the next start gives it; 0 where there is none."""
        folder = self.folder / "checkpoints" / RUN
        inventory = take_inventory(folder, store_of(self.url) if self.url else None, RUN)
        found = [*whole_saves(folder), *(manifest for manifest, _ in inventory.newest_first())]
        return max(((manifest.sequence, manifest.name.step) for manifest in found), default=(0, 0))[1]

    @property
    def step(self) -> int:
        """The step taken last, a repeated one too; 0 before the first."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else 0

    def until_step(self, training: TrainingProcess, step: int) -> None:
        """Wait until the start has reached a step, whatever was reached before it."""
        training.until(lambda: self.step >= step, f"step {step}")

    def lines(self) -> list[dict[str, float]]:
        """Every whole line of metrics.jsonl, steps that were taken twice twice."""
        path = self.folder / "logs" / RUN / "metrics.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a kill may end the last one anywhere
                found.append(json.loads(line))
        return found

    # ---- ends ----

    def kill(self, training: TrainingProcess, whom: str, score: Score, luck: random.Random) -> None:
        """SIGKILL to "all" processes, to one "worker" or to the "agent" alone; all are gone soon after."""
        workers = training.workers()
        if whom == "all":
            training.kill()
        elif whom == "worker" and workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                luck.choice(workers).kill()
        else:
            training.signal(signal.SIGKILL)
        began = time.monotonic()
        while (left := training.survivors()) and time.monotonic() - began < ORPHANS_GONE_S:
            time.sleep(0.02)
        score.equal("orphans", len(left), 0, "processes", training.output)
        score.at_most("until_all_gone", round(time.monotonic() - began, 2), ORPHANS_GONE_S, "s")
        training.wait()
        self.interrupted()

    # ---- what came of it ----

    def interrupted(self) -> None:
        """Note where a start was interrupted, and what is left to go on from."""
        self.ends.append((self.step, self.newest_step()))

    def check_resumed(self, score: Score, at_most: int, figure: str = "lost_steps") -> None:
        """Every start went on from the newest commit there was, and none lost more than `at_most` steps."""
        for (step, newest), training in zip(self.ends, self.starts[1:], strict=True):
            score.at_most(figure, step - newest, at_most, "steps", (self.ends, training.output))
            if found := _RESUMED.search(training.output):
                score.equal("resumed_from_newest", int(found[1]) == newest, 1, "starts", (newest, training.output))

    def compare(self, alone: Baseline, score: Score) -> None:
        """Every loss, gradient norm and learning rate of every step ever taken, and all of the final state."""
        lines = self.lines()
        steps = {int(line["step"]) for line in lines}
        poisoned = [line for line in lines if not math.isfinite(float(line["loss"]))]  # written as "NaN"
        lines = [line for line in lines if line not in poisoned]  # on purpose, and each taken again without
        wrong = [
            line["step"]
            for line in lines
            if (line["loss"], line["grad_norm"], line["lr"]) != alone.losses[int(line["step"])]
        ]
        score.count("steps_compared", len(lines), "steps")
        score.equal("loss_mismatches", len(wrong), 0, "steps", wrong)
        score.equal("steps_missing", len(set(alone.losses) - steps), 0, "steps", sorted(set(alone.losses) - steps))
        bad = differing(final_state(self.folder), alone.state)
        score.equal("tensor_mismatches", len(bad), 0, "tensors", bad)
        if self.url:
            score.equal("damaged_commits", len(damaged_steps(self.url)), 0, "checkpoints")


def commits_of(url: str) -> dict[int, Manifest]:
    """The readable commits of the run in the bucket, by step."""
    found = list_commits(store_of(url), RUN).values()
    return {commit.manifest.name.step: commit.manifest for commit in found if commit.manifest}


def damaged_steps(url: str) -> list[int]:
    """Steps whose commit in the bucket doesn't verify."""
    store = store_of(url)
    found = list_commits(store, RUN).items()
    return [n.step for n, c in found if not c.manifest or damaged_objects(c.manifest, store, RUN)]
