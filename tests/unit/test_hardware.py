from __future__ import annotations

import json
import types

import pytest
import torch

from pretrain import hardware
from pretrain.errors import ConfigError

CPU = torch.device("cpu")
GPU = torch.device("cuda", 1)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as torch would show it; the name and the capability can be set."""
    facts = {"name": H100, "capability": (9, 0)}
    properties = types.SimpleNamespace(uuid="1b2c", total_memory=85_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: facts["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_000_000_000)
    return facts


def test_a_rank_gets_its_own_gpu(gpus) -> None:
    assert hardware.resolve_device(1) == torch.device("cuda", 1)


def test_a_rank_without_a_gpu_on_a_gpu_machine_is_refused(gpus) -> None:
    with pytest.raises(ConfigError, match="rank 2 of this node has no GPU: torch sees 2"):
        hardware.resolve_device(2)


def test_without_a_gpu_every_rank_is_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.resolve_device(3) == CPU


def test_a_script_takes_the_gpu_in_bf16_or_the_cpu_in_fp32_unless_told(gpus, monkeypatch) -> None:
    cuda = torch.device("cuda")
    assert hardware.choose_device("auto", "auto") == hardware.choose_device("cuda", "bf16") == (cuda, "bf16")
    assert hardware.choose_device("cpu", "auto") == (CPU, "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.choose_device("auto", "fp16") == (CPU, "fp16")
    with pytest.raises(ConfigError, match=r"torch sees no GPU here\. Take --device cpu"):
        hardware.choose_device("cuda", "auto")


def test_a_cpu_refuses_fp16_and_names_what_it_can() -> None:
    hardware.check_precision(CPU, "fp32")
    hardware.check_precision(CPU, "bf16")
    with pytest.raises(
        ConfigError, match=r"fp16, which a CPU can't train in; it can fp32, bf16.*Give --precision bf16"
    ):
        hardware.check_precision(CPU, "fp16")


def test_a_gpu_before_ampere_refuses_bf16_and_names_what_it_can(gpus) -> None:
    hardware.check_precision(GPU, "bf16")
    gpus.update(name="Tesla T4", capability=(7, 5))
    with pytest.raises(ConfigError, match=r"bf16, which Tesla T4 can't train in; it can fp32, fp16"):
        hardware.check_precision(GPU, "bf16")


def test_fp8_is_for_ada_hopper_and_later_and_needs_torchao(gpus, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    hardware.check_precision(GPU, "fp8")
    gpus.update(name="NVIDIA L4", capability=(8, 9))
    hardware.check_precision(GPU, "fp8")
    gpus.update(name="NVIDIA A100-SXM4-80GB", capability=(8, 0))
    with pytest.raises(ConfigError, match=r"fp8, which NVIDIA A100-SXM4-80GB can't train in.*Give --precision bf16"):
        hardware.check_precision(GPU, "fp8")
    with pytest.raises(ConfigError, match=r"fp8, which a CPU can't train in; it can fp32, bf16"):
        hardware.check_precision(CPU, "fp8")
    gpus.update(name="NVIDIA H100 80GB HBM3", capability=(9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"torchao is not installed.*pip install -r requirements-fp8\.txt"):
        hardware.check_precision(GPU, "fp8")


def test_a_known_gpu_has_its_data_sheets_rate(gpus, monkeypatch) -> None:
    assert hardware.peak_flops(GPU, "bf16") == (989.4e12, "H100 SXM data sheet")
    assert hardware.peak_flops(GPU, "fp16") == hardware.peak_flops(GPU, "fp8") == (989.4e12, "H100 SXM data sheet")
    monkeypatch.setattr(hardware, "_multiplies_in_tf32", lambda: False)
    assert hardware.peak_flops(GPU, "fp32")[0] == pytest.approx(66.9e12)
    monkeypatch.setattr(hardware, "_multiplies_in_tf32", lambda: True)
    assert hardware.peak_flops(GPU, "fp32") == (494.7e12, "H100 SXM data sheet")


def test_an_unknown_gpu_and_a_missing_unit_are_measured(gpus, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "measure_flops", lambda device, dtype: 3e12 if dtype == torch.bfloat16 else 0)
    gpus["name"] = "NVIDIA Z1000"
    assert hardware.peak_flops(GPU, "bf16") == (3e12, "measured")
    gpus["name"] = "Tesla T4"
    assert hardware.peak_flops(GPU, "bf16") == (3e12, "measured")


def test_tf32_follows_torchs_own_setting(monkeypatch) -> None:
    before = torch.get_float32_matmul_precision()
    assert hardware._multiplies_in_tf32() == (before != "highest")
    torch.set_float32_matmul_precision("high")
    try:
        assert hardware._multiplies_in_tf32()
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_peak_of_a_cpu_is_measured_and_no_product_beats_it_by_much() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    rate, source = hardware.peak_flops(CPU, "fp32")
    assert source == "measured" and rate > 1e9
    assert torch.equal(torch.rand(1), expected)  # the data order and dropout must not move because of it
    assert hardware.measure_flops(CPU, torch.float32, seconds=0.1) < 3 * rate


def test_the_best_product_is_the_measured_rate(monkeypatch) -> None:
    readings = iter([0.0, 0.0, 5.0, 6.0, 6.0, 8.0, 9.0])  # end; then runs of 5 s and 2 s; then past the end
    monkeypatch.setattr("pretrain.hardware.time", types.SimpleNamespace(perf_counter=lambda: next(readings)))
    assert hardware.measure_flops(CPU, torch.float32, seconds=7) == 2 * 1024**3 / 2


def test_the_machine_is_described_in_plain_json() -> None:
    facts = hardware.describe_machine(CPU)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["device_name"] and facts["torch_version"] == torch.__version__
    assert facts["cuda_available"] == torch.cuda.is_available() and facts["device_count"] == torch.cuda.device_count()
    assert facts["cpu_count"] >= 1 and facts["host_memory_gb"] > 0.1


def test_a_gpu_machine_is_described_by_its_gpu(gpus) -> None:
    facts = hardware.describe_machine(GPU)
    assert (facts["device_name"], facts["device_count"], facts["device_memory_gb"]) == (H100, 2, 85.0)
    assert facts["compute_capability"] == "9.0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpus_data_sheet_is_not_beaten() -> None:
    device = torch.device("cuda", 0)
    rate, source = hardware.peak_flops(device, "fp16")
    measured = hardware.measure_flops(device, torch.float16)
    assert source == "measured" or 0.3 * rate < measured < 1.05 * rate
