"""The points that a report's charts are drawn from: as many as an eye can tell apart, however long the run was.

A run has `x` (step, tokens, hours: parallel lists) and `series`, each with the mean of every stretch of steps and,
where a stretch is more than one step, its lowest and highest value, so that no spike is lost. Values that are not
finite, and stretches that a field is unknown of, are None.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from pretrain.curves import curve_of
from pretrain.errors import EXIT_DONE, EXIT_STOPPED
from pretrain.monitor import PHASES
from pretrain.power_log import Reading, newest_stretch, read_power
from pretrain.run_logs import STARTS, RunLogs, Tree, number, printable, time_of

POINTS = 1500  # of a series
PHASE_POINTS = 240
POWER_POINTS = 500  # of a device
EVENTS = 1000  # of a kind on the time line
CLOSE_UP_S = 12.0

# chart: the fields of a record that may tell it, the first that does counts
FIELDS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "lr": ("lr",),
    "grad_norm": ("grad_norm",),
    "loss_scale": ("loss_scale",),
    "tokens_per_second": ("tokens_per_second",),
    "mfu": ("mfu",),
    "mfu_causal": ("mfu_causal",),
    "step_ms": ("step_ms",),
    "data_wait_ms": ("data_wait_ms",),
    "gpu_memory_gb": ("gpu_memory_gb",),
    "gpu_memory_peak_gb": ("gpu_memory_peak_gb",),
    "host_memory_gb": ("host_memory_gb",),
    "power_w": ("power_w", "gpu_power_w", "cpu_power_w"),
    "utilization": ("gpu_utilization", "cpu_utilization"),
    "energy_j_per_token": ("energy_j_per_token",),
}
WITH_RANGE = ("loss", "grad_norm", "tokens_per_second", "step_ms", "data_wait_ms")


def run_series(run: RunLogs) -> Tree:
    """Everything that the charts of one run show; plain JSON.

    Args:
        run: refreshed.
    """
    began_s = _began_s(run)
    stretches = _stretches(run.records, POINTS)
    ends = [stretch[-1] for stretch in stretches]
    axes = _axes(ends, began_s)
    series: dict[str, Tree] = {}
    for name, fields in FIELDS.items():
        rows = [[number(record, *fields) for record in stretch] for stretch in stretches]
        if any(value is not None for row in rows for value in row):
            series[name] = _summed_up(rows, with_range=name in WITH_RANGE and len(run.records) > POINTS)
    if "loss" in series:
        series["loss"]["smooth"] = _smoothed(run, ends)
    place = _placing(run, began_s)
    return {
        "name": run.name,
        "x": axes,
        "series": series,
        "validation": _validation(run, began_s),
        "restarts": [place(event) for event in run.of_kind("resumed", "rolled_back")[-EVENTS:]],
        "phases": _phases(run, began_s),
        "timeline": _timeline(run, began_s),
        "power": _power(run, began_s),
    }


def _began_s(run: RunLogs) -> float:
    """When the run began, in seconds since 1970."""
    times = [time_of(tree) for tree in (*run.records[:1], *run.starts[:1]) if time_of(tree)]
    return min(times, default=0.0)


def _stretches(records: Sequence[Tree], limit: int) -> list[Sequence[Tree]]:
    """At most `limit` stretches of about as many records each."""
    n_stretches = min(len(records), limit)
    bounds = [len(records) * at // n_stretches for at in range(n_stretches + 1)] if n_stretches else []
    return [records[begin:end] for begin, end in pairwise(bounds)]


def _axes(records: Sequence[Mapping[str, Any]], began_s: float) -> dict[str, list[float | None]]:
    return {
        "step": [record["step"] for record in records],
        "tokens": [number(record, "tokens") for record in records],
        "hours": [_hours(time_of(record), began_s) for record in records],
    }


def _hours(time_s: float, began_s: float) -> float | None:
    return round((time_s - began_s) / 3600, 5) if time_s else None


def _summed_up(rows: Sequence[Sequence[float | None]], with_range: bool) -> Tree:
    """Mean, and lowest and highest, of what is known and finite in each row."""
    known = [[value for value in row if value is not None and math.isfinite(value)] for row in rows]
    found: Tree = {"mean": [short(sum(row) / len(row)) if row else None for row in known]}
    if with_range:
        found["low"] = [short(min(row)) if row else None for row in known]
        found["high"] = [short(max(row)) if row else None for row in known]
    return found


def short(value: float) -> float:
    """Five digits: what a chart can show, and half the size of the page."""
    return float(f"{value:.5g}")


def _smoothed(run: RunLogs, ends: Sequence[Tree]) -> list[float | None]:
    """The smoothed loss at the ends of the stretches."""
    curve = curve_of(run.records, run.events, run.where)
    smoothed = dict(zip(curve.steps, curve.smoothed(), strict=True))
    return [short(value) if (value := smoothed.get(record["step"])) is not None else None for record in ends]


def _validation(run: RunLogs, began_s: float) -> Tree:
    validated = [each for each in run.records if math.isfinite(number(each, "val_loss") or math.nan)]
    thinned = [stretch[-1] for stretch in _stretches(validated, POINTS)]
    return {**_axes(thinned, began_s), "loss": [short(record["val_loss"]) for record in thinned]}


def _placing(run: RunLogs, began_s: float) -> Callable[[Tree], Tree]:
    """Where an event lies on each axis; its tokens are those of the step that it goes on from."""
    steps = [record["step"] for record in run.records]

    def place(event: Tree) -> Tree:
        step = event["step"] if isinstance(event.get("step"), int) else None
        at = bisect_right(steps, step) - 1 if step is not None else -1
        tokens = number(run.records[at], "tokens") if at >= 0 else 0.0
        return {"kind": event["kind"], "step": step, "tokens": tokens, "hours": _hours(time_of(event), began_s)}

    return place


def _phases(run: RunLogs, began_s: float) -> Tree | None:
    """Mean milliseconds of a step in each phase; of versions that did not record them, of the wait and the rest."""
    names = [name for name in PHASES if any(number(record, name) is not None for record in run.records)]
    by_rest = names == ["data_wait_ms"] and any(number(record, "step_ms") is not None for record in run.records)
    if not names or (len(names) == 1 and not by_rest):
        return None
    stretches = _stretches(run.records, PHASE_POINTS)
    values = {name: [_mean_over(stretch, name) for stretch in stretches] for name in names}
    if by_rest:
        total = [_mean_over(stretch, "step_ms") for stretch in stretches]
        waits = values["data_wait_ms"]
        values["step_ms"] = [short(max(whole - wait, 0.0)) for whole, wait in zip(total, waits, strict=True)]
    titles = {"step_ms": "the rest of the step"}
    return {
        **_axes([stretch[-1] for stretch in stretches], began_s),
        "names": [titles.get(name, name.removesuffix("_ms").replace("_", " ")) for name in values],
        "values": list(values.values()),
    }


def _mean_over(stretch: Sequence[Tree], name: str) -> float:
    """The mean over all records of a stretch: where a phase is not recorded it took no time."""
    values = [number(record, name) for record in stretch]
    return short(sum(value for value in values if value is not None and math.isfinite(value)) / len(stretch))


# ---- the time line ----


def _timeline(run: RunLogs, began_s: float) -> Tree:
    """Processes, checkpoints, validations and what went wrong, in hours since the run began."""
    marks = {
        "rolled back": run.of_kind("rolled_back"),
        "diverged": run.of_kind("diverged"),
        "upload failed": run.of_kind("upload_failed"),
        "checkpoint left out": run.of_kind("checkpoint_skipped", "checkpoint_dropped"),
    }
    validated = [record for record in run.records if number(record, "val_loss") is not None]
    return {
        "processes": _processes(run, began_s),
        "checkpoints": _checkpoints(run, began_s),
        "validations": [_hours(time_of(record), began_s) for record in _thinned(validated)],
        "marks": [
            {"kind": kind, "hours": _hours(time_of(event), began_s), "step": event.get("step")}
            for kind, events in marks.items()
            for event in _thinned(events)
        ],
    }


def _thinned(trees: Sequence[Tree]) -> list[Tree]:
    return [stretch[-1] for stretch in _stretches(trees, EVENTS)]


def _processes(run: RunLogs, began_s: float) -> list[Tree]:
    """Each start, how long it lasted as far as can be seen, and how it ended."""
    times = sorted(time_of(each) for each in (*run.events, *run.records))
    ends: list[Tree | None] = []
    for event in run.events:
        if event["kind"] in STARTS:
            ends.append(None)
        elif event["kind"] == "ended" and ends:
            ends[-1] = event
    starts = run.starts
    found = []
    for start, ended, after in zip_longest(starts, ends, starts[1:]):
        until_s = time_of(after) if after else math.inf
        last_s = times[bisect_left(times, until_s) - 1]
        how, text = _how_it_ended(start, ended, until_s, run)
        hours = {"from": _hours(time_of(start), began_s), "to": _hours(max(last_s, time_of(start)), began_s)}
        found.append({**hours, "step": start.get("step"), "how": how, "text": printable(text)})
    return found[-EVENTS:]


def _how_it_ended(start: Tree, ended: Tree | None, until_s: float, run: RunLogs) -> tuple[str, str]:
    """(done, stopped, failed, killed or open, in words)."""
    if ended:
        code = ended.get("exit_code")
        how = {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}.get(code if isinstance(code, int) else -1, "failed")
        return how, str(ended.get("reason", ""))
    if until_s == math.inf or "format" not in start:  # it runs, was killed just now, or is of an older version
        return "open", "no end is recorded"
    reasons = [each for each in run.restarts if time_of(start) <= time_of(each) < until_s]
    reason = f": exit code {reasons[-1].get('exit_code')}, {reasons[-1].get('reason')}" if reasons else ""
    return "killed", f"ended without a word{reason}"


def _checkpoints(run: RunLogs, began_s: float) -> list[Tree]:
    """Each save with its commit in the bucket, if there was one."""
    commits: dict[str, list[float]] = defaultdict(list)
    for event in run.of_kind("checkpoint_committed"):
        commits[str(event.get("name"))].append(time_of(event))
    found = []
    for event in _thinned(run.of_kind("checkpoint_saved")):
        name, saved_s = str(event.get("name")), time_of(event)
        committed_s = next((time_s for time_s in commits[name] if time_s >= saved_s), None)
        hours = None if committed_s is None else _hours(committed_s, began_s)
        found.append({"name": name, "saved": _hours(saved_s, began_s), "committed": hours, "bytes": event.get("bytes")})
    return found


# ---- power ----


def _power(run: RunLogs, began_s: float) -> Tree | None:
    """Power and utilization of each device over the run, and the last seconds of the run in full; None without them."""
    readings = read_power(run.folder)
    if not any("power_w" in each or "utilization" in each for each in readings):
        return None
    close_up = newest_stretch(run.folder, CLOSE_UP_S)
    return {"devices": _by_device(readings, began_s), "close_up": _close_up(close_up)}


def _by_device(readings: Sequence[Reading], began_s: float) -> list[Tree]:
    devices: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        devices[reading["gpu"]].append(reading)
    found = []
    for device, own in sorted(devices.items()):
        stretches = _stretches(own, POWER_POINTS)
        row: Tree = {"device": device, "hours": [_hours(stretch[-1]["time"], began_s) for stretch in stretches]}
        for field in ("power_w", "utilization", "temperature_c"):
            rows = [[number(reading, field) for reading in stretch] for stretch in stretches]
            if any(value is not None for each in rows for value in each):
                row[field] = _summed_up(rows, with_range=False)["mean"]
        found.append(row)
    return found


def _close_up(readings: Sequence[Reading]) -> Tree | None:
    """Seconds before the end of the log, each device's power, and the phases of the first one as stretches."""
    told = [reading for reading in readings if "power_w" in reading]
    if not told:
        return None
    end_s = told[-1]["time"]
    devices: dict[str, Tree] = {}
    for reading in told:
        line = devices.setdefault(reading["gpu"], {"device": reading["gpu"], "seconds": [], "power_w": []})
        line["seconds"].append(round(reading["time"] - end_s, 3))
        line["power_w"].append(short(reading["power_w"]))
    first = [reading for reading in told if reading["gpu"] == told[0]["gpu"]]
    bands: list[Tree] = []
    for reading, after in zip(first, [*first[1:], first[-1]], strict=True):
        until = round(after["time"] - end_s, 3)
        phase = str(reading.get("phase", "")).replace("_", " ")
        if bands and bands[-1]["phase"] == phase:
            bands[-1]["to"] = until
        else:
            bands.append({"phase": phase, "from": round(reading["time"] - end_s, 3), "to": until})
    return {"devices": list(devices.values()), "bands": bands}
