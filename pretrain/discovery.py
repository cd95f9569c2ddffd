"""Which checkpoint to resume from: the newest that verifies, here or in the bucket, and why others were passed over."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain import log
from pretrain.archive import unpack
from pretrain.checkpoint import damaged_files, empty_folder, read_manifest, write_manifest
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName, Manifest
from pretrain.errors import CheckpointError
from pretrain.files import PART_SUFFIX
from pretrain.storage import ObjectStore
from pretrain.uploads import BucketManifest, list_commits

logger = log.get(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class Inventory:
    """Every commit of a run, on this machine and in the bucket.

    Args:
        local: manifests of the local folder.
        bucket: commits in the bucket, damaged ones too.
        damaged: what is called a checkpoint and is none, with the reason.
    """

    local: dict[CheckpointName, Manifest]
    bucket: dict[CheckpointName, BucketManifest]
    damaged: dict[CheckpointName, str]

    @property
    def last_sequence(self) -> int:
        """The highest sequence number in use; 0 where there is no commit."""
        manifests = [*self.local.values(), *(commit.manifest for commit in self.bucket.values() if commit.manifest)]
        return max((manifest.sequence for manifest in manifests), default=0)

    @property
    def is_empty(self) -> bool:
        """Whether this run has never committed anything, as far as can be seen."""
        return not (self.local or self.bucket or self.damaged)

    def with_bucket(self, bucket: dict[CheckpointName, BucketManifest]) -> Inventory:
        """The same local commits, beside these of the bucket."""
        broken = {name: commit.problem for name, commit in bucket.items() if not commit.manifest}
        return Inventory(self.local, bucket, self.damaged | broken)

    def not_in_bucket(self) -> list[Manifest]:
        """The local commits that the bucket lacks and has no later commit of the same step of; oldest first."""

        def is_there(manifest: Manifest) -> bool:
            commit = self.bucket.get(manifest.name)
            return bool(commit and commit.manifest and commit.manifest.sequence >= manifest.sequence)

        missing = [manifest for manifest in self.local.values() if not is_there(manifest)]
        return sorted(missing, key=lambda manifest: manifest.sequence)

    def without(self, names: Collection[CheckpointName]) -> Inventory:
        """Without the local commits of these names."""
        return replace(self, local={name: manifest for name, manifest in self.local.items() if name not in names})

    def without_parts(self, folder: Path) -> Inventory:
        """Without the local copies that other nodes wrote a part of, where the bucket has the whole.

        Args:
            folder: local folder of the run.
        """

        def is_part(manifest: Manifest) -> bool:
            commit = self.bucket.get(manifest.name)
            in_bucket = commit is not None and commit.manifest == manifest
            return in_bucket and any(not (folder / str(manifest.name) / file).is_file() for file in manifest.files)

        return self.without([name for name, manifest in self.local.items() if is_part(manifest)])

    def newest_first(self) -> Iterator[tuple[Manifest, bool]]:
        """(manifest, whether it is the local one) of every readable commit; of one commit the local copy first."""
        local = [(manifest, True) for manifest in self.local.values()]
        bucket = [(commit.manifest, False) for commit in self.bucket.values() if commit.manifest]
        yield from sorted(local + bucket, key=lambda item: (item[0].sequence, item[1]), reverse=True)


def take_inventory(folder: Path, store: ObjectStore | None, run_name: str) -> Inventory:
    """List the commits of a run.

    Raises:
        StorageError: the bucket can't be listed.
    """
    local: dict[CheckpointName, Manifest] = {}
    damaged: dict[CheckpointName, str] = {}
    for path in sorted(folder.glob(f"checkpoint-*/{MANIFEST_FILE}")):
        name = CheckpointName.parse(path.parent.name)
        if name is None:
            continue
        try:
            local[name] = read_manifest(path.parent)
        except CheckpointError as error:
            if path.exists():  # else it was pruned since it was listed
                damaged[name] = error.what
    return Inventory(local, {}, damaged).with_bucket(list_commits(store, run_name) if store else {})


def choose(
    inventory: Inventory, resume: str, folder: Path, store: ObjectStore | None, run_name: str
) -> Manifest | None:
    """The newest checkpoint that verifies, made complete in the local folder; None where there never was one.

    Args:
        resume: "auto", or a checkpoint's name.
        folder: local folder of the run.

    Raises:
        CheckpointError: the named one is missing or damaged, or there are commits and none verifies.
    """
    passed_over = [f"{name}: {problem}" for name, problem in inventory.damaged.items() if resume in (AUTO, str(name))]
    for manifest, is_local in inventory.newest_first():
        if resume not in (AUTO, str(manifest.name)):
            continue
        where = "local" if is_local else "bucket"
        checkpoint = folder / str(manifest.name)
        problems = damaged_files(manifest, checkpoint) if is_local else fetch(manifest, checkpoint, store, run_name)
        if not problems:
            return manifest
        passed_over.append(f"{manifest.name} ({where}): {'; '.join(problems[:3])}")
        logger.warning("passed over %s", passed_over[-1])
    if resume != AUTO:
        raise _not_found(resume, inventory, passed_over)
    if passed_over:
        raise CheckpointError(
            f"no checkpoint of run {run_name} verifies: {' | '.join(passed_over)}",
            "Mend or remove them to start afresh, or give the run another name with --run.",
        )
    return None


def fetch(manifest: Manifest, folder: Path, store: ObjectStore | None, run_name: str) -> list[str]:
    """Download a checkpoint from the bucket and commit it locally; what is wrong with it there, if anything.

    Raises:
        StorageError: the bucket can't be read. That is no reason to fall back on an older checkpoint.
    """
    if store is None:
        return ["it is not complete here and there is no bucket"]
    if problems := damaged_objects(manifest, store, run_name):
        return problems
    logger.info("fetching %s from %s (%.1f MB)", manifest.name, store.url, manifest.total_bytes / 1e6)
    empty_folder(folder)
    try:
        for name in (name for name in manifest.files if name not in manifest.packed):
            store.download(f"{object_prefix(manifest, run_name)}/{name}", folder / name)
        for name in manifest.archives:
            _fetch_archive(name, manifest, folder, store, run_name)
    except CheckpointError as error:
        return [error.what]
    if not (problems := damaged_files(manifest, folder)):
        write_manifest(replace(manifest, archives={}), folder)
    return problems


def _fetch_archive(name: str, manifest: Manifest, folder: Path, store: ObjectStore, run_name: str) -> None:
    """Download an archive beside the folder, and unpack it there. Raises CheckpointError where it is damaged."""
    path = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{PART_SUFFIX}")
    try:
        store.download(f"{object_prefix(manifest, run_name)}/{name}", path)
        unpack(path, name, {file: manifest.files[file] for file in manifest.archives[name].files}, folder)
    finally:
        path.unlink(missing_ok=True)


def damaged_objects(manifest: Manifest, store: ObjectStore, run_name: str) -> list[str]:
    """Each object of a commit in the bucket that is missing or differs in size or checksum; nothing is downloaded."""
    prefix = object_prefix(manifest, run_name)
    found = {info.name.removeprefix(f"{prefix}/"): info for info in store.list(f"{prefix}/")}
    problems = []
    for name, entry in manifest.objects.items():
        info = found.get(name)
        if info is None:
            problems.append(f"{name} is missing")
        elif (info.size, info.crc32c or entry.crc32c) != (entry.bytes, entry.crc32c):
            problems.append(f"{name} has {info.size} bytes or a checksum other than the manifest's")
    return problems


def object_prefix(manifest: Manifest, run_name: str) -> str:
    """Where a commit's objects are, below the store's root; no slash at its end."""
    return f"{run_name}/{manifest.name}/{manifest.attempt}"


def _not_found(resume: str, inventory: Inventory, passed_over: list[str]) -> CheckpointError:
    if passed_over:
        return CheckpointError(f"{resume} can't be used: {' | '.join(passed_over)}", "Try another, or --resume auto.")
    names = sorted({str(manifest.name) for manifest, _ in inventory.newest_first()})
    if not names:
        mend = "Is --run its name? To start it, leave --resume out, or give --resume auto."
        return CheckpointError(f"there is no checkpoint {resume}: this run has none", mend)
    listed = ", ".join(names)
    return CheckpointError(
        f"there is no checkpoint {resume}: there are {listed}", "Name one of these, or use --resume auto."
    )
