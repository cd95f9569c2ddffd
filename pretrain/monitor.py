"""How a run stands, as its logs tell: in which state it is, how far, how fast, and what somebody should look at.

status = assess(logs, time.time())
print(status.state, status.detail, status.step, status.eta_s)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from pretrain.console import format_duration
from pretrain.errors import EXIT_DONE, EXIT_STOPPED
from pretrain.metrics import FORMAT
from pretrain.power_log import newest_readings
from pretrain.run_logs import LogLine, RunLogs, Tree, number, printable, time_of

RUNNING, STARTING, STALLED, DONE, STOPPED, FAILED, RESTARTING, UNKNOWN = (
    "running",
    "starting",
    "stalled",
    "done",
    "stopped",
    "failed",
    "restarting",
    "unknown",
)
PACE_RECORDS = 100
PHASES = ("data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "checkpoint_ms", "eval_ms", "other_ms")
PATIENCE_S, PATIENCE_RECORDS = 60.0, 20  # without a record a run counts as stalled: the longer of the two
START_PATIENCE_S = 1800.0  # before the first step: a model is built, shards are fetched, kernels are compiled
COPY_PATIENCE_S, COPY_PATIENCE_COMMITS = 900.0, 3  # the same of logs that come with the checkpoints
SPARK_POINTS = 400
WARNINGS = 20


@dataclass(frozen=True)
class Status:
    """One run at one moment; None is what its logs don't tell.

    Args:
        state: one of the constants above.
        detail: the state in words.
        age_s: since its newest record or event.
        rates: of the newest record: tokens_per_second, steps_per_second, step_ms, mfu, mfu_causal.
        phases: mean milliseconds a step over the newest records, by field of the record.
        devices: a row each: device, power_w, utilization, memory_gb, temperature_c, what is known of them.
        losses: (steps, nats a token), thinned.
        checkpoint: the newest one: name, step, age_s, committed (in the bucket).
        uploads: how many were saved, committed, failed (and not committed since), dropped.
        warnings: the newest, oldest first.
        notes: what the reader should know of the logs themselves.
    """

    name: str
    where: str
    state: str
    detail: str
    age_s: float | None
    step: int | None
    total_steps: int | None
    eta_s: float | None
    tokens: float | None
    files: float | None
    loss: float | None
    val_loss: float | None
    val_step: int | None
    lr: float | None
    grad_norm: float | None
    loss_scale: float | None
    skipped_updates: float | None
    restarts: int
    rates: dict[str, float]
    phases: dict[str, float]
    devices: list[Tree]
    losses: tuple[list[int], list[float]]
    checkpoint: Tree | None
    uploads: dict[str, int]
    ledger: Tree
    warnings: list[LogLine]
    notes: list[str]

    @property
    def fraction(self) -> float | None:
        """Of the run that is done, 0 to 1."""
        return min((self.step or 0) / self.total_steps, 1.0) if self.total_steps else None

    def to_json(self) -> Tree:
        """As one JSON object; what JSON lacks is null."""
        tree: Tree = _finite({**asdict(self), "fraction": self.fraction})
        del tree["losses"]
        return tree


def assess(logs: RunLogs, now: float, copied_s: float | None = None) -> Status:
    """How a run stands.

    Args:
        logs: refreshed.
        now: seconds since 1970.
        copied_s: when they were copied, where they are a copy that comes with the checkpoints; else None.
    """
    last = logs.records[-1] if logs.records else {}
    state, detail, age_s = _state(logs, now, copied_s)
    validated = next((each for each in reversed(logs.records) if number(each, "val_loss") is not None), {})
    rates = ("tokens_per_second", "steps_per_second", "step_ms", "mfu", "mfu_causal", "energy_j_per_token")
    return Status(
        name=logs.name,
        where=logs.where,
        state=state,
        detail=printable(detail),
        age_s=age_s,
        step=last.get("step"),
        total_steps=logs.total_steps,
        eta_s=_eta_s(logs) if state == RUNNING else None,
        tokens=number(last, "tokens"),
        files=number(last, "files"),
        loss=number(last, "loss"),
        val_loss=number(validated, "val_loss"),
        val_step=validated.get("step"),
        lr=number(last, "lr"),
        grad_norm=number(last, "grad_norm"),
        loss_scale=number(last, "loss_scale"),
        skipped_updates=number(last, "skipped_updates"),
        restarts=len(logs.of_kind("resumed")),
        rates={name: value for name in rates if (value := number(last, name)) is not None},
        phases=_phases(logs.records[-PACE_RECORDS:]),
        devices=newest_readings(logs.folder) or _device_of(last),
        losses=_thinned(logs.records),
        checkpoint=_checkpoint(logs, now),
        uploads=_uploads(logs),
        ledger=_tree(logs.summary.get("ledger")),
        warnings=[message for message in logs.messages if message.is_warning][-WARNINGS:],
        notes=_notes(logs),
    )


# ---- the state ----


def _state(logs: RunLogs, now: float, copied_s: float | None) -> tuple[str, str, float | None]:
    """(state, in words, seconds since anything was written)."""
    if logs.is_empty or logs.updated_s is None:
        return UNKNOWN, "nothing is recorded yet", None
    age_s = max(now - logs.updated_s, 0.0)
    ended = logs.ended or _end_of_an_older_version(logs)
    restart = logs.restarts[-1] if logs.restarts and time_of(logs.restarts[-1]) >= logs.updated_s else None
    if restart and not ended:
        code, reason = restart.get("exit_code"), restart.get("reason", "")
        return RESTARTING, f"restarted {_ago(now - time_of(restart))}: exit code {code}, {reason}", age_s
    if ended:
        return (*_end(ended), age_s)
    start = logs.starts[-1] if logs.starts else {}
    if start and not any(time_of(record) >= time_of(start) for record in logs.records[-1:]):
        told = f"started {_ago(now - time_of(start))}, no step yet"
        return STALLED if age_s > START_PATIENCE_S else STARTING, told, age_s
    quiet_s = now - max(copied_s or 0.0, logs.updated_s)
    if quiet_s > (patience_s := _patience_s(logs, copied_s is not None)):
        return (
            STALLED,
            f"no record for {format_duration(quiet_s)} (expected within {format_duration(patience_s)})",
            age_s,
        )
    if copied_s is not None:
        return RUNNING, f"as of the copy made {_ago(now - copied_s)}", age_s
    return RUNNING, f"last record {_ago(age_s)}", age_s


UNTOLD = "it does not say how"


def _end(ended: Mapping[str, Any]) -> tuple[str, str]:
    code, reason = ended.get("exit_code"), str(ended.get("reason", UNTOLD))
    if code == EXIT_DONE:
        return DONE, "complete" if reason in ("done", UNTOLD) else reason
    if code == EXIT_STOPPED:
        return STOPPED, f"exit code {EXIT_STOPPED}: {reason}; start it again with --resume auto"
    return FAILED, f"exit code {code}: {reason}" if code is not None else reason


def _end_of_an_older_version(logs: RunLogs) -> Tree | None:
    """The end as summary.json has it, where no event tells of it: of the steps that the records end with."""
    steps = logs.summary.get("steps")
    if any("format" in start for start in logs.starts) or not logs.records or steps != logs.records[-1]["step"]:
        return None
    is_stopped = logs.summary.get("finished") is False
    return {"exit_code": EXIT_STOPPED, "reason": "stopped by a signal"} if is_stopped else {"exit_code": EXIT_DONE}


def _patience_s(logs: RunLogs, is_copy: bool) -> float:
    """Seconds of silence that mean nothing: some times what lies between two records, or two copies."""
    if is_copy:
        gap_s = _median_gap_s(logs.of_kind("checkpoint_committed"))
        return max(COPY_PATIENCE_S, COPY_PATIENCE_COMMITS * gap_s)
    return max(PATIENCE_S, PATIENCE_RECORDS * _median_gap_s(logs.records[-PACE_RECORDS:]))


def _median_gap_s(trees: Sequence[Mapping[str, Any]]) -> float:
    times = [time_of(tree) for tree in trees if time_of(tree)]
    gaps = [later - earlier for earlier, later in pairwise(times) if later >= earlier]
    return statistics.median(gaps) if gaps else 0.0


def _eta_s(logs: RunLogs) -> float | None:
    """Seconds to the last step at the pace of this process's newest records, validations and checkpoints included."""
    if not logs.total_steps or not logs.records:
        return None
    began_s = time_of(logs.starts[-1]) if logs.starts else 0.0
    records = [record for record in logs.records[-PACE_RECORDS:] if time_of(record) >= began_s]
    left: int = max(logs.total_steps - logs.records[-1]["step"], 0)
    if len(records) > 1 and records[-1]["step"] > records[0]["step"]:
        steps: int = records[-1]["step"] - records[0]["step"]
        return left * (time_of(records[-1]) - time_of(records[0])) / steps
    pace = number(logs.records[-1], "steps_per_second")
    return left / pace if pace else None


# ---- the rest ----


def _phases(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean milliseconds of each phase that is recorded; a checkpoint's and a validation's are spread over all steps."""
    found = {}
    for name in PHASES:
        values = [value for record in records if (value := number(record, name)) is not None and math.isfinite(value)]
        if values:
            found[name] = sum(values) / len(records)
    return found


def _device_of(record: Mapping[str, Any]) -> list[Tree]:
    """What the record says of rank 0's node: of all its GPUs at once, or of the host where there is none."""
    is_gpu = any(name.startswith("gpu_") for name in record)
    fields = {
        "power_w": number(record, "gpu_power_w", "power_w"),
        "utilization": number(record, "gpu_utilization", "cpu_utilization"),
        "memory_gb": number(record, "gpu_memory_gb", "host_memory_gb"),
    }
    known = {name: value for name, value in fields.items() if value is not None}
    return [{"device": "GPUs of rank 0's node" if is_gpu else "CPU", **known}] if known else []


def _thinned(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """Losses that are finite: of each stretch of steps the mean, for a chart of a few characters."""
    points = [(record["step"], loss) for record in records if math.isfinite(loss := number(record, "loss") or math.nan)]
    size = max(math.ceil(len(points) / SPARK_POINTS), 1)
    stretches = [points[at : at + size] for at in range(0, len(points), size)]
    return [stretch[-1][0] for stretch in stretches], [statistics.fmean(loss for _, loss in each) for each in stretches]


def _checkpoint(logs: RunLogs, now: float) -> Tree | None:
    saved = logs.of_kind("checkpoint_saved", "checkpoint_committed")
    if not saved:
        return None
    name = saved[-1].get("name", "")
    committed = any(event["kind"] == "checkpoint_committed" and event.get("name") == name for event in saved)
    return {"name": printable(str(name)), "age_s": max(now - time_of(saved[-1]), 0.0), "committed": committed}


def _uploads(logs: RunLogs) -> dict[str, int]:
    def names(kind: str) -> set[str]:
        return {str(event.get("name")) for event in logs.of_kind(kind)}

    saved, committed = names("checkpoint_saved"), names("checkpoint_committed")
    failed = names("upload_failed") - committed
    return {
        "saved": len(saved),
        "committed": len(committed),
        "failed": len(failed),
        "dropped": len(names("checkpoint_dropped")),
    }


def _notes(logs: RunLogs) -> list[str]:
    notes = []
    formats = [start.get("format") for start in logs.starts]
    newest = formats[-1] if formats else None
    if isinstance(newest, int) and newest > FORMAT:
        notes.append(f"written by a newer version (log format {newest}, this one reads {FORMAT}): some may be missing")
    elif newest is None and not logs.is_empty:
        notes.append("written by an older version: how it ended is a guess from summary.json")
    if logs.torn:
        notes.append(f"{logs.torn} damaged line{'s' * (logs.torn > 1)} of metrics.jsonl left out")
    return notes


def _tree(value: Any) -> Tree:
    return value if isinstance(value, dict) else {}


def _ago(seconds: float) -> str:
    return f"{format_duration(max(seconds, 0.0))} ago"


def _finite(value: Any) -> Any:
    """`value` with None for NaN and the infinities."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
