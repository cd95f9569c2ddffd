"""Every second of a run has one cause: the runs here are written down second by second, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pretrain.config import LogConfig, TrainConfig
from pretrain.ledger import CAUSES, Ledger, spent_budget
from pretrain.metrics import Metrics, open_metrics, read_ledger

STEP_S, TOKENS = 10.0, 100  # of one step


def start(ledger: Ledger, time_s: float, step: int = 0, startup_s: float = 0.0, **more: Any) -> None:
    """A process that began so long before its first event."""
    fields = {"step": step, "process_began": time_s - startup_s, "world_size": 2, "measures_energy": True, **more}
    ledger.event("resumed" if step else "started", time_s, fields)


def steps(ledger: Ledger, time_s: float, first: int, last: int, **more: float) -> float:
    """A record of each step from `first` to `last`; the time after them."""
    for step in range(first, last + 1):
        time_s += STEP_S + (more.get("eval_ms", 0.0) + more.get("checkpoint_ms", 0.0)) / 1e3
        record = {"step": step, "tokens": step * TOKENS, "step_ms": STEP_S * 1e3, "time": time_s, **more}
        ledger.record(record)
    return time_s


def seconds(ledger: Ledger, now_s: float) -> dict[str, float]:
    told = ledger.totals(now_s)
    found = {cause: round(hours * 3600, 6) for cause, hours in told["hours_by_cause"].items()}
    assert set(found) == set(CAUSES)
    assert told["hours"] * 3600 == pytest.approx(sum(found.values()) - found["stopped"])
    return {cause: value for cause, value in found.items() if value}


def test_a_run_left_alone_has_a_cause_for_each_second():
    ledger = Ledger()
    start(ledger, 1000.0, startup_s=30.0)
    now_s = steps(ledger, 1005.0, 1, 4, data_wait_ms=1000.0, eval_ms=2000.0, checkpoint_ms=500.0)
    ledger.event("ended", now_s + 7.0, {})
    assert seconds(ledger, 9e9) == {
        "startup": 35.0,
        "data_wait": 4.0,
        "eval": 8.0,
        "checkpoint": 2.0 + 7.0,
        "training": 36.0,
    }
    told = ledger.totals(9e9)
    assert (told["tokens"], told["restarts"], told["lost_steps"], told["lost_tokens"]) == (400, 0, 0, 0)
    assert told["gpu_hours"] == pytest.approx(2 * told["hours"])


def test_a_record_that_stands_for_several_steps_counts_for_all_of_them():
    ledger = Ledger()
    start(ledger, 0.0)
    for step in (10, 20):
        ledger.record({"step": step, "tokens": step, "step_ms": 1e4, "data_wait_ms": 1e3, "time": step * STEP_S})
    assert seconds(ledger, 200.0) == {"training": 180.0, "data_wait": 20.0}


def test_a_kill_loses_the_steps_that_are_taken_again_and_the_pause_is_no_hour_of_the_run():
    ledger = Ledger()
    start(ledger, 0.0)
    now_s = steps(ledger, 0.0, 1, 7, data_wait_ms=1000.0)
    ledger.event("checkpoint_saved", now_s + 3.0, {"step": 7})  # the last sign of life
    start(ledger, 200.0, step=5, startup_s=20.0)
    now_s = steps(ledger, 200.0, 6, 8)
    found = ledger.totals(now_s)
    assert seconds(ledger, now_s) == {
        "training": 5 * 9.0 + 3 * 10.0,
        "data_wait": 5.0,
        "lost": 2 * 10.0 + 3.0,
        "startup": 20.0,
        "stopped": 180.0 - 73.0,
    }
    assert (found["restarts"], found["lost_steps"], found["lost_tokens"], found["tokens"]) == (1, 2, 200, 800)


def test_the_supervisor_knows_how_long_a_process_hung():
    ledger = Ledger()
    start(ledger, 0.0)
    steps(ledger, 0.0, 1, 2)
    ledger.event("restarted", 620.0, {})
    start(ledger, 650.0, step=2, startup_s=10.0)
    assert seconds(ledger, 650.0) == {"training": 20.0, "lost": 600.0, "stopped": 20.0, "checkpoint": 10.0}


def test_a_checkpoint_between_two_records_keeps_what_came_before_it():
    ledger = Ledger()
    start(ledger, 0.0)
    ledger.record({"step": 10, "tokens": 1000, "step_ms": 1e4, "time": 100.0})
    ledger.record({"step": 20, "tokens": 2000, "step_ms": 1e4, "time": 200.0})
    start(ledger, 200.0, step=15)
    told = ledger.totals(200.0)
    assert (told["lost_steps"], told["lost_tokens"], told["tokens"]) == (5, 500, 1500)
    assert seconds(ledger, 200.0) == {"training": 150.0, "lost": 50.0}
    start(ledger, 200.0, step=4)
    assert ledger.totals(200.0)["lost_steps"] == 16 and seconds(ledger, 200.0) == {"training": 40.0, "lost": 160.0}


def test_a_roll_back_loses_too_and_is_no_restart():
    ledger = Ledger()
    start(ledger, 0.0)
    now_s = steps(ledger, 0.0, 1, 9)
    ledger.event("rolled_back", now_s + 2.0, {"step": 6})
    told = ledger.totals(now_s + 2.0)
    assert (told["restarts"], told["lost_steps"]) == (0, 3)
    assert seconds(ledger, now_s + 2.0) == {"training": 60.0, "lost": 32.0}
    assert ledger.furthest_step == 9


def test_a_run_that_begins_anew_has_lost_everything_before():
    ledger = Ledger()
    start(ledger, 0.0)
    steps(ledger, 0.0, 1, 3)
    start(ledger, 30.0)
    assert ledger.furthest_step == 0
    told = ledger.totals(30.0)
    assert (told["tokens"], told["lost_tokens"], told["restarts"]) == (0, 300, 1)


def test_energy_adds_up_over_lost_work_too_and_is_unknown_where_one_process_did_not_measure():
    ledger = Ledger()
    start(ledger, 0.0)
    steps(ledger, 0.0, 1, 4, energy_j=9e5)
    start(ledger, 40.0, step=2)
    steps(ledger, 40.0, 3, 4, energy_j=9e5)
    assert ledger.totals(60.0)["energy_kwh"] == pytest.approx(6 * 0.25)
    start(ledger, 60.0, step=4, measures_energy=False)
    assert ledger.totals(60.0)["energy_kwh"] is None
    assert Ledger().totals(0.0)["energy_kwh"] is None


def test_what_is_used_after_the_last_record_counts():
    ledger = Ledger()
    ledger.event("started", 0.0, {"step": 0, "measures_energy": True})
    steps(ledger, 0.0, 1, 2, energy_j=9e5)
    ledger.event("energy", 25.0, {"step": 2, "energy_j": 18e5})
    assert ledger.totals(30.0)["energy_kwh"] == pytest.approx(4 * 0.25)


def test_cost_is_gpu_hours_at_a_price_and_each_process_counts_its_own_gpus():
    ledger = Ledger()
    start(ledger, 0.0, world_size=8)
    ledger.event("ended", 3600.0, {})
    start(ledger, 7200.0, world_size=4)
    ledger.event("ended", 9000.0, {})
    told = ledger.totals(9e9, price_per_gpu_hour=2.5)
    assert told["gpu_hours"] == pytest.approx(8 + 2) and told["cost_usd"] == pytest.approx(25.0)
    assert told["hours"] == pytest.approx(1.5)
    assert ledger.totals(9e9)["cost_usd"] is None


def test_a_clock_that_jumps_back_takes_no_time_away():
    ledger = Ledger()
    start(ledger, 1000.0)
    steps(ledger, 1000.0, 1, 2)
    ledger.record({"step": 3, "tokens": 300, "step_ms": 1e4, "data_wait_ms": 5e3, "time": 500.0})
    start(ledger, 400.0, step=3)
    assert seconds(ledger, 400.0)["training"] == 20.0
    assert all(value >= 0 for value in seconds(ledger, 400.0).values())


def test_a_run_of_another_version_is_read_as_far_as_it_tells(tmp_path):
    events = [{"kind": "started", "time": 0.0, "step": 0}, {"kind": "resumed", "time": 90.0, "step": 1}]
    records = [{"step": step, "time": 10.0 * step} for step in (1, 2)]
    records.append({"step": 2, "time": 100.0, "loss": "NaN"})
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events) + '{"kind": "to')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + "\x00[1]\n3\n")
    (tmp_path / "restarts.jsonl").write_text('{"time": 40.0, "restart": 1, "step": 1}\n')
    ledger = read_ledger(tmp_path)
    assert seconds(ledger, 100.0) == {"training": 20.0, "lost": 30.0, "stopped": 50.0}
    told = ledger.totals(100.0)
    assert (told["restarts"], told["lost_steps"], told["tokens"], told["energy_kwh"]) == (1, 1, 0, None)


def test_what_was_written_is_read_back_as_the_same_books(tmp_path):
    class Time:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Time()
    told = {"process_began": -5.0, "world_size": 3, "measures_energy": True}
    with Metrics(tmp_path, [], clock=clock, start=told) as metrics:
        for step in range(1, 6):
            clock.now += 2.0
            metrics.record({"step": step, "tokens": step, "step_ms": 2e3, "data_wait_ms": 500.0, "energy_j": 3.0})
        clock.now += 1.0
        metrics.event("rolled_back", step=3)
        clock.now += 4.0
    assert read_ledger(tmp_path).totals(99.0) == metrics.ledger.totals(99.0)
    assert metrics.ledger.hours(99.0) * 3600 == pytest.approx(5 + 10 + 1 + 4)


def carried(until: float) -> dict[str, Any]:
    ledger = Ledger()
    start(ledger, until - 3600.0)
    return {**ledger.totals(until), "step": 7, "tokens": 700}


@pytest.mark.parametrize(("until", "hours"), [(1e12, 1.0), (1000.0, 0.25)])
def test_on_a_machine_without_the_runs_logs_the_checkpoints_books_go_on(tmp_path, until, hours):
    """The logs here tell of a quarter of an hour until 2000 s; a checkpoint saved later knows more."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").write_text(
        '{"kind": "started", "time": 1100, "step": 0, "process_began": 1100, "world_size": 2}\n'
        '{"kind": "ended", "time": 2000}\n'
    )
    config = LogConfig(dir=str(tmp_path), tensorboard=False)
    how: dict[str, Any] = {"settings": {}, "total_steps": 9, "first_step": 7, "rank": 0}
    begun = {"process_began": 3e9, "world_size": 2, "measures_energy": True}
    with open_metrics(config, "run", **how, start=begun, carried=carried(until)) as metrics:
        told = metrics.ledger.totals(0.0)
    assert told["hours"] == pytest.approx(hours) and told["restarts"] == 1
    assert told["tokens"] == (700 if until > 2000 else 0)
    assert read_ledger(tmp_path / "run").totals(0.0)["hours"] == pytest.approx(hours)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"budget_hours": 1.9}, "train.budget_hours 1.9 are spent: 2 h"),
        ({"budget_hours": 2.1}, ""),
        ({"budget_usd": 11.9, "price_per_gpu_hour": 3.0}, "train.budget_usd 11.9 is spent: 12 USD"),
        ({"budget_usd": 12.1, "price_per_gpu_hour": 3.0}, ""),
        ({"price_per_gpu_hour": 3.0}, ""),
    ],
)
def test_a_budget_is_spent_when_all_starts_together_have_taken_it(budget, expected):
    ledger = Ledger()
    start(ledger, 0.0)
    ledger.event("ended", 3600.0, {})
    start(ledger, 9000.0)
    found = spent_budget(ledger, TrainConfig(**budget), 9000.0 + 3600.0)  # the second one still runs
    assert found.startswith(expected) and bool(found) == bool(expected)
