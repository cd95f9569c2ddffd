"""A run's logs beside its checkpoints in the bucket, so that it can be watched from any machine.

    {run}/logs/metrics.jsonl      and events.jsonl, training.log, …: replaced as a whole when they have changed

Nothing here ends a run: what goes wrong is a warning. A file is replaced by the generation that this process has
written or found before its first copy, so a trainer that was left behind never writes over the logs of the one that
took over. Files that grow never lose a line there: a start fetches what this machine lacks.
"""

from __future__ import annotations

import heapq
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain import log
from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, StorageError
from pretrain.files import new_file
from pretrain.run_logs import POWER_FILE, parse_trees, time_of
from pretrain.sinks import Sink
from pretrain.storage import ObjectExists, ObjectStore, crc32c_of_bytes, open_store

LOGS_FOLDER = "logs"
GROWING_FILES = ("events.jsonl", "metrics.jsonl", "training.log", "restarts.jsonl")
LOG_FILES = (*GROWING_FILES, "config.yaml", "summary.json", "report.html", POWER_FILE)
POWER_TAIL_BYTES = 1 << 20  # of power.csv, which has 7 KB a second of eight GPUs: its last minutes
MAX_BYTES = 256 << 20  # of one file: a metrics.jsonl of half a million steps; what is longer stays here
DEADLINE_S = 20.0  # of all tries of one request: the next commit tries again anyway
FAREWELL_S = 20.0  # that the end of a run waits for the last copy: spot machines give 30 s in all

_DATE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")  # an entry of training.log begins with it

logger = log.get(__name__)


class LogUploads(Sink):
    """Copies the log folder of one run to the bucket after each commit and at the end, in a thread of its own: neither
    the training nor a checkpoint waits for it.

    Args:
        folder: logs/{run}.
        store: root of all checkpoints.
        run_name: folder of the run there.

    Attributes:
        is_off: whether somebody else writes these logs, and this process no longer does.
    """

    def __init__(self, folder: Path, store: ObjectStore, run_name: str) -> None:
        self._folder = folder
        self._store = store
        self._prefix = f"{run_name}/{LOGS_FOLDER}"
        self._sent: dict[str, tuple[int, int]] = {}  # file: (bytes, time of change) of what is in the bucket
        self._generations: dict[str, int] | None = None  # None: nothing was copied yet
        self._theirs: dict[str, bytes] = {}  # file: what is in the bucket and could not be fetched when this began
        self._tried: dict[str, str] = {}  # file: crc32c of what was sent last, whether or not it came
        self._told: set[str] = set()
        self.is_off = False
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="log uploads", daemon=True)
        self._thread.start()

    def fetch(self) -> None:
        """Bring the lines here that the bucket has and this machine lacks, before anything is appended to them."""
        try:
            for file, theirs in self._look()[1].items():
                path = self._folder / file
                joined = join_lines(path.read_bytes() if path.is_file() else b"", theirs)
                with new_file(path) as new:
                    new.write(joined)
                logger.info("%s goes on from the copy in %s/%s", path, self._store.url, self._prefix)
        except (StorageError, ConfigError, OSError) as error:
            self._warn(f"the run's earlier logs could not be fetched: {error}")

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Copy what has changed, soon, where a checkpoint was committed."""
        if kind == "checkpoint_committed":
            self._wanted.set()

    def close(self) -> None:
        """Copy what has changed a last time, within `FAREWELL_S`."""
        self._closing.set()
        self._wanted.set()
        self._thread.join(FAREWELL_S)
        if self._thread.is_alive():
            self._warn(f"the last of the logs did not reach the bucket within {FAREWELL_S:.0f} s")

    def _work(self) -> None:
        while not self.is_off:
            self._wanted.wait()
            self._wanted.clear()
            is_last = self._closing.is_set()
            self.upload()
            if is_last:
                break

    def upload(self) -> list[str]:
        """Replace what has changed since the last call; the names of the files that were sent."""
        try:
            return self._upload_changed()
        except ObjectExists as error:
            self.is_off = True
            logger.warning("another process writes the logs of this run in the bucket: %s", error.what)
        except (StorageError, ConfigError, OSError) as error:
            self._warn(f"the logs were not copied to the bucket: {error}")
        return []

    def _upload_changed(self) -> list[str]:
        if self._generations is None:  # again: the process before may have sent its last lines after our start
            self._generations, self._theirs = self._look()
        sent = []
        for file in LOG_FILES:
            path = self._folder / file
            if not path.is_file():
                continue
            status = path.stat()
            state = status.st_size, status.st_mtime_ns
            if self._sent.get(file) == state:
                continue
            if status.st_size > MAX_BYTES:
                self._warn(f"{path} has {status.st_size >> 20} MiB and is no longer copied to the bucket")
                continue
            data = _tail_of(path) if file == POWER_FILE else path.read_bytes()
            if file in self._theirs:
                data = join_lines(data, self._theirs[file])
            self._generations[file] = self._replace(file, data, self._generations.get(file, 0))
            self._sent[file] = state
            sent.append(file)
        return sent

    def _look(self) -> tuple[dict[str, int], dict[str, bytes]]:
        """(generation of each file in the bucket, content of those of GROWING_FILES that ours does not go on from)."""
        infos = {info.name.rpartition("/")[2]: info for info in self._store.list(f"{self._prefix}/")}
        theirs = {}
        for file in GROWING_FILES:
            if (info := infos.get(file)) is None:
                continue
            path = self._folder / file
            ours = path.read_bytes()[: info.size] if path.is_file() else b""
            if crc32c_of_bytes(ours) != info.crc32c:  # a folder does not know its files' checksums
                content = self._store.read_bytes(info.name, MAX_BYTES)
                if ours != content:
                    theirs[file] = content
        return {file: info.generation for file, info in infos.items()}, theirs

    def _replace(self, file: str, data: bytes, generation: int) -> int:
        """The generation of `data` in the bucket. Raises ObjectExists where another process has written there."""
        name = f"{self._prefix}/{file}"
        try:
            return self._store.replace(name, data, generation).generation
        except ObjectExists:
            found = self._store.stat(name)
            if not found or found.crc32c != self._tried.get(file):
                raise
            # what is there is our last try, whose reply was lost
            return self._store.replace(name, data, found.generation).generation
        finally:
            self._tried[file] = crc32c_of_bytes(data)

    def _warn(self, text: str) -> None:
        """Say it once: the next checkpoint tries again, and would say the same."""
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)


def open_log_uploads(folder: Path, url: str, storage: StorageConfig, run_name: str) -> LogUploads:
    """The uploads of logs/{run}, with a patience of their own.

    Raises:
        ConfigError: see `open_store`.
    """
    patience = replace(storage, deadline_s=min(storage.deadline_s, DEADLINE_S))
    return LogUploads(folder, open_store(url, patience), run_name)


def _tail_of(path: Path) -> bytes:
    """The names of a CSV's columns and its last rows, `POWER_TAIL_BYTES` at most."""
    with path.open("rb") as file:
        names = file.readline(1000)
        begin, size = file.tell(), path.stat().st_size
        at = file.seek(max(begin, size - POWER_TAIL_BYTES))
        rows = file.read(POWER_TAIL_BYTES)
    return names + (rows if at == begin else rows.partition(b"\n")[2])


def join_lines(ours: bytes, theirs: bytes) -> bytes:
    """Two files of one run that each may have lines which the other lacks, as one: each entry once.

    An entry is an object of a .jsonl or an entry of training.log, with the lines up to the next. Where both sides have
    some of their own, those of a side stay in their order, and the times of the entries say whose come first.
    """
    mine, others = _entries(ours), _entries(theirs)
    known, there = {text for _, text in mine}, {text for _, text in others}
    if there <= known:
        return ours
    missing = [entry for entry in mine if entry[1] not in there]
    return b"".join(text for _, text in heapq.merge(others, missing, key=lambda entry: entry[0]))


def _entries(data: bytes) -> list[tuple[float, bytes]]:
    """(seconds since 1970, lines) of each entry, in the order of the file; one without a time has that before it."""
    found: list[tuple[float, list[bytes]]] = []
    for line in data.removesuffix(b"\n").split(b"\n") if data else ():
        time_s = _time_of(line)
        if found and not time_s and not line.startswith(b"{"):  # a traceback's; an object that is torn stands alone
            found[-1][1].append(line)
        else:
            found.append((time_s or (found[-1][0] if found else 0.0), [line]))
    return [(time_s, b"".join(line + b"\n" for line in lines)) for time_s, lines in found]


def _time_of(line: bytes) -> float:
    """When a line was written, in seconds since 1970; 0 where it does not say."""
    if date := _DATE.match(line):
        try:
            return datetime.strptime(date[0].decode(), "%Y-%m-%d %H:%M:%S,%f").timestamp()
        except ValueError:
            return 0.0
    return next((time_of(tree) for tree in parse_trees([line.decode("utf-8", "replace")])), 0.0)
