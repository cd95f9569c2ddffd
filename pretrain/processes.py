"""Processes that end together: a rank with its launcher, the launcher with its supervisor, and no orphan is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Protocol

import psutil

from pretrain.errors import ConfigError

LAUNCHER_PID = "PRETRAIN_LAUNCHER_PID"  # in the environment of every rank that pretrain.launch starts
RESTARTED = "PRETRAIN_RESTARTED"  # in the environment of a command that a supervisor starts again
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h
PATIENCE_S, LOOK_AGAIN_S = 30.0, 0.05
_LIBC = ctypes.CDLL(None)  # loaded here: after a fork, before the exec, nothing may be loaded


def end_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends, kill -9 included. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_launcher() -> None:
    """Have this rank end with pretrain.launch, whatever ends that; for the first moments, before the ranks meet."""
    if launcher := os.environ.get(LAUNCHER_PID):
        end_with_parent()
        if str(os.getppid()) != launcher:  # it ended before the kernel was told
            os._exit(128 + signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that it can still be found. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Command(Protocol):
    """A command that runs; what a supervisor needs of it."""

    def poll(self) -> int | None:
        """The exit code, -n for signal n; None while it runs."""

    def stop(self) -> None:
        """Ask it to stop."""

    def kill(self, patience_s: float = PATIENCE_S) -> None:
        """End it and everything that it started, and wait so many seconds until all of it is gone."""


class LaunchedCommand:
    """A command and all its descendants, orphans included. It ends with this process, whatever ends that.

    Raises:
        ConfigError: it can't be started.
    """

    def __init__(self, words: Sequence[str]) -> None:
        adopt_orphans()
        self._others = set(psutil.Process().children())
        try:
            # A session of its own: Ctrl+C at the terminal reaches it through here, and once.
            self._process = subprocess.Popen(words, start_new_session=True, preexec_fn=end_with_parent)
        except OSError as error:
            problem = f"{words[0]} can't be started: {error.strerror or error}"
            raise ConfigError(problem, "Give the launch command after --") from error

    def poll(self) -> int | None:
        """See Command."""
        return self._process.poll()

    def stop(self) -> None:
        """SIGTERM to the launcher, which passes it on to its ranks."""
        self._process.terminate()

    def kill(self, patience_s: float = PATIENCE_S) -> None:
        """SIGKILL to everything. See Command; what hangs inside the kernel outlives even that."""
        deadline = time.monotonic() + patience_s
        while left := set(psutil.Process().children()) - self._others:
            for child in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in [child, *child.children(recursive=True)]:
                        process.kill()
            if time.monotonic() >= deadline:
                return
            self._process.poll()
            # Not the command itself: who waits for it first has its exit code.
            psutil.wait_procs([child for child in left if child.pid != self._process.pid], timeout=LOOK_AGAIN_S)
            time.sleep(LOOK_AGAIN_S)
