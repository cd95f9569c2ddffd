"""Writes a run's checkpoints to this machine's disk, behind the training.

One at a time: a snapshot is one copy of this rank's share in host memory, and there is never a second. Where the
copy is still to be made, this thread makes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain import log
from pretrain.checkpoint import (
    INDEX_FILE,
    empty_folder,
    put_in_place,
    remove_folder,
    saving_folder,
    write_documents,
    write_manifest,
    write_parts,
)
from pretrain.checkpoint_manifest import CheckpointName, FileEntry, Manifest
from pretrain.discovery import take_inventory
from pretrain.errors import StorageError
from pretrain.failpoints import failpoint
from pretrain.ranks import Ranks
from pretrain.run_folder import RunFolder
from pretrain.snapshot import Snapshot

logger = log.get(__name__)


@dataclass(frozen=True)
class SaveJob:
    """A snapshot on its way to the disk."""

    name: CheckpointName
    sequence: int
    snapshot: Snapshot
    documents: Mapping[str, str]


class Writer:
    """The background thread of one rank that writes and commits locally. Every rank puts the same jobs.

    Args:
        held: local folder of the run.
        attempt: id under which commits are written, the same on every rank; changed only while nothing is written.
        group: gloo group that belongs to this thread.
        on_commit: called on this thread, on every rank, with the manifest and the files that this rank wrote.
    """

    def __init__(
        self,
        held: RunFolder,
        ranks: Ranks,
        attempt: str,
        group: dist.ProcessGroup,
        on_commit: Callable[[Manifest, tuple[str, ...]], None],
    ) -> None:
        self._folder, self._keeps_disk = held.path, held.keeps_disk
        self._ranks = ranks
        self.attempt = attempt
        self._group = group
        self._on_commit = on_commit
        self._folders = threading.Lock()  # a folder is not removed while one of its name is written
        self._changed = threading.Condition()
        self._job: SaveJob | None = None
        self._closing = False
        self.failure: BaseException | None = None  # what must stop the run
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is still being written; its memory must not be touched."""
        return self._job is not None

    def put(self, job: SaveJob) -> None:
        """Write this one; the one before must have been written."""
        with self._changed:
            assert self._job is None, "one snapshot at a time"
            self._job = job
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until nothing is being written; whether that was so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._job is None, timeout_s)

    def close(self) -> None:
        """Finish what was begun and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def remove(self, names: Iterable[CheckpointName]) -> None:
        """Remove local checkpoints, never while one is written."""
        with self._folders:
            for name in names:
                self._remove(self._folder / str(name))

    def remove_old(self, keep: int, may_go: Callable[[Manifest], bool]) -> None:
        """Remove all local checkpoints but the `keep` newest, and those that may not go yet."""
        with self._folders:
            inventory = take_inventory(self._folder, None, self._folder.name)
            for old in sorted(inventory.local.values(), key=lambda manifest: manifest.sequence)[:-keep]:
                if may_go(old):
                    self._remove(self._folder / str(old.name))

    # ---- the thread ----

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job is not None or self._closing)
                job = self._job
            if job is None:
                return
            try:
                job.snapshot.copying.finish()  # whatever has failed before: the next update waits for it
                if self.failure is None:
                    self._commit(job)
            except OSError as error:
                self.failure = self._write_error(error)
            except Exception as error:  # noqa: BLE001 (a thread's error must reach the loop, whatever it is)
                self.failure = error
            finally:
                with self._changed:
                    self._job = None
                    self._changed.notify_all()

    def _commit(self, job: SaveJob) -> None:
        """Write this rank's files; when all ranks have, each node vouches for its part; when all do, each commits."""
        folder = self._folder / str(job.name)
        saving = saving_folder(folder)
        with self._folders:
            try:
                self.together(lambda: self._make_way(saving))
                answers = self.together(lambda: self._write(job, saving))
                files = {name: FileEntry(**entry) for answer in answers for name, entry in answer.items()}
                manifest = Manifest(job.name, self.attempt, job.sequence, files)
                self.together(lambda: self._on_each_disk(lambda: write_manifest(manifest, saving)))
            except StorageError:
                if self._keeps_disk:
                    self._remove(saving)  # half a checkpoint only takes room
                raise
            self.together(lambda: self._on_each_disk(lambda: put_in_place(folder)))
        failpoint("checkpoint.after_manifest")
        self._on_commit(manifest, tuple(answers[self._ranks.rank]))

    def _make_way(self, folder: Path) -> dict[str, Any]:
        failpoint("snapshot.after_copy")
        return self._on_each_disk(lambda: empty_folder(folder))

    def _write(self, job: SaveJob, folder: Path) -> dict[str, Any]:
        failpoint("checkpoint.before_write")
        entries = write_parts(job.snapshot, folder, self._ranks.rank, self._ranks.world_size)
        if self._ranks.is_first:
            entries |= write_documents({**job.documents, INDEX_FILE: job.snapshot.index()}, folder)
        failpoint("checkpoint.after_write")
        return {name: asdict(entry) for name, entry in entries.items()}

    def _on_each_disk(self, action: Callable[[], None]) -> dict[str, Any]:
        if self._keeps_disk:  # a node that holds a part of the files prunes by the manifest, too
            action()
        return {}

    def together(self, action: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """Do one step of a save on every rank, on this thread; what each rank's action returned, as JSON has it.

        Raises:
            StorageError: on every rank, where it or an OSError was raised on one.
            Exception: any other, where it was raised; on the other ranks a StorageError.
        """
        problem = mend = ""
        result: dict[str, Any] = {}
        unexpected: Exception | None = None
        try:
            result = action()
        except (StorageError, OSError) as error:
            known = error if isinstance(error, StorageError) else self._write_error(error)
            problem, mend = known.what, known.mend
        except Exception as error:  # noqa: BLE001 (the other ranks wait for this one's answer, whatever has happened)
            unexpected, problem = error, f"rank {self._ranks.rank}: {type(error).__name__}: {error}"
        answers = self._ranks.exchange({"problem": problem, "mend": mend, "result": result}, self._group)
        if unexpected:
            raise unexpected
        if failed := next((answer for answer in answers if answer["problem"]), None):
            everywhere = StorageError(failed["problem"], failed["mend"])
            everywhere.shared = True
            raise everywhere
        return [answer["result"] for answer in answers]

    def _write_error(self, error: OSError) -> StorageError:
        reason = error.strerror or str(error)
        return StorageError(f"{self._folder} can't be written: {reason}", f"Look at it: ls -ld {self._folder}")

    def _remove(self, folder: Path) -> None:
        try:
            failpoint("prune.local_before")
            remove_folder(folder)
        except OSError as error:  # another node on the same disk may have been faster; what stays is only too much
            logger.warning("%s was not removed: %s", folder, error)
