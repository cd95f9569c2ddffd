from __future__ import annotations

import json

import pytest

from pretrain import report_series
from pretrain.report_series import run_series
from pretrain.run_logs import RunLogs

START = {"kind": "started", "step": 0, "time": 1000.0, "total_steps": 100, "format": 1}


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "loss": 5.0, "time": 1000.0 + 36 * step, "lr": 1e-3, **more}


def series_of(folder, records=(), events=(START,), **files):
    for name, trees in {"metrics": records, "events": events, **files}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    run = RunLogs("run", folder)
    run.refresh()
    found = run_series(run)
    json.dumps(found, allow_nan=False)
    return found


def test_a_short_run_has_every_step_and_joins_its_restarts(tmp_path):
    records = [record(1), record(2), record(3, loss=9.0), record(3, loss=4.0, val_loss=4.5), record(4, loss="NaN")]
    events = [START, {"kind": "resumed", "step": 2, "time": 1080.0, "format": 1}]
    found = series_of(tmp_path, records, events)
    assert found["x"] == {"step": [1, 2, 3, 4], "tokens": [10, 20, 30, 40], "hours": [0.01, 0.02, 0.03, 0.04]}
    assert found["series"]["loss"] == {"mean": [5.0, 5.0, 4.0, None], "smooth": [5.0, 5.0, 4.0, None]}
    assert found["series"]["lr"]["mean"] == [1e-3] * 4
    assert found["validation"] == {"step": [3], "tokens": [30], "hours": [0.03], "loss": [4.5]}
    assert found["restarts"] == [{"kind": "resumed", "step": 2, "tokens": 20.0, "hours": 0.02222}]
    assert "mfu" not in found["series"] and found["power"] is None


def test_a_long_run_is_bounded_and_loses_no_spike(tmp_path):
    records = [record(step, grad_norm=100.0 if step == 4321 else 1.0, val_loss=3.0) for step in range(1, 10_001)]
    found = series_of(tmp_path, records)
    gradients = found["series"]["grad_norm"]
    assert len(found["x"]["step"]) == report_series.POINTS == len(gradients["mean"])
    assert max(gradients["high"]) == 100.0 and min(gradients["low"]) == 1.0 and found["x"]["step"][-1] == 10_000
    assert len(found["validation"]["loss"]) == report_series.POINTS
    assert len(json.dumps(found)) < 400_000


def test_nothing_and_what_another_version_wrote_draw_nothing(tmp_path):
    found = series_of(tmp_path, [], [])
    assert found["series"] == {} and found["phases"] is None and found["timeline"]["processes"] == []
    found = series_of(
        tmp_path, [{"step": 1, "loss": "what", "tokens": [1]}, {"step": 2}], [{"kind": "resumed", "step": "x"}]
    )
    assert found["x"] == {"step": [1, 2], "tokens": [None, None], "hours": [None, None]} and found["series"] == {}


def test_phases_are_means_over_steps_and_an_older_version_has_two(tmp_path):
    records = [record(step, data_wait_ms=1.0, step_ms=11.0) for step in range(1, 11)]
    found = series_of(tmp_path, records)["phases"]
    assert found["names"] == ["data wait", "the rest of the step"] and found["values"][1] == [10.0] * 10
    records = [record(step, forward_ms=3.0, checkpoint_ms=960.0 if step == 480 else 0.0) for step in range(1, 481)]
    found = series_of(tmp_path, records)["phases"]
    assert found["names"] == ["forward", "checkpoint"] and len(found["step"]) == 240
    assert found["values"][1][-1] == 480.0 and sum(found["values"][1]) == 480.0


def test_the_time_line_tells_how_each_process_ended(tmp_path):
    events = [
        START,
        {"kind": "checkpoint_saved", "time": 1030.0, "step": 1, "name": "a", "bytes": 5},
        {"kind": "checkpoint_committed", "time": 1036.0, "step": 1, "name": "a", "bytes": 5},
        {"kind": "resumed", "step": 1, "time": 1100.0, "format": 1},
        {"kind": "checkpoint_saved", "time": 1110.0, "step": 2, "name": "b"},
        {"kind": "upload_failed", "time": 1111.0, "step": 2, "name": "b"},
        {"kind": "ended", "time": 1136.0, "step": 2, "exit_code": 75, "reason": "stopped"},
        {"kind": "resumed", "step": 2, "time": 1200.0, "format": 1},
        {"kind": "ended", "time": 1210.0, "step": 2, "exit_code": 4, "reason": "storage"},
        {"kind": "resumed", "step": 2, "time": 1300.0, "format": 1},
    ]
    restarts = [{"time": 1090.0, "exit_code": 137, "reason": "killed", "restart": 1}]
    line = series_of(tmp_path, [record(1), record(2, val_loss=4.0)], events, restarts=restarts)["timeline"]
    shown = [(each["how"], each["from"], each["to"]) for each in line["processes"]]
    assert shown == [
        ("killed", 0.0, 0.02),
        ("stopped", 0.02778, 0.03778),
        ("failed", 0.05556, 0.05833),
        ("open", 0.08333, 0.08333),
    ]
    assert line["processes"][0]["text"] == "ended without a word: exit code 137, killed"
    assert line["checkpoints"] == [
        {"name": "a", "saved": 0.00833, "committed": 0.01, "bytes": 5},
        {"name": "b", "saved": 0.03056, "committed": None, "bytes": None},
    ]
    assert line["validations"] == [0.02] and [mark["kind"] for mark in line["marks"]] == ["upload failed"]


def test_power_is_thinned_by_device_and_its_end_is_whole_with_the_phases(tmp_path):
    rows = ["time,step,phase,gpu,power_w,utilization,temperature_c"]
    for tick in range(3000):
        phase = ("data_wait", "forward")[tick // 5 % 2]
        rows += [f"{1000 + tick / 10},{tick},{phase},{gpu},{100 * (gpu + 1)}.0,97.0," for gpu in (0, 1)]
    (tmp_path / "power.csv").write_text("\n".join(rows) + "\n")
    power = series_of(tmp_path, [record(1)])["power"]
    assert [device["device"] for device in power["devices"]] == ["0", "1"]
    assert all(len(device["hours"]) == report_series.POWER_POINTS for device in power["devices"])
    assert set(power["devices"][1]["power_w"]) == {200.0} and "temperature_c" not in power["devices"][0]
    first = power["close_up"]["devices"][0]
    assert first["seconds"][0] == pytest.approx(-report_series.CLOSE_UP_S, abs=0.2) and first["seconds"][-1] == 0.0
    assert len(first["seconds"]) == pytest.approx(120, abs=2)
    bands = power["close_up"]["bands"]
    assert bands[-2]["phase"] == "data wait" and bands[-2]["to"] - bands[-2]["from"] == pytest.approx(0.5)
