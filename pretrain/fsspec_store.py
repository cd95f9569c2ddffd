"""Buckets of other makers (s3://, az://, hf://, …) through fsspec, to read training data from.

    store = open_store("s3://bucket/shards", config.storage)
    for info in store.list():
        store.download(info.name, cache / info.name)

Reading keeps the contract of `storage.ObjectStore`. Writing is refused: a commit needs a creation that fails where the
name is taken and a deletion of one generation. fsspec promises neither; most of its backends look first and write then.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib.metadata
import io
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, StorageError, TrainerError
from pretrain.files import CheckedWriter, new_file
from pretrain.retry import RETRIABLE_STATUS, CorruptTransferError, GaveUpError, Retry, cause_of, is_retriable
from pretrain.storage import Listing, ObjectInfo, ObjectMissing, checked_name, too_big

T = TypeVar("T")

READ_BYTES = 8 << 20  # of one range request, where a backend reads by ranges
READ_ONLY = "Write to gs://bucket/prefix or to a folder; data can be read from here"
_LOG_IN = {
    "s3": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME, and a key or a login as adlfs describes",
    "abfs": "Set AZURE_STORAGE_ACCOUNT_NAME, and a key or a login as adlfs describes",
    "hf": "Log in with: hf auth login, or set HF_TOKEN",
}
# What names one version of an object, the surest first; backends call it differently.
_VERSION_KEYS = ("generation", "ETag", "etag", "blob_id", "sha", "mtime", "last_modified", "LastModified", "created")
_TIME_KEYS = ("LastModified", "last_modified", "mtime", "created")
# Connections that broke, by name: none of these packages need be installed. `is_retriable` knows the rest.
_BROKEN = frozenset(
    {
        "aiohttp.client_exceptions.ClientConnectionError",
        "aiohttp.client_exceptions.ClientPayloadError",
        "asyncio.exceptions.TimeoutError",
        "azure.core.exceptions.ServiceRequestError",
        "azure.core.exceptions.ServiceResponseError",
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.HTTPClientError",
        "httpx.TransportError",
    }
)
_BUSY = frozenset({errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ETIMEDOUT})  # what s3fs makes of 500, 503 and time-outs


class FsspecStore:
    """What lies below a url of any scheme that fsspec knows, read only. Safe to share between threads.

    `generation` is a hash of the backend's ETag, version or time; crc32c is given where the backend keeps one (none of
    the usual ones does) and by `download`, which computes it. A checksum of another kind is compared where the backend
    names one that is certainly the content's: Content-MD5 on Azure, SHA-256 of large files on Hugging Face.

    Raises:
        ConfigError: a scheme that is unknown or whose package is not installed, or a password in the url.
    """

    def __init__(self, url: str, config: StorageConfig, retry: Retry | None = None) -> None:
        self.scheme = url.partition("://")[0]
        _check_url(url, self.scheme)
        self.url = url.rstrip("/")
        self._fs = _open_filesystem(url, self.scheme, config)
        self._root = self._fs._strip_protocol(url).rstrip("/")
        self._retry = retry or Retry(config)

    def describe(self) -> str:
        """See ObjectStore."""
        package = type(self._fs).__module__.partition(".")[0]
        return f"{self.url} through {package} {importlib.metadata.version(package)}, to read only"

    def list(self, prefix: str = "") -> Listing:
        """See ObjectStore."""
        infos = [info for info in self._call("list", prefix, self._walk) if info.name.startswith(prefix)]
        return sorted(infos, key=lambda info: checked_name(info.name))

    def stat(self, name: str) -> ObjectInfo | None:
        """See ObjectStore."""
        try:
            return self._call("stat", name, lambda: self._stat(name)[0])
        except ObjectMissing:
            return None

    def read_bytes(self, name: str, max_bytes: int = 16 << 20) -> bytes:
        """See ObjectStore."""

        def once() -> bytes:
            info, details = self._stat(name)
            if info.size > max_bytes:
                raise too_big(self._where(name), info.size, max_bytes)
            buffer = io.BytesIO()
            self._fetch(info, details, buffer, None)
            return buffer.getvalue()

        return self._call("read", name, once)

    def download(self, name: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        """See ObjectStore."""
        self._call("download", name, lambda: self._stat(name))  # what is missing leaves no folder behind
        with new_file(path) as file:
            return self._call("download", name, lambda: self._fetch(*self._stat(name), file, on_bytes))

    def upload(self, path: Path, name: str, on_progress: Callable[[], None] | None = None) -> NoReturn:
        """Refused, see the module. Raises ConfigError."""
        raise self._read_only()

    def create(self, name: str, data: bytes) -> NoReturn:
        """Refused, see the module. Raises ConfigError."""
        raise self._read_only()

    def replace(self, name: str, data: bytes, generation: int) -> NoReturn:
        """Refused, see the module. Raises ConfigError."""
        raise self._read_only()

    def delete(self, name: str, generation: int = 0) -> NoReturn:
        """Refused, see the module. Raises ConfigError."""
        raise self._read_only()

    def _read_only(self) -> ConfigError:
        why = "fsspec has no creation that fails where the name is taken, so nothing can be committed there"
        return ConfigError(f"{self.url} can't be written to: {why}", READ_ONLY)

    def _walk(self) -> Listing:
        """Every object, in the backend's order. Not by fsspec's own `walk`: it passes over a folder that fails."""
        self._fs.invalidate_cache()
        found, folders = [], [self._root]
        while folders:
            folder = folders.pop()
            try:
                entries = self._fs.ls(folder, detail=True)
            except FileNotFoundError:  # a folder that is missing is empty, as a prefix in a bucket
                continue
            for details in entries:
                path = details["name"].rstrip("/")
                if details["type"] != "directory":
                    found.append(_info_of(self._relative(path), details))
                elif path != folder.rstrip("/"):  # some list a folder in itself
                    folders.append(path)
        return found

    def _relative(self, path: str) -> str:
        name = path.removeprefix(self._root).lstrip("/")
        if not name or not path.startswith(self._root):
            raise StorageError(f"{self.url} is a file, or listed under another name: {path}", "Give a folder's url")
        return name

    def _stat(self, name: str) -> tuple[ObjectInfo, dict[str, Any]]:
        """(the object, what the backend says of it). Raises FileNotFoundError."""
        self._fs.invalidate_cache()
        details = self._fs.info(self._path(name))
        if details["type"] != "file":
            raise FileNotFoundError(self._where(name))
        return _info_of(name, details), details

    def _fetch(
        self, info: ObjectInfo, details: dict[str, Any], file: IO[bytes], on_bytes: Callable[[int], None] | None
    ) -> ObjectInfo:
        """One try to write the object's content to `file`, from its start; the object with its crc32c."""
        file.seek(0)
        file.truncate()
        writer, checksum = CheckedWriter(file, on_bytes), _Checksum(details)
        try:
            with self._fs.open(self._path(info.name), "rb", block_size=READ_BYTES) as source:
                while block := source.read(READ_BYTES):
                    writer.write(block)
                    checksum.update(block)
            now = self._stat(info.name)[0]
            if writer.size != info.size or (now.size, now.generation) != (info.size, info.generation):
                raise CorruptTransferError(f"{writer.size} bytes came of {info.size}, or it changed while it was read")
            if not checksum.fits() or info.crc32c not in ("", writer.crc32c):
                raise CorruptTransferError(f"{writer.size} bytes came whose checksum is not that of the object")
        except BaseException:
            if on_bytes:
                on_bytes(-writer.size)
            raise
        return ObjectInfo(info.name, writer.size, writer.crc32c, info.generation, info.created_s)

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked_name(name)}"

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")

    def _call(self, action: str, name: str, request: Callable[[], T]) -> T:
        """The result of `request` under the retry; errors are put into words here, outside of it."""

        def once() -> T:
            try:
                return request()
            except Exception as error:
                if not is_retriable(error) and _is_transient(error):
                    raise ConnectionError(str(error)) from error  # which the retry knows
                raise

        try:
            return self._retry(f"{action} {self._where(name)}", once)
        except TrainerError:
            raise
        except Exception as error:
            if _is_ours(error):
                raise
            raise self._explained(action, name, error) from error

    def _explained(self, action: str, name: str, error: Exception) -> StorageError:
        """What a failed request means to a user, and what mends it."""
        what = f"{action} {self._where(name)}"
        if isinstance(error, GaveUpError):
            mend = "Is it within reach? storage.deadline_s sets how long to go on trying."
            return StorageError(f"{what}: gave up after {error}: {_words(error.__cause__ or error)}", mend)
        if isinstance(error, FileNotFoundError) or _status_of(error) == 404:
            return ObjectMissing(f"there is no object {self._where(name)}", "See what is there, and who may read it.")
        if isinstance(error, PermissionError) or _status_of(error) in (401, 403) or "Credentials" in repr(error):
            mend = _LOG_IN.get(self.scheme, "Log in as the package that reads it describes")
            return StorageError(f"{what}: not allowed ({_words(error)})", mend)
        return StorageError(f"{what}: {_words(error)}", f"Asked was {type(self._fs).__module__}.")


class _Checksum:
    """The digest of a content, beside the one that its backend promises."""

    def __init__(self, details: dict[str, Any]) -> None:
        settings, large = details.get("content_settings"), details.get("lfs")
        md5 = settings.get("content_md5") if isinstance(settings, dict) else None
        sha256 = large.get("sha256") if isinstance(large, dict) else None
        self._wanted = str(sha256) if sha256 else bytes(md5).hex() if md5 else ""
        self._digest = hashlib.sha256() if sha256 else hashlib.md5(usedforsecurity=False)

    def update(self, block: bytes) -> None:
        if self._wanted:
            self._digest.update(block)

    def fits(self) -> bool:
        """Whether the content is what was promised; True where nothing was."""
        return not self._wanted or self._digest.hexdigest() == self._wanted


def _check_url(url: str, scheme: str) -> None:
    if scheme in ("gcs", "gs"):
        raise ConfigError(f"{scheme}:// is not read through fsspec", "Write it gs://bucket/prefix")
    if urlsplit(url).password:
        raise ConfigError(f"a {scheme}:// url holds a password", "Keep it where the package that reads it looks for it")
    if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise ConfigError(
            f"{url}: {scheme}:// is not supported",
            "Give gs://bucket/prefix, a folder, or s3://, az://, hf:// or another scheme that fsspec knows.",
        )


def _open_filesystem(url: str, scheme: str, config: StorageConfig) -> Any:
    """The backend with its own caches and, where it has one, its own retry off."""
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        timeouts = {"connect_timeout": config.timeout_s, "read_timeout": config.timeout_s}
        options["config_kwargs"] = {**timeouts, "retries": {"total_max_attempts": 1}}
    try:
        fs, _ = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        module = known_implementations.get(scheme, {}).get("class", scheme).partition(".")[0]
        package = f"'fsspec[{scheme}]'" if module == "fsspec" else module
        raise ConfigError(f"{url} needs a package that is not installed", f"pip install {package}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{url} can't be opened: {_words(error)}", "Look at the url") from error
    if hasattr(fs, "retries"):
        fs.retries = 1  # two layers multiply their tries
    return fs


def _info_of(name: str, details: dict[str, Any]) -> ObjectInfo:
    if details.get("size") is None:
        raise StorageError(f"{details['name']} has no size that the server tells", "Download it by hand")
    version = next((_plain(details[key]) for key in _VERSION_KEYS if details.get(key)), "")
    generation = int.from_bytes(hashlib.sha256(str(version).encode()).digest()[:7], "big") if version else 0
    times = (_plain(details.get(key)) for key in _TIME_KEYS)
    created_s = next((float(time) for time in times if isinstance(time, (int, float))), 0.0)
    crc32c = details.get("crc32c") or ""
    return ObjectInfo(name, int(details["size"]), crc32c if _is_crc32c(crc32c) else "", generation, created_s)


def _plain(value: Any) -> Any:
    """Seconds since 1970 for a time, which a listing and a look at one object may write differently."""
    return value.timestamp() if isinstance(value, datetime) else value


def _is_crc32c(text: Any) -> bool:
    """Whether it is written as GCS writes it: four bytes in base64."""
    try:
        return isinstance(text, str) and len(base64.b64decode(text, validate=True)) == 4
    except ValueError:
        return False


def _is_ours(error: Exception) -> bool:
    """Whether this machine's disk is full (`new_file` says so), or a program is at fault; a bucket can't help it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__module__ == "builtins" and not isinstance(error, (ValueError, NotImplementedError))


def _status_of(error: BaseException) -> int:
    """The HTTP status that a backend's error carries; 0 for others."""
    response = getattr(error, "response", None)
    for holder in (error, response):
        for key in ("status", "status_code"):
            if isinstance(status := getattr(holder, key, None), int):
                return status
    tree = response if isinstance(response, dict) else {}
    return int(tree.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_transient(error: BaseException) -> bool:
    """Whether a backend's own error says that the same request may succeed when it is sent again."""
    if status := _status_of(error):
        return status in RETRIABLE_STATUS
    names = {f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__}
    return bool(names & _BROKEN) or (isinstance(error, OSError) and error.errno in _BUSY)


def _words(error: BaseException) -> str:
    """The cause in a few words, without what follows a `?` in an address: it may be a signature."""
    return re.sub(r"\?[^\s'\"]+", "?…", cause_of(error))
