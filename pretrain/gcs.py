"""A bucket on Google Cloud Storage, or on an emulator of it, as an ObjectStore."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import requests
import urllib3.exceptions
from google.api_core.exceptions import BadRequest, GoogleAPICallError, PreconditionFailed
from google.auth.exceptions import GoogleAuthError
from google.cloud.storage.exceptions import InvalidResponse

from pretrain.config import StorageConfig
from pretrain.credentials import LOG_IN, connect
from pretrain.errors import StorageError
from pretrain.files import crc32c_of_bytes, crc32c_of_file, disk_problem, new_file
from pretrain.gcs_transfers import Download, SessionLostError, UploadSession
from pretrain.retry import CorruptTransferError, GaveUpError, Retry, cause_of, status_of
from pretrain.storage import Listing, ObjectInfo, ObjectMissing, checked_name, exists, too_big

T = TypeVar("T")

MULTIPART_BYTES = 8 << 20  # up to here an object is one request
# Of a resumable upload; a multiple of 256 KiB by the API's rule. Bigger chunks cost memory and, without TLS, must be
# sent within timeout_s; smaller ones wait more often for an answer.
CHUNK_BYTES = 32 << 20
_LIST_FIELDS = "items(name,size,crc32c,generation,timeCreated),nextPageToken"

# action -> (permission, narrowest role that holds it)
_PERMISSIONS = {
    "list": ("storage.objects.list", "roles/storage.objectViewer"),
    "stat": ("storage.objects.get", "roles/storage.objectViewer"),
    "read": ("storage.objects.get", "roles/storage.objectViewer"),
    "download": ("storage.objects.get", "roles/storage.objectViewer"),
    "upload": ("storage.objects.create", "roles/storage.objectUser"),
    "create": ("storage.objects.create", "roles/storage.objectUser"),
    "replace": ("storage.objects.delete", "roles/storage.objectUser"),
    "delete": ("storage.objects.delete", "roles/storage.objectUser"),
}
_WRITES = ("upload", "create", "replace", "delete")

_REMOTE_ERRORS = (
    GoogleAPICallError,
    GoogleAuthError,
    InvalidResponse,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    GaveUpError,
)


class GcsStore:
    """gs://bucket/prefix. Safe to share between threads: the client's session keeps ten connections open.

    Every request goes through one `Retry`; the client's own is switched off. A large transfer goes on where it broke
    off (gcs_transfers.py); what arrived damaged begins again. What a repetition could clobber carries a generation
    precondition, so that a reply which was lost is found out (412) and the object read back.
    """

    def __init__(self, bucket: str, prefix: str, config: StorageConfig, retry: Retry | None = None) -> None:
        self.url = f"gs://{bucket}/{prefix}".rstrip("/")
        self._access = connect()
        self._bucket = self._access.client.bucket(bucket)
        self._root = f"{prefix}/" if prefix else ""
        self._retry = retry or Retry(config)
        self._request: dict[str, Any] = {"timeout": config.timeout_s, "retry": None}

    def describe(self) -> str:
        """See ObjectStore."""
        return f"{self.url} at {self._access.endpoint} as {self._access.identity}"

    def list(self, prefix: str = "") -> Listing:
        """See ObjectStore."""

        def every_page() -> Listing:
            blobs = self._access.client.list_blobs(
                self._bucket, prefix=self._root + prefix, fields=_LIST_FIELDS, **self._request
            )
            return [self._info(blob) for blob in blobs if not blob.name.endswith("/")]  # "/": a folder of the console

        infos = self._call("list", prefix, every_page)
        return sorted(infos, key=lambda info: checked_name(info.name))

    def stat(self, name: str) -> ObjectInfo | None:
        """See ObjectStore."""
        try:
            return self._stat("stat", name)
        except ObjectMissing:
            return None

    def read_bytes(self, name: str, max_bytes: int = 16 << 20) -> bytes:
        """See ObjectStore."""
        info = self._stat("read", name)
        if info.size > max_bytes:
            raise too_big(self._where(name), info.size, max_bytes)
        buffer = io.BytesIO()
        self._receive("read", info, buffer, None)
        return buffer.getvalue()

    def download(self, name: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        """See ObjectStore."""
        info = self._stat("download", name)
        with new_file(path) as file:
            self._receive("download", info, file, on_bytes)
        return info

    def upload(self, path: Path, name: str, on_progress: Callable[[], None] | None = None) -> ObjectInfo:
        """See ObjectStore."""
        try:
            wanted = ObjectInfo(name, path.stat().st_size, crc32c_of_file(path))
            info, is_ours = self._create("upload", wanted, lambda: path.open("rb"), on_progress=on_progress)
        except OSError as error:
            if problem := disk_problem(error, path.parent):
                raise problem from error
            raise
        if not is_ours and (info.size, info.crc32c) != (wanted.size, wanted.crc32c):
            raise exists(self._where(name))
        return info

    def create(self, name: str, data: bytes) -> ObjectInfo:
        """See ObjectStore."""
        return self._put("create", name, data, 0)

    def replace(self, name: str, data: bytes, generation: int) -> ObjectInfo:
        """See ObjectStore."""
        return self._put("replace", name, data, generation)

    def _put(self, action: str, name: str, data: bytes, generation: int) -> ObjectInfo:
        wanted = ObjectInfo(name, len(data), crc32c_of_bytes(data))
        info, is_ours = self._create(action, wanted, lambda: io.BytesIO(data), generation)
        if not is_ours and (info.size != len(data) or self.read_bytes(name, len(data)) != data):
            raise exists(self._where(name))
        return info

    def delete(self, name: str, generation: int = 0) -> bool:
        """See ObjectStore."""

        def once() -> bool:
            try:
                self._blob(name).delete(if_generation_match=generation or None, **self._request)
            except PreconditionFailed:  # that generation is gone, and another has taken its place
                return False
            return True

        try:
            return self._call("delete", name, once)
        except ObjectMissing:
            return False

    def _create(
        self,
        action: str,
        wanted: ObjectInfo,
        source: Callable[[], IO[bytes]],
        generation: int = 0,
        on_progress: Callable[[], None] | None = None,
    ) -> tuple[ObjectInfo, bool]:
        """(the object, True), or (what is there under its name, False): another's, or ours after a lost reply.

        Args:
            generation: which it takes the place of; 0: none is there.
        """
        replaced = generation

        def once() -> ObjectInfo:
            nonlocal replaced
            try:
                return self._send(wanted, source, replaced, on_progress or (lambda: None))
            except _ArrivedDamagedError:
                replaced = 0  # what came is deleted again
                raise

        try:
            return self._call(action, wanted.name, once), True
        except _TakenError:
            return self._stat("stat", wanted.name), False

    def _send(
        self, wanted: ObjectInfo, source: Callable[[], IO[bytes]], generation: int, on_progress: Callable[[], None]
    ) -> ObjectInfo:
        """Write the object from its start; the server is told the checksum, and refuses what doesn't match it."""
        blob = self._blob(wanted.name)
        blob.crc32c = wanted.crc32c
        # checksum=None: the client's own check would delete the object whatever its generation is by then.
        options = {"size": wanted.size, "if_generation_match": generation, "checksum": None, **self._request}
        try:
            with source() as file:
                if wanted.size <= MULTIPART_BYTES:
                    blob.upload_from_file(file, **options)
                    info = self._info(blob)
                    on_progress()
                else:
                    url = blob.create_resumable_upload_session(**options)
                    info = self._send_in_chunks(url, file, wanted, on_progress)
        except SessionLostError as error:
            raise CorruptTransferError(str(error)) from error
        except PreconditionFailed as error:
            raise _TakenError from error
        except BadRequest as error:
            if "crc32c" in str(error).lower():
                raise CorruptTransferError(f"the server refused a damaged upload: {cause_of(error)}") from error
            raise
        if (info.size, info.crc32c) != (wanted.size, wanted.crc32c):
            blob.delete(if_generation_match=info.generation, **self._request)
            raise _ArrivedDamagedError(f"{info.size} bytes with crc32c {info.crc32c} arrived")
        return info

    def _send_in_chunks(
        self, url: str, file: IO[bytes], wanted: ObjectInfo, on_progress: Callable[[], None]
    ) -> ObjectInfo:
        """Send the file's content to a resumable upload, each chunk with the whole patience of the retry."""
        session = UploadSession(
            self._access.client._http, url, file, wanted.size, CHUNK_BYTES, self._request["timeout"]
        )
        while not (made := self._retry(f"upload {self._where(wanted.name)}", session.advance)):
            on_progress()
        on_progress()
        size, generation = int(made.get("size", 0)), int(made.get("generation", 0))
        return ObjectInfo(wanted.name, size, str(made.get("crc32c", "")), generation)

    def _receive(self, action: str, info: ObjectInfo, file: IO[bytes], on_bytes: Callable[[int], None] | None) -> None:
        """Write the object's content to `file`, from its start again only where what came was damaged."""
        what = f"{action} {self._where(info.name)}"
        blob = self._bucket.blob(self._root + info.name, generation=info.generation or None)  # that one, or a 404

        def fetch(target: IO[bytes], start: int) -> None:  # raw: the bytes as they are stored
            blob.download_to_file(target, start=start or None, raw_download=True, checksum=None, **self._request)

        def once() -> None:
            download = Download(file, info.size, on_bytes)
            came = download.written
            try:
                while not self._retry(what, lambda: download.advance(fetch, what)):
                    pass
                if came.size != info.size or (info.crc32c and came.crc32c != info.crc32c):
                    raise CorruptTransferError(
                        f"{came.size} bytes with crc32c {came.crc32c} came, stored are {info.size} with {info.crc32c}"
                    )
            except BaseException:
                if on_bytes:
                    on_bytes(-came.size)
                raise

        self._call(action, info.name, once)

    def _stat(self, action: str, name: str) -> ObjectInfo:
        """Raises ObjectMissing."""
        blob = self._blob(name)
        self._call(action, name, lambda: blob.reload(**self._request))
        if action in ("read", "download") and blob.content_encoding == "gzip":
            raise StorageError(
                f"{self._where(name)} is stored with Content-Encoding: gzip, so its checksum is not its content's",
                "Upload it again without compression in transit (gcloud storage cp without -z, -Z, -j, -J).",
            )
        return self._info(blob)

    def _info(self, blob: Any) -> ObjectInfo:
        name = blob.name.removeprefix(self._root)
        created_s = blob.time_created.timestamp() if blob.time_created else 0.0
        return ObjectInfo(name, int(blob.size or 0), blob.crc32c or "", int(blob.generation or 0), created_s)

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._root + checked_name(name))

    def _where(self, name: str) -> str:
        return f"gs://{self._bucket.name}/{self._root}{name}".rstrip("/")

    def _call(self, action: str, name: str, request: Callable[[], T]) -> T:
        """The result of `request` under the retry; errors are put into words here, outside of it."""
        if action in _WRITES and not self._access.can_write:
            raise StorageError(f"{action} {self._where(name)}: no Google credentials, and writing needs them", LOG_IN)
        try:
            return self._retry(f"{action} {self._where(name)}", request)
        except _REMOTE_ERRORS as error:
            raise self._explained(action, name, error) from error

    def _explained(self, action: str, name: str, error: Exception) -> StorageError:
        """What a failed request means to a user, and what mends it."""
        what = f"{action} {self._where(name)}"
        status = status_of(error)
        if isinstance(error, GaveUpError):
            last = cause_of(error.__cause__ or error)
            mend = f"Is {self._access.endpoint} within reach? storage.deadline_s sets how long to go on trying."
            return StorageError(f"{what}: gave up after {error}: {last}", mend)
        if status == 404:
            return self._missing(action, name, error)
        if status == 403:
            return self._forbidden(action, what, error)
        if status == 401 or isinstance(error, GoogleAuthError):
            return StorageError(f"{what}: {self._access.identity} is not logged in ({cause_of(error)})", LOG_IN)
        return StorageError(
            f"{what}: {cause_of(error)}", f"Asked was {self._access.endpoint}, as {self._access.identity}."
        )

    def _missing(self, action: str, name: str, error: Exception) -> StorageError:
        bucket = self._bucket.name
        if action in ("list", "upload", "create", "replace") or "bucket does not exist" in str(error):
            return StorageError(
                f"there is no bucket {bucket} at {self._access.endpoint}",
                "See which there are: gcloud storage ls, or make it: "
                f"gcloud storage buckets create gs://{bucket} --location=REGION",
            )
        folder = self._where(name).rpartition("/")[0]
        return ObjectMissing(
            f"there is no object {self._where(name)}", f"See what is there: gcloud storage ls {folder}"
        )

    def _forbidden(self, action: str, what: str, error: Exception) -> StorageError:
        permission, role = _PERMISSIONS[action]
        return StorageError(
            f"{what}: {self._access.identity} lacks {permission} ({cause_of(error)})",
            f"Grant it: gcloud storage buckets add-iam-policy-binding gs://{self._bucket.name} "
            f"--member={self._access.member} --role={role}",
        )


class _ArrivedDamagedError(CorruptTransferError):
    """A server that compares no checksums took what was damaged on the way."""


class _TakenError(Exception):
    """412 on a write: there is another object under that name."""
