from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.errors import CheckpointError
from pretrain.run_lock import RunLock, sole_use

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_trainers_share_a_run_and_keep_tools_out_until_the_last_one_lets_go(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    for lock in (first, second):
        with pytest.raises(CheckpointError, match="in use by a trainer"), sole_use(tmp_path):
            pass
        lock.release()
        lock.release()
    with sole_use(tmp_path):
        pass


def test_one_trainer_keeps_others_off_where_it_asks_for_that(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.keep_trainers_out()
    with pytest.raises(CheckpointError, match=f"{tmp_path} is in use by another trainer"):
        second.keep_trainers_out()
    first.release()
    second.keep_trainers_out()
    second.release()


def test_a_tool_keeps_trainers_and_other_tools_out_while_it_works(tmp_path):
    with sole_use(tmp_path / "new"):
        with pytest.raises(CheckpointError, match="in use by a tool"):
            RunLock(tmp_path / "new")
        with pytest.raises(CheckpointError), sole_use(tmp_path / "new"):
            pass
    RunLock(tmp_path / "new").release()


def test_a_killed_process_lets_go(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pretrain.run_lock import RunLock; "
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError), sole_use(tmp_path):
            pass
        process.kill()
        process.wait()
        with sole_use(tmp_path):
            pass


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = RunLock(tmp_path)
    with sole_use(tmp_path):
        pass
    lock.release()
