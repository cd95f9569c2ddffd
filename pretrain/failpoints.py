"""Faults on purpose: PRETRAIN_FAILPOINT=NAME:COUNT:ACTION does ACTION when NAME is passed for the COUNTth time.

    PRETRAIN_FAILPOINT=checkpoint.after_write:3            SIGKILL, as a machine that is taken away
    PRETRAIN_FAILPOINT=upload.before_commit:1:raise        an OSError, as a disk that fails
    PRETRAIN_FAILPOINT=loop.before_step:20:hang            wait for ever, as a collective whose peer is lost
    PRETRAIN_FAILPOINT=loop.before_step:20:kill@1          on rank 1 only

Several are separated by commas. Where the variable is not set, passing one costs a look at an empty dictionary. A name
that nobody knows is an error at start: a test that injects nothing proves nothing.
"""

from __future__ import annotations

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
}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> None:
    raise OSError("a failpoint of PRETRAIN_FAILPOINT")


def _hang() -> None:
    threading.Event().wait()


ACTIONS: dict[str, Callable[[], None]] = {"kill": _kill, "stop": _stop, "raise": _raise, "hang": _hang}


@dataclass
class _Armed:
    """One failpoint that waits for its turn."""

    count: int
    action: Callable[[], None]
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
        if name not in FAILPOINTS or action not in ACTIONS or not count.isdecimal() or (only and not only.isdecimal()):
            raise ConfigError(
                f"{VARIABLE}={part} is not NAME:COUNT:ACTION",
                f"Names: {', '.join(FAILPOINTS)}. Actions: {', '.join(ACTIONS)}, with @RANK on one rank only.",
            )
        if not only or int(only) == rank:
            armed[name] = _Armed(int(count), ACTIONS[action])
    return armed


_armed: dict[str, _Armed] = {}


def arm(rank: int) -> None:
    """Take the failpoints from the environment; called once a process.

    Raises:
        ConfigError: the variable can't be read.
    """
    _armed.clear()
    _armed.update(_read(os.environ.get(VARIABLE, ""), rank))


def failpoint(name: str) -> None:
    """Do what PRETRAIN_FAILPOINT says, if it names this point and its turn has come."""
    if (armed := _armed.get(name)) and next(armed.passes) == armed.count:
        armed.action()
