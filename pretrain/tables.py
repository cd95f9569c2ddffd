"""Figures with their notes: a rich table on a terminal, aligned text in a pipe or a file."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = tuple[str, str, str]  # label, value, note
STYLES = {"yes": "bold green", "NO": "bold red"}


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
