"""The driver is played by a module of nvidia-ml-py's names: there is no GPU in these tests."""

from __future__ import annotations

import sys
import types
from typing import Any, ClassVar

import pytest

from pretrain import gpu_checks
from pretrain.doctor import Question, answer

HEALTHY = {
    "nvmlSystemGetDriverVersion": "580.65.06",
    "nvmlSystemGetCudaDriverVersion_v2": 13000,
    "nvmlDeviceGetCount": 2,
    "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
    "nvmlDeviceGetCurrentClocksThrottleReasons": 1,  # idle
    "nvmlDeviceGetApplicationsClock": 1980,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetClockInfo": 345,
    "nvmlDeviceGetTemperature": 31,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
    "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=500_000_000),
}


class FakeNvml(types.ModuleType):
    NVMLError = type("NVMLError", (Exception,), {})
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1, 0, 1
    NVML_VOLATILE_ECC, NVML_AGGREGATE_ECC = 0, 1
    reasons: ClassVar = {"HwSlowdown": 8, "SwThermalSlowdown": 32, "HwThermalSlowdown": 64, "HwPowerBrakeSlowdown": 128}

    def __init__(self, **answers: Any) -> None:
        super().__init__("pynvml")
        for name, bit in self.reasons.items():
            setattr(self, f"nvmlClocksThrottleReason{name}", bit)
        for name, value in {**HEALTHY, **answers}.items():
            setattr(self, name, self._answering(value))

    def _answering(self, value: Any) -> Any:
        def ask(*arguments: Any) -> Any:
            if value is None:
                raise self.NVMLError("Not Supported")
            return value(*arguments) if callable(value) else value

        return ask

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle:x}{handle:x}beef00-0000"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        """Of a part of a card: a hundred times its number."""
        if not uuid.startswith("MIG-") or not uuid[4:].isdecimal():
            raise self.NVMLError("Not Found")
        return 100 * int(uuid[4:])

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: int) -> int:
        return part // 100

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle


@pytest.fixture
def gpus(monkeypatch):
    def install(**answers: Any) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(**answers))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def health() -> list[tuple[str, str]]:
    return [(finding.name, finding.status) for finding in gpu_checks.health()]


def test_healthy_gpus_are_one_line_and_the_driver_another(gpus):
    gpus()
    driver = gpu_checks.driver()
    assert driver.status == "ok" and driver.found == "580.65.06, CUDA 13.0; 2 × NVIDIA H100 80GB HBM3"
    assert gpu_checks.first_gpu() == "NVIDIA H100 80GB HBM3"
    (line,) = gpu_checks.health()
    assert line.status == "ok"
    assert line.found == "2 GPUs: no memory errors, not throttled, 345–345 MHz now, 31–31 °C"


def test_a_card_without_ecc_and_clocks_of_its_own_is_well(gpus):
    gpus(
        nvmlDeviceGetTotalEccErrors=None,
        nvmlDeviceGetRemappedRows=None,
        nvmlDeviceGetApplicationsClock=None,
        nvmlDeviceGetTemperature=None,
    )
    (line,) = gpu_checks.health()
    assert line.status == "ok" and "°C" not in line.found


@pytest.mark.parametrize(
    ("answers", "status", "words"),
    [
        ({"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)}, "fail", "wait to be replaced"),
        ({"nvmlDeviceGetRemappedRows": (0, 9, 0, 1)}, "fail", "could not be replaced"),
        ({"nvmlDeviceGetTotalEccErrors": 3}, "fail", "3 memory errors"),
        ({"nvmlDeviceGetTotalEccErrors": lambda handle, kind, since: since * 5}, "warn", "5 uncorrected"),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 8 | 64}, "warn", "too hot"),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 8 | 128}, "warn", "power supply"),
        ({"nvmlDeviceGetApplicationsClock": 1200}, "warn", "1200 of 1980 MHz"),
        ({"nvmlDeviceGetEnforcedPowerLimit": 400_000}, "warn", "400 of 700 W"),
        ({"nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=40e9)}, "warn", "40.0 GB"),
    ],
)
def test_what_is_wrong_with_a_gpu_is_named_with_its_mend(gpus, answers, status, words):
    gpus(nvmlDeviceGetCount=1, **answers)
    (finding,) = gpu_checks.health()
    assert (finding.name, finding.status) == ("gpu_0", status)
    assert words in finding.found and finding.mend
    assert finding.exit_code == (2 if status == "fail" else 0)


def test_only_the_gpu_that_has_a_trouble_is_named(gpus):
    gpus(nvmlDeviceGetEnforcedPowerLimit=lambda handle: 300_000 if handle == 1 else 700_000)
    assert health() == [("gpu_1", "warn")]


def test_unequal_gpus_are_a_warning(gpus):
    gpus(nvmlDeviceGetName=lambda handle: f"NVIDIA A{handle}")
    assert gpu_checks.driver().status == "warn"


def test_the_gpus_that_count_are_those_this_process_may_use(gpus, monkeypatch):
    gpus(nvmlDeviceGetCount=8)
    assert gpu_checks.count_gpus() == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_checks.count_gpus() == 0 and health() == [("gpu_health", "skip")]


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        ("0,3", [0, 3]),
        (" 3 , 0", [3, 0]),
        ("-1", []),
        ("0,-1,3", [0]),  # CUDA stops there
        ("0,99,3", [0]),
        ("NoDevFiles", []),
        ("GPU-55beef00-0000,GPU-2", [5, 2]),
        ("GPU-", []),  # it could be any
        ("GPU-77beef00-0000,GPU-ffffffff,0", [7]),
        ("MIG-4", [4]),
        ("MIG-none", []),
    ],
)
def test_only_the_gpus_that_cuda_would_show_are_counted_and_looked_at(gpus, monkeypatch, visible, numbers):
    limit = {"nvmlDeviceGetEnforcedPowerLimit": 300_000}  # a trouble of each card
    gpus(nvmlDeviceGetCount=8, nvmlDeviceGetName=lambda handle: f"NVIDIA A{handle}", **limit)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_checks.count_gpus() == len(numbers)
    assert [finding.name for finding in gpu_checks.health()] == ([f"gpu_{n}" for n in numbers] or ["gpu_health"])
    assert gpu_checks.first_gpu() == (f"NVIDIA A{numbers[0]}" if numbers else "")
    driver = gpu_checks.driver()
    assert driver.status == ("warn" if len(numbers) > 1 else "ok")
    assert driver.found.partition("; ")[2] == (", ".join(f"1 × NVIDIA A{n}" for n in numbers) or "no GPU")


def test_a_card_whose_driver_does_not_answer_is_a_fail_and_no_card_none(monkeypatch, tmp_path):
    module = FakeNvml()

    def broken() -> None:
        raise module.NVMLError("Driver/library version mismatch")

    monkeypatch.setattr(module, "nvmlInit", broken)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(gpu_checks, "PCI_DEVICES", tmp_path)
    assert gpu_checks.driver().status == "skip" and gpu_checks.count_gpus() == 0
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    (finding,) = answer(Question("driver", gpu_checks.driver))
    assert (finding.status, finding.exit_code) == ("fail", 2)
    assert "version mismatch" in finding.found and "restart the machine" in finding.mend
