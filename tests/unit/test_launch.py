"""The launcher is run in this process, on workers of a few lines that do not import torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pretrain import launch
from pretrain.processes import LAUNCHER_PID

FAILS_ON_RANK_1 = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    CODE
time.sleep(60)
"""
STOPPED_BY = """
import os, signal, sys, time
from pathlib import Path

def stop(signum, frame):
    Path(sys.argv[1], f"{os.environ['RANK']}-{signal.Signals(signum).name}").touch()
    deadline = time.monotonic() + 100
    while len(list(Path(sys.argv[1]).glob("?-SIG*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # the agent ends the others when the first has ended
    os._exit(75)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
ready = [Path(sys.argv[1], rank) for rank in "01"]
ready[int(os.environ["RANK"])].touch()
while not all(path.exists() for path in ready):
    time.sleep(0.01)
if os.environ["RANK"] == "0":
    os.kill(os.getppid(), signal.SIGNAL)
time.sleep(60)
"""
FAILS_BESIDE_A_STOPPED_RANK = """
import os, signal, sys, time
import psutil

if os.environ["RANK"] == "0":
    os.kill(os.getpid(), signal.SIGSTOP)
while not any(process.status() == "stopped" for process in psutil.Process(os.getppid()).children()):
    time.sleep(0.01)
sys.exit(6)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a worker script on two ranks and gives the launcher's exit code."""
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that the original comes back after the test
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def start(script: str, *arguments: str, ranks: int = 2, flags: tuple[str, ...] = ()) -> int:
        path = tmp_path / "worker.py"
        path.write_text(script)
        return launch.main([f"--nproc_per_node={ranks}", *flags, str(path), *arguments])

    return start


@pytest.mark.parametrize("code", [1, 2, 3, 6, 75])
def test_the_code_of_the_first_failure_is_returned(run, code):
    assert run(FAILS_ON_RANK_1.replace("CODE", f"sys.exit({code})")) == code


def test_a_worker_that_was_killed_gives_128_plus_the_signal(run, capsys):
    assert run(FAILS_ON_RANK_1.replace("CODE", "os.kill(os.getpid(), signal.SIGKILL)")) == 137
    assert "rank 1" in (said := capsys.readouterr().err) and "SIGKILL" in said and len(said.splitlines()) == 1


def test_an_expected_error_is_not_commented_on(run, capfd):
    assert run(FAILS_ON_RANK_1.replace("CODE", "sys.exit(3)")) == 3
    assert capfd.readouterr().err == ""


def test_success_is_0_and_every_rank_gets_its_arguments_and_environment(run, tmp_path):
    script = (
        "import json, os, sys; from pathlib import Path\n"
        "Path(sys.argv[1], 'env' + os.environ['RANK']).write_text(json.dumps([dict(os.environ), sys.argv[2:]]))"
    )
    assert run(script, str(tmp_path), "--run", "mine") == 0
    for rank in (0, 1):
        environment, arguments = json.loads((tmp_path / f"env{rank}").read_text())
        assert arguments == ["--run", "mine"]
        assert environment["LOCAL_RANK"] == environment["RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_passed_on_to_every_rank_and_their_75_comes_back(run, tmp_path, name):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run(STOPPED_BY.replace("SIGNAL", name), str(tmp_path)) == 75
    assert (tmp_path / f"0-{name}").exists() and (tmp_path / f"1-{name}").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_before_the_worker_can_handle_it_is_a_stop_too(run):
    script = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    assert run(script, ranks=1) == 75


def test_a_signal_while_waiting_for_the_other_nodes_ends_the_launcher_at_once(tmp_path):
    where = ["--nnodes=2", "--node_rank=1", "--master_addr=127.0.0.1", "--master_port=9"]
    code = (
        "import os, signal, sys, threading\n"
        "from pretrain import launch\n"
        "start = launch.elastic_launch\n"
        "def begin(*args):\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    return start(*args)\n"
        "launch.elastic_launch = begin\n"
        "sys.exit(launch.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--nproc_per_node=1", *where, "worker.py"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "LOGLEVEL": "ERROR"}
    assert subprocess.run(command, env=environment, timeout=120).returncode == 75


def test_an_explained_error_wins_over_a_crash_in_the_same_second():
    failures = {0: _failure(1), 1: _failure(3)}
    assert launch._exit_code(failures, []) == 3


def test_a_rank_that_has_saved_and_stopped_wins_over_the_ones_that_the_agent_ended_then():
    failures = {0: _failure(128 + signal.SIGTERM), 1: _failure(75)}
    assert launch._exit_code(failures, []) == 75
    assert launch._exit_code({**failures, 2: _failure(4)}, []) == 4


@pytest.mark.parametrize(("codes", "expected"), [((-15, 1), 1), ((1, -9), 137), ((-15, -9), 137), ((-15, -15), 143)])
def test_in_one_second_a_kill_comes_before_the_loss_of_a_peer_and_that_before_what_the_agent_ended(codes, expected):
    assert launch._exit_code({rank: _failure(code) for rank, code in enumerate(codes)}, []) == expected


def test_a_port_in_use_is_one_line_and_exit_code_2(run, capsys, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = ("--nnodes=2", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={port}")
        assert run("", flags=flags) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in said and "MASTER_PORT" in said and len(said.splitlines()) == 1


def test_nothing_is_left_in_the_temporary_folder(run, tmp_path):
    assert run("") == 0
    assert [path.name for path in Path(tmp_path).iterdir()] == ["worker.py"]


@pytest.mark.parametrize(("default_s", "flags"), [(1, ()), (300, ("--shutdown-timeout=1",))], ids=["", "by option"])
def test_a_stopped_worker_does_not_hold_up_the_end(run, monkeypatch, capfd, default_s, flags):
    """SIGTERM doesn't wake a stopped process; torchrun would wait for 30 s."""
    monkeypatch.setattr(launch, "SHUTDOWN_S", default_s)
    started = time.monotonic()
    assert run(FAILS_BESIDE_A_STOPPED_RANK, flags=flags) == 6
    assert time.monotonic() - started < 30
    assert capfd.readouterr().err == ""


def test_workers_know_their_launcher_and_nobody_does_afterwards(run, tmp_path):
    script = "import os, sys\nassert os.environ['PRETRAIN_LAUNCHER_PID'] == str(os.getppid())"
    assert run(script, ranks=1) == 0
    assert LAUNCHER_PID not in os.environ


def test_under_nohup_a_closed_terminal_ends_no_worker(run):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("import os, signal\nos.kill(os.getppid(), signal.SIGHUP)\nsignal.raise_signal(signal.SIGHUP)") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def _failure(code: int):
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="")
    failure.timestamp = 1_000
    return failure


def test_a_signal_reaches_the_workers_and_no_other_child(run, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert run(STOPPED_BY.replace("SIGNAL", "SIGTERM"), str(tmp_path)) == 75
        assert other.poll() is None
        other.communicate(b"\n", timeout=120)
    assert other.returncode == 0
