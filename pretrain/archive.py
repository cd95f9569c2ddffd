"""Several files of a checkpoint as one object: packed into a tar, and unpacked again without trusting it.

Packing the same files gives the same bytes, whenever and wherever it is done. Unpacking reads one header of 512 bytes
at a time and takes regular files only, each named by the manifest and of the size it says: no link, no folder, no path
and no extended header is ever acted upon, so that neither the disk nor the memory depends on what the archive claims.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import google_crc32c

from pretrain.checkpoint_manifest import FileEntry
from pretrain.errors import CheckpointError, ConfigError
from pretrain.files import BLOCK_BYTES, CheckedWriter, new_file

KINDS = ("tar", "tar.gz", "tar.zst")
# Weights are noise to a compressor: a higher level costs minutes and saves next to nothing.
_GZIP_LEVEL, _ZSTD_LEVEL = 1, 1
_MAX_ZSTD_WINDOW_BYTES = 1 << 27
_HEADER_BYTES = tarfile.BLOCKSIZE


def check_kind(kind: str) -> None:
    """Whether archives of this kind can be made here.

    Raises:
        ConfigError: the library for them is not installed.
    """
    if kind == "tar.zst":
        _zstandard()


def pack(
    folder: Path,
    files: Mapping[str, FileEntry],
    target: IO[bytes],
    kind: str,
    on_bytes: Callable[[int], None] | None = None,
) -> FileEntry:
    """Write files of a folder to `target` as one archive; its size and crc32c.

    Args:
        files: by name, with the size and the checksum that each must have.
        kind: one of KINDS.
        on_bytes: called with the bytes that were written since the last call.

    Raises:
        CheckpointError: a file is not what `files` says.
        OSError: a file can't be read, or the archive can't be written.
    """
    writer = CheckedWriter(target, on_bytes)
    with (
        _compressing(writer, kind) as stream,
        # GNU: a size beyond 8 GiB is in the header itself, so that every file has exactly one.
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, bufsize=BLOCK_BYTES) as tar,
    ):
        for name, entry in sorted(files.items()):
            path = folder / name
            with path.open("rb") as file:
                member = tarfile.TarInfo(name)
                member.size = os.fstat(file.fileno()).st_size
                source = _Checked(file)
                tar.addfile(member, source)
                if FileEntry(member.size, source.crc32c) != entry:
                    raise CheckpointError(f"{path} is not what the manifest says")
    return FileEntry(writer.size, writer.crc32c)


def unpack(path: Path, name: str, expected: Mapping[str, FileEntry], folder: Path) -> None:
    """Write the files of an archive to a folder, each compared with its size and checksum.

    Args:
        path: the archive.
        name: of its object, which tells its kind.
        expected: every file that must be in it, and nothing else may be.
        folder: where they go; they must not be there yet.

    Raises:
        CheckpointError: the archive is damaged, or holds anything else.
        ConfigError: the library for archives of this kind is not installed.
        StorageError: the folder can't be written.
    """
    missing = dict(expected)
    try:
        with _decompressing(path, name) as stream:
            while member := _next_member(stream, name, folder):
                entry = missing.pop(member.name, None)
                if entry is None:
                    raise CheckpointError(f"{name} holds {member.name!r}, which its manifest does not name")
                if member.size != entry.bytes:
                    raise CheckpointError(
                        f"{name}: {member.name} has {member.size} bytes, the manifest says {entry.bytes}"
                    )
                _extract(stream, entry, folder / member.name)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, _DamageError) as error:
        raise CheckpointError(f"{name} is no whole archive: {error}") from error
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(sorted(missing))}")


def _next_member(stream: IO[bytes], name: str, folder: Path) -> tarfile.TarInfo | None:
    """The header of the next file; None at the archive's end."""
    block = _read_exactly(stream, _HEADER_BYTES)
    if not any(block):
        return None
    member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise CheckpointError(f"{name}: {member.name!r} is no plain file (type {member.type!r})")
    tarfile.data_filter(member, str(folder))  # raises where the name leads outside
    if member.name != Path(member.name).name:  # the filter strips a leading slash and lets folders be
        raise CheckpointError(f"{name}: {member.name!r} is no plain file name")
    return member


def _extract(stream: IO[bytes], entry: FileEntry, path: Path) -> None:
    with new_file(path) as file:
        writer = CheckedWriter(file)
        left = entry.bytes
        while left:
            block = _read_exactly(stream, min(left, BLOCK_BYTES))
            writer.write(block)
            left -= len(block)
        if writer.crc32c != entry.crc32c:
            raise CheckpointError(f"{path.name} differs from the manifest's crc32c")
    _read_exactly(stream, -entry.bytes % _HEADER_BYTES)


def _read_exactly(stream: IO[bytes], n_bytes: int) -> bytes:
    """Raises EOFError."""
    parts = []
    while n_bytes:
        part = stream.read(n_bytes)
        if not part:
            raise EOFError("it ends too early")
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


class _Checked(io.RawIOBase):
    """Reads through from `file`, and knows the checksum of what went through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._checksum = google_crc32c.Checksum()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._checksum.update(block)
        return block

    @property
    def crc32c(self) -> str:
        """Of what was read so far."""
        return base64.b64encode(self._checksum.digest()).decode()


class _DamageError(Exception):
    """The zstd stream is damaged: its own error, under a name that exists without the library."""


@contextlib.contextmanager
def _compressing(target: Any, kind: str) -> Iterator[IO[bytes]]:
    if kind == "tar":
        yield target
    elif kind == "tar.gz":
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, target, mtime=0) as stream:  # no name, no time: the same bytes again
            yield stream  # type: ignore[misc]
    else:
        compressor = _zstandard().ZstdCompressor(level=_ZSTD_LEVEL)
        with compressor.stream_writer(target, closefd=False) as stream:
            yield stream


@contextlib.contextmanager
def _decompressing(path: Path, name: str) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if name.endswith(".tar"):
            yield file
        elif name.endswith(".tar.gz"):
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream  # type: ignore[misc]
        elif name.endswith(".tar.zst"):
            zstandard = _zstandard()
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
            try:
                with decompressor.stream_reader(file, closefd=False) as stream:
                    yield stream
            except zstandard.ZstdError as error:
                raise _DamageError(error) from error
        else:
            raise CheckpointError(f"{name} is of no known kind: {', '.join(KINDS)}")


def _zstandard() -> Any:
    try:
        import zstandard  # here, because only this kind of archive needs it
    except ImportError as error:
        raise ConfigError(
            "archives of kind tar.zst need the package zstandard",
            "Run bash setup_env.sh, or choose another --checkpoint.archive.",
        ) from error
    return zstandard


def archive_name(rank: int, entry: FileEntry, kind: str) -> str:
    """What a rank's archive is called in the bucket: its content tells, so that no name ever has two contents."""
    return f"rank-{rank:05d}-{base64.b64decode(entry.crc32c).hex()}.{kind}"
