"""Where the logs of runs are read from: folders of this machine, or the copies beside the checkpoints in a bucket.

with open_sources(["test", "gs://bucket/Checkpoints/big"], Path("logs")) as sources:
    for source in sources:
        print(source.refresh().records[-1])
"""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pretrain.config import StorageConfig
from pretrain.errors import ConfigError
from pretrain.log_uploads import LOG_FILES, LOGS_FOLDER, MAX_BYTES
from pretrain.metrics import EVENTS_FILE, METRICS_FILE
from pretrain.run_logs import RunLogs
from pretrain.storage import ObjectStore, open_store

PATIENCE = StorageConfig(deadline_s=30.0, timeout_s=15.0)  # somebody sits before it and waits


class LogSource:
    """A run's log folder on this machine.

    Attributes:
        is_copy: whether it is as old as the last upload.
        changed_s: when the newest of its files was copied, in seconds since 1970; of a copy only.
    """

    is_copy = False
    changed_s = 0.0

    def __init__(self, name: str, folder: Path, where: str = "") -> None:
        self.logs = RunLogs(name, folder, where)

    def refresh(self) -> RunLogs:
        """Read what is new. Raises StorageError."""
        self.logs.refresh()
        return self.logs


class BucketSource(LogSource):
    """A run's logs in a bucket; each file is fetched again when it has changed there.

    Args:
        prefix: of the log files below the store's root, a slash at its end.
        folder: where they are kept meanwhile.
    """

    is_copy = True

    def __init__(self, name: str, store: ObjectStore, prefix: str, folder: Path) -> None:
        super().__init__(name, folder, f"{store.url}/{prefix}".rstrip("/"))
        self._store = store
        self._prefix = prefix
        self._have: dict[str, int] = {}

    def refresh(self) -> RunLogs:
        """Fetch what has changed, and read what is new. Raises StorageError."""
        for info in self._store.list(self._prefix):
            file = info.name.removeprefix(self._prefix)
            self.changed_s = max(self.changed_s, info.created_s)
            if file not in LOG_FILES or info.size > MAX_BYTES or self._have.get(file) == info.generation:
                continue
            self._store.download(info.name, self.logs.folder / file)
            self._have[file] = info.generation
        return super().refresh()


@contextlib.contextmanager
def open_sources(words: Sequence[str], logs: Path, storage: StorageConfig = PATIENCE) -> Iterator[list[LogSource]]:
    """The runs that a user has named.

    Args:
        words: names of runs in `logs`, log folders, and urls of runs or of all runs (gs://…/Checkpoints); empty: every
            run in `logs`, the one written last at the end.

    Raises:
        ConfigError: one of them is not there.
        StorageError: a bucket can't be listed.
    """
    with tempfile.TemporaryDirectory(prefix="run-logs-") as temporary:
        sources: list[LogSource] = []
        for word in words:
            if "://" in word:
                sources += _in_bucket(word.rstrip("/"), storage, Path(temporary, str(len(sources))))
            else:
                sources.append(_on_this_machine(word, logs))
        yield sources if words else [LogSource(folder.name, folder) for folder in _every_run(logs)]


def _on_this_machine(word: str, logs: Path) -> LogSource:
    for folder in (logs / word, Path(word)):
        if _is_run(folder):
            return LogSource(folder.resolve().name, folder)
    names = [folder.name for folder in logs.iterdir() if _is_run(folder)] if logs.is_dir() else []
    near = difflib.get_close_matches(word, names, 1)
    there = f"there are {', '.join(sorted(names))}" if names else "there is none"
    mend = f"Did you mean {near[0]}?" if near else "Name one of these, a log folder, or gs://…/Checkpoints/RUN."
    raise ConfigError(f"there is no run {word} in {logs}: {there}", mend)


def _every_run(logs: Path) -> list[Path]:
    folders = [folder for folder in logs.iterdir() if _is_run(folder)] if logs.is_dir() else []
    if not folders:
        raise ConfigError(f"there is no run in {logs}", "Name a run, a log folder, or gs://…/Checkpoints/RUN.")
    return sorted(folders, key=lambda folder: max(path.stat().st_mtime for path in folder.glob("*.jsonl")))


def _is_run(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (EVENTS_FILE, METRICS_FILE))


def _in_bucket(url: str, storage: StorageConfig, folder: Path) -> list[LogSource]:
    """The run at the url, or every run below it."""
    store = open_store(url, storage)
    if _is_a_run(info.name.split("/") for info in store.list(f"{LOGS_FOLDER}/")):
        return [BucketSource(url.rpartition("/")[2], store, f"{LOGS_FOLDER}/", folder)]
    names = [info.name.partition("/") for info in store.list()]
    runs = sorted({run for run, _, file in names if _is_a_run([file.split("/")])})
    if not runs:
        raise ConfigError(
            f"there are no logs of a run at {url}",
            "A run's logs come with its first committed checkpoint; name gs://…/Checkpoints/RUN.",
        )
    return [BucketSource(run, store, f"{run}/{LOGS_FOLDER}/", folder / str(at)) for at, run in enumerate(runs)]


def _is_a_run(names: Iterable[list[str]]) -> bool:
    """Whether these names, in parts and seen from a run's folder in the bucket, are of one that has logs."""
    return any(parts in ([LOGS_FOLDER, EVENTS_FILE], [LOGS_FOLDER, METRICS_FILE]) for parts in names)
