"""What a run measured: one JSON object a logged step in metrics.jsonl, which every other display is drawn from.

    with open_metrics(config.log, run, settings=..., total_steps=..., first_step=..., rank=rank) as metrics:
        metrics.record({"step": 1, "loss": 10.8, "lr": 1e-4})
        metrics.event("checkpoint_committed", step=1, name="checkpoint-epoch0-step1-files0")
        metrics.summary({"steps": 1})

A folder `logs/{run}` holds metrics.jsonl (a line a logged step), events.jsonl (what happened between steps; `started`
or `resumed` first, `ended` last), config.yaml (of the newest start) and summary.json (the end). NaN and the infinities,
which JSON lacks, are written as the strings "NaN", "Infinity" and "-Infinity", so that a diverged run still reads as
one; `read_metrics` turns them back into floats.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from pretrain import log
from pretrain.config import LogConfig
from pretrain.console import ConsoleSink
from pretrain.errors import EXIT_DONE, EXIT_STOPPED, StorageError, TrainerError
from pretrain.files import new_file
from pretrain.ledger import RESTARTS_FILE, Ledger, furthest_step
from pretrain.sinks import Sink, TensorBoardSink, WandbSink

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.yaml"
FORMAT = 1  # of these files, told by the event of each start: what a reader would misunderstand takes the next number

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_log = log.get(__name__)


class Metrics:
    """The writer of one run's records; safe to call from several threads (uploads report from theirs).

    Args:
        folder: the run's log folder, made where it is missing.
        sinks: what else shows each record, in this order, after the line is in the file.
        first_step: steps already done when this process began; the next record's step is beyond it.
        total_steps: step at which the run ends; None where unknown.
        clock: seconds since 1970, written as `time`.
        ledger: keeps the run's books; knows what earlier processes wrote.
        start: what else the first event tells of this process.

    Raises:
        StorageError: `folder` can't be written; `record`, `event` and `summary` raise it too.
    """

    def __init__(
        self,
        folder: Path,
        sinks: Sequence[Sink],
        first_step: int = 0,
        total_steps: int | None = None,
        clock: Callable[[], float] = time.time,
        *,
        ledger: Ledger | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.ledger = ledger or Ledger()
        self._step, self._has_ended = first_step, False
        self._sinks = list(sinks)
        self.wandb_run_id = next((sink.run_id for sink in sinks if isinstance(sink, WandbSink)), "")
        self._clock = clock
        self._lock = threading.RLock()  # re-entrant: a signal handler may report an event while a record is written
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, EVENTS_FILE):
                _end_torn_line(folder / name)
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        about = {"total_steps": total_steps} if total_steps else {}
        self.event("resumed" if first_step else "started", step=first_step, **about, **(start or {}), format=FORMAT)

    def add(self, sink: Sink) -> None:
        """Show all that comes from here on there, too."""
        self._sinks.append(sink)

    def record(self, record: Mapping[str, float | int | str | None]) -> None:
        """Append one step's record and show it. Fields that are None are left out; `time` is added where it is missing.

        The line is flushed, so that kill -9 loses nothing; it is not fsynced, so a power cut may lose the last ones.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a record needs an integer 'step', found {record.get('step')!r}")
        fields = {key: _scalar(value) for key, value in record.items() if value is not None}
        fields.setdefault("time", self._clock())
        self._step = fields["step"]
        with self._lock, _disk(self.folder):
            self._file.write(_json(fields) + "\n")
            self._file.flush()
            self.ledger.record(fields)
            for sink in self._sinks:
                sink.write(fields)

    def event(self, kind: str, **fields: Any) -> None:
        """Append something that happened between steps (a checkpoint committed, an upload failed) to events.jsonl."""
        time_s = self._clock()
        fields = {key: log.mask(value) if isinstance(value, str) else value for key, value in fields.items()}
        line = _json({"kind": kind, "time": time_s, **fields})
        with self._lock, _disk(self.folder):
            with (self.folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self.ledger.event(kind, time_s, fields)
            self._has_ended = self._has_ended or kind == "ended"
            for sink in self._sinks:
                sink.event(kind, fields)

    def summary(self, fields: Mapping[str, Any]) -> Path:
        """Write summary.json, whole or not at all, and hand it to the sinks. Returns its path."""
        path = self.folder / SUMMARY_FILE
        with self._lock, _disk(self.folder):
            with new_file(path) as file:
                file.write((_json(fields, indent=2) + "\n").encode())
            for sink in self._sinks:
                sink.summary(fields)
        return path

    def ended(self, stopped: bool, spent: str = "") -> None:
        """Append that the run has ended well: complete, with its budget spent, or stopped by a signal; all is saved."""
        code, reason = (EXIT_STOPPED, "stopped by a signal after saving") if stopped else (EXIT_DONE, spent or "done")
        self.event("ended", step=self._step, exit_code=code, reason=reason)

    def close(self) -> None:
        """End every sink and the file; a second call does nothing. Events that come later still reach events.jsonl."""
        with self._lock, _disk(self.folder):
            if self._file.closed:
                return
            sinks, self._sinks = self._sinks, []
            self._file.close()
            with contextlib.ExitStack() as closing:  # each is closed whatever another raises; the first one first
                for sink in reversed(sinks):
                    closing.callback(sink.close)
            if not self._has_ended:
                self.event("ended")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            code = {"exit_code": error.exit_code} if isinstance(error, TrainerError) else {}
            reason = error.line() if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(StorageError):  # a full disk, perhaps: the error itself is what a user must read
                self.event("ended", step=self._step, **code, reason=log.mask(reason))
        self.close()


class NoMetrics(Metrics):
    """Records nothing: what every rank but the first holds, so that the loop needs no `if rank == 0`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger, self.wandb_run_id = Ledger(), ""
        self._sinks, self._step = [], 0

    def record(self, record: Mapping[str, float | int | str | None]) -> None:
        """Record nothing."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record nothing."""

    def summary(self, fields: Mapping[str, Any]) -> Path:
        """The path that the first rank writes."""
        return self.folder / SUMMARY_FILE

    def close(self) -> None:
        """Nothing is open."""


def open_metrics(
    config: LogConfig,
    run_name: str,
    *,
    settings: Mapping[str, Any],
    total_steps: int,
    first_step: int,
    rank: int,
    start: Mapping[str, Any] | None = None,
    carried: Mapping[str, Any] | None = None,
) -> Metrics:
    """The metrics of a run, with every sink the config asks for; on ranks other than 0 they record nothing.

    Args:
        config: the log section.
        run_name: the folder inside `config.dir`.
        settings: the resolved config as plain data; written to config.yaml, shown by TensorBoard and W&B.
        total_steps: step at which the run ends.
        first_step: steps already done: 0, or the step of the checkpoint that was resumed.
        rank: global rank of this process.
        start: what events.jsonl tells of this process.
        carried: the ledger of the checkpoint that was resumed; it counts where the logs here know less.

    Raises:
        StorageError: the folder can't be written.
        ConfigError: TensorBoard or W&B is asked for and not installed.
    """
    folder, carried = Path(config.dir) / run_name, carried or {}
    if rank != 0:
        return NoMetrics(folder)
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        ledger = read_ledger(folder)
        if carried and carried["until"] > ledger.seen_s:  # it was saved on another machine
            start = {**(start or {}), "carried": dict(carried)}
        sinks: list[Sink] = []
        if config.tensorboard:
            sinks.append(TensorBoardSink(folder, settings, first_step))
        if config.wandb:
            shown = max(ledger.furthest_step, furthest_step(carried))
            known = shown, str(carried.get("wandb_run_id", ""))
            sinks.append(WandbSink(folder, config.wandb_project, run_name, settings, first_step, *known))
        with new_file(folder / CONFIG_FILE) as file:
            file.write(log.mask(yaml.safe_dump(_plain(settings), sort_keys=False)).encode())
    sinks.append(ConsoleSink(total_steps))
    return Metrics(folder, sinks, first_step, total_steps, ledger=ledger, start=start)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order of their steps, each step once.

    A run that is killed and resumed goes back to its checkpoint and writes some steps again. So where a line's step is
    not beyond the line before, the run forked there: what was recorded of that step and of later ones is dropped, and
    the newer lines stand. Lines that a kill tore in the middle are dropped, with a warning that counts them.

    Raises:
        StorageError: the file can't be read.
    """
    records: list[dict[str, Any]] = []
    torn = 0
    with _disk(path), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = parse_record(line)
            if record is None:
                torn += 1
                continue
            join(records, record)
    if torn:
        _log.warning("%s: %d torn line%s left out", path, torn, "" if torn == 1 else "s")
    return records


def join(records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Add the next line's record; where the run forked before it, what it takes the place of goes."""
    while records and records[-1]["step"] >= record["step"]:
        records.pop()
    records.append(record)


def read_ledger(folder: Path) -> Ledger:
    """The books of a run as its log folder has them; empty ones where nothing was written yet.

    Raises:
        StorageError: a file can't be read.
    """
    lines: list[tuple[float, dict[str, Any]]] = []
    with _disk(folder):
        for name in (EVENTS_FILE, METRICS_FILE, RESTARTS_FILE):
            if not (folder / name).exists():
                continue
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                found = [_line(text) for text in file]
            lines += [(line["time"], line) for line in found if line and isinstance(line.get("time"), (int, float))]
    ledger = Ledger()
    for time_s, line in sorted(lines, key=lambda each: each[0]):  # stable: what started comes before its records
        if "kind" in line:
            ledger.event(line["kind"], time_s, line)
        elif "restart" in line:
            ledger.event("restarted", time_s, line)
        elif isinstance(line.get("step"), int):
            ledger.record(line)
    return ledger


def _line(text: str) -> dict[str, Any] | None:
    """A line's object, or None where the line is torn."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def parse_record(line: str) -> dict[str, Any] | None:
    """The record of a line of metrics.jsonl, NaN and the infinities as floats; None where the line is torn."""
    record = _line(line)
    if record is None or not isinstance(record.get("step"), int):
        return None
    return {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _json(fields: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(fields), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` as JSON has it: paths as text, scalars of numpy and torch as numbers, NaN and infinities as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    value = _scalar(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _scalar(value: Any) -> Any:
    """The Python number of a numpy or torch scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _end_torn_line(path: Path) -> None:
    """End the last line of a file that a kill tore, so that the next line stands by itself."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or place}: {error.strerror or error}",
            "Make room or mend the rights there, or choose another folder with --log.dir",
        ) from error
