"""The watchdog's judgement on an injected clock; what it does on a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pretrain import watchdog
from pretrain.watchdog import Watchdog, watch

ROOT = Path(__file__).resolve().parents[2]
HANGS = """
import sys, threading, time, types
from pathlib import Path
from pretrain import log, watchdog

log.setup(3, None)
watchdog.OTHERS_S = 0.3

def until_said():  # have the end wait for its line: a busy machine may take longer for it than OTHERS_S
    def wait(_seconds):
        for thread in threading.enumerate():
            if thread.name == "last words":
                thread.join()
    watchdog.time = types.SimpleNamespace(sleep=wait, strftime=time.strftime)

threading.Thread(target=threading.Event().wait, name="another", daemon=True).start()

def the_step_that_hangs():
    HOW

with watchdog.watch(3, Path(sys.argv[1]), 0.2) as dog:
    dog.beat(41)
    the_step_that_hangs()
"""


@pytest.fixture
def now():
    return [50.0]


@pytest.fixture
def dog(now):
    return Watchdog(20.0, clock=lambda: now[0])


def is_hung_after(dog: Watchdog, now: list[float], checks: int) -> bool:
    """Whether the watchdog calls it a hang within so many of its intervals without a beat."""
    for _ in range(checks):
        now[0] += dog.interval_s
        if dog.is_hung():
            return True
    return False


def test_nothing_is_a_hang_before_the_first_step_has_ended(dog, now):
    assert not is_hung_after(dog, now, 1000)


def test_silence_for_the_timeout_is_a_hang_and_not_a_moment_earlier(dog, now):
    dog.beat(1)
    assert not is_hung_after(dog, now, 20)  # the first of these sees the beat
    assert is_hung_after(dog, now, 1)
    assert (dog.step, dog.silent_s) == (1, 20.0)


def test_each_beat_begins_anew(dog, now):
    for step in range(1, 10):
        dog.beat(step)
        assert not is_hung_after(dog, now, 19)


def test_a_wait_for_data_that_arrives_is_no_hang_and_begins_no_watch(dog, now):
    dog.excuse()
    assert not is_hung_after(dog, now, 1000)  # the first step has not ended
    dog.beat(4)
    for _ in range(10):
        dog.excuse()
        assert not is_hung_after(dog, now, 19)
    assert is_hung_after(dog, now, 2) and dog.step == 4


def test_going_back_to_an_earlier_step_is_a_beat_too(dog, now):
    for step in (5, 3, 3):
        dog.beat(step)
        assert not is_hung_after(dog, now, 19)


def test_time_in_which_the_whole_process_stood_still_does_not_count(dog, now):
    dog.beat(1)
    assert not is_hung_after(dog, now, 10)
    now[0] += 3600.0
    assert not dog.is_hung()
    assert dog.silent_s <= 9.0 + 2 * dog.interval_s
    assert is_hung_after(dog, now, 10)


def test_it_looks_often_enough_to_be_on_time(now):
    assert Watchdog(0.5).interval_s == 0.05 and Watchdog(1800.0).interval_s == 1.0


def test_without_a_timeout_nobody_watches(tmp_path):
    before = threading.active_count()
    with watch(0, tmp_path, 0.0) as dog:
        dog.beat(1)
        assert threading.active_count() == before


def test_the_thread_ends_with_the_block_and_on_an_error(tmp_path):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), watch(0, tmp_path, 60.0):
        assert threading.active_count() == before + 1
        raise ZeroDivisionError
    assert threading.active_count() == before


def run_hung(folder: Path, how: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANGS.replace("HOW", how), str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_hung_process_writes_its_stacks_says_so_and_aborts(tmp_path):
    (tmp_path / "stacks-rank3.txt").write_text("an earlier hang\n")
    ended = run_hung(tmp_path, "until_said(); threading.Event().wait()")
    assert ended.returncode == -signal.SIGABRT, ended.stderr
    stacks = (tmp_path / "stacks-rank3.txt").read_text()
    assert stacks.startswith("an earlier hang\n") and "after step 41" in stacks
    assert "in the_step_that_hangs" in stacks and stacks.count("hread 0x") >= 3
    (line,) = [line for line in ended.stdout.splitlines() if "hangs" in line]
    assert "rank 3" in line and "step 41" in line and str(tmp_path / "stacks-rank3.txt") in line


def test_a_console_that_hangs_does_not_hold_up_the_end(tmp_path):
    ended = run_hung(tmp_path, "log.console()._lock.acquire(); threading.Event().wait()")
    assert ended.returncode == -signal.SIGABRT and (tmp_path / "stacks-rank3.txt").exists()


def test_stacks_that_cannot_be_written_are_printed(tmp_path):
    ended = run_hung(tmp_path / "missing", "until_said(); threading.Event().wait()")
    assert ended.returncode == -signal.SIGABRT
    assert "in the_step_that_hangs" in ended.stderr and "No such file or directory" in ended.stdout


def test_the_other_ranks_have_time_for_their_stacks():
    assert watchdog.OTHERS_S > watchdog.MAX_INTERVAL_S
