"""Muon against an implementation of its own, and what it remembers through engines and checkpoints."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist

from model import GPT
from pretrain.checkpoint import CheckpointReader, write_manifest, write_parts
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.config import EngineConfig, OptimConfig
from pretrain.engine.base import EngineState
from pretrain.engine.fsdp import FsdpEngine
from pretrain.engine.native import NativeEngine
from pretrain.errors import CheckpointError, ConfigError
from pretrain.model_config import ModelConfig
from pretrain.optim import build_optimizer, moments, set_learning_rate
from pretrain.ranks import Ranks
from pretrain.snapshot import take_snapshot
from tests.helpers_training import copied_states, differing, reader_of, run_ranks, single_rank

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    size="custom", family="llama", n_layer=2, n_head=2, d_model=32, vocab_size=61, seq_len=16, dropout=0.1
).resolve()
MUON = OptimConfig(name="muon", lr=1e-2, muon_lr=3e-2, clip=0.5, warmup_steps=0)


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with single_rank() as only:
        yield only


def engine_of(kind: str, optim: OptimConfig = MUON, seed: int = 0):
    torch.manual_seed(seed)
    model = GPT(SHAPE, "sdpa")
    if kind == "fsdp":
        return FsdpEngine(model, optim, EngineConfig(), "fp32", CPU, Ranks(0, 1, 0, 1, dist.group.WORLD))
    return NativeEngine(model, optim, EngineConfig(name=kind), "fp32", CPU, 1)


def train(engine, steps):
    losses = []
    for step in steps:
        torch.manual_seed(step)
        tokens = torch.randint(SHAPE.vocab_size, (4, SHAPE.seq_len + 1))
        losses.append(float(engine.train_step(tokens.split(2), 1e-2 / (step + 1)).loss))
    return losses


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz by the polynomial itself, five times, on the singular values: aX + b(XX')X + c(XX')²X, in fp64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_steps_are_those_of_an_implementation_of_its_own(shape):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    config = dataclasses.replace(MUON, muon_lr=0.0, weight_decay=0.1)
    named = [("blocks.0.mlp.up.weight", weight), ("ln_f.weight", torch.nn.Parameter(torch.ones(4)))]
    optimizer = build_optimizer(named, config)
    expected, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for lr in (0.5, 0.2, 0.1):
        set_learning_rate(optimizer, lr)
        gradient = torch.randn(shape, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        update = orthogonal(0.05 * gradient.double() + 0.95 * momentum)
        expected = expected * (1 - lr * 0.1) - lr * 0.2 * math.sqrt(max(shape)) * update
        moved, wanted = weight.detach().double() - start, expected - start
        assert (moved - wanted).norm() < 0.02 * wanted.norm()  # torch's runs in bf16
        assert torch.allclose(moments(optimizer.state[weight])["momentum_buffer"].double(), momentum, atol=1e-6)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    states = copied_states(engine_of("single"))
    under_muon = {name for name, state in states.items() if set(state) == {"weight", "momentum_buffer"}}
    others = {name for name, state in states.items() if set(state) == {"weight", "exp_avg", "exp_avg_sq"}}
    assert under_muon == {name for name in states if name.startswith("blocks.") and "ln_" not in name}
    assert others == {"tok_emb.weight", "head.weight", "ln_f.weight"} | {n for n in states if ".ln_" in n}


def test_muon_has_a_learning_rate_of_its_own_in_proportion():
    engine = engine_of("single")
    train(engine, range(1))
    rates = {round(group["lr"], 6) for group in engine._optimizer.param_groups}
    assert rates == {0.01, 0.03}
    groups = engine_of("single", dataclasses.replace(MUON, muon_lr=0.0))._optimizer.param_groups
    assert {group.get("lr_ratio", 1.0) for group in groups} == {1.0}


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_a_resume_with_muon_repeats_the_run_to_the_last_bit(kind):
    engine = engine_of(kind)
    first = train(engine, range(4))
    saved, state = copied_states(engine), engine.state()
    other = engine_of(kind, seed=7)
    other.load(reader_of(saved), state)
    assert differing(saved, copied_states(other)) == []
    assert train(other, range(4, 7)) == train(engine, range(4, 7))
    assert differing(copied_states(engine), copied_states(other)) == []
    assert first[0] != first[-1]


def test_fsdp_steps_as_the_native_engine_does():
    native, fsdp = engine_of("single"), engine_of("fsdp")
    assert train(fsdp, range(4)) == pytest.approx(train(native, range(4)), abs=1e-5)
    states, others = copied_states(native), copied_states(fsdp)
    assert all(torch.allclose(states[n][key], others[n][key], atol=1e-4) for n in states for key in states[n])


SEVERAL_RANKS = """
    from model import GPT
    from pretrain.config import BatchConfig, EngineConfig, OptimConfig
    from pretrain.engine.build import build_engine
    from pretrain.engine.native import NativeEngine
    from pretrain.model_config import ModelConfig

    cpu, optim = torch.device("cpu"), OptimConfig(name="muon", lr=1e-2, clip=0.5, warmup_steps=0)
    # widths that four and two ranks can't divide evenly
    shape = ModelConfig(size="custom", family="llama", n_layer=2, n_head=2, d_model=36, d_ff=70, vocab_size=61,
                        seq_len=16, dropout=0.0).resolve()

    def losses_of(engine, rank, ranks):
        found = []
        for step in range(4):
            torch.manual_seed(step)
            share = torch.randint(61, (8, 17)).chunk(ranks)[rank]
            found.append(float(engine.train_step(share.split(1), 1e-2).loss))
        return found

    def model():
        torch.manual_seed(0)
        return GPT(shape, "sdpa")

    results = {"single": losses_of(NativeEngine(model(), optim, EngineConfig(name="single"), "fp32", cpu, 1), 0, 1)}
    for title, fields in (("ddp", {"name": "ddp"}), ("fsdp", {"name": "fsdp"}),
                          ("hybrid", {"name": "fsdp", "fsdp_shard": "hybrid"})):
        engine = build_engine(model(), EngineConfig(**fields), optim, BatchConfig(8, 1), "fp32", cpu, me)
        results[title] = [me.mean(loss) for loss in losses_of(engine, me.rank, 4)]
    print(json.dumps(results))
"""


@pytest.mark.slow
def test_several_ranks_train_under_muon_as_one_does():
    for results in run_ranks(SEVERAL_RANKS, 4, nodes=2):
        for title in ("ddp", "fsdp", "hybrid"):
            assert results[title] == pytest.approx(results["single"], abs=1e-3)  # the iteration rounds to bf16


def checkpoint_of(engine, folder) -> CheckpointReader:
    name = CheckpointName(0, 1, 1)
    path = folder / str(name)
    path.mkdir(parents=True)
    manifest = Manifest(name, "attempt1", 1, write_parts(take_snapshot(engine.parameter_states(), 0, 1), path, 0, 1))
    write_manifest(manifest, path)
    return CheckpointReader(path, manifest)


def test_a_checkpoint_carries_the_momentum_and_is_refused_by_another_optimizer(tmp_path):
    engine = engine_of("single")
    train(engine, range(2))
    reader = checkpoint_of(engine, tmp_path / "muon")
    other = engine_of("ddp", seed=7)
    other.load(reader.parameter_state, EngineState(2))
    assert differing(copied_states(engine), copied_states(other)) == []
    reader.check_optimizer("muon")
    with pytest.raises(CheckpointError, match=r"was written by optimizer muon, and optim\.name is adamw") as caught:
        reader.check_optimizer("adamw")
    assert "--optim.name muon" in caught.value.line() and "\n" not in caught.value.line()
    plain = checkpoint_of(engine_of("single", OptimConfig()), tmp_path / "adamw")
    plain.check_optimizer("adamw")
    with pytest.raises(CheckpointError, match=r"was written by optimizer adamw, and optim\.name is muon"):
        plain.check_optimizer("muon")


def test_a_torch_without_muon_is_told_in_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"which torch .* does not have"):
        engine_of("single")
    engine_of("single", OptimConfig())
