"""An HTTP proxy in front of an emulator that breaks requests by plan, and counts them.

    with FaultProxy(emulator.endpoint) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)     # or in the environment of a subprocess
        proxy.inject("503", match="POST /upload", times=2)
        ...
        assert proxy.count("POST /upload") == 3

Faults:
    "503" (any status)  that status instead of an answer; the backend never sees the request
    "reset"             the connection is reset; the backend never sees the request
    "stall"             not one byte of an answer until the client hangs up; the backend never sees the request
    "truncate"          the answer ends in the middle of its body
    "stall-midway"      the answer stops in the middle of its body until the client hangs up
    "lost-reply"        the backend does it, and the connection is reset instead of the answer
    "corrupt"           one bit in the middle of the body is flipped: of the request's (POST, PUT), else the answer's

"How much of this upload has arrived?" is answered here, but for `asks_backend=True`: fake-gcs-server takes the question
for the upload's end and makes an object of what it has.

Bodies are streamed both ways; keep-alive, chunked bodies and resumable sessions work. Urls of the backend in answers
(Location, selfLink, mediaLink) are rewritten to the proxy's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

BLOCK_BYTES = 1 << 16
FAULTS = ("reset", "stall", "stall-midway", "truncate", "lost-reply", "corrupt")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "accept-encoding"}


@dataclass
class _Plan:
    fault: str
    match: str
    times: int
    skip: int
    share: float
    luck: random.Random

    def applies(self, request: str) -> bool:
        """Whether this request is one to break; counts it off."""
        if self.times == 0 or not re.search(self.match, request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.share < 1 and self.luck.random() >= self.share:
            return False
        self.times -= 1
        return True

    def pick(self) -> str:
        """The fault; one of them where there are several."""
        return self.luck.choice(self.fault.split("|"))


class FaultProxy:
    """See the module. Safe to use from several threads."""

    def __init__(self, backend: str, asks_backend: bool = False) -> None:
        self.backend = backend
        self.asks_backend = asks_backend
        self.uploads: dict[str, tuple[int, str, bytes]] = {}  # by id: status, Range and body of the last answer
        self.bytes_sent = self.bytes_got = 0  # by clients, in bodies
        self.requests: list[str] = []  # "METHOD /path?query", in the order of their arrival
        self.broken: list[str] = []  # those of them that met a fault
        self._plans: list[_Plan] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def inject(
        self, fault: str, match: str = "", times: int = 1, skip: int = 0, share: float = 1.0, seed: int = 0
    ) -> None:
        """Break the next `times` requests (-1: all) whose "METHOD /path?query" holds `match` (a regular expression).

        Args:
            fault: several, separated by "|", are drawn from at random.
            skip: so many matching requests pass first.
            share: of the matching requests, drawn at random.
        """
        for each in fault.split("|"):
            if each not in FAULTS and not re.fullmatch(r"\d{3}", each):
                raise ValueError(f"unknown fault {each!r}")
        with self._lock:
            self._plans.append(_Plan(fault, match, times, skip, share, random.Random(seed)))

    def clear(self) -> None:
        """Forget all plans and all requests."""
        with self._lock:
            self._plans.clear()
            self.requests.clear()
            self.broken.clear()
            self.bytes_sent = self.bytes_got = 0

    def count(self, match: str = "") -> int:
        """Requests that arrived and hold `match`."""
        with self._lock:
            return sum(bool(re.search(match, request)) for request in self.requests)

    def moved(self, sent: int = 0, got: int = 0) -> None:
        """Counts bytes."""
        with self._lock:
            self.bytes_sent += sent
            self.bytes_got += got

    def pending(self) -> int:
        """Faults that are still to come: 0 shows that every planned one was met."""
        with self._lock:
            return sum(max(plan.times, 0) for plan in self._plans)

    def arrived(self, request: str) -> str:
        """Notes a request; the fault to break it with, or ''."""
        with self._lock:
            self.requests.append(request)
            fault = next((plan.pick() for plan in self._plans if plan.applies(request)), "")
            if fault:
                self.broken.append(request)
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients and backends that hang up are what this proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.server.proxy.arrived(f"{self.command} {self.path}")
        if fault == "reset":
            self._reset()
        elif fault == "stall":
            self._stall()
        elif fault.isdigit():
            self._refuse(int(fault))
        elif self._asks_for_progress() and not self.server.proxy.asks_backend:
            self._tell_progress()
        else:
            self._forward(fault)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815, the names http.server looks for

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # on, 0 s: closing sends RST instead of FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def _stall(self) -> None:
        with contextlib.suppress(ConnectionError):
            while self.connection.recv(BLOCK_BYTES):
                pass
        self.close_connection = True

    def _refuse(self, status: int) -> None:
        for _ in self._request_body(corrupt=False):
            pass
        message = f"injected {status}"
        body = json.dumps({"error": {"code": status, "message": message, "errors": [{"message": message}]}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _upload_id(self) -> str:
        found = re.search(r"[?&]upload_id=([^&]+)", self.path)
        return found[1] if found and self.command == "PUT" else ""

    def _asks_for_progress(self) -> bool:
        return bool(self._upload_id()) and self.headers.get("Content-Range", "").startswith("bytes */")

    def _tell_progress(self) -> None:
        status, last, body = self.server.proxy.uploads.get(self._upload_id(), (308, "", b""))
        self.send_response(status)
        if last:
            self.send_header("Range", last)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _forward(self, fault: str) -> None:
        writes = self.command in ("POST", "PUT")
        backend = http.client.HTTPConnection(urlsplit(self.server.proxy.backend).netloc, timeout=120)
        with contextlib.closing(backend):
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
            headers |= {"Transfer-Encoding": "chunked"} if chunked else {}
            headers |= {"Content-Length": self._length()} if not chunked and self._length() else {}
            body = self._request_body(corrupt=fault == "corrupt" and writes)
            backend.request(self.command, self.path, body, headers, encode_chunked=chunked)
            answer = backend.getresponse()
            text = None
            if upload := self._upload_id():
                text = answer.read()
                self.server.proxy.uploads[upload] = (answer.status, answer.headers.get("Range", ""), text)
            if fault == "lost-reply":
                answer.read()
                self._reset()
            else:
                self._answer(answer, text, fault == "corrupt" and not writes, fault in ("truncate", "stall-midway"))
                if fault == "stall-midway":
                    self._stall()
                elif fault == "truncate":
                    self._hang_up()

    def _length(self) -> str:
        return self.headers.get("Content-Length", "")

    def _request_body(self, corrupt: bool) -> Iterator[bytes]:
        for block in self._sent_by_client(corrupt):
            self.server.proxy.moved(sent=len(block))
            yield block

    def _sent_by_client(self, corrupt: bool) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while n_bytes := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(n_bytes)
                self.rfile.readline()
            self.rfile.readline()
            return
        total = int(self._length() or 0)
        yield from _flipped(_blocks(self.rfile, total), total // 2 if corrupt else -1)

    def _answer(self, answer: http.client.HTTPResponse, text: bytes | None, corrupt: bool, truncate: bool) -> None:
        is_json = "json" in answer.headers.get("Content-Type", "") and "alt=media" not in self.path
        blocks, total = iter([b""]), answer.length
        if is_json and self.command != "HEAD":
            text = answer.read() if text is None else text
            text = text.replace(self.server.proxy.backend.encode(), self.server.proxy.endpoint.encode())
            blocks, total = iter([text]), len(text)
        elif text is not None:
            blocks, total = iter([text]), len(text)
        elif total is not None:
            blocks = _blocks(answer, total)
        elif self.command != "HEAD":
            text = answer.read()
            blocks, total = iter([text]), len(text)
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP | {"date", "server"}:
                self.send_header(name, value.replace(self.server.proxy.backend, self.server.proxy.endpoint))
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(total or 0))
        self.end_headers()
        sent, allowed = 0, (total or 0) // 2 if truncate else None
        for block in _flipped(blocks, (total or 0) // 2 if corrupt else -1):
            part = block if allowed is None else block[: max(allowed - sent, 0)]
            self.wfile.write(part)
            self.server.proxy.moved(got=len(part))
            sent += len(block)
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def _blocks(file: Any, total: int) -> Iterator[bytes]:
    while total > 0 and (block := file.read(min(total, BLOCK_BYTES))):
        total -= len(block)
        yield block


def _flipped(blocks: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """`blocks` with one bit changed at the byte `offset`; -1: unchanged."""
    start = 0
    for block in blocks:
        if start <= offset < start + len(block):
            at = offset - start
            yield block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]
        else:
            yield block
        start += len(block)
