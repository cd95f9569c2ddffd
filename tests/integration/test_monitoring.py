"""A run that is stopped and resumed, watched here and from the bucket, and reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import PATIENCE_S, ROOT, RUN, TrainingProcess, make_shards, metrics, plain_environment, train

OPTIONS = ("--checkpoint.every_steps", "5", "--train.eval_interval", "6")


@pytest.fixture(scope="module")
def place(tmp_path_factory, gcs):
    """(folder of the run, url of its checkpoints, the environment that reaches the bucket)."""
    folder = tmp_path_factory.mktemp("watched")
    make_shards(folder / "shards")
    url = f"gs://{gcs.bucket}/watched"
    environment = plain_environment(STORAGE_EMULATOR_HOST=gcs.endpoint, NO_GCE_CHECK="true")
    options = ("--data", "shards", "--data.val_source", "shards", "--checkpoints", url, *OPTIONS)
    with TrainingProcess(folder, *options, "--max-steps", "1000000", environment=environment) as first:
        first.until_step(7)
        during = ask("monitor_training", folder, RUN, "--once", "--json", environment=environment)
        first.signal(signal.SIGTERM)
        assert first.wait().code == 75
    stopped = ask("monitor_training", folder, RUN, "--once", "--json", environment=environment)
    steps = metrics(folder)[-1]["step"] + 6
    ended = train(folder, *options, "--resume", "auto", "--max-steps", str(steps), environment=environment)
    assert ended.code == 0, ended.output
    return folder, url, environment, during, stopped


def ask(script, folder, *words, environment, code=0):
    """What a script prints, which must end with this code."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def only_run(output):
    (run,) = json.loads(output)["runs"]
    return run


def test_a_monitor_tells_running_stopped_and_done(place):
    folder, _, environment, during, stopped = place
    assert only_run(during)["state"] == "running" and only_run(during)["total_steps"] == 1_000_000
    assert only_run(stopped)["state"] == "stopped"
    now = only_run(ask("monitor_training", folder, "--once", "--json", environment=environment))
    assert (now["name"], now["state"], now["fraction"], now["restarts"]) == (RUN, "done", 1.0, 1)
    assert now["uploads"]["committed"] == now["uploads"]["saved"] >= 2 and now["checkpoint"]["committed"]
    assert now["val_loss"] is not None and now["notes"] == []
    text = ask("monitor_training", folder, RUN, "--once", environment=environment)
    assert f"{RUN}: done, complete" in text and "val loss" in text
    lines = ask("monitor_training", folder, RUN, "--once", "--logs-only", environment=environment)
    assert "pretrain.console  step" in lines and 20 < len(lines.splitlines()) <= 40


def test_the_same_is_told_from_the_bucket(place):
    folder, url, environment, _, _ = place
    here = only_run(ask("monitor_training", folder, RUN, "--once", "--json", environment=environment))
    for word in (f"{url}/{RUN}", url):
        there = only_run(ask("monitor_training", folder, word, "--once", "--json", environment=environment))
        for key in ("name", "state", "step", "loss", "val_loss", "uploads", "restarts", "warnings"):
            assert there[key] == here[key], key


def test_no_tool_mistakes_the_logs_for_a_checkpoint(place, gcs, monkeypatch):
    from pretrain.config import StorageConfig
    from pretrain.storage import open_store

    folder, url, environment, _, _ = place
    listing = ask("checkpoint_viewer", folder, "list", "--url", url, "--json", environment=environment)
    assert all(each["verified"] for each in json.loads(listing)["checkpoints"])
    cleaned = ask(
        "checkpoint_viewer", folder, "clean", "--url", url, "--delete", "--older_than_hours", "0", "--json",
        environment=environment,
    )  # fmt: skip
    assert json.loads(cleaned)["leftovers"] == []
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
    store = open_store(url, StorageConfig())
    logs = {Path(info.name).name: info.size for info in store.list(f"{RUN}/logs/")}
    for file in ("metrics.jsonl", "events.jsonl", "training.log", "config.yaml", "summary.json", "report.html"):
        assert logs[file] > 0
    for file in ("metrics.jsonl", "events.jsonl", "summary.json", "report.html"):
        assert store.read_bytes(f"{RUN}/logs/{file}") == (folder / "logs" / RUN / file).read_bytes()


def test_a_run_that_is_not_there_is_an_error_that_names_what_is(place):
    folder, url, environment, _, _ = place
    said = ask("monitor_training", folder, "tinny", "--once", environment=environment, code=2)
    assert "there is no run tinny" in said and "Did you mean tiny?" in said
    assert "no logs of a run" in ask("monitor_training", folder, f"{url}/no", "--once", environment=environment, code=2)
    assert "Give --once too" in ask("monitor_training", folder, "--json", environment=environment, code=2)
    assert "--refresh is 0" in ask("monitor_training", folder, "--refresh", "0", environment=environment, code=2)


def test_the_page_of_a_run_is_made_at_its_end_and_again_by_the_script_and_from_the_bucket(place):
    folder, url, environment, _, _ = place
    made = (folder / "logs" / RUN / "report.html").read_text()
    assert f"<title>Run {RUN}</title>" in made and 'badge good">done' in made and "resumed" in made
    (folder / "logs" / RUN / "report.html").unlink()
    assert "written: logs/tiny/report.html" in ask("report", folder, RUN, environment=environment)
    told = json.loads(ask("report", folder, RUN, f"{url}/{RUN}", "-o", "two.html", "--json", environment=environment))
    assert told["runs"] == [RUN, RUN] and told["bytes"] == (folder / "two.html").stat().st_size
    assert "The settings are the same." in (folder / "two.html").read_text()
    assert "there is no run x" in ask("report", folder, "x", environment=environment, code=2)
    assert "Name the page" in ask("report", folder, url, environment=environment, code=2)
    said = ask("report", folder, RUN, "-o", "shards/tokenized_cleaned_000.npz/x.html", environment=environment, code=4)
    assert "storage error" in said
