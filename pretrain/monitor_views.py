"""The state of runs on a terminal: a panel each, beside one another where there is room."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain import monitor
from pretrain.charts import draw_text
from pretrain.console import format_duration
from pretrain.listings import NOTHING
from pretrain.monitor import Status

MIN_WIDTH = 58  # of a panel
CHART_ROWS = 9
STYLES = {
    monitor.RUNNING: "green",
    monitor.STARTING: "cyan",
    monitor.DONE: "bold green",
    monitor.STOPPED: "yellow",
    monitor.RESTARTING: "yellow",
    monitor.STALLED: "bold red",
    monitor.FAILED: "bold red",
    monitor.UNKNOWN: "dim",
}
PHASE_STYLES = {
    "data_wait_ms": "red",
    "forward_ms": "blue",
    "backward_ms": "cyan",
    "optimizer_ms": "green",
    "checkpoint_ms": "yellow",
    "eval_ms": "magenta",
    "other_ms": "bright_black",
}
Format = Callable[[Any], str]
_DEVICE: tuple[tuple[str, str, Format], ...] = (
    ("power_w", "W", "{:.0f}".format),
    ("utilization", "busy", "{:.0f} %".format),
    ("memory_gb", "GB", "{:.1f}".format),
    ("temperature_c", "°C", "{:.0f}".format),
    ("sm_clock_mhz", "MHz", "{:.0f}".format),
    ("throttle", "throttle", str),
)


def draw(statuses: Sequence[Status], width: int, warnings: int = 4) -> RenderableType:
    """All runs: side by side where each gets `MIN_WIDTH` characters, else below one another."""
    per_row = max(min(len(statuses), width // MIN_WIDTH), 1)
    rows = [statuses[at : at + per_row] for at in range(0, len(statuses), per_row)]
    grid = Table.grid(expand=True)
    for _ in range(per_row):
        grid.add_column(ratio=1)
    for row in rows:
        panels = [_panel(status, width // per_row - 4, warnings) for status in row]
        grid.add_row(*panels, *[""] * (per_row - len(row)))
    return grid


def print_plain(status: Status, console: Console) -> None:
    """The same as aligned text, where no terminal draws panels."""
    console.print(f"{status.name}: {status.state}, {status.detail}", markup=False, soft_wrap=True)
    rows = [*figures(status), *_work(status), *[("note", note) for note in status.notes]]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        console.print(f"  {label:<{width}}  {value}", markup=False, soft_wrap=True)
    for device in status.devices:
        known = [each for each in _DEVICE if _told(device, each[0]) and device[each[0]] != "none"]
        shown = [f"{form(device[key])} {unit}" for key, unit, form in known]
        console.print(f"  {device['device']:<{width}}  {', '.join(shown)}", markup=False, soft_wrap=True)
    for message in status.warnings[-5:]:
        console.print(f"  {_clock(message.time_s)} {message.level}: {message.text}", markup=False, soft_wrap=True)


def one_line(status: Status) -> str:
    """The state of a run in one line."""
    words = [f"{label} {value}" for label, value in figures(status) if label in ("step", "loss", "tokens/s", "ETA")]
    return " | ".join([f"{status.name}: {status.state}, {status.detail}", *words])


def figures(status: Status) -> list[tuple[str, str]]:
    """(label, value) of what is known of the training."""
    step = NOTHING if status.step is None else f"{status.step:,}"
    total = f" of {status.total_steps:,} ({status.fraction:.1%})" if status.total_steps else ""
    rates = status.rates
    found: list[tuple[str, str | None]] = [
        ("step", step + total),
        ("ETA", None if status.eta_s is None else format_duration(status.eta_s)),
        ("tokens", _figure(status.tokens, ",.0f")),
        ("files", _figure(status.files, ",.0f")),
        ("loss", _figure(status.loss, ".4f")),
        ("val loss", None if status.val_loss is None else f"{status.val_loss:.4f} at step {status.val_step:,}"),
        ("lr", _figure(status.lr, ".2e")),
        ("grad norm", _figure(status.grad_norm, ".3f")),
        ("loss scale", _figure(status.loss_scale, ",.0f")),
        ("skipped", _figure(status.skipped_updates or None, ",.0f")),
        ("tokens/s", _figure(rates.get("tokens_per_second"), ",.0f")),
        ("step time", _figure(rates.get("step_ms"), ",.0f", " ms")),
        ("MFU", _figure(rates.get("mfu"), ".1%")),
        ("MFU causal", _figure(rates.get("mfu_causal"), ".1%")),
        ("energy", _figure(rates.get("energy_j_per_token"), ".3g", " J/token")),
        ("restarts", str(status.restarts) if status.restarts else None),
    ]
    return [(label, value) for label, value in found if value is not None]


def _work(status: Status) -> list[tuple[str, str]]:
    """(label, value) of phases, checkpoints and uploads."""
    rows = []
    if status.phases:
        parts = [f"{name.removesuffix('_ms')} {value:,.1f} ms" for name, value in status.phases.items()]
        rows.append(("phases", ", ".join(parts)))
    if status.checkpoint:
        where = "in the bucket" if status.checkpoint["committed"] else "here"
        age = format_duration(status.checkpoint["age_s"])
        rows.append(("checkpoint", f"{status.checkpoint['name']}, {where}, {age} ago"))
    if status.uploads["saved"]:
        counts = [f"{count} {word}" for word, count in status.uploads.items() if count]
        rows.append(("uploads", ", ".join(counts)))
    return rows


# ---- a panel ----


def _panel(status: Status, width: int, warnings: int) -> Panel:
    style = STYLES[status.state]
    parts: list[RenderableType] = [Text.assemble((status.state, style), (f"  {status.detail}", "dim"))]
    if status.fraction is not None:
        bar = Table.grid()  # a bar alone ends no line
        bar.add_row(ProgressBar(total=1.0, completed=status.fraction, width=width, complete_style=style))
        parts.append(bar)
    parts += [_grid(figures(status), width), *_chart(status, width), *_phases(status, width)]
    if status.devices:
        parts += ["", _devices(status)]
    if work := [row for row in _work(status) if row[0] != "phases"]:
        parts += ["", _rows(work)]
    parts += [Text(f"note: {note}", style="yellow") for note in status.notes]
    for message in status.warnings[-warnings:] if warnings else ():
        colour = "yellow" if message.level == "WARNING" else "red"
        parts.append(Text(f"{_clock(message.time_s)} {message.text}", style=colour, overflow="ellipsis", no_wrap=True))
    title = Text.assemble((status.name, "bold"), (f"  {status.where}", "dim"))
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED, border_style=style, padding=(0, 1))


def _grid(pairs: Sequence[tuple[str, str]], width: int) -> Table:
    """Labels and values in as many columns as fit."""
    columns = max(width // 34, 1)
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(columns):
        table.add_column(style="dim")
        table.add_column()
    for at in range(0, len(pairs), columns):
        cells = [cell for pair in pairs[at : at + columns] for cell in pair]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _rows(pairs: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, value in pairs:
        table.add_row(Text(label), Text(value))
    return table


def _chart(status: Status, width: int) -> list[RenderableType]:
    steps, losses = status.losses
    if len(steps) < 2:
        return []
    return ["", Text(draw_text(steps, losses, "loss", width, CHART_ROWS), style="cyan", no_wrap=True)]


def _phases(status: Status, width: int) -> list[RenderableType]:
    """One bar of the share of each phase, and its legend."""
    total = sum(status.phases.values())
    if total <= 0 or len(status.phases) < 2:
        return []
    bar, legend = Text(no_wrap=True), Text()
    for name, value in status.phases.items():
        style = PHASE_STYLES[name]
        bar.append("█" * round(value / total * width), style=style)
        legend.append("■ ", style=style)
        legend.append(f"{name.removesuffix('_ms').replace('_', ' ')} {value:,.1f} ms   ", style="dim")
    return ["", bar, legend]


def _devices(status: Status) -> Table:
    columns = [(key, unit, form) for key, unit, form in _DEVICE if any(_told(row, key) for row in status.devices)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("device", *(unit for _, unit, _ in columns)):
        table.add_column(name, justify="left" if name in ("device", "throttle") else "right")
    for row in status.devices:
        cells = [form(row[key]) if _told(row, key) else NOTHING for key, _, form in columns]
        table.add_row(Text(str(row["device"])), *(Text(cell) for cell in cells))
    return table


def _told(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) not in (None, "")


def _figure(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"


def _clock(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s)) if time_s else "--:--:--"
