"""Steps of the engines on a GPU: loss scale, precisions, compiler, exact resume, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import GPT
from pretrain import memory
from pretrain.compiler import compiler_problem
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine.base import EngineState
from pretrain.engine.build import build_engine
from pretrain.engine.native import NativeEngine
from pretrain.fp8 import convert
from pretrain.hardware import supported_precisions
from pretrain.kernels import choose_attention
from pretrain.memory import Setup
from pretrain.memory_count import count_peak, measure_peak
from pretrain.model_config import ModelConfig
from pretrain.ranks import join, leave

pytestmark = pytest.mark.gpu
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0)
LR = 1e-3


def shape_of(size: dict[str, int], **changes: Any) -> ModelConfig:
    return ModelConfig(size="custom", dropout=0.0, **{**size, **changes}).resolve()


def model_of(shape: ModelConfig, kernel: str = "sdpa") -> GPT:
    torch.manual_seed(0)
    return GPT(shape, kernel)


def engine_of(shape: ModelConfig, precision: str, device: torch.device, **engine: Any) -> NativeEngine:
    return NativeEngine(model_of(shape), OPTIM, EngineConfig(name="single", **engine), precision, device, 1)


def batch_of(shape: ModelConfig, step: int = 0) -> tuple[torch.Tensor, ...]:
    """Two micro-batches of two sequences."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(shape.vocab_size, (4, shape.seq_len + 1), generator=generator).split(2)


def losses(engine: NativeEngine, shape: ModelConfig, steps: range) -> list[float]:
    return [float(engine.train_step(batch_of(shape, step), LR).loss) for step in steps]


def half_precision(device: torch.device) -> str:
    able = supported_precisions(device)
    return "bf16" if "bf16" in able else "fp16"


def test_fp16_halves_its_loss_scale_until_the_gradients_fit_and_doubles_it_again(device, size):
    shape = shape_of(size)
    engine = engine_of(shape, "fp16", device, initial_loss_scale=2.0**30, loss_scale_window=4)
    results = [engine.train_step(batch_of(shape), LR) for _ in range(24)]
    overflows = [not result.applied for result in results]
    first = overflows.index(False)
    assert first > 3 and all(overflows[:first])  # 2**30 is far above fp16's largest number
    assert all(result.grad_norm == float("inf") for result in results[:first])
    finite = results[first].grad_norm
    assert 0 < finite < 100  # unscaled
    assert engine.state().optimizer_steps == 24 - sum(overflows)
    # it doubled after four finite steps, as often as the numbers allowed
    assert engine.state().loss_scale >= 2.0 ** (30 - first)
    assert float(results[-1].loss) < float(results[0].loss)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_fp32_does(device, size, precision):
    if device.type == "cuda" and precision not in supported_precisions(device):
        pytest.skip(f"this GPU does not train in {precision}")
    shape = shape_of(size)
    exact = losses(engine_of(shape, "fp32", device), shape, range(8))
    half = losses(engine_of(shape, precision, device, initial_loss_scale=1024.0), shape, range(8))
    assert half == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_learns_as_an_eager_one_does(device, size, mode):
    how: dict[str, Any] = {"mode": mode}
    if device.type != "cuda":  # tracing is rehearsed, once, and not the C++ compiler, which takes a minute
        how = {"backend": "eager"}
        if mode != "default":
            pytest.skip("CUDA graphs")
    elif problem := compiler_problem(device):
        pytest.skip(f"no compiler: {problem}")
    shape = shape_of(size, n_layer=2)
    eager = losses(engine_of(shape, "fp32", device), shape, range(4))
    model = model_of(shape)
    model.compile(**how)
    engine = NativeEngine(model, OPTIM, EngineConfig(name="single"), "fp32", device, 1)
    assert losses(engine, shape, range(4)) == pytest.approx(eager, rel=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(device, size, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    shape, precision = shape_of(size), half_precision(device)
    torch.use_deterministic_algorithms(True)
    try:
        whole = engine_of(shape, precision, device)
        losses(whole, shape, range(3))
        saved = {name: {key: part.clone() for key, part in state.items()} for name, state in whole.parameter_states()}
        rest = losses(whole, shape, range(3, 6))
        resumed = engine_of(shape, precision, device)
        losses(resumed, shape, range(7, 8))  # it must forget what it was
        resumed.load(saved.__getitem__, EngineState(optimizer_steps=3))
        assert losses(resumed, shape, range(3, 6)) == rest
    finally:
        torch.use_deterministic_algorithms(False)
    expected = dict(whole.parameter_states())
    for name, state in resumed.parameter_states():
        assert all(torch.equal(part, expected[name][key]) for key, part in state.items()), name


def test_a_step_takes_the_memory_that_is_predicted(device, size):
    shape = shape_of({**size, "n_layer": 8} if device.type == "cuda" else size)
    setup = Setup(shape, "bf16", BatchConfig(8, 4))
    on_gpu = device.type == "cuda"
    took = measure_peak(setup, device) if on_gpu else count_peak(setup)
    assert memory.peak(setup).total == pytest.approx(took, rel=0.07 if on_gpu else 0.2)


def test_deepspeed_and_the_native_engine_take_the_same_steps(device, size, monkeypatch):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: a wheel of it in the folder that WHEELS names will do")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # join fills them in, and they go with the test
        monkeypatch.delenv(name)
    shape, batch = shape_of(size), BatchConfig(global_size=4, micro_size=2)
    ranks = join(device, 1)
    try:
        zero = build_engine(model_of(shape), EngineConfig(), OPTIM, batch, "bf16", device, ranks)
        if zero.name != "deepspeed":
            pytest.skip("DeepSpeed's op can't be built here")
        native = losses(engine_of(shape, "bf16", device), shape, range(5))
        assert losses(zero, shape, range(5)) == pytest.approx(native, rel=0.01)
    finally:
        leave(ranks)


# ---- what a CPU has no form of ----


def test_fp8_learns_as_bf16_does(gpu, size):
    pytest.importorskip("torchao", reason="fp8 needs torchao: pip install -r requirements-fp8.txt, or a wheel of it")
    if "fp8" not in supported_precisions(gpu):
        pytest.skip("fp8 needs compute capability 8.9")
    shape, model = shape_of(size), model_of(shape_of(size))
    assert convert(model) > 0
    model.compile()
    engine = NativeEngine(model, OPTIM, EngineConfig(name="single"), "fp8", gpu, 1)
    expected = losses(engine_of(shape, "bf16", gpu), shape, range(6))
    assert losses(engine, shape, range(6)) == pytest.approx(expected, rel=0.03)


def test_on_hopper_the_fused_attention_is_cudnns(gpu):
    name, reason = choose_attention("auto", gpu, torch.bfloat16, 64)
    if torch.cuda.get_device_capability(gpu) >= (9, 0):
        assert name == "sdpa" and "cuDNN's kernel first" in reason
    else:
        assert "cuDNN" not in reason


def test_the_host_does_not_wait_in_forward_and_backward(gpu, size):
    shape = shape_of(size)
    engine = engine_of(shape, "bf16", gpu)
    losses(engine, shape, range(2))
    model, tokens = engine._module, batch_of(shape)[0].to(gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
