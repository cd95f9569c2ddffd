"""Faults on purpose: PRETRAIN_FAILPOINT=NAME:COUNT:ACTION does ACTION when NAME is passed for the COUNTth time.

    PRETRAIN_FAILPOINT=checkpoint.after_write:3            SIGKILL, as a machine that is taken away
    PRETRAIN_FAILPOINT=upload.before_commit:1:raise        an OSError, as a disk that fails
    PRETRAIN_FAILPOINT=loop.before_step:20:hang            wait for ever, as a collective whose peer is lost
    PRETRAIN_FAILPOINT=loop.before_step:20:kill@1          on rank 1 only
    PRETRAIN_FAILPOINT=loss.poison:20-24:poison            the five losses are NaN, as from a broken batch

COUNT may be a range, FIRST-LAST. Several are separated by commas. Where the variable is not set, passing one costs a
look at an empty dictionary. A name that nobody knows is an error at start: a test that injects nothing proves nothing.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pretrain.errors import ConfigError

VARIABLE = "PRETRAIN_FAILPOINT"

# name: what has just happened, or is about to
FAILPOINTS: dict[str, str] = {
    "loop.before_step": "a step is about to be taken",
    "loop.after_step": "a step was taken, and nothing of it is saved",
    "loop.after_rollback": "the run went back to a checkpoint, and nothing of that is saved",
    "loss.poison": "the loss of a micro-batch is known; the action poison makes it NaN",
    "snapshot.before_copy": "a save has begun; its tensors are named, and where they stay in place not yet copied",
    "snapshot.after_copy": "a save's tensors are in host memory, nothing is written",
    "checkpoint.before_write": "the folder of a save is made, and empty",
    "checkpoint.after_write": "this rank's files are written, the manifest is not",
    "checkpoint.before_rename": "a save is whole; it has not its name yet, nor has what it takes the place of (rank 0)",
    "checkpoint.after_manifest": "a save is committed on this machine",
    "upload.before_files": "nothing of a checkpoint is in the bucket",
    "upload.after_files": "this rank's files are in the bucket, those of others may not be",
    "upload.before_commit": "every file is in the bucket, the manifest is not (rank 0)",
    "upload.after_commit": "a checkpoint is committed in the bucket, nothing is pruned (rank 0)",
    "prune.bucket_after_manifest": "an old manifest is deleted from the bucket, its files are there (rank 0)",
    "prune.local_before": "an old local checkpoint is about to be removed",
    "cache.after_write": "a shard's tokens are written under a temporary name",
    "cache.after_rename": "a shard's tokens have their name, and no record vouches for them",
    "prepare.after_journal": "shards are made of raw text, and the journal names them (beside training: rank 0)",
}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> None:
    raise OSError(errno.EIO, "a failpoint of PRETRAIN_FAILPOINT")  # as a disk that fails


def _hang() -> None:
    threading.Event().wait()


def _poison() -> bool:
    return True


ACTIONS: dict[str, Callable[[], bool | None]] = {
    "kill": _kill,
    "stop": _stop,
    "raise": _raise,
    "hang": _hang,
    "poison": _poison,
}


@dataclass
class _Armed:
    """One failpoint that waits for its turn."""

    turns: range
    action: Callable[[], bool | None]
    passes: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # next() is atomic: threads pass, too


def _read(text: str, rank: int) -> dict[str, _Armed]:
    """The failpoints of this rank in the variable's text.

    Raises:
        ConfigError: an unknown name or action, or a count that is none.
    """
    armed = {}
    for part in filter(None, text.split(",")):
        name, count, action = [*part.split(":"), *("", "1", "kill")[part.count(":") + 1 :]][:3]
        action, _, only = action.partition("@")
        numbers = [*count.split("-", 1), only or "0"]
        if name not in FAILPOINTS or action not in ACTIONS or not all(number.isdecimal() for number in numbers):
            raise ConfigError(
                f"{VARIABLE}={part} is not NAME:COUNT:ACTION",
                f"Names: {', '.join(FAILPOINTS)}. Actions: {', '.join(ACTIONS)}, with @RANK on one rank only.",
            )
        turns = range(int(numbers[0]), int(numbers[-2]) + 1)
        if not turns or not turns[0]:
            raise ConfigError(f"{VARIABLE}={part} is never reached", "Count from 1, and FIRST-LAST upwards.")
        if not only or int(only) == rank:
            armed[name] = _Armed(turns, ACTIONS[action])
    return armed


_armed: dict[str, _Armed] = {}


def arm(rank: int) -> None:
    """Take the failpoints from the environment; called once a process.

    Raises:
        ConfigError: the variable can't be read.
    """
    _armed.clear()
    _armed.update(_read(os.environ.get(VARIABLE, ""), rank))


def failpoint(name: str) -> bool:
    """Do what PRETRAIN_FAILPOINT says, if it names this point and its turn has come; whether to poison is the caller's
    to know: True for that action alone."""
    return bool((armed := _armed.get(name)) and next(armed.passes) in armed.turns and armed.action())
