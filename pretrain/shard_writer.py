"""Cuts the parts of all units, in their order, into shards: the one place where order matters, so the one process.

Documents are whole in a shard: one is closed with the document that fills it. What is decided goes into a journal; a
process that was killed goes on from there, and writes again what it had written since, byte for byte the same. A part
may be removed when the journal is past it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from pretrain.errors import StorageError
from pretrain.files import crc32c_of_file, new_file
from pretrain.manifest import ShardEntry
from pretrain.parts import DOCUMENT, Part, is_validation, read_part
from pretrain.shard_files import count_windows, write_stream, write_windows
from pretrain.storage import ObjectExists, ObjectStore

JOURNAL_NAME = "journal.json"
SEEN_NAME = "seen.digests"
JOURNAL_EVERY_S = 1.0
SPLITS = ("shards", "val")  # folders of the output, as scripts/make_demo_data.py names them
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Cutting:
    """What decides how documents become shards."""

    vocab_size: int
    eot_id: int
    shard_tokens: int
    """A shard is closed with the document that reaches so many; in the padded dialect, padding counts."""
    val_fraction: float = 0.0
    dedup: bool = False
    max_length: int = 0
    """Tokens of a window of the padded dialect; 0: our dialect."""
    overlap: int = 0
    """Tokens that a window shares with the one before."""


@dataclass
class _Open:
    """The shard of a split that is being filled, and those that are closed."""

    split: str
    tokens: int = 0
    documents: int = 0
    weight: int = 0
    text_bytes: int = 0
    total_documents: int = 0
    total_text_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)


def closed_shards(folder: Path, split: str) -> tuple[ShardEntry, ...]:
    """The closed shards of a split, in their order, as the journal in the `folder` of a ShardWriter names them; also of
    another process. None where there is no journal.

    Raises:
        StorageError: it can't be read.
    """
    path = folder / JOURNAL_NAME
    try:
        tree = json.loads(path.read_bytes())
        return tuple(ShardEntry(**entry) for entry in tree["open"][split]["shards"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} can't be read: {error}", f"Delete {folder.parent}") from error


class ShardWriter:
    """Writes the shards of one output. `next_unit` is the first unit that it has not taken.

    Args:
        folder: where the journal and the shards that are being filled lie, on this machine.
        store: where closed shards go, below SPLITS.
        dtype: of the ids in parts and in our dialect.

    Raises:
        StorageError: the journal can't be read.
    """

    def __init__(self, folder: Path, store: ObjectStore, cutting: Cutting, dtype: np.dtype) -> None:
        self._folder, self._store, self._cutting, self._dtype = folder, store, cutting, dtype
        self.next_unit = 0
        self.documents_in = 0
        self.skipped: dict[str, int] = {}
        self.shown: list[str] = []
        self._open = {split: _Open(split) for split in SPLITS}
        self._files: dict[Path, IO[bytes]] = {}
        self._counts = np.zeros((len(SPLITS), cutting.vocab_size), np.int64)
        self._seen: set[bytes] = set()
        self._journal_s = time.monotonic()
        self._has_closed = False  # a shard that the journal does not name yet
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    # ---- taking parts ----

    def take(self, part: Part, parts: Path) -> bool:
        """Add the documents of the next unit; whether the journal is past it now.

        Raises:
            StorageError: the store refuses a shard, or the disk is full.
        """
        n_repeated = 0
        for tokens, rows in read_part(part, parts, self._dtype):
            where = np.where(is_validation(rows["digest"], self._cutting.val_fraction), 1, 0)
            if self._cutting.dedup:
                where[self._repeated(rows["digest"])] = -1
            n_repeated += int((where < 0).sum())
            ends = np.concatenate([[0], np.cumsum(rows["tokens"], dtype=np.int64)])
            cuts = np.flatnonzero(np.diff(where)) + 1
            for first, last in zip([0, *cuts], [*cuts, len(rows)], strict=True):
                if where[first] >= 0:
                    self._append(SPLITS[where[first]], tokens[ends[first] : ends[last]], rows[first:last])
        counts = {**part.skipped, **({DUPLICATE: n_repeated} if n_repeated else {})}
        self.documents_in += part.documents + sum(part.skipped.values())
        for reason, n in counts.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + n
        self.shown = [*self.shown, *part.shown][:100]
        self.next_unit = part.unit + 1
        if self._has_closed or time.monotonic() - self._journal_s >= JOURNAL_EVERY_S:
            self._write_journal()
            return True
        return False

    def _repeated(self, digests: np.ndarray) -> list[int]:
        """Indices of documents that were there before; the others are remembered."""
        repeated = []
        new = bytearray()
        data = digests.tobytes()
        for index in range(len(digests)):
            one = data[16 * index : 16 * index + 16]
            if one in self._seen:
                repeated.append(index)
            else:
                self._seen.add(one)
                new += one
        self._file(self._folder / SEEN_NAME).write(new)
        return repeated

    def _append(self, split: str, tokens: np.ndarray, rows: np.ndarray) -> None:
        """Documents of one split, closing every shard that they fill."""
        shard = self._open[split]
        while len(rows):
            weights = self._weights(rows["tokens"])
            filled = int(np.searchsorted(np.cumsum(weights), self._cutting.shard_tokens - shard.weight)) + 1
            taken, rows = rows[:filled], rows[filled:]
            n_tokens = int(taken["tokens"].sum(dtype=np.int64))
            piece, tokens = tokens[:n_tokens], tokens[n_tokens:]
            tokens_path, rows_path = self._paths(shard)
            self._file(tokens_path).write(piece.data)
            self._file(rows_path).write(taken.tobytes())
            self._counts[SPLITS.index(split)] += np.bincount(piece, minlength=self._cutting.vocab_size)
            shard.tokens += n_tokens
            shard.documents += len(taken)
            shard.weight += int(weights[:filled].sum())
            shard.text_bytes += int(taken["bytes"].sum(dtype=np.int64))
            if shard.weight >= self._cutting.shard_tokens:
                self._close(shard)

    def _weights(self, lengths: np.ndarray) -> np.ndarray:
        """int64 (n,): what each document takes of a shard."""
        if not self._cutting.max_length:
            return lengths.astype(np.int64)
        return count_windows(lengths, self._cutting.max_length, self._cutting.overlap) * self._cutting.max_length

    # ---- closing shards ----

    def finish(self) -> None:
        """Close what is open; all parts have been taken. Raises StorageError as `take`."""
        for shard in self._open.values():
            if shard.documents:
                self._close(shard)
        self._write_journal()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _close(self, shard: _Open) -> None:
        """Write the shard that is full, and begin another."""
        tokens_path, rows_path = self._paths(shard)
        for path in (tokens_path, rows_path):
            self._file(path).flush()
        tokens = np.memmap(tokens_path, self._dtype, "r", shape=(shard.tokens,))
        lengths = np.fromfile(rows_path, DOCUMENT, shard.documents)["tokens"]
        name = f"tokenized_cleaned_{len(shard.shards):05d}.npz"
        path = self._folder / name
        cutting = self._cutting
        if cutting.max_length:
            settings = {"max_length": cutting.max_length, "overlap": cutting.overlap, "pad_id": cutting.eot_id}
            n_documents, n_tokens = write_windows(path, tokens, lengths, **settings)
        else:
            write_stream(path, tokens, lengths)
            n_documents, n_tokens = shard.documents, shard.tokens
        entry = ShardEntry(name, n_tokens, n_documents, path.stat().st_size, crc32c_of_file(path))
        self._send(path, f"{shard.split}/{name}")
        path.unlink()
        for used in (tokens_path, rows_path):  # their names stay until the journal is past them
            self._files.pop(used).close()
        shard.shards.append(asdict(entry))
        shard.total_documents += shard.documents
        shard.total_text_bytes += shard.text_bytes
        shard.tokens = shard.documents = shard.weight = shard.text_bytes = 0
        self._has_closed = True

    def _send(self, path: Path, name: str) -> None:
        try:
            self._store.upload(path, name)
        except ObjectExists as error:
            raise StorageError(
                f"{self._store.url}/{name} is there with another content", "Give an empty --output_dir"
            ) from error

    def entries(self, split: str) -> tuple[ShardEntry, ...]:
        """The closed shards of a split, in their order."""
        return tuple(ShardEntry(**entry) for entry in self._open[split].shards)

    def written(self, split: str) -> dict[str, int]:
        """Documents, and bytes of their text, in the closed shards of a split."""
        shard = self._open[split]
        return {"documents": shard.total_documents, "text_bytes": shard.total_text_bytes}

    def token_counts(self, split: str) -> np.ndarray:
        """int64 (vocab_size,): how often each id was written; overlaps count once."""
        counts: np.ndarray = self._counts[SPLITS.index(split)]
        return counts

    # ---- the journal ----

    def _write_journal(self) -> None:
        """Put on disk what was taken, then the word that it was; then what it outdates may go."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        with new_file(self._counts_path(self.next_unit)) as counts:
            np.save(counts, self._counts, allow_pickle=False)
        tree = {
            "next_unit": self.next_unit,
            "documents_in": self.documents_in,
            "skipped": self.skipped,
            "shown": self.shown,
            "seen": len(self._seen),
            "open": {split: asdict(shard) for split, shard in self._open.items()},
        }
        with new_file(self._folder / JOURNAL_NAME) as file:
            file.write(json.dumps(tree).encode())
        self._remove_outdated()
        self._journal_s, self._has_closed = time.monotonic(), False

    def _remove_outdated(self) -> None:
        """Remove all that the journal does not name: what is appended to must not be there from before a kill."""
        kept = {*(path for shard in self._open.values() for path in self._paths(shard)), self._folder / SEEN_NAME}
        kept |= {self._folder / JOURNAL_NAME, self._counts_path(self.next_unit)}
        for path in set(self._folder.iterdir()) - kept:
            path.unlink()

    def _resume(self) -> None:
        path = self._folder / JOURNAL_NAME
        if not path.exists():
            for left in self._folder.iterdir():
                left.unlink()
            return
        try:
            tree = json.loads(path.read_bytes())
            self.next_unit = int(tree["next_unit"])
            self.documents_in, self.skipped, self.shown = tree["documents_in"], tree["skipped"], tree["shown"]
            self._open = {split: _Open(**tree["open"][split]) for split in SPLITS}
            self._counts = np.load(self._counts_path(self.next_unit), allow_pickle=False)
            for shard in self._open.values():
                tokens_path, rows_path = self._paths(shard)
                self._cut(tokens_path, shard.tokens * self._dtype.itemsize)
                self._cut(rows_path, shard.documents * DOCUMENT.itemsize)
            self._cut(self._folder / SEEN_NAME, 16 * tree["seen"])
            if tree["seen"]:
                data = (self._folder / SEEN_NAME).read_bytes()
                self._seen = {data[begin : begin + 16] for begin in range(0, len(data), 16)}
            self._remove_outdated()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} can't be continued: {error}", f"Delete {self._folder.parent}") from error

    def _cut(self, path: Path, n_bytes: int) -> None:
        """Drop what was appended after the journal was written."""
        size = path.stat().st_size if path.exists() else 0
        if size < n_bytes:
            raise ValueError(f"{path.name} has {size} bytes, the journal says {n_bytes}")
        if size > n_bytes:
            os.truncate(path, n_bytes)

    def _file(self, path: Path) -> IO[bytes]:
        if path not in self._files:
            self._files[path] = path.open("ab")
        return self._files[path]

    def _paths(self, shard: _Open) -> tuple[Path, Path]:
        stem = self._folder / f"{shard.split}-{len(shard.shards):05d}"
        return stem.with_suffix(".tokens"), stem.with_suffix(".documents")

    def _counts_path(self, unit: int) -> Path:
        return self._folder / f"counts-{unit}.npy"
