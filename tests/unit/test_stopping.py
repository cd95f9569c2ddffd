from __future__ import annotations

import os
import signal

import pytest

from pretrain import stopping
from pretrain.stopping import SAME_REQUEST_S, SIGNALS, StopRequest, stop_request


class Ended(Exception):
    pass


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def request_(now, monkeypatch):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    return StopRequest(clock=lambda: now[0])


@pytest.fixture
def terminal():
    """SIGHUP as in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_no_signal_no_request(request_):
    assert not request_ and request_.signal_name == ""


def test_the_first_signal_only_asks(request_):
    request_.receive(signal.SIGTERM)
    assert request_ and request_.signal_name == "SIGTERM"


def test_a_duplicate_of_the_same_request_is_no_second_one(request_, now):
    request_.receive(signal.SIGINT)
    now[0] += SAME_REQUEST_S
    request_.receive(signal.SIGTERM)
    assert request_.signal_name == "SIGINT"


def test_what_must_be_done_before_a_sudden_end_is_done(now, monkeypatch):
    done = []
    monkeypatch.setattr(os, "_exit", lambda code: done.append(code))
    request = StopRequest(clock=lambda: now[0], at_second=lambda: done.append("children killed"))
    request.receive(signal.SIGTERM)
    assert done == []
    now[0] += SAME_REQUEST_S + 0.01
    request.receive(signal.SIGTERM)
    assert done == ["children killed", 143]


def test_a_process_under_nohup_goes_on_when_its_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as request:
            signal.raise_signal(signal.SIGHUP)
            assert not request
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_later_ends_at_once(request_, now, number, code):
    request_.receive(signal.SIGTERM)
    now[0] += SAME_REQUEST_S + 0.01
    with pytest.raises(Ended, match=str(code)):
        request_.receive(number)


def test_duplicates_do_not_put_off_the_second_request(request_, now):
    request_.receive(signal.SIGTERM)
    now[0] += 0.9
    request_.receive(signal.SIGTERM)
    now[0] += 0.9
    with pytest.raises(Ended):
        request_.receive(signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_real_signal_is_caught_inside_the_block_and_handlers_come_back(number, terminal):
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with stop_request() as request:
        assert not request
        signal.raise_signal(number)
        assert request.signal_name == signal.Signals(number).name
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_handlers_come_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), stopping.stop_request():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
