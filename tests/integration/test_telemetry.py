"""What real runs record of themselves, and what TensorBoard and W&B show of a run that was killed and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.metrics import read_ledger
from pretrain.phases import PHASES
from pretrain.power import HEADER
from tests.displays import read_tensorboard, read_wandb
from tests.runs import RUN, TrainingProcess, make_shards, metrics, plain_environment, train

PHASE_FIELDS = ("data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms")


def logs(folder: Path) -> Path:
    return folder / "logs" / RUN


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((logs(folder) / "summary.json").read_text()))


def raw_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (logs(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every display on, killed behind its checkpoint of step 10 and resumed to step 30."""
    folder = tmp_path_factory.mktemp("killed")
    make_shards(folder / "shards")
    options = ["--checkpoint.every_steps", "10", "--resume", "auto", "--max-steps", "30", "--profile", "25:26"]
    options += ["--log.tensorboard", "true", "--wandb", "--price_per_gpu_hour", "36"]
    environment = plain_environment(WANDB_MODE="offline", NETRC=str(folder / "netrc"))
    environment["PRETRAIN_FAILPOINT"] = "loop.before_step:15:hang"  # its threads write the save of step 10 meanwhile
    with TrainingProcess(folder, *options, environment=environment) as first:
        first.until_step(14)
        first.until(
            lambda: list(folder.glob("checkpoints/*/checkpoint-*-step10-*/manifest.json")), "the save of step 10"
        )
        first.until(
            lambda: 14 in [step for run in read_wandb(logs(folder)) for step, _ in run.points("train/loss")],
            "W&B's file",
        )
    assert raw_steps(folder) == list(range(1, 15)), first.output
    del environment["PRETRAIN_FAILPOINT"]
    ended = train(folder, *options, environment=environment)
    assert ended.code == 0, ended.output
    (folder / "output.txt").write_text(ended.output)
    return folder


def test_each_record_has_the_phases_of_its_step_and_both_mfus(killed):
    records = metrics(killed)
    for record in records:
        parts = [record[name] for name in PHASE_FIELDS]
        assert all(part > 0 for part in parts) and sum(parts) <= record["step_ms"] + 1e-6
        assert sum(parts) + record["other_ms"] == pytest.approx(record["step_ms"])
        assert 0 < record["mfu_causal"] < record["mfu"]
    assert [record["step"] for record in records if "eval_ms" in record] == [30]
    assert [record["step"] for record in records if "checkpoint_ms" in record] == [21]


def test_power_csv_goes_on_over_the_restart_with_whole_rows(killed):
    lines = (logs(killed) / "power.csv").read_text().splitlines()
    assert lines[0] == HEADER and lines.count(HEADER) == 1
    rows = [line.split(",") for line in lines[1:]]
    assert all(len(row) == len(HEADER.split(",")) and row[2] in PHASES for row in rows)
    times = [float(row[0]) for row in rows]
    assert times == sorted(times) and max(int(row[1]) for row in rows) > 15


def test_the_ledger_is_over_both_starts_in_the_summary_and_in_the_table(killed):
    ledger = summary(killed)["ledger"]
    lost = {"restarts": 1, "lost_steps": 4, "lost_tokens": 4 * 8 * 32, "tokens": 30 * 8 * 32}
    assert {name: ledger[name] for name in lost} == lost
    hours = ledger["hours_by_cause"]
    assert all(hours[cause] > 0 for cause in ("training", "data_wait", "checkpoint", "startup", "lost", "stopped"))
    assert ledger["hours"] == pytest.approx(sum(hours.values()) - hours["stopped"])
    times = [record["time"] for record in metrics(killed)]
    assert ledger["hours"] * 3600 > times[-1] - times[10]
    assert ledger["cost_usd"] == pytest.approx(36 * ledger["hours"])
    output = (killed / "output.txt").read_text()
    assert "work done twice" in output and "4 steps, 1,024 tokens; 1 restart" in output and "startup" in output
    read_back = read_ledger(logs(killed)).totals(0.0)
    assert read_back["hours"] == pytest.approx(ledger["hours"], rel=0.5)


def test_the_start_is_told_by_phases_that_add_up_to_it(killed):
    phases = summary(killed)["startup_seconds"]
    assert list(phases)[:3] == ["python", "settings", "torch"] and list(phases)[-1] == "first step"
    assert {"ranks", "checkpoints", "data", "model", "engine", "instruments", "first batch"} <= set(phases)
    (line,) = [line for line in (killed / "output.txt").read_text().splitlines() if "start-up: " in line]
    assert f"{sum(phases.values()):.1f} s: python " in line
    # the books take the time by the wall clock, over both starts
    assert 0.5 < sum(phases.values()) < summary(killed)["ledger"]["hours_by_cause"]["startup"] * 3600 + 1


def test_tensorboard_shows_every_step_once_under_the_names_that_wandb_has(killed):
    board, runs = read_tensorboard(logs(killed)), read_wandb(logs(killed))
    assert len(runs) == 2 and runs[0].run_id == runs[1].run_id
    assert (logs(killed) / "wandb_run_id").read_text().strip() == runs[0].run_id
    recorded = [(record["step"], pytest.approx(record["loss"])) for record in metrics(killed)]
    assert board.points["train/loss"] == recorded
    shown = [point for run in runs for point in run.points("train/loss")]
    # the same losses: a resumed run repeats them to the last bit, so that the first ones can stand
    assert shown == recorded and [step for step, _ in shown] == list(range(1, 31))
    in_wandb = {name for run in runs for row in run.history for name in row if "/" in name}
    assert in_wandb == set(board.points) >= {"perf/forward_ms", "perf/mfu_causal", "perf/checkpoint_ms"}
    for run in runs:
        assert run.config["optim"]["lr"] == 0.003 and run.config["train"]["max_steps"] == 30
    assert [step for step, _ in board.texts["settings"]] == [0, 10]
    assert '"max_steps": 30' in board.texts["settings"][0][1]


def test_the_trace_is_where_the_log_says(killed):
    trace = logs(killed) / "trace-steps25-26.json"
    assert f"trace of torch.profiler: logs/{RUN}/trace-steps25-26.json" in (killed / "output.txt").read_text()
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("forward") == names.count("backward") == 2 * 4  # four micro-batches a step


# ---- budgets ----


@pytest.mark.slow
def test_a_spent_budget_saves_ends_with_0_and_ends_a_resumed_start_at_once(tmp_path):
    make_shards(tmp_path / "shards")
    options = ("--engine", "ddp", "--resume", "auto", "--price_per_gpu_hour", "0.3", "--max-steps")
    begun = train(tmp_path, *options, "5", ranks=2)
    assert begun.code == 0, begun.output
    hours = summary(tmp_path)["ledger"]["hours_by_cause"]
    dollars = summary(tmp_path)["ledger"]["cost_usd"] + 0.6 * (2 * hours["startup"] + 2 / 3600)
    budget = (*options, "1000000", "--train.budget_usd", str(dollars))

    ended = train(tmp_path, *budget, ranks=2)
    assert ended.code == 0, ended.output
    told = summary(tmp_path)
    assert "train.budget_usd" in ended.output and "is spent: " in ended.output and "go on:" in ended.output
    assert told["finished"] is False and told["checkpoints_verified"] >= 1
    assert dollars <= told["ledger"]["cost_usd"] == pytest.approx(0.6 * told["ledger"]["hours"])
    last = told["steps"]
    assert last >= 5 and next((tmp_path / "checkpoints" / RUN).glob(f"checkpoint-*-step{last}-*"))

    again = train(tmp_path, *budget)
    assert again.code == 0, again.output
    assert f"ending at step {last} of 1000000" in again.output
    assert summary(tmp_path)["steps_of_this_process"] == 0 and summary(tmp_path)["ledger"]["restarts"] == 2
    assert raw_steps(tmp_path)[-1] <= last


def test_a_budget_that_is_spent_already_ends_a_start_before_its_first_step(killed, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(killed, folder, ignore=shutil.ignore_patterns("wandb"))
    ended = train(folder, "--train.budget_hours", "1e-4", "--resume", "auto", "--max-steps", "60")
    assert ended.code == 0, ended.output
    assert "train.budget_hours 0.0001 are spent: " in ended.output and "ending at step 30 of 60" in ended.output
    told = summary(folder)
    assert (told["finished"], told["steps_of_this_process"], told["ledger"]["restarts"]) == (False, 0, 2)
    assert raw_steps(folder)[-1] == 30


@pytest.mark.slow
def test_without_telemetry_the_run_is_the_same_and_leaves_no_figures(killed, tmp_path):
    make_shards(tmp_path / "shards")
    ended = train(tmp_path, "--no-telemetry", "--max-steps", "30")
    assert ended.code == 0, ended.output
    plain = metrics(tmp_path)
    assert not {*PHASE_FIELDS, "host_memory_gb"} & set(plain[-1])
    assert not (logs(tmp_path) / "power.csv").exists()
    for name in ("loss", "grad_norm", "lr"):
        assert [record[name] for record in plain] == [record[name] for record in metrics(killed)]
