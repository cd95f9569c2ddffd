from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pretrain import ranks
from pretrain.errors import CheckpointError, ConfigError, DivergenceError, ShardError, StorageError, TrainerError
from pretrain.ranks import check_own_gpu, join, local_ranks, tell_of_failure
from tests.emulators import free_port
from tests.helpers_training import LAUNCHER_VARIABLES, ROOT, run_two_ranks, single_rank


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_two_ranks_exchange_what_they_know():
    results = run_two_ranks(
        """
        from pretrain.ranks import background_group
        group = background_group()
        message = {"rank": me.rank, "text": "é" * (5 if me.rank else 3000), "list": list(range(me.rank * 100))}
        answers = me.exchange(message)
        print(json.dumps({
            "ranks": [answer["rank"] for answer in answers],
            "lengths": [len(answer["text"]) for answer in answers],
            "lists": [len(answer["list"]) for answer in answers],
            "background": [answer["rank"] for answer in me.exchange({"rank": me.rank}, group)],
            "first": me.from_first({"rank": me.rank}),
            "any": [me.any(False), me.any(me.rank == 1), me.any(True)],
            "any_of": me.any_of(False, me.rank == 0, me.rank == 1, True),
            "mean": me.mean(1.0 + me.rank),
            "is_first": me.is_first,
        }))
        """
    )
    assert [result.pop("is_first") for result in results] == [True, False]
    expected = {
        "ranks": [0, 1],
        "lengths": [3000, 5],
        "lists": [0, 100],
        "background": [0, 1],
        "first": {"rank": 0},
        "any": [False, True, True],
        "any_of": [False, True, True, True],
        "mean": 1.5,
    }
    assert results == [expected, expected]


def test_a_decision_of_the_first_rank_holds_on_both_and_so_does_its_error():
    results = run_two_ranks(
        """
        from pretrain import errors
        decided = me.decided_by_first(lambda: {"rank": me.rank})
        def fail():
            raise errors.ShardError("shard x is torn", "Get another.")
        try:
            me.decided_by_first(fail)
        except errors.TrainerError as error:
            raised = [type(error).__name__, error.what, error.mend, error.shared]
        print(json.dumps({"decided": decided, "raised": raised}))
        """
    )
    assert results == [{"decided": {"rank": 0}, "raised": ["ShardError", "shard x is torn", "Get another.", True]}] * 2


@pytest.mark.parametrize("kind", [ConfigError, ShardError, StorageError, CheckpointError, DivergenceError])
def test_every_kind_of_error_comes_back_as_itself(no_launcher, kind):
    def fail():
        raise kind("what", "mend")

    with single_rank() as ranks, pytest.raises(kind) as caught:
        ranks.decided_by_first(fail)
    assert (caught.value.what, caught.value.mend, caught.value.shared) == ("what", "mend", True)


def test_a_kind_of_its_own_comes_back_as_its_base(no_launcher):
    class Special(StorageError):
        pass

    def fail():
        raise Special("what")

    with single_rank() as ranks, pytest.raises(StorageError, match="what"):
        ranks.decided_by_first(fail)


def test_without_a_launcher_a_process_is_the_only_rank(no_launcher):
    with single_rank() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (0, 1, 0, 1)
        assert ranks.is_first
        assert os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "1"
        assert ranks.exchange({"a": [1, None, "ü"]}) == [{"a": [1, None, "ü"]}]
        assert ranks.mean(2.5) == 2.5
        ranks.barrier()
        word = torch.ones(1)
        dist.all_reduce(word)  # the default group is there too, for the engines
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, (1, 8)),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}, (1, 8)),  # DeepSpeed's launcher
    ],
)
def test_local_ranks_as_each_launcher_tells_them(no_launcher, variables, expected):
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    assert local_ranks() == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "has RANK, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, "but not MASTER_PORT"),
    ],
)
def test_half_of_a_launchers_variables_is_refused(no_launcher, variables, words):
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        join(torch.device("cpu"), 1)


WAITING = """
import torch
from pretrain.errors import ConfigError
from pretrain.ranks import join
try:
    join(torch.device("cpu"), 5)
except ConfigError as error:
    print(error.shared, error)
"""


def test_a_rank_that_fails_before_it_has_met_the_others_is_named_by_those_who_wait(no_launcher):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **place, "RANK": "0", "PYTHONPATH": str(ROOT)}
    waiting = subprocess.Popen([sys.executable, "-c", WAITING], env=environment, stdout=subprocess.PIPE, text=True)
    for name, value in {**place, "RANK": "1"}.items():
        no_launcher.setenv(name, value)
    assert tell_of_failure(ConfigError("an old card", "Take another."), timedelta(seconds=100))
    said, _ = waiting.communicate(timeout=100)
    assert said == f"True rank 1 on {socket.gethostname()}: an old card. Take another.\n" and waiting.returncode == 0


def test_where_nobody_waits_nobody_is_told(no_launcher):
    error, patience = ConfigError("an old card"), timedelta(seconds=0.5)
    assert not tell_of_failure(error, patience)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        no_launcher.setenv(name, value)
    no_launcher.setenv("MASTER_PORT", str(free_port()))
    assert not tell_of_failure(error, patience)
    no_launcher.setenv("MASTER_PORT", "x")
    assert not tell_of_failure(error, patience)


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(ranks, "rendezvous", lambda *_, **__: iter([(HashStore(), 0, 3)]))  # as the launcher's
    monkeypatch.setattr(ranks, "ROLL_CALL", timedelta(milliseconds=10))
    with pytest.raises(TrainerError, match=r"2 of 3 ranks did not come in 0\.2 s: 1, 2"):
        ranks._meet(timedelta(seconds=0.2))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_SIZE"])
def test_a_rank_that_is_no_number_is_named(no_launcher, name):
    no_launcher.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"{name} is 'x', expected a number"):
        local_ranks()


def test_two_ranks_on_one_gpu_are_named_on_both():
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(check_own_gpu, store, rank, 3, gpu) for rank, gpu in enumerate(("a", "b", "a"))]
        errors = [end.exception(30) for end in ends]
    for error in errors:
        assert isinstance(error, ConfigError) and error.shared
        assert "ranks 0 and 2 are on one GPU (a of " in str(error)


def test_each_rank_on_a_gpu_of_its_own_may_go_on():
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(check_own_gpu, store, rank, 2, gpu) for rank, gpu in enumerate("ab")]
        assert [end.result(30) for end in ends] == [None, None]


def test_an_error_of_one_rank_is_raised_on_both():
    results = run_two_ranks(
        """
        from pretrain import errors
        with me.together():
            pass
        try:
            with me.together():
                if me.rank == 1:
                    raise errors.StorageError("disk 1 is full", "Free it.")
        except errors.TrainerError as error:
            print(json.dumps([type(error).__name__, error.what, error.mend, error.shared]))
        """
    )
    assert results == [["StorageError", "disk 1 is full", "Free it.", True]] * 2
