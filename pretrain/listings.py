"""Listings for people: drawn as a table on a terminal, aligned plain text elsewhere; and figures in their words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING = "–"
STYLES = {"yes": "bold green", "NO": "bold red"}

Row = tuple[str, str, str]  # label, value, note


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console,
    *,
    right: Sequence[str] = (),
    title: str = "",
) -> None:
    """Print rows under their columns.

    Args:
        right: the columns of figures, aligned to the right.
    """
    if console.is_terminal:
        table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.padding, table.pad_edge = (0, 1, 0, 0), False  # narrow: a row of `list` should fit
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    if title:
        console.print(title, markup=False, soft_wrap=True)
    for row in [columns, *rows]:
        cells = [
            f"{cell:>{width}}" if column in right else f"{cell:<{width}}"
            for column, cell, width in zip(columns, row, widths, strict=True)
        ]
        console.print("  ".join(cells).rstrip(), markup=False, soft_wrap=True)


def print_fields(title: str, fields: Mapping[str, str], console: Console) -> None:
    """Print names and values below a title, the values aligned."""
    width = max((len(name) for name in fields), default=0)
    console.print(Text(title, style="bold"), soft_wrap=True)
    for name, value in fields.items():
        console.print(f"  {name:<{width}}  {value}", markup=False, soft_wrap=True)


def show_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """A block of labels, values and notes. The value "yes" is green, "NO" is red."""
    if not console.is_terminal:
        label_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"  {label:<{label_width}}  {value:<{value_width}}  {note}".rstrip() for label, value, note in rows]
        for line in [title, *lines, ""]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True, min_width=26)
    table.add_column(min_width=14)
    table.add_column(style="dim")
    for label, value, note in rows:
        table.add_row(f"  {label}", Text(value, style=STYLES.get(value, "bold")), Text(note))
    console.print(table)
    console.print()


def size_text(n_bytes: float) -> str:
    """12 B, 3.4 kB, 127.9 MB, 15.8 GB: decimal units, as buckets and disks are sold."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if n_bytes < 999.95:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} TB"


def age_text(seconds: float) -> str:
    """5 min, 3.2 h, 4.0 d; – where it is not finite."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} d"


def figure_text(value: Any, form: str) -> str:
    """A number in a format such as `.4f`; – where there is none."""
    return format(value, form) if isinstance(value, (int, float)) else NOTHING


def time_text(timestamp: Any) -> str:
    """2026-01-31 12:34 out of an ISO timestamp; – where there is none."""
    return timestamp[:16].replace("T", " ") if isinstance(timestamp, str) else NOTHING
