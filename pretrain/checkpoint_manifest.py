"""What a checkpoint is called and the manifest that makes it one: bytes and crc32c of every file, written last."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT, ARCHIVES_FORMAT = 1, 2  # the second where the bucket holds archives, which older versions can't read
TENSORS_SUFFIX = ".safetensors"
_NAME = re.compile(r"checkpoint-epoch(\d+)-step(\d+)-files(\d+)")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class CheckpointName:
    """checkpoint-epoch{E}-step{S}-files{F}, also the name of its folder."""

    epoch: int
    step: int
    files: int

    def __str__(self) -> str:
        return f"checkpoint-epoch{self.epoch}-step{self.step}-files{self.files}"

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """The name that `text` spells, or None."""
        match = _NAME.fullmatch(text)
        return cls(*map(int, match.groups())) if match else None


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and checksum (base64, as GCS writes it) of one file of a checkpoint."""

    bytes: int
    crc32c: str


@dataclass(frozen=True)
class ArchiveEntry:
    """Size in bytes and checksum of one archive in the bucket, and the names of the files in it."""

    bytes: int
    crc32c: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The commit of a checkpoint.

    Args:
        name: of the checkpoint.
        attempt: id of the process that wrote it; its objects in the bucket lie under it.
        sequence: number of this commit in its run. The newest checkpoint is the one with the highest sequence, which
            after a resume from an older one need not be the one with the highest step.
        files: every file but the manifest.
        archives: how the files are packed in the bucket, in its manifest alone; it makes no other commit of this one.
    """

    name: CheckpointName
    attempt: str
    sequence: int
    files: dict[str, FileEntry]
    archives: dict[str, ArchiveEntry] = field(default_factory=dict, compare=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def packed(self) -> set[str]:
        """The files that are in an archive."""
        return {name for archive in self.archives.values() for name in archive.files}

    @property
    def objects(self) -> dict[str, FileEntry]:
        """What this commit consists of in the bucket, by name below its attempt.

        The small documents are there as plain files even where an archive holds them, too: tools read them.
        """
        archives = {name: FileEntry(archive.bytes, archive.crc32c) for name, archive in self.archives.items()}
        packed = {name for name in self.packed if name.endswith(TENSORS_SUFFIX)}
        return archives | {name: entry for name, entry in self.files.items() if name not in packed}

    def to_bytes(self) -> bytes:
        """As it is written to manifest.json."""
        tree: dict[str, Any] = {
            "format": ARCHIVES_FORMAT if self.archives else MANIFEST_FORMAT,
            "name": str(self.name),
            "attempt": self.attempt,
            "sequence": self.sequence,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
        }
        if self.archives:
            tree["archives"] = {name: asdict(entry) for name, entry in sorted(self.archives.items())}
        return (json.dumps(tree, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """The manifest that `data` holds.

        Raises:
            CheckpointError: naming `where`, if it is torn, of another format, or names a file outside its folder.
        """
        try:
            tree = json.loads(data)
            if tree["format"] not in (MANIFEST_FORMAT, ARCHIVES_FORMAT):
                raise ValueError(f"format {tree['format']}, this version reads formats up to {ARCHIVES_FORMAT}")
            files = {_file_name(name): _entry(entry) for name, entry in tree["files"].items()}
            name = CheckpointName.parse(tree["name"])
            if name is None:
                raise ValueError(f"name {tree['name']!r}")
            archives = {_file_name(each): _archive(entry, files) for each, entry in tree.get("archives", {}).items()}
            return cls(name, _file_name(tree["attempt"]), int(tree["sequence"]), files, archives)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where} is not a checkpoint manifest: {type(error).__name__}: {error}") from error


def _file_name(name: Any) -> str:
    """A plain file name: what a manifest names must not reach outside the checkpoint's folder."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file name {name!r}")
    return name


def _entry(tree: Any) -> FileEntry:
    if (size := int(tree["bytes"])) < 0:  # who reads so many bytes would read all there are
        raise ValueError(f"{size} bytes")
    return FileEntry(size, str(tree["crc32c"]))


def _archive(tree: Any, files: Mapping[str, FileEntry]) -> ArchiveEntry:
    entry, inside = _entry(tree), tuple(tree["files"])
    if unknown := set(inside) - set(files):
        raise ValueError(f"an archive of files that are not listed: {sorted(unknown)}")
    return ArchiveEntry(entry.bytes, entry.crc32c, inside)
