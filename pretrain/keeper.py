"""Keeps the checkpoints of a run: saves them behind the training, hands them to the uploads, and finds them again.

The training waits only for the copy to host memory. One background thread of each rank writes and commits locally,
another (uploads.py) uploads and commits in the bucket; each has a gloo group of its own to agree with its peers.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain import log
from pretrain.checkpoint import (
    INDEX_FILE,
    CheckpointReader,
    Snapshot,
    damaged_files,
    empty_folder,
    remove_folder,
    retract_manifest,
    take_snapshot,
    write_documents,
    write_manifest,
    write_parts,
)
from pretrain.checkpoint_manifest import CheckpointName, FileEntry, Manifest
from pretrain.config import CheckpointConfig, StorageConfig
from pretrain.discovery import damaged_objects, take_inventory
from pretrain.engine.base import Engine
from pretrain.errors import StorageError
from pretrain.files import make_writable
from pretrain.ranks import Ranks, background_group, exchange
from pretrain.resumption import agree, share_inventory
from pretrain.run_lock import RunLock
from pretrain.storage import open_store
from pretrain.uploads import UploadJob, UploadQueue, list_commits

logger = log.get(__name__)


@dataclass(frozen=True)
class SaveJob:
    """A snapshot on its way to the disk."""

    name: CheckpointName
    sequence: int
    snapshot: Snapshot
    documents: Mapping[str, str]


class Keeper:
    """All checkpoints of one run, as one rank sees them. Every rank makes the same calls in the same order.

    Args:
        config: the checkpoint section.
        storage: how patiently the bucket is used.
        run_name: folder of the run, here and in the bucket.
    """

    def __init__(self, config: CheckpointConfig, storage: StorageConfig, run_name: str, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._run_name = run_name
        self._folder = Path(config.dir) / run_name
        self._store = open_store(config.url, storage) if config.url else None
        if ranks.local_rank == 0:
            make_writable(self._folder, "--checkpoint.dir")
        self._attempt = ranks.from_first({"id": uuid.uuid4().hex[:12]})["id"]
        self._lock = RunLock(self._folder)  # on every rank: one that outlives the others keeps tools out, too
        self._group = background_group()
        upload_group = background_group()
        self._inventory = share_inventory(ranks, self._folder, self._store, run_name)
        self._sequence = self._inventory.last_sequence
        self._last_saved_step = 0
        self._saved: list[CheckpointName] = []
        self._folders = threading.Lock()  # a folder is not pruned while one of its name is written
        self._failure: BaseException | None = None
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._uploads: UploadQueue | None = None
        if self._store:
            self._uploads = UploadQueue(
                self._store,
                run_name,
                dict(self._inventory.bucket),
                keep=config.keep,
                rank=ranks.rank,
                world_size=ranks.world_size,
                group=upload_group,
                workers=storage.upload_workers,
                on_commit=self._committed_in_bucket,
                on_failure=self._upload_failed,
            )
        self._jobs: queue.Queue[SaveJob | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    # ---- finding ----

    def resume(self) -> CheckpointReader | None:
        """The checkpoint to go on from, as `resumption.agree` finds it; None to start afresh."""
        return agree(self._ranks, self._inventory, self._config.resume, self._folder, self._store, self._run_name)

    def upload_leftovers(self) -> None:
        """Queue the local checkpoints that an earlier process committed here and not in the bucket, oldest first."""
        if not self._uploads:
            return
        missing = self._inventory.not_in_bucket() if self._ranks.is_first else []
        whole = [manifest for manifest in missing if not damaged_files(manifest, self._folder / str(manifest.name))]
        answer = self._ranks.from_first({"left": [manifest.to_bytes().decode() for manifest in whole]})
        for text in answer["left"]:
            manifest = Manifest.from_bytes(text.encode(), "the manifest of rank 0")
            files = tuple(manifest.files) if self._ranks.is_first else ()
            if self._ranks.is_first:
                logger.info("%s was not uploaded before: queued", manifest.name)
            self._uploads.put(UploadJob(manifest, self._folder / str(manifest.name), files))

    # ---- saving ----

    def save(self, name: CheckpointName, engine: Engine, documents: Mapping[str, str]) -> float:
        """Take a snapshot and write it behind the training.

        Args:
            documents: file name -> text; rank 0 writes them.

        Returns:
            Milliseconds that the training waited.
        """
        started = time.perf_counter()
        snapshot = take_snapshot(engine.parameter_states(), self._ranks.rank, self._ranks.world_size)
        self._sequence += 1
        self._last_saved_step = name.step
        self._jobs.put(SaveJob(name, self._sequence, snapshot, documents))
        if not self._config.background_upload:
            self.wait()
        return (time.perf_counter() - started) * 1e3

    @property
    def last_saved_step(self) -> int:
        """Step of the last checkpoint that this process saved; 0 where it saved none."""
        return self._last_saved_step

    @property
    def committed(self) -> list[str]:
        """Names committed by this process where they are to be kept: in the bucket, or locally where there is none."""
        names = [manifest.name for manifest in self._uploads.committed] if self._uploads else self._saved
        return [str(name) for name in names]

    @property
    def uploads_failed(self) -> list[str]:
        """Names whose upload failed; they are still here and the next start uploads them."""
        return list(self._uploads.failed) if self._uploads else []

    def verified(self) -> list[str]:
        """Names of the checkpoints in the bucket, or locally where there is none, that verify now; for rank 0."""
        if self._store is None:
            local = take_inventory(self._folder, None, self._run_name).local
            return [str(name) for name, m in local.items() if not damaged_files(m, self._folder / str(name))]
        commits = list_commits(self._store, self._run_name)
        manifests = [commit.manifest for commit in commits.values() if commit.manifest]
        return [str(m.name) for m in manifests if not damaged_objects(m, self._store, self._run_name)]

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What happened in the background since the last call: (kind, fields)."""
        while not self._events.empty():
            yield self._events.get()

    def check(self) -> None:
        """Raise what went wrong in the background and must stop the run.

        Raises:
            StorageError: a checkpoint could not be written.
            CheckpointError: somebody else is writing this run.
        """
        failure = self._failure or (self._uploads.failure if self._uploads else None)
        if failure:
            raise failure

    def check_last_commit(self) -> None:
        """At the end of a run, when all uploads have been tried: the last checkpoint must be where it is to be kept.

        Raises:
            StorageError: it is on this machine only.
        """
        if self._saved and str(self._saved[-1]) not in self.committed:
            error = StorageError(
                f"the run is complete, but {self._saved[-1]} did not reach {self._config.url}; it is in {self._folder}",
                "Start again with --resume auto once the bucket is within reach: that uploads it.",
            )
            error.shared = True
            raise error

    def wait(self) -> None:
        """Until everything saved so far is written, and uploaded or given up."""
        self._jobs.join()
        if self._uploads:
            self._uploads.wait()

    def close(self) -> None:
        """Finish what was begun and end the threads."""
        self._jobs.put(None)
        self._thread.join()
        if self._uploads:
            self._uploads.close()
        self._lock.release()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._failure is None:
                    self._commit_locally(job)
            except Exception as error:  # noqa: BLE001 (a thread's error must reach the loop, whatever it is)
                self._failure = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _commit_locally(self, job: SaveJob) -> None:
        """Write this rank's files; when all ranks have, each node commits; then every rank queues its upload."""
        folder = self._folder / str(job.name)
        with self._folders:
            try:
                self._together(lambda: self._make_way(folder))
                answers = self._together(lambda: self._write(job, folder))
                files = {name: FileEntry(**entry) for answer in answers for name, entry in answer.items()}
                manifest = Manifest(job.name, self._attempt, job.sequence, files)
                self._together(lambda: self._commit_on_this_node(manifest, folder))
            except StorageError:
                if self._ranks.local_rank == 0:
                    self._remove(folder)  # half a checkpoint only takes room
                raise
        self._saved.append(job.name)
        self._events.put(("checkpoint_saved", {"name": str(job.name), "bytes": manifest.total_bytes}))
        if self._uploads:
            self._uploads.put(UploadJob(manifest, folder, tuple(answers[self._ranks.rank])))
        else:
            self._prune_local()

    def _make_way(self, folder: Path) -> dict[str, FileEntry]:
        if self._ranks.is_first:
            empty_folder(folder)
        elif self._ranks.local_rank == 0:  # this node's disk may be the first one's, so nothing more is removed
            retract_manifest(folder)
        return {}

    def _commit_on_this_node(self, manifest: Manifest, folder: Path) -> dict[str, FileEntry]:
        if self._ranks.local_rank == 0:  # a node that holds a part of the files prunes by the manifest, too
            write_manifest(manifest, folder)
        return {}

    def _write(self, job: SaveJob, folder: Path) -> dict[str, FileEntry]:
        entries = write_parts(job.snapshot, folder, self._ranks.rank, self._ranks.world_size)
        if self._ranks.is_first:
            entries |= write_documents({**job.documents, INDEX_FILE: job.snapshot.index()}, folder)
        return entries

    def _together(self, action: Callable[[], dict[str, FileEntry]]) -> list[dict[str, dict[str, Any]]]:
        """Do one step of a save on every rank; the files each rank wrote. One rank's StorageError is every rank's."""
        problem = mend = ""
        files: dict[str, FileEntry] = {}
        try:
            files = action()
        except StorageError as error:
            problem, mend = error.what, error.mend
        message = {"problem": problem, "mend": mend, "files": {name: asdict(entry) for name, entry in files.items()}}
        answers = exchange(message, self._ranks.world_size, self._group)
        if failed := next((answer for answer in answers if answer["problem"]), None):
            everywhere = StorageError(failed["problem"], failed["mend"])
            everywhere.shared = True
            raise everywhere
        return [answer["files"] for answer in answers]

    def _committed_in_bucket(self, manifest: Manifest) -> None:
        self._events.put(("checkpoint_committed", {"name": str(manifest.name), "bytes": manifest.total_bytes}))
        self._prune_local()

    def _upload_failed(self, name: str, problem: str) -> None:
        self._events.put(("upload_failed", {"name": name, "problem": problem}))

    def _prune_local(self) -> None:
        """Remove old local checkpoints: all but the newest, and never one that is not yet where it is to be kept."""
        if not self._config.keep or self._ranks.local_rank != 0:
            return
        with self._folders:
            local = sorted(take_inventory(self._folder, None, self._run_name).local.values(), key=lambda m: m.sequence)
            for old in local[: -self._config.keep]:
                if self._uploads is None or self._is_in_bucket(old):
                    self._remove(self._folder / str(old.name))

    def _remove(self, folder: Path) -> None:
        try:
            remove_folder(folder)
        except OSError as error:  # another node on the same disk may have been faster; what stays is only too much
            logger.warning("%s was not removed: %s", folder, error)

    def _is_in_bucket(self, manifest: Manifest) -> bool:
        """Whether this very commit, not only one of its name, is in the bucket, or was and has been pruned since."""
        before = self._inventory.bucket.get(manifest.name)
        by_this_process = self._uploads.committed if self._uploads else []
        commits = [*by_this_process, *([before.manifest] if before and before.manifest else [])]
        return any(commit.name == manifest.name and commit.attempt == manifest.attempt for commit in commits)
