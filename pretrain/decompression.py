"""Blocks of plain, gzip and Zstandard files, one after the other, and the lines in them.

Nothing is held but a block, however much a file inflates to. A file that ends too early, fails its checksum or
inflates absurdly is a DamagedFile that names the place.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from pretrain.errors import ConfigError, ShardError

BLOCK_BYTES = 1 << 18
MAX_PIECE_BYTES = 1 << 20  # what is inflated in one go
ZSTD_FEED_BYTES = 1 << 12  # its decompressor takes no limit; so little can't inflate to more than 128 MiB
MAX_INFLATION = 256  # text comes to 50 at most; deflate could reach 1032, Zstandard far more
FREE_BYTES = 64 << 20  # below this no inflation is dangerous


class DamagedFile(ShardError):
    """The file can't be read any further."""


class _Decompressor(Protocol):
    eof: bool
    unused_data: bytes
    unconsumed_tail: bytes

    def decompress(self, data: bytes, limit: int, /) -> bytes: ...

    def flush(self) -> bytes: ...


def read_blocks(path: Path, compression: str, start: int = 0) -> Iterator[bytes]:
    """The content of a file.

    Args:
        compression: gz, zst or empty.
        start: bytes to leave out at the beginning of a plain file.

    Raises:
        DamagedFile: naming what is wrong and the offset in the file.
        ConfigError: .zst, and the package zstandard is missing.
    """
    try:
        with path.open("rb") as file:
            if compression:
                yield from _inflated(file, compression)
            else:
                file.seek(start)
                while block := file.read(BLOCK_BYTES):
                    yield block
    except OSError as error:
        raise DamagedFile(f"can't be read: {error.strerror or error}") from error


def _inflated(file: IO[bytes], compression: str) -> Iterator[bytes]:
    """All members or frames of a compressed file."""
    new, broken = _gzip() if compression == "gz" else _zstd()
    member: _Decompressor | None = None  # None between two members
    n_in = n_out = 0
    while data := file.read(BLOCK_BYTES if compression == "gz" else ZSTD_FEED_BYTES):
        n_in += len(data)
        while data:
            if member is None:
                data = data.lstrip(b"\0")  # gzip files may be padded
                if not data:
                    break
                member = new()
            try:
                piece = member.decompress(data, MAX_PIECE_BYTES)
            except broken as error:
                raise DamagedFile(f"{compression} data is corrupt before byte {n_in}: {error}") from error
            n_out += len(piece)
            if n_out > FREE_BYTES and n_out > MAX_INFLATION * n_in:
                raise DamagedFile(f"{n_in} bytes inflate to {n_out}, more than {MAX_INFLATION} times as much")
            if piece:
                yield piece
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        if rest := member.flush():
            yield rest
        if not member.eof:
            raise DamagedFile(f"truncated: the file ends at byte {n_in}, before its {compression} data does")


def _gzip() -> tuple[Callable[[], Any], type[Exception]]:
    return lambda: zlib.decompressobj(wbits=31), zlib.error


class _Frame:
    """A Zstandard frame behind zlib's interface."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self.unconsumed_tail = b""

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data)

    def decompress(self, data: bytes, limit: int, /) -> bytes:
        return bytes(self._frame.decompress(data))

    def flush(self) -> bytes:
        return b""


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(".zst files need the package zstandard", "pip install -r requirements-data.txt") from error
    return lambda: _Frame(zstandard.ZstdDecompressor().decompressobj()), zstandard.ZstdError


def split_lines(blocks: Iterator[bytes], max_bytes: int, offset: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line without its end) of each line; None for one longer than `max_bytes`, of which nothing is held."""
    begin, n_held = offset, 0
    held: list[bytes] = []
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            n_held += len(piece)
            held.append(piece)
            yield begin, b"".join(held) if n_held <= max_bytes else None
            begin += n_held + 1
            n_held = 0
            held.clear()
        n_held += len(rest)
        if n_held <= max_bytes:
            held.append(rest)
        else:
            held.clear()
    if n_held:
        yield begin, b"".join(held) if n_held <= max_bytes else None
