"""Large objects on their way to Google Cloud Storage and back: what has arrived is not sent again.

The client's own loops raise out of a transfer at its first error, or retry by a clock of their own. Here one step is
one request, to be repeated by the caller's `Retry`, whose budget so begins again after each step that went well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import IO, Any

import requests
from google.api_core.exceptions import from_http_response

from pretrain import log
from pretrain.files import BLOCK_BYTES, CheckedWriter
from pretrain.retry import CorruptTransferError, cause_of, is_retriable

_RANGE = re.compile(r"bytes=0-(\d+)")

logger = log.get(__name__)


class SessionLostError(Exception):
    """The server knows the upload no more, or of other bytes than were sent: only a new one can help."""


class UploadSession:
    """A resumable upload that the server has begun.

    Args:
        transport: the client's session, which signs requests.
        url: of the upload.
        file: read from where it is needed; `size` bytes.
        chunk_bytes: of one request; a multiple of 256 KiB by the API's rule.
        timeout_s: of a wait for the network.
    """

    def __init__(
        self, transport: requests.Session, url: str, file: IO[bytes], size: int, chunk_bytes: int, timeout_s: float
    ) -> None:
        self._transport = transport
        self._url = url
        self._file = file
        self._size = size
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self._arrived = 0
        self._is_sure = True

    def advance(self) -> dict[str, Any] | None:
        """Send the next chunk; after an error, ask first how much of the last one has arrived.

        Returns:
            what the server says of the object, when it has all of it.

        Raises:
            GoogleAPICallError: it said no; requests.RequestException: it said nothing.
            CorruptTransferError: it took nothing of the chunk.
            SessionLostError: see there.
        """
        if not self._is_sure and (made := self._heard(self._put(b"", "*"))):
            return made
        self._is_sure, start = False, self._arrived
        self._file.seek(start)
        chunk = self._file.read(self._chunk_bytes)
        if not chunk:
            raise SessionLostError(f"{start} of {self._size} bytes have arrived, and there are no more")
        made = self._heard(self._put(chunk, f"{start}-{start + len(chunk) - 1}"))
        if not made and self._arrived <= start:
            raise CorruptTransferError(f"nothing of the chunk from byte {start} on has arrived")
        self._is_sure = True
        return made

    def _put(self, data: bytes, what: str) -> requests.Response:
        headers = {"Content-Range": f"bytes {what}/{self._size}"}
        # 308 is this protocol's "go on", and no redirect
        return self._transport.put(
            self._url, data=data, headers=headers, timeout=self._timeout_s, allow_redirects=False
        )

    def _heard(self, answer: requests.Response) -> dict[str, Any] | None:
        if answer.status_code in (200, 201):
            made: dict[str, Any] = answer.json()
            return made
        if answer.status_code in (404, 410):
            raise SessionLostError(f"{answer.status_code} {answer.reason}: the upload is not known there any more")
        if answer.status_code != 308:
            raise from_http_response(answer)
        last = _RANGE.fullmatch(answer.headers.get("Range", ""))
        # One byte alone is what the embedded bucket says for none; a server takes what it has once more and drops it.
        self._arrived = int(last[1]) + 1 if last and last[1] != "0" else 0
        return None


class Download:
    """An object's content on its way to a file.

    Args:
        file: emptied first.
        size: of the object in bytes.
        on_bytes: called with the bytes that arrived since the last call.
    """

    def __init__(self, file: IO[bytes], size: int, on_bytes: Callable[[int], None] | None) -> None:
        file.seek(0)
        file.truncate()
        self.written = CheckedWriter(file, on_bytes)
        self._size = size

    def advance(self, fetch: Callable[[IO[bytes], int], None], what: str) -> bool:
        """Fetch what is still to come; whether all is here.

        A connection that breaks after more than BLOCK_BYTES is no failed try: the next one goes on there.

        Args:
            fetch: writes the object's content from a byte on to a file.
            what: the action in words for the log.

        Raises:
            CorruptTransferError: it ended too early, without an error.
            Exception: what `fetch` raised.
        """
        start = self.written.size
        if start >= self._size:
            return True
        # The client writes 8 KiB at a time: the buffer makes one call of many.
        buffer = io.BufferedWriter(self.written, BLOCK_BYTES)
        try:
            fetch(buffer, start)
            buffer.flush()
        except Exception as error:
            buffer.flush()
            if not is_retriable(error) or self.written.size < start + BLOCK_BYTES:
                raise
            logger.warning("%s: goes on at byte %d after %s", what, self.written.size, cause_of(error))
            return False
        finally:
            buffer.detach()
        if self.written.size < self._size:
            raise CorruptTransferError(f"{self.written.size} of {self._size} bytes came")
        return True
