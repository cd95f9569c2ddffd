"""Every checkpoint of every run, on this machine and in the bucket, as people and tools look for them.

    catalog = Catalog(Path("checkpoints"), open_store("gs://bucket/Checkpoints", config.storage))
    for entry in catalog.entries():
        print(entry.label, entry.where, catalog.problems(entry))

What is committed is told by the same manifests that a resume goes by; here the rest is shown too.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint import CheckpointReader, damaged_files, read_manifest
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName, Manifest
from pretrain.discovery import damaged_objects, object_prefix
from pretrain.errors import CheckpointError, ConfigError, StorageError
from pretrain.files import crc32c_of_bytes
from pretrain.storage import ObjectMissing, ObjectStore
from pretrain.uploads import list_commits

LATEST = "latest"
NOT_COMMITTED = "not committed"
METADATA_FILE = "metadata.json"


@dataclass(frozen=True)
class Copy:
    """A checkpoint in one place.

    Args:
        manifest: its commit; None where it is none.
        bytes: of its files.
        problem: why there is no manifest.
    """

    manifest: Manifest | None
    bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Entry:
    """One checkpoint of one run: its copy here, its copy in the bucket, or both."""

    run: str
    name: CheckpointName
    local: Copy | None = None
    bucket: Copy | None = None

    @property
    def label(self) -> str:
        """RUN/NAME, which `Catalog.find` takes."""
        return f"{self.run}/{self.name}"

    @property
    def manifest(self) -> Manifest | None:
        """The commit; of two different ones the later, of one in both places the local copy's."""
        manifests = [copy.manifest for copy in (self.local, self.bucket) if copy and copy.manifest]
        return max(manifests, key=lambda manifest: manifest.sequence, default=None)

    @property
    def is_local(self) -> bool:
        """Whether `manifest` is committed here."""
        return bool(self.local and self.local.manifest and self.local.manifest == self.manifest)

    @property
    def is_in_bucket(self) -> bool:
        """Whether `manifest` is committed in the bucket."""
        return bool(self.bucket and self.bucket.manifest and self.bucket.manifest == self.manifest)

    @property
    def bytes(self) -> int:
        """Of all files of one copy."""
        return max(copy.bytes for copy in (self.local, self.bucket) if copy)

    @property
    def where(self) -> str:
        """local, bucket or both; "both, differ" where the two are different commits of one step."""
        if not self.local:
            return "bucket"
        if not self.bucket:
            return "local"
        differ = self.local.manifest and self.bucket.manifest and self.local.manifest != self.bucket.manifest
        return "both, differ" if differ else "both"


class Catalog:
    """The checkpoints below a folder and below a bucket's prefix.

    Args:
        folder: the checkpoints of all runs on this machine, one subfolder a run.
        store: root of all checkpoints in the bucket; None: the bucket is not looked at.
    """

    def __init__(self, folder: Path, store: ObjectStore | None) -> None:
        self.folder = folder
        self.store = store

    def runs(self) -> list[str]:
        """Names of the runs that have something called a checkpoint. Raises StorageError."""
        found = {path.parent.name for path in self.folder.glob("*/checkpoint-*") if CheckpointName.parse(path.name)}
        for info in self.store.list() if self.store else []:
            parts = info.name.split("/")
            if len(parts) > 2 and CheckpointName.parse(parts[1]):
                found.add(parts[0])
        return sorted(found)

    def entries(self, run: str = "") -> list[Entry]:
        """Every checkpoint of one run, or of all; in each run what is not committed first, then in order of commits.

        Raises:
            StorageError: the bucket can't be listed.
        """
        return [entry for name in ([run] if run else self.runs()) for entry in self._entries_of(name)]

    def _entries_of(self, run: str) -> list[Entry]:
        local, bucket = self._local_copies(run), self._bucket_copies(run)
        names = sorted(set(local) | set(bucket), key=lambda name: (name.step, name.epoch, name.files))
        entries = [Entry(run, name, local.get(name), bucket.get(name)) for name in names]
        return sorted(entries, key=lambda entry: entry.manifest.sequence if entry.manifest else 0)

    def _local_copies(self, run: str) -> dict[CheckpointName, Copy]:
        copies = {}
        for folder in (self.folder / run).glob("checkpoint-*"):
            name = CheckpointName.parse(folder.name)
            if name is None:
                continue
            try:
                manifest = read_manifest(folder)
                copies[name] = Copy(manifest, manifest.total_bytes)
            except CheckpointError as error:
                torn = (folder / MANIFEST_FILE).exists()
                size = folder_bytes(folder)
                if folder.exists():  # else it was pruned since it was listed
                    copies[name] = Copy(None, size, error.what if torn else NOT_COMMITTED)
        return copies

    def _bucket_copies(self, run: str) -> dict[CheckpointName, Copy]:
        if self.store is None:
            return {}
        sizes: dict[CheckpointName, int] = {}
        for info in self.store.list(f"{run}/"):
            name = CheckpointName.parse(info.name.split("/")[1])
            if name is not None:
                sizes[name] = sizes.get(name, 0) + info.size
        copies = {name: Copy(None, size, NOT_COMMITTED) for name, size in sizes.items()}
        for name, commit in list_commits(self.store, run).items():
            size = commit.manifest.total_bytes if commit.manifest else sizes.get(name, 0)
            copies[name] = Copy(commit.manifest, size, commit.problem)
        return copies

    def find(self, wanted: str, run: str = "") -> Entry:
        """The committed checkpoint that `wanted` spells: NAME, RUN/NAME, latest or RUN/latest.

        Raises:
            ConfigError: several runs have it, and none is named.
            CheckpointError: there is none.
            StorageError: the bucket can't be listed.
        """
        prefix, slash, name = wanted.rpartition("/")
        runs = [prefix] if slash else [run] if run else self.runs()
        found = {each: entry for each in runs if (entry := self._find_in(each, name))}
        if not found:
            elsewhere = f"or {self.store.url}" if self.store else "(and no bucket was named: --url)"
            of_run = f" of run {run}" if run and not slash else ""
            raise CheckpointError(
                f"there is no checkpoint {wanted}{of_run} in {self.folder} {elsewhere}",
                "See what there is: python scripts/checkpoint_viewer.py list",
            )
        if len(found) > 1:
            raise ConfigError(f"{wanted} is in several runs: {', '.join(found)}", "Name one: --run NAME, or RUN/NAME.")
        return next(iter(found.values()))

    def _find_in(self, run: str, name: str) -> Entry | None:
        committed = [entry for entry in self._entries_of(run) if entry.manifest]
        return next((entry for entry in reversed(committed) if name in (LATEST, str(entry.name))), None)

    def folder_of(self, entry: Entry) -> Path:
        """Where its local copy is, or would be."""
        return self.folder / entry.run / str(entry.name)

    def problems(self, entry: Entry) -> dict[str, list[str]]:
        """What is wrong with each committed copy, by place ("local", "bucket"); an empty list where it is whole, and
        no place where it was pruned meanwhile.

        Local files are read and their checksums compared; of objects the bucket's own checksums are compared.

        Raises:
            StorageError: the bucket can't be listed.
        """
        found: dict[str, list[str]] = {}
        for place, copy in (("local", entry.local), ("bucket", entry.bucket)):
            if copy and copy.manifest is None and copy.problem != NOT_COMMITTED:
                found[place] = [copy.problem]
            elif copy and copy.manifest and place == "local":
                found[place] = damaged_files(copy.manifest, self.folder_of(entry))
            elif copy and copy.manifest and self.store:
                found[place] = damaged_objects(copy.manifest, self.store, entry.run)
        return {place: problems for place, problems in found.items() if not (problems and self._is_gone(entry, place))}

    def _is_gone(self, entry: Entry, place: str) -> bool:
        """Whether a commit was pruned since it was listed."""
        if place == "local":
            return not (self.folder_of(entry) / MANIFEST_FILE).exists()
        return self.store is not None and self.store.stat(f"{entry.run}/{entry.name}/{MANIFEST_FILE}") is None

    def text(self, entry: Entry, file: str) -> str:
        """A small text file of a committed checkpoint, compared with its manifest; where it is damaged here, from the
        bucket.

        Raises:
            CheckpointError: it is missing or damaged.
            StorageError: the bucket can't be read.
        """
        manifest = entry.manifest
        if manifest is None or file not in manifest.files:
            raise CheckpointError(f"{entry.label} has no {file}")
        places = [(entry.is_local, self._local_bytes), (entry.is_in_bucket, self._bucket_bytes)]
        for is_there, read in places:
            data = read(entry, manifest, file) if is_there else None
            if data is not None and crc32c_of_bytes(data) == manifest.files[file].crc32c:
                return data.decode(errors="replace")
        raise CheckpointError(f"{entry.label}: {file} is missing or differs from the manifest's crc32c")

    def _local_bytes(self, entry: Entry, _manifest: Manifest, file: str) -> bytes | None:
        try:
            return (self.folder_of(entry) / file).read_bytes()
        except OSError:  # missing or unreadable: the bucket may have it, and `problems` says what it is
            return None

    def _bucket_bytes(self, entry: Entry, manifest: Manifest, file: str) -> bytes | None:
        assert self.store is not None
        try:
            return self.store.read_bytes(f"{object_prefix(manifest, entry.run)}/{file}")
        except ObjectMissing:
            return None

    def document(self, entry: Entry, file: str) -> dict[str, Any]:
        """A JSON document of a committed checkpoint; raises as `text`."""
        try:
            tree = json.loads(self.text(entry, file))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{entry.label}: {file} is no JSON: {error}") from error
        if not isinstance(tree, dict):
            raise CheckpointError(f"{entry.label}: {file} must hold an object, found {type(tree).__name__}")
        return tree

    def reader(self, entry: Entry) -> CheckpointReader | None:
        """Its tensors, where every file of it is here and whole; None where it is in the bucket only.

        Raises:
            CheckpointError: the local copy is damaged.
        """
        if not entry.is_local or entry.manifest is None:
            return None
        if problems := damaged_files(entry.manifest, self.folder_of(entry)):
            raise CheckpointError(f"{entry.label} is damaged here: {'; '.join(problems[:3])}")
        return CheckpointReader(self.folder_of(entry), entry.manifest)

    def describe(self, entry: Entry, *, verify: bool) -> dict[str, Any]:
        """What a table says of a checkpoint: plain values, None where unknown.

        Args:
            verify: read and compare every file; else `verified` is None.

        Raises:
            StorageError: the bucket can't be read.
        """
        metadata: dict[str, Any] = {}
        problems: dict[str, list[str]] = {}
        if entry.manifest:
            try:
                metadata = self.document(entry, METADATA_FILE)
            except CheckpointError as error:
                problems["metadata"] = [error.what]
        if verify:
            problems = self.problems(entry)
        progress = metadata.get("training_progress")
        return {
            "run": entry.run,
            "name": str(entry.name),
            "step": entry.name.step,
            "loss": metadata.get("current_loss"),
            "tokens": progress.get("tokens") if isinstance(progress, dict) else None,
            "files": entry.name.files,
            "bytes": entry.bytes,
            "committed": entry.manifest is not None,
            "verified": not any(problems.values()) if verify and problems else None,
            "problems": [f"{place}: {problem}" for place, found in problems.items() for problem in found],
            "where": entry.where,
            "timestamp": metadata.get("timestamp"),
        }


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder.

    Raises:
        StorageError: it can't be read.
    """
    return sum(status.st_size for _, status in files_below(folder))


def files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file in a folder; what a trainer removes meanwhile is left out.

    Raises:
        StorageError: it can't be read.
    """

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    try:
        for parent, _, names in os.walk(folder, onerror=unless_gone):
            for path in (Path(parent, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}", f"Look at it: ls -ld {folder}") from error
