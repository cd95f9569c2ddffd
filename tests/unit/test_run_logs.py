from __future__ import annotations

import json

import pytest

from pretrain.errors import StorageError
from pretrain.metrics import Metrics
from pretrain.run_logs import Follower, RunLogs, parse_log, read_events, restart_steps


def lines_of(*trees):
    return "".join(json.dumps(tree) + "\n" for tree in trees)


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_a_line_that_is_half_written_waits_for_its_end(tmp_path):
    follower = Follower(tmp_path / "x")
    assert follower.lines() == ([], False)
    append(tmp_path / "x", "one\ntw")
    assert follower.lines() == (["one"], False)
    assert follower.lines() == ([], False)
    append(tmp_path / "x", "o\nthree\n")
    assert follower.lines() == (["two", "three"], False)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "x"
    path.write_text("one\ntwo\n")
    follower = Follower(path)
    follower.lines()
    (tmp_path / "y").write_text("three\nfour\nfive\n")
    (tmp_path / "y").rename(path)
    assert follower.lines() == (["three", "four", "five"], True)
    path.write_text("six\n")  # the same file, cut short
    assert follower.lines() == (["six"], True)
    path.unlink()
    assert follower.lines() == ([], True)
    assert follower.lines() == ([], False)


def test_a_file_that_is_replaced_between_its_opening_and_its_reading_loses_no_line(tmp_path):
    path = tmp_path / "x"
    path.write_text("one\ntwo\n")
    follower = Follower(path)
    with path.open("rb") as file:
        (tmp_path / "y").write_text("three\nfour\nfive\n")
        (tmp_path / "y").rename(path)
        assert follower._new_lines(file) == (["one", "two"], False)
    assert follower.lines() == (["three", "four", "five"], True)


def test_of_a_long_file_only_the_tail_is_read(tmp_path):
    (tmp_path / "x").write_text("".join(f"line {number}\n" for number in range(10_000)))
    follower = Follower(tmp_path / "x", tail_bytes=100)
    lines, _ = follower.lines()
    assert lines[-1] == "line 9999" and len(lines) == 9 and all(line.startswith("line 9") for line in lines)
    append(tmp_path / "x", "last\n")
    assert follower.lines() == (["last"], False)


def test_what_cant_be_read_is_an_error(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        Follower(tmp_path / "x").lines()


def test_a_run_is_joined_over_its_restarts_while_it_is_written(tmp_path):
    run = RunLogs("r", tmp_path)
    run.refresh()
    assert run.is_empty and run.ended is None and run.updated_s is None
    with Metrics(tmp_path, [], total_steps=9, clock=lambda: 10.0) as metrics:
        for step in (1, 2, 3):
            metrics.record({"step": step, "loss": 1.0, "time": 10.0 + step})
    run.refresh()
    assert [record["step"] for record in run.records] == [1, 2, 3]
    assert (run.total_steps, run.updated_s, run.starts[0]["kind"]) == (9, 13.0, "started")
    with Metrics(tmp_path, [], first_step=1, total_steps=12, clock=lambda: 20.0) as metrics:
        metrics.record({"step": 2, "loss": 2.0, "time": 21.0})
        append(tmp_path / "metrics.jsonl", "{torn\n")
        run.refresh()
        assert [(record["step"], record["loss"]) for record in run.records] == [(1, 1.0), (2, 2.0)]
        assert (run.restart_steps, run.total_steps, run.torn, run.ended) == ((1,), 12, 1, None)
        metrics.ended(stopped=True)
    run.refresh()
    assert run.ended["exit_code"] == 75 and run.ended["step"] == 2
    with Metrics(tmp_path, [], first_step=2):
        run.refresh()
        assert run.ended is None  # of the process before


def test_an_error_is_told_as_the_end_with_its_code_and_without_secrets(tmp_path):
    with pytest.raises(StorageError), Metrics(tmp_path, []) as metrics:
        metrics.record({"step": 4})
        raise StorageError("no access to https://user:hunter2@host", "Log in.")
    with pytest.raises(RuntimeError), Metrics(tmp_path, [], first_step=4):
        raise RuntimeError("boom")
    ends = [event for event in read_events(tmp_path) if event["kind"] == "ended"]
    assert [(end["step"], end.get("exit_code")) for end in ends] == [(4, 4), (4, None)]
    assert "no access" in ends[0]["reason"] and "hunter2" not in ends[0]["reason"]
    assert ends[1]["reason"] == "RuntimeError: boom"


def test_of_several_ends_the_one_that_says_how_counts(tmp_path):
    events = [{"kind": "started"}, {"kind": "ended", "reason": "done", "exit_code": 0}, {"kind": "ended"}]
    (tmp_path / "events.jsonl").write_text(lines_of(*events))
    run = RunLogs("r", tmp_path)
    run.refresh()
    assert run.ended["exit_code"] == 0
    append(tmp_path / "events.jsonl", lines_of({"kind": "ended", "reason": "storage error", "exit_code": 4}))
    run.refresh()
    assert run.ended["exit_code"] == 4


def test_a_run_that_was_begun_anew_has_no_past(tmp_path):
    events = [
        {"kind": "started", "step": 0},
        {"kind": "resumed", "step": 5},
        {"kind": "started", "step": 0},
        {"kind": "resumed", "step": 7},
        {"kind": "resumed", "step": 7},
        {"kind": 3},
        [1],
    ]
    (tmp_path / "events.jsonl").write_text(lines_of(*events) + "garbage\n")
    found = read_events(tmp_path)
    assert [event["kind"] for event in found] == ["started", "resumed", "resumed"] and restart_steps(found) == (7,)
    run = RunLogs("r", tmp_path)
    run.refresh()
    assert run.events == found and run.restart_steps == (7,)


def test_of_an_older_version_the_log_tells_the_total(tmp_path):
    (tmp_path / "events.jsonl").write_text(lines_of({"kind": "started", "step": 0, "time": 1.0}))
    text = "2026-01-02 03:04:05,678 INFO    pretrain.console  step  87/400 | loss 5.8563 | lr 2.80e-03\n"
    text += "2026-01-02 03:04:06,678 WARNING pretrain.uploads  slow\nTraceback\n"
    (tmp_path / "training.log").write_text(text)
    run = RunLogs("r", tmp_path)
    run.refresh()
    assert run.total_steps == 400
    assert [(message.level, message.text) for message in run.messages if message.is_warning] == [("WARNING", "slow")]


def test_a_line_of_the_log_has_a_time_a_level_and_a_text():
    (line,) = parse_log(["2026-01-02 03:04:05,678 ERROR   pretrain.x  it  broke", "  more", ""])
    assert (line.level, line.text, line.is_warning) == ("ERROR", "it  broke", True)
    assert parse_log(["2026-99-99 03:04:05,678 INFO    pretrain.x  text"])[0].time_s == 0.0


def test_documents_that_are_too_big_or_none_are_left_out(tmp_path):
    (tmp_path / "summary.json").write_text("[1]")
    (tmp_path / "config.yaml").write_bytes(b"x" * (17 << 20))
    run = RunLogs("r", tmp_path)
    run.refresh()
    assert (run.summary, run.config_text) == ({}, "")
    (tmp_path / "summary.json").write_text('{"steps": 5}')
    run.refresh()
    assert run.summary == {"steps": 5}
