from __future__ import annotations

import io
import json
import os
from types import SimpleNamespace

import pytest
import requests
from google.api_core.exceptions import BadRequest, ServiceUnavailable

from pretrain.files import BLOCK_BYTES
from pretrain.gcs_transfers import Download, SessionLostError, UploadSession
from pretrain.retry import CorruptTransferError

CHUNK = 4
CONTENT = b"0123456789"


def answer(status, text="", **headers):
    made = requests.Response()
    made.status_code, made._content = status, text.encode()
    made.headers.update(headers)
    made.request = SimpleNamespace(method="PUT", url="http://upload")
    return made


class Server:
    """Answers of a server, one a request; an exception is a connection that broke."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def put(self, url, data, headers, timeout, allow_redirects):
        self.asked.append((headers["Content-Range"].removeprefix("bytes "), bytes(data)))
        said = self.answers.pop(0)
        if isinstance(said, Exception):
            raise said
        return said


def so_far(n_bytes):
    return answer(308, Range=f"bytes=0-{n_bytes - 1}") if n_bytes else answer(308)


DONE = answer(200, json.dumps({"size": "10"}))


def send(server, *fails):
    """Advance until it is done; which of the steps raise is told."""
    session = UploadSession(server, "http://upload", io.BytesIO(CONTENT), len(CONTENT), CHUNK, 1.0)
    for error in (*fails, None):
        if error:
            with pytest.raises(error):
                session.advance()
        else:
            while not (made := session.advance()):
                pass
    return made


def test_chunks_follow_one_another():
    server = Server(so_far(4), so_far(8), DONE)
    assert send(server) == {"size": "10"}
    assert server.asked == [("0-3/10", b"0123"), ("4-7/10", b"4567"), ("8-9/10", b"89")]


@pytest.mark.parametrize(
    ("fault", "error"),
    [(requests.ConnectionError(), requests.ConnectionError), (answer(503), ServiceUnavailable)],
    ids=["broken", "503"],
)
@pytest.mark.parametrize(
    ("arrived", "then", "rest"),
    [
        (so_far(0), [4, 8], [("0-3/10", b"0123"), ("4-7/10", b"4567"), ("8-9/10", b"89")]),
        (so_far(1), [4, 8], [("0-3/10", b"0123"), ("4-7/10", b"4567"), ("8-9/10", b"89")]),
        (so_far(3), [7], [("3-6/10", b"3456"), ("7-9/10", b"789")]),
        (so_far(4), [8], [("4-7/10", b"4567"), ("8-9/10", b"89")]),
    ],
    ids=["nothing", "nothing as the embedded bucket says it", "a part", "all"],
)
def test_after_an_error_it_asks_what_has_arrived_and_goes_on_there(fault, error, arrived, then, rest):
    server = Server(fault, arrived, *map(so_far, then), DONE)
    assert send(server, error) == {"size": "10"}
    assert server.asked == [("0-3/10", b"0123"), ("*/10", b""), *rest]


def test_a_server_that_takes_nothing_is_a_failed_try():
    server = Server(so_far(4), so_far(4), so_far(4), so_far(8), DONE)
    session = UploadSession(server, "http://upload", io.BytesIO(CONTENT), len(CONTENT), CHUNK, 1.0)
    assert session.advance() is None
    with pytest.raises(CorruptTransferError, match="from byte 4 on"):
        session.advance()
    assert session.advance() is None and session.advance() == {"size": "10"}
    assert [what for what, _ in server.asked] == ["0-3/10", "4-7/10", "*/10", "4-7/10", "8-9/10"]


def test_the_reply_to_the_last_chunk_may_be_lost():
    server = Server(so_far(4), so_far(8), requests.ConnectionError(), DONE)
    session = UploadSession(server, "http://upload", io.BytesIO(CONTENT), len(CONTENT), CHUNK, 1.0)
    assert session.advance() is None and session.advance() is None
    with pytest.raises(requests.ConnectionError):
        session.advance()
    assert session.advance() == {"size": "10"}
    assert [what for what, _ in server.asked] == ["0-3/10", "4-7/10", "8-9/10", "*/10"]


@pytest.mark.parametrize("lost", [answer(404), answer(410), so_far(10)], ids=["404", "410", "all of it and no object"])
def test_an_upload_that_the_server_has_lost_is_told_apart(lost):
    server = Server(requests.ConnectionError(), lost)
    session = UploadSession(server, "http://upload", io.BytesIO(CONTENT), len(CONTENT), CHUNK, 1.0)
    with pytest.raises(requests.ConnectionError):
        session.advance()
    with pytest.raises(SessionLostError):
        session.advance()


def test_a_refusal_is_the_clients_error_with_the_servers_words():
    said = json.dumps({"error": {"message": "Provided CRC32C doesn't match"}})
    with pytest.raises(BadRequest, match="Provided CRC32C"):
        UploadSession(Server(answer(400, said)), "http://upload", io.BytesIO(CONTENT), 10, CHUNK, 1.0).advance()


def fetching(content, *breaks):
    """A fetch that breaks off at these places, each once; and where it was asked to begin."""
    left, starts = list(breaks), []

    def fetch(target, start):
        starts.append(start)
        end = left.pop(0) if left else len(content)
        target.write(content[start:end])
        if end < len(content):
            raise ConnectionResetError("reset")

    return fetch, starts


def test_a_download_goes_on_where_it_broke_off_and_little_progress_is_a_failed_try():
    content = os.urandom(3 * BLOCK_BYTES)
    first, second = BLOCK_BYTES + 5, BLOCK_BYTES + 9
    fetch, starts = fetching(content, first, second)
    file = io.BytesIO(b"what was there before")
    arrived = []
    download = Download(file, len(content), arrived.append)
    assert download.advance(fetch, "download x") is False
    with pytest.raises(ConnectionResetError):  # four bytes only: the pauses get longer
        download.advance(fetch, "download x")
    assert download.advance(fetch, "download x") is True
    assert download.advance(fetch, "download x") is True  # nothing is asked for any more
    assert starts == [0, first, second]
    assert file.getvalue() == content and sum(arrived) == len(content)


def test_an_answer_that_ends_too_early_without_an_error_is_one():
    download = Download(io.BytesIO(), 10, None)
    with pytest.raises(CorruptTransferError, match="4 of 10 bytes"):
        download.advance(lambda target, start: target.write(b"0123"), "download x")
    assert download.advance(lambda target, start: target.write(b"456789"), "download x") is True


def test_an_empty_object_is_not_asked_for():
    fetch, starts = fetching(b"")
    assert Download(io.BytesIO(b"old"), 0, None).advance(fetch, "download x") is True
    assert starts == []


def test_a_full_disk_is_no_passing_trouble():
    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(28, "No space left on device")

    fetch, _ = fetching(os.urandom(2 * BLOCK_BYTES))
    with pytest.raises(OSError, match="No space left"):
        Download(Full(), 2 * BLOCK_BYTES, None).advance(fetch, "download x")
