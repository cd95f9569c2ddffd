"""A run's folder as a training finds it and takes it into use: on every node's disk, or on one that the nodes share.

What a kill left there is finished where it was whole, and removed where it was not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain import log
from pretrain.checkpoint import (
    put_in_place,
    replaced_folder,
    retract_manifest,
    saving_folder,
    whole_saves,
)
from pretrain.discovery import take_inventory
from pretrain.errors import CheckpointError, StorageError
from pretrain.files import make_writable
from pretrain.leftovers import sweep
from pretrain.node_disks import finds_what_first_writes, identity, not_shared
from pretrain.ranks import Ranks
from pretrain.run_lock import RunLock, sole_use

logger = log.get(__name__)


class RunFolder:
    """The local folder of a run, in use until `release`. Every rank must make one.

    Args:
        path: of the folder; made where it is missing.
        has_bucket: whether checkpoints are committed in a bucket, too. Where they are not, one folder for all nodes is
            needed, and other trainers are kept off it.

    Raises:
        StorageError: the folder can't be written.
        ConfigError: without a bucket, a node has a disk of its own there.
        CheckpointError: a tool, or without a bucket another trainer, is using the run.
    """

    def __init__(self, ranks: Ranks, path: Path, has_bucket: bool) -> None:
        self.path = path
        with ranks.together():
            if ranks.local_rank == 0:
                make_writable(path, "--checkpoint.dir")
        is_shared = finds_what_first_writes(ranks, path)
        self.keeps_disk = ranks.is_first or (ranks.local_rank == 0 and not is_shared)
        """Whether this rank makes, names and clears away the folders on its node's disk."""
        with ranks.together():
            if not (is_shared or has_bucket):
                raise not_shared(f"--checkpoint.dir {path.parent}", "CHECKPOINTS=gs://bucket/prefix")
        in_part = finish_saves(ranks, path, self.keeps_disk)
        with ranks.together():  # before any rank has its lock: that would keep this one off, too
            if self.keeps_disk:
                _sweep_alone(path, in_part)
        self._lock = RunLock(path)  # on every rank: one that outlives the others keeps tools out, too

        def alone() -> dict[str, Any]:
            self._lock.keep_trainers_out()
            return {}

        if not has_bucket:
            ranks.decided_by_first(alone)

    def release(self) -> None:
        """Let tools and other trainers in; a second call does nothing."""
        self._lock.release()


def finish_saves(ranks: Ranks, folder: Path, keeps_disk: bool) -> list[Path]:
    """Name the saves that were whole when their process was killed; on every disk or on none. Every rank must call it.

    Returns:
        those of this disk that were whole on some disks only.

    Raises:
        StorageError: a folder can't be renamed; on every rank.
    """
    whole = whole_saves(folder) if keeps_disk else []
    named = take_inventory(folder, None, folder.name).local.values() if keeps_disk else ()
    have = [list(identity(manifest)) for manifest in (*whole, *named)]
    answers = [answer["have"] for answer in ranks.exchange({"have": have})]
    disks = [each for each in answers if each]  # a disk that has nothing of the run had no part in it
    in_part = []
    with ranks.together():
        for manifest in whole:
            path = folder / str(manifest.name)
            has_begun = replaced_folder(path).exists() and not path.exists()  # they were on all disks before that
            if has_begun or all(list(identity(manifest)) in each for each in disks):
                logger.info("%s was whole when the run was killed: it is taken", manifest.name)
                put_in_place(path)
            else:
                in_part.append(saving_folder(path))
    return in_part


def _sweep_alone(path: Path, in_part: list[Path]) -> None:
    """Remove what killed processes left half-made; not while another process has the folder and may be writing it."""
    try:
        with sole_use(path) as is_alone:
            if is_alone:
                for saving in in_part:
                    retract_manifest(saving)
                sweep(path)
    except (CheckpointError, StorageError) as error:
        logger.warning("what killed processes left half-made stays: %s", error.what)
