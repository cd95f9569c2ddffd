"""Launchers of several nodes, on one machine's loopback, with workers of a few lines."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from pretrain.rendezvous import MEET_S, TRY_S, UNREACHABLE_S
from tests.emulators import free_port

WORKER = """
import json, os, sys
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")
Path(sys.argv[1], os.environ["NODE"]).write_text(json.dumps({name: os.environ[name] for name in names}))
"""
PATIENCE_S = 200  # a launcher imports torch, and the machine may be busy


@contextlib.contextmanager
def node(tmp_path, number, port, *, nnodes="2", rank=None, address="127.0.0.1", worker=WORKER, **variables):
    """A launcher that says that it is node `rank` (`number` where not given)."""
    path = tmp_path / f"worker{number}.py"
    path.write_text(worker)
    where = [f"--nnodes={nnodes}", f"--node_rank={number if rank is None else rank}", f"--master_addr={address}"]
    command = [sys.executable, "-m", "pretrain.launch", "--nproc_per_node=1", *where, f"--master_port={port}"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "NODE": str(number), "LOGLEVEL": "ERROR", **variables}
    words = [*command, *variables.pop("options", "").split(), str(path), str(tmp_path)]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process):
    """(exit code, the lines that a user reads)."""
    _, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, [line for line in errors.splitlines() if line.startswith(("launch", "config error"))]


def test_ranks_follow_node_rank_whoever_comes_first(tmp_path):
    port = free_port()
    with contextlib.ExitStack() as nodes:
        others = [nodes.enter_context(node(tmp_path, number, port, nnodes="3")) for number in (2, 1)]
        processes = [nodes.enter_context(node(tmp_path, 0, port, nnodes="3")), *others]
        assert [ended(process) for process in processes] == [(0, [])] * 3
    for number in range(3):
        told = json.loads((tmp_path / str(number)).read_text())
        assert (told["RANK"], told["GROUP_RANK"], told["WORLD_SIZE"]) == (str(number), str(number), "3")
        assert told["MASTER_ADDR"] == "127.0.0.1"


def test_two_nodes_of_one_number_are_told_so(tmp_path):
    port = free_port()
    with contextlib.ExitStack() as nodes:
        ranks = (0, 1, 1)
        started = [node(tmp_path, number, port, nnodes="3", rank=rank) for number, rank in enumerate(ranks)]
        for code, lines in [ended(process) for process in [nodes.enter_context(each) for each in started]]:
            assert code == 2 and len(lines) == 1 and "two nodes say that they are NODE_RANK=1" in lines[0]


@pytest.mark.parametrize(("address", "words"), [("no-such-host.invalid", ""), ("127.0.0.1", "Connection refused")])
def test_a_node_0_that_can_not_be_reached_is_one_line_and_exit_code_2(tmp_path, address, words):
    started = time.monotonic()
    options = "--rdzv_conf=join_timeout=5"
    with node(tmp_path, 1, free_port(), address=address, options=options) as process:
        code, lines = ended(process)
    assert code == 2 and time.monotonic() - started < PATIENCE_S < MEET_S
    assert len(lines) == 1 and f"the nodes could not meet at {address}:" in lines[0]
    assert "node 0 can't be reached" in lines[0] and words in lines[0] and "MASTER_ADDR" in lines[0]


def test_an_address_that_leads_nowhere_is_given_up_within_the_time_that_is_promised():
    assert UNREACHABLE_S + TRY_S < 30 < MEET_S


def test_a_node_that_comes_before_the_others_have_ended_waits_for_their_next_start(tmp_path):
    """Its first try meets a rendezvous that is closed already."""
    port = free_port()
    lingers = (
        "import time, sys\nfrom pathlib import Path\n"
        "while not Path(sys.argv[1], 'go').exists(): time.sleep(0.01)\nsys.exit(8)"
    )
    fails = "import sys\nsys.exit(9)"
    with node(tmp_path, 0, port, worker=lingers) as first:
        with node(tmp_path, 1, port, worker=fails) as second:
            assert ended(second)[0] == 9  # and closes the rendezvous, which node 0 still keeps
        with node(tmp_path, 1, port) as again:
            time.sleep(2)
            assert again.poll() is None
            (tmp_path / "go").touch()
            assert ended(first)[0] == 8
            with node(tmp_path, 0, port) as next_first:
                assert [ended(process)[0] for process in (next_first, again)] == [0, 0]


def test_where_node_0_is_gone_the_ranks_tell_how_it_ends(tmp_path):
    port = free_port()
    waits = (
        "import sys, time\nfrom pathlib import Path\nimport os\nPath(sys.argv[1], 'up' + os.environ['NODE']).touch()\n"
        "while not Path(sys.argv[1], 'end').exists(): time.sleep(0.01)\nsys.exit(6)"
    )
    with node(tmp_path, 0, port, worker=waits) as first, node(tmp_path, 1, port, worker=waits) as second:
        deadline = time.monotonic() + PATIENCE_S
        while len(list(tmp_path.glob("up?"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        first.kill()
        time.sleep(1)
        assert second.poll() is None
        (tmp_path / "end").touch()
        assert ended(second)[0] == 6


def test_a_port_that_is_in_use_on_node_0_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with node(tmp_path, 0, taken.getsockname()[1]) as process:
            code, lines = ended(process)
    assert code == 2 and len(lines) == 1 and "MASTER_PORT" in lines[0]
