"""What the devices of this node are doing right now, asked of the NVIDIA driver and of the kernel.

What a device doesn't tell is None, never a guess. Sizes are in GB of 10^9 bytes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

GB = 1e9
POWERCAP = Path("/sys/class/powercap")
SLOW_S = 1.0  # between two looks at what moves slowly: each opens a dozen of the kernel's files
# nvml.h, nvmlClocksEventReasons; idle clocks, and clocks that somebody has set, are left out: they are no throttling
THROTTLES = {
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "hw_power_brake",
}


@dataclass(frozen=True)
class Reading:
    """One device at one moment.

    Args:
        device: number of the GPU as torch counts them, or "cpu".
        power_w: now; of a CPU: None, for it only counts energy.
        utilization: percent; of a GPU in the driver's last period, of the CPU since the last reading.
        sm_clock_mhz: of the cores, where it is a CPU.
        throttle: reasons joined by "+", or "none".
        energy_j: used since a moment that stays the same while this process lives.
        memory_gb: in use, by all processes.
    """

    device: str
    power_w: float | None = None
    utilization: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttle: str | None = None
    energy_j: float | None = None
    memory_gb: float | None = None


class GpuSensors:
    """The GPUs of this node that the run uses, through NVML.

    Args:
        devices: of torch; none on a machine without GPUs.

    Attributes:
        problem: why the driver can't be asked, or ''.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.problem = ""
        self._questions: dict[str, dict[str, Callable[[], Any]]] = {}
        self._error: type[Exception] = Exception
        self._not_supported = 0
        if devices:
            self._open(devices)

    def _open(self, devices: Sequence[torch.device]) -> None:
        try:
            import pynvml
        except ImportError:
            self.problem = "nvidia-ml-py is not installed"
            return
        self._error, self._not_supported = pynvml.NVMLError, pynvml.NVML_ERROR_NOT_SUPPORTED
        uuid = ""
        try:
            pynvml.nvmlInit()
            for device in devices:
                # By UUID: the driver counts all GPUs of the machine, torch only those in CUDA_VISIBLE_DEVICES.
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self._questions[str(device.index)] = _questions(pynvml, handle)
        except pynvml.NVMLError as error:
            self._questions = {}
            self.problem = f"the NVIDIA driver can't be asked about {uuid or 'its GPUs'}: {error}"

    def read(self) -> list[Reading]:
        """A reading of each GPU; none where the driver can't be asked."""
        return [Reading(device, **self._ask(questions)) for device, questions in self._questions.items()]

    def _ask(self, questions: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        found = {}
        for name, ask in list(questions.items()):
            try:
                found[name] = ask()
            except self._error as error:
                if getattr(error, "value", None) == self._not_supported:  # nor will it be: a card without that sensor
                    del questions[name]
        return found


def _questions(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    """What can be asked of one GPU, by the field of Reading that it fills."""
    return {
        "power_w": lambda: _power_w(nvml, handle),
        "utilization": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "sm_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "throttle": lambda: throttle_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        "energy_j": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
        "memory_gb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / GB,
    }


def _power_w(nvml: Any, handle: Any) -> float:
    """The power of this instant, where the driver has it: from Ampere on the plain question gives a mean over a second,
    in which the phases of a step drown."""
    with contextlib.suppress(nvml.NVMLError):
        (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if field.nvmlReturn == nvml.NVML_SUCCESS:
            return float(field.value.uiVal) / 1e3
    return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3


def throttle_reasons(bits: int) -> str:
    """Why the clocks are lower than they could be, from NVML's bits: names joined by "+", or "none"."""
    return "+".join(name for bit, name in THROTTLES.items() if bits & bit) or "none"


class CpuSensors:
    """The CPU packages of this machine, as one device.

    Args:
        powercap: where the kernel shows RAPL's energy counters; often root alone may read them.
        clock: seconds from anywhere, monotonic.
    """

    def __init__(self, powercap: Path = POWERCAP, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_s = -math.inf
        self._slow = Reading("cpu")
        self._counters = _package_counters(powercap)
        self._last_uj = [0] * len(self._counters)
        self._energy_j = 0.0
        if self._counters and self._count() is None:
            self._counters = []
        self._energy_j = 0.0
        psutil.cpu_percent(None)  # the first call only begins the period

    def read(self) -> list[Reading]:
        """One reading, of all packages together; temperature and clock are up to a second old."""
        now_s = self._clock()
        if now_s - self._looked_s >= SLOW_S:
            self._looked_s, self._slow = now_s, _slow_reading()
        return [replace(self._slow, utilization=psutil.cpu_percent(None), energy_j=self._count())]

    def _count(self) -> float | None:
        """Joules since the first call, of all packages; None where they can't be read."""
        if not self._counters:
            return None
        try:
            now_uj = [int(counter.read_text()) for counter, _ in self._counters]
        except (OSError, ValueError):
            return None
        for (_, range_uj), last, now in zip(self._counters, self._last_uj, now_uj, strict=True):
            self._energy_j += (now - last + (range_uj if now < last else 0)) / 1e6  # the counter goes round
        self._last_uj = now_uj
        return self._energy_j


def _slow_reading() -> Reading:
    """The hottest core or package, and the mean clock of the cores."""
    sensors = (_told(psutil.sensors_temperatures) if psutil.LINUX else None) or {}
    temperatures = [*sensors.get("coretemp", []), *sensors.get("k10temp", [])]  # Intel's, AMD's
    frequency = _told(psutil.cpu_freq)
    hottest = max((each.current for each in temperatures), default=None)
    return Reading("cpu", temperature_c=hottest, sm_clock_mhz=frequency.current if frequency else None)


def _told(ask: Callable[[], Any]) -> Any:
    """What psutil tells of this machine; None where the machine doesn't tell it."""
    try:
        return ask()
    except (OSError, NotImplementedError, RuntimeError, AttributeError):
        return None


def _package_counters(powercap: Path) -> list[tuple[Path, int]]:
    """(energy counter, its range in microjoules) of each CPU package; parts of a package have their own, left out."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):  # AMD's have this name, too
        try:
            if (folder / "name").read_text().startswith("package"):
                found.append((folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            continue
    return found
