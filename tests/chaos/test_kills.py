"""Scenarios 1, 2, 7 and 8: processes that end at any moment, by SIGKILL, by a failpoint or by SIGTERM."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from pretrain.failpoints import FAILPOINTS, VARIABLE
from tests.chaos.chain import INTERVAL, OPTIONS, STEPS, ZERO2_BF16, Baseline, Chain, commits_of, damaged_steps
from tests.chaos.score import Score, dice, in_lanes, repeated
from tests.fault_proxy import FaultProxy
from tests.runs import TrainingProcess, make_shards

WHOM = ("all", "worker", "agent")
STARTS_WITHIN_S = 6.0  # a random moment before the first step lies in here
STEP_WITHIN_S = 0.05  # and one between two steps in here
SYNCHRONOUS = "--no-background-upload"  # a save is committed before the next step: what is lost has an exact bound
UPLOAD = "POST /upload"
ENDS_WITHIN_S = 10.0  # beside other work; a stalled upload is given up after a minute


def disk(folder: Path, name: str) -> Path:
    """The disk of one more machine, with the same shards."""
    make_shards(folder / name / "shards")
    return folder / name


def at_random(chain: Chain, training: TrainingProcess, luck: random.Random) -> bool:
    """Wait for a random moment of a start, most of them after its first step; whether it has not ended by itself."""
    if luck.random() < 0.15:
        time.sleep(luck.uniform(0, STARTS_WITHIN_S))
    else:
        before = len(chain.lines())
        steps = luck.randint(1, 3 * INTERVAL)
        # A start that ends before that many steps has finished the run: it is looked at, not failed.
        training.until(lambda: len(chain.lines()) >= before + steps or training.process.poll() is not None)
        time.sleep(luck.uniform(0, STEP_WITHIN_S))
    return training.process.poll() is None


# ---- 1. kill -9 ----


def killed_chain(
    folder: Path, alone: Baseline, score: Score, times: int, *, options: tuple[str, ...], ranks: int, url: str = ""
) -> None:
    """Kill starts of one run after the other until `times` of them were; each run that completes is compared."""
    luck, kills, runs = dice("kill", ranks, times), 0, 0
    while kills < times:
        runs += 1
        chain = Chain(disk(folder, f"ranks{ranks}-run{runs}"), options, f"{url}/{runs}" if url else "", ranks)
        ended = False
        while kills < times and not ended:
            with score.run(), chain.start() as training:
                if at_random(chain, training, luck):
                    chain.kill(training, WHOM[kills % len(WHOM)], score, luck)
                    kills += 1
                else:
                    ended = True
                    assert training.wait().code == 0, training.output
        if not ended:
            with score.run():
                chain.finish()
        bound, figure = (INTERVAL, "lost_steps") if SYNCHRONOUS in options else (3 * INTERVAL, "lost_in_background")
        chain.check_resumed(score, bound, figure)
        chain.compare(alone, score)
    score.count("kills", kills, "kills")


@pytest.mark.chaos(1)
@repeated(few=1, of_20=20)  # test_supervise.py kills a rank and the launcher in the ordinary suite
def test_a_run_killed_at_random_loses_nothing(tmp_path, bucket_url, baseline, score, times):
    two_ranks = times // 4
    native, zero2 = (*OPTIONS, SYNCHRONOUS), (*OPTIONS, *ZERO2_BF16)
    tasks = [
        partial(
            killed_chain,
            tmp_path,
            baseline(*OPTIONS),
            score,
            times - two_ranks,
            options=native,
            ranks=1,
            url=bucket_url,
        )
    ]
    if two_ranks:
        alone = baseline(*zero2, ranks=2)
        tasks.append(partial(killed_chain, tmp_path, alone, score, two_ranks, options=zero2, ranks=2))
    in_lanes(tasks)


# ---- 2. failpoints ----

ONLY_FIRST_RANK = ("upload.before_commit", "upload.after_commit", "prune.bucket_after_manifest", "prune.local_before")
PASSES = {"loop": 2 * INTERVAL, "loss": 8 * INTERVAL, "cache": 3}  # how often a point is passed at least; others: 2
KEEPS_TWO = ("--checkpoint.keep", "2")  # something is pruned at every save after the second
RAW_TEXT = "prepare."  # tests/integration/test_raw_text.py
NEEDS_ROLLBACK = "loop.after_rollback"
ONE_OF_EACH_PART = (
    "checkpoint.after_write",
    "upload.before_commit",
    "prune.bucket_after_manifest",
    "cache.after_rename",
)
POISONED_STEPS = 2
POISON = f"loss.poison:33-{32 + 4 * POISONED_STEPS}:poison"  # four micro-batches a step: steps 9 and 10 of a start


def killed_at(chain: Chain, point: str, luck: random.Random, score: Score) -> None:
    """A start that its failpoint kills, at a random pass of it, on a random rank."""
    if point.startswith("cache."):
        shutil.rmtree(chain.folder / "cache", ignore_errors=True)
    count = 1 if point == NEEDS_ROLLBACK else luck.randint(1, PASSES.get(point.split(".")[0], 2))
    rank = luck.randrange(chain.ranks) if chain.ranks > 1 and point not in ONLY_FIRST_RANK else 0
    armed = f"{point}:{count}:kill@{rank}" + (f",{POISON}" if point == NEEDS_ROLLBACK else "")
    with chain.start(**{VARIABLE: armed}) as training:
        code = training.wait().code
        assert code in (-signal.SIGKILL, 128 + signal.SIGKILL), f"{armed} ended with {code}:\n{training.output}"
        training.until_all_gone()
    chain.interrupted()
    score.count("failpoints_hit", 1, "kills")


def failpoint_chain(
    folder: Path, alone: Baseline, score: Score, points: list[str], *, options: tuple[str, ...], url: str, ranks: int
) -> None:
    """One run, killed at each of these points in turn, and finished."""
    chain = Chain(folder, options, url, ranks)
    luck = dice("failpoint", *points, ranks)
    for point in points:
        with score.run():
            killed_at(chain, point, luck, score)
    chain.finish()
    in_background = SYNCHRONOUS not in options
    chain.check_resumed(score, STEPS if in_background else 2 * INTERVAL, "lost_steps")
    chain.compare(alone, score)


@pytest.mark.chaos(2)
@pytest.mark.parametrize("points", [pytest.param(ONE_OF_EACH_PART, id="few")])
def test_a_run_killed_in_each_of_its_parts_loses_nothing(folder, bucket_url, baseline, score, points):
    options = (*OPTIONS, *KEEPS_TWO, SYNCHRONOUS)
    failpoint_chain(folder, baseline(*OPTIONS), score, list(points), options=options, url=bucket_url, ranks=0)


@pytest.mark.chaos(2)
@repeated(few=0, of_20=2)
def test_a_run_killed_at_every_failpoint_loses_nothing(tmp_path, bucket_url, baseline, score, times):
    options = (*OPTIONS, *KEEPS_TWO, "--train.max_skipped", str(POISONED_STEPS - 1))
    tasks = []
    for repetition in range(times):
        # By turns: saves that the training waits for, several kills in one run; and saves behind it, on two ranks.
        ranks = 2 * (repetition % 2)
        points = [point for point in FAILPOINTS if not point.startswith(RAW_TEXT)]
        dice("order", repetition).shuffle(points)
        groups = [[point] for point in points] if ranks else [points[first::5] for first in range(5)]
        for number, group in enumerate(groups):
            name = f"repetition{repetition}-{number}"
            tasks.append(
                partial(
                    failpoint_chain,
                    disk(tmp_path, name),
                    baseline(*OPTIONS, ranks=max(ranks, 1)),
                    score,
                    group,
                    options=options if ranks else (*options, SYNCHRONOUS),
                    url=f"{bucket_url}/{name}",
                    ranks=ranks,
                )
            )
    in_lanes(tasks)


# ---- 7. SIGTERM ----


def listens(training: TrainingProcess) -> bool:
    """Whether the process has a handler for SIGTERM yet; before, it is not the trainer's to answer."""
    status = Path(f"/proc/{training.process.pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def stopped_chain(folder: Path, alone: Baseline, score: Score, times: int, url: str) -> None:
    """Stop starts of one run after the other until `times` of them were; each run that completes is compared."""
    luck, stops, runs = dice("stop", folder.name), 0, 0
    while stops < times:
        runs += 1
        chain = Chain(disk(folder, f"run{runs}"), OPTIONS, f"{url}/{runs}", ranks=1)
        ended = False
        while stops < times and not ended:
            with score.run(), chain.start() as training:
                training.until(partial(listens, training))
                at_random(chain, training, luck)
                training.signal(signal.SIGTERM)
                code = training.wait().code
                stops += 1
                assert code in (0, 75), f"ended with {code}:\n{training.output}"
                score.count("exits_with_75", code == 75, "starts")
                ended = code == 0
                if "asked to stop" in training.output:
                    score.equal("steps_lost", chain.step - chain.newest_step(), 0, "steps", training.output)
                chain.interrupted()
        chain.finish()
        chain.check_resumed(score, STEPS, "steps_back")
        chain.compare(alone, score)
    score.count("signals", stops, "signals")


@pytest.mark.chaos(7)
@repeated(few=0, of_20=10)  # test_resume.py sends one in the ordinary suite
def test_a_run_stopped_by_sigterm_at_random_is_resumable(tmp_path, bucket_url, baseline, score, times):
    alone = baseline(*OPTIONS)
    shares = [share for share in (times // 2, times - times // 2) if share]
    in_lanes(
        [
            partial(stopped_chain, disk(tmp_path, f"lane{lane}"), alone, score, share, f"{bucket_url}/{lane}")
            for lane, share in enumerate(shares)
        ]
    )


# ---- 8. a second SIGTERM ----


def is_saved(chain: Chain) -> bool:
    """Whether the step taken last is committed, here if not in the bucket."""
    return chain.newest_step() == chain.step


@pytest.mark.chaos(8)
@repeated(few=1, of_20=4)
def test_a_second_sigterm_ends_an_upload_at_once_and_tears_no_commit(
    tmp_path, bucket_url, fault_proxy: FaultProxy, baseline, score, times
):
    alone = baseline(*OPTIONS)
    for repetition in range(times):
        luck = dice("second", repetition)
        fault_proxy.clear()
        chain = Chain(disk(tmp_path, f"run{repetition}"), OPTIONS, f"{bucket_url}/{repetition}")
        with score.run():
            fault_proxy.inject("stall", UPLOAD, times=-1, skip=luck.randint(0, 24))  # a file's upload, or the commit's
            with chain.start() as training:
                chain.until_step(training, luck.randint(INTERVAL, STEPS // 2))
                training.signal(signal.SIGTERM)
                training.until_said("asked to stop")
                training.until(partial(is_saved, chain), "the last save")
                time.sleep(1.1)  # a signal within a second of the first counts as the same one
                assert training.process.poll() is None, training.output
                signalled = time.monotonic()
                training.signal(signal.SIGTERM)
                code = training.wait().code
                score.at_most("until_ended", round(time.monotonic() - signalled, 2), ENDS_WITHIN_S, "s")
                assert code == 128 + signal.SIGTERM, training.output
            chain.interrupted()
            fault_proxy.clear()
            before = set(commits_of(chain.url))
            score.equal("torn_commits", len(damaged_steps(chain.url)), 0, "checkpoints")
            ended = chain.finish()
            score.count("uploads_left_to_the_next_start", ended.output.count("was not uploaded before"), "uploads")
            chain.check_resumed(score, 0)
            assert STEPS in set(commits_of(chain.url)) - before
            chain.compare(alone, score)
