"""Whether a trainer on this machine is using a run's folder: a lock that ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pretrain import log
from pretrain.errors import CheckpointError
from pretrain.files import disk_problem, lock

TRAINER_FILE = ".trainer.lock"  # empty: the lock is the kernel's

logger = log.get(__name__)


class RunLock:
    """A trainer's hold on its run's folder, until `release` or the end of the process.

    Ranks share it, and so do trainers with a bucket: there the commits tell that two of them are on one run, wherever
    they run. What it keeps out is a tool that would upload, replace or remove what the trainer is writing.

    Raises:
        CheckpointError: a tool is at work in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors = [_lock(folder, fcntl.LOCK_SH, "a tool (upload_manager or checkpoint_viewer)")]

    def keep_trainers_out(self) -> None:
        """Keep other trainers off the folder, too: without a bucket nothing else tells one of another. For rank 0.

        Raises:
            CheckpointError: another trainer is using the run.
            StorageError: the folder can't be written.
        """
        self._descriptors.append(_lock(self._folder / TRAINER_FILE, fcntl.LOCK_EX, "another trainer"))

    def release(self) -> None:
        """Let tools and trainers in; a second call does nothing."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[bool]:
    """Keep trainers of this machine off a run's folder while the block runs; the folder is made where it is missing.

    Yields:
        whether that is so: False where the file system has no locks.

    Raises:
        CheckpointError: a trainer is using the run.
        StorageError: the folder can't be written.
    """
    descriptor = _lock(folder, fcntl.LOCK_EX, "a trainer (or another tool)")
    try:
        yield descriptor >= 0
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _lock(place: Path, kind: int, holder: str) -> int:
    """A run's folder or its TRAINER_FILE, open and locked; -1 where the file system has no such locks."""
    folder = place.parent if place.name == TRAINER_FILE else place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY if place == folder else os.O_RDWR | os.O_CREAT
        descriptor = os.open(place, flags, 0o666)
    except OSError as error:
        if problem := disk_problem(error, folder):
            raise problem from error
        raise
    try:
        if lock(descriptor, kind | fcntl.LOCK_NB):
            return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise CheckpointError(f"{folder} is in use by {holder}", "Try again when it has ended.") from error
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    logger.warning("%s: no locks there, so nothing keeps tools and trainers apart", folder)
    return -1
