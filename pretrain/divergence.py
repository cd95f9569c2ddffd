"""Whether a run diverges: updates that are left out one after the other, and spikes of the loss.

The engines leave out an update whose loss or gradients are not finite. It is trouble when more than
`train.max_skipped` are left out in a row, or when a loss stands out from the ones before it: its robust z-score
(loss − median) / (1.4826 · MAD) over the last `train.spike_window` applied steps is above `train.spike_threshold`
(Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993). What follows is in rollback.py.

Every rank is told the same numbers (the loss is the mean over the ranks, the gradient norm is global), so every rank
comes to the same answer without asking the others.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain import log
from pretrain.batches import Position
from pretrain.config import TrainConfig
from pretrain.mixture import position_from

MAD_TO_SIGMA = 1.4826  # of a normal distribution
# A curve so smooth that its noise is below these is not in trouble when it moves by a few times that noise.
MIN_SIGMA_RELATIVE, MIN_SIGMA_NATS = 0.005, 1e-3
FRESH_LOSS_MARGIN = 0.5  # nats: how far from ln(vocab_size) the first loss of a fresh model may be without a warning
REPORT_STEPS = 64  # that a report tells of

logger = log.get(__name__)


@dataclass(frozen=True)
class Observation:
    """What was seen of one step.

    Args:
        loss: mean over the ranks, nats per token.
        grad_norm: global, before clipping; inf where the update was left out.
        loss_scale: of fp16, after the step.
        applied: whether the weights were updated.
        position: where the step's windows began.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float | None
    applied: bool
    position: Position


@dataclass(frozen=True)
class Trouble:
    """A run that can't go on as it is.

    Args:
        step: where it was seen.
        since: the first step that showed it.
        reason: in a few words.
        loss: of `step`.
        statistics: of the losses before it: median, sigma, z, threshold; empty where the loss did not decide.
    """

    step: int
    since: int
    reason: str
    loss: float
    statistics: Mapping[str, float]


@dataclass(frozen=True)
class PassedOver:
    """The data that a roll-back left behind.

    Args:
        from_step, to_step: of the trouble, and of the checkpoint.
        windows: sequences that the weights have lost, over all ranks.
        begin, end: positions of the data between the checkpoint and the trouble.
        shards: names of the shards that these windows begin in.
        reason: of the trouble.
    """

    from_step: int
    to_step: int
    windows: int
    begin: Position
    end: Position
    shards: tuple[str, ...]
    reason: str


class Watch:
    """Looks at every step of a run, and remembers what it has to across restarts.

    Args:
        vocab_size: of the model, for the loss that a fresh one begins with; 0 where the weights are not fresh.

    Attributes:
        skipped_in_a_row: updates left out one after the other, up to now.
        passed_over: one entry for each roll-back.
        recent: the newest steps of this process, for the report.
    """

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        self._first_loss = math.log(vocab_size) if vocab_size else None
        self._max_skipped = config.max_skipped
        self._threshold = config.spike_threshold
        self._window: deque[tuple[int, float]] = deque(maxlen=config.spike_window)  # (step, loss) of applied steps
        self.skipped_in_a_row = 0
        self.passed_over: list[PassedOver] = []
        # All of a row of skipped updates, so that its first step's data can be named.
        self.recent: deque[Observation] = deque(maxlen=REPORT_STEPS + config.max_skipped)

    def observe(self, seen: Observation) -> Trouble | None:
        """Take in a step and say what looks wrong; what the run can't go on with, if anything."""
        self.recent.append(seen)
        self._warn(seen)
        if not (seen.applied and math.isfinite(seen.loss)):
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row <= self._max_skipped:
                return None
            reason = f"{self.skipped_in_a_row} updates in a row were not finite"
            return Trouble(seen.step, seen.step - self.skipped_in_a_row + 1, reason, seen.loss, {})
        self.skipped_in_a_row = 0
        if not self._threshold:
            return None
        trouble = self._spike(seen)
        self._window.append((seen.step, seen.loss))
        return trouble

    def _warn(self, seen: Observation) -> None:
        if not seen.applied:
            scale = f"; loss scale now {seen.loss_scale:g}" if seen.loss_scale else ""
            logger.warning("step %d (loss %g): not finite, update skipped%s", seen.step, seen.loss, scale)
        expected = self._first_loss
        if seen.step == 1 and expected is not None and abs(seen.loss - expected) > FRESH_LOSS_MARGIN:
            text = "the first loss is %.2f; a fresh model starts near ln(vocab_size) = %.2f"
            logger.warning(text, seen.loss, expected)

    def _spike(self, seen: Observation) -> Trouble | None:
        """Whether the loss stands out upwards from a full window of earlier ones."""
        if len(self._window) < (self._window.maxlen or 0):
            return None
        median, sigma = spread(loss for _, loss in self._window)
        z = (seen.loss - median) / sigma
        if z <= self._threshold:
            return None
        since = seen.step
        for step, loss in reversed(self._window):  # a spike that took several steps to rise began with the first
            if (loss - median) / sigma <= self._threshold / 2:
                break
            since = step
        reason = f"the loss {seen.loss:.4g} is a spike, {z:.1f} robust deviations above {median:.4g}"
        figures = {"median": median, "sigma": sigma, "z": z, "threshold": self._threshold}
        return Trouble(seen.step, since, reason, seen.loss, figures)

    @property
    def window_losses(self) -> list[float]:
        """The losses that the next one is compared with, oldest first."""
        return [loss for _, loss in self._window]

    def rolled_back(self, passed_over: PassedOver) -> None:
        """Begin anew after a roll-back: the window is filled again before another spike can be seen."""
        self._window.clear()
        self.skipped_in_a_row = 0
        self.passed_over.append(passed_over)

    def state(self) -> dict[str, Any]:
        """As trainer_state.json has it, so that a resumed run decides as one that was never interrupted."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "window": [list(point) for point in self._window],
            "passed_over": [asdict(each) for each in self.passed_over],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; an empty one is of a version that kept none.

        Raises:
            TypeError, ValueError, KeyError: it is none.
        """
        if not state:
            return
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self._window.clear()
        if self._threshold:
            self._window.extend((int(step), float(loss)) for step, loss in state["window"])
        self.passed_over = [_passed_over(tree) for tree in state["passed_over"]]


def spread(losses: Iterable[float]) -> tuple[float, float]:
    """(median, robust standard deviation) of some losses in nats; the deviation has a floor and is never 0."""
    values = list(losses)
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    return median, max(MAD_TO_SIGMA * mad, MIN_SIGMA_RELATIVE * abs(median), MIN_SIGMA_NATS)


def _passed_over(tree: Mapping[str, Any]) -> PassedOver:
    begin, end = position_from(tree["begin"]), position_from(tree["end"])
    return PassedOver(**{**tree, "begin": begin, "end": end, "shards": tuple(tree["shards"])})
