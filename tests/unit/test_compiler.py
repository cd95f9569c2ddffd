from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from pretrain import compiler, kernels
from pretrain.arguments import parse
from pretrain.errors import ConfigError
from pretrain.kernels import CUDNN_FIRST, choose_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ONE_RANK = SimpleNamespace(any=bool, is_first=True)


class Module:
    """Notes how it is compiled."""

    how = None

    def compile(self, **how):
        self.how = how


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiler.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(compiler, "compiler_problem", lambda device: "")


def test_the_mode_reaches_the_compiler_and_what_it_makes_is_kept(tmp_path):
    module = Module()
    compiler.compile_model(module, CUDA, ONE_RANK, "reduce-overhead")
    assert module.how == {"mode": "reduce-overhead"}
    assert os.environ[compiler.CACHE_VARIABLE] == str(tmp_path / "torch_inductor")
    assert (tmp_path / "torch_inductor").is_dir()


def test_a_cache_of_the_users_own_stays_and_a_home_that_can_not_be_written_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, "/mine")
    compiler.keep_compiled()
    assert os.environ[compiler.CACHE_VARIABLE] == "/mine"
    monkeypatch.delenv(compiler.CACHE_VARIABLE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler.keep_compiled()
    assert compiler.CACHE_VARIABLE not in os.environ


def test_where_the_compiler_does_not_work_the_model_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(compiler, "compiler_problem", lambda device: "no compiler")
    module = Module()
    compiler.compile_model(module, CPU, ONE_RANK)
    assert module.how is None


def test_a_mode_without_a_compiler_is_a_config_error():
    with pytest.raises(ConfigError, match="compile_mode reduce-overhead means nothing without --compile"):
        parse(["--data", "x", "--train.compile_mode", "reduce-overhead"])
    config = parse(["--data", "x", "--train.compile_mode", "max-autotune", "--compile"]).config
    assert config.train.compile_mode == "max-autotune"


# ---- which of torch's fused attention kernels comes first ----


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by its compute capability; torch's order is put back afterwards."""

    def of(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return CUDA

    yield of
    monkeypatch.undo()
    kernels.prefer_cudnn(CPU)


def order():
    return torch._C._get_sdp_priority_order()


def test_cudnns_kernel_comes_first_on_hopper_and_newer_alone(gpu):
    before = order()
    assert not kernels.prefer_cudnn(gpu(8, 0)) and order() == before
    assert kernels.prefer_cudnn(gpu(9, 0)) and order()[:4] == [int(backend) for backend in CUDNN_FIRST]
    assert kernels.prefer_cudnn(gpu(10, 0))
    assert not kernels.prefer_cudnn(CPU) and order() == before


def test_deterministic_runs_leave_it_out(gpu, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not kernels.prefer_cudnn(gpu(9, 0))


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), ["sdpa", "flash"]), ((8, 0), ["flash", "sdpa"])])
def test_auto_tries_cudnn_before_flash_attention_2_on_hopper(gpu, monkeypatch, capability, expected):
    tried = []
    monkeypatch.setattr(kernels, "_obstacle", lambda name, *_: tried.append(name) or ("no" if len(tried) < 2 else ""))
    name, reason = choose_attention("auto", gpu(*capability), torch.bfloat16, 64)
    assert tried == expected and name == expected[1]
    assert "cuDNN" not in reason.partition(";")[0] or name == "sdpa"
