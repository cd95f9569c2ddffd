from __future__ import annotations

import json

import pytest

from pretrain.curves import Curve, saved_curve, with_log
from pretrain.errors import CheckpointError
from pretrain.history import LossTracker


def saved(losses, first=1):
    tracker = LossTracker()
    for step, loss in enumerate(losses, first):
        tracker.update(step, loss, 0.1 * step)
    tracker.validated(first, 9.0)
    return saved_curve(tracker.state(), "the checkpoint")


def write_log(folder, lines, events=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn')


def test_a_checkpoint_carries_its_curve():
    curve = saved([4.0, 2.0, 3.0])
    assert (curve.steps, curve.losses) == ((1, 2, 3), (4.0, 2.0, 3.0))
    assert curve.learning_rates == pytest.approx((0.1, 0.2, 0.3))
    assert (curve.validation_steps, curve.validation_losses) == ((1,), (9.0,))
    assert (curve.mean, curve.std, curve.first_step) == (3.0, pytest.approx(0.81650, rel=1e-4), 1)
    empty = saved([])
    assert (empty.mean, empty.std, empty.first_step) == (None, None, 0)


@pytest.mark.parametrize("broken", [{}, {"history_steps": [1], "loss_history": [], "learning_rates": []}])
def test_another_document_holds_no_curve(broken):
    with pytest.raises(CheckpointError, match="holds no loss history"):
        saved_curve(broken, "x")


def test_the_log_of_the_same_run_gives_every_step_and_the_restarts(tmp_path):
    lines = [{"step": step, "loss": 5.0 - step, "lr": 0.1} for step in (1, 2, 3)]
    forked = [{"step": 3, "loss": 2.5, "lr": 0.1, "val_loss": 2.6}, {"step": 4, "loss": "NaN", "lr": 0.1}]
    later = [{"step": 5, "loss": 1.0, "lr": 0.1}]
    events = [{"kind": "started", "step": 0}, {"kind": "resumed", "step": 2}, {"kind": "resumed", "step": 2}]
    write_log(tmp_path, [*lines, *forked, *later], events)
    curve = with_log(saved([4.0, 3.0, 2.5]), tmp_path)
    assert (curve.steps, curve.losses) == ((1, 2, 3, 5), (4.0, 3.0, 2.5, 1.0))
    assert (curve.validation_steps, curve.validation_losses) == ((3,), (2.6,))
    assert curve.restarts == (2,)
    assert curve.source.endswith("metrics.jsonl")


def test_the_log_of_another_course_is_left_alone(tmp_path):
    write_log(tmp_path, [{"step": step, "loss": 7.0, "lr": 0.1} for step in (1, 2, 3)])
    curve = saved([4.0, 3.0, 2.5])
    found = with_log(curve, tmp_path)
    assert found.losses == curve.losses and "of another course" in found.source
    assert with_log(curve, tmp_path / "none") == curve


def test_smoothing_averages_over_neighbours_on_both_sides():
    assert Curve((1, 2), (1.0, 3.0), (0.1, 0.1)).smoothed() == (1.0, 3.0)
    line = tuple(float(step) for step in range(300))
    assert Curve(tuple(range(300)), line, line).smoothed() == pytest.approx(line)  # no lag
    spike = tuple(7.0 if step == 150 else 0.0 for step in range(300))
    smoothed = Curve(tuple(range(300)), spike, spike).smoothed()
    assert smoothed[146:155] == pytest.approx((0, *[1] * 7, 0))
