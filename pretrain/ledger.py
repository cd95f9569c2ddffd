"""What a run has taken so far, over all its starts: tokens, hours by their cause, energy, money, and lost work.

Drawn from the lines of metrics.jsonl and events.jsonl in the order of their times: those of earlier starts are read
back, those of this one are fed as they are written. Time goes by the wall clock:

    startup     from the start of a process to its first step
    training    forward, backward, update, and what the loop does between them
    data_wait   waiting for batches
    checkpoint  waiting for copies, and at the end for the last save and its upload
    eval        validations and samples
    lost        all of this, for steps that were taken again after a restart or a roll-back; and what a process
                did after its last record, where it was killed
    stopped     no process ran; not part of the run's hours

Steps that were taken and never recorded can't be counted: with `log.interval` 10 that is up to nine of each kill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import TrainConfig

CAUSES = ("training", "data_wait", "checkpoint", "eval", "startup", "lost", "stopped")
RESTARTS_FILE = "restarts.jsonl"  # the supervisor's: when it found that a process was gone
HOUR_S = 3600.0
JOULES_OF_KWH = 3.6e6


@dataclass(frozen=True)
class Stretch:
    """The steps that one record stands for.

    Args:
        first, last: steps before it, and at its end.
        tokens: trained on in it.
        seconds: by cause.
    """

    first: int
    last: int
    tokens: int
    seconds: Mapping[str, float]

    def until(self, step: int) -> Stretch:
        """Its part up to a step within."""
        share = (step - self.first) / (self.last - self.first)
        seconds = {cause: value * share for cause, value in self.seconds.items()}
        return Stretch(self.first, step, round(self.tokens * share), seconds)


class Ledger:
    """The books of one run.

    Attributes:
        furthest_step: the highest step recorded since the run last began at 0.
        seen_s: time of the newest line, seconds since 1970.
    """

    def __init__(self) -> None:
        self.furthest_step = 0
        self.seen_s = 0.0
        self._starts = 0
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._device_s = 0.0  # of all ranks together
        self._energy_j: float | None = 0.0
        self._lost_steps = self._lost_tokens = 0
        self._stretches: list[Stretch] = []
        self._step = self._tokens = 0  # where the run stands
        self._world_size = 1
        self._booked_s: float | None = None  # the time up to which every second has its cause
        self._runs = self._has_records = False

    # ---- what is fed ----

    def record(self, record: Mapping[str, Any]) -> None:
        """Take in a line of metrics.jsonl."""
        now_s, step, tokens = float(record["time"]), int(record["step"]), int(record.get("tokens", self._tokens))
        steps = max(step - self._step, 1)
        if step <= self._step:  # of a version that wrote no event of going back
            self._go_back(step - 1)
        known = {
            "startup": 0.0,
            "eval": record.get("eval_ms", 0.0) / 1e3,
            "checkpoint": record.get("checkpoint_ms", 0.0) / 1e3,
            "data_wait": record.get("data_wait_ms", 0.0) / 1e3 * steps,
        }
        passed_s = self._passed_s(now_s)
        if not self._has_records and "step_ms" in record:
            in_steps_s = record["step_ms"] / 1e3 * steps + known["eval"] + known["checkpoint"]
            known["startup"] = max(passed_s - in_steps_s, 0.0)
        seconds = {}
        for cause, value in known.items():  # never more than what has passed, whatever the clocks say
            seconds[cause] = min(value, passed_s)
            passed_s -= seconds[cause]
        seconds["training"] = passed_s
        startup_s = seconds.pop("startup")
        self._book("startup", startup_s)
        for cause, value in seconds.items():
            self._book(cause, value)
        self._stretches.append(Stretch(self._step, step, max(tokens - self._tokens, 0), seconds))
        self._step, self._tokens, self._booked_s, self._has_records = step, tokens, now_s, True
        self.seen_s = max(self.seen_s, now_s)
        self.furthest_step = max(self.furthest_step, step)
        self._add_energy(record)

    def event(self, kind: str, time_s: float, fields: Mapping[str, Any]) -> None:
        """Take in a line of events.jsonl."""
        if kind in ("started", "resumed"):
            self._begin(time_s, fields)
        elif kind == "rolled_back":
            self._book("lost", self._passed_s(time_s))
            self._booked_s = time_s
            self._go_back(int(fields["step"]))
        elif kind == "energy":
            self._add_energy(fields)
        elif kind == "ended":
            self._book("checkpoint" if self._has_records else "startup", self._passed_s(time_s))
            self._booked_s, self._runs = time_s, False
        self.seen_s = max(self.seen_s, time_s)

    def _add_energy(self, fields: Mapping[str, Any]) -> None:
        if self._energy_j is not None:
            self._energy_j += fields.get("energy_j", 0.0)

    def _begin(self, time_s: float, fields: Mapping[str, Any]) -> None:
        """A process has started; before it comes what the one before left open."""
        began_s = float(fields.get("process_began", time_s))
        if "carried" in fields:
            self._carry_over(fields["carried"])
        elif self._booked_s is not None:
            if self._runs:  # it was killed
                self._book("lost", max(self.seen_s - self._booked_s, 0.0))
            self._seconds["stopped"] += max(began_s - max(self.seen_s, self._booked_s), 0.0)
        self._starts += 1
        self._world_size = int(fields.get("world_size", self._world_size))
        if not fields.get("measures_energy", False):
            self._energy_j = None
        step = int(fields.get("step", 0))
        self._go_back(step)
        if not step:
            self.furthest_step = 0
        self._booked_s = self.seen_s = began_s
        self._runs, self._has_records = True, False

    def _carry_over(self, totals: Mapping[str, Any]) -> None:
        """Begin with what a checkpoint tells of a run whose logs are on another machine."""
        self._stretches, self._booked_s, self._runs = [], None, False
        self._starts = int(totals["restarts"]) + 1
        self._seconds = {cause: float(totals["hours_by_cause"][cause]) * HOUR_S for cause in CAUSES}
        self._device_s = float(totals["gpu_hours"]) * HOUR_S
        energy = totals["energy_kwh"]
        self._energy_j = None if energy is None else float(energy) * JOULES_OF_KWH
        self._lost_steps, self._lost_tokens = int(totals["lost_steps"]), int(totals["lost_tokens"])
        self._step, self._tokens = int(totals["step"]), int(totals["tokens"])
        self.furthest_step = furthest_step(totals)

    def _passed_s(self, now_s: float) -> float:
        return 0.0 if self._booked_s is None else max(now_s - self._booked_s, 0.0)

    def _book(self, cause: str, seconds: float) -> None:
        self._seconds[cause] += seconds
        self._device_s += seconds * self._world_size

    def _go_back(self, step: int) -> None:
        """What was done beyond a step is lost."""
        while self._stretches and self._stretches[-1].last > step:
            whole = self._stretches.pop()
            kept = whole.until(max(step, whole.first))
            if kept.last > kept.first:
                self._stretches.append(kept)
            self._lost_steps += whole.last - kept.last
            self._lost_tokens += whole.tokens - kept.tokens
            self._tokens -= whole.tokens - kept.tokens
            for cause, value in whole.seconds.items():
                self._seconds[cause] -= value - kept.seconds[cause]
                self._seconds["lost"] += value - kept.seconds[cause]
        self._step = step

    # ---- what is asked ----

    def hours(self, now_s: float) -> float:
        """Hours that processes of the run have run, up to a time in seconds since 1970."""
        running_s = sum(value for cause, value in self._seconds.items() if cause != "stopped")
        return (running_s + self._open_s(now_s)) / HOUR_S

    def gpu_hours(self, now_s: float) -> float:
        """Hours times ranks, up to a time in seconds since 1970."""
        return (self._device_s + self._open_s(now_s) * self._world_size) / HOUR_S

    def _open_s(self, now_s: float) -> float:
        return self._passed_s(now_s) if self._runs else 0.0

    def totals(self, now_s: float, price_per_gpu_hour: float = 0.0) -> dict[str, Any]:
        """As summary.json and a checkpoint have it; null where it is unknown.

        Args:
            now_s: seconds since 1970. What has passed since the last record counts as `checkpoint`: a run asks when it
                saves, and at its end.
            price_per_gpu_hour: of all hours; 0: unknown.
        """
        seconds = {**self._seconds, "checkpoint": self._seconds["checkpoint"] + self._open_s(now_s)}
        gpu_hours = self.gpu_hours(now_s)
        return {
            "until": now_s,
            "step": self._step,
            "furthest_step": self.furthest_step,
            "tokens": self._tokens,
            "hours": self.hours(now_s),
            "hours_by_cause": {cause: seconds[cause] / HOUR_S for cause in CAUSES},
            "gpu_hours": gpu_hours,
            "restarts": max(self._starts - 1, 0),
            "lost_steps": self._lost_steps,
            "lost_tokens": self._lost_tokens,
            "energy_kwh": None if self._energy_j is None or not self._starts else self._energy_j / JOULES_OF_KWH,
            "cost_usd": gpu_hours * price_per_gpu_hour if price_per_gpu_hour else None,
        }


def furthest_step(totals: Mapping[str, Any]) -> int:
    """The highest step that a run had recorded when it saved these totals, as far as they tell; {}: 0."""
    return int(totals.get("furthest_step", totals.get("step", 0)))


def spent_budget(ledger: Ledger, train: TrainConfig, now_s: float) -> str:
    """Which of the train section's budgets is used up at a time in seconds since 1970, in words; '' for none."""
    hours, dollars = ledger.hours(now_s), ledger.gpu_hours(now_s) * train.price_per_gpu_hour
    if train.budget_hours and hours >= train.budget_hours:
        return f"train.budget_hours {train.budget_hours:g} are spent: {hours:.4g} h over all starts"
    if train.budget_usd and dollars >= train.budget_usd:
        return f"train.budget_usd {train.budget_usd:g} is spent: {dollars:.4g} USD over all starts"
    return ""
