from __future__ import annotations

import json
import math

import pytest

from pretrain.history import LossTracker


def tracker(*losses: float, limit: int = 1000) -> LossTracker:
    made = LossTracker(limit)
    for step, loss in enumerate(losses, 1):
        made.update(step, loss, step / 1000)
    return made


def test_state_tells_the_course_of_the_losses():
    state = tracker(5.0, 3.0, 4.0).state()
    assert state["loss_history"] == [5.0, 3.0, 4.0]
    assert state["history_steps"] == [1, 2, 3]
    assert state["learning_rates"] == [0.001, 0.002, 0.003]
    assert (state["current_loss"], state["best_loss"], state["best_step"]) == (4.0, 3.0, 2)


def test_an_empty_tracker_has_a_state_too():
    made = LossTracker()
    made.restore(json.loads(json.dumps(LossTracker().state(), allow_nan=False)))
    assert made.state()["current_loss"] is None
    assert made.validation_metrics["loss_trend"] == "flat"
    assert made.first_loss is None


def test_a_restored_tracker_goes_on_exactly_as_the_one_left_alone():
    alone, killed = LossTracker(limit=20), LossTracker(limit=20)
    for step in range(1, 100):
        for made in (alone, killed):
            made.update(step, 10 / step, 1e-3)
            if step % 7 == 0:
                made.validated(step, 11 / step)
        if step == 50:
            state = json.loads(json.dumps(killed.state(), allow_nan=False))
            killed = LossTracker(limit=20)
            killed.restore(state)
    assert killed.state() == alone.state()


def test_history_is_bounded_keeps_the_first_point_and_the_newest_half():
    made = tracker(*(float(9000 - k) for k in range(5000)), limit=100)
    steps = made.state()["history_steps"]
    assert 50 <= len(steps) < 100
    assert steps[-50:] == list(range(4951, 5001))
    assert steps[0] == 1
    assert steps == sorted(steps)
    assert made.first_loss == 9000.0


def test_the_best_loss_outlives_the_thinning():
    made = tracker(9.0, 1.0, *([5.0] * 500), limit=10)
    assert (made.state()["best_loss"], made.state()["best_step"]) == (1.0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_left_out(bad):
    made = tracker(5.0, bad)
    made.validated(2, bad)
    assert made.state() == tracker(5.0).state()


@pytest.mark.parametrize(
    ("losses", "trend"),
    [((5.0, 4.0), "improving"), ((4.0, 5.0), "worsening"), ((4.0, 4.004), "flat"), ((4.0,), "flat")],
)
def test_the_trend_compares_the_last_two_validations(losses, trend):
    made = tracker(*([1.0] * 10))
    for number, loss in enumerate(losses, 1):
        made.validated(number * 5, loss)
    assert made.validation_metrics["loss_trend"] == trend
    assert made.validation_metrics["current_avg_loss"] == losses[-1]
    assert made.validation_metrics["source"] == "validation"


def test_steps_since_best_count_on_from_the_best_validation():
    made = tracker(1.0)
    made.validated(10, 3.0)
    made.validated(20, 4.0)
    made.update(25, 1.0, 1e-3)
    assert made.validation_metrics["steps_since_best"] == 15
    assert made.validation_metrics["best_avg_loss"] == 3.0


def test_without_a_validation_the_training_loss_is_averaged_and_said_so():
    metrics = tracker(*([6.0] * 25 + [5.0] * 25)).validation_metrics
    assert metrics["source"] == "training"
    assert (metrics["current_avg_loss"], metrics["loss_trend"]) == (5.0, "improving")


def test_the_validation_loss_is_the_newest_one_and_outlives_a_restart():
    tracker = LossTracker()
    assert tracker.validation_loss is None
    tracker.validated(10, 5.0)
    tracker.validated(20, 4.0)
    restarted = LossTracker()
    restarted.restore(tracker.state())
    assert tracker.validation_loss == restarted.validation_loss == 4.0
