from __future__ import annotations

import threading

import numpy as np
import pytest

from pretrain.read_ahead import ReadAhead

PATIENCE_S = 120


def test_it_says_whether_the_next_is_there_and_gives_each_once():
    go = threading.Semaphore(0)

    def take(position):
        go.acquire()
        return np.array([position]), position + 1

    stream = ReadAhead(take, 5, n_steps=2, interrupt=go.release)
    assert not stream.ready(0.01)
    go.release()
    assert stream.ready(PATIENCE_S) and stream.ready(0)
    rows, position = next(stream)
    assert rows.tolist() == [5] and position == 6
    assert not stream.ready(0.01)
    go.release()
    assert next(stream)[1] == 7
    stream.close()
    assert list(stream) == []


def test_an_error_is_there_too_and_is_raised_by_next():
    def take(position):
        raise OSError("no disk")

    stream = ReadAhead(take, 0)
    assert stream.ready(PATIENCE_S)
    with pytest.raises(OSError, match="no disk"):
        next(stream)
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
