"""The trial runs on a CPU here, and what a full GPU raises is injected: there is no GPU in these tests."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml

from model import GPT
from pretrain import host_memory, memory, micro_batch
from pretrain.arguments import parse, to_yaml
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine.native import NativeEngine
from pretrain.errors import ConfigError
from pretrain.memory import Setup, Sharding
from pretrain.model_config import ModelConfig
from pretrain.ranks import Ranks
from scripts import plan as plan_script

CPU = torch.device("cpu")
SHAPE = ModelConfig(size="custom", n_layer=2, n_head=2, d_model=32, vocab_size=100, seq_len=16, dropout=0.1).resolve()


def setup_of(global_size: int = 48, world_size: int = 1, model: ModelConfig = SHAPE) -> Setup:
    return Setup(model, "fp32", BatchConfig(global_size, 1), world_size)


class OthersThatFit(Ranks):
    """Ranks of which this one is the first, and the others have room up to `room` sequences."""

    def __init__(self, room: int = 10**9) -> None:
        super().__init__(0, 2, 0, 2, control=None)
        vars(self).update(room=room, tried=0)

    def any(self, flag: bool) -> bool:
        return flag or vars(self)["tried"] > vars(self)["room"]

    def exchange(self, message, group=None):
        return [message, {"micro_size": min(message["micro_size"], vars(self)["room"])}]


def tried(sizes: list[int], room: int, ranks: OthersThatFit):
    def fit(setup: Setup) -> bool:
        vars(ranks)["tried"] = setup.batch.micro_size
        sizes.append(setup.batch.micro_size)
        return setup.batch.micro_size <= room

    return fit


def test_auto_is_written_as_auto_and_as_a_number_once_it_is_chosen(tmp_path):
    config = parse(["--data", "x", "--batch.micro_size", "auto", "--batch.global_size", "12"], world_size=3).config
    assert config.batch.is_auto and config.batch.settled.micro_size == 1
    path = tmp_path / "auto.yaml"
    path.write_text(to_yaml(config))
    assert yaml.safe_load(path.read_text())["batch"]["micro_size"] == "auto"
    assert parse(["--config", str(path)], world_size=3).config == config
    chosen = dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_size=4))
    assert yaml.safe_load(to_yaml(chosen))["batch"]["micro_size"] == 4


def test_a_global_batch_that_the_ranks_cannot_share_is_refused_all_the_same():
    with pytest.raises(ConfigError, match="multiple of the 5 ranks"):
        parse(["--data", "x", "--batch.micro_size", "auto", "--batch.global_size", "12"], world_size=5)
    with pytest.raises(ConfigError, match="expected int"):
        parse(["--data", "x", "--batch.micro_size", "automatic"])
    with pytest.raises(ConfigError, match="at least 1"):
        parse(["--data", "x", "--batch.micro_size", "-1"])


def test_sizes_are_tried_downwards_until_every_rank_has_room():
    for mine, theirs, expected, asked in ((10, 10**9, 8, [24, 16, 12, 8]), (48, 5, 4, [24, 16, 12, 8, 6, 4])):
        sizes: list[int] = []
        ranks = OthersThatFit(theirs)
        assert micro_batch.back_off(setup_of(), 24, tried(sizes, mine, ranks), ranks) == expected
        assert sizes == asked


def test_where_nothing_fits_the_error_says_what_would_help():
    ranks = OthersThatFit()
    with pytest.raises(ConfigError, match="not even one sequence fits") as error:
        micro_batch.back_off(setup_of(), 4, tried([], 0, ranks), ranks)
    assert error.value.shared and "--model.activation_checkpointing full" in error.value.mend


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_trial_that_runs_out_of_memory_is_told_from_one_that_has_room(monkeypatch, full):
    assert micro_batch.fits(setup_of(), CPU)
    forward = GPT.forward

    def full_above_two(self, tokens, targets=None):
        if len(tokens) > 2:
            raise full
        return forward(self, tokens, targets)

    monkeypatch.setattr(GPT, "forward", full_above_two)
    ranks = OthersThatFit()
    size = micro_batch.back_off(setup_of(8), 8, lambda each: micro_batch.fits(each, CPU), ranks)
    assert size == 2


def test_an_error_that_is_none_of_memory_is_no_verdict(monkeypatch):
    def broken(self, tokens, targets=None):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        micro_batch.fits(setup_of(), CPU)


def losses_after(trial: bool) -> tuple[list[float], list[torch.Tensor]]:
    """A few steps with dropout of a model that is seeded as train.py seeds it; with a trial before the first."""
    torch.manual_seed(7)
    if trial:
        assert micro_batch.fits(setup_of(8).with_micro_size(4), CPU)
    engine = NativeEngine(GPT(SHAPE, "sdpa"), OptimConfig(), EngineConfig(name="native"), "fp32", CPU, 1)
    losses = []
    for _ in range(3):
        tokens = torch.randint(100, (8, 17))
        losses.append(float(engine.train_step(tokens.split(4), 1e-3).loss))
    return losses, [state["weight"].clone() for _, state in engine.parameter_states()]


def test_a_trial_leaves_no_trace_in_weights_and_random_state():
    (plain, weights), (tried_first, others) = losses_after(False), losses_after(True)
    assert plain == tried_first
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_on_a_cpu_the_hosts_memory_and_the_tokens_of_a_pass_decide(monkeypatch):
    large = ModelConfig(size="125M", seq_len=1024).resolve()
    setup = setup_of(64, 2, large)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 10**13)
    assert micro_batch.planned_on_cpu(setup, 2) == micro_batch.MOST_CPU_TOKENS // 1024
    assert micro_batch.planned_on_cpu(setup_of(12), 1) == 12
    needed = host_memory.host_bytes(setup.with_micro_size(4), 1, "cpu")
    monkeypatch.setattr(host_memory, "free_bytes", lambda: int(2 * needed / (1 - memory.RESERVE)) + 100)
    assert micro_batch.planned_on_cpu(setup, 2) == 4
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 10**9)
    assert micro_batch.planned_on_cpu(setup, 2) == 0
    assert micro_batch.choose_micro_size(setup, CPU, OthersThatFit()) == 1


def test_on_gpus_the_plan_comes_first_and_the_trial_begins_there(monkeypatch):
    setup = Setup(ModelConfig().resolve(), "bf16", BatchConfig(128, 1), 2, Sharding("deepspeed", 2, 500_000_000, 2))
    planned = memory.largest_micro_size(setup, memory.available_bytes(80 * 10**9))
    properties = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sizes: list[int] = []
    ranks = OthersThatFit()
    fit = tried(sizes, planned - 1, ranks)
    monkeypatch.setattr(micro_batch, "fits", lambda each, device: fit(each))
    chosen = micro_batch.choose_micro_size(setup, torch.device("cuda", 0), ranks)
    assert sizes == [planned, chosen] and planned == 2 * chosen
    properties.total_memory = 10**9  # not even one: check_memory refuses it, or --force goes on
    sizes.clear()
    assert micro_batch.choose_micro_size(setup, torch.device("cuda", 0), ranks) == 1
    assert sizes == []


def test_the_ballast_is_what_the_engine_holds_while_activations_are_at_their_most():
    setup = Setup(ModelConfig().resolve(), "bf16", BatchConfig(8, 8), 1, Sharding("deepspeed", 1, 1000, 1))
    size = sum(memory.parameter_sizes(setup.model))
    assert micro_batch.ballast_bytes(setup) == 12 * size
    divided = dataclasses.replace(setup, world_size=2, sharding=Sharding("fsdp", 3))
    assert 0 < micro_batch.ballast_bytes(divided) < 12 * size // 2
    assert micro_batch.ballast_bytes(dataclasses.replace(divided, world_size=8)) == 0


def test_the_plan_takes_the_largest_that_fits(capsys):
    words = ["--model", "1.2B", "--tokens", "22B", "--json", "--micro_batch_size"]
    assert plan_script.main([*words, "auto"]) == 0
    automatic = capsys.readouterr().out
    assert plan_script.main([*words, "16"]) == 0
    assert automatic == capsys.readouterr().out
