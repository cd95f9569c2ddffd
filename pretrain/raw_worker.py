"""A process that prepares raw text beside the training, and what its parent, the first rank of a node, sees of it.

    worker = RawWorker(data, storage, vocab_size=50257, may_be_larger=False, rank=0)
    worker.claimed.wait()        # set too where it failed
    worker.failure               # why it gave up, or None
    worker.close()

It is a process and not a thread, so that neither the work nor its memory is in the way of a step; its niceness lets the
training go first. It speaks in lines of JSON. The kernel ends it with its parent, and its own workers end with it. It
has a session of its own and ignores the signals that ask the training to stop: its parent decides when it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain import failpoints, log
from pretrain.config import DataConfig, StorageConfig
from pretrain.errors import StorageError, TrainerError, error_of
from pretrain.files import disk_explained
from pretrain.listings import size_text
from pretrain.processes import end_with_parent
from pretrain.raw_source import Lines, folder_of, prepare_source

ROOT = Path(__file__).resolve().parents[1]
LINE_EVERY_S = 300.0  # of its progress, while training runs
TELL_EVERY_S = 0.5
WAIT_SAID_EVERY_S = 60.0
NICENESS = 5

logger = log.get(__name__)


# ---- the parent's side ----


class RawWorker:
    """The process; to be made by the main thread, for it ends with the thread that makes it.

    Args:
        data: of one source of raw text.
        storage: how patiently it is fetched.
        vocab_size, may_be_larger: as of `prepare_source`.
        rank: of this process, for failpoints.

    Attributes:
        claimed: set once the shards to come are decided, or nothing will come.
        failure: why it gave up.
        arrived: grows as long as it gets on.
    """

    def __init__(
        self, data: DataConfig, storage: StorageConfig, *, vocab_size: int, may_be_larger: bool, rank: int
    ) -> None:
        self.claimed = threading.Event()
        self.failure: TrainerError | None = None
        self.arrived = 0
        self._source = data.source
        self._n_bytes = self._total = self._text_bytes = 0
        self._said_s, self._said_bytes = time.monotonic(), 0
        self._has_said = self._is_done = self._is_closed = False
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        request = {"vocab_size": vocab_size, "may_be_larger": may_be_larger, "rank": rank, "parent": os.getpid()}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            json.dump({**request, "data": asdict(data), "storage": asdict(storage)}, stdin)
        self._reader = threading.Thread(target=self._read, name="raw-text", daemon=True)
        self._reader.start()

    def tell_wait(self) -> None:
        """Say that training waits for it, how far it is and how fast; at most once a minute, and while it works."""
        now = time.monotonic()
        passed_s = now - self._said_s
        if self._is_done or (self._has_said and passed_s < WAIT_SAID_EVERY_S):
            return
        rate = (self._text_bytes - self._said_bytes) / max(passed_s, 1e-9) / 1e6
        words = (size_text(self._n_bytes), size_text(self._total), self._source, rate)
        logger.info("data: waiting for raw text: %s of %s of %s are prepared, %.1f MB/s of text", *words)
        self._has_said, self._said_s, self._said_bytes = True, now, self._text_bytes

    def close(self) -> None:
        """End it, with its own workers; what it has done stays, and the next start goes on there."""
        self._is_closed = True
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        """Take what it says, until it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith("\n"):  # it was killed in the middle
                break
            told: dict[str, Any] = json.loads(line)
            if "say" in told:
                logger.info("%s", told["say"])
            elif "failed" in told:
                self.failure = error_of(told["failed"])
            elif "progress" in told:
                self.arrived += 1
                self._n_bytes, self._total, self._text_bytes = told["progress"]
            elif "claimed" in told:
                self.claimed.set()
            else:
                self._is_done = True
        code = self._process.wait()
        if not (self._is_done or self.failure or self._is_closed):
            self.failure = _ended(code)
        self.claimed.set()


def _ended(code: int) -> StorageError:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}: see above"
    return StorageError(
        f"the process that prepares raw text {how}",
        "Start again: it goes on from there. Where memory ran out (dmesg), lower --data.tokenizer_num_workers",
    )


# ---- the process ----


class _Reporter(Lines):
    """Tells the parent how far it is."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(lambda text: tell({"say": text}), LINE_EVERY_S)
        self._tell, self._told_s = tell, 0.0
        self._told: list[int] = []

    def claimed(self) -> None:
        """See Watcher."""
        self._tell({"claimed": True})

    def update(self, n_bytes: int, text_bytes: int, n_tokens: int) -> None:
        """See Watcher; what did not change is not told, so that a standstill shows."""
        super().update(n_bytes, text_bytes, n_tokens)
        progress = [n_bytes, self._total, text_bytes]
        if progress != self._told and time.monotonic() - self._told_s >= TELL_EVERY_S:
            self._told, self._told_s = progress, time.monotonic()
            self._tell({"progress": progress})


def main() -> int:
    """Do what stands on stdin, and tell of it on stdout; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    request = json.load(sys.stdin)
    end_with_parent()
    if os.getppid() != request["parent"]:  # it ended before the kernel was told
        return 1
    os.nice(NICENESS)
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever a library prints is not for the parent

        def tell(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=out, flush=True)

        return _work(request, tell)


def _work(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    data = DataConfig(**{**request["data"], "sources": ()})
    storage = StorageConfig(**request["storage"])
    try:
        failpoints.arm(request["rank"])
        sizes = {name: request[name] for name in ("vocab_size", "may_be_larger")}
        with disk_explained(folder_of(data)):
            prepare_source(data, storage, **sizes, say=lambda text: tell({"say": text}), watcher=_Reporter(tell))
    except TrainerError as error:
        tell({"failed": error.told()})
        return error.exit_code
    tell({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
