"""Keeps the checkpoints of a run: saves them behind the training, hands them to the uploads, and finds them again.

The training waits only for the copy to host memory; where that can go on beside the next step, only that step's update
does (snapshot.py). One background thread of each rank writes and commits locally (local_writer.py), another uploads and
commits in the bucket (upload_queue.py); each has a gloo group of its own to agree with its peers.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from pretrain import log, node_disks
from pretrain.archive import check_kind
from pretrain.checkpoint import CheckpointReader, damaged_files
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.config import CheckpointConfig, StorageConfig
from pretrain.discovery import damaged_objects, take_inventory
from pretrain.engine.base import Engine
from pretrain.errors import StorageError
from pretrain.local_writer import SaveJob, Writer
from pretrain.ranks import Ranks, background_group
from pretrain.resumption import agree, share_inventory
from pretrain.run_folder import RunFolder
from pretrain.snapshot import HostBuffers, take_snapshot
from pretrain.storage import ObjectStore, open_store
from pretrain.upload_queue import UploadQueue
from pretrain.uploads import UploadJob, list_commits

ABANDON_S, NOTABLE_WAIT_S = 60.0, 0.1  # what a run which met an error gives to what it has saved; what is told
LOOK_EVERY_S = 0.5  # at what a save in the foreground waits for

logger = log.get(__name__)


class Keeper:
    """All checkpoints of one run, as one rank sees them. Every rank makes the same calls in the same order.

    A context manager: where its block raises, `abandon` saves what is saved.

    Args:
        config: the checkpoint section.
        storage: how patiently the bucket is used.
        run_name: folder of the run, here and in the bucket.

    Raises:
        StorageError: the folder or the bucket can't be written.
        ConfigError: archives of that kind can't be made here, or without a bucket the nodes share no folder.
        CheckpointError: a tool, or without a bucket another trainer, is using the run.
    """

    def __init__(self, config: CheckpointConfig, storage: StorageConfig, run_name: str, ranks: Ranks) -> None:
        check_kind(config.archive)
        self._config = config
        self._ranks = ranks
        self._run_name = run_name
        self._patience_s = storage.deadline_s + storage.timeout_s  # a request and its retries: then it has failed
        self._store = open_store(config.url, storage) if config.url else None
        self._held = RunFolder(ranks, Path(config.dir) / run_name, has_bucket=bool(config.url))
        self._folder = self._held.path
        attempt = self._fresh_attempt()
        writer_group, upload_group = background_group(), background_group()
        self._inventory = share_inventory(ranks, self._folder, self._store, run_name)
        self._sequence = self._inventory.last_sequence
        self._last_saved_step, self._is_closed = 0, False
        self.excuse: Callable[[], None] = lambda: None  # told while a save waits for what is no hang
        self._buffers = HostBuffers()
        self._saved: list[CheckpointName] = []
        self._leftovers: list[node_disks.Leftover] = []
        self._torn: set[node_disks.Identity] = set()
        self._leftover: CheckpointName | None = None  # the run's newest, where an earlier process did not upload it
        self.skipped: list[str] = []
        """Names of the saves that were left out because the one before was still being written."""
        self.dropped: list[str] = []
        """Names of the checkpoints that were removed before they reached the bucket, to bound what waits for it."""
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._uploads: UploadQueue | None = None
        if self._store:
            node_disks.check_every_node_writes(ranks, self._store, run_name, attempt)
            self._uploads = self._begin_uploads(self._store, upload_group, storage.upload_workers)
        self._writer = Writer(self._held, ranks, attempt, writer_group, self._committed_here)

    def _begin_uploads(self, store: ObjectStore, group: dist.ProcessGroup, workers: int) -> UploadQueue:
        return UploadQueue(
            store,
            self._run_name,
            dict(self._inventory.bucket),
            keep=self._config.keep,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            group=group,
            workers=workers,
            archive=self._config.archive,
            on_commit=self._committed_in_bucket,
            on_failure=self._upload_failed,
        )

    # ---- finding ----

    def resume(self) -> CheckpointReader | None:
        """The checkpoint to go on from, as `resumption.agree` finds it; None to start afresh.

        Raises:
            StorageError: the newest one lies in parts on several nodes, and could not be brought together.
        """
        if self._uploads and self._store and self._config.resume:
            self._find_leftovers(self._uploads, self._store)
        return agree(self._ranks, self._inventory, self._config.resume, self._folder, self._store, self._run_name)

    def _find_leftovers(self, uploads: UploadQueue, store: ObjectStore) -> None:
        """See what earlier starts left on the nodes; what lies in parts is committed at once, to be had by all."""
        found = node_disks.find_leftovers(self._ranks, self._inventory.not_in_bucket(), self._folder)
        self._leftovers = [left for left in found if not left.is_torn]
        self._torn = {node_disks.identity(left.manifest) for left in found if left.is_torn}
        if self._ranks.is_first:
            node_disks.say_what_is_torn(found)
        parts = {str(left.manifest.name) for left in self._leftovers if not left.is_on_first}
        if parts:
            self.upload_leftovers()
            uploads.wait()
            with self._ranks.together():
                self.check()
                if failed := sorted(parts & set(uploads.waiting)):
                    what = f"{failed[-1]} lies in parts on several nodes and could not be brought together"
                    raise StorageError(f"{what} in {store.url}", "Start again once the bucket is within reach.")
            self._inventory = share_inventory(self._ranks, self._folder, store, self._run_name)
        if self._ranks.is_first:  # what lacks a node never was a checkpoint
            self._inventory = self._inventory.without({x.manifest.name for x in found if x.lacks_a_node(self._ranks)})

    def upload_leftovers(self) -> None:
        """Queue what an earlier process committed on the nodes and not in the bucket, oldest first; once."""
        leftovers, self._leftovers = self._leftovers, []
        for left in leftovers:
            assert self._uploads is not None
            name = left.manifest.name
            if self._ranks.is_first:
                logger.info("%s was not uploaded before: queued", name)
            self._uploads.put(UploadJob(left.manifest, self._folder / str(name), left.own_files))
            if left.manifest.sequence == self._inventory.last_sequence:
                self._leftover = name

    # ---- saving ----

    def save(
        self, name: CheckpointName, engine: Engine, documents: Mapping[str, str], *, may_skip: bool = False
    ) -> float | None:
        """Take a snapshot and write it behind the training.

        There is one snapshot at a time: while the one before is still being written, this one waits for it, or is left
        out on every rank, as `checkpoint.when_busy` says.

        Args:
            documents: file name -> text; rank 0 writes them.
            may_skip: False for a save that nothing comes after.

        Returns:
            Milliseconds that the training waited; None where this save was left out.
        """
        started = time.perf_counter()
        if may_skip and self._config.when_busy == "skip" and self._ranks.any(self._writer.is_busy):
            self.skipped.append(str(name))
            self._events.put(("checkpoint_skipped", {"name": str(name)}))
            logger.info("%s is left out: the one before is still being written (checkpoint.when_busy)", name)
            return None
        self._writer.wait()
        if (waited_s := time.perf_counter() - started) > NOTABLE_WAIT_S:
            logger.info("%s: training waited %.1f s until the one before was written", name, waited_s)
        ranks, states_stay = self._ranks, engine.states_stay
        states = engine.parameter_states()
        snapshot = take_snapshot(states, ranks.rank, ranks.world_size, self._buffers, states_stay=states_stay)
        engine.before_update = snapshot.copying.wait
        self._sequence += 1
        self._last_saved_step = name.step
        self._writer.put(SaveJob(name, self._sequence, snapshot, documents))
        if not self._config.background_upload:
            self._wait_in_the_loop()
        return (time.perf_counter() - started) * 1e3

    def _wait_in_the_loop(self) -> None:
        """Wait as `wait` does, all ranks for all; an upload that goes on, or is tried again in time, is no hang."""
        moved, moved_s, waits = -1, 0.0, True
        while waits:
            is_done = self.wait(LOOK_EVERY_S)
            now = self._uploads.moved if self._uploads else 0
            if now != moved:
                moved, moved_s = now, time.monotonic()
            waits, arrives = self._ranks.any_of(not is_done, time.monotonic() - moved_s < self._patience_s)
            if waits and arrives:
                self.excuse()

    def branch(self) -> None:
        """Steps are taken again after a roll-back: they may give checkpoints of names that this process has written.

        A fresh attempt id keeps the objects apart, and makes the later commit take the earlier one's place. Every rank
        must call it.
        """
        self._writer.wait()
        self._writer.attempt = self._fresh_attempt()

    def _fresh_attempt(self) -> str:
        return str(self._ranks.from_first({"id": uuid.uuid4().hex[:12]})["id"])

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
        """Names that are here and not in the bucket; this process, or else the next start, uploads them."""
        return self._uploads.waiting if self._uploads else []

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
        failure = self._writer.failure or (self._uploads.failure if self._uploads else None)
        if failure:
            raise failure

    def check_last_commit(self) -> None:
        """At the end of a run, when all uploads have been tried: the last checkpoint must be where it is to be kept,
        also where an earlier process has saved it.

        Raises:
            StorageError: it is on this machine only.
        """
        last = self._saved[-1] if self._saved else self._leftover
        if last and str(last) not in self.committed:
            error = StorageError(
                f"the run has ended, but {last} did not reach {self._config.url}; it is in {self._folder}",
                "Start again with --resume auto once the bucket is within reach: that uploads it.",
            )
            error.shared = True
            raise error

    # ---- ending ----

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until everything saved so far is written, and uploaded or given up for now; whether that was so in time."""
        started = time.monotonic()
        if not self._writer.wait(timeout_s):
            return False
        left_s = None if timeout_s is None else max(timeout_s - (time.monotonic() - started), 0.0)
        return self._uploads.wait(left_s) if self._uploads else True

    def close(self) -> None:
        """Finish what was begun and end the threads. Every rank must call it."""
        self._is_closed = True
        self._writer.close()
        if self._uploads:
            self._uploads.close()
        self._held.release()

    def abandon(self, timeout_s: float = ABANDON_S) -> None:
        """For a rank that can't go on, while others may: give what is saved this long to be written and uploaded."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._ranks.is_first and not self.wait(0.0):
            logger.info("ending: what is saved has %.0f s to be written and uploaded", timeout_s)
        if not self.wait(timeout_s):
            logger.warning(
                "what is not uploaded stays in %s, the next start with --resume auto uploads it", self._folder
            )
        if self._uploads:
            self._uploads.abandon()
        self._held.release()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abandon()

    # ---- called by the threads ----

    def _committed_here(self, manifest: Manifest, own_files: tuple[str, ...]) -> None:
        self._saved.append(manifest.name)
        self._events.put(("checkpoint_saved", {"name": str(manifest.name), "bytes": manifest.total_bytes}))
        if self._uploads:
            self._uploads.put(UploadJob(manifest, self._folder / str(manifest.name), own_files))
            self._drop_what_is_too_much(self._uploads)
        else:
            self._prune_local()

    def _drop_what_is_too_much(self, uploads: UploadQueue) -> None:
        """Bound what waits here for the bucket; rank 0 decides, and every node removes its part."""
        limit = self._config.max_waiting
        answers = self._writer.together(lambda: {"too_many": uploads.too_many(limit) if self._ranks.is_first else []})
        names = [job.manifest.name for job in uploads.drop(answers[0]["too_many"])]
        for name in names:
            self.dropped.append(str(name))
            self._events.put(("checkpoint_dropped", {"name": str(name)}))
            logger.warning("%s is removed: more than %d wait for the bucket (checkpoint.max_waiting)", name, limit)
        if self._ranks.local_rank == 0:
            self._writer.remove(names)

    def _committed_in_bucket(self, manifest: Manifest) -> None:
        self._events.put(("checkpoint_committed", {"name": str(manifest.name), "bytes": manifest.total_bytes}))
        self._prune_local()

    def _upload_failed(self, name: str, problem: str) -> None:
        self._events.put(("upload_failed", {"name": name, "problem": problem}))

    def _prune_local(self) -> None:
        """Remove old local checkpoints: all but the newest, and never one that is not yet where it is to be kept."""
        if not self._config.keep or self._ranks.local_rank != 0:
            return
        self._writer.remove_old(self._config.keep, self._may_go)

    def _may_go(self, manifest: Manifest) -> bool:
        """Whether this very commit, not only one of its name, is in the bucket, or was and has been pruned since."""
        if self._uploads is None:
            return True
        if node_disks.identity(manifest) in self._torn:  # never to be whole again; what came later is worth more
            return bool(self._uploads.committed)
        before = self._inventory.bucket.get(manifest.name)
        commits = [*self._uploads.committed, *([before.manifest] if before and before.manifest else [])]
        return any(commit.name == manifest.name and commit.attempt == manifest.attempt for commit in commits)
