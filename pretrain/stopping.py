"""A polite end: SIGTERM and Ctrl+C ask the loop to stop at the next step boundary; a second one ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from pretrain import log

logger = log.get(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 1.0  # launchers and terminals may both deliver the one Ctrl+C; only a later signal is a second one


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal_name = ""
        self._received_at = 0.0
        self._clock = clock

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. A second request ends the process; a commit is one rename or one object, never torn."""
        now = self._clock()
        if self.signal_name and now - self._received_at > SAME_REQUEST_S:
            os._exit(128 + number)
        if not self.signal_name:
            self._received_at = now
            self.signal_name = signal.Signals(number).name


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen to SIGTERM and SIGINT while the block runs."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
