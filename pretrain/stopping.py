"""A polite end: SIGTERM, Ctrl+C and a closed terminal ask the loop to stop at the next step boundary; a second one ends
at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from pretrain import log

logger = log.get(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_S = 1.0  # launchers and terminals may both deliver the one Ctrl+C; only a later signal is a second one


class StopRequest:
    """Whether this process was asked to stop, and by which signal.

    Args:
        at_second: called when a second request comes, before the process ends.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, at_second: Callable[[], None] = lambda: None
    ) -> None:
        self.signal_name = ""
        self._received_at = 0.0
        self._clock = clock
        self._at_second = at_second

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. A second request ends the process; a commit is one rename or one object, never torn."""
        now = self._clock()
        if self.signal_name and now - self._received_at > SAME_REQUEST_S:
            self._at_second()
            os._exit(128 + number)
        if not self.signal_name:
            self._received_at = now
            self.signal_name = signal.Signals(number).name


@contextlib.contextmanager
def stop_request(at_second: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """Listen to SIGNALS while the block runs; see StopRequest for `at_second`."""
    request = StopRequest(at_second=at_second)
    before = {number: signal.signal(number, request.receive) for number in SIGNALS if not is_nohup(number)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_nohup(number: int) -> bool:
    """Whether this is the SIGHUP that `nohup` has told this process to ignore."""
    return number == signal.SIGHUP and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
