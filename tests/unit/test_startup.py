from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from pretrain import startup
from pretrain.startup import StartClock, age_s, launched_after_s


def test_the_phases_lie_end_to_end_and_end_with_the_first_step(monkeypatch):
    clock = iter([100.0, 100.5, 102.5, 102.5, 103.25, 104.0])
    monkeypatch.setattr(startup, "age_s", lambda pid=None: 0.25)
    start = StartClock(lambda: next(clock))
    for name in ("settings", "torch", "data", "torch"):
        start.ended(name)
    assert start.finish("first step")
    assert start.phases == {"python": 0.25, "settings": 0.5, "torch": 2.75, "data": 0.0, "first step": 0.75}
    assert str(start) == "4.2 s: python 0.2, settings 0.5, torch 2.8, data 0.0, first step 0.8"
    # what comes later is no start, and does not even look at the clock
    start.ended("torch")
    assert not start.finish("first step") and start.phases["torch"] == 2.75


def test_a_process_knows_its_age():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert 0 <= age_s(process.pid) < age_s() < time.clock_gettime(time.CLOCK_BOOTTIME)
    finally:
        process.communicate(b"\n")
    assert age_s(process.pid) == 0  # gone


@pytest.mark.parametrize(
    ("restarts", "nodes", "expected"), [("0", "1", 7.0), ("1", "1", 0.0), ("0", "2", 0.0), (None, None, 0.0)]
)
def test_the_launchers_time_counts_at_its_first_start_on_one_node(monkeypatch, restarts, nodes, expected):
    for name, value in (("TORCHELASTIC_RESTART_COUNT", restarts), ("GROUP_WORLD_SIZE", nodes)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(startup, "age_s", lambda pid=None: 9.0 if pid == 4321 else 2.0)
    assert launched_after_s("4321") == expected
    assert launched_after_s("") == 0.0
    start = StartClock(lambda: 0.0)
    start.begin("4321")
    assert start.rounded == ({"launcher": 7.0, "python": 2.0} if expected else {"python": 2.0})


def test_where_the_system_does_not_tell_nothing_is_made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "Path", lambda place: tmp_path / "none")
    assert age_s(os.getpid()) == 0.0
