"""A run's checkpoints in the bucket: how files get there, what commits them, and what is pruned.

    {run}/{checkpoint}/{attempt}/FILE      never written twice: the attempt is a fresh id of the writing process
    {run}/{checkpoint}/manifest.json       the commit, created only if absent

What runs this behind the training is `upload_queue.py`.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain import log
from pretrain.archive import archive_name, pack
from pretrain.checkpoint_manifest import (
    MANIFEST_FILE,
    TENSORS_SUFFIX,
    ArchiveEntry,
    CheckpointName,
    FileEntry,
    Manifest,
)
from pretrain.errors import CheckpointError, StorageError
from pretrain.failpoints import failpoint
from pretrain.files import PART_SUFFIX, disk_problem
from pretrain.storage import ObjectExists, ObjectMissing, ObjectStore

PROBE_PREFIX = "probe-"
ORPHAN_AGE_S = 24 * 3600.0  # how much older than what is kept something must be that nobody will commit any more

logger = log.get(__name__)


@dataclass(frozen=True)
class UploadJob:
    """One checkpoint to commit: its manifest, and the files of its folder that this rank uploads."""

    manifest: Manifest
    folder: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class BucketManifest:
    """A commit found in the bucket; `manifest` is None where the object is damaged."""

    generation: int
    manifest: Manifest | None
    problem: str = ""


def list_commits(
    store: ObjectStore, run_name: str, known: Mapping[CheckpointName, BucketManifest] | None = None
) -> dict[CheckpointName, BucketManifest]:
    """The commits of a run in the bucket; one that is pruned meanwhile is none.

    Args:
        known: commits that need not be read again where they are of the same generation.
    """
    found = {}
    for info in store.list(f"{run_name}/"):
        folder, _, file = info.name.removeprefix(f"{run_name}/").partition("/")
        name = CheckpointName.parse(folder)
        if name is None or file != MANIFEST_FILE:
            continue
        if known and name in known and known[name].generation == info.generation:
            found[name] = known[name]
            continue
        try:
            manifest = Manifest.from_bytes(store.read_bytes(info.name), f"{store.url}/{info.name}")
            found[name] = BucketManifest(info.generation, manifest)
        except ObjectMissing:  # pruned since it was listed
            continue
        except CheckpointError as error:
            found[name] = BucketManifest(info.generation, None, error.what)
    return found


class BucketRun:
    """One run in the bucket.

    Args:
        store: root of all checkpoints.
        known: commits that were there when this process started, and may be superseded; kept up to date.
        workers: parallel uploads.
        archive: how a rank's files are packed: "none", or one of `archive.KINDS`.

    Attributes:
        moved: grows with every piece that is packed or has arrived: who waits can tell a slow upload from a hang.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_name: str,
        known: dict[CheckpointName, BucketManifest],
        workers: int,
        archive: str = "none",
    ) -> None:
        self.store = store
        self.run_name = run_name
        self._known = known
        self._workers = workers
        self._archive = archive
        self.moved = 0
        self._emptying: set[CheckpointName] = set()  # their manifests are deleted, their objects may be there
        self._may_hold_orphans = True
        self._last = max((_order(commit.manifest) for commit in known.values() if commit.manifest), default=_BEFORE)

    def upload(self, job: UploadJob, rank: int = 0) -> tuple[str, dict[str, ArchiveEntry]]:
        """Upload the job's files, compared with the manifest.

        Args:
            rank: names this rank's archive.

        Returns:
            (what went wrong or "", the archives that were made).
        """
        try:
            failpoint("upload.before_files")
            archives, plain = {}, job.files
            if self._archive != "none" and job.files:
                archives = self._upload_archive(job, rank)
                plain = tuple(file for file in job.files if not file.endswith(TENSORS_SUFFIX))
            problem = self._upload_files(job, plain)
            failpoint("upload.after_files")
            return problem, archives
        except OSError as error:  # of this machine's disk: the bucket's are StorageErrors
            return str(disk_problem(error, job.folder) or error), {}
        except (StorageError, CheckpointError) as error:
            return str(error), {}

    def _upload_files(self, job: UploadJob, files: Sequence[str]) -> str:
        """Upload in parallel, and begin no other file once one has failed: each has a deadline of its own."""
        failed = threading.Event()

        def send(file: str) -> str:
            if failed.is_set():
                return ""
            try:
                return self._upload_file(job, file)
            except Exception:
                failed.set()
                raise

        with ThreadPoolExecutor(self._workers) as pool:
            return next(filter(None, list(pool.map(send, files))), "")

    def _upload_file(self, job: UploadJob, file: str) -> str:
        found = self.store.upload(job.folder / file, f"{self._prefix(job)}/{file}", self._count)
        entry = job.manifest.files[file]
        same = (found.size, found.crc32c) == (entry.bytes, entry.crc32c)
        return "" if same else f"{found.name} is not what the manifest says"

    def _upload_archive(self, job: UploadJob, rank: int) -> dict[str, ArchiveEntry]:
        """Pack the job's files beside its folder, which takes as much disk until it is uploaded, and upload that."""
        path = job.folder.with_name(f".{job.folder.name}.{rank}.{secrets.token_hex(4)}{PART_SUFFIX}")
        try:
            with path.open("xb") as target:
                files = {file: job.manifest.files[file] for file in job.files}
                packed = pack(job.folder, files, target, self._archive, self._count)
            name = archive_name(rank, packed, self._archive)
            found = self.store.upload(path, f"{self._prefix(job)}/{name}", self._count)
            if FileEntry(found.size, found.crc32c) != packed:
                raise StorageError(f"{found.name} is not what was packed")
        finally:
            with suppress(FileNotFoundError):
                path.unlink()
        return {name: ArchiveEntry(packed.bytes, packed.crc32c, tuple(sorted(job.files)))}

    def _count(self, _n_bytes: int = 0) -> None:
        self.moved += 1

    def _prefix(self, job: UploadJob) -> str:
        return f"{self.run_name}/{job.manifest.name}/{job.manifest.attempt}"

    def commit(self, manifest: Manifest, keep: int = 0) -> dict[str, str]:
        """Create the manifest in the bucket, in place of one that was there at the start or came from here.

        Args:
            keep: so many of the newest commits stay, and older ones are deleted; 0 keeps all.

        Returns:
            {"problem": what went wrong or "", "conflict": what somebody else has committed meanwhile or ""}.
        """
        target = f"{self.run_name}/{manifest.name}/{MANIFEST_FILE}"
        try:
            failpoint("upload.before_commit")
            commits = list_commits(self.store, self.run_name, self._known)
            if ahead := self._ahead_of(_order(manifest), commits):
                return {"problem": "", "conflict": ahead}
            stale = self._known.get(manifest.name)
            if stale and (stale.manifest is None or stale.manifest.to_bytes() != manifest.to_bytes()):
                logger.info("%s: an earlier commit of this step is superseded", manifest.name)
                self.store.delete(target, stale.generation)
                del self._known[manifest.name]  # not before it is gone: the next try must not take it for a stranger's
            created = self.store.create(target, manifest.to_bytes())
            self._known[manifest.name] = BucketManifest(created.generation, manifest)
            # Looked at again: this process may have been stopped since, and others have gone on and pruned this name.
            commits = list_commits(self.store, self.run_name, self._known)
            if ahead := self._ahead_of(_order(manifest), commits):
                self.store.delete(target, created.generation)
                return {"problem": "", "conflict": ahead}
            self._last = max(self._last, _order(manifest))
            logger.info("%s committed to %s", manifest.name, self.store.url)
            failpoint("upload.after_commit")
        except ObjectExists:
            return {"problem": "", "conflict": f"somebody else is writing this run: {self.store.url}/{target} is new"}
        except (StorageError, OSError) as error:
            return {"problem": str(error), "conflict": ""}
        self._prune(commits, keep)
        return {"problem": "", "conflict": ""}

    def somebody_ahead(self) -> str:
        """What somebody else has committed beyond the last commit of this process, or ''.

        Raises:
            StorageError: the bucket can't be listed.
        """
        return self._ahead_of(self._last, list_commits(self.store, self.run_name, self._known))

    def _ahead_of(self, order: tuple[int, int, str], commits: Mapping[CheckpointName, BucketManifest]) -> str:
        """A later commit that was not there at the start and did not come from here, or ''.

        A trainer that is so far behind another one that its steps are pruned already never meets one of their name.
        """
        for name, commit in commits.items():
            is_known = name in self._known and self._known[name].generation == commit.generation
            if not is_known and commit.manifest and _order(commit.manifest) > order:
                return f"somebody else is writing this run: {self.store.url}/{self.run_name}/{name} is new"
        return ""

    def _prune(self, commits: Mapping[CheckpointName, BucketManifest], keep: int) -> None:
        """Delete all but the newest commits, the manifest of each first."""
        old = dict(old_commits(commits, keep))
        kept = {name: commit for name, commit in commits.items() if name not in old}
        try:
            for name, commit in old.items():
                self.store.delete(f"{self.run_name}/{name}/{MANIFEST_FILE}", commit.generation)
                self._emptying.add(name)
                failpoint("prune.bucket_after_manifest")
            if old and self._may_hold_orphans:
                self._find_orphans(kept)
            self._emptying -= set(kept)  # committed again
            for name in list(self._emptying):
                for info in self.store.list(f"{self.run_name}/{name}/"):
                    self.store.delete(info.name)
                self._emptying.discard(name)
                self._known.pop(name, None)
                logger.info("%s pruned from %s", name, self.store.url)
        except (StorageError, OSError) as error:  # what is too much today is pruned after the next commit
            logger.warning("old checkpoints were not pruned: %s", error)

    def _find_orphans(self, kept: Mapping[CheckpointName, BucketManifest]) -> None:
        """Find what a process left that was killed while it pruned: objects without a manifest, much older than every
        commit that is kept. What is younger may be an upload that somebody has under way."""
        committed: dict[CheckpointName, float] = {}  # when; 0: not known
        touched: dict[CheckpointName, float] = {}
        for info in self.store.list(f"{self.run_name}/"):
            folder, _, file = info.name.removeprefix(f"{self.run_name}/").partition("/")
            if name := CheckpointName.parse(folder):
                touched[name] = max(touched.get(name, 0.0), info.created_s or math.inf)
                if file == MANIFEST_FILE:
                    committed[name] = info.created_s
        oldest_s = min((committed.get(name, 0.0) for name in kept), default=0.0)
        orphans = {name: at_s for name, at_s in touched.items() if name not in committed}
        gone = {name for name, at_s in orphans.items() if at_s < oldest_s - ORPHAN_AGE_S}
        self._may_hold_orphans = len(gone) < len(orphans)
        self._emptying |= gone


_BEFORE = (0, 0, "")


def _order(manifest: Manifest) -> tuple[int, int, str]:
    """Of two trainers on one run the one that is behind stops; the last part is for the sake of there being one."""
    return manifest.sequence, manifest.name.step, manifest.attempt


def old_commits(
    commits: Mapping[CheckpointName, BucketManifest], keep: int
) -> list[tuple[CheckpointName, BucketManifest]]:
    """All but the `keep` newest readable commits, oldest first; nothing where keep is 0."""
    readable = [(name, commit) for name, commit in commits.items() if commit.manifest]
    ordered = sorted(readable, key=lambda item: item[1].manifest.sequence if item[1].manifest else 0)
    return ordered[:-keep] if keep else []
