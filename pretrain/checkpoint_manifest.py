"""What a checkpoint is called and the manifest that makes it one: bytes and crc32c of every file, written last."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1
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
class Manifest:
    """The commit of a checkpoint.

    Args:
        name: of the checkpoint.
        attempt: id of the process that wrote it; its objects in the bucket lie under it.
        sequence: number of this commit in its run. The newest checkpoint is the one with the highest sequence, which
            after a resume from an older one need not be the one with the highest step.
        files: every file but the manifest.
    """

    name: CheckpointName
    attempt: str
    sequence: int
    files: dict[str, FileEntry]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """As it is written to manifest.json."""
        tree = {
            "format": MANIFEST_FORMAT,
            "name": str(self.name),
            "attempt": self.attempt,
            "sequence": self.sequence,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
        }
        return (json.dumps(tree, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """The manifest that `data` holds.

        Raises:
            CheckpointError: naming `where`, if it is torn, of another format, or names a file outside its folder.
        """
        try:
            tree = json.loads(data)
            if tree["format"] != MANIFEST_FORMAT:
                raise ValueError(f"format {tree['format']}, this version reads format {MANIFEST_FORMAT}")
            files = {_file_name(name): _entry(entry) for name, entry in tree["files"].items()}
            name = CheckpointName.parse(tree["name"])
            if name is None:
                raise ValueError(f"name {tree['name']!r}")
            return cls(name, _file_name(tree["attempt"]), int(tree["sequence"]), files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where} is not a checkpoint manifest: {type(error).__name__}: {error}") from error


def _file_name(name: Any) -> str:
    """A plain file name: what a manifest names must not reach outside the checkpoint's folder."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file name {name!r}")
    return name


def _entry(tree: Any) -> FileEntry:
    return FileEntry(int(tree["bytes"]), str(tree["crc32c"]))
