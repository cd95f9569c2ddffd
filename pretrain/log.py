"""The package's log: one console shared with the progress bar, one training.log, and no secret in either."""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pretrain.errors import StorageError

FILE_ONLY = {"file_only": True}
"""`extra=FILE_ONLY` keeps a record off the console, for what the progress bar shows already."""

_ROOT = "pretrain"
_LEVEL_STYLES = {"DEBUG": "dim", "WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}

_SECRET_NAME = (
    r"(?:[\w-]*key(?:_id)?|[\w-]*(?:secret|password|passwd|signature|credential)"
    r"|(?:[\w-]*(?:access|refresh|auth|session|security|hf|api|id)[_-])?token)"
)
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.S), "***"),
    (re.compile(r"\b(Bearer|Authorization: *\w+)\s+[\w.~+/=-]{8,}", re.I), r"\1 ***"),
    # A quoted name, as in a service account's JSON or the repr of a dict: "private_key": "..."
    (re.compile(rf"""(['"]{_SECRET_NAME}['"]\s*:\s*)(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""", re.I), r"\1***"),
    # name=value: environment variables, query strings, keyword arguments
    (re.compile(rf"""(?<![\w-])({_SECRET_NAME}=)(?:"[^"]*"|'[^']*'|[^\s,;&'")\]]+)""", re.I), r"\1***"),
    (re.compile(r"(\w://)[^\s/@:]+:[^\s/@]+@"), r"\1***@"),
    (re.compile(r"\bAIza[\w-]{30,}|\bya29\.[\w.-]+|\bhf_\w{20,}|\bwandb_v1_\w+"), "***"),
)


def mask(text: str) -> str:
    """`text` with everything that looks like a credential replaced by `***`."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class _MaskingFormatter(logging.Formatter):
    """Masks the finished text, so that arguments and tracebacks are covered too, which a logging.Filter never sees."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


class _SharedConsole(Console):
    """Standard output; closing the reader's end (`train.py | head`) silences it instead of ending the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.file.fileno())  # else the interpreter's last flush fails and spoils the exit code
        os.close(devnull)


_CONSOLE = _SharedConsole(highlight=False, emoji=False, markup=False)


def console() -> Console:
    """The one console of the process. Whoever draws a live display or a table draws it here."""
    return _CONSOLE


class _ConsoleHandler(logging.Handler):
    """Prints records on the shared console, above the progress bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            text = Text(self.format(record), style=_LEVEL_STYLES.get(record.levelname, ""))
            _CONSOLE.print(text, soft_wrap=True)  # the terminal wraps: a path stays in one piece for copying
        except (OSError, UnicodeError):  # a terminal that went away must not end the training; the file has the line
            self.handleError(record)


class _TrainingLog(logging.handlers.WatchedFileHandler):
    """training.log, also where another file takes its place; a disk that fills up is said once, and the training goes
    on."""

    failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it is gone, and can't be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename} can't be written any more: {sys.exc_info()[1]}", file=sys.stderr)


def setup(rank: int, folder: Path | None, debug: bool = False) -> None:
    """Send the package's log to the console and to `folder`/training.log; a second call replaces the first.

    Rank 0 shows INFO and above and appends everything, with dates, to training.log. The other ranks show WARNING and
    above, under their rank, and write no file.

    Args:
        rank: global rank of this process.
        folder: folder of training.log, made where it is missing; None: no file (scripts).
        debug: show DEBUG too, on every rank.

    Raises:
        StorageError: `folder` can't be written.
    """
    root = logging.getLogger(_ROOT)
    root.setLevel(logging.DEBUG)
    root.propagate = False  # else a library that configures the root logger prints every line twice
    handlers: list[logging.Handler] = [_console_handler(rank, debug)]
    if rank == 0 and folder is not None:
        handlers.append(_file_handler(folder))
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        root.addHandler(handler)


def get(name: str = _ROOT) -> logging.Logger:
    """The logger `name` under the package's: `get(__name__)` and `get("uploads")` both work."""
    inside = name == _ROOT or name.startswith(f"{_ROOT}.")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")


def _console_handler(rank: int, debug: bool) -> logging.Handler:
    handler = _ConsoleHandler(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_MaskingFormatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s", "%H:%M:%S"))
    return handler


def _file_handler(folder: Path) -> logging.Handler:
    path = folder / "training.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _TrainingLog(path, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path} can't be written: {error.strerror or error}", "Choose another folder with --log.dir"
        ) from error
    handler.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)-7s %(name)s  %(message)s"))
    return handler
