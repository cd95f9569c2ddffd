"""Batches read a few steps ahead by a thread, and a word on whether the next one is there.

stream = ReadAhead(take, position)
while not stream.ready(0.5):
    ...                             # look after other things
tokens, position = next(stream)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

P = TypeVar("P")


class ReadAhead(Generic[P]):
    """`take` for ever, from a position on.

    Args:
        take: (tokens of the step at a position, the position after it).
        position: of the first step.
        n_steps: read ahead of the consumer at most.
        interrupt: ends a `take` that waits for data; called when the stream is closed.
    """

    def __init__(
        self,
        take: Callable[[P], tuple[np.ndarray, P]],
        position: P,
        n_steps: int = 4,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._take, self._interrupt = take, interrupt
        self._queue: queue.SimpleQueue[tuple[np.ndarray, P] | Exception] = queue.SimpleQueue()
        self._first: tuple[np.ndarray, P] | Exception | None = None
        self._room = threading.Semaphore(max(n_steps, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(position,), name="read-ahead", daemon=True)
        self._thread.start()

    def _read(self, position: P) -> None:
        try:
            while self._room.acquire() and not self._closed.is_set():
                batch, position = self._take(position)
                self._queue.put((batch, position))
        except Exception as error:  # noqa: BLE001 - raised again where the batches are consumed
            self._queue.put(error)

    def ready(self, timeout_s: float) -> bool:
        """Whether `next` would return, or raise, without waiting; waits so long for it."""
        if self._first is None:
            try:
                self._first = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                return False
        return True

    def __iter__(self) -> ReadAhead[P]:
        return self

    def __next__(self) -> tuple[np.ndarray, P]:
        """The next step's tokens and the position after it. What the thread raised is raised here."""
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get() if self._first is None else self._first
        self._first = None
        if isinstance(item, Exception):
            self.close()
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._room.release()
        self._interrupt()
        self._thread.join()
