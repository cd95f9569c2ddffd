"""The course of a run's losses, in the form that a checkpoint carries and a resumed run goes on from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, TypeVar

HISTORY_LIMIT = 1000  # points of a loss curve that a checkpoint carries
TREND_WINDOW = 25
TREND_MARGIN = 0.002

_Point = TypeVar("_Point")


class LossTracker:
    """What a checkpoint's metadata.json and training_metrics.json tell of the losses.

    Bounded: at `limit` points every second one of the older half is dropped, so the newest half is whole, older times
    are ever thinner, and the first point stays. Losses that are not finite (skipped updates) are left out.
    """

    def __init__(self, limit: int = HISTORY_LIMIT) -> None:
        self._limit = limit
        self._train: list[tuple[int, float, float]] = []  # (step, loss, learning rate)
        self._validation: list[tuple[int, float]] = []  # (step, loss)
        self._best: tuple[int, float] | None = None  # (step, loss)
        self._best_validation: tuple[int, float] | None = None

    def update(self, step: int, loss: float, learning_rate: float) -> None:
        """Take in the training loss of a logged step, in nats a token."""
        if math.isfinite(loss):
            self._train.append((step, loss, learning_rate))
            self._best = _better(self._best, step, loss)
            _thin(self._train, self._limit)

    def validated(self, step: int, loss: float) -> None:
        """Take in the mean loss of a validation, in nats a token."""
        if math.isfinite(loss):
            self._validation.append((step, loss))
            self._best_validation = _better(self._best_validation, step, loss)
            _thin(self._validation, self._limit)

    @property
    def first_loss(self) -> float | None:
        """The loss of the first logged step, of the whole run and not of this process."""
        return self._train[0][1] if self._train else None

    @property
    def current_loss(self) -> float | None:
        """The newest training loss."""
        return self._train[-1][1] if self._train else None

    @property
    def validation_loss(self) -> float | None:
        """The newest validation loss, of the whole run and not of this process."""
        return self._validation[-1][1] if self._validation else None

    @property
    def validation_metrics(self) -> dict[str, float | int | str | None]:
        """{source, current_avg_loss, best_avg_loss, steps_since_best, loss_trend}.

        `source` is "validation", or "training" until something was validated. A training loss is averaged over the
        newest 25 points (or half of what there is). `loss_trend` compares the current average with the one before:
        "improving" or "worsening" by more than 0.2 %, else "flat".
        """
        if self._validation:
            source, best, window = "validation", self._best_validation, 1
            losses = [loss for _, loss in self._validation]
            step = max(self._validation[-1][0], self._train[-1][0] if self._train else 0)
        else:
            source, best = "training", self._best
            losses = [loss for _, loss, _ in self._train]
            window = min(TREND_WINDOW, max(len(losses) // 2, 1))
            step = self._train[-1][0] if self._train else 0
        recent, before = losses[-window:], losses[-2 * window : -window]
        return {
            "source": source,
            "current_avg_loss": statistics.fmean(recent) if recent else None,
            "best_avg_loss": best[1] if best else None,
            "steps_since_best": step - best[0] if best else None,
            "loss_trend": _trend(recent, before),
        }

    def state(self) -> dict[str, Any]:
        """Everything as JSON has it; `restore` takes it back. The lists of one prefix are parallel."""
        return {
            "current_loss": self.current_loss,
            "best_loss": self._best[1] if self._best else None,
            "best_step": self._best[0] if self._best else None,
            "history_steps": [step for step, _, _ in self._train],
            "loss_history": [loss for _, loss, _ in self._train],
            "learning_rates": [rate for _, _, rate in self._train],
            "validation_steps": [step for step, _ in self._validation],
            "validation_losses": [loss for _, loss in self._validation],
            "best_validation": list(self._best_validation) if self._best_validation else None,
            "validation_metrics": self.validation_metrics,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave. Raises KeyError where a field is missing."""
        steps, losses, rates = state["history_steps"], state["loss_history"], state["learning_rates"]
        self._train = list(zip(steps, losses, rates, strict=True))
        self._validation = list(zip(state["validation_steps"], state["validation_losses"], strict=True))
        self._best = None if state["best_step"] is None else (state["best_step"], state["best_loss"])
        best = state["best_validation"]
        self._best_validation = None if best is None else (best[0], best[1])


def _better(best: tuple[int, float] | None, step: int, loss: float) -> tuple[int, float]:
    return (step, loss) if best is None or loss < best[1] else best


def _thin(points: list[_Point], limit: int) -> None:
    """Drop every second point of the older half once there are `limit`."""
    if len(points) >= limit:
        del points[1 : limit // 2 : 2]


def _trend(recent: list[float], before: list[float]) -> str:
    if not recent or not before:
        return "flat"
    change = statistics.fmean(recent) / statistics.fmean(before) - 1
    return "improving" if change < -TREND_MARGIN else "worsening" if change > TREND_MARGIN else "flat"
