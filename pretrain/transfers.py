"""What a person sees of files on their way: a bar with MB/s and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_EVERY_S = 10.0


class TransferProgress:
    """Counts files and bytes from any number of threads while it is entered.

    Args:
        title: what is going on, e.g. `download`.
        n_files: files in all.
        n_bytes: bytes in all.
        console: where it is drawn.
        every_s: seconds between two plain lines.
        clock: seconds from anywhere, monotonic.
    """

    def __init__(
        self,
        title: str,
        n_files: int,
        n_bytes: int,
        console: Console,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.n_files, self.n_bytes = title, n_files, n_bytes
        self.files = 0
        self.bytes = 0
        self._console = console
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._started_s = self._line_s = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> TransferProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._label(), total=self.n_bytes)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            self._console.print(self.line(), highlight=False, soft_wrap=True)

    def add_bytes(self, n_bytes: int) -> None:
        """So many bytes arrived; negative where a try that failed takes its own back."""
        with self._lock:
            self.bytes += n_bytes
            self._show()

    def add_file(self) -> None:
        """One more file is complete."""
        with self._lock:
            self.files += 1
            self._show()

    def line(self) -> str:
        """Where it stands, in one line."""
        elapsed_s = max(self._clock() - self._started_s, 1e-9)
        rate = self.bytes / elapsed_s
        left_s = (self.n_bytes - self.bytes) / rate if rate > 0 else 0.0
        line = f"{self._label()}, {self.bytes / 1e6:.1f}/{self.n_bytes / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        return f"{line}, {left_s:.0f} s left" if self.bytes < self.n_bytes else f"{line}, {elapsed_s:.1f} s"

    def _label(self) -> str:
        return f"{self.title} {self.files}/{self.n_files} files"

    def _show(self) -> None:
        now = self._clock()
        if self._bar:
            self._bar.update(self._task, completed=self.bytes, description=self._label())
        elif now - self._line_s >= self._every_s:
            self._line_s = now
            self._console.print(self.line(), highlight=False, soft_wrap=True)
