"""power.csv of a run, and power.1.csv before it: what its devices drew, at 10 Hz or more; too long to be read whole.

    time,step,phase,gpu,power_w,utilization,temperature_c,sm_clock_mhz,memory_clock_mhz,throttle

A cell is empty where the device doesn't tell.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import StorageError
from pretrain.run_logs import POWER_FILE, printable

OLDER_FILE = "power.1.csv"
TAIL_BYTES = 16 << 10
BLOCKS, BLOCK_BYTES = 600, 4 << 10  # of a long file: evenly spaced stretches, 2.4 MB in all
WHOLE_BYTES = BLOCKS * BLOCK_BYTES
TEXTS = ("phase", "gpu", "throttle")

Reading = dict[str, Any]


def newest_readings(folder: Path) -> list[Reading]:
    """The newest line of each device, by its name: device, power_w, utilization, … as far as they are told.

    Raises:
        StorageError: the file is there and can't be read.
    """
    newest: dict[str, Reading] = {}
    for reading in _read(folder / POWER_FILE, tail=True):
        newest[reading["gpu"]] = reading
    rows = [newest[gpu] for gpu in sorted(newest)]
    return [
        {"device": _label(row["gpu"]), **{k: v for k, v in row.items() if k not in ("gpu", "step")}} for row in rows
    ]


def read_power(folder: Path) -> list[Reading]:
    """Readings over the whole run, at most some ten thousand however long the file is; in the order of the file.

    Returns:
        of each line `time` (seconds since 1970), `gpu`, and of step, phase, power_w, utilization, temperature_c,
        sm_clock_mhz, memory_clock_mhz and throttle those that are told.

    Raises:
        StorageError: the file is there and can't be read.
    """
    return [*_read(folder / OLDER_FILE, tail=False), *_read(folder / POWER_FILE, tail=False)]


def newest_stretch(folder: Path, seconds: float) -> list[Reading]:
    """Every reading of the last so many seconds, as far as they fit into `WHOLE_BYTES`."""
    readings = list(_read(folder / POWER_FILE, tail=True, tail_bytes=WHOLE_BYTES // 4))
    return [each for each in readings if each["time"] >= readings[-1]["time"] - seconds]


def _label(gpu: str) -> str:
    return f"GPU {gpu}" if gpu.isdecimal() else gpu.upper()


def _read(path: Path, tail: bool, tail_bytes: int = TAIL_BYTES) -> Iterator[Reading]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            columns = next(csv.reader([file.readline(1000).decode("utf-8", "replace").strip()]), [])
            begin = file.tell()
            if tail:
                spans = [(max(begin, size - tail_bytes), size)]
            elif size <= WHOLE_BYTES:
                spans = [(begin, size)]
            else:
                spans = [(at, at + BLOCK_BYTES) for at in range(begin, size - BLOCK_BYTES, size // BLOCKS)]
            for start, end in spans:
                file.seek(start)
                lines = file.read(end - start).decode("utf-8", "replace").split("\n")
                # the first line is a part of one unless it follows the names, the last one always is, or is empty
                yield from _readings(lines[start > begin : -1], columns)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", f"Look at it: ls -l {path}") from error


def _readings(lines: Sequence[str], columns: Sequence[str]) -> Iterator[Reading]:
    """Lines that have a time and a device; columns of another version are passed over."""
    for cells in csv.reader(lines):
        reading: Reading = {}
        for name, cell in zip(columns, cells, strict=False):
            if name in TEXTS:
                reading[name] = printable(cell)
            elif cell:
                try:
                    value = float(cell)
                except ValueError:
                    continue
                if math.isfinite(value):
                    reading[name] = value
        if reading.get("time") and reading.get("gpu", "") != "":
            yield reading
