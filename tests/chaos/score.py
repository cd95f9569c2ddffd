"""The scenarios of the suite, what each of them counts, and how many times the repeated ones run.

@pytest.mark.chaos(4)
@repeated(few=1, of_20=5)
def test_something(score, times):
    for _ in range(times):
        with score.run():
            ...
            score.equal("mismatches", len(differing), 0, "steps")
            score.at_most("lost_steps", lost, INTERVAL, "steps")
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pytest

REPETITIONS = int(os.environ.get("CHAOS_N", "20"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
LANES = 2  # starts of train.py at a time: each is busy with imports for seconds

SCENARIOS = {
    1: "random kill -9: all ranks, one worker, the agent",
    2: "every failpoint",
    3: "each file of a checkpoint truncated, flipped, deleted",
    4: "commit reply lost",
    5: "two trainers on one run",
    6: "orphan writer: an old attempt wakes up",
    7: "SIGTERM at a random phase",
    8: "second SIGTERM during an upload",
    9: "30 % of the requests for 200 shards fail",
    10: "stalled transfer",
    11: "bad shard at the source, both policies",
    12: "403 at start and in the middle",
    13: "bucket away during saves",
    14: "disk full while saving and caching",
    15: "everything corrupt with --resume",
    16: "2, 4 and 1 ranks, one engine after another",
    17: "a rank stopped by SIGSTOP",
    18: "malicious .npz, .pt, tar and safetensors",
}


@dataclass(frozen=True)
class Figure:
    """One figure of a scenario and what it must be.

    Args:
        name: snake_case; what was counted or measured.
        relation: "=", "≤", or "" where the figure has no goal and tells how much was tried.
    """

    name: str
    value: float
    relation: str
    goal: float
    unit: str


class Score:
    """What one test of a scenario counted. Safe to use from several threads."""

    def __init__(self) -> None:
        self.runs = 0
        self.passed = 0
        self.figures: list[Figure] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """One repetition; passed where the block ends without an error."""
        with self._lock:
            self.runs += 1
        yield
        with self._lock:
            self.passed += 1

    def count(self, name: str, value: float, unit: str) -> None:
        """A figure without a goal; those of one name add up."""
        self._note(Figure(name, value, "", 0, unit))

    def equal(self, name: str, value: float, goal: float, unit: str, told: object = "") -> None:
        """A figure that must be exactly its goal; both add up over the repetitions. `told` explains a failure."""
        self._note(Figure(name, value, "=", goal, unit))
        assert value == goal, f"{name}: {value} {unit}, expected {goal}: {told}"

    def at_most(self, name: str, value: float, goal: float, unit: str, told: object = "") -> None:
        """A figure with an upper bound; the worst of the repetitions is reported."""
        self._note(Figure(name, value, "≤", goal, unit))
        assert value <= goal, f"{name}: {value} {unit}, expected at most {goal}: {told}"

    def _note(self, figure: Figure) -> None:
        with self._lock:
            self.figures.append(figure)

    def to_json(self, failed: bool) -> dict[str, Any]:
        """Runs, passed runs and figures; a failure outside of every repetition counts as a run of its own."""
        runs, passed = self.runs, self.passed
        if runs == 0 or (failed and passed == runs):
            runs, passed = runs + 1, passed + (not failed)
        return {"runs": runs, "passed": passed, "figures": [asdict(figure) for figure in self.figures]}


def repeated(few: int, of_20: int) -> pytest.MarkDecorator:
    """Give the test `times`: `few` in the ordinary suite, and in the long one `of_20` for every 20 of CHAOS_N.

    Args:
        few: 0 where another test does it in the ordinary suite.
    """
    many = max(1, round(of_20 * REPETITIONS / 20))
    patient = [pytest.mark.slow, pytest.mark.timeout(300 + 120 * many)]
    ordinary = [pytest.param(few, id="few")] if few else []
    return pytest.mark.parametrize("times", [*ordinary, pytest.param(many, id="many", marks=patient)])


def dice(*what: object) -> random.Random:
    """Random numbers that depend on CHAOS_SEED and on `what` alone."""
    return random.Random(f"{SEED} {what}")


def in_lanes(tasks: Sequence[Callable[[], None]], lanes: int = LANES) -> None:
    """Run the tasks, so many at a time, in their order; the first error is raised when all have ended."""
    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()
