"""From the command to the end of the first step: where the time of a start goes.

    START.begin(launcher_pid)        # what passed before this line is known from the system
    START.ended("settings")          # what passed since the last word was the settings'
    START.finish("first step")       # and from here on nobody counts
    START.phases                     # {"launcher": 1.9, "python": 0.1, "settings": 0.3, …}, seconds

A process starts once, so there is one clock, and every part may tell it what has just ended. The phases lie end to end:
together they are the whole time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

FIRST_STEP = "first step"
START_FIELD = 19  # of /proc/PID/stat, after the name: when the process began, in ticks since the machine did


class StartClock:
    """Shares the time of a start out among phases.

    Args:
        now: seconds.

    Attributes:
        phases: seconds of each, in the order in which they first ended.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.begin()

    def begin(self, launcher_pid: str = "") -> None:
        """Start again from the process's own beginning.

        Args:
            launcher_pid: of pretrain.launch, where that has started this process.
        """
        own_s, launcher_s = age_s(), launched_after_s(launcher_pid)
        self.phases = {"launcher": launcher_s} if launcher_s else {}
        self.phases["python"] = own_s
        self._last, self._finished = self._now(), False

    def ended(self, name: str) -> None:
        """What passed since the last word was this phase's; one that comes again is added up."""
        if not self._finished:
            now = self._now()
            self.phases[name] = self.phases.get(name, 0.0) + now - self._last
            self._last = now

    def finish(self, name: str) -> bool:
        """The last phase ends; whether it had not been finished before."""
        self.ended(name)
        first, self._finished = not self._finished, True
        return first

    @property
    def rounded(self) -> dict[str, float]:
        """The phases to the millisecond."""
        return {name: round(seconds, 3) for name, seconds in self.phases.items()}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        return f"{sum(self.phases.values()):.1f} s: {parts}"


def age_s(pid: int | None = None) -> float:
    """Seconds since a process began (None: this one); 0 where the machine does not tell, or it is gone."""
    try:
        stat = Path(f"/proc/{pid or 'self'}/stat").read_text(encoding="utf-8")
        ticks = int(stat.rpartition(")")[2].split()[START_FIELD])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def launched_after_s(launcher_pid: str) -> float:
    """Seconds from a launcher's start to this process's; 0 but for its first try on a single node: later ones, and
    nodes that wait for each other, tell nothing of a start."""
    environment = os.environ
    is_first = environment.get("TORCHELASTIC_RESTART_COUNT") == "0" and environment.get("GROUP_WORLD_SIZE") == "1"
    return max(age_s(int(launcher_pid)) - age_s(), 0.0) if is_first and launcher_pid.isdecimal() else 0.0


START = StartClock()
