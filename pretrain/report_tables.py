"""What a report says in words and figures: the state of each run, its ledger, settings, samples, warnings, summary.

Everything here is HTML, and every text of a run goes through `escape`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from pretrain import monitor
from pretrain.console import format_duration
from pretrain.errors import CheckpointError
from pretrain.monitor import Status
from pretrain.run_logs import RunLogs, Tree, number, printable
from pretrain.settings import differing_settings, flat_settings

SAMPLES = 12
SAMPLE_CHARACTERS = 2000
WARNINGS = 20
VALUE_CHARACTERS = 400
BADGES = {
    monitor.DONE: "good",
    monitor.RUNNING: "good",
    monitor.STARTING: "warn",
    monitor.STOPPED: "warn",
    monitor.RESTARTING: "warn",
    monitor.STALLED: "bad",
    monitor.FAILED: "bad",
}
CAUSE_COLOURS = {
    "training": "--c0",
    "data_wait": "--c1",
    "checkpoint": "--c6",
    "eval": "--c3",
    "startup": "--c5",
    "lost": "--c4",
    "stopped": "--c7",
}
Format = Callable[[float], str]
_LEDGER: tuple[tuple[str, str, Format], ...] = (
    ("tokens", "tokens", "{:,.0f}".format),
    ("hours", "hours", "{:,.2f}".format),
    ("restarts", "restarts", "{:,.0f}".format),
    ("lost_steps", "steps lost to restarts", "{:,.0f}".format),
    ("lost_tokens", "tokens lost to restarts", "{:,.0f}".format),
    ("energy_kwh", "energy, kWh", "{:,.3f}".format),
    ("cost_usd", "cost, USD", "{:,.2f}".format),
)


def overview(runs: Sequence[RunLogs], statuses: Sequence[Status]) -> str:
    """A card a run: its state, and its figures as tiles."""
    cards = []
    for index, (run, status) in enumerate(zip(runs, statuses, strict=True)):
        key = f'<i class="key" style="background: var(--c{index % 8})"></i>' if len(runs) > 1 else ""
        badge = f'<span class="badge {BADGES.get(status.state, "idle")}">{escape(status.state)}</span>'
        name = f"{key}<strong>{_text(run.name)}</strong>{badge}"
        detail = f'<span class="muted">{_text(status.detail)}</span>'
        tiles = "".join(f"<div><dt>{_text(label)}</dt><dd>{value}</dd></div>" for label, value in _tiles(run, status))
        notes = "".join(f'<p class="note">{_text(note)}</p>' for note in status.notes)
        cards.append(
            f'<div class="card run"><div class="name">{name}{detail}</div><dl class="tiles">{tiles}</dl>{notes}</div>'
        )
    return f'<section class="runs">{"".join(cards)}</section>'


def _tiles(run: RunLogs, status: Status) -> list[tuple[str, str]]:
    """(label, HTML of its value) of what is known."""
    total = f" <small>of {status.total_steps:,}</small>" if status.total_steps else ""
    speed = number(run.summary, "tokens_per_second") or status.rates.get("tokens_per_second")
    mfu = number(run.summary, "mfu") or status.rates.get("mfu")
    lasted_s = sum(number(record, "step_ms") or 0.0 for record in run.records) / 1e3
    found = [
        ("step", None if status.step is None else f"{status.step:,}{total}"),
        ("tokens", _figure(status.tokens, _compact)),
        ("loss", _figure(status.loss, "{:.4f}".format)),
        ("validation loss", _figure(status.val_loss, "{:.4f}".format)),
        ("tokens/s", _figure(speed, "{:,.0f}".format)),
        ("MFU", _figure(mfu, "{:.1%}".format)),
        ("time in steps", format_duration(lasted_s) if lasted_s else None),
        ("restarts", str(status.restarts)),
        ("in the bucket", f"{status.uploads['committed']} <small>of {status.uploads['saved']} saved</small>"),
    ]
    return [(label, value) for label, value in found if value is not None]


def tables(runs: Sequence[RunLogs], statuses: Sequence[Status]) -> str:
    """Every card below the charts."""
    cards = [_ledgers(runs), _settings(runs), *(_samples(run, len(runs) > 1) for run in runs)]
    cards += [_warnings(run, status, len(runs) > 1) for run, status in zip(runs, statuses, strict=True)]
    cards += [_summaries(runs)]
    return "\n".join(card for card in cards if card)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """A table of texts, the columns behind the first one aligned to the right where they are figures."""
    side = ' class="right"' if right else ""
    names = "".join(f"<th{side if at else ''}>{_text(name)}</th>" for at, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{side if at else ''}>{_text(cell)}</td>" for at, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


# ---- cards ----


def _ledgers(runs: Sequence[RunLogs]) -> str:
    """Where the hours went, over all restarts, of the runs whose summary tells."""
    # pairs, as runs of two places may have one name
    ledgers = [(run.name, ledger) for run in runs if isinstance(ledger := run.summary.get("ledger"), dict)]
    if not ledgers:
        return ""
    bars = "".join(_cause_bar(name, ledger) for name, ledger in ledgers)
    rows = []
    for key, label, form in _LEDGER:
        values = [number(ledger, key) for _, ledger in ledgers]
        if any(value is not None for value in values):
            rows.append([label, *("–" if value is None else form(value) for value in values)])
    table = _table(["", *(name for name, _ in ledgers)], rows, True)
    return f'<section class="card"><h2>Ledger over all restarts</h2>{bars}{table}</section>'


def _cause_bar(name: str, ledger: Tree) -> str:
    causes = ledger.get("hours_by_cause")
    hours = {str(cause): number(causes, cause) or 0.0 for cause in causes} if isinstance(causes, dict) else {}
    total = sum(hours.values())
    if total <= 0:
        return ""
    colours = {cause: CAUSE_COLOURS.get(cause, f"--c{at % 8}") for at, cause in enumerate(hours)}
    parts = "".join(
        f'<i style="width: {100 * value / total:.3f}%; background: var({colours[cause]})"></i>'
        for cause, value in hours.items()
    )
    keys = "".join(
        f'<span><i class="key square" style="background: var({colours[cause]})"></i>'
        f"{_text(cause.replace('_', ' '))} {format_duration(value * 3600)} ({value / total:.1%})</span> "
        for cause, value in hours.items()
        if value
    )
    return (
        f'<div class="chart" style="border: 0; padding: 0"><h3>{_text(name)}</h3><div class="bar">{parts}</div>'
        f'<div class="keys">{keys}</div></div>'
    )


def _settings(runs: Sequence[RunLogs]) -> str:
    """What differs between the runs; of a single one, all its settings."""
    known = [run for run in runs if run.config_text]
    missing = [run.name for run in runs if not run.config_text]
    note = f'<p class="note">no config.yaml is known of {_text(", ".join(missing))}</p>' if missing else ""
    try:
        if len(runs) > 1:
            rows = [
                [key, *map(_value, values)]
                for key, values in differing_settings([run.config_text for run in known]).items()
            ]
            body = _table(["", *(run.name for run in known)], rows) if rows else "<p>The settings are the same.</p>"
            body = body if len(known) > 1 else ""
            return f'<section class="card"><h2>Settings that differ</h2>{body}{note}</section>'
        if not known:
            return ""
        settings = [[key, _value(value)] for key, value in flat_settings(known[0].config_text).items()]
    except CheckpointError as error:
        return f'<section class="card"><h2>Settings</h2><p class="note">{_text(error.what)}</p></section>'
    return f'<details class="card"><summary>Settings</summary>{_table(["setting", "value"], settings)}</details>'


def _samples(run: RunLogs, several: bool) -> str:
    """Texts that the model wrote, the newest first."""
    events = [event for event in run.of_kind("sample") if isinstance(event.get("text"), str)]
    if len(events) > SAMPLES:
        events = [events[round(at * (len(events) - 1) / (SAMPLES - 1))] for at in range(SAMPLES)]
    if not events:
        return ""
    boxes = "".join(
        f'<div><span class="muted">step {_text(event.get("step"))}</span>'
        f"<pre><b>{_cut(str(event.get('prompt', '')))}</b>{_cut(event['text'])}</pre></div>"
        for event in reversed(events)
    )
    return f'<section class="card"><h2>Samples{_of(run, several)}</h2><div class="samples">{boxes}</div></section>'


def _warnings(run: RunLogs, status: Status, several: bool) -> str:
    rows = [
        [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(message.time_s)), message.level.lower(), message.text]
        for message in status.warnings[-WARNINGS:]
    ]
    if not rows:
        return ""
    body = _table(
        ["time", "", "the newest lines of training.log"], [[cell[:VALUE_CHARACTERS] for cell in r] for r in rows]
    )
    return f'<section class="card"><h2>Warnings{_of(run, several)}</h2>{body}</section>'


def _summaries(runs: Sequence[RunLogs]) -> str:
    """summary.json of each run, side by side."""
    flat = [_flat({key: value for key, value in run.summary.items() if key != "ledger"}) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    if not keys:
        return ""
    rows = [[key, *(_value(tree[key]) if key in tree else "–" for tree in flat)] for key in keys]
    body = _table(["", *(run.name for run in runs)], rows)
    return f'<details class="card"><summary>Summary at the end</summary>{body}</details>'


# ---- words ----


def _of(run: RunLogs, several: bool) -> str:
    return f" of {_text(run.name)}" if several else ""


def _text(value: Any) -> str:
    return escape(str(value))


def _cut(text: str) -> str:
    """A sample as it stands, line ends kept, control characters shown, cut where it is too long."""
    lines = "\n".join(printable(line.expandtabs(4)) for line in text[:SAMPLE_CHARACTERS].split("\n"))
    return _text(lines) + ("…" if len(text) > SAMPLE_CHARACTERS else "")


def _value(value: Any) -> str:
    """A setting or a figure in one line."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
    text = f"{value:.6g}" if isinstance(value, float) else text
    shown = text if isinstance(text, str) else json.dumps(text, default=str)
    return shown[:VALUE_CHARACTERS] if shown else "''"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _figure(value: float | None, form: Format) -> str | None:
    return None if value is None else form(value)


def _compact(value: float) -> str:
    for unit, mark in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{mark}"
    return f"{value:,.0f}"
