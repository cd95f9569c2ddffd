from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import LogConfig
from pretrain.errors import StorageError
from pretrain.metrics import Metrics, NoMetrics, open_metrics, read_metrics
from pretrain.sinks import Sink


class Notes(Sink):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def write(self, record):
        self.calls.append(("write", dict(record)))

    def event(self, kind, fields):
        self.calls.append(("event", (kind, dict(fields))))

    def summary(self, fields):
        self.calls.append(("summary", dict(fields)))

    def close(self):
        self.calls.append(("close", None))


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(lines))
    return path


def record(metrics: Metrics, *steps: int, loss: float = 1.0) -> None:
    for step in steps:
        metrics.record({"step": step, "loss": loss})


def steps_and_losses(path: Path) -> list[tuple[int, float]]:
    return [(found["step"], found["loss"]) for found in read_metrics(path)]


def test_each_record_is_one_json_line_on_disk_before_close(tmp_path):
    metrics = Metrics(tmp_path, [], clock=lambda: 99.5)
    metrics.record({"step": 1, "loss": 2.5, "loss_scale": None, "note": "warm"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.5, "note": "warm", "time": 99.5}]


def test_a_time_that_is_given_is_kept(tmp_path):
    Metrics(tmp_path, []).record({"step": 1, "time": 5.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "time": 5.0}]


@pytest.mark.parametrize("step", [None, 1.0, "1"])
def test_a_record_without_an_integer_step_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match="integer 'step'"):
        Metrics(tmp_path, []).record({"step": step})


def test_values_that_json_lacks_stay_valid_json_and_come_back(tmp_path):
    metrics = Metrics(tmp_path, [])
    metrics.record({"step": 1, "loss": math.nan, "grad_norm": math.inf, "x": -math.inf, "y": np.float32(0.5)})

    def refuse(word):
        raise AssertionError(word)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] == "NaN"
    (found,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(found["loss"])
    assert (found["grad_norm"], found["x"], found["y"]) == (math.inf, -math.inf, 0.5)


def test_a_resumed_run_overwrites_the_steps_it_repeats(tmp_path):
    with Metrics(tmp_path, []) as first:
        record(first, 1, 2, 3, 4, 5, loss=1.0)
    with Metrics(tmp_path, [], first_step=2) as second:
        record(second, 3, 4, loss=2.0)
        # Step 5 of the lost process is no step of this run any more.
        assert steps_and_losses(tmp_path / "metrics.jsonl") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
        record(second, 5, 6, loss=2.0)
    assert [step for step, _ in steps_and_losses(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9  # append-only


def test_the_last_line_of_a_step_wins(tmp_path):
    path = write_lines(tmp_path / "m", '{"step": 1, "loss": 1}\n', '{"step": 1, "loss": 2}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 2}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step"', '{"step": 2, "loss": 1', "{", '"st', "12", "\x00\x00"])
def test_a_torn_last_line_is_dropped_and_mended_before_the_next_one(tmp_path, torn):
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 1.0}\n', torn)
    assert steps_and_losses(path) == [(1, 1.0)]
    record(Metrics(tmp_path, [], first_step=1), 2, loss=2.0)
    assert steps_and_losses(path) == [(1, 1.0), (2, 2.0)]


def test_a_whole_last_line_that_lost_only_its_newline_is_kept(tmp_path):
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 1.0}')
    record(Metrics(tmp_path, [], first_step=1), 2, loss=2.0)
    assert steps_and_losses(path) == [(1, 1.0), (2, 2.0)]


def test_sinks_see_everything_in_order_and_are_closed_once(tmp_path):
    notes = Notes()
    with Metrics(tmp_path, [notes], first_step=4, clock=lambda: 1.0) as metrics:
        metrics.record({"step": 5, "loss": 2.0, "mfu": None})
        metrics.event("validation", step=5, val_loss=1.5)
        metrics.summary({"steps": 5})
        metrics.close()
    assert notes.calls == [
        ("event", ("resumed", {"step": 4, "format": 1})),
        ("write", {"step": 5, "loss": 2.0, "time": 1.0}),
        ("event", ("validation", {"step": 5, "val_loss": 1.5})),
        ("summary", {"steps": 5}),
        ("close", None),
    ]


def test_events_have_their_own_file_and_a_late_one_is_kept(tmp_path):
    metrics = Metrics(tmp_path, [], clock=lambda: 3.0)
    metrics.close()
    metrics.event("upload_failed", name="checkpoint-1", error="403")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == [
        {"kind": "started", "time": 3.0, "step": 0, "format": 1},
        {"kind": "ended", "time": 3.0},
        {"kind": "upload_failed", "time": 3.0, "name": "checkpoint-1", "error": "403"},
    ]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_summary_is_whole_json_and_leaves_no_temporary_file(tmp_path):
    metrics = Metrics(tmp_path, [])
    metrics.summary({"steps": 1})
    path = metrics.summary({"last_loss": math.nan, "where": Path("a/b"), "skipped": ["x.npz"], "nested": {"n": 1}})
    assert json.loads(path.read_text()) == {
        "last_loss": "NaN",
        "where": "a/b",
        "skipped": ["x.npz"],
        "nested": {"n": 1},
    }
    assert sorted(found.name for found in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl", "summary.json"]


def test_records_of_many_threads_never_mix_in_a_line(tmp_path):
    metrics = Metrics(tmp_path, [])
    threads = [
        threading.Thread(target=lambda: [metrics.event("e", text="x" * 500) for _ in range(50)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    record(metrics, *range(1, 101))
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]) == 401
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 100


def test_an_unwritable_folder_is_a_storage_error_with_the_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*--log\.dir"):
        Metrics(tmp_path / "file" / "run", [])
    with pytest.raises(StorageError):
        open_metrics(LogConfig(dir=str(tmp_path / "file")), "r", settings={}, total_steps=1, first_step=0, rank=0)


def test_a_full_disk_is_a_storage_error(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "metrics.jsonl").symlink_to(full)
    metrics = Metrics(tmp_path, [])
    with pytest.raises(StorageError, match="No space left"):
        record(metrics, 1)


def test_other_ranks_record_nothing(tmp_path):
    metrics = open_metrics(LogConfig(dir=str(tmp_path)), "run", settings={}, total_steps=9, first_step=0, rank=1)
    with metrics:
        record(metrics, 1)
        metrics.event("validation", step=1)
        assert metrics.summary({"steps": 1}) == tmp_path / "run" / "summary.json"
    assert isinstance(metrics, NoMetrics)
    assert list(tmp_path.iterdir()) == []


def test_rank_0_writes_under_the_run_name(tmp_path, capsys):
    config = LogConfig(dir=str(tmp_path), tensorboard=False)
    with open_metrics(config, "run", settings={}, total_steps=9, first_step=0, rank=0) as metrics:
        record(metrics, 1)
    assert steps_and_losses(tmp_path / "run" / "metrics.jsonl") == [(1, 1.0)]


def test_reading_a_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_sink_that_fails_at_the_end_keeps_no_other_from_ending(tmp_path):
    class Failing(Sink):
        def __init__(self, fails):
            self.fails, self.closed = fails, False

        def close(self):
            self.closed = True
            if self.fails:
                raise StorageError("the disk is full", "Free some.")

    sinks = [Failing(True), Failing(False)]
    metrics = Metrics(tmp_path, sinks)
    with pytest.raises(StorageError, match="full"):
        metrics.close()
    assert [sink.closed for sink in sinks] == [True, True]


@pytest.mark.parametrize(
    ("stopped", "spent", "told"),
    [(False, "", [0, "done"]), (True, "", [75, "stopped by a signal after saving"]), (False, "3 USD", [0, "3 USD"])],
)
def test_how_a_run_has_ended_well_is_told_once(tmp_path, stopped, spent, told):
    metrics = Metrics(tmp_path, [])
    metrics.ended(stopped, spent)
    metrics.close()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [[event["exit_code"], event["reason"]] for event in events if event["kind"] == "ended"] == [told]


def test_an_event_tells_no_secret(tmp_path):
    with Metrics(tmp_path, []) as metrics:
        metrics.event("upload_failed", problem="401: Authorization: Bearer very-secret-token-of-somebody")
    assert "very-secret" not in (tmp_path / "events.jsonl").read_text()
