from __future__ import annotations

import sys
import types

import psutil
import pytest
import torch

from pretrain.sensors import CpuSensors, GpuSensors, Reading, throttle_reasons

GPUS = [torch.device("cuda", number) for number in (0, 1)]


class FakeNvml(types.SimpleNamespace):
    """The driver of a machine with GPUs GPU-0 and GPU-1; `missing` are questions that they have no sensor for."""

    NVML_ERROR_NOT_SUPPORTED, NVML_SUCCESS = 3, 0
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_FI_DEV_POWER_INSTANT = 0, 1, 2, 186

    class NVMLError(Exception):
        def __init__(self, value: int, text: str = "") -> None:
            super().__init__(text)
            self.value = value

    def __init__(self, *missing: str, flaky: str = "", driver: bool = True) -> None:
        super().__init__(missing=missing, flaky=flaky, driver=driver, asked=[])

    def _asked(self, name: str) -> None:
        self.asked.append(name)
        if name in self.missing:
            raise self.NVMLError(3, "Not Supported")
        if name == self.flaky:
            raise self.NVMLError(999, "Unknown Error")

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError(9, "Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-0": 0, "GPU-1": 1}[uuid]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> types.SimpleNamespace:
        self._asked("utilization")
        return types.SimpleNamespace(gpu=97 - handle)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[types.SimpleNamespace]:
        self._asked("instant")
        assert fields == [186]
        return [types.SimpleNamespace(nvmlReturn=0, value=types.SimpleNamespace(uiVal=650_000 + handle))]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self._asked("power")
        return 600_000

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        self._asked("temperature")
        return 61

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        self._asked("clock")
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        self._asked("throttle")
        return 0x44

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self._asked("energy")
        return 5_000_000

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:
        self._asked("memory")
        return types.SimpleNamespace(used=40_000_000_000)


@pytest.fixture
def install(monkeypatch):
    def put(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=str(device.index))
    )
    return put


WHOLE = Reading("0", 650.0, 97.0, 61.0, 1755.0, 2619.0, "sw_power_cap+hw_thermal", 5000.0, 40.0)


def test_each_gpu_is_read_by_its_uuid(install) -> None:
    install(FakeNvml())
    gpus = GpuSensors(GPUS)
    first, second = gpus.read()
    assert gpus.problem == "" and first == WHOLE
    assert (second.device, second.power_w, second.utilization) == ("1", 650.001, 96.0)


def test_a_sensor_that_a_card_lacks_is_asked_once_and_one_that_fails_again(install) -> None:
    nvml = install(FakeNvml("temperature", "energy", flaky="clock"))
    gpus = GpuSensors(GPUS[:1])
    for _ in range(3):
        (reading,) = gpus.read()
    lacking = (reading.temperature_c, reading.energy_j, reading.sm_clock_mhz, reading.memory_clock_mhz)
    assert lacking == (None, None, None, None)
    assert (reading.power_w, reading.utilization, reading.memory_gb) == (650.0, 97.0, 40.0)
    assert [nvml.asked.count(name) for name in ("temperature", "energy", "clock")] == [1, 1, 6]


def test_a_card_without_instant_power_tells_its_mean(install) -> None:
    install(FakeNvml("instant"))
    assert GpuSensors(GPUS[:1]).read()[0].power_w == 600.0
    install(FakeNvml("instant", "power"))
    assert GpuSensors(GPUS[:1]).read()[0].power_w is None


def test_without_the_driver_or_its_package_there_is_a_problem_and_nothing_is_read(install) -> None:
    for module, problem in ((FakeNvml(driver=False), "Driver Not Loaded"), (None, "nvidia-ml-py is not installed")):
        install(module)
        gpus = GpuSensors(GPUS)
        assert problem in gpus.problem and gpus.read() == []


def test_without_gpus_nobody_asks_for_a_driver(install) -> None:
    install(None)
    gpus = GpuSensors([])
    assert gpus.problem == "" and gpus.read() == []


def test_throttle_reasons_have_names_and_idle_is_none() -> None:
    assert throttle_reasons(0x0) == throttle_reasons(0x1 | 0x2 | 0x100) == "none"
    assert throttle_reasons(0x8 | 0x20 | 0x1) == "hw_slowdown+sw_thermal"


def package(powercap, number: int, name: str, energy: str = "0"):
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("max_energy_range_uj", "1000000000"), ("energy_uj", energy)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_rapl_counts_the_packages_and_goes_round(tmp_path) -> None:
    first = package(tmp_path, 0, "package-0", "999000000")
    second = package(tmp_path, 1, "package-1", "5")
    package(tmp_path, 2, "psys", "7")
    cpu = CpuSensors(tmp_path)
    assert cpu.read()[0].energy_j == 0.0
    first.write_text("3000000\n")  # 4 J on, over the end of its range
    second.write_text("2000005\n")
    (reading,) = cpu.read()
    assert reading.energy_j == pytest.approx(6.0)
    assert reading.device == "cpu" and reading.power_w is None and 0 <= (reading.utilization or 0) <= 100


@pytest.mark.parametrize("energy", [None, "nonsense"])
def test_rapl_that_cannot_be_read_is_unknown(tmp_path, energy) -> None:
    counter = package(tmp_path, 0, "package-0", energy or "0")
    if energy is None:
        counter.unlink()
    assert CpuSensors(tmp_path).read()[0].energy_j is None
    assert CpuSensors(tmp_path / "none").read()[0].energy_j is None


def test_a_machine_without_thermometers_and_clocks_leaves_them_unknown(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(psutil, "sensors_temperatures", dict)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    (reading,) = CpuSensors(tmp_path).read()
    assert (reading.temperature_c, reading.sm_clock_mhz, reading.throttle) == (None, None, None)


def test_temperature_and_clock_of_a_cpu_are_asked_once_a_second(monkeypatch, tmp_path) -> None:
    now, clocks = [100.0], iter([1000.0, 2000.0])
    monkeypatch.setattr(psutil, "sensors_temperatures", dict)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: types.SimpleNamespace(current=next(clocks)))
    cpu = CpuSensors(tmp_path, clock=lambda: now[0])
    told = []
    for now[0] in (100.0, 100.5, 100.9, 101.0, 101.9):
        told.append(cpu.read()[0].sm_clock_mhz)
    assert told == [1000.0, 1000.0, 1000.0, 2000.0, 2000.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_read() -> None:
    gpus = GpuSensors([torch.device("cuda", 0)])
    (reading,) = gpus.read()
    assert gpus.problem == "" and reading.memory_gb and reading.device == "0"


@pytest.mark.parametrize("error", [NotImplementedError("no cpufreq"), OSError("no sensor"), RuntimeError("odd")])
def test_a_machine_that_does_not_tell_its_clock_or_temperature_is_no_error(tmp_path, monkeypatch, error):
    def untold():
        raise error

    monkeypatch.setattr(psutil, "cpu_freq", untold)
    monkeypatch.setattr(psutil, "sensors_temperatures", untold)
    (reading,) = CpuSensors(tmp_path).read()
    assert reading.sm_clock_mhz is None and reading.temperature_c is None and reading.utilization is not None
