"""The tokens of a unit as files of a working folder: written by a worker, committed by a record, checked when read.

    {unit}.tokens      ids of all documents, each with its end of text, uint16 or uint32
    {unit}.documents   a DOCUMENT each
    {unit}.json        the Part: counts and checksums. Written last; without it there is no part.

Parts hold every document that could be read. Which of them are duplicates or for validation is decided when shards are
cut, in the order of the units.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pretrain.documents import EMPTY, Document, Reading, Rejected, read_unit
from pretrain.encoders import MAX_PIECE_CHARS, Encoder, encode_whole
from pretrain.files import CheckedWriter, crc32c_of_file, new_file
from pretrain.raw_files import Unit

DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("digest", "<u8", (2,))])
BATCH_CHARS = 1 << 18  # encoded in one call: a call costs little, and what it holds fits a processor's cache
HASH_KEY = b"refocused-gpt documents"  # fixed for ever: it decides which documents validate
READ_TOKENS = 1 << 22  # of a part at a time
SHOWN_REJECTED = 20  # of a unit, by name; all are counted

OnProgress = Callable[[int, int], None]
"""Called with (bytes of text, tokens) that were encoded since the last call."""


@dataclass(frozen=True)
class Part:
    """What came out of a unit."""

    unit: int
    documents: int
    """That were encoded."""
    tokens: int
    tokens_crc32c: str
    documents_crc32c: str
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents that were not, by reason."""
    shown: list[str] = field(default_factory=list)
    """The first of them in words."""

    def paths(self, folder: Path) -> tuple[Path, Path, Path]:
        """(tokens, documents, record)."""
        return part_paths(folder, self.unit)


def part_paths(folder: Path, unit: int) -> tuple[Path, Path, Path]:
    """(tokens, documents, record) of a unit's part."""
    tokens, documents, record = (folder / f"{unit:08d}.{end}" for end in ("tokens", "documents", "json"))
    return tokens, documents, record


def digest(data: bytes) -> bytes:
    """128 bits that tell a document from any other."""
    return hashlib.blake2b(data, digest_size=16, key=HASH_KEY).digest()


def is_validation(digests: np.ndarray, val_fraction: float) -> np.ndarray:
    """bool (n,): which documents validate, by their digests (n, 2) alone."""
    threshold = int(val_fraction * 2**64)
    chosen: np.ndarray = digests[:, 0] < np.uint64(min(threshold, 2**64 - 1))
    return chosen


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_part(
    unit: Unit, reading: Reading, encoder: Encoder, folder: Path, *, stop: bool, on_progress: OnProgress | None = None
) -> Part:
    """Read and encode a unit; its part is complete and on disk when this returns.

    Args:
        stop: whether a document that can't be used is an error.

    Raises:
        ShardError: the first such document, with `stop`; or the file changed.
        StorageError: the file can't be fetched, or the folder is full.
    """
    tokens_path, documents_path, record_path = part_paths(folder, unit.index)
    dtype = token_dtype(encoder.vocab_size)
    eot = np.array([encoder.eot_id], dtype)
    skipped: dict[str, int] = {}
    shown: list[str] = []
    n_documents = n_tokens = 0
    with new_file(tokens_path) as tokens_file, new_file(documents_path) as documents_file:
        tokens, documents = CheckedWriter(tokens_file), CheckedWriter(documents_file)
        for batch in _batches(read_unit(unit, reading), stop, skipped, shown):
            encoded = _encode(encoder, batch)
            lengths = [sum(map(len, pieces)) + 1 for pieces in encoded]
            tokens.write(np.concatenate([x for pieces in encoded for x in (*pieces, eot)]).astype(dtype).tobytes())
            rows = np.zeros(len(batch), DOCUMENT)
            rows["tokens"], rows["bytes"] = lengths, [len(document.data) for document in batch]
            rows["digest"] = np.frombuffer(b"".join(digest(document.data) for document in batch), "<u8").reshape(-1, 2)
            documents.write(rows.tobytes())
            n_documents, n_tokens = n_documents + len(batch), n_tokens + sum(lengths)
            if on_progress:
                on_progress(int(rows["bytes"].sum()), sum(lengths))
    part = Part(unit.index, n_documents, n_tokens, tokens.crc32c, documents.crc32c, skipped, shown)
    with new_file(record_path) as file:
        file.write(json.dumps(asdict(part)).encode())
    return part


def _batches(
    found: Iterator[Document | Rejected], stop: bool, skipped: dict[str, int], shown: list[str]
) -> Iterator[list[Document]]:
    """Documents to encode in one call; what is rejected is counted, or raised."""
    batch: list[Document] = []
    n_chars = 0
    for one in found:
        if isinstance(one, Rejected):
            if stop and one.reason != EMPTY:
                raise one.error()
            skipped[one.reason] = skipped.get(one.reason, 0) + 1
            if one.reason != EMPTY and len(shown) < SHOWN_REJECTED:
                shown.append(f"{one.reason}: {one.where}: {one.found}")
            continue
        batch.append(one)
        n_chars += len(one.text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _encode(encoder: Encoder, batch: list[Document]) -> list[list[np.ndarray]]:
    """The ids of each document, in pieces."""
    if len(batch[-1].text) > MAX_PIECE_CHARS:  # it alone can be so long: it closed the batch
        before = encoder.encode([document.text for document in batch[:-1]])
        return [*([ids] for ids in before), encode_whole(encoder, batch[-1].text)]
    return [[ids] for ids in encoder.encode([document.text for document in batch])]


def find_part(folder: Path, unit: int) -> Part | None:
    """The committed part of a unit, or None where there is none, or a damaged one."""
    tokens, documents, record = part_paths(folder, unit)
    try:
        part = Part(**json.loads(record.read_bytes()))
        if (crc32c_of_file(tokens), crc32c_of_file(documents)) == (part.tokens_crc32c, part.documents_crc32c):
            return part
    except (OSError, ValueError, TypeError):
        pass  # it is made again
    return None


def read_part(part: Part, folder: Path, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, the DOCUMENTs they make) piece by piece, whole documents: memory is bounded by a piece. Raises OSError."""
    tokens, documents, _ = part.paths(folder)
    rows = np.fromfile(documents, DOCUMENT)
    ends = np.cumsum(rows["tokens"], dtype=np.int64)
    begin, done = 0, 0
    with tokens.open("rb") as file:
        while begin < len(rows):
            end = max(begin + 1, int(np.searchsorted(ends, done + READ_TOKENS)))
            ids = np.fromfile(file, dtype, int(ends[end - 1]) - done)
            yield ids, rows[begin:end]
            begin, done = end, int(ends[end - 1])


def remove_part(folder: Path, unit: int) -> None:
    """Remove a part, its record first."""
    for path in reversed(part_paths(folder, unit)):
        with suppress(FileNotFoundError):
            path.unlink()
