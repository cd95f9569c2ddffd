"""scripts/prove_resume.py as a user starts it: real runs, real kills, and the proof it prints."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.trial import Moment, Trial
from tests.runs import ROOT, make_shards, plain_environment, tiny_config

SCRIPT = ROOT / "scripts" / "prove_resume.py"
KILL = ("--kills", "1", "--steps", "16", "--seed", "9")  # before the half: a busy machine kills late


def prove(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--config", str(tiny_config(folder)), *options]
    return subprocess.run(command, cwd=folder, env=plain_environment(), capture_output=True, text=True, check=False)


def checks(printed: str) -> dict[str, float]:
    tree = json.loads(printed)
    assert tree["name"] == "prove_resume"
    return {check["name"]: check["value"] for check in tree["checks"]}


def test_a_killed_run_is_the_run_it_would_have_been(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    ended = prove(tmp_path, *KILL, "--json", "--keep", str(kept))
    assert ended.returncode == 0, ended.stderr
    assert checks(ended.stdout) == {
        "kills": 1,
        "steps_compared": 16,
        "figures_that_differ": 0,
        "final_tensors_that_differ": 0,
        "windows_repeated": 0,
        "windows_skipped": 0,
    }
    tree = json.loads(ended.stdout)
    assert [each["last_step"] >= each["resumed_at"] for each in tree["kills"]] == [True]
    lines = [path.read_text().splitlines() for path in sorted(kept.glob("logs/*-killed/metrics.jsonl"))]
    assert tree["records_compared"] == sum(map(len, lines)) == 16 + tree["lost_work"]["steps_again"]
    assert tree["settings"]["train.max_steps"] == "12 → 16"
    assert (kept / "bucket").is_dir()  # no run was without one


def test_a_resume_in_another_data_order_is_refused_and_told(tmp_path: Path, monkeypatch, capsys) -> None:
    """The shards change between the kill and the next start."""
    main = runpy.run_path(str(SCRIPT))["main"]
    shards, start = make_shards(tmp_path / "shards", n_shards=3), Trial.start

    def start_and_change_the_shards(trial: Trial, kill_at: Moment | None = None) -> bool:
        ended = start(trial, kill_at)
        if kill_at:
            make_shards(shards, n_shards=3, seed=9)
        return ended

    monkeypatch.setattr(Trial, "start", start_and_change_the_shards)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = str(tiny_config(tmp_path))
    assert main(["--config", config, "--data", str(shards), *KILL]) == 5
    error = capsys.readouterr().err
    assert "ended with exit code 5" in error
    assert "another data order" in error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--optim.lrr", "1"), "did you mean --optim.lr"),
        (("--ranks", "3", "--batch.micro_size", "2"), "not divisible"),
        (("--steps", "2"), "at least 8"),
        (("--keep", "."), "is not empty"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(tmp_path: Path, options, problem: str) -> None:
    ended = prove(tmp_path, *options)
    assert ended.returncode == 2
    assert problem in ended.stderr


@pytest.mark.slow
def test_the_shipped_config_with_five_kills(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--config", "test", "--kills", "5", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, env=plain_environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert checks(ended.stdout)["kills"] == 5


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    ended = prove(tmp_path, "--kills", "2", "--ranks", "2", "--json")
    assert ended.returncode == 0, ended.stderr
    assert checks(ended.stdout)["windows_repeated"] == 0
