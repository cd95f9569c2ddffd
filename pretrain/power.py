"""Power, utilization, temperature and clocks of this node's devices, read by a thread all the time.

Each reading is a row of power.csv, marked with the step and the phase that ran at that moment, so that the swings of
the power line up with the phases. What a record of metrics.jsonl tells of the devices is a mean over the same readings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pretrain import log
from pretrain.phases import PhaseClock
from pretrain.sensors import Reading

HEADER = "time,step,phase,gpu,power_w,utilization,temperature_c,sm_clock_mhz,memory_clock_mhz,throttle"
PERIOD_S = 0.08  # 12.5 Hz, so that a busy machine still reaches 10
FLUSH_S = 1.0
WINDOW_S = 1.0
LONGEST_ROW = 4096
MAX_FILE_BYTES = 64 * 10**6  # then it becomes power.1.csv, in the place of the one before: about 2 × 3 h of 8 GPUs

_log = log.get(__name__)


class PowerFile:
    """power.csv; trouble with the disk is said once and ends the file, not the training.

    Args:
        path: of the file; what is there already is kept, a row that a kill tore is cut off.
        max_bytes: size at which the file is put aside.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_FILE_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: IO[str] | None = None
        self._guard(self._open)

    def write(self, rows: Sequence[str]) -> None:
        """Append rows, in one write."""
        if self._file is not None and rows:
            self._guard(lambda: self._append(rows))

    def close(self) -> None:
        """Nothing is written after it."""
        if self._file is not None:
            self._guard(self._file.close)
        self._file = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab+") as file:
            begin = file.seek(max(file.tell() - LONGEST_ROW, 0))
            whole = begin + file.read(LONGEST_ROW).rfind(b"\n") + 1
            file.truncate(whole)
        self._file = self._path.open("a", encoding="ascii")
        if not whole:
            self._file.write(HEADER + "\n")

    def _append(self, rows: Sequence[str]) -> None:
        assert self._file is not None
        self._file.write("\n".join(rows) + "\n")
        self._file.flush()
        if self._file.tell() >= self._max_bytes:
            self._file.close()
            self._path.replace(self._path.with_suffix(".1.csv"))
            self._open()

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            self._file = None
            _log.warning("%s can't be written any more: %s", self._path, error.strerror or error)


@dataclass
class Mean:
    """Of values that come one by one."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take in one more."""
        self.total += value
        self.count += 1

    def take(self) -> float | None:
        """The mean since the last call; None where nothing came."""
        mean = self.total / self.count if self.count else None
        self.total, self.count = 0.0, 0
        return mean


@dataclass
class Meter:
    """What one device has told so far.

    Args:
        at_s: of the newest reading, as `reading`.
        energy_j: the newest state of its counter; None: it has none that was read yet.
        power: its newest power and when that was; None: not told yet.
        used_j: since the first reading, by the counter or else by its power over time; None: neither is known.
    """

    at_s: float
    reading: Reading
    energy_j: float | None = None
    power: tuple[float, float] | None = None
    used_j: float | None = None

    def update(self, at_s: float, reading: Reading) -> None:
        """Take in a reading; one that was missed is made up for by the next."""
        if reading.energy_j is not None:
            if self.energy_j is not None:
                joules = reading.energy_j - self.energy_j
                self.used_j = (self.used_j or 0.0) + joules
                if reading.power_w is None and at_s > self.at_s:
                    reading = replace(reading, power_w=joules / (at_s - self.at_s))
            self.energy_j = reading.energy_j
            self.used_j = self.used_j or 0.0
        elif reading.power_w is not None and self.energy_j is None:
            then_s, power_w = self.power or (at_s, reading.power_w)
            self.used_j = (self.used_j or 0.0) + (power_w + reading.power_w) / 2 * (at_s - then_s)
        if reading.power_w is not None:
            self.power = (at_s, reading.power_w)
        self.at_s, self.reading = at_s, reading


class EnergyWindow:
    """Energy per token, over windows of at least a second: in less the pace of the counters themselves would show.

    The first window begins at the first record: what was used before has a start-up and a compilation in it.

    Args:
        clock: seconds from anywhere, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s: float | None = None  # None: no window has begun
        self._told_j = 0.0
        self._used_j: float | None = None
        self._tokens = 0

    def add(self, used_j: float | None, tokens: int) -> None:
        """Take in the joules used since the process began, None where they are unknown, and new tokens."""
        self._used_j = used_j
        self._tokens += tokens

    def figures(self, *, at_once: bool) -> dict[str, float]:
        """What was used since the last answer that was not empty.

        Args:
            at_once: however short the time is.

        Returns:
            energy_j and, but for the first time, energy_j_per_token; {} while the window is too short, and where
            nothing is known.
        """
        now_s, since_s, tokens = self._clock(), self._since_s, self._tokens
        if self._used_j is None or not tokens or not (since_s is None or at_once or now_s - since_s >= WINDOW_S):
            return {}
        self._since_s, self._tokens = now_s, 0
        joules = self.rest()
        return {"energy_j": joules} if since_s is None else {"energy_j": joules, "energy_j_per_token": joules / tokens}

    def rest(self) -> float:
        """Joules of which no answer has told yet; 0 where they are unknown."""
        if self._used_j is None:
            return 0.0
        joules, self._told_j = self._used_j - self._told_j, self._used_j
        return joules


class Sampler:
    """Reads sensors again and again, in a thread of its own.

    Args:
        sensors: each gives readings of its devices.
        counted: devices whose power and energy count, by name; all others are only written down.
        clock: knows the phase of each moment.
        file: for the rows.
        monotonic, wall: the clock's seconds, and those since 1970.
    """

    def __init__(
        self,
        sensors: Sequence[Callable[[], list[Reading]]],
        counted: Callable[[str], bool],
        clock: PhaseClock,
        file: PowerFile,
        *,
        monotonic: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._sensors = sensors
        self._counted = counted
        self._clock = clock
        self._file = file
        self._monotonic = monotonic
        self._wall = wall
        self._lock = threading.Lock()
        self._meters: dict[str, Meter] = {}
        self._power_w, self._utilization = Mean(), Mean()
        self._rows: list[tuple[float, float, Reading]] = []  # (clock, seconds since 1970, reading) without a label yet
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self.sample()
        self._thread.start()

    def close(self) -> None:
        """End the thread and write out every row."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush(at_the_end=True)
        self._file.close()

    def _run(self) -> None:
        due = self._monotonic() + PERIOD_S
        flushed = due
        while not self._ended.wait(max(due - self._monotonic(), 0)):
            self.sample()
            now = self._monotonic()
            due = max(due + PERIOD_S, now)
            if now - flushed >= FLUSH_S:
                flushed = now
                self.flush()

    def sample(self) -> None:
        """Take one reading of everything."""
        for read in self._sensors:
            at_s, time_s = self._monotonic(), self._wall()
            readings = read()
            with self._lock:
                for reading in readings:
                    meter = self._meters.setdefault(reading.device, Meter(at_s, reading))
                    meter.update(at_s, reading)
                    self._rows.append((at_s, time_s, meter.reading))
        with self._lock:
            self._add_up()

    def _counted_now(self) -> list[Reading]:
        return [meter.reading for device, meter in self._meters.items() if self._counted(device)]

    def _add_up(self) -> None:
        """Take the newest readings into the means; a sum of powers is one only where every device told its own."""
        readings = self._counted_now()
        powers = [reading.power_w for reading in readings if reading.power_w is not None]
        shares = [reading.utilization for reading in readings if reading.utilization is not None]
        if powers and len(powers) == len(readings):
            self._power_w.add(sum(powers))
        if shares:
            self._utilization.add(sum(shares) / len(shares))

    def flush(self, *, at_the_end: bool = False) -> None:
        """Write the rows whose step and phase are known by now."""
        with self._lock:
            rows = self._rows
            labels = self._clock.labels([at_s for at_s, _, _ in rows], at_the_end=at_the_end)
            self._rows = rows[len(labels) :]
        lines = [_row(time_s, *label, reading) for (_, time_s, reading), label in zip(rows, labels, strict=False)]
        self._file.write(lines)

    def figures(self) -> dict[str, float]:
        """What the counted devices did since the last call; of this moment where nothing was read meanwhile.

        Returns:
            power_w (all devices together), utilization (percent, their mean), memory_gb (of the fullest one, now);
            what is not known is left out.
        """
        with self._lock:
            if not self._utilization.count and not self._power_w.count:
                self._add_up()
            sizes = [reading.memory_gb for reading in self._counted_now() if reading.memory_gb is not None]
            found = {
                "power_w": self._power_w.take(),
                "utilization": self._utilization.take(),
                "memory_gb": max(sizes, default=None),
            }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def energy_j(self) -> float | None:
        """Joules that the counted devices have used since the start; None where one tells neither them nor its power.

        It is as fresh as the last reading.
        """
        with self._lock:
            used = [meter.used_j for device, meter in self._meters.items() if self._counted(device)]
        known = [joules for joules in used if joules is not None]
        return sum(known) if used and len(known) == len(used) else None


def _row(time_s: float, step: int, phase: str, reading: Reading) -> str:
    """One line of power.csv, in the order of HEADER; what is unknown is empty."""
    figures = (reading.power_w, reading.utilization, reading.temperature_c)
    clocks = (reading.sm_clock_mhz, reading.memory_clock_mhz)
    cells = [f"{time_s:.3f}", str(step), phase, reading.device]
    cells += ["" if value is None else f"{value:.1f}" for value in figures]
    cells += ["" if value is None else f"{value:.0f}" for value in clocks]
    return ",".join([*cells, reading.throttle or ""])
