"""The course of a run's loss and learning rate over all its restarts, from its checkpoints and its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError
from pretrain.metrics import METRICS_FILE, read_metrics
from pretrain.run_logs import number, read_events, restart_steps

SMOOTHING = 50  # a point of the smoothed curve is the mean of one in so many of all points
SAME_LOSS = 1e-6


@dataclass(frozen=True)
class Curve:
    """Points of a run.

    Args:
        steps, losses, learning_rates: of the training, parallel; losses in nats a token, finite.
        validation_steps, validation_losses: parallel.
        restarts: steps at which a process resumed.
        source: where the points come from, for the reader.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    validation_steps: tuple[int, ...] = ()
    validation_losses: tuple[float, ...] = ()
    restarts: tuple[int, ...] = ()
    source: str = ""

    @property
    def first_step(self) -> int:
        """The step of the first point; 0 where there is none."""
        return self.steps[0] if self.steps else 0

    @property
    def mean(self) -> float | None:
        """Mean loss over all points."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the loss over all points."""
        return statistics.pstdev(self.losses) if self.losses else None

    def smoothed(self) -> tuple[float, ...]:
        """Each loss averaged with its neighbours: as many before it as after it, so that nothing lags."""
        n_points = len(self.losses)
        reach = n_points // (2 * SMOOTHING)
        sums = (0.0, *accumulate(self.losses))
        means = []
        for at in range(n_points):
            side = min(reach, at, n_points - 1 - at)
            means.append((sums[at + side + 1] - sums[at - side]) / (2 * side + 1))
        return tuple(means) if reach else self.losses


def saved_curve(training_metrics: Mapping[str, Any], source: str) -> Curve:
    """The curve up to a checkpoint, from its training_metrics.json: at most 1000 points, the newest half of them whole.

    Raises:
        CheckpointError: the document is of another kind.
    """
    try:
        points = zip(
            training_metrics["history_steps"],
            training_metrics["loss_history"],
            training_metrics["learning_rates"],
            strict=True,
        )
        columns = [(int(step), float(loss), float(rate)) for step, loss, rate in points]
        validations = zip(training_metrics["validation_steps"], training_metrics["validation_losses"], strict=True)
        pairs = [(int(step), float(loss)) for step, loss in validations]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} holds no loss history: {type(error).__name__}: {error}") from error
    return Curve(
        tuple(step for step, _, _ in columns),
        tuple(loss for _, loss, _ in columns),
        tuple(rate for _, _, rate in columns),
        tuple(step for step, _ in pairs),
        tuple(loss for _, loss in pairs),
        source=source,
    )


def with_log(curve: Curve, folder: Path) -> Curve:
    """The run's whole curve from logs/{run}, where that log is of the same course; else `curve`.

    A log of another course (the run forked since, or the name was used again) has another loss at the curve's end.

    Args:
        folder: of metrics.jsonl and events.jsonl.

    Raises:
        StorageError: the log is there and can't be read.
    """
    path = folder / METRICS_FILE
    if not path.exists() or not curve.steps:
        return curve
    records = read_metrics(path)
    last = {record["step"]: record["loss"] for record in records if _is_finite(record, "loss")}.get(curve.steps[-1])
    if last is None or abs(last - curve.losses[-1]) > SAME_LOSS:
        return replace(curve, source=f"{curve.source} ({path} is of another course)")
    return curve_of(records, read_events(folder), str(path))


def curve_of(records: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], source: str) -> Curve:
    """The curve of a log; records whose loss is not finite are left out.

    Args:
        records: of metrics.jsonl, each step once.
        events: of events.jsonl.
    """
    trained = [record for record in records if _is_finite(record, "loss")]
    validated = [record for record in trained if _is_finite(record, "val_loss")]
    return Curve(
        tuple(record["step"] for record in trained),
        tuple(record["loss"] for record in trained),
        tuple(record.get("lr", math.nan) for record in trained),
        tuple(record["step"] for record in validated),
        tuple(record["val_loss"] for record in validated),
        restart_steps(events),
        source,
    )


def _is_finite(record: Mapping[str, Any], field: str) -> bool:
    value = number(record, field)
    return value is not None and math.isfinite(value)
