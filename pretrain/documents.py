"""Documents out of units of raw text, and a word on each that is none.

    for found in read_unit(unit, Reading(text_key="text")):
        if isinstance(found, Rejected): ...

Every document of the input comes out once, as a Document or as a Rejected, so that the counts add up. What to do about
a Rejected is the caller's to decide. A blank line of a .jsonl is no document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pretrain.decompression import DamagedFile, read_blocks, split_lines
from pretrain.errors import ShardError
from pretrain.raw_files import RawFile, Unit
from pretrain.tables import Absent, read_arrow, read_parquet

TxtDocuments = Literal["file", "line", "paragraph"]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHOWN_BYTES = 60

MENDS = {
    "undecodable": "Convert it to UTF-8, or leave such documents out: --on_bad skip",
    "broken_json": "Give one JSON object a line, or leave such lines out: --on_bad skip",
    "missing_key": "Name the key of the text with --text_key, or leave such documents out: --on_bad skip",
    "too_long": "Cut it (--txt_documents paragraph), raise --max_document_mb, or leave it out: --on_bad skip",
    "damaged": "Fetch the file again, or take what can be read of it: --on_bad skip",
}
EMPTY = "empty"  # never an error: nothing is lost with it
REASONS = (*MENDS, EMPTY)


@dataclass(frozen=True)
class Reading:
    """How documents are found in files."""

    text_key: str = "text"
    """Of a JSON object, or the name of a column."""
    txt_documents: TxtDocuments = "file"
    """What of a .txt is a document; paragraphs stand apart by blank lines."""
    max_document_bytes: int = 64 << 20
    """A longer one, or a longer line, is rejected before it is held."""
    scratch: str = ""
    """A folder for files from buckets while they are read; empty: the system's."""


class Document(NamedTuple):
    """A text and the same in UTF-8."""

    text: str
    data: bytes


@dataclass(frozen=True)
class Rejected:
    """A document that can't be used."""

    reason: str
    """One of REASONS."""
    where: str
    """File and place in it."""
    found: str

    def error(self) -> ShardError:
        """The same as an error, with its mend."""
        return ShardError(f"{self.where}: {self.found}", MENDS[self.reason])


def read_unit(unit: Unit, reading: Reading) -> Iterator[Document | Rejected]:
    """All documents of a unit in their order. A file that can't be read any further is one Rejected, the last.

    Raises:
        ShardError: the file changed since it was listed.
        StorageError: it can't be fetched.
        ConfigError: a package that its format needs is missing.
    """
    name = unit.file.name
    with unit.file.on_disk(reading.scratch) as path:
        try:
            for place, found in _pieces(unit, path, reading):
                where = f"{name}, {place}" if place else name
                if found is None:
                    yield Rejected("too_long", where, f"longer than {reading.max_document_bytes} bytes")
                elif isinstance(found, Absent):
                    yield Rejected("missing_key", where, f"{reading.text_key!r} {found}")
                elif unit.file.format == "jsonl":
                    if found.strip():
                        yield _json_document(found, reading.text_key, where)
                else:
                    yield _document(found, where)
        except DamagedFile as error:
            yield Rejected("damaged", name, error.what)


def _pieces(unit: Unit, path: Path, reading: Reading) -> Iterator[tuple[str, bytes | Absent | None]]:
    """(place, bytes) of each document; None for bytes that are too many."""
    file = unit.file
    if file.format == "parquet":
        yield from read_parquet(path, reading.text_key, unit.start, unit.stop)
    elif file.format == "arrow":
        yield from read_arrow(path, reading.text_key)
    elif file.format == "txt" and reading.txt_documents == "file":
        yield "", _whole(path, file, reading.max_document_bytes)
    elif file.format == "txt" and reading.txt_documents == "paragraph":
        yield from _paragraphs(_lines(unit, path, reading.max_document_bytes), reading.max_document_bytes)
    else:
        for offset, line in _lines(unit, path, reading.max_document_bytes):
            if file.format == "txt" and line is not None:
                line = line.removesuffix(b"\r")
            yield f"byte {offset}", line


def _lines(unit: Unit, path: Path, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset in the text, line) of each line that begins in the unit."""
    before = max(0, unit.start - 1)
    lines = split_lines(read_blocks(path, unit.file.compression, before), max_bytes, before)
    if unit.start:
        next(lines, None)  # what goes on at the byte before, or ends there, is the line of the unit before
    for offset, line in lines:
        if unit.stop and offset >= unit.stop:
            return
        yield offset, line.removeprefix(BYTE_ORDER_MARK) if line and offset == 0 else line


def _whole(path: Path, file: RawFile, max_bytes: int) -> bytes | None:
    blocks, n_bytes = [], 0
    for block in read_blocks(path, file.compression):
        blocks.append(block)
        n_bytes += len(block)
        if n_bytes > max_bytes:
            return None
    return b"".join(blocks).removeprefix(BYTE_ORDER_MARK)


def _paragraphs(lines: Iterator[tuple[int, bytes | None]], max_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """Runs of lines that are not blank."""
    begin, n_bytes = 0, 0
    held: list[bytes] = []
    for offset, line in lines:
        if line is not None and not line.strip():
            if n_bytes:
                yield f"byte {begin}", b"\n".join(held) if n_bytes <= max_bytes else None
            n_bytes = 0
            held.clear()
            continue
        if not n_bytes:
            begin = offset
        n_bytes += max_bytes + 1 if line is None else len(line) + 1
        if line is not None and n_bytes <= max_bytes:
            held.append(line)
        else:
            held.clear()
    if n_bytes:
        yield f"byte {begin}", b"\n".join(held) if n_bytes <= max_bytes else None


def _json_document(line: bytes, text_key: str, where: str) -> Document | Rejected:
    try:
        tree = json.loads(line.decode())
        if not isinstance(tree, dict):
            return Rejected("broken_json", where, f"a JSON {type(tree).__name__}, not an object: {_shown(line)}")
        text = tree.get(text_key)
        if not isinstance(text, str):
            found = f"is {text!r:.40}" if text_key in tree else f"is not among the keys {', '.join(tree)[:80]}"
            return Rejected("missing_key", where, f"{text_key!r} {found}")
        data = text.encode()
    except UnicodeDecodeError as error:
        return Rejected("undecodable", where, f"not UTF-8: {error}")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no text
        return Rejected("undecodable", where, "half of a surrogate pair, which is no text")
    except (ValueError, RecursionError) as error:
        return Rejected("broken_json", where, f"not JSON ({error}): {_shown(line)}")
    return Document(text, data) if data.strip() else Rejected(EMPTY, where, "no text")


def _document(data: bytes, where: str) -> Document | Rejected:
    try:
        return Document(data.decode(), data) if data.strip() else Rejected(EMPTY, where, "no text")
    except UnicodeDecodeError as error:
        return Rejected("undecodable", where, f"not UTF-8: {error}")


def _shown(line: bytes) -> str:
    return repr(line[:SHOWN_BYTES].decode(errors="replace"))
