"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from pretrain import log
from pretrain.sinks import Sink

LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.1
PACE_RECORDS = 100  # the ETA follows the mean pace of so many records: validations and checkpoints are in it

_log = log.get(__name__)


class ConsoleSink(Sink):
    """A progress bar on a terminal; elsewhere a plain line at most every `every_s` seconds, and always for the first
    record, the last one and those with a validation. The lines go to training.log in both cases.

    Args:
        total_steps: step at which the run ends.
        every_s: seconds between two lines.
        clock: seconds from anywhere, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._every_s = every_s
        self._clock = clock
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_RECORDS)
        self._line_s: float | None = None
        self._bar = _Bar(total_steps, clock) if _draws(log.console()) else None

    def write(self, record: Mapping[str, Any]) -> None:
        now, step = self._clock(), record["step"]
        self._pace.append((now, step))  # from the end of the first step on, which carries compilation and warm-up
        eta_s = self._eta_s(step, record.get("steps_per_second"))
        last = step >= self._total_steps
        if self._bar:
            self._bar.draw(record, eta_s, at_once=last)
        if self._line_s is None or last or "val_loss" in record or now - self._line_s >= self._every_s:
            self._line_s = now
            _log.info(format_step(record, self._total_steps, eta_s), extra=log.FILE_ONLY if self._bar else None)

    def _eta_s(self, step: int, steps_per_second: float | None) -> float | None:
        """Seconds to the last step at the pace of the latest records; the record's own pace while there is only one."""
        (then, from_step), (now, to_step) = self._pace[0], self._pace[-1]
        remaining = max(self._total_steps - step, 0)
        if to_step > from_step:
            return remaining * (now - then) / (to_step - from_step)
        return remaining / steps_per_second if steps_per_second else None

    def close(self) -> None:
        if self._bar:
            self._bar.close()


def _draws(console: Console) -> bool:
    """Whether a live display works there: a terminal that can move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


class _Bar:
    """The bar, and below it the figures of the newest record and of the newest validation."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._drawn_s = float("-inf")
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            expand=True,
            console=log.console(),
        )
        self._task = self._progress.add_task("", total=total_steps, eta="-")
        self._figures = Text()
        self._val_loss: float | None = None
        # No refresh thread: the training draws when it has something new, and owns the interpreter otherwise.
        self._live = Live(self._frame(), console=log.console(), auto_refresh=False)
        self._started = False

    def _frame(self) -> Group:
        return Group(self._progress, self._figures)

    def draw(self, record: Mapping[str, Any], eta_s: float | None, at_once: bool) -> None:
        """Show a record, unless the last drawing is too fresh for an eye to tell."""
        eta = "-" if eta_s is None else format_duration(eta_s)
        self._progress.update(self._task, completed=record["step"], eta=eta)
        self._val_loss = record.get("val_loss", self._val_loss)
        figures = _figures({**record, "val_loss": self._val_loss})
        self._figures = Text(_packed(figures, log.console().width), style="dim")
        now = self._clock()
        if not at_once and now - self._drawn_s < DRAW_EVERY_S:
            return
        self._drawn_s = now
        if not self._started:
            self._started = True
            self._live.start()
            log.console().show_cursor(True)  # a killed run must not leave a terminal without its cursor
        self._live.update(self._frame(), refresh=True)

    def close(self) -> None:
        """Leave the bar as it stands, below it room for the shell."""
        if self._started:
            self._live.update(self._frame(), refresh=True)
            self._live.stop()


def format_step(record: Mapping[str, Any], total_steps: int, eta_s: float | None) -> str:
    """`step 120/244 | loss 5.1234 | lr 1.93e-03 | …`: one record as a plain line."""
    step = f"step {record['step']:>{len(str(total_steps))}}/{total_steps}"
    eta = [] if eta_s is None else [f"ETA {format_duration(eta_s)}"]
    return " | ".join([step, *_figures(record), *eta])


_FIGURES: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("loss", lambda value: f"loss {value:.4f}"),
    ("val_loss", lambda value: f"val loss {value:.4f}"),
    ("lr", lambda value: f"lr {value:.2e}"),
    ("grad_norm", lambda value: f"grad {value:.2f}"),
    ("tokens_per_second", lambda value: f"{value:,.0f} tok/s"),
    ("steps_per_second", lambda value: f"{value:.2f} steps/s"),
    ("mfu", lambda value: f"MFU {_percent(value)}"),
    ("files", lambda value: f"files {value:,}"),
    ("data_wait_ms", lambda value: f"wait {value:.1f} ms"),
    ("gpu_utilization", lambda value: f"GPU {value:.0f} %"),
    ("gpu_memory_gb", lambda value: f"{value:.1f} GB"),
    ("loss_scale", lambda value: f"scale {value:,.0f}"),
    ("skipped_updates", lambda value: f"skipped {value}" if value else ""),
)


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.1f} %"


def _figures(record: Mapping[str, Any]) -> list[str]:
    """What a line shows of a record, in the order of its use to a reader."""
    shown = (text(record[key]) for key, text in _FIGURES if record.get(key) is not None)
    return [text for text in shown if text]


def _packed(words: Sequence[str], width: int) -> str:
    """`words` with bars between them, broken into lines of `width` characters only where a bar would be."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 3 + len(word) <= width:
            lines[-1] += f" | {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """1:45, 2:03:04 or 3 d 04:05: what fits a line."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


_SUMMARY_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    # key, label, format
    ("files_processed", "files", "{:,}".format),
    ("shards_skipped", "shards skipped", "{:,}".format),
    ("tokens", "tokens", "{:,}".format),
    ("steps", "steps", "{:,}".format),
    ("first_loss", "first loss", "{:.4f}".format),
    ("last_loss", "last loss", "{:.4f}".format),
    ("val_loss", "validation loss", "{:.4f}".format),
    ("unigram_entropy", "unigram entropy", "{:.4f}".format),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    ("mfu", "MFU", _percent),
    ("mfu_causal", "MFU, causal", _percent),
    ("checkpoints_committed", "checkpoints committed", "{:,}".format),
    ("checkpoints_verified", "checkpoints verified", "{:,}".format),
    ("uploads_failed", "uploads failed", "{:,}".format),
    ("time", "time", str),
    ("lost", "work done twice", str),
    ("energy_kwh", "energy", "{:,.3g} kWh".format),
    ("cost_usd", "cost", "{:,.2f} USD".format),
    ("logs", "logs", str),
    ("checkpoints", "checkpoints", str),
)


def _of_the_ledger(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of the ledger, by the keys of its rows; times and losses are in words."""
    if not (hours := ledger.get("hours")):
        return {}
    causes = dict(ledger["hours_by_cause"])
    stopped_s = causes.pop("stopped") * 3600
    shares = sorted(causes.items(), key=lambda item: -item[1])
    where = [f"{cause.replace('_', ' ')} {_percent(part / hours)}" for cause, part in shares if part / hours >= 0.001]
    stopped = f"; stopped for {format_duration(stopped_s)} besides" if stopped_s >= 1 else ""
    shown = {**ledger, "time": f"{format_duration(hours * 3600)}: {', '.join(where)}{stopped}"}
    if ledger["restarts"] or ledger["lost_steps"]:
        restarts = f"{ledger['restarts']} restart{'s' * (ledger['restarts'] != 1)}"
        shown["lost"] = f"{ledger['lost_steps']:,} steps, {ledger['lost_tokens']:,} tokens; {restarts}"
    return shown


def print_summary(summary: Mapping[str, Any], console: Console, commands: Sequence[tuple[str, str]] = ()) -> None:
    """The final table of a run, and the next commands to try: a rich table on a terminal, aligned text elsewhere.

    Args:
        summary: the fields of summary.json; what is missing or None has no row.
        console: where to print; `log.console()`.
        commands: (what it does, command) in the order to show them.
    """
    summary = {**_of_the_ledger(summary.get("ledger", {})), **summary}
    rows = [(label, text(summary[key])) for key, label, text in _SUMMARY_ROWS if summary.get(key) is not None]
    rows += [(key, f"{value:.2%}") for key, value in summary.items() if key.startswith("share/")]
    console.print()
    if console.is_terminal:
        table = Table(show_header=False, title="Run finished", title_justify="left", title_style="bold")
        for label, value in rows:
            table.add_row(label, Text(value, style="bold", overflow="fold"))
        console.print(table)
    else:
        width = max((len(label) for label, _ in rows), default=0)
        for label, value in rows:
            console.print(f"{label:<{width}}  {value}", markup=False, soft_wrap=True)
    for what, command in commands:
        console.print(f"\n{what}:\n    {command}", markup=False, soft_wrap=True)
    console.print()
