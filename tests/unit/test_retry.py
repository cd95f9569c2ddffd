from __future__ import annotations

import errno

import pytest
import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth

from pretrain.config import StorageConfig
from pretrain.retry import CorruptTransferError, GaveUpError, Retry, cause_of, is_retriable

CONFIG = StorageConfig(deadline_s=100.0, max_backoff_s=8.0)


class Clock:
    """Time that passes only while somebody sleeps or works."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds


class Failing:
    """An action that fails so many times, each after so many seconds."""

    def __init__(self, clock: Clock, error: Exception, times: int, seconds: float = 0.0) -> None:
        self.clock, self.error, self.times, self.seconds = clock, error, times, seconds
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        self.clock.now_s += self.seconds
        if self.calls <= self.times:
            raise self.error
        return "done"


def retry(clock: Clock, config: StorageConfig = CONFIG) -> Retry:
    return Retry(config, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize(
    "error",
    [
        api.TooManyRequests("slow down"),
        api.InternalServerError("oops"),
        api.BadGateway("oops"),
        api.ServiceUnavailable("oops"),
        api.GatewayTimeout("oops"),
        api.from_http_status(408, "timed out"),
        requests.ConnectionError("refused"),
        requests.Timeout("stalled"),
        requests.exceptions.ChunkedEncodingError("cut short"),
        ConnectionResetError("reset"),
        CorruptTransferError("bits"),
        auth.TransportError("token server is away"),
        auth.RefreshError("busy", retryable=True),
    ],
    ids=lambda error: f"{type(error).__name__}",
)
def test_passing_troubles_are_retried(error: Exception) -> None:
    clock = Clock()
    action = Failing(clock, error, times=3)
    assert retry(clock)("download x", action) == "done"
    assert action.calls == 4


@pytest.mark.parametrize(
    "error",
    [
        api.BadRequest("what?"),
        api.Unauthorized("who?"),
        api.Forbidden("no"),
        api.NotFound("where?"),
        api.PreconditionFailed("taken"),
        auth.RefreshError("expired"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("a bug"),
    ],
    ids=lambda error: f"{type(error).__name__}",
)
def test_lasting_troubles_fail_at_once_as_they_are(error: Exception) -> None:
    clock = Clock()
    action = Failing(clock, error, times=1)
    with pytest.raises(type(error)) as caught:
        retry(clock)("download x", action)
    assert caught.value is error
    assert action.calls == 1
    assert not clock.sleeps


def test_backoff_is_jittered_grows_and_is_capped() -> None:
    highest = [0.0] * 6
    for _ in range(200):
        clock = Clock()
        retry(clock)("x", Failing(clock, ConnectionError(), times=6))
        highest = [max(pair) for pair in zip(highest, clock.sleeps, strict=True)]
    caps = [1, 2, 4, 8, 8, 8]
    assert all(0.8 * cap < seen <= cap for cap, seen in zip(caps, highest, strict=True)), highest


def test_it_gives_up_at_the_deadline_and_says_after_how_many_tries() -> None:
    clock = Clock()
    error = api.ServiceUnavailable("still down")
    action = Failing(clock, error, times=10**6)
    with pytest.raises(GaveUpError) as caught:
        retry(clock)("x", action)
    assert sum(clock.sleeps) <= CONFIG.deadline_s < sum(clock.sleeps) + CONFIG.max_backoff_s
    assert caught.value.tries == action.calls == len(clock.sleeps) + 1
    assert caught.value.__cause__ is error


def test_a_long_transfer_keeps_its_budget_until_its_first_failure() -> None:
    clock = Clock()
    action = Failing(clock, ConnectionError(), times=1, seconds=36 * CONFIG.deadline_s)
    assert retry(clock)("x", action) == "done"


def test_stalled_tries_spend_the_budget() -> None:
    clock = Clock()
    action = Failing(clock, requests.Timeout(), times=10**6, seconds=60.0)
    with pytest.raises(GaveUpError):
        retry(clock)("x", action)
    assert action.calls <= 3


def test_every_retry_is_logged_with_its_cause(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    from pretrain import log

    monkeypatch.setattr(log.get("pretrain.retry"), "handlers", [caplog.handler])
    clock = Clock()
    retry(clock)("download of gs://b/x", Failing(clock, api.ServiceUnavailable("backend error"), times=2))
    messages = [record.getMessage() for record in caplog.records if record.name == "pretrain.retry"]
    assert len(set(messages)) == 2
    assert messages[0].startswith("download of gs://b/x: try 1 failed (503 backend error), next in ")


def test_the_cause_is_the_innermost_error_on_one_line() -> None:
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as inner:
            raise requests.ConnectionError("HTTPConnectionPool(host='h'):\nMax retries exceeded") from inner
    except requests.ConnectionError as error:
        assert cause_of(error) == "ConnectionRefusedError: [Errno 111] Connection refused"
    assert len(cause_of(ValueError("x" * 1000))) < 260
    assert not is_retriable(KeyboardInterrupt())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            b'{"error": {"code": 503, "message": "We encountered an internal error. Please try again."}}',
            "We encountered",
        ),
        (b"<html>Bad gateway</html>", "Service Unavailable"),
        (b'["error"]', "Service Unavailable"),
    ],
)
def test_the_cause_is_what_the_server_said_and_not_the_request(body: bytes, words: str) -> None:
    answer = requests.Response()
    answer.status_code, answer.reason, answer._content = 503, "Service Unavailable", body
    error = api.from_http_status(503, f"POST https://storage/upload: {body!r}: ('Request failed')", response=answer)
    assert cause_of(error).startswith(f"503 {words}") and "POST" not in cause_of(error)
