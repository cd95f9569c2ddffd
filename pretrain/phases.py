"""Where the time goes: the phases of a run, timed without ever waiting for the GPU in a step.

    clock = PhaseClock()
    clock.begin_step(12)
    with clock.during("data_wait"):
        batch = next(stream)
    clock.mark("forward")      # as the engines do: a phase ends where the next one begins
    ...
    clock.mark("other")
    steps, seconds = clock.take()

On a CPU a phase lasts as long as Python is in it. A GPU runs behind Python, so there the phases of the engine are
between CUDA events, which are only read once they have passed. The loop reads the loss at the end of each step, so
that the GPU has nothing to do when the next one begins: the first event of a step is where both clocks meet.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, NamedTuple, Protocol, cast

import torch

PHASES = ("data_wait", "forward", "backward", "optimizer", "checkpoint", "eval", "other")
OF_THE_ENGINE = frozenset(("forward", "backward", "optimizer"))
A_STEP = ("data_wait", *sorted(OF_THE_ENGINE))
BETWEEN_STEPS = ("checkpoint", "eval")
REMEMBERED = 65_536  # marks that wait for somebody to ask what was when; nobody asks on most ranks


class StepTimer:
    """How long each step takes: from the end of the one before, without what is told apart. So the seconds of all
    steps and of what was apart are the time by the clock.

    Args:
        clock: seconds from anywhere, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since_s: float | None = None
        self._apart_s = 0.0

    def begin(self) -> None:
        """The first step begins; of every later one nothing is to be said."""
        if self._since_s is None:
            self._since_s = self._clock()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """The block is no part of a step."""
        began_s = self._clock()
        try:
            yield
        finally:
            self._apart_s += self._clock() - began_s

    def lap(self) -> float:
        """A step ends: its seconds."""
        now_s = self._clock()
        since_s = now_s if self._since_s is None else self._since_s
        seconds = now_s - since_s - self._apart_s
        self._since_s, self._apart_s = now_s, 0.0
        return seconds


class Event(Protocol):
    """A point in a GPU stream; torch.cuda.Event(enable_timing=True) is one."""

    def record(self) -> None:
        """Stand where the stream is now."""

    def query(self) -> bool:
        """Whether the GPU has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from here to another event, both passed."""


def cuda_event() -> Event:
    """An event of the current GPU stream."""
    event: Any = torch.cuda.Event(enable_timing=True)
    return cast(Event, event)


class Ranges(Protocol):
    """Shows phases as named ranges in a profiler."""

    def enter(self, name: str) -> None:
        """A phase begins, and the one before ends."""

    def leave(self) -> None:
        """The last phase ends."""


class Mark(NamedTuple):
    """The beginning of a phase: when Python was there, and where the GPU's stream was."""

    phase: str
    step: int
    host_s: float
    event: Event | None


class Moment(NamedTuple):
    """A mark whose time is known, seconds of the clock."""

    at_s: float
    step: int
    phase: str


class PhaseClock:
    """The phases of one process; marked by the thread that trains, read by any.

    Args:
        make_event: on a GPU, makes the events that its phases are timed by.
        clock: seconds from anywhere, monotonic.

    Attributes:
        ranges: where else the phases are shown.
    """

    def __init__(
        self, make_event: Callable[[], Event] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.ranges: list[Ranges] = []
        self._make_event = make_event
        self._clock = clock
        self._phase = "other"
        self._step = 0
        self._steps = 0
        self._lock = Lock()
        self._pending: deque[Mark] = deque()
        self._timeline: deque[Moment] = deque([Moment(clock(), 0, "other")], maxlen=REMEMBERED)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._first_event: tuple[Event, float] | None = None  # of the step's, and the host's time there
        self._spare: list[Event] = []
        self._in_use: list[Event] = []

    def begin_step(self, step: int) -> None:
        """What comes now belongs to this step, counted from 1."""
        self._step = step
        self._steps += 1

    def mark(self, phase: str) -> None:
        """A phase of PHASES begins, and the one before ends."""
        before, self._phase = self._phase, phase
        if phase == before:
            return
        event = None
        if self._make_event and (phase in OF_THE_ENGINE or before in OF_THE_ENGINE):
            event = self._spare.pop() if self._spare else self._make_event()
            event.record()
        with self._lock:
            self._pending.append(Mark(phase, self._step, self._clock(), event))
            if event is None:
                self._settle(wait=False)
        for ranges in self.ranges:
            ranges.enter(phase)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase lasts as long as the block; behind it goes on what was before."""
        before = self._phase
        self.mark(phase)
        try:
            yield
        finally:
            self.mark(before)

    def take(self) -> tuple[int, dict[str, float]]:
        """(steps begun, seconds in each phase) since the last call. Waits for the GPU where it is not there yet."""
        with self._lock:
            self._settle(wait=True)
            seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        steps, self._steps = self._steps, 0
        return steps, seconds

    def labels(self, times: Sequence[float], *, at_the_end: bool = False) -> list[tuple[int, str]]:
        """(step, phase) at each of some ascending times of the clock; earlier ones can't be asked for any more.

        Args:
            at_the_end: label also what lies beyond the last mark that is settled, as if nothing came after it.

        Returns:
            As many as are known by now, maybe fewer than were asked for.
        """
        with self._lock:
            if at_the_end:
                self._settle(wait=False)
            moments = list(self._timeline)
            known_s = moments[-1].at_s if self._pending and not at_the_end else float("inf")
            starts = [moment.at_s for moment in moments]
            places = [max(bisect_right(starts, each) - 1, 0) for each in times if each <= known_s]
            for _ in range(places[-1] if places else 0):
                self._timeline.popleft()
        return [(moments[place].step, moments[place].phase) for place in places]

    def _settle(self, wait: bool) -> None:
        """Give each mark its time, in order, as far as the GPU has come."""
        while self._pending and (at_s := self._time_of(self._pending[0], wait)) is not None:
            mark, before = self._pending.popleft(), self._timeline[-1]
            at_s = max(at_s, before.at_s)
            self._seconds[before.phase] += at_s - before.at_s
            self._timeline.append(Moment(at_s, mark.step, mark.phase))

    def _time_of(self, mark: Mark, wait: bool) -> float | None:
        if mark.event is None:  # the events before it are all read
            self._spare += self._in_use
            self._in_use, self._first_event = [], None
            return mark.host_s
        if self._first_event is None:
            self._first_event = (mark.event, mark.host_s)
            self._in_use.append(mark.event)
            return mark.host_s
        if not mark.event.query():
            if not wait:
                return None
            mark.event.synchronize()
        first, host_s = self._first_event
        self._in_use.append(mark.event)
        return host_s + first.elapsed_time(mark.event) / 1e3
