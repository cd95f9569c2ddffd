"""What the doctor finds, and the process in which it looks: a check that hangs or crashes costs its own line alone.

    with Examiner() as examiner:
        findings = examiner.ask(Question("clock", storage_checks.clock, (url,), StorageError))

Questions are asked one after the other, for some of them measure. Each gets its own section of the config, never all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Literal

from pretrain import log
from pretrain.errors import EXIT_DONE, EXIT_UNEXPECTED, ConfigError, TrainerError
from pretrain.processes import end_with_parent

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Args:
        name: snake_case; what was looked at.
        status: ok; warn: training runs, but something should be mended; fail: it won't run; skip: there is nothing to
            look at on this machine or in this config.
        found: what was found, in words.
        mend: what to do about it; '' where nothing.
        exit_code: the contract's, of a fail.
        figures: what was measured, with units in the names.
        trace: of an exception that nobody expected.
        seconds: that its question took.
    """

    name: str
    status: Status
    found: str
    mend: str = ""
    exit_code: int = EXIT_DONE
    figures: Mapping[str, float] = field(default_factory=dict)
    trace: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; "passed" is false for a fail alone."""
        return {
            "name": self.name,
            "status": self.status,
            "found": log.mask(self.found),
            "mend": log.mask(self.mend),
            "exit_code": self.exit_code,
            "figures": dict(self.figures),
            "seconds": round(self.seconds, 2),
            "passed": self.status != "fail",
        }


def ok(name: str, found: str, **figures: float) -> Finding:
    """All is well."""
    return Finding(name, "ok", found, figures=figures)


def warn(name: str, found: str, mend: str, **figures: float) -> Finding:
    """Training runs, but this should be mended."""
    return Finding(name, "warn", found, mend, figures=figures)


def fail(name: str, error: TrainerError, **figures: float) -> Finding:
    """Training won't run: what the error says, and its exit code."""
    return Finding(name, "fail", error.what, error.mend, error.exit_code, figures)


def skip(name: str, why: str) -> Finding:
    """There is nothing to look at."""
    return Finding(name, "skip", why)


def attempt(name: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds; an expected error is a fail."""
    try:
        return look()
    except TrainerError as error:
        return fail(name, error)


@dataclass(frozen=True)
class Question:
    """Something to look at.

    Args:
        name: of its finding, and of the fail where it gives none.
        ask: a function of a module; returns one or several findings.
        arguments: of `ask`.
        kind: of error that a hang or a crash counts as.
        timeout_s: longest time to an answer.
    """

    name: str
    ask: Callable[..., Finding | list[Finding]]
    arguments: tuple[Any, ...] = ()
    kind: type[TrainerError] = ConfigError
    timeout_s: float = 30.0


def exit_code(findings: Sequence[Finding]) -> int:
    """0 where nothing failed, else the lowest code of what did: 2 before 3 before 4, what no restart mends first."""
    return min((finding.exit_code for finding in findings if finding.status == "fail"), default=EXIT_DONE)


class Examiner:
    """A process that answers questions; it is replaced where one of them hangs or crashes it."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")  # a fork would carry over a GPU or threads half-way
        self._output = tempfile.NamedTemporaryFile(prefix="doctor-")  # noqa: SIM115 - libraries' chatter; __exit__ closes
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        self._output.close()

    def ask(self, question: Question) -> list[Finding]:
        """The findings of one question; never an exception of the check."""
        started = time.monotonic()
        findings = self._ask(question)
        seconds = time.monotonic() - started
        return [replace(finding, seconds=seconds) for finding in findings]

    def _ask(self, question: Question) -> list[Finding]:
        connection = self._open()
        try:
            connection.send(question)
            if not connection.poll(question.timeout_s):
                self._end()
                what = f"no answer within {question.timeout_s:.0f} s"
                return [fail(question.name, question.kind(what, "Whatever hangs here would hang the training, too."))]
            found: list[Finding] = connection.recv()
        except (EOFError, ConnectionError):
            what = f"the process that checked it {self._end()}"
            return [fail(question.name, question.kind(what, f"Its last words: {self._last_words()}"))]
        return found

    def _open(self) -> Connection:
        """The connection to the process, which is started where there is none."""
        if self._connection is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_answer_questions, args=(theirs, self._output.name))
            self._process.start()
            theirs.close()
        return self._connection

    def _end(self) -> str:
        """End the process; how it had ended before, in words."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return ""
        connection.close()
        process.join(1)
        code = process.exitcode
        process.kill()
        process.join()
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _last_words(self) -> str:
        """The last line that the process and its libraries printed."""
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "none")


def _answer_questions(connection: Connection, output: str) -> None:
    """The process: findings for questions, until the other end is closed."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the main one ends this one
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    while True:
        try:
            question: Question = connection.recv()
        except EOFError:
            return
        connection.send(answer(question))


def answer(question: Question) -> list[Finding]:
    """The findings of one question; an error of the check is a fail with its mend, one that nobody expected too."""
    try:
        found = question.ask(*question.arguments)
    except TrainerError as error:
        return [fail(question.name, error)]
    except Exception as error:  # noqa: BLE001 - one broken check must not cost the other lines
        words = " ".join(str(error).split())[:200]
        problem = question.kind(f"{type(error).__name__}: {words}", "--debug shows where it comes from.")
        trace = "".join(traceback.format_exception(error))
        return [replace(fail(question.name, problem), trace=trace, exit_code=problem.exit_code or EXIT_UNEXPECTED)]
    return found if isinstance(found, list) else [found]
