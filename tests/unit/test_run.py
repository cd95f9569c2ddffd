"""How the ranks wait for a batch together."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from pretrain.errors import StorageError
from pretrain.phases import StepTimer
from pretrain.run import Run


class Stream:
    """Has its batch after so many looks; data arrives at each of those named."""

    def __init__(self, corpus, looks, arrives_at=()):
        self.corpus, self.looks, self.arrives_at = corpus, looks, arrives_at
        self.n_looks = 0

    def ready(self, timeout_s):
        self.n_looks += 1
        self.corpus.arrived += self.n_looks in self.arrives_at
        return self.n_looks > self.looks


def await_batch(looks, *, arrives_at=(), others=(), stops_at=0, failure=None):
    """(the run, the stream, excuses): one rank, and what another says in each round, which takes a second."""
    corpus = SimpleNamespace(arrived=0, failure=failure, tell_wait=lambda: None)
    rounds, excuses, clock = iter(others), [], SimpleNamespace(now=0.0)
    stream = Stream(corpus, looks, arrives_at)

    def any_of(*flags):
        clock.now += 1.0
        return [mine or theirs for mine, theirs in zip(flags, next(rounds, (False,) * 4), strict=True)]

    class Stop:
        def __bool__(self):
            return 0 < stops_at <= stream.n_looks

    run = SimpleNamespace(
        corpus=corpus,
        ranks=SimpleNamespace(any_of=any_of),
        excuse=lambda: excuses.append(stream.n_looks),
        timer=StepTimer(lambda: clock.now),
        telemetry=SimpleNamespace(begin_step=lambda step: None),
        phase=lambda name: contextlib.nullcontext(),
        progress=SimpleNamespace(step=4),
        stopped=False,
        starved=False,
    )
    Run.await_batch(run, stream, Stop())
    return run, stream, excuses


def test_a_batch_that_is_there_costs_one_look_and_what_the_others_take_to_come_is_part_of_the_step():
    run, stream, excuses = await_batch(0)
    assert (stream.n_looks, run.timer.lap(), excuses, run.stopped) == (1, 1.0, [], False)


def test_a_wait_is_timed_and_excused_while_data_arrives():
    run, stream, excuses = await_batch(5, arrives_at=(2, 4))
    assert stream.n_looks == 6 and run.timer.lap() == 6.0 and excuses == [2, 4]


def test_a_rank_that_has_its_batch_waits_for_the_others_and_learns_that_their_data_arrives():
    run, stream, excuses = await_batch(0, others=[(False, False, True, False), (False, False, True, True)])
    assert stream.n_looks == 3 and run.timer.lap() == 3.0 and excuses == [2]


@pytest.mark.parametrize(
    "how", [{"stops_at": 3}, {"others": [(False, False, True, False)] * 2 + [(True, True, True, False)]}]
)
def test_a_signal_to_any_rank_ends_the_wait_for_data_that_does_not_come(how):
    run, stream, _ = await_batch(100, **how)
    assert run.stopped and not run.starved and stream.n_looks == 3


@pytest.mark.parametrize("how", [{"failure": StorageError("full")}, {"others": [(False, True, False, False)]}])
def test_raw_text_that_can_not_be_prepared_on_any_node_ends_the_loop(how):
    run, stream, _ = await_batch(100, **how)
    assert run.starved and not run.stopped and stream.n_looks == 1
