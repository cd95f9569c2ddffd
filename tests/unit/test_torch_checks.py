"""On a CPU as it is; what a GPU would say is played, for there is none in these tests."""

from __future__ import annotations

import types

import pytest
import torch

from pretrain import compiler, torch_checks
from pretrain.config import BatchConfig, EngineConfig
from pretrain.doctor import Question, answer
from pretrain.kernels import Masking
from pretrain.memory import Setup, Sharding
from pretrain.model_config import ModelConfig


def setup_of(size: str = "125M", world_size: int = 1) -> Setup:
    batch = BatchConfig(8 * world_size, 8)
    return Setup(ModelConfig(size=size).resolve(), "bf16", batch, world_size, Sharding("deepspeed", 2, 500_000_000, 2))


def test_torch_on_a_cpu_and_torch_that_does_not_see_the_gpus(monkeypatch):
    assert torch_checks.build(0).status == "ok"
    monkeypatch.setattr(torch.version, "cuda", None)
    blind = torch_checks.build(8)
    assert (blind.status, blind.exit_code) == ("fail", 2)
    assert "on a machine with 8 GPUs" in blind.found and "TORCH_INDEX_URL" in blind.mend


def test_a_driver_older_than_torchs_cuda_is_told(monkeypatch):
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    found = torch_checks.build(8)
    assert found.status == "fail" and found.found.endswith("driver on your system is too old")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert "sees 7 of 8 GPUs" in torch_checks.build(8).found


@pytest.mark.parametrize(("precision", "status"), [("bf16", "ok"), ("fp32", "ok"), ("fp16", "fail")])
def test_a_precision_is_tried_and_refused_where_the_device_has_none(precision, status):
    (found,) = answer(Question("precision", torch_checks.precision, (precision,)))
    assert (found.name, found.status) == ("precision", status)
    assert status == "ok" or "Give --precision bf16" in found.mend


def test_wrong_products_are_found(monkeypatch):
    monkeypatch.setitem(torch_checks.PRECISION_DTYPES, "bf16", torch.int8)  # rounds nearly everything to 0
    (found,) = answer(Question("precision", torch_checks.precision, ("bf16",)))
    assert found.status == "fail" and "a matrix product in bf16 is wrong" in found.found


def test_of_fp8_it_is_said_what_was_multiplied(monkeypatch):
    monkeypatch.setattr(torch_checks, "check_precision", lambda device, wanted: None)
    words = torch_checks.precision("fp8").found
    assert words.startswith("bf16 multiplies rightly; fp8 products were not tried")
    monkeypatch.setitem(torch_checks.PRECISION_DTYPES, "fp8", torch.int8)
    assert "a matrix product in bf16 is wrong" in torch_checks.precision("fp8").found


def test_attention_runs_or_says_what_would():
    assert torch_checks.attention("auto", "bf16", 64).status == "ok"
    flash = torch_checks.attention("flash", "bf16", 64)
    assert flash.status == "fail" and "CUDA only" in flash.found and "--model.attention" in flash.mend
    masked = torch_checks.attention("auto", "bf16", 64, Masking(0.1))
    assert masked.status == "ok" and "the document mask by torch's fused attention" in masked.found
    assert torch_checks.attention("flex", "bf16", 64).found.endswith("only flash, sdpa, plain")
    assert "on CUDA only" in torch_checks.attention("flex", "bf16", 64, Masking()).found


def test_a_compiler_that_fails_or_lies_is_a_warning(monkeypatch):
    def no_compiler(function, fullgraph):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = torch_checks.compilation(True)
    assert found.status == "warn" and "No working C++ compiler" in found.found and "goes on without it" in found.mend
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: lambda x: x.sum())
    assert compiler.compiler_problem(torch.device("cpu")) == "it runs, but its results are wrong"
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    assert torch_checks.compilation(False).status == "ok"


def test_deepspeed_wants_a_compiler_on_a_cpu(monkeypatch):
    assert torch_checks.engine(EngineConfig(name="native")).status == "ok"
    assert torch_checks.engine(EngineConfig()).status == "ok"
    monkeypatch.setattr(torch_checks.shutil, "which", lambda name: None)
    found = torch_checks.engine(EngineConfig())
    assert found.status == "warn" and "native engine stands in" in found.found


def play_gpus(monkeypatch, *sizes_gb: int) -> None:
    def properties(index: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=sizes_gb[index] * 10**9)

    monkeypatch.setattr(torch_checks, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes_gb))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")


def test_the_plan_is_held_against_the_smallest_gpu(monkeypatch):
    assert torch_checks.gpu_memory(setup_of(), False).status == "skip"
    play_gpus(monkeypatch, 80, 24)
    assert torch_checks.gpu_memory(setup_of("125M"), False).status == "ok"
    large = torch_checks.gpu_memory(setup_of("7B"), False)
    assert large.status == "fail" and "of 21.6 GB" in large.found
    assert large.mend.startswith("Give b200 instead of NVIDIA H100") and "--gpu" not in large.mend
    assert torch_checks.gpu_memory(setup_of("7B"), True).status == "warn"


def test_what_ranks_reduce_is_held_against_a_step(monkeypatch):
    answer_of = {"ranks": 8, "backend": "nccl", "gb_per_s": 400.0, "right": True}
    monkeypatch.setattr(torch_checks, "_measure", lambda ranks: {**answer_of, "ranks": ranks})
    assert torch_checks.reduction(setup_of(), 1, 1).status == "skip"
    assert "between 2 ranks" in torch_checks.reduction(setup_of(), 0, 4).found
    play_gpus(monkeypatch, *[80] * 8)
    setup = setup_of("1.2B", 8)
    assert torch_checks.reduction(setup, 8, 8).status == "ok"
    answer_of["gb_per_s"] = 1.0
    slow = torch_checks.reduction(setup, 8, 8)
    assert slow.status == "warn" and "of a step's predicted time" in slow.found and "NVLink" in slow.mend


@pytest.mark.parametrize(
    ("printed", "error", "words"),
    [
        ("", "config error: rank 1 of this node has no GPU", "can't reduce together: config error: rank 1"),
        ('{"ranks": 2, "backend": "gloo", "gb_per_s": 1.0, "right": false}', "", "sums over 2 ranks are wrong"),
        ("", "", "nothing was said"),
    ],
)
def test_ranks_that_cannot_reduce_say_why(monkeypatch, printed, error, words):
    done = types.SimpleNamespace(stdout=printed, stderr=error)
    monkeypatch.setattr(torch_checks.subprocess, "run", lambda *arguments, **options: done)
    (found,) = answer(Question("all_reduce", torch_checks.reduction, (setup_of(), 0, 2)))
    assert (found.status, found.exit_code) == ("fail", 2) and words in found.found
