"""Whether a trainer on this machine is using a run's folder: a lock that ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pretrain import log
from pretrain.errors import CheckpointError
from pretrain.files import disk_problem

# Some network and FUSE file systems know no locks; NFS knows them, but not those of folders.
_UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)

logger = log.get(__name__)


class RunLock:
    """A trainer's hold on its run's folder, until `release` or the end of the process.

    Trainers share it: that two of them are on one run is found out by the commits, wherever they run. What it keeps
    out is a tool that would upload, replace or remove what the trainer is writing.

    Raises:
        CheckpointError: a tool is at work in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = _lock(folder, fcntl.LOCK_SH, "a tool (upload_manager or checkpoint_viewer)")

    def release(self) -> None:
        """Let tools in; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep trainers of this machine off a run's folder while the block runs; the folder is made where it is missing.

    Raises:
        CheckpointError: a trainer is using the run.
        StorageError: the folder can't be written.
    """
    descriptor = _lock(folder, fcntl.LOCK_EX, "a trainer (or another tool)")
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _lock(folder: Path, kind: int, holder: str) -> int:
    """The folder, open and locked; -1 where the file system has no such locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if problem := disk_problem(error, folder):
            raise problem from error
        raise
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise CheckpointError(f"{folder} is in use by {holder}", "Try again when it has ended.") from error
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s: no locks there, so nothing keeps tools and trainers apart: %s", folder, error.strerror)
        return -1
    return descriptor
