from __future__ import annotations

import logging
import types

import psutil
import pytest
import torch

from pretrain import budget, host_memory, memory, plan
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.errors import ConfigError
from pretrain.model_config import ModelConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class OneRank:
    """Ranks of one, where another may be in trouble."""

    local_world_size = 2

    def __init__(self, other: bool = False) -> None:
        self.other = other

    def any(self, flag: bool) -> bool:
        return flag or self.other


@pytest.fixture
def h100(monkeypatch):
    """An H100, as torch would show it; its name can be changed, and what its allocator measured."""
    card = {"name": "NVIDIA H100 80GB HBM3", "measured": 10**9}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card["name"])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=85_000_000_000)
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: card["measured"])
    return card


def setup_of(micro: int):
    batch = BatchConfig(128, micro)
    model = ModelConfig(size="7B").resolve()
    return plan.make_setup(model, batch, EngineConfig(name="deepspeed"), OptimConfig(), "bf16", 8)


@pytest.fixture
def host(monkeypatch):
    """A host with so many GB free and in all."""

    def play(free: float, total: float) -> None:
        monkeypatch.setattr(host_memory, "free_bytes", lambda: int(free * 1e9))
        monkeypatch.setattr(host_memory, "total_bytes", lambda: int(total * 1e9))

    return play


def test_on_a_cpu_the_hosts_memory_is_what_it_must_fit_into(host, caplog, monkeypatch):
    host(500, 600)
    with caplog.at_level(logging.INFO, "pretrain"):
        prediction = budget.check_memory(setup_of(2), CPU, OneRank(), force=False)
    assert "Memory Requirements of one rank" in caplog.text and "500.00 GB free of 600.00 GB: Feasible" in caplog.text
    tree = prediction.to_json()["memory"]
    assert tree["feasible"] and tree["ranks_of_the_host"] == 2 and tree["free_gb"] == 500
    assert 2 * sum(tree["components_gb"].values()) == pytest.approx(tree["required_gb"], abs=0.02)
    assert tree["required_gb"] == pytest.approx(host_memory.host_bytes(setup_of(2), 2, "cpu") / 1e9, abs=0.001)
    monkeypatch.setattr(host_memory, "peak_resident_bytes", lambda: 77_000_000_000)
    with caplog.at_level(logging.INFO, "pretrain"):
        prediction.compare()
    tensors = memory.peak(setup_of(2)).total / 1e9
    assert f"{tensors:.2f} GB of tensors predicted" in caplog.text and "77.00 GB were resident" in caplog.text


def test_what_the_host_can_not_hold_is_refused_and_what_is_taken_now_is_no_reason(host, caplog):
    needed = host_memory.host_bytes(setup_of(4), 2, "cpu") / 1e9
    host(10, needed + 1)
    with caplog.at_level(logging.INFO, "pretrain"):
        assert budget.check_memory(setup_of(4), CPU, OneRank(), force=False).feasible
    assert "Feasible, where others make room" in caplog.text
    with pytest.raises(ConfigError, match=r"that fits is 4\. Give --batch\.micro_size 4, or --force"):
        budget.check_memory(setup_of(16), CPU, OneRank(), force=False)
    assert not budget.check_memory(setup_of(16), CPU, OneRank(), force=True).feasible
    host(1, 2)
    with pytest.raises(ConfigError, match=r"is none\. Give fewer ranks or a smaller model, or --force"):
        budget.check_memory(setup_of(1), CPU, OneRank(), force=False)


def test_the_most_that_was_resident_is_never_less_than_what_is_now():
    assert host_memory.peak_resident_bytes() >= 0.9 * psutil.Process().memory_info().rss


def test_what_fits_is_logged_and_described(h100, caplog):
    with caplog.at_level(logging.INFO, "pretrain"):
        prediction = budget.check_memory(setup_of(2), GPU, OneRank(), force=False)
    assert "Memory Requirements" in caplog.text and "Feasible" in caplog.text and "Not feasible" not in caplog.text
    tree = prediction.to_json()
    assert tree["memory"]["feasible"] and tree["memory"]["available_gb"] == 76.5
    assert tree["tokens_per_second"] > 0 and "not ours" in tree["mfu_source"]


def test_what_cannot_fit_is_refused_with_the_largest_micro_batch_that_does(h100):
    with pytest.raises(
        ConfigError, match=r"largest micro batch that fits is 4\. Give --batch.micro_size 4, or .*--force"
    ):
        budget.check_memory(setup_of(16), GPU, OneRank(), force=False)


def test_force_goes_on_with_a_warning(h100, caplog):
    prediction = budget.check_memory(setup_of(16), GPU, OneRank(), force=True)
    assert not prediction.budget.feasible and "--force" in caplog.text


def test_all_ranks_stop_where_one_has_too_little(h100):
    with pytest.raises(ConfigError, match="of another"):
        budget.check_memory(setup_of(2), GPU, OneRank(other=True), force=False)


def test_an_unknown_gpu_has_a_memory_plan_and_no_speed(h100):
    h100["name"] = "NVIDIA Z9000"
    prediction = budget.check_memory(setup_of(2), GPU, OneRank(), force=False)
    assert prediction.speed is None and set(prediction.to_json()) == {"memory"}


def test_the_prediction_is_held_against_what_was_measured(h100, caplog):
    prediction = budget.check_memory(setup_of(2), GPU, OneRank(), force=False)
    h100["measured"] = prediction.budget.peak.total // 2
    with caplog.at_level(logging.INFO, "pretrain"):
        prediction.compare()
    assert "(+100.0 %)" in caplog.text
