"""The watchdog of a rank: where no step ends for too long, say where every thread stands, and end the process.

A rank that waits for a peer that will never come (a stopped process, a link that is gone, a driver that hangs) waits
for ever, and nobody starts it again. The watchdog of each rank is a thread that hears a beat after each step. Without
one for `train.hang_timeout_s` it appends the stacks of all Python threads to logs/{run}/stacks-rank{R}.txt, says so,
and ends the process by SIGABRT. To the launcher and the supervisor that is a crash like any other: they start again
from the newest checkpoint.

It watches from the end of the first step, which compiles and warms up, to the end of the loop. Building and closing
have the limits of the collectives (`train.timeout_minutes`). The validation and the snapshot after a step count as a
part of it: the limit must be longer than the slowest step with both. Time in which the whole process stood still
(Ctrl+Z, a suspended machine) doesn't count, nor does a wait for data as long as data arrives on some rank, nor one for
an upload (--no-background-upload) that goes on or is tried again within the limits of the storage section.

A rank that is stopped itself can't write its stacks; those of the others show what they wait for. The thread needs the
interpreter's lock: a C extension that hangs and holds it is seen by the watchdogs of the other ranks only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain import log

logger = log.get(__name__)

MAX_INTERVAL_S = 1.0
OTHERS_S = 2.0  # the first rank to end takes the others with it: leave them time to write their stacks, too


class Watchdog:
    """Knows how long ago the last step ended.

    Args:
        timeout_s: silence that counts as a hang.
        clock: seconds, monotonic.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self.interval_s = min(MAX_INTERVAL_S, timeout_s / 10)
        self.step = 0
        self.silent_s = 0.0
        self._clock = clock
        self._checked_at = clock()
        self._beats = self._beats_seen = 0

    def beat(self, step: int) -> None:
        """A step has ended."""
        self.step = step
        self._beats += 1

    def excuse(self) -> None:
        """No step has ended, and for a good reason: the silence counts from here."""
        if self._beats:
            self._beats += 1

    def is_hung(self) -> bool:
        """Whether the silence is too long by now; to be asked every `interval_s`."""
        now = self._clock()
        # A longer pause was not the loop's: this thread did not run either.
        passed_s = min(now - self._checked_at, 2 * self.interval_s)
        self._checked_at = now
        if not self._beats or self._beats != self._beats_seen:
            self._beats_seen, self.silent_s = self._beats, 0.0
        else:
            self.silent_s += passed_s
        return self.silent_s >= self.timeout_s


@contextlib.contextmanager
def watch(rank: int, folder: Path, timeout_s: float) -> Iterator[Watchdog]:
    """Watch over the loop while the block runs.

    Args:
        rank: global rank of this process.
        folder: for the stacks.
        timeout_s: seconds without a step that count as a hang; 0: nobody watches.
    """
    watchdog, ended = Watchdog(timeout_s), threading.Event()

    def keep_watch() -> None:
        while not ended.wait(watchdog.interval_s):
            if watchdog.is_hung():
                end_hung_process(rank, folder, watchdog)

    thread = threading.Thread(target=keep_watch, name="watchdog", daemon=True)
    if timeout_s:
        thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        if timeout_s:
            thread.join()


def end_hung_process(rank: int, folder: Path, watchdog: Watchdog) -> None:
    """Write the stacks, say so, give the other ranks a moment for theirs, and end this process by SIGABRT."""
    where = write_stacks(rank, folder, watchdog)
    # In a thread: what hangs may be the console itself, and hold its lock.
    words = (rank, watchdog.silent_s, watchdog.step, where)
    line = "rank %d hangs: no step for %.1f s after step %d (train.hang_timeout_s). Its stacks: %s. It ends now"
    threading.Thread(target=logger.error, name="last words", args=(line, *words), daemon=True).start()
    time.sleep(OTHERS_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the memory of a rank is no use on the disk
    os.kill(os.getpid(), signal.SIGABRT)


def write_stacks(rank: int, folder: Path, watchdog: Watchdog) -> Path | str:
    """Append the stacks of all threads to stacks-rank{R}.txt, or print them where that can't be; where they are."""
    path = folder / f"stacks-rank{rank}.txt"
    try:
        with path.open("a", encoding="utf-8") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{now} rank {rank}, pid {os.getpid()}: no step for {watchdog.silent_s:.1f} s ")
            file.write(f"after step {watchdog.step}\n")
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")
    except OSError as error:
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        return f"on stderr, {path} can't be written ({error.strerror or error})"
    return path
