"""One run of train.py as real processes, which can be killed at a chosen moment and started again.

trial = Trial(folder, "killed", words)
trial.start(kill_at=Moment(step=12, later_s=0.02))     # kill -9, 20 ms after step 12 was recorded
trial.start()                                          # goes on to the end
[start.first_step for start in trial.starts]           # [0, 10]: step 10 was the newest checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from pretrain.batches import Position
from pretrain.checkpoint import saving_folder, whole_saves
from pretrain.checkpoint_manifest import Manifest
from pretrain.discovery import take_inventory
from pretrain.errors import EXIT_DONE, CheckpointError, TrainerError
from pretrain.metrics import METRICS_FILE
from pretrain.mixture import position_from
from pretrain.processes import end_with_parent
from pretrain.progress import TRAINER_STATE_FILE

POLL_S = 0.005
END_PATIENCE_S = 60.0  # for killed processes to be gone
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KINDS = {kind.exit_code: kind for kind in TrainerError.__subclasses__()}

Record = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Moment:
    """A point in a run's time that another run of the same settings has, too.

    Args:
        step: the last one recorded before it.
        later_s: seconds since that record.
    """

    step: int
    later_s: float


def random_moments(records: Sequence[Record], count: int, seed: int) -> list[Moment]:
    """Moments spread uniformly over the time between a run's first record and its last but one, saves included.

    The last step is left out: it may end before anybody can kill it.
    """
    times = [float(record["time"]) for record in records]
    random = Random(seed)
    drawn = sorted(random.uniform(times[0], times[-2]) for _ in range(count))
    steps = [bisect_right(times, moment) for moment in drawn]
    return [Moment(step, moment - times[step - 1]) for step, moment in zip(steps, drawn, strict=True)]


@dataclass
class Start:
    """One start of a trial's processes.

    Args:
        records: what it wrote to metrics.jsonl, in order.
        killed_at: None where it ended by itself.
    """

    records: list[Record] = field(default_factory=list)
    killed_at: Moment | None = None

    @property
    def first_step(self) -> int:
        """Step of the checkpoint that it went on from; 0 for a fresh start."""
        return int(self.records[0]["step"]) - 1

    @property
    def last_step(self) -> int:
        """The last step that it recorded."""
        return int(self.records[-1]["step"])


class Trial:
    """A run that lives in one folder: `logs/NAME`, `checkpoints/NAME` and what is printed.

    Args:
        folder: of the run; its config must name the folders in it.
        words: the command with all its options but the run's name.
        on_step: called with each step as it is recorded.
    """

    def __init__(
        self, folder: Path, name: str, words: Sequence[str], on_step: Callable[[int], None] = lambda step: None
    ) -> None:
        self.name = name
        self.starts: list[Start] = []
        self.positions: dict[int, Position] = {0: Position()}
        """Where each checkpoint stood that a start could go on from, by step."""
        self.checkpoints = folder / "checkpoints" / name
        self._output = folder / f"{name}.txt"
        self._words = [*words, "--run-name", name, "--resume", "auto"]
        self._metrics = folder / "logs" / name / METRICS_FILE
        self._read_to = 0
        self._on_step = on_step

    def start(self, kill_at: Moment | None = None) -> bool:
        """Start the processes, and kill them at a moment; returns whether the run came to its end.

        Raises:
            TrainerError: it ended in another way, or without a record; of the kind that its exit code says.
        """
        self.positions |= {step: position for step, position in self._saved_positions().items() if step}
        start = Start()
        self.starts.append(start)
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        with self._output.open("ab") as output:
            process = subprocess.Popen(
                self._words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C reaches it through here
                preexec_fn=end_with_parent,
            )
            try:
                self._follow(process, start, kill_at)
            finally:
                _kill(process)
        self._read(start)
        if start.killed_at is None and process.returncode != EXIT_DONE:
            kind = KINDS.get(process.returncode, TrainerError)
            raise kind(f"run {self.name} ended with exit code {process.returncode}: {self._last_words()}")
        if not start.records:
            raise CheckpointError(f"run {self.name} ended without a step", "It was over already: take another folder.")
        return start.killed_at is None

    def newest_commit(self) -> Manifest:
        """The newest checkpoint on this machine.

        Raises:
            CheckpointError: there is none.
        """
        local = take_inventory(self.checkpoints, None, self.name).local.values()
        if not local:
            raise CheckpointError(f"{self.checkpoints} holds no checkpoint")
        return max(local, key=lambda manifest: manifest.sequence)

    def _follow(self, process: subprocess.Popen[bytes], start: Start, kill_at: Moment | None) -> None:
        """Watch the records until the process ends, or the moment has come."""
        deadline = float("inf")
        while process.poll() is None:
            self._read(start)
            now = time.monotonic()
            if kill_at and deadline == float("inf") and start.records and start.last_step >= kill_at.step:
                deadline = now + kill_at.later_s
            if now >= deadline:
                _kill(process)
                start.killed_at = kill_at
                return
            time.sleep(POLL_S)

    def _read(self, start: Start) -> None:
        """Take up the whole lines that are new in metrics.jsonl; a line that a kill tore is none."""
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as file:
            file.seek(self._read_to)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._read_to += len(line)
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                start.records.append(record)
                self._on_step(record["step"])

    def _saved_positions(self) -> dict[int, Position]:
        """Where the checkpoints on this machine stand, as they say themselves; also those that a kill left whole and
        without their name, which the next start gives them."""
        named = take_inventory(self.checkpoints, None, self.name).local
        folders = {name: self.checkpoints / str(name) for name in named}
        for manifest in whole_saves(self.checkpoints):
            folders[manifest.name] = saving_folder(self.checkpoints / str(manifest.name))
        found = {}
        for name, folder in folders.items():
            state = json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
            found[name.step] = position_from(state["progress"]["position"])
        return found

    def _last_words(self) -> str:
        lines = self._output.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all its descendants at one point in their time; returns when they are gone."""
    if process.poll() is not None:
        return
    root = psutil.Process(process.pid)
    found = [root]
    for stopped in found:  # a stopped process starts no more children
        with contextlib.suppress(psutil.NoSuchProcess):
            stopped.suspend()
            found += stopped.children()
    for each in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    _, left = psutil.wait_procs(found, timeout=END_PATIENCE_S)
    if left:
        raise CheckpointError(f"processes {[each.pid for each in left]} survive kill -9", "Is their disk away?")
