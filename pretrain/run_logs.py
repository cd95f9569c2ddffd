"""The logs of a run as a reader sees them, also while they are written: whole lines, joined over all restarts.

    run = RunLogs("test", Path("logs/test"))
    run.refresh()                      # again and again: only what is new is read
    print(run.records[-1]["loss"], run.restart_steps, run.ended)

A line that is only half there is left for the next look. What is torn in the middle of a file is counted and passed
over, and what another version wrote in another way is left out rather than trusted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain.errors import StorageError
from pretrain.ledger import RESTARTS_FILE
from pretrain.metrics import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, SUMMARY_FILE, join, parse_record

TRAINING_LOG = "training.log"
POWER_FILE = "power.csv"
STARTS = ("started", "resumed")

LOG_TAIL_BYTES = 256 << 10  # of training.log, at the first look
MAX_DOCUMENT_BYTES = 16 << 20
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:,\d+)? (\w+) +\S+  (.*)")
_TOTAL = re.compile(r"step +\d+/(\d+) \|")

Tree = dict[str, Any]


@dataclass(frozen=True)
class LogLine:
    """One entry of training.log; `time_s` in seconds since 1970, 0 where the line has none."""

    time_s: float
    level: str
    text: str

    @property
    def is_warning(self) -> bool:
        """Whether somebody should read it."""
        return self.level in ("WARNING", "ERROR", "CRITICAL")


class Follower:
    """The lines of a file that grows, each once.

    Args:
        tail_bytes: the first look begins so far before the end; 0: at the start.
    """

    def __init__(self, path: Path, tail_bytes: int = 0) -> None:
        self.path = path
        self._tail_bytes = tail_bytes
        self._at = 0
        self._file_id: tuple[int, int] | None = None

    def lines(self) -> tuple[list[str], bool]:
        """The lines that were ended since the last look, and whether the file is another one than it was then.

        Raises:
            StorageError: it can't be read. A file that is not there has no lines.
        """
        try:
            with self.path.open("rb") as file:
                return self._new_lines(file)
        except FileNotFoundError:
            is_new, self._file_id, self._at = self._file_id is not None, None, 0
            return [], is_new
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}", f"Look at it: ls -l {self.path}") from error

    def _new_lines(self, file: Any) -> tuple[list[str], bool]:
        status = os.fstat(file.fileno())  # of the path another file may have taken since it was opened
        file_id = status.st_dev, status.st_ino
        is_new = self._file_id not in (None, file_id) or status.st_size < self._at
        skips = False
        if is_new or self._file_id is None:
            self._at = max(status.st_size - self._tail_bytes, 0) if self._tail_bytes else 0
            skips = self._at > 0  # into the middle of a line
        self._file_id = file_id
        file.seek(self._at)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        lines = whole.decode("utf-8", errors="replace").splitlines()
        return lines[1:] if skips else lines, is_new


class RunLogs:
    """One run's log folder.

    Args:
        name: of the run, for people.
        folder: logs/{run}, or a copy of it.
        where: it is from, for people.

    Attributes:
        records: of metrics.jsonl over all restarts, in order of their steps, each step once.
        events: of events.jsonl, since the run was last started from step 0.
        restarts: of the supervisor's restarts.jsonl.
        summary: summary.json, of whichever process ended last; {} where there is none.
        config_text: config.yaml of the newest start; "" where there is none.
        messages: of training.log, the newest.
        torn: lines that could not be read.
        total_steps: step at which it ends; None where unknown.
    """

    def __init__(self, name: str, folder: Path, where: str = "") -> None:
        self.name = name
        self.folder = folder
        self.where = where or str(folder)
        self.records: list[Tree] = []
        self.events: list[Tree] = []
        self.restarts: list[Tree] = []
        self.summary: Tree = {}
        self.config_text = ""
        self.messages: list[LogLine] = []
        self.torn = 0
        self.total_steps: int | None = None
        self._followers = {name: Follower(folder / name) for name in (METRICS_FILE, EVENTS_FILE, RESTARTS_FILE)}
        self._followers[TRAINING_LOG] = Follower(folder / TRAINING_LOG, LOG_TAIL_BYTES)

    def refresh(self) -> None:
        """Read what is new. Raises StorageError where a file is there and can't be read."""
        lines, is_new = self._followers[METRICS_FILE].lines()
        if is_new:
            self.records, self.torn = [], 0
        for line in lines:
            record = parse_record(line)
            if record is None:
                self.torn += bool(line.strip())
            else:
                join(self.records, record)
        for event in self._trees(EVENTS_FILE, self.events):
            if event.get("kind") == "started":
                self.events.clear()
            if isinstance(event.get("kind"), str):
                self.events.append(event)
        self.restarts += self._trees(RESTARTS_FILE, self.restarts)
        self._read_messages()
        self.summary = _document(self.folder / SUMMARY_FILE)
        self.config_text = _text(self.folder / CONFIG_FILE)
        self.total_steps = _total_steps(self.events, self.messages) or self.total_steps

    def _trees(self, file: str, so_far: list[Tree]) -> list[Tree]:
        lines, is_new = self._followers[file].lines()
        if is_new:
            so_far.clear()
        return parse_trees(lines)

    def _read_messages(self) -> None:
        lines, is_new = self._followers[TRAINING_LOG].lines()
        if is_new:
            self.messages = []
        self.messages = (self.messages + parse_log(lines))[-1000:]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of it."""
        return not (self.records or self.events or self.summary or self.messages)

    @property
    def starts(self) -> list[Tree]:
        """The events of its starts, oldest first."""
        return [event for event in self.events if event["kind"] in STARTS]

    @property
    def restart_steps(self) -> tuple[int, ...]:
        """See the function of that name."""
        return restart_steps(self.events)

    @property
    def ended(self) -> Tree | None:
        """The event of its end, of several the newest that says how; None while it runs, and where it was killed."""
        found = None
        for event in reversed(self.events):
            if event["kind"] in STARTS:
                break
            if event["kind"] == "ended" and (found is None or "reason" not in found):
                found = event if found is None or "reason" in event else found
        return found

    @property
    def updated_s(self) -> float | None:
        """When the newest record or event was written, in seconds since 1970."""
        times = [time_of(each) for each in (*self.records[-1:], *self.events[-1:])]
        return max((time for time in times if time), default=None)

    def of_kind(self, *kinds: str) -> list[Tree]:
        """The events of these kinds, oldest first."""
        return [event for event in self.events if event["kind"] in kinds]


def read_events(folder: Path) -> list[Tree]:
    """events.jsonl of a log folder since the run was last started from step 0; what is torn is left out.

    Raises:
        StorageError: it is there and can't be read.
    """
    lines, _ = Follower(folder / EVENTS_FILE).lines()
    events = [event for event in parse_trees(lines) if isinstance(event.get("kind"), str)]
    begins = [index for index, event in enumerate(events) if event["kind"] == "started"]
    return events[begins[-1] :] if begins else events


def restart_steps(events: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """Steps at which a process resumed the run, in order, each once."""
    return tuple(sorted({event["step"] for event in events if event.get("kind") == "resumed" and _is_step(event)}))


def parse_trees(lines: Iterable[str]) -> list[Tree]:
    """The JSON objects of some lines; what is none is left out."""
    found = []
    for line in lines:
        try:
            tree = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(tree, dict):
            found.append(tree)
    return found


def parse_log(lines: Iterable[str]) -> list[LogLine]:
    """Entries of training.log; the further lines of an entry are left out."""
    found = []
    for line in lines:
        if match := _LINE.match(line):
            try:
                time_s = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").timestamp()
            except ValueError:
                time_s = 0.0
            found.append(LogLine(time_s, match[2], printable(match[3])))
    return found


def printable(text: str) -> str:
    """`text` without what would move a terminal's cursor or change its colours."""
    return "".join(character if character.isprintable() else "�" for character in text)


def time_of(tree: Mapping[str, Any]) -> float:
    """When a record or an event was written, in seconds since 1970; 0 where it does not say."""
    value = tree.get("time")
    return float(value) if isinstance(value, (int, float)) else 0.0


def number(tree: Mapping[str, Any], *names: str) -> float | None:
    """The first of these fields that is a number; None where none is. NaN and the infinities count."""
    for name in names:
        value = tree.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def _is_step(event: Mapping[str, Any]) -> bool:
    return isinstance(event.get("step"), int)


def _total_steps(events: Iterable[Mapping[str, Any]], messages: list[LogLine]) -> int | None:
    """As the newest start says; of versions that did not say it, as a line of the log has it."""
    found = [event.get("total_steps") for event in events if event["kind"] in STARTS]
    if found and isinstance(found[-1], int):
        return found[-1]
    totals = (_TOTAL.search(message.text) for message in reversed(messages))
    return next((int(total[1]) for total in totals if total), None)


def _document(path: Path) -> Tree:
    trees = parse_trees([_text(path)])
    return trees[0] if trees else {}


def _text(path: Path) -> str:
    """A small file; "" where there is none, or where it is too big to be what it should be."""
    try:
        return path.read_text("utf-8", "replace") if path.stat().st_size <= MAX_DOCUMENT_BYTES else ""
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", f"Look at it: ls -l {path}") from error
