from __future__ import annotations

import io

from rich.console import Console

from pretrain.transfers import TransferProgress


def watch(terminal):
    """A progress of 2 files and 3 MB under a clock of our own, and what it printed."""
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    progress = TransferProgress("download", 2, 3_000_000, console, every_s=10, clock=lambda: now[0])
    return progress, now, out


def test_plain_lines_come_at_most_every_so_often_and_at_the_end():
    progress, now, out = watch(terminal=False)
    with progress:
        for second in range(1, 25):
            now[0] = second
            progress.add_bytes(100_000)
        progress.add_file()
        progress.add_bytes(600_000)
        progress.add_file()
    assert out.getvalue().splitlines() == [
        "download 0/2 files, 1.0/3.0 MB, 0.1 MB/s, 20 s left",
        "download 0/2 files, 2.0/3.0 MB, 0.1 MB/s, 10 s left",
        "download 2/2 files, 3.0/3.0 MB, 0.1 MB/s, 24.0 s",
    ]


def test_a_failed_try_takes_its_bytes_back():
    progress, _, _ = watch(terminal=False)
    with progress:
        progress.add_bytes(500)
        progress.add_bytes(-500)
    assert progress.bytes == 0


def test_a_terminal_gets_a_bar_and_the_last_line():
    progress, now, out = watch(terminal=True)
    with progress:
        now[0] = 2.0
        progress.add_bytes(3_000_000)
        progress.add_file()
        progress.add_file()
    assert "━" in out.getvalue()
    assert "download 2/2 files, 3.0/3.0 MB, 1.5 MB/s, 2.0 s" in out.getvalue()
