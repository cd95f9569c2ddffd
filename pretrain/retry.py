"""The one layer of retry over object storage: which errors are worth another try, and how long to go on.

The google client's own retry is off wherever this one is used: two layers multiply their tries.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from typing import TypeVar

import requests
import tenacity
import urllib3.exceptions
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

from pretrain import log
from pretrain.config import StorageConfig

T = TypeVar("T")
FIRST_BACKOFF_S = 1.0
RETRIABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})

_CONNECTION_ERRORS: tuple[type[BaseException], ...] = (
    ConnectionError,  # reset, refused, broken pipe
    TimeoutError,
    http.client.HTTPException,  # a reply cut short or garbled
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,  # a body cut short
    urllib3.exceptions.PoolError,
    urllib3.exceptions.ProtocolError,  # the same from a raw stream, which requests doesn't translate
    urllib3.exceptions.SSLError,
    urllib3.exceptions.TimeoutError,
)


class CorruptTransferError(Exception):
    """What arrived is not what was sent: nothing is wrong with the object, so another try may do."""


class GaveUpError(Exception):
    """A retriable error stayed until the deadline; the last one is `__cause__`."""

    def __init__(self, tries: int, seconds: float) -> None:
        self.tries = tries
        self.seconds = seconds
        super().__init__(f"{tries} tries in {seconds:.0f} s")


def status_of(error: BaseException) -> int:
    """The HTTP status that an error of the google client carries; 0 for other errors."""
    if isinstance(error, GoogleAPICallError):
        return int(error.code or 0)
    if isinstance(error, InvalidResponse):
        return int(error.response.status_code)
    return 0


def is_retriable(error: BaseException) -> bool:
    """Whether the same request may succeed when it is sent again.

    408, 429 and 5xx say so themselves. A connection that was refused, reset, stalled or cut short may have met a
    server on its way out. A checksum that doesn't match is damage on the way. Everything else (401, 403, 404, 412, a
    full disk) stays as it is however often one asks.
    """
    if status := status_of(error):
        return status in RETRIABLE_STATUS
    if isinstance(error, GoogleAuthError):  # a token server out of reach, or an answer it marks as temporary
        return isinstance(error, TransportError) or bool(error.retryable)
    return isinstance(error, (CorruptTransferError, DataCorruption, *_CONNECTION_ERRORS))


def cause_of(error: BaseException) -> str:
    """The root of an error in a few words: `503 backend error`, `ConnectionRefusedError: [Errno 111] ...`."""
    if isinstance(error, GoogleAPICallError):
        text = f"{status_of(error)} {_words_of(error)}"
    else:
        # requests wraps urllib3, which wraps the socket's error: the innermost one names the cause.
        while inner := error.__cause__ or error.__context__:
            error = inner
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= 240 else f"{text[:240]}…"


def _words_of(error: GoogleAPICallError) -> str:
    """What the server said; the client's own message repeats the request and the whole answer around it."""
    try:
        return str(error.response.json()["error"]["message"])
    except (AttributeError, KeyError, TypeError, ValueError):  # no answer, or one of another form, such as a web page
        return str(getattr(error.response, "reason", None) or error.message or "")


class Retry:
    """Full-jitter exponential backoff within a budget of seconds, which the first failure starts.

    A transfer that went well for an hour before its connection broke still has its whole budget; and has it anew after
    each of its steps, see gcs_transfers.py.

    Args:
        config: `deadline_s` and `max_backoff_s`.
        clock: seconds, never backwards.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        config: StorageConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config = config
        self.clock = clock
        self.sleep = sleep

    def __call__(self, what: str, action: Callable[[], T]) -> T:
        """The result of `action`, tried again while that makes sense.

        Args:
            what: the action in words for the log, such as `download of gs://b/x`.
            action: safe to repeat.

        Raises:
            GaveUpError: the budget is spent.
            Exception: whatever `action` raised that is not retriable, as it is.
        """
        budget = _Budget(self.config.deadline_s, self.clock)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_retriable),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_BACKOFF_S, max=self.config.max_backoff_s),
            stop=budget.is_spent,
            before_sleep=lambda state: self._report(what, state),
            sleep=self.sleep,
        )
        try:
            return retrying(action)
        except tenacity.RetryError as error:
            last = error.last_attempt
            raise GaveUpError(last.attempt_number, budget.spent_s()) from last.exception()

    def _report(self, what: str, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.get(__name__).warning(
            "%s: try %d failed (%s), next in %.1f s",
            what,
            state.attempt_number,
            cause_of(error) if error else "",
            state.upcoming_sleep,
        )


class _Budget:
    """Seconds since the first failure; spent when the next pause would pass the deadline."""

    def __init__(self, deadline_s: float, clock: Callable[[], float]) -> None:
        self.deadline_s = deadline_s
        self.clock = clock
        self.first_failure_s: float | None = None

    def spent_s(self) -> float:
        return 0.0 if self.first_failure_s is None else self.clock() - self.first_failure_s

    def is_spent(self, state: tenacity.RetryCallState) -> bool:
        if self.first_failure_s is None:
            self.first_failure_s = self.clock()
        return self.spent_s() + state.upcoming_sleep > self.deadline_s
