"""Scenarios 16 and 17: other numbers of ranks on other engines, and a rank that stands still."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest

from pretrain.batches import Batches, Position
from pretrain.cache import Shard
from pretrain.config import DataConfig
from pretrain.shards import fetch_shards
from pretrain.storage import LocalStore
from tests.chaos.chain import INTERVAL, OPTIONS, Chain, launched
from tests.chaos.score import Score, dice, repeated
from tests.runs import RUN, SEQ_LEN, VOCAB_SIZE, TrainingProcess, losses, make_shards, train

GLOBAL_SIZE, SHUFFLE_SHARDS = 8, 2  # of the tiny run
RELATIVE_TOLERANCE = 1e-5  # fp32 sums in another order, over the rest of a run


# ---- 16. other ranks, another engine ----

LEGS = [(2, "deepspeed"), (4, "native"), (1, "deepspeed"), (2, "native"), (1, "native")]


def positions(folder: Path) -> dict[int, Position]:
    """Where the data stood at every checkpoint that is left, by step."""
    found = {}
    for path in (folder / "checkpoints" / RUN).glob("checkpoint-*/trainer_state.json"):
        progress = json.loads(path.read_text())["progress"]
        found[progress["step"]] = Position(**progress["position"])
    return found


def shards_of(folder: Path) -> tuple[Shard, ...]:
    data = DataConfig(cache_dir=str(folder / "cache"))
    return fetch_shards(LocalStore(folder / "shards"), data, vocab_size=VOCAB_SIZE).shards


@pytest.mark.chaos(16)
@pytest.mark.slow  # tests/integration/test_resume.py changes both in the ordinary suite
def test_every_window_is_taken_exactly_once_over_changing_ranks_and_engines(folder, score: Score):
    shards = shards_of(folder)
    batches = Batches(shards, seq_len=SEQ_LEN, global_size=GLOBAL_SIZE, seed=1234, shuffle_shards=SHUFFLE_SHARDS)
    steps = batches.windows_per_epoch // GLOBAL_SIZE  # one epoch, but for what fills no step any more
    each = steps // len(LEGS)
    # Dropout is off: its seed is (seed, step, rank), so another number of ranks draws other masks.
    options = ("--model.dropout", "0", "--optim.schedule", "constant", "--checkpoint.keep", "0", "--resume", "auto")
    alone = folder / "alone"
    shutil.copytree(folder / "shards", alone / "shards")
    assert train(alone, *options, "--max-steps", str(steps)).code == 0
    taken: Counter[bytes] = Counter()
    before = Position()
    for number, (ranks, engine) in enumerate(LEGS, 1):
        last = steps if number == len(LEGS) else number * each
        with score.run():
            ended = train(folder, *options, "--max-steps", str(last), "--engine", engine, command=launched(ranks))
            assert ended.code == 0, ended.output
            assert f"engine {engine}, fp32, {ranks} rank" in ended.output, ended.output
        first, after = (number - 1) * each, positions(folder)[last]
        # What this leg's ranks took, by the position that its checkpoint says it reached.
        for _ in range(last - first):
            for rank in range(ranks):
                windows, reached = batches.take(before, rank, ranks)
                taken.update(window.tobytes() for window in windows)
            before = reached
        assert before == after, f"leg {number} stands at {after}, its steps lead to {before}"
    everything: Counter[bytes] = Counter()
    position = Position()
    for _ in range(steps):
        windows, position = batches.take(position, 0, 1)
        everything.update(window.tobytes() for window in windows)
    score.equal("windows_taken", taken.total(), steps * GLOBAL_SIZE, "windows")
    score.equal("windows_repeated_or_missed", (taken - everything).total() + (everything - taken).total(), 0, "windows")
    # The positions could lie; the losses of an uninterrupted run can't be had on other windows.
    expected, found = losses(alone), losses(folder)
    assert set(found) == set(expected)
    wrong = [step for step in expected if found[step] != pytest.approx(expected[step], rel=RELATIVE_TOLERANCE)]
    score.count("steps_compared", len(found), "steps")
    score.equal("loss_mismatches", len(wrong), 0, "steps", [(found[step], expected[step]) for step in wrong])


# ---- 17. a rank stands still ----

HANG_TIMEOUT_S = 5
RESTARTS_WITHIN_S = 60.0


@pytest.mark.chaos(17)
@repeated(few=0, of_20=3)  # test_supervise.py stops one in the ordinary suite
def test_a_rank_that_is_stopped_is_noticed_and_the_run_started_again(tmp_path, baseline, score: Score, times):
    options = (*OPTIONS, "--train.hang_timeout_s", str(HANG_TIMEOUT_S), "--resume", "auto")
    alone = baseline(*OPTIONS, ranks=2)
    supervised = [sys.executable, "-m", "pretrain.supervise", "--max-restarts", "3", "--", *launched(2)]
    for repetition in range(times):
        luck = dice("stopped", repetition)
        chain = Chain(tmp_path / str(repetition), options)
        make_shards(chain.folder / "shards")
        with score.run(), TrainingProcess(chain.folder, *options, command=supervised) as training:
            chain.until_step(training, luck.randint(1, 40))
            victim = luck.choice(training.workers())
            os.kill(victim.pid, signal.SIGSTOP)
            stopped_at, began = chain.step, time.monotonic()
            training.until(partial(_is_gone, victim), "the stopped rank to be ended")
            score.at_most("ended_after", round(time.monotonic() - began, 1), HANG_TIMEOUT_S + RESTARTS_WITHIN_S, "s")
            ended = training.wait()
            assert ended.code == 0, ended.output
            score.count("steps_taken_again", len(chain.lines()) - len(alone.losses), "steps")
            assert len(chain.lines()) - len(alone.losses) <= stopped_at % INTERVAL + 3 * INTERVAL
            logs = chain.folder / "logs" / RUN
            stacks = "".join(path.read_text() for path in logs.glob("stacks-rank*.txt"))
            assert "most recent call first" in stacks, "no stacks beside the log"
            restarts = [json.loads(line) for line in (logs / "restarts.jsonl").read_text().splitlines()]
            assert len(restarts) == 1 and "hang" in restarts[0]["reason"], restarts
            training.until_all_gone()
        chain.compare(alone, score)


def _is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
