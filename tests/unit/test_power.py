from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.phases import PhaseClock
from pretrain.power import HEADER, EnergyWindow, PowerFile, Sampler
from pretrain.sensors import Reading


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def sampler_of(folder: Path, clock: Clock, *scripts: list[Reading], phases: PhaseClock | None = None) -> Sampler:
    """A sampler that reads one entry of each script at each sample; GPUs count, the CPU does not."""

    def reader_of(script: list[Reading]) -> Callable[[], list[Reading]]:
        readings = iter(script)
        return lambda: [next(readings)]

    return Sampler(
        [reader_of(script) for script in scripts],
        lambda device: device != "cpu",
        phases or PhaseClock(clock=clock),
        PowerFile(folder / "power.csv"),
        monotonic=clock,
        wall=lambda: clock.now + 1e9,
    )


def take(sampler: Sampler, clock: Clock, times: int, every_s: float = 0.5) -> None:
    for _ in range(times):
        sampler.sample()
        clock.now += every_s


def rows(folder: Path) -> list[str]:
    return (folder / "power.csv").read_text().splitlines()


def test_each_reading_is_a_row_under_the_step_and_phase_of_its_moment(tmp_path, clock):
    phases = PhaseClock(clock=clock)
    gpu = Reading("0", 650.04, 97.0, 61.0, 1755.0, 2619.0, "sw_power_cap", 5.0, 40.0)
    sampler = sampler_of(tmp_path, clock, [gpu] * 3, [Reading("cpu", utilization=12.0)] * 3, phases=phases)
    for step, phase in ((1, "data_wait"), (1, "forward"), (2, "eval")):
        phases.begin_step(step)
        phases.mark(phase)
        take(sampler, clock, 1)
    sampler.close()
    assert rows(tmp_path) == [
        HEADER,
        "1000000100.000,1,data_wait,0,650.0,97.0,61.0,1755,2619,sw_power_cap",
        "1000000100.000,1,data_wait,cpu,,12.0,,,,",
        "1000000100.500,1,forward,0,650.0,97.0,61.0,1755,2619,sw_power_cap",
        "1000000100.500,1,forward,cpu,,12.0,,,,",
        "1000000101.000,2,eval,0,650.0,97.0,61.0,1755,2619,sw_power_cap",
        "1000000101.000,2,eval,cpu,,12.0,,,,",
    ]


def test_figures_are_means_since_the_last_ones_over_the_counted_devices(tmp_path, clock):
    first = [Reading("0", 100.0, 50.0, memory_gb=3.0), Reading("0", 300.0, 100.0, memory_gb=5.0)]
    second = [Reading("1", 10.0, 0.0, memory_gb=7.0), Reading("1", 10.0, 50.0, memory_gb=6.0)]
    sampler = sampler_of(tmp_path, clock, first, second, [Reading("cpu", 55.0, 99.0, memory_gb=99.0)] * 2)
    assert sampler.figures() == {}
    take(sampler, clock, 2)
    assert sampler.figures() == {"power_w": 210.0, "utilization": 50.0, "memory_gb": 6.0}
    assert sampler.figures() == {"power_w": 310.0, "utilization": 75.0, "memory_gb": 6.0}  # nothing new: this moment


def test_a_sum_of_powers_needs_all_of_them(tmp_path, clock):
    sampler = sampler_of(tmp_path, clock, [Reading("0", 100.0, 50.0)], [Reading("1", None, 40.0)])
    take(sampler, clock, 1)
    assert sampler.figures() == {"utilization": 45.0}
    assert sampler.energy_j is None


def test_energy_is_the_counters_and_without_one_power_over_time(tmp_path, clock):
    counted = [Reading("0", 999.0, energy_j=joules) for joules in (5000.0, 5010.0, 5030.0)]
    metered = [Reading("1", power) for power in (100.0, 200.0, 200.0)]
    sampler = sampler_of(tmp_path, clock, counted, metered)
    take(sampler, clock, 1)
    assert sampler.energy_j == 0.0
    take(sampler, clock, 2)
    assert sampler.energy_j == pytest.approx(30 + 75 + 100)


def test_a_reading_that_failed_loses_no_energy(tmp_path, clock):
    lost = Reading("0")
    sampler = sampler_of(tmp_path, clock, [Reading("0", energy_j=1.0), lost, Reading("0", energy_j=9.0)])
    take(sampler, clock, 3)
    assert sampler.energy_j == 8.0
    sampler = sampler_of(tmp_path, clock, [Reading("0", 10.0), lost, Reading("0", 10.0)])
    take(sampler, clock, 3)
    assert sampler.energy_j == pytest.approx(10.0)


def test_where_only_energy_is_counted_power_is_its_rate(tmp_path, clock):
    sampler = sampler_of(tmp_path, clock, [Reading("0", energy_j=joules) for joules in (0.0, 20.0, 25.0)])
    take(sampler, clock, 3)
    assert sampler.figures() == {"power_w": 25.0}  # 40 W and 10 W; the first reading has none
    sampler.close()
    assert [row.split(",")[4] for row in rows(tmp_path)[1:]] == ["", "40.0", "10.0"]


def test_rows_of_an_unknown_phase_wait_until_it_is_known(tmp_path, clock):
    class Unpassed:
        passed = False

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.passed

        def elapsed_time(self, end: Unpassed) -> float:
            return 250.0

    phases = PhaseClock(Unpassed, clock=clock)
    sampler = sampler_of(tmp_path, clock, [Reading("0")] * 4, phases=phases)
    take(sampler, clock, 1)
    phases.begin_step(1)
    phases.mark("forward")
    take(sampler, clock, 2)
    phases.mark("other")
    sampler.flush()
    assert len(rows(tmp_path)) == 2
    Unpassed.passed = True
    phases.mark("eval")
    take(sampler, clock, 1)
    sampler.flush()
    assert [row.split(",")[2] for row in rows(tmp_path)[1:]] == ["other", "forward", "other", "eval"]


def test_the_thread_reads_ten_times_a_second_and_more(tmp_path):
    sampler = Sampler([lambda: [Reading("cpu")]], lambda device: True, PhaseClock(), PowerFile(tmp_path / "power.csv"))
    sampler.start()
    deadline = time.monotonic() + 120
    while len(rows(tmp_path)) < 12 and time.monotonic() < deadline:
        time.sleep(0.05)
    sampler.close()
    times = [float(row.split(",")[0]) for row in rows(tmp_path)[1:]]
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    assert gaps[0] <= 0.1  # the others tell of this machine's load, too
    assert not sampler._thread.is_alive()


# ---- the file ----


def test_a_second_process_appends_behind_the_last_whole_row(tmp_path):
    path = tmp_path / "power.csv"
    for row in ("a,1", "b,2"):
        file = PowerFile(path)
        file.write([row])
        file.close()
    with path.open("a") as torn:
        torn.write("c,")
    file = PowerFile(path)
    file.write(["d,4"])
    file.close()
    assert path.read_text().splitlines() == [HEADER, "a,1", "b,2", "d,4"]


def test_the_file_is_bounded_and_the_newest_rows_are_kept(tmp_path):
    path = tmp_path / "power.csv"
    file = PowerFile(path, max_bytes=400)
    for number in range(100):
        file.write([f"row {number:03}" + "x" * 60])
    file.close()
    old = (tmp_path / "power.1.csv").read_text().splitlines()
    new = path.read_text().splitlines()
    assert old[0] == new[0] == HEADER
    numbers = [int(row[4:7]) for row in old[1:] + new[1:]]
    assert numbers == list(range(numbers[0], 100)) and 3 <= len(numbers) <= 12
    assert sorted(each.name for each in tmp_path.iterdir()) == ["power.1.csv", "power.csv"]


def test_trouble_with_the_disk_is_said_once_and_stops_nobody(tmp_path, caplog):
    (tmp_path / "taken").write_text("")
    file = PowerFile(tmp_path / "taken" / "power.csv")
    file.write(["a"])
    file.close()
    full = tmp_path / "power.csv"
    full.symlink_to("/dev/full")
    file = PowerFile(full)
    file.write(["a"])
    file.write(["b"])
    file.close()
    assert len([line for line in caplog.messages if "can't be written any more" in line]) == 2


# ---- energy per token ----


def test_energy_per_token_is_over_windows_of_a_second(clock):
    window = EnergyWindow(clock)
    clock.now += 99.0
    window.add(5000.0, 100)
    assert window.figures(at_once=False) == {"energy_j": 5000.0}  # of a start-up: not what a token takes
    clock.now += 0.4
    window.add(5020.0, 100)
    assert window.figures(at_once=False) == {}
    clock.now += 0.7
    window.add(5060.0, 100)
    assert window.figures(at_once=False) == {"energy_j": 60.0, "energy_j_per_token": 0.3}
    clock.now += 0.1
    window.add(5061.0, 50)
    assert window.figures(at_once=False) == {}
    assert window.figures(at_once=True) == {"energy_j": 1.0, "energy_j_per_token": 0.02}
    window.add(5064.0, 10)
    assert window.figures(at_once=False) == {} and window.rest() == 3.0 and window.rest() == 0.0


def test_unknown_energy_is_left_out(clock):
    window = EnergyWindow(clock)
    clock.now += 5
    window.add(None, 100)
    assert window.figures(at_once=True) == {} and window.rest() == 0.0
