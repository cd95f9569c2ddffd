"""Checkpoints on their way to the bucket, behind the training.

What can't be uploaded waits, here and in the order of the commits: it is tried again with every later checkpoint, and
from time to time. The queue needs no journal of its own: a local checkpoint whose manifest is not in the bucket is
what is left to do, and the next start finds it so.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from pretrain import log
from pretrain.backlog import Backlog
from pretrain.checkpoint_manifest import ArchiveEntry, CheckpointName, Manifest
from pretrain.errors import CheckpointError, StorageError
from pretrain.ranks import exchange
from pretrain.storage import ObjectStore
from pretrain.uploads import BucketManifest, BucketRun, UploadJob

TICK_S = 2.0  # the ranks meet at least so often, so that each of them can begin something that needs them all
RETRY_S = 30.0  # between two tries of what could not be uploaded, where no later checkpoint comes first
POLL_S = 15.0  # between two looks at what others have committed

logger = log.get(__name__)


class UploadQueue:
    """The background thread of one rank that uploads, commits and prunes; the same jobs in the same order on each rank.

    Args:
        store: root of all checkpoints.
        known: commits that were there when this process started, and may be superseded; kept up to date.
        keep: newest commits kept; 0 keeps all.
        group: gloo group that belongs to this thread.
        workers: parallel uploads of this rank.
        archive: see BucketRun.
        on_commit: called on every rank, off the main thread, after a commit.
        on_failure: likewise, with the checkpoint's name and the problem, after its first upload that failed.
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
        archive: str = "none",
        on_commit: Callable[[Manifest], None],
        on_failure: Callable[[str, str], None],
    ) -> None:
        self._bucket = BucketRun(store, run_name, known, workers, archive)
        self._keep = keep
        self._rank = rank
        self._world_size = world_size
        self._group = group
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._backlog = Backlog()
        self._round = _Round()
        self._next_poll_s = time.monotonic() + POLL_S
        self._changed = threading.Condition()
        self._busy = self._closing = self._abandoned = self._ended = False
        self.committed: list[Manifest] = []
        self.failure: BaseException | None = None  # what must stop the run
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()
        atexit.register(self.abandon)  # a thread inside gloo when the interpreter ends would crash it

    @property
    def waiting(self) -> list[str]:
        """Names of the checkpoints that wait for the bucket."""
        return self._backlog.names

    @property
    def moved(self) -> int:
        """See BucketRun."""
        return self._bucket.moved

    def put(self, job: UploadJob) -> None:
        """Queue a checkpoint; returns at once. On each rank in the order of the commits."""
        with self._changed:
            self._backlog.put(job)
            self._changed.notify_all()

    def too_many(self, limit: int) -> list[int]:
        """See Backlog.too_many. Rank 0 decides, for it alone knows which one is on its way."""
        return self._backlog.too_many(limit)

    def drop(self, sequences: list[int]) -> list[UploadJob]:
        """Give these up for good; the ones that were still waiting."""
        with self._changed:
            dropped = self._backlog.remove(sequences)
            self._changed.notify_all()
        return dropped

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until every queued job has been committed or has failed once; whether that was so in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._ended or not (self._busy or self._backlog.untried), timeout=timeout_s
            )

    def close(self) -> None:
        """Try what is queued once more where its turn has come, and end the thread. Every rank must call it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.abandon)

    def abandon(self) -> None:
        """End the thread of every rank soon, where this one can't go on; what is queued waits for the next start."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        self._thread.join(2 * TICK_S)
        atexit.unregister(self.abandon)

    # ---- the thread ----

    def _work(self) -> None:
        try:
            while self.failure is None and self._turn():
                pass
        except Exception as error:  # noqa: BLE001 (a thread's error must reach the loop, whatever it is)
            self.failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _turn(self) -> bool:
        """Meet the other ranks and do what rank 0 finds to do; whether there will be another turn."""
        with self._changed:
            self._changed.wait_for(self._has_something, timeout=TICK_S)
            message = {  # under the lock: who says that it is closing has named all that it has put
                "have": self._backlog.sequences,
                "untried": sorted(self._backlog.untried),
                "last": self._backlog.last,
                "closing": self._closing,
                "abandoned": self._abandoned,
            }
        answers = self._exchange(message)
        if any(answer["abandoned"] for answer in answers):
            return False
        first = answers[0]
        if self._rank:
            self._backlog.keep_only(first["have"], first["last"])
        everywhere = set.intersection(*(set(answer["have"]) for answer in answers))
        closing = all(answer["closing"] for answer in answers)
        decision: dict[str, Any] = {}
        if self._rank == 0:
            decision = self._decide(everywhere, everywhere & set(first["untried"]), closing)
        decision = self._exchange(decision)[0]
        if decision["conflict"]:
            self._stop(decision["conflict"])
        elif decision["job"] is not None:
            self._commit_together(decision["job"])
        else:
            for sequence in sorted(everywhere & self._backlog.untried):
                if job := self._backlog.get(sequence):
                    self._failed(job, "the bucket was away for those before and after it")
            self._set_busy(False, everywhere)
        return decision["job"] is not None or not closing

    def _has_something(self) -> bool:
        return self._closing or self._abandoned or bool(self._backlog.untried)

    def _decide(self, everywhere: set[int], untried: set[int], closing: bool) -> dict[str, Any]:
        """Rank 0: the next job of this round, or what somebody else has done meanwhile."""
        job = self._round.next(everywhere, untried)
        conflict = ""
        if job is None and not closing and time.monotonic() >= self._next_poll_s:
            try:
                conflict = self._bucket.somebody_ahead()
            except StorageError as error:
                logger.warning("who else writes this run is not known: %s", error)
            self._next_poll_s = time.monotonic() + POLL_S  # from its end: tries come in between where that took long
        return {"job": job, "conflict": conflict}

    def _commit_together(self, sequence: int) -> None:
        """Each rank uploads its files; when all are there, rank 0 commits; every rank learns how it ended."""
        job = self._backlog.get(sequence)
        self._set_busy(True, ())
        problem = "it is no longer wanted"
        archives: dict[str, ArchiveEntry] = {}
        if job:
            problem, archives = self._bucket.upload(job, self._rank)
        message = {"problem": problem, "archives": {name: asdict(entry) for name, entry in archives.items()}}
        answers = self._exchange(message)
        outcome = {"problem": next((a["problem"] for a in answers if a["problem"]), ""), "conflict": ""}
        if self._rank == 0 and job and not outcome["problem"]:
            made = {n: _archive(entry) for answer in answers for n, entry in answer["archives"].items()}
            # Pruning comes before the others go on: their next upload may lie under a name that is pruned here.
            outcome = self._bucket.commit(replace(job.manifest, archives=made), self._keep)
        outcome = self._exchange(outcome)[0]
        self._round.ended(sequence, bool(outcome["problem"]))
        if outcome["conflict"]:
            self._stop(outcome["conflict"])
        elif job and outcome["problem"]:
            self._failed(job, outcome["problem"])
        elif job:
            self._backlog.remove([sequence])
            self.committed.append(job.manifest)
            self._on_commit(job.manifest)
        self._set_busy(False, [sequence])

    def _failed(self, job: UploadJob, problem: str) -> None:
        name = job.manifest.name
        if job.manifest.sequence not in self._backlog.untried:
            logger.info("%s still waits: %s", name, problem)
            return
        self._on_failure(str(name), problem)
        if self._rank == 0:
            logger.error(
                "%s stays local, its upload is tried again, by the next start at the latest: %s", name, problem
            )

    def _stop(self, conflict: str) -> None:
        self.failure = CheckpointError(conflict, "Stop the other trainer, or give this run its own name with --run.")
        self.failure.shared = True

    def _set_busy(self, busy: bool, tried: Any) -> None:
        with self._changed:
            self._busy = busy
            if not busy:
                self._backlog.tried(tried)
            self._changed.notify_all()

    def _exchange(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        return exchange(message, self._world_size, self._group)


class _Round:
    """Rank 0's choice of what to try next.

    A round goes through what waits, the oldest first. When one fails, only the newest is tried still: a bucket that is
    away costs two deadlines a round and not one for each, and a checkpoint that can't be uploaded blocks no other.
    """

    def __init__(self) -> None:
        self._tried: set[int] | None = None  # None: between two rounds
        self._seen: set[int] = set()
        self._failed = False
        self._next_s = 0.0

    def next(self, waiting: set[int], untried: set[int]) -> int | None:
        """The sequence number to try; None where there is nothing to do now."""
        if self._tried is None or untried - self._seen:  # what has just come begins a new round
            if not untried and (not waiting or time.monotonic() < self._next_s):
                return None
            self._tried, self._seen, self._failed = set(), set(waiting), False
        left = sorted(waiting - self._tried)
        if self._failed:
            left = [sequence for sequence in left if sequence == max(waiting)]
        if not left:
            self._tried = None
            return None
        return left[0]

    def ended(self, sequence: int, failed: bool) -> None:
        """How the try of one ended."""
        self._failed = failed
        if failed and self._tried is not None:
            self._tried.add(sequence)
            self._next_s = time.monotonic() + RETRY_S


def _archive(tree: dict[str, Any]) -> ArchiveEntry:
    return ArchiveEntry(tree["bytes"], tree["crc32c"], tuple(tree["files"]))
