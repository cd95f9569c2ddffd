"""The errors a user can meet: one line that says what is wrong and where, the mend, and an exit code.

Exit codes are a contract with launchers and supervisors:
0 done · 2 config · 3 data · 4 storage · 5 checkpoint · 6 diverged · 75 stopped by a signal after saving.
"""

from __future__ import annotations

from collections.abc import Mapping

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_STOPPED = 75  # BSD's EX_TEMPFAIL: nothing is wrong, start me again


class TrainerError(Exception):
    """Base of every expected error.

    Args:
        what: what is wrong and where, without a full stop at the end.
        mend: what the user can do about it.
    """

    exit_code = EXIT_UNEXPECTED
    kind = "error"
    shared = False  # True where every rank raises the same error, so that only rank 0 prints it

    def __init__(self, what: str, mend: str = "") -> None:
        self.what = what.rstrip(".")
        self.mend = mend
        super().__init__(f"{self.what}. {mend}".strip() if mend else self.what)

    def line(self) -> str:
        """The one line a user reads: kind, what is wrong, and the mend."""
        return f"{self.kind}: {' '.join(str(self).split())}"

    def told(self) -> dict[str, str]:
        """What another process needs to raise it, too; see `error_of`."""
        return {"kind": self.kind, "what": self.what, "mend": self.mend}


class ConfigError(TrainerError):
    """The settings can't work together or on this machine; ``problems`` holds every one found."""

    exit_code = 2
    kind = "config error"
    shared = True  # every rank has the same settings

    def __init__(self, what: str | list[str], mend: str = "") -> None:
        self.problems = [what] if isinstance(what, str) else list(what)
        super().__init__("; ".join(self.problems), mend)

    def line(self) -> str:
        """One line for one problem; for several, one line each under a count."""
        if len(self.problems) == 1:
            return super().line()
        lines = [f"{self.kind}: {len(self.problems)} problems"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        return "\n".join(lines + ([f"  {self.mend}"] if self.mend else []))


class ShardError(TrainerError):
    """A shard or a set of shards can't be trained on."""

    exit_code = 3
    kind = "data error"


class StorageError(TrainerError):
    """A bucket, an object or a disk could not be read or written."""

    exit_code = 4
    kind = "storage error"


class CheckpointError(TrainerError):
    """No checkpoint to resume from, a damaged one, or a run that somebody else is writing."""

    exit_code = 5
    kind = "checkpoint error"


class DivergenceError(TrainerError):
    """The loss or the gradients stopped being finite, or the loss spiked, and going back did not help."""

    exit_code = 6
    kind = "diverged"
    shared = True  # the ranks agree on every loss


def error_of(told: Mapping[str, str]) -> TrainerError:
    """The error that another process told."""
    kinds = {kind.kind: kind for kind in TrainerError.__subclasses__()}
    return kinds[told["kind"]](told["what"], told["mend"])
