from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from pretrain import log
from pretrain.console import ConsoleSink, format_duration, format_step, print_summary

RECORD = {
    "step": 120,
    "loss": 5.1234,
    "lr": 1.93e-3,
    "grad_norm": 0.8712,
    "tokens_per_second": 4812.4,
    "steps_per_second": 1.1748,
    "mfu": 0.412,
    "files": 12,
    "data_wait_ms": 0.31,
    "skipped_updates": 0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def package_log(tmp_path):
    log.setup(0, tmp_path)
    yield
    root = logging.getLogger("pretrain")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.propagate = True


@pytest.fixture
def terminal(monkeypatch):
    """The shared console as a terminal of 80 columns; what was drawn there."""
    drawn = io.StringIO()
    monkeypatch.setattr(log, "_CONSOLE", Console(file=drawn, force_terminal=True, width=80, _environ={"TERM": "xterm"}))
    return drawn


def shown_steps(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"INFO +step +(\d+)/", text)]


def test_a_line_shows_every_figure_in_the_units_of_the_field():
    assert format_step(RECORD, 244, 105.2) == (
        "step 120/244 | loss 5.1234 | lr 1.93e-03 | grad 0.87 | 4,812 tok/s | 1.17 steps/s | MFU 41.2 % | files 12 "
        "| wait 0.3 ms | ETA 1:45"
    )


def test_a_line_leaves_out_what_was_not_measured():
    assert format_step({"step": 3, "loss": 2.0, "mfu": None}, 1000, None) == "step    3/1000 | loss 2.0000"


def test_a_line_shows_gpu_loss_scale_and_skips_where_there_are_any():
    record = {
        "step": 1,
        "gpu_utilization": 97.2,
        "gpu_memory_gb": 31.25,
        "loss_scale": 65536.0,
        "skipped_updates": 2,
        "val_loss": 4.5,
    }
    assert format_step(record, 9, None) == "step 1/9 | val loss 4.5000 | GPU 97 % | 31.2 GB | scale 65,536 | skipped 2"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (105, "1:45"), (7384, "2:03:04"), (273900, "3 d 04:05"), (-1, "0:00")],
)
def test_durations_fit_a_line(seconds, text):
    assert format_duration(seconds) == text


def test_lines_come_every_ten_seconds_and_for_first_last_and_validation(clock, capsys):
    sink = ConsoleSink(total_steps=40, clock=clock)
    for step in range(1, 41):
        sink.write({"step": step, "loss": 1.0} | ({"val_loss": 2.0} if step == 17 else {}))
        clock.now += 1.0
    sink.close()
    assert shown_steps(capsys.readouterr().out) == [1, 11, 17, 27, 37, 40]


def test_the_eta_follows_the_pace_after_the_first_step(clock, capsys):
    sink = ConsoleSink(total_steps=100, every_s=0, clock=clock)
    clock.now += 500  # compilation
    sink.write({"step": 10, "steps_per_second": 0.5})
    clock.now += 30
    sink.write({"step": 20, "steps_per_second": 9.0})
    assert re.findall(r"ETA (\S+)", capsys.readouterr().out) == ["3:00", "4:00"]


def test_a_terminal_gets_a_bar_and_the_file_the_lines(clock, terminal, tmp_path):
    sink = ConsoleSink(total_steps=244, clock=clock)
    sink.write(RECORD | {"val_loss": 4.5})
    log.get("x").info("above the bar")
    clock.now += 1
    sink.write(RECORD | {"step": 244})
    sink.close()
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert "step 120/244" in drawn
    assert "above the bar" in drawn
    last = drawn[drawn.rindex("step 244/244") :]
    assert "100%" in last
    assert "val loss 4.5000" in last  # the newest validation stays in sight
    assert "INFO    step" not in drawn
    assert len(re.findall(r"INFO .* step \d+/244", (tmp_path / "training.log").read_text())) == 2


def test_a_bar_leaves_the_cursor_visible_in_case_the_run_is_killed(clock, terminal):
    sink = ConsoleSink(total_steps=244, clock=clock)
    sink.write(RECORD)
    drawn_before_the_kill = terminal.getvalue()
    sink.close()
    assert drawn_before_the_kill.rfind("\x1b[?25h") > drawn_before_the_kill.rfind("\x1b[?25l") >= 0


def test_the_bar_is_not_drawn_faster_than_an_eye_reads(clock, terminal):
    sink = ConsoleSink(total_steps=1000, clock=clock)
    for step in range(1, 101):
        sink.write({"step": step, "loss": 1.0})
        clock.now += 0.001
    assert terminal.getvalue().count("ETA") < 5
    sink.close()


def test_a_narrow_terminal_breaks_the_figures_only_between_them(clock, terminal):
    sink = ConsoleSink(total_steps=244, clock=clock)
    sink.write(RECORD | {"gpu_utilization": 97.0, "gpu_memory_gb": 31.2})
    sink.close()
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()
    figures = [line.strip() for line in lines if " | " in line]
    assert figures[-2:] == [
        "loss 5.1234 | lr 1.93e-03 | grad 0.87 | 4,812 tok/s | 1.17 steps/s | MFU 41.2 %",
        "files 12 | wait 0.3 ms | GPU 97 % | 31.2 GB",
    ]


SUMMARY = {
    "files_processed": 25,
    "tokens": 999424,
    "steps": 244,
    "first_loss": 9.03,
    "val_loss": None,
    "mfu": 0.5213,
    "uploads_failed": 0,
    "logs": "logs/" + "x" * 120,
}
COMMANDS = [("Go on", "python train.py --config test --resume auto " + "--option " * 12)]


def test_the_final_table_is_aligned_text_away_from_a_terminal():
    out = io.StringIO()
    print_summary(SUMMARY, Console(file=out, width=80), COMMANDS)
    lines = out.getvalue().splitlines()
    assert "tokens          999,424" in lines
    assert "uploads failed  0" in lines
    assert "MFU             52.1 %" in lines
    assert f"logs            {SUMMARY['logs']}" in lines
    assert f"    {COMMANDS[0][1]}" in lines
    assert "validation" not in out.getvalue()


def test_the_final_table_is_a_table_on_a_terminal_and_commands_stay_in_one_piece(terminal):
    print_summary(SUMMARY, log.console(), COMMANDS)
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert "│ tokens " in drawn
    assert COMMANDS[0][1] in drawn


CAUSES = {"training": 1.5, "data_wait": 0.25, "checkpoint": 0.25, "eval": 0.0, "startup": 0.5, "lost": 0.0}
LEDGER = {"hours": 2.5, "hours_by_cause": {**CAUSES, "stopped": 0.0}, "restarts": 0, "lost_steps": 0, "lost_tokens": 0}


def table_of(ledger: dict) -> list[str]:
    out = io.StringIO()
    print_summary({"steps": 3, "ledger": {"energy_kwh": None, "cost_usd": None, **ledger}}, Console(file=out))
    return [re.sub(" +", " ", line) for line in out.getvalue().splitlines() if line]


def test_the_final_table_says_where_the_time_went():
    assert table_of(LEDGER) == [
        "steps 3",
        "time 2:30:00: training 60.0 %, startup 20.0 %, data wait 10.0 %, checkpoint 10.0 %",
    ]
    assert table_of({}) == ["steps 3"]


def test_the_final_table_says_what_restarts_and_the_hours_cost():
    lost = {"restarts": 1, "lost_steps": 12, "lost_tokens": 98304, "energy_kwh": 5.25, "cost_usd": 1234.5}
    lines = table_of({**LEDGER, **lost, "hours_by_cause": {**CAUSES, "stopped": 0.1}})
    assert lines[1].endswith("checkpoint 10.0 %; stopped for 6:00 besides")
    assert lines[2:] == ["work done twice 12 steps, 98,304 tokens; 1 restart", "energy 5.25 kWh", "cost 1,234.50 USD"]
