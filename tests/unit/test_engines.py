from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model import GPT
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine import zero
from pretrain.engine.base import EngineState
from pretrain.engine.build import build_engine
from pretrain.engine.choice import engine_problems, traffic
from pretrain.engine.ds_settings import deepspeed_settings
from pretrain.engine.fsdp import FsdpEngine
from pretrain.engine.native import NativeEngine
from pretrain.errors import ConfigError
from pretrain.model_config import ModelConfig
from pretrain.optim import LossScale, parameter_groups
from pretrain.ranks import Ranks
from tests.helpers_training import (
    ROOT,
    SEQ_LEN,
    VOCAB,
    TinyModel,
    copied_states,
    differing,
    reader_of,
    single_rank,
    tokens_of_step,
)

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-2, clip=0.5, weight_decay=0.1, warmup_steps=0)
ENGINE = EngineConfig(initial_loss_scale=1024.0, loss_scale_window=3)
SEQUENCES = 8


@pytest.fixture(scope="module", autouse=True)
def ranks():
    before = dict(os.environ)  # DeepSpeed's import sets some; other tests' subprocesses must not inherit them
    with single_rank() as only:
        yield only
    os.environ.clear()
    os.environ.update(before)


@functools.cache
def deepspeed_problem():
    """'' once DeepSpeed's CPU op is compiled, which takes half a minute on a fresh machine."""
    zero.prepare_import(CPU)
    return zero.cpu_op_problem()


def need_deepspeed():
    if problem := deepspeed_problem():
        pytest.skip(f"DeepSpeed can't run on this CPU: {problem}")


def native(precision="fp32", optim=OPTIM, engine=ENGINE, seed=0, model=TinyModel):
    return NativeEngine(model(seed), optim, engine, precision, CPU, world_size=1)


def zero_engine(precision="fp32", optim=OPTIM, seed=0, model=TinyModel, micro_size=SEQUENCES, stage=2, engine=ENGINE):
    need_deepspeed()
    batch = BatchConfig(global_size=SEQUENCES, micro_size=micro_size)
    settings, problems = deepspeed_settings(replace(engine, zero_stage=stage), optim, batch, precision, 1)
    assert not problems
    return zero.ZeroEngine(model(seed), settings, optim, CPU)


def fsdp(precision="fp32", optim=OPTIM, engine=ENGINE, seed=0, model=TinyModel):
    alone = Ranks(0, 1, 0, 1, dist.group.WORLD)
    return FsdpEngine(model(seed), optim, engine, precision, CPU, alone)


def module_of(engine):
    """The module that computes, in the compute precision; FSDP's has fp32 parameters until it runs."""
    return engine._engine.module if engine.name == "deepspeed" else engine._module


def make(kind, **arguments):
    return {"native": native, "deepspeed": zero_engine, "fsdp": fsdp}[kind](**arguments)


def lr_of(step):
    return 1e-2 / (step + 1)


def train(engine, steps, micro_size=SEQUENCES):
    """Losses and gradient norms of some steps, each with a learning rate of its own."""
    results = [engine.train_step(tokens_of_step(step, SEQUENCES).split(micro_size), lr_of(step)) for step in steps]
    assert all(result.applied for result in results)
    return [float(result.loss) for result in results], [result.grad_norm for result in results]


def plain_loop(steps, micro_size=SEQUENCES):
    """The same training in plain torch: (losses, gradient norms, weights by name)."""
    model = TinyModel()
    groups = parameter_groups(model.named_parameters(), OPTIM.weight_decay)
    adamw = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps)
    losses, norms = [], []
    for step in steps:
        micro_batches = tokens_of_step(step, SEQUENCES).split(micro_size)
        adamw.zero_grad()
        parts = []
        for tokens in micro_batches:
            loss = model(tokens[:, :-1], tokens[:, 1:])
            (loss / len(micro_batches)).backward()
            parts.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip).item())
        for group in adamw.param_groups:
            group["lr"] = lr_of(step)
        adamw.step()
        losses.append(sum(parts) / len(parts))
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def weights(engine):
    return {name: state["weight"].clone() for name, state in engine.parameter_states()}


def assert_close(left, right, tolerance):
    assert list(left) == list(right)
    assert max((left[name] - right[name]).abs().max().item() for name in left) <= tolerance


ENGINES = ["native", "deepspeed", "fsdp"]


@pytest.mark.parametrize("micro_size", [SEQUENCES, 2])
@pytest.mark.parametrize("kind", ENGINES)
def test_fp32_trains_as_a_plain_torch_loop_does(kind, micro_size):
    arguments = {"micro_size": micro_size} if kind == "deepspeed" else {}
    engine = make(kind, **arguments)
    losses, norms = train(engine, range(10), micro_size)
    expected_losses, expected_norms, expected_weights = plain_loop(range(10), micro_size)
    assert max(expected_norms) > OPTIM.clip  # so clipping is at work
    assert losses == pytest.approx(expected_losses, abs=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    # A first Adam step turns a rounding difference of a gradient near 0 into one of lr × that; hence not 1e-7.
    assert_close(weights(engine), expected_weights, 1e-5)
    assert engine.state() == EngineState(10)


def test_accumulating_micro_batches_is_one_large_batch():
    whole, parts = native(), native()
    assert train(whole, range(8))[0] == pytest.approx(train(parts, range(8), micro_size=2)[0], abs=1e-5)
    assert_close(weights(whole), weights(parts), 1e-4)


@pytest.mark.parametrize("kind", ENGINES)
def test_each_phase_of_a_step_is_told_as_it_begins(kind):
    how = {"micro_size": 2} if kind == "deepspeed" else {}
    silent, engine, marks = make(kind, **how), make(kind, **how), []
    engine.mark = marks.append
    assert train(engine, range(2), micro_size=2) == train(silent, range(2), micro_size=2)
    counts = ["optimizer"] if kind == "deepspeed" else []  # its step() only counts before the last micro-batch
    micro_batches = [["forward", "backward", *counts]] * (SEQUENCES // 2 - 1)
    step = [*itertools.chain(*micro_batches), "forward", "backward", "optimizer", "other"]
    assert marks == step * 2


@pytest.mark.parametrize("kind", ENGINES)
def test_evaluation_is_the_loss_and_changes_nothing(kind):
    engine, model, tokens = make(kind), TinyModel(), tokens_of_step(0, 4)
    before = copied_states(engine)
    assert engine.evaluate(tokens) == pytest.approx(model(tokens[:, :-1], tokens[:, 1:]).item(), abs=1e-6)
    assert differing(before, copied_states(engine)) == []
    assert train(engine, range(2))[0] == pytest.approx(plain_loop(range(2))[0], abs=1e-6)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_saved_and_loaded_goes_on_to_the_last_bit(kind, precision):
    engine = make(kind, precision=precision)
    train(engine, range(5))
    saved, state = copied_states(engine), engine.state()
    alone = train(engine, range(5, 10))
    other = make(kind, precision=precision, seed=7)
    other.load(reader_of(saved), state)
    assert differing(saved, copied_states(other)) == []
    assert train(other, range(5, 10)) == alone
    assert differing(copied_states(engine), copied_states(other)) == []
    assert engine.state() == other.state() == EngineState(10)


SHAPE = ModelConfig(size="custom", n_layer=2, n_head=2, d_model=16, vocab_size=VOCAB, seq_len=SEQ_LEN, dropout=0.2)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_leaves_torchs_linear_alone_and_selective_recomputing_changes_no_gradient(stage):
    """DeepSpeed's own linear of ZeRO-3 gives others there, and stays in the process."""
    linear, norms = torch.nn.functional.linear, []
    for kind in ("none", "selective"):
        shape = replace(SHAPE, activation_checkpointing=kind, bias=True).resolve()

        def model(seed, shape=shape):
            torch.manual_seed(seed)
            return GPT(shape)

        engine = zero_engine(stage=stage, model=model, optim=replace(OPTIM, clip=0.0))
        torch.manual_seed(7)
        norms += train(engine, range(1))[1]
    assert torch.nn.functional.linear is linear
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("make_engine", [native, fsdp, *(functools.partial(zero_engine, stage=n) for n in range(4))])
def test_before_update_is_called_after_the_backward_pass_and_before_anything_saved_changes(make_engine):
    engine = make_engine()
    train(engine, range(2))
    before, calls = copied_states(engine), []

    def look():
        calls.append(differing(before, copied_states(engine)))

    engine.before_update = look
    train(engine, range(2, 3), micro_size=SEQUENCES)
    assert calls == [[]]
    assert set(differing(before, copied_states(engine))) == set(before)
    engine.load(reader_of(copied_states(engine)), engine.state())
    assert len(calls) == 2


@pytest.mark.parametrize("make_engine", [native, fsdp, *(functools.partial(zero_engine, stage=n) for n in range(4))])
def test_states_that_stay_are_the_engines_own_and_the_same_at_every_call(make_engine):
    engine = make_engine()
    memory = [
        [tensor.data_ptr() for _, state in engine.parameter_states() for tensor in state.values()] for _ in range(2)
    ]
    train(engine, range(1))
    memory.append([tensor.data_ptr() for _, state in engine.parameter_states() for tensor in state.values()])
    assert not engine.states_stay or memory[0] == memory[1] == memory[2]
    assert engine.states_stay == (make_engine is native or (engine.name == "deepspeed" and engine._stage < 3))


@pytest.mark.parametrize(("first", "second"), [("native", "deepspeed"), ("deepspeed", "native")])
def test_one_engine_goes_on_where_the_other_stopped(first, second):
    engine, other = make(first), make(second, seed=7)
    train(engine, range(5))
    other.load(reader_of(copied_states(engine)), engine.state())
    assert differing(copied_states(engine), copied_states(other)) == []
    assert train(other, range(5, 10))[0] == pytest.approx(train(engine, range(5, 10))[0], abs=1e-6)


@pytest.mark.parametrize("kind", ENGINES)
def test_states_are_fp32_of_full_shape_under_canonical_names(kind):
    engine = make(kind, precision="bf16")
    train(engine, range(1))
    shapes = {name: parameter.shape for name, parameter in TinyModel().named_parameters()}
    states = dict(engine.parameter_states())
    assert list(states) == list(shapes)
    for name, state in states.items():
        assert set(state) == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(tensor.shape == shapes[name] and tensor.dtype == torch.float32 for tensor in state.values())
        assert state["exp_avg"].abs().max() > 0


@pytest.mark.parametrize("kind", ["native", "deepspeed"])
def test_bf16_keeps_masters_that_move_by_less_than_bf16_can_tell(kind):
    engine = make(kind, precision="bf16", optim=replace(OPTIM, weight_decay=0.0))
    before = weights(engine)["mix.weight"]
    module = module_of(engine)
    rounded = module.mix.weight.detach().clone()
    assert rounded.dtype == torch.bfloat16
    if kind == "native":  # DeepSpeed rounds the initial weights before it copies them
        assert torch.equal(before, TinyModel().mix.weight)
    engine.train_step([tokens_of_step(0, SEQUENCES)], lr=1e-7)
    moved = (weights(engine)["mix.weight"] - before).abs()
    assert 0 < moved.max() <= 2e-7
    assert (module.mix.weight != rounded).float().mean() < 0.01  # but for one on the edge of rounding


class Poisonable(TinyModel):
    """A model of which gradients, but not the loss, can be made not finite."""

    poison = 1.0

    def forward(self, inputs, targets):
        mixed = self.mix(self.embedding(inputs))
        mixed.register_hook(lambda gradient: gradient * self.poison)
        logits = self.head(self.norm(torch.tanh(mixed)))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@pytest.mark.parametrize("poison", [math.inf, math.nan])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ENGINES)
def test_a_gradient_that_is_not_finite_changes_nothing(kind, precision, poison):
    engine, untouched = (make(kind, precision=precision, model=Poisonable) for _ in range(2))
    train(engine, range(2))
    train(untouched, range(2))
    before = copied_states(engine)
    module = module_of(engine)
    module.poison = poison
    result = engine.train_step([tokens_of_step(2, SEQUENCES)], lr_of(2))
    assert not result.applied
    assert result.grad_norm == math.inf
    assert math.isfinite(result.loss)
    assert differing(before, copied_states(engine)) == []
    assert engine.state() == EngineState(2)  # so the schedule didn't move either
    module.poison = 1.0
    assert train(engine, range(2, 4)) == train(untouched, range(2, 4))  # and nothing of it is left


@pytest.mark.parametrize("kind", ["native", "fsdp"])
def test_fp16_halves_and_doubles_its_loss_scale(kind):
    engine = make(kind, precision="fp16")
    train(engine, range(2))
    assert engine.state() == EngineState(2, 1024.0, 2)
    engine._loss_scale.scale = 2.0**24  # fp16 ends at 65504: scaled gradients overflow
    before = copied_states(engine)
    result = engine.train_step([tokens_of_step(2, SEQUENCES)], lr_of(2))
    assert (result.applied, result.grad_norm) == (False, math.inf)
    assert differing(before, copied_states(engine)) == []
    assert engine.state() == EngineState(2, 2.0**23, 0)
    engine._loss_scale.scale = 1024.0
    train(engine, range(2, 5))
    assert engine.state() == EngineState(5, 2048.0, 0)


@pytest.mark.parametrize("kind", ["native", "fsdp"])
def test_fp16_gradients_do_not_depend_on_the_loss_scale(kind):
    scaled = make(kind, precision="fp16")
    plain = make(kind, precision="fp16", engine=replace(ENGINE, initial_loss_scale=1.0))
    losses, norms = train(scaled, range(3))
    expected_losses, expected_norms = train(plain, range(3))
    assert norms == pytest.approx(expected_norms, rel=1e-2)
    moments, expected_moments = copied_states(scaled), copied_states(plain)  # AdamW hides a factor, its moments don't
    for name in moments:
        norm, expected = (float(states[name]["exp_avg"].norm()) for states in (moments, expected_moments))
        assert norm == pytest.approx(expected, rel=2e-2), name
    assert losses == pytest.approx(expected_losses, abs=1e-2)
    assert losses == pytest.approx(plain_loop(range(3))[0], abs=2e-2)


@pytest.mark.parametrize("kind", ["native", "fsdp"])
def test_fp16_resumes_its_loss_scale_to_the_last_bit(kind):
    engine = make(kind, precision="fp16")
    train(engine, range(5))
    saved, state = copied_states(engine), engine.state()
    assert state == EngineState(5, 2048.0, 2)
    other = make(kind, precision="fp16", seed=7)
    other.load(reader_of(saved), state)
    assert train(other, range(5, 8)) == train(engine, range(5, 8))
    assert other.state() == engine.state() == EngineState(8, 4096.0, 2)


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """DeepSpeed refuses fp16 on CPUs, which can multiply it all the same."""
    need_deepspeed()
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


@pytest.mark.usefixtures("fp16_on_a_cpu")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_asks_our_loss_scale_and_resumes_it(stage):
    overflows = random.Random(stage)
    arguments = {"precision": "fp16", "model": Poisonable, "stage": stage}
    engine, ours, applied = zero_engine(**arguments), LossScale(1024.0, window=3), 0
    for step in range(24):
        overflow = overflows.random() < 0.3 or step == 5
        module_of(engine).poison = math.inf if overflow else 1.0
        result = engine.train_step([tokens_of_step(step, SEQUENCES)], lr_of(step))
        ours.update(not overflow)
        applied += not overflow
        assert result.applied is not overflow
        assert engine.state() == EngineState(applied, ours.scale, ours.finite_steps)
        assert engine._zero.loss_scale == ours.scale
        if step % 8 == 7:  # a resume at any time changes nothing
            state, states = engine.state(), copied_states(engine)
            engine = zero_engine(**arguments, seed=7)
            engine.load(reader_of(states), state)
            assert engine.state() == state and engine._zero.loss_scale == ours.scale


@pytest.mark.usefixtures("fp16_on_a_cpu")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_divides_by_the_scale_that_it_multiplied_by_also_when_it_doubles(stage):
    each_step = replace(ENGINE, loss_scale_window=1)
    engine, other = zero_engine("fp16", stage=stage, engine=each_step), native("fp16", engine=each_step)
    norms, expected = train(engine, range(3))[1], train(other, range(3))[1]
    assert engine.state() == other.state() == EngineState(3, 8192.0, 0)
    assert norms == pytest.approx(expected, rel=1e-2)
    states, others = copied_states(engine), copied_states(other)  # AdamW hides a factor, its moments don't
    for name in states:
        norm, wanted = (float(each[name]["exp_avg"].norm()) for each in (states, others))
        assert norm == pytest.approx(wanted, rel=5e-2), name


def build(engine_name, ranks):
    engine, batch = replace(ENGINE, name=engine_name), BatchConfig(global_size=SEQUENCES, micro_size=SEQUENCES)
    return build_engine(TinyModel(), engine, OPTIM, batch, "fp32", CPU, ranks)


@pytest.mark.parametrize("name", ["native", "single", "ddp", "fsdp"])
def test_other_engines_are_built_without_deepspeed(ranks, monkeypatch, name):
    monkeypatch.setattr(zero, "prepare_import", lambda device: pytest.fail("DeepSpeed was touched"))
    assert build(name, ranks).name == name


def test_single_is_for_one_rank():
    assert engine_problems(EngineConfig(name="single"), 1) == engine_problems(EngineConfig(name="ddp"), 2) == []
    assert re.search("2 ranks.*--engine ddp", engine_problems(EngineConfig(name="single"), 2)[0])


def test_hybrid_on_one_node_is_refused_with_what_was_found():
    alone = Ranks(0, 1, 0, 1, dist.group.WORLD)
    with pytest.raises(ConfigError, match=r"hybrid.*several nodes.*found 1 with 1 ranks: choose full"):
        FsdpEngine(TinyModel(), OPTIM, replace(ENGINE, fsdp_shard="hybrid"), "fp32", CPU, alone)


@pytest.mark.parametrize(
    ("engine", "accumulation", "said"),
    [
        (
            {"name": "deepspeed"},
            8,
            "ZeRO-2 reduces at every micro-step: accumulation 8 moves 8 × the gradients; ZeRO-1",
        ),
        ({"name": "deepspeed", "zero_stage": 1}, 8, "ZeRO-1 reduces gradients once a step, behind 8 micro-batches"),
        (
            {"name": "deepspeed", "zero_stage": 3},
            2,
            "ZeRO-3 reduces at every micro-step, and gathers the weights 4 times",
        ),
        ({"name": "deepspeed"}, 1, "ZeRO-2 reduces gradients once a step, there being one micro-batch"),
        ({"name": "fsdp"}, 4, "once a step, keeps them whole in fp32 until then, and gathers the weights 8 times"),
        ({"name": "fsdp", "fsdp_reduce": "micro_step"}, 4, "accumulation 4 moves 4 × the gradients"),
        ({"name": "ddp"}, 4, "ddp reduces gradients once a step, while the last of 4 micro-batches still runs"),
    ],
)
def test_what_a_step_moves_is_said(engine, accumulation, said):
    assert said in traffic(EngineConfig(**engine), accumulation, 2)
    assert traffic(EngineConfig(**engine), accumulation, 1) == ""


def test_deepspeed_is_built_where_it_runs(ranks):
    need_deepspeed()
    assert build("deepspeed", ranks).name == "deepspeed"


def test_without_a_compiler_the_native_engine_trains_and_it_is_said(ranks, monkeypatch, caplog):
    monkeypatch.setattr(zero, "cpu_op_problem", lambda: "no c++ here")
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        engine = build("deepspeed", ranks)
    assert engine.name == "native"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no c++ here" in caplog.text and "native engine" in caplog.text
    train(engine, range(1))


def test_a_missing_deepspeed_is_a_config_error_with_the_mend(ranks, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # import raises ImportError
    with pytest.raises(ConfigError, match=r"can't be imported.*setup_env\.sh.*--engine native"):
        build("deepspeed", ranks)


def test_a_contradicting_ds_config_is_a_config_error(ranks, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 9}')
    engine = replace(ENGINE, ds_config=str(tmp_path / "ds.json"))
    with pytest.raises(ConfigError, match="train_batch_size = 9"):
        build_engine(TinyModel(), engine, OPTIM, BatchConfig(8, 8), "fp32", CPU, ranks)


TWO_RANKS = """
import json, sys
import torch
from pretrain import ranks
from model import GPT
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine.build import build_engine
from pretrain.reports import end_at_once
from tests.helpers_training import TinyModel, tokens_of_step

me = ranks.join(torch.device("cpu"), 5)
results = {}
for name in sys.argv[2:]:
    optim = OptimConfig(lr=1e-2, clip=0.5, weight_decay=0.1, warmup_steps=0)
    batch, model = BatchConfig(global_size=8, micro_size=2), TinyModel()
    engine = build_engine(model, EngineConfig(name=name), optim, batch, "fp32", torch.device("cpu"), me)
    losses = []
    for step in range(10):
        share = tokens_of_step(step, 8).chunk(2)[me.rank]
        result = engine.train_step(share.split(2), 1e-2 / (step + 1))
        losses.append(me.mean(float(result.loss)))
    weights = {key: state["weight"].double().sum().item() for key, state in engine.parameter_states()}
    norms = [answer["norm"] for answer in me.exchange({"norm": result.grad_norm})]
    results[name] = {"engine": engine.name, "losses": losses, "sums": weights, "norms": norms}
if me.is_first:
    json.dump(results, open(sys.argv[1], "w"))
ranks.leave(me)
end_at_once(0)
"""


def test_two_ranks_train_as_one_does_with_either_engine(tmp_path):
    need_deepspeed()
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    launch = [sys.executable, "-m", "pretrain.launch", "--nproc_per_node=2"]
    command = [*launch, str(tmp_path / "two_ranks.py"), str(tmp_path / "out.json"), "native", "deepspeed"]
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out.json").read_text())
    losses, norms, expected = plain_loop(range(10))
    for name in ("native", "deepspeed"):
        assert results[name]["engine"] == name
        assert results[name]["losses"] == pytest.approx(losses, abs=1e-5)
        assert results[name]["norms"] == pytest.approx([norms[-1]] * 2, rel=1e-4)
        sums = {key: weight.double().sum().item() for key, weight in expected.items()}
        assert results[name]["sums"] == pytest.approx(sums, abs=1e-3)
