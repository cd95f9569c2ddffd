"""Checkpoints on their way to the bucket, behind the training.

    {run}/{checkpoint}/{attempt}/FILE      never written twice: the attempt is a fresh id of the writing process
    {run}/{checkpoint}/manifest.json       the commit, created only if absent

The queue needs no journal of its own: a local checkpoint whose manifest is not in the bucket is what is left to do,
and the next start finds it so.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain import log
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName, Manifest
from pretrain.errors import CheckpointError, StorageError
from pretrain.ranks import exchange
from pretrain.storage import ObjectExists, ObjectStore

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


def list_commits(store: ObjectStore, run_name: str) -> dict[CheckpointName, BucketManifest]:
    """The commits of a run in the bucket."""
    found = {}
    for info in store.list(f"{run_name}/"):
        folder, _, file = info.name.removeprefix(f"{run_name}/").partition("/")
        name = CheckpointName.parse(folder)
        if name is None or file != MANIFEST_FILE:
            continue
        try:
            manifest = Manifest.from_bytes(store.read_bytes(info.name), f"{store.url}/{info.name}")
            found[name] = BucketManifest(info.generation, manifest)
        except CheckpointError as error:
            found[name] = BucketManifest(info.generation, None, error.what)
    return found


class BucketRun:
    """One run in the bucket: how files get there, what commits them and what is pruned.

    Args:
        store: root of all checkpoints.
        known: commits that were there when this process started, and may be superseded; kept up to date.
        workers: parallel uploads.
    """

    def __init__(
        self, store: ObjectStore, run_name: str, known: dict[CheckpointName, BucketManifest], workers: int
    ) -> None:
        self.store = store
        self.run_name = run_name
        self._known = known
        self._workers = workers

    def upload(self, job: UploadJob) -> str:
        """Upload the job's files, compared with the manifest; what went wrong, or ''."""
        prefix = f"{self.run_name}/{job.manifest.name}/{job.manifest.attempt}"

        def upload(file: str) -> str:
            found = self.store.upload(job.folder / file, f"{prefix}/{file}")
            entry = job.manifest.files[file]
            same = found.size == entry.bytes and found.crc32c == entry.crc32c
            return "" if same else f"{found.name} is not what the manifest says"

        try:
            with ThreadPoolExecutor(self._workers) as pool:
                return next((problem for problem in pool.map(upload, job.files) if problem), "")
        except StorageError as error:
            return str(error)

    def commit(self, manifest: Manifest) -> dict[str, str]:
        """Create the manifest in the bucket, in place of one that was there at the start or came from here.

        Returns:
            {"problem": what went wrong or "", "conflict": what somebody else has committed meanwhile or ""}.
        """
        target = f"{self.run_name}/{manifest.name}/{MANIFEST_FILE}"
        try:
            if ahead := self._ahead_of(manifest):
                where = f"{self.store.url}/{self.run_name}/{ahead}"
                return {"problem": "", "conflict": f"somebody else is writing this run: {where} is new"}
            stale = self._known.pop(manifest.name, None)
            if stale and (stale.manifest is None or stale.manifest.attempt != manifest.attempt):
                logger.info("%s: an earlier commit of this step is superseded", manifest.name)
                self.store.delete(target, stale.generation)
            created = self.store.create(target, manifest.to_bytes())
            self._known[manifest.name] = BucketManifest(created.generation, manifest)
        except ObjectExists:
            return {"problem": "", "conflict": f"somebody else is writing this run: {self.store.url}/{target} is new"}
        except StorageError as error:
            return {"problem": str(error), "conflict": ""}
        return {"problem": "", "conflict": ""}

    def _ahead_of(self, manifest: Manifest) -> str:
        """A later commit that was not there at the start and did not come from here, or ''.

        A trainer that is so far behind another one that its steps are pruned already never meets one of their name.
        """
        for name, commit in list_commits(self.store, self.run_name).items():
            is_known = name in self._known and self._known[name].generation == commit.generation
            if not is_known and commit.manifest and commit.manifest.sequence > manifest.sequence:
                return str(name)
        return ""

    def prune(self, keep: int) -> None:
        """Delete all but the newest commits, the manifest of each first; with keep 0, none."""
        try:
            for name, commit in old_commits(list_commits(self.store, self.run_name), keep):
                folder = f"{self.run_name}/{name}/"
                self.store.delete(f"{folder}{MANIFEST_FILE}", commit.generation)
                for info in self.store.list(folder):
                    self.store.delete(info.name)
                self._known.pop(name, None)
                logger.info("%s pruned from %s", name, self.store.url)
        except StorageError as error:  # what is too much today is pruned after the next commit
            logger.warning("old checkpoints were not pruned: %s", error)


class UploadQueue:
    """The background thread of one rank that uploads, commits and prunes; the same jobs in the same order on each rank.

    Args:
        store: root of all checkpoints.
        known: commits that were there when this process started, and may be superseded; kept up to date.
        keep: newest commits kept; 0 keeps all.
        group: gloo group that belongs to this thread.
        on_commit: called on every rank, off the main thread, after a commit.
        on_failure: likewise, with the checkpoint's name and the problem, after an upload that failed.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_name: str,
        known: dict[CheckpointName, BucketManifest],
        *,
        keep: int,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup,
        workers: int,
        on_commit: Callable[[Manifest], None],
        on_failure: Callable[[str, str], None],
    ) -> None:
        self._bucket = BucketRun(store, run_name, known, workers)
        self._keep = keep
        self._rank = rank
        self._world_size = world_size
        self._group = group
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._jobs: queue.Queue[UploadJob | None] = queue.Queue()
        self.committed: list[Manifest] = []
        self.failed: list[str] = []
        self.failure: BaseException | None = None  # what must stop the run
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def put(self, job: UploadJob) -> None:
        """Queue a checkpoint; returns at once."""
        self._jobs.put(job)

    def wait(self) -> None:
        """Until every queued job has been committed or has failed."""
        self._jobs.join()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self.failure is None:
                    self._commit_together(job)
            except Exception as error:  # noqa: BLE001 (a thread's error must reach the loop, whatever it is)
                self.failure = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _commit_together(self, job: UploadJob) -> None:
        """Each rank uploads its files; when all are there, rank 0 commits; every rank learns how it ended."""
        problems = [answer["problem"] for answer in self._exchange({"problem": self._bucket.upload(job)})]
        outcome = {"problem": next((problem for problem in problems if problem), ""), "conflict": ""}
        if self._rank == 0 and not outcome["problem"]:
            outcome = self._bucket.commit(job.manifest)
            if not any(outcome.values()):
                logger.info("%s committed to %s", job.manifest.name, self._bucket.store.url)
                # Before the others go on: their next upload may lie under a name that is pruned here.
                self._bucket.prune(self._keep)
        outcome = self._exchange(outcome)[0]
        name = str(job.manifest.name)
        if outcome["conflict"]:
            mend = "Stop the other trainer, or give this run its own name with --run."
            self.failure = CheckpointError(outcome["conflict"], mend)
            self.failure.shared = True
        elif outcome["problem"]:
            self.failed.append(name)
            self._on_failure(name, outcome["problem"])
            if self._rank == 0:
                logger.error("%s stays local, the next start uploads it: %s", name, outcome["problem"])
        else:
            self.committed.append(job.manifest)
            self._on_commit(job.manifest)

    def _exchange(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        return exchange(message, self._world_size, self._group)


def old_commits(
    commits: dict[CheckpointName, BucketManifest], keep: int
) -> list[tuple[CheckpointName, BucketManifest]]:
    """All but the `keep` newest readable commits, oldest first; nothing where keep is 0."""
    readable = [(name, commit) for name, commit in commits.items() if commit.manifest]
    ordered = sorted(readable, key=lambda item: item[1].manifest.sequence if item[1].manifest else 0)
    return ordered[:-keep] if keep else []
