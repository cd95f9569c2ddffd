"""A supervised run of two ranks, disturbed: it comes back by itself and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import (
    RUN,
    StartedProcess,
    differing,
    final_state,
    launch_command,
    losses,
    make_shards,
    plain_environment,
    tiny_config,
    train,
)

STEPS = 300
OPTIONS = ("--engine", "native", "--checkpoint.every_steps", "20", "--resume", "auto", "--max-steps", str(STEPS))
HANG_TIMEOUT_S = 8.0  # up to the first checkpoint: a whole run on a busy machine has steps that take longer


class SupervisedTraining(StartedProcess):
    """`python -m pretrain.supervise` around the launcher with two ranks of train.py.

    Args:
        hang_timeout_s: is in the config file, where another may take its place before the next start.
    """

    def __init__(
        self, folder: Path, *options: str, supervisor: tuple[str, ...] = (), hang_timeout_s: float = 600.0
    ) -> None:
        config = tiny_config(folder)
        config.write_text(config.read_text().replace("train: {", f"train: {{hang_timeout_s: {hang_timeout_s}, "))
        words = [sys.executable, "-m", "pretrain.supervise", "--backoff-s", "0.1", *supervisor, "--"]
        words += [*launch_command(2), "--config", str(config), *OPTIONS, *options]
        super().__init__(folder, words, plain_environment())

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of train.py by their rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                environment = process.environ()
                if "RANK" in environment and any(word.endswith("train.py") for word in process.cmdline()):
                    found[int(environment["RANK"])] = process
        return found

    def until_ranks(self) -> dict[int, psutil.Process]:
        """The ranks, as soon as there are two."""
        self.until(lambda: len(self.ranks()) == 2, "two ranks")
        return self.ranks()

    def launcher(self) -> psutil.Process:
        """The launcher that runs now."""
        (launcher,) = psutil.Process(self.process.pid).children()
        return launcher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards")
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run without a disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_shards(folder / "shards")
    ended = train(folder, *OPTIONS, ranks=2)
    assert ended.code == 0, ended.output
    return folder


def restarts(folder: Path) -> list[dict[str, Any]]:
    path = folder / "logs" / RUN / "restarts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_run(folder: Path, other: Path) -> None:
    assert losses(folder) == losses(other) and len(losses(folder)) == STEPS
    assert differing(final_state(folder), final_state(other)) == []


def test_a_stopped_rank_is_noticed_and_the_run_ends_as_if_nothing_had_happened(folder, undisturbed):
    with SupervisedTraining(folder, hang_timeout_s=HANG_TIMEOUT_S) as training:
        ranks = training.until_ranks()
        training.until(lambda: list(folder.glob("checkpoints/*/checkpoint-*/manifest.json")), "the first checkpoint")
        tiny_config(folder)  # the next start has the usual patience
        ranks[1].suspend()
        training.until_said("restart 1 of 3")
        assert not ranks[1].is_running()
        ended = training.wait()
    assert ended.code == 0, ended.output
    stacks = (folder / "logs" / RUN / "stacks-rank0.txt").read_text()
    assert "in loop" in stacks and f"pid {ranks[0].pid}" in stacks
    (line,) = [line for line in (folder / "logs" / RUN / "training.log").read_text().splitlines() if "hangs" in line]
    assert "rank 0" in line and "stacks-rank0.txt" in line
    (restart,) = restarts(folder)
    assert restart["exit_code"] == 134 and restart["step"] >= 20
    assert_same_run(folder, undisturbed)


def test_a_killed_rank_and_a_killed_launcher_are_outlived(folder, undisturbed):
    with SupervisedTraining(folder) as training:
        ranks = training.until_ranks()
        training.until_step(22)
        ranks[1].kill()  # as the kernel does when there is no memory left
        training.until_said("restart 1 of 3")
        training.until_step(max(losses(folder)) + 1)
        training.launcher().kill()
        training.until(lambda: len(restarts(folder)) == 2, "the second restart")
        ended = training.wait()
    assert ended.code == 0, ended.output
    assert [restart["exit_code"] for restart in restarts(folder)] == [137, 137]
    assert "rank 1" in ended.output and "out of memory?" in ended.output
    assert_same_run(folder, undisturbed)


def test_what_a_restart_cannot_mend_is_not_restarted(folder):
    with SupervisedTraining(folder, "--train.precision", "fp17") as training:
        ended = training.wait()
    assert ended.code == 2 and "supervise: " not in ended.output, ended.output
    with SupervisedTraining(folder, "--data", "nowhere") as training:  # told by a rank
        ended = training.wait()
    assert ended.code == 3 and "supervise: " not in ended.output, ended.output
    assert not restarts(folder)


@pytest.mark.slow
def test_a_stop_within_the_grace_and_one_that_is_cut_off_both_go_on_at_the_next_start(folder, undisturbed):
    patient = ("--train.hang_timeout_s", "0")
    with SupervisedTraining(folder, *patient, supervisor=("--grace-s", "1")) as training:
        ranks = training.until_ranks()
        training.until_step(6)
        ranks[1].suspend()
        training.signal(signal.SIGTERM)
        ended = training.wait()
        training.until_all_gone()
    assert ended.code == 75 and "not ended 1 s after SIGTERM" in ended.output, ended.output
    with SupervisedTraining(folder, *patient) as training:
        training.until_step(30)
        training.signal(signal.SIGTERM)
        ended = training.wait()
    assert ended.code == 75 and "asked to stop (SIGTERM)" in ended.output, ended.output
    assert not restarts(folder)
    with SupervisedTraining(folder) as training:
        assert training.wait().code == 0
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("moment", ["first process", pytest.param("training", marks=pytest.mark.slow)])
def test_nothing_outlives_a_supervisor_that_is_killed(folder, moment):
    with SupervisedTraining(folder) as training:
        if moment == "training":
            training.until_step(3)
        else:
            training.until_ranks()
        training.signal(signal.SIGKILL)
        training.until_all_gone()
        assert training.step < STEPS  # they were ended: they did not come to their end
