from __future__ import annotations

import pytest
import torch

from pretrain.phases import PHASES, PhaseClock, StepTimer, cuda_event


class Time:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Gpu:
    """A stream that runs behind the host: each event stands at the GPU's own time, and is passed by `done_s`."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self.done_s = float("inf")
        self.events: list[GpuEvent] = []

    def event(self) -> GpuEvent:
        self.events.append(GpuEvent(self))
        return self.events[-1]


class GpuEvent:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = self.gpu.at_s

    def query(self) -> bool:
        return self.at_s <= self.gpu.done_s

    def synchronize(self) -> None:
        self.gpu.done_s = max(self.gpu.done_s, self.at_s)

    def elapsed_time(self, end: GpuEvent) -> float:
        assert self.query() and end.query(), "read before the GPU was there"
        return (end.at_s - self.at_s) * 1e3


@pytest.fixture
def time() -> Time:
    return Time()


def go(clock: PhaseClock, time: Time, *course: tuple[str, float], gpu: Gpu | None = None) -> None:
    """Phases one after the other; each is told with the seconds that the host spends in it."""
    for phase, seconds in course:
        clock.mark(phase)
        time.now += seconds


def spent(clock: PhaseClock) -> dict[str, float]:
    _, seconds = clock.take()
    return {phase: round(value, 6) for phase, value in seconds.items() if value}


def test_each_phase_has_the_seconds_between_its_mark_and_the_next(time):
    clock = PhaseClock(clock=time)
    clock.begin_step(1)
    go(clock, time, ("data_wait", 1.0), ("forward", 2.0), ("backward", 4.0), ("optimizer", 0.5), ("other", 0.25))
    clock.mark("forward")
    assert clock.take() == (
        1,
        dict.fromkeys(PHASES, 0.0)
        | {"data_wait": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 0.5, "other": 0.25},
    )
    assert clock.take() == (0, dict.fromkeys(PHASES, 0.0))


def test_micro_batches_add_up(time):
    clock = PhaseClock(clock=time)
    for _ in range(3):
        go(clock, time, ("forward", 1.0), ("backward", 2.0))
    go(clock, time, ("optimizer", 0.5), ("other", 0.0))
    assert spent(clock) == {"forward": 3.0, "backward": 6.0, "optimizer": 0.5}


def test_a_block_gives_back_to_what_was_before_also_when_it_raises(time):
    clock = PhaseClock(clock=time)
    with pytest.raises(KeyError), clock.during("eval"):
        time.now += 1.0
        with clock.during("checkpoint"):
            time.now += 2.0
        time.now += 0.5
        raise KeyError
    time.now += 9.0
    assert spent(clock) == {"eval": 1.5, "checkpoint": 2.0}


def test_a_gpus_phases_are_between_its_own_events_and_nobody_waits_for_them(time):
    gpu = Gpu()
    clock = PhaseClock(gpu.event, clock=time)
    clock.begin_step(1)
    go(clock, time, ("data_wait", 1.0))
    clock.mark("forward")  # the host is through in no time, the GPU takes 2 + 4 + 1 seconds
    for phase, gpu_s in (("backward", 2.0), ("optimizer", 4.0), ("other", 1.0)):
        gpu.at_s += gpu_s
        time.now += 0.01
        clock.mark(phase)
    gpu.done_s = 2.5  # so far
    time.now += 3.0
    clock.mark("eval")  # must not wait
    assert gpu.done_s == 2.5
    steps, seconds = clock.take()  # must
    assert steps == 1 and gpu.done_s == 7.0
    assert [seconds[phase] for phase in ("data_wait", "forward", "backward", "optimizer")] == [1.0, 2.0, 4.0, 1.0]


def test_events_are_used_again(time):
    gpu = Gpu()
    clock = PhaseClock(gpu.event, clock=time)
    for step in range(1, 6):
        clock.begin_step(step)
        with clock.during("data_wait"):
            time.now += 1.0
        for _ in range(2):
            clock.mark("forward")
            gpu.at_s += 1.0
            clock.mark("backward")
            gpu.at_s += 2.0
        time.now += 6.5
        clock.mark("other")
    assert spent(clock) == {"data_wait": 5.0, "forward": 10.0, "backward": 20.0, "other": 2.0}
    assert len(gpu.events) <= 10  # those of a step that is read, and of the one that runs


def test_what_ran_at_a_moment_is_known_in_the_gpus_time(time):
    gpu = Gpu()
    clock = PhaseClock(gpu.event, clock=time)
    clock.begin_step(7)
    go(clock, time, ("data_wait", 1.0))  # 100 to 101
    clock.mark("forward")
    gpu.at_s = 10.0  # until 111, far behind the host
    clock.mark("backward")
    gpu.at_s = 30.0  # until 131
    clock.mark("other")
    gpu.done_s = 5.0
    clock.mark("checkpoint")
    assert clock.labels([99.0, 100.5, 101.0, 105.0, 140.0]) == [(0, "other"), (7, "data_wait"), (7, "forward")]
    gpu.done_s, time.now = 30.0, 131.5
    clock.mark("eval")
    assert clock.labels([105.0, 120.0, 131.2, 140.0]) == [
        (7, "forward"),
        (7, "backward"),
        (7, "checkpoint"),
        (7, "eval"),
    ]


def test_at_the_end_everything_gets_a_label(time):
    gpu = Gpu()
    gpu.done_s = -1.0
    clock = PhaseClock(gpu.event, clock=time)
    clock.begin_step(1)
    clock.mark("forward")
    clock.mark("backward")
    assert clock.labels([200.0]) == []
    assert clock.labels([200.0], at_the_end=True) == [(1, "forward")]


def test_ranges_are_entered_with_each_phase(time):
    entered = []
    clock = PhaseClock(clock=time)
    clock.ranges.append(type("Ranges", (), {"enter": lambda self, name: entered.append(name)})())
    go(clock, time, ("forward", 0), ("forward", 0), ("backward", 0), ("other", 0))
    assert entered == ["forward", "backward", "other"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpus_phases_take_the_time_that_they_take() -> None:
    clock = PhaseClock(cuda_event)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        clock.begin_step(1)
        with clock.during("data_wait"):
            torch.cuda.synchronize()
        clock.take()
        clock.mark("forward")
        for _ in range(10):
            matrix @ matrix
        clock.mark("backward")
        for _ in range(30):
            matrix @ matrix
        clock.mark("other")
    _, seconds = clock.take()
    assert seconds["forward"] > 1e-3
    assert seconds["backward"] / seconds["forward"] == pytest.approx(3, rel=0.3)


def test_the_times_of_all_steps_and_of_what_was_apart_are_the_time_by_the_clock():
    now = [100.0]
    timer = StepTimer(lambda: now[0])
    now[0] = 200.0  # start-up
    timer.begin()
    now[0] += 3.0
    assert timer.lap() == 3.0
    with timer.apart():
        now[0] += 50.0
    now[0] += 1.0  # records, and what else the loop does between steps
    timer.begin()
    now[0] += 2.0
    with pytest.raises(KeyError), timer.apart():
        now[0] += 7.0
        raise KeyError
    assert timer.lap() == 3.0 and timer.lap() == 0.0
    assert 3.0 + 50.0 + 7.0 + 3.0 == now[0] - 200.0
