"""Scenarios 4, 5 and 6: commits whose reply is lost, and two processes that write one run."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from pretrain.failpoints import VARIABLE
from tests.chaos.chain import INTERVAL, OPTIONS, STEPS, Baseline, Chain, commits_of, damaged_steps
from tests.chaos.score import Score, dice, in_lanes, repeated
from tests.fault_proxy import FaultProxy
from tests.runs import RUN, Ended, TrainingProcess, differing, final_state, losses, make_shards

UPLOAD = "POST /upload"
STOPS_WITHIN_S = 30.0
SOMEBODY = "checkpoint error: somebody else is writing this run: "


def machine(folder: Path, name: str) -> Path:
    """The disk of one more machine, with the same shards."""
    make_shards(folder / name / "shards")
    return folder / name


def check_fenced(ended: Ended, same_machine: bool = False) -> None:
    """It stopped because of another trainer, with the reason; on one disk perhaps because its folder is gone."""
    assert len(ended.errors) == 1 and "Traceback" not in ended.output, ended.output
    if same_machine and ended.code == 4:
        assert "No such file or directory" in ended.errors[0], ended.output
        return
    assert ended.code == 5, ended.output
    assert ended.errors[0].startswith(SOMEBODY) and "--run" in ended.errors[0], ended.output


def check_whole(folder: Path, url: str, alone: Baseline, score: Score) -> None:
    """A run that one trainer of several ended: its losses, its state and what is in the bucket."""
    found = losses(folder)  # of what this machine did of the run
    score.count("steps_compared", len(found), "steps")
    score.equal("loss_mismatches", sum(loss != alone.losses[step] for step, loss in found.items()), 0, "steps")
    bad = differing(final_state(folder), alone.state)
    score.equal("tensor_mismatches", len(bad), 0, "tensors", bad)
    score.equal("damaged_commits", len(damaged_steps(url)), 0, "checkpoints")
    assert max(commits_of(url)) == STEPS


# ---- 4. the reply of a commit is lost ----


@pytest.mark.chaos(4)
@repeated(few=1, of_20=3)
def test_a_commit_whose_reply_is_lost_is_known_as_our_own(
    tmp_path, bucket_url, fault_proxy: FaultProxy, baseline, score, times
):
    for repetition in range(times):
        with score.run():
            fault_proxy.clear()
            # Half of all uploads, manifests among them: the object is there, and nobody tells the trainer.
            fault_proxy.inject("lost-reply", UPLOAD, times=-1, share=0.5, seed=dice("lost", repetition).getrandbits(32))
            folder, url = machine(tmp_path, str(repetition)), f"{bucket_url}/{repetition}"
            chain = Chain(
                folder,
                (
                    *OPTIONS,
                    "--checkpoint.keep",
                    "0",
                    "--checkpoint.max_waiting",
                    "99",
                    "--storage.max_backoff_s",
                    "0.02",
                ),
                url,
            )
            ended = chain.finish()
            log = (folder / "logs" / RUN / "training.log").read_text()
            lost = len(set(re.findall(r"create gs://(\S+)/manifest\.json: try 1 failed", log)))
            assert lost > 0, "no commit lost its reply"
            score.count("replies_lost", len(fault_proxy.broken), "uploads")
            score.count("of_commits", lost, "commits")
            score.equal("commits", len(commits_of(url)), STEPS // INTERVAL, "checkpoints", ended.output)
            assert len({manifest.attempt for manifest in commits_of(url).values()}) == 1
            chain.compare(baseline(*OPTIONS), score)


# ---- 5. two trainers ----


@pytest.mark.chaos(5)
@repeated(few=0, of_20=4)  # test_resume.py has two in the ordinary suite
def test_of_two_trainers_on_one_run_one_ends_it_and_the_other_stops_in_time(
    tmp_path, bucket_url, baseline, score, times
):
    alone = baseline(*OPTIONS)
    # Slower steps than the baseline's would change its losses; slower saves don't, and leave both time to meet.
    options = (*OPTIONS, "--no-background-upload", "--resume", "auto")
    for repetition in range(times):
        url = f"{bucket_url}/{repetition}"
        folders = [machine(tmp_path, f"{repetition}-{side}") for side in ("left", "right")]
        with (
            score.run(),
            TrainingProcess(folders[0], *options, "--checkpoints", url) as left,
            TrainingProcess(folders[1], *options, "--checkpoints", url) as right,
        ):
            pair = (left, right)
            for training in pair:
                training.until_said("starting afresh")
            left.until(lambda url=url, right=right: commits_of(url) or right.process.poll() is not None, "a commit")
            committed = time.monotonic()
            while all(training.process.poll() is None for training in pair):
                time.sleep(0.01)
            score.at_most("stopped_after_first_commit", round(time.monotonic() - committed, 1), STOPS_WITHIN_S, "s")
            ended = [training.wait() for training in pair]
            assert sorted(each.code for each in ended) == [0, 5], "\n".join(each.output for each in ended)
            check_fenced(next(each for each in ended if each.code == 5))
            winner = next(folder for folder, each in zip(folders, ended, strict=True) if each.code == 0)
            check_whole(winner, url, alone, score)
            assert len({manifest.attempt for manifest in commits_of(url).values()}) == 1


# ---- 6. an orphan writes ----


def woken(folder: Path, alone: Baseline, score: Score, point: str, same_machine: bool, url: str) -> None:
    """An old attempt stops at a point of its upload, a new one ends the run, and the old one wakes up."""
    with score.run():
        here = machine(folder, "here")
        there = here if same_machine else machine(folder, "there")
        old = Chain(here, OPTIONS, url)
        with old.start(**{VARIABLE: f"{point}:{dice(point, same_machine).randint(1, 3)}:stop"}) as orphan:
            orphan.until(lambda: _is_stopped(orphan), f"{point} to stop it")
            new = Chain(there, OPTIONS, url)
            new.finish()
            attempts = {step: manifest.attempt for step, manifest in commits_of(url).items()}
            orphan.signal(signal.SIGCONT)
            check_fenced(orphan.wait(), same_machine)
        score.count("orphans_woken", 1, "processes")
        now = {step: manifest.attempt for step, manifest in commits_of(url).items()}
        score.equal(
            "commits_changed_by_an_orphan",
            len(set(attempts.items()) ^ set(now.items())),
            0,
            "checkpoints",
            (attempts, now),
        )
        assert set(now.values()) == {attempts[STEPS]}
        check_whole(there, url, alone, score)
        again = Chain(machine(folder, "later"), OPTIONS, url).finish()  # what is in the bucket can be gone on from
        assert f"resumed checkpoint-epoch1-step{STEPS}-" in again.output, again.output


def _is_stopped(training: TrainingProcess) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(training.process.pid).status() == psutil.STATUS_STOPPED)
    return False


POINTS = ("upload.before_files", "upload.after_files", "upload.before_commit")


@pytest.mark.chaos(6)
@pytest.mark.parametrize(
    ("points", "same_machine"),
    [
        pytest.param(POINTS[2:], False, id="another-machine"),
        pytest.param(POINTS[:2], False, id="all-points", marks=pytest.mark.slow),
        pytest.param(POINTS, True, id="same-machine", marks=pytest.mark.slow),
    ],
)
def test_an_old_attempt_that_wakes_up_changes_nothing_in_the_bucket(
    tmp_path, bucket_url, baseline, score, points, same_machine
):
    alone = baseline(*OPTIONS)
    in_lanes(
        [
            partial(woken, machine(tmp_path, point), alone, score, point, same_machine, f"{bucket_url}/{point}")
            for point in points
        ]
    )
