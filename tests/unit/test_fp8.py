from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model import GPT
from pretrain.config import BatchConfig, Config, DataConfig, EngineConfig, OptimConfig, TrainConfig
from pretrain.config_checks import validate
from pretrain.engine.native import NativeEngine
from pretrain.fp8 import convert, fp8_layers
from pretrain.model_config import ModelConfig
from pretrain.pretrained import first_weights
from tests.helpers_training import copied_states

CPU = torch.device("cpu")
INSIDE = ["attn.qkv", "attn.proj", "mlp.gate", "mlp.up", "mlp.down"]


def shape(**changes):
    of = {"family": "llama", "n_layer": 4, "n_head": 2, "d_model": 32, "d_ff": 64, "vocab_size": 40, "seq_len": 16}
    return ModelConfig(size="custom", **{**of, "dropout": 0.0, "tie_embeddings": False, **changes}).resolve()


def skeleton(config):
    with torch.device("meta"):
        return GPT(config, "sdpa")


def test_the_layers_of_the_inner_blocks_take_part():
    expected = [f"blocks.{block}.{name}" for block in (1, 2) for name in INSIDE]
    assert list(fp8_layers(skeleton(shape()))) == expected
    assert list(fp8_layers(skeleton(shape(n_layer=2)))) == []


def test_a_layer_whose_sides_are_no_multiples_of_16_stays():
    assert list(fp8_layers(skeleton(shape(n_layer=3, d_ff=72)))) == ["blocks.1.attn.qkv", "blocks.1.attn.proj"]
    assert list(fp8_layers(skeleton(shape(n_layer=3, d_model=40, d_ff=80)))) == []
    assert list(fp8_layers(nn.Linear(16, 16))) == []  # a model without blocks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"engine": EngineConfig(name="deepspeed")}, "engine.name deepspeed does not train in: choose --engine ddp"),
        ({"model": shape(n_layer=2)}, "the last of model.n_layer 2 blocks stay in bf16, and none is left"),
        ({"model": shape(seq_len=15)}, "a multiple of 16 tokens, not batch.micro_size 8 × model.seq_len 15"),
        ({"model": shape(seq_len=15), "batch": BatchConfig(16, 16)}, ""),
        ({"batch": BatchConfig(16, 0)}, ""),
        (
            {"model": shape(seq_len=24), "batch": BatchConfig(16, 0)},
            "auto a model.seq_len of such, not 24",
        ),
    ],
)
def test_settings_that_fp8_can_not_be_are_told(changes, said):
    tree = {"model": shape(seq_len=16), "engine": EngineConfig(name="fsdp"), "train": TrainConfig(precision="fp8")}
    problems = validate(Config(data=DataConfig(source="x"), **{**tree, **changes}), 1)
    assert len(problems) == bool(said) and said in "".join(problems)


def trained(config, fp8):
    """(losses, states) of ten steps in bf16, or with its products as rounded to fp8."""
    model = skeleton(config)
    if fp8:
        assert convert(model, emulate=True) == len(INSIDE) * (config.n_layer - 2)
    engine = NativeEngine(model, OptimConfig(), EngineConfig(name="single"), "fp8" if fp8 else "bf16", CPU, 1)
    engine.initialise(first_weights(config, 0))
    tokens = torch.randint(40, (8, 17), generator=torch.Generator().manual_seed(1))
    losses = [float(engine.train_step(tokens.split(4), 1e-2).loss) for _ in range(10)]
    return losses, copied_states(engine), model


def test_fp8_trains_near_bf16_and_keeps_names_and_masters():
    pytest.importorskip("torchao")
    expected, wanted, plain = trained(shape(), fp8=False)
    losses, states, model = trained(shape(), fp8=True)
    assert losses != expected  # it does round
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses[-1] < losses[0] - 0.3
    assert list(states) == list(wanted)  # canonical names
    assert all(tensor.dtype == torch.float32 for state in states.values() for tensor in state.values())
    assert list(model.state_dict()) == list(plain.state_dict())
    types = {name: type(layer).__name__ for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert types["head"] == types["blocks.0.mlp.up"] == types["blocks.3.mlp.up"] == "Linear"
    assert types["blocks.1.mlp.up"] == types["blocks.2.attn.qkv"] == "Float8Linear"


def test_a_checkpoint_of_bf16_goes_on_in_fp8():
    pytest.importorskip("torchao")
    _, states, _ = trained(shape(), fp8=False)
    model = skeleton(shape())
    convert(model, emulate=True)
    engine = NativeEngine(model, OptimConfig(), EngineConfig(name="single"), "fp8", CPU, 1)
    before = copy.deepcopy(states)
    engine.load(states.__getitem__, engine.state())
    after = copied_states(engine)
    assert all(after[name][key].equal(before[name][key]) for name in before for key in before[name])
