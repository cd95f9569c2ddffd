from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from pretrain import monitor
from pretrain.monitor import assess
from pretrain.monitor_views import draw, figures, one_line, print_plain
from pretrain.run_logs import RunLogs

START = {"kind": "started", "step": 0, "time": 1000.0, "total_steps": 100, "format": 1}


def record(step, **more):
    return {"step": step, "loss": 5.0 - step / 100, "time": 1000.0 + 2 * step, "lr": 1e-3, **more}


def read(folder, records=(), events=(START,), **files):
    for name, trees in {"metrics": records, "events": events, **files}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    run = RunLogs("test", folder)
    run.refresh()
    return run


def test_a_run_that_trains(tmp_path):
    records = [record(step, **({"val_loss": 4.9} if step == 10 else {})) for step in range(1, 21)]
    status = assess(read(tmp_path, records), now=1042.0)
    assert (status.state, status.step, status.total_steps, status.fraction) == (monitor.RUNNING, 20, 100, 0.2)
    assert status.eta_s == pytest.approx(160.0)  # 80 steps of 2 s
    assert (status.val_loss, status.val_step, status.age_s) == (4.9, 10, 2.0)
    assert status.notes == [] and status.warnings == []


def test_silence_counts_as_a_stall_only_when_it_is_longer_than_usual(tmp_path):
    run = read(tmp_path, [record(step) for step in range(1, 21)])
    assert assess(run, now=1040.0 + 59).state == monitor.RUNNING
    status = assess(run, now=1040.0 + 90)
    assert status.state == monitor.STALLED and "no record for 1:30" in status.detail and status.eta_s is None
    slow = read(tmp_path, [{**record(step), "time": 1000.0 + 60 * step} for step in range(1, 21)])
    assert assess(slow, now=2200.0 + 900).state == monitor.RUNNING
    assert assess(slow, now=2200.0 + 1300).state == monitor.STALLED


def test_a_copy_is_as_old_as_its_upload(tmp_path):
    commits = [{"kind": "checkpoint_committed", "time": 1000.0 + 600 * n, "step": n, "name": str(n)} for n in range(4)]
    run = read(tmp_path, [record(step) for step in range(1, 21)], [START, *commits])
    status = assess(run, now=4000.0, copied_s=2900.0)
    assert status.state == monitor.RUNNING and "copy made 18:20 ago" in status.detail
    assert assess(run, now=4800.0, copied_s=2900.0).state == monitor.STALLED


@pytest.mark.parametrize(
    ("end", "state", "says"),
    [
        ({"exit_code": 0, "reason": "done"}, monitor.DONE, "complete"),
        ({"exit_code": 75, "reason": "stopped by a signal after saving"}, monitor.STOPPED, "--resume auto"),
        ({"exit_code": 4, "reason": "storage error: x"}, monitor.FAILED, "exit code 4: storage error: x"),
        ({"reason": "RuntimeError: x"}, monitor.FAILED, "RuntimeError: x"),
    ],
)
def test_how_it_ended_is_told(tmp_path, end, state, says):
    run = read(tmp_path, [record(1)], [START, {"kind": "ended", "time": 1003.0, "step": 1, **end}])
    status = assess(run, now=9e9)
    assert status.state == state and says in status.detail


def test_a_restart_by_the_supervisor_and_a_start_without_a_step(tmp_path):
    restart = {"time": 1050.0, "exit_code": 137, "reason": "killed", "restart": 1}
    run = read(tmp_path, [record(1)], restarts=[restart])
    status = assess(run, now=1060.0)
    assert status.state == monitor.RESTARTING and "exit code 137, killed" in status.detail
    run = read(
        tmp_path, [record(1)], [START, {**START, "kind": "resumed", "step": 1, "time": 1070.0}], restarts=[restart]
    )
    status = assess(run, now=1080.0)
    assert status.state == monitor.STARTING and "0:10 ago" in status.detail and status.restarts == 1
    status = assess(run, now=1070.0 + monitor.START_PATIENCE_S + 1)  # killed before its first step, and nobody told
    assert status.state == monitor.STALLED and "no step yet" in status.detail


def test_nothing_is_known_of_an_empty_folder(tmp_path):
    run = RunLogs("test", tmp_path)
    run.refresh()
    status = assess(run, now=1.0)
    assert (status.state, status.step, status.loss, status.devices) == (monitor.UNKNOWN, None, None, [])
    assert "nothing is recorded yet" in one_line(status)


def test_runs_of_other_versions(tmp_path):
    old = {"kind": "started", "step": 0, "time": 1000.0}
    run = read(tmp_path, [record(1)], [old])
    status = assess(run, now=1005.0)
    assert status.state == monitor.RUNNING and "older version" in status.notes[0] and status.total_steps is None
    (tmp_path / "summary.json").write_text('{"steps": 1, "finished": true}')
    run.refresh()
    assert assess(run, now=9e9).state == monitor.DONE
    (tmp_path / "summary.json").write_text('{"steps": 7, "finished": true}')  # of a later time than these records
    run.refresh()
    assert assess(run, now=9e9).state == monitor.STALLED
    run = read(tmp_path, [{**record(1), "loss": "what", "lr": [1]}], [{**START, "format": 99, "total_steps": "x"}])
    status = assess(run, now=1005.0)
    assert "newer version (log format 99" in status.notes[0] and status.loss is None and status.total_steps is None


def test_checkpoints_and_uploads_are_counted(tmp_path):
    events = [START]
    for name, kinds in {"a": "saved committed", "b": "saved failed committed", "c": "saved failed"}.items():
        for kind in kinds.split():
            full = f"checkpoint_{kind}" if kind != "failed" else "upload_failed"
            events.append({"kind": full, "time": 1010.0, "step": 5, "name": name})
    status = assess(read(tmp_path, [record(5)], events), now=1020.0)
    assert status.uploads == {"saved": 3, "committed": 2, "failed": 1, "dropped": 0}
    assert status.checkpoint == {"name": "c", "age_s": 10.0, "committed": False}


def test_phases_are_spread_over_steps_and_devices_come_from_where_they_are_known(tmp_path):
    records = [
        record(step, forward_ms=10.0, **({"checkpoint_ms": 500.0} if step == 10 else {})) for step in range(1, 11)
    ]
    records[-1] |= {"gpu_utilization": 97.0, "power_w": 4800.0, "gpu_memory_gb": 60.0}
    run = read(tmp_path, records)
    status = assess(run, now=1020.0)
    assert status.phases == {"forward_ms": 10.0, "checkpoint_ms": 50.0}
    assert status.devices == [  # all of them: power_w of a record is their sum
        {"device": "GPUs of rank 0's node", "power_w": 4800.0, "utilization": 97.0, "memory_gb": 60.0}
    ]
    (tmp_path / "power.csv").write_text("time,step,phase,gpu,power_w,throttle\n1019,10,forward,3,555.0,none\n")
    status = assess(run, now=1020.0)
    assert [(row["device"], row["power_w"]) for row in status.devices] == [("GPU 3", 555.0)]


def shown(status, width=100, terminal=True):
    console = Console(file=io.StringIO(), width=width, height=80, force_terminal=terminal, color_system=None)
    if terminal:
        console.print(draw([status, status], width))
    else:
        print_plain(status, console)
    return console.file.getvalue()


def test_views_show_everything_and_no_text_of_a_run_is_markup(tmp_path):
    (tmp_path / "training.log").write_text(
        "2026-01-02 03:04:06,678 WARNING pretrain.uploads  [bold]slow[/bold] \x1b[31mred\n"
    )
    committed = {"kind": "checkpoint_committed", "time": 1010.0, "step": 5, "name": "checkpoint-epoch0-step5-files1"}
    fields = {"forward_ms": 30.0, "backward_ms": 60.0, "mfu": 0.4, "tokens_per_second": 12_345.0, "gpu_power_w": 612.0}
    records = [record(step, **fields) for step in range(1, 31)]
    records[-1]["loss"] = "NaN"
    status = assess(read(tmp_path, records, [START, committed]), now=1062.0)
    assert math.isnan(status.loss) and status.to_json()["loss"] is None
    json.dumps(status.to_json(), allow_nan=False)
    for terminal in (True, False):
        text = shown(status, 130, terminal)
        for word in ("test", "running", "30 of 100", "12,345", "40.0%", "612", "forward", "[bold]slow", "step5-files1"):
            assert word in text, word
        assert "\x1b[31m" not in text
    lines = shown(status, 130).splitlines()
    assert lines[0].count("─ test") == 2 and max(map(len, lines)) <= 130  # side by side
    narrow = shown(status, 80).splitlines()
    assert sum("─ test" in line for line in narrow) == 2 and max(map(len, narrow)) <= 80
    assert ("step", "30 of 100 (30.0%)") in figures(status)
