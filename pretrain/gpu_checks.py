"""What the doctor asks the NVIDIA driver: versions, memory errors, throttling, clocks. No torch here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.doctor import Finding, fail, ok, skip, warn
from pretrain.errors import ConfigError

NO_GPU = "no NVIDIA GPU on this machine: training runs on the CPU"
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA_VENDOR, DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")  # a graphics card with an output, one without
USED_BY_OTHERS = 1_000_000_000  # bytes on a GPU before a training begins
SLOWER_CLOCK = 0.9  # of the highest, as the application clocks are set
THROTTLING = {
    # nvml's name of a reason: what it means, and the mend. Idle, a set clock and a power cap under load are no troubles
    "HwThermalSlowdown": (
        "the hardware slows it down, it is too hot",
        "Look at fans, air and nvidia-smi -q -d TEMPERATURE.",
    ),
    "SwThermalSlowdown": (
        "the driver slows it down, it is too hot",
        "Look at fans, air and nvidia-smi -q -d TEMPERATURE.",
    ),
    "HwPowerBrakeSlowdown": ("the power supply slows it down", "The machine's power is short: tell who runs it."),
    "HwSlowdown": ("the hardware slows it down", "See nvidia-smi -q -d PERFORMANCE; tell who runs the machine."),
}


def count_gpus() -> int:
    """GPUs of this machine that this process may use; 0 where the driver can't be asked."""
    try:
        with _driver() as nvml:
            return len(_handles(nvml))
    except ConfigError:
        return 0


def first_gpu() -> str:
    """The driver's name of the first GPU that this process may use; '' where there is none."""
    if not count_gpus():
        return ""
    with _driver() as nvml:
        return str(nvml.nvmlDeviceGetName(next(iter(_handles(nvml).values()))))


def driver() -> Finding:
    """The driver, the CUDA that it speaks, and the GPUs that this process may use."""
    if not _has_card() and not _driver_answers():
        return skip("driver", NO_GPU)
    with _driver() as nvml:
        version, cuda = nvml.nvmlSystemGetDriverVersion(), int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        names = [str(nvml.nvmlDeviceGetName(handle)) for handle in _handles(nvml).values()]
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    what = f"{version}, CUDA {cuda // 1000}.{cuda % 1000 // 10}; {kinds or 'no GPU'}"
    if len(set(names)) > 1:
        return warn("driver", what, "A step waits for the slowest GPU: name equal ones in CUDA_VISIBLE_DEVICES.")
    return ok("driver", what, gpus=len(names))


def health() -> list[Finding]:
    """Memory errors, throttling, clocks and other users of the GPUs that this process may use; one line if all is well.

    A finding has the driver's number of its GPU, as nvidia-smi lists them.
    """
    if not count_gpus():
        return [skip("gpu_health", NO_GPU if not _has_card() else "the driver shows no GPU to this process")]
    with _driver() as nvml:
        found = _handles(nvml)
        handles = list(found.values())
        troubles = [finding for index, handle in found.items() for finding in _troubles(nvml, f"gpu_{index}", handle)]
        if troubles:
            return troubles
        told = [
            *_range(nvml, handles, lambda each: nvml.nvmlDeviceGetClockInfo(each, nvml.NVML_CLOCK_SM), "MHz now"),
            *_range(nvml, handles, lambda each: nvml.nvmlDeviceGetTemperature(each, nvml.NVML_TEMPERATURE_GPU), "°C"),
        ]
    return [ok("gpu_health", ", ".join([f"{len(handles)} GPUs: no memory errors, not throttled", *told]))]


def _range(nvml: Any, handles: list[Any], ask: Callable[[Any], Any], unit: str) -> list[str]:
    """The lowest and the highest figure of all GPUs, in words; nothing where no GPU tells it."""
    figures = [told for each in handles if (told := _told(nvml, partial(ask, each))) is not None]
    return [f"{min(figures):.0f}–{max(figures):.0f} {unit}"] if figures else []


def _troubles(nvml: Any, name: str, handle: Any) -> Iterator[Finding]:
    """What is wrong with one GPU."""
    yield from _memory_errors(nvml, name, handle)
    reasons = _told(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    for reason, (meaning, mend) in THROTTLING.items():
        if reasons and int(reasons) & int(getattr(nvml, f"nvmlClocksThrottleReason{reason}")):
            yield warn(name, meaning, mend)
            break
    clock = _told(nvml, lambda: nvml.nvmlDeviceGetApplicationsClock(handle, nvml.NVML_CLOCK_SM))
    highest = _told(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
    if clock and highest and clock < SLOWER_CLOCK * highest:
        yield warn(name, f"its clock is set to {clock:.0f} of {highest:.0f} MHz", "Set it back: nvidia-smi -rac")
    limit = _told(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    default = _told(nvml, lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle))
    if limit and default and limit < default:
        what = f"its power is limited to {limit / 1000:.0f} of {default / 1000:.0f} W"
        yield warn(name, what, f"Was it meant? Set it back: nvidia-smi -pl {default / 1000:.0f}")
    used = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
    if used and used > USED_BY_OTHERS:
        yield warn(name, f"{used / 1e9:.1f} GB of its memory are in use already", "See by whom: nvidia-smi")


def _memory_errors(nvml: Any, name: str, handle: Any) -> Iterator[Finding]:
    """Errors that ECC could not correct, and rows that wait to be replaced."""

    def errors(since: int) -> float | None:
        kind = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return _told(nvml, lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, kind, since))

    now, ever = errors(nvml.NVML_VOLATILE_ECC), errors(nvml.NVML_AGGREGATE_ECC)
    rows = _answered(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    if rows and rows[3]:
        mend = "Have the card replaced: it has no spare rows left."
        yield fail(name, ConfigError("a damaged row of its memory could not be replaced", mend))
    elif rows and rows[2]:
        mend = "Reset the GPU: nvidia-smi --gpu-reset, or restart the machine."
        yield fail(name, ConfigError("damaged rows of its memory wait to be replaced", mend))
    elif now:
        what = f"{now:.0f} memory errors that ECC could not correct since the driver was loaded"
        yield fail(name, ConfigError(what, "Restart the machine; where they come again, have the card replaced."))
    elif ever:
        yield warn(name, f"{ever:.0f} uncorrected memory errors in its life", "Watch it: nvidia-smi -q -d ECC")


def _told(nvml: Any, ask: Callable[[], Any]) -> float | None:
    """A figure of the driver's; None from a card without it."""
    answer = _answered(nvml, ask)
    return None if answer is None else float(answer)


def _answered(nvml: Any, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _handles(nvml: Any) -> dict[int, Any]:
    """The GPUs that this process may use, by the driver's number, in the order that CUDA_VISIBLE_DEVICES names them.

    As CUDA reads it: what comes after an entry that names no GPU (-1, say) doesn't count. Numbers are taken for the
    driver's, which CUDA's are on equal cards and with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    machine = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in range(int(nvml.nvmlDeviceGetCount()))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return machine
    chosen: dict[int, Any] = {}
    for entry in visible.split(","):
        if (index := _named(nvml, machine, entry.strip())) is None:
            break
        chosen[index] = machine[index]
    return chosen


def _named(nvml: Any, machine: dict[int, Any], entry: str) -> int | None:
    """The number of the GPU that an entry of CUDA_VISIBLE_DEVICES names, also by a part of it (MIG); None: of none."""
    if entry.isdecimal():
        return int(entry) if int(entry) in machine else None
    if entry.startswith("MIG-"):
        part = _answered(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(entry))
        if part is None:
            return None
        index = _told(nvml, lambda: nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)))
        return None if index is None else int(index)
    uuids = {index: str(_answered(nvml, partial(nvml.nvmlDeviceGetUUID, handle))) for index, handle in machine.items()}
    fitting = [index for index, uuid in uuids.items() if entry.startswith("GPU-") and uuid.startswith(entry)]
    return fitting[0] if len(fitting) == 1 else None


@contextlib.contextmanager
def _driver() -> Iterator[Any]:
    """The library that speaks to the driver.

    Raises:
        ConfigError: there is none, or it does not answer.
    """
    try:
        import pynvml
    except ImportError as error:
        raise ConfigError("nvidia-ml-py is not installed", "Run bash setup_env.sh.") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        mend = "Install or update the NVIDIA driver, and restart the machine; nvidia-smi must list the GPUs."
        raise ConfigError(f"the NVIDIA driver does not answer: {error}", mend) from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _driver_answers() -> bool:
    try:
        with _driver():
            return True
    except ConfigError:
        return False


def _has_card() -> bool:
    """Whether an NVIDIA GPU is plugged in, with or without a driver."""
    for device in PCI_DEVICES.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASSES):
                return True
    return False
