from __future__ import annotations

import dataclasses

import pytest
import torch

from pretrain import memory
from pretrain.config import BatchConfig, OptimConfig
from pretrain.engine import reduction
from pretrain.engine.native import NativeEngine
from pretrain.memory import Setup, Sharding
from pretrain.memory_count import count_peak, measure_peak
from pretrain.model_config import ModelConfig

TOLERANCE = 0.02  # promised are 7 %


def setup_of(size: str = "125M", micro: int = 4, steps: int = 1, precision: str = "bf16", **shape) -> Setup:
    return Setup(ModelConfig(size=size, **shape).resolve(), precision, BatchConfig(micro * steps, micro))


def documents(size: str, micro: int, **shape) -> Setup:
    return dataclasses.replace(setup_of(size, micro, **shape), document_mask=True)


def zero(stage: int, world_size: int, micro: int = 4, steps: int = 1, **shape) -> Setup:
    batch = BatchConfig(micro * steps * world_size, micro)
    sharding = Sharding("deepspeed", stage, 500_000_000, 2)
    return Setup(ModelConfig(**shape).resolve(), "bf16", batch, world_size, sharding)


# The shapes of the sizes with fewer blocks: a block more is the same again, and the tracker needs seconds for each.
COUNTED = {
    "125M fp32": setup_of("125M", 4, precision="fp32", n_layer=4, seq_len=1024, dropout=0.0),
    "125M bf16, accumulating": setup_of("125M", 2, steps=2, n_layer=3, seq_len=1024),
    "350M bf16, recomputing": setup_of("350M", 8, n_layer=4, seq_len=1024, activation_checkpointing="full"),
    "760M bf16": setup_of("760M", 2, n_layer=4),
    "760M fp32, recomputing": setup_of("760M", 4, precision="fp32", n_layer=3, activation_checkpointing="full"),
    "odd bf16": setup_of("custom", 30, n_layer=5, n_head=5, d_model=320, d_ff=1111, vocab_size=100, seq_len=300),
    # the fullest moment is not the loss: a block, the embedding, the gradients' way to the masters
    "odd, recomputing": setup_of(
        "custom",
        30,
        n_layer=5,
        n_head=5,
        d_model=320,
        d_ff=1111,
        vocab_size=100,
        seq_len=300,
        activation_checkpointing="full",
    ),
    "wide vocabulary fp32": setup_of(
        "custom", 2, precision="fp32", n_layer=2, n_head=5, d_model=320, vocab_size=20_000, seq_len=30
    ),
    "deep and short": setup_of("custom", 2, n_layer=8, n_head=5, d_model=320, vocab_size=1000, seq_len=30),
    "llama bf16": setup_of("medium", 4, n_layer=3, seq_len=1024, dropout=0.0),
    "llama fp32, grouped": setup_of("large", 2, precision="fp32", n_layer=3, n_kv_head=4, seq_len=512, vocab_size=512),
    "neox bf16": setup_of("350M", 4, family="neox", n_layer=4, seq_len=512, vocab_size=1000),
    "qwen3 bf16": setup_of("medium", 8, family="qwen3", n_layer=4, seq_len=512, vocab_size=1000),
    "opt fp32": setup_of("350M", 4, family="opt", precision="fp32", n_layer=4, seq_len=512, vocab_size=1000),
    "gpt, selective": setup_of(
        "350M", 8, n_layer=6, seq_len=512, vocab_size=1000, activation_checkpointing="selective"
    ),
    "llama, selective": setup_of("medium", 8, n_layer=6, vocab_size=1000, activation_checkpointing="selective"),
    "chunked loss": setup_of("125M", 8, n_layer=3, seq_len=1024, loss_chunks=8),
    "chunked loss, untied fp32": setup_of("small", 4, precision="fp32", n_layer=2, seq_len=1024, loss_chunks=64),
    "plain attention": setup_of("350M", 2, n_layer=2, seq_len=1024, attention="plain"),
    "z-loss and soft-cap": setup_of("125M", 8, n_layer=2, seq_len=1024, z_loss=1e-4, logit_softcap=30.0),
    "z-loss fp32": setup_of("125M", 4, precision="fp32", n_layer=2, seq_len=1024, z_loss=1e-4, dropout=0.0),
    "documents": documents("125M", 8, n_layer=2, seq_len=1024, vocab_size=1000),
    "documents, grouped": documents("large", 4, n_layer=3, n_kv_head=4, seq_len=1024, vocab_size=512),
    "documents, normed and grouped": documents(
        "medium", 4, family="qwen3", n_layer=2, n_kv_head=4, seq_len=1024, vocab_size=512
    ),
    "documents, plain": documents("350M", 2, n_layer=2, seq_len=1024, attention="plain"),
}


@pytest.mark.parametrize("setup", COUNTED.values(), ids=COUNTED.keys())
def test_the_predicted_peak_is_what_torch_counts(setup):
    assert memory.peak(setup).total == pytest.approx(count_peak(setup), rel=TOLERANCE)


@pytest.mark.parametrize("shape", [{"micro": 8, "seq_len": 512}, {"micro": 1, "seq_len": 32}], ids=["loss", "update"])
def test_the_predicted_peak_under_muon_is_what_torch_counts(shape):
    setup = setup_of("medium", n_layer=3, vocab_size=1000, dropout=0.0, **shape)
    under_muon = dataclasses.replace(setup, optim=OptimConfig(name="muon"))
    assert memory.peak(under_muon).total == pytest.approx(count_peak(under_muon), rel=TOLERANCE)
    assert memory.peak(under_muon).moments < memory.peak(setup).moments


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", ["none", "full"])
@pytest.mark.parametrize("size", ["125M", "350M", "760M"])
def test_the_predicted_peak_of_whole_models_is_what_torch_counts(size, recomputes):
    setup = setup_of(size, 4, seq_len=1024, activation_checkpointing=recomputes)
    assert memory.peak(setup).total == pytest.approx(count_peak(setup), rel=TOLERANCE)


def test_the_counted_cases_cover_every_moment_of_the_native_engine():
    moments = {memory.peak(setup).when for setup in COUNTED.values()}
    others = {"the all-reduce"}  # never the fullest of one rank
    every = {moment.when for moment in memory.timeline(COUNTED["odd bf16"])}
    assert moments == every - others


@pytest.mark.parametrize("size", ["125M", "1.2B", "8B", "medium"])
def test_parameter_sizes_add_up_to_the_exact_count_and_the_padding(size):
    model = ModelConfig(size=size).resolve()
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model * (1 if model.tie_embeddings else 2)
    assert sum(memory.parameter_sizes(model)) == model.n_parameters + padding


def test_weights_optimizer_state_and_gradients_take_18_bytes_a_parameter_in_mixed_precision():
    setup = setup_of("1.2B", 1, seq_len=64)
    size = sum(memory.parameter_sizes(setup.model))
    reduction = next(moment for moment in memory.timeline(setup) if moment.when == "the all-reduce")
    assert reduction.weights + reduction.masters + reduction.moments + reduction.gradients == 18 * size


def test_zero_divides_optimizer_state_and_stage_2_the_gradients():
    size = sum(memory.parameter_sizes(ModelConfig().resolve()))
    last = {}
    for stage in (1, 2):
        moments = list(memory.timeline(zero(stage, 8)))
        assert {moment.masters for moment in moments} == {4 * size // 8}
        assert {moment.moments for moment in moments} == {8 * size // 8}
        assert {moment.weights for moment in moments} == {2 * size}
        last[stage] = next(moment for moment in moments if moment.when == "the embedding, backward")
    # two bytes a gradient: stage 1 has all of them, stage 2 an eighth
    assert last[1].gradients - last[2].gradients == pytest.approx(2 * size * 7 / 8, rel=0.1)


def test_deepspeeds_buckets_are_counted_while_gradients_flow_and_not_at_the_loss():
    moments = {moment.when: moment for moment in memory.timeline(zero(2, 8))}
    assert moments["the loss, backward"].communication == 0
    assert moments["the last block, backward"].communication == 2 * (2 * 500_000_000 + 500_000_000)
    alone = {moment.when: moment for moment in memory.timeline(zero(2, 1))}
    assert alone["the last block, backward"].communication == 2 * 2 * 500_000_000


def test_zero_settings_are_those_of_the_file():
    settings = {"zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 1000}}
    assert Sharding.of_deepspeed(settings) == Sharding("deepspeed", 1, 1000, 1)
    assert (
        Sharding.of_deepspeed({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}).bucket_elements == 0
    )


def test_the_native_engines_messages_are_as_large_as_it_makes_them():
    assert (memory.NATIVE_MESSAGE_ELEMENTS, memory.MESSAGES) == (reduction.BUCKET_ELEMENTS, reduction.MESSAGES)
    full = memory.NATIVE_MESSAGE_ELEMENTS
    for sizes, largest in (([5, full], full), ([3, 7, full - 1], full + 6), ([2, 1], 3), ([full, 5], full + 5)):
        assert memory._largest_message(sizes) == largest
        made = [sum(sizes[number] for number in bucket.parameters) for bucket in reduction.make_buckets(sizes)]
        assert max(made) == largest and sum(made) == sum(sizes)


def sharded(sharding: Sharding, world_size: int = 8, steps: int = 1, **shape) -> dict[str, memory.Moment]:
    batch = BatchConfig(4 * steps * world_size, 4)
    setup = Setup(ModelConfig(**shape).resolve(), "bf16", batch, world_size, sharding)
    return {moment.when: moment for moment in memory.timeline(setup)}


def test_fsdp_divides_everything_and_gathers_the_ends_and_two_blocks():
    model = ModelConfig().resolve()
    size = sum(memory.parameter_sizes(model))
    block = memory._block_size(model)
    moments = sharded(Sharding("fsdp", 3), steps=2)
    update = moments["the update"]
    assert (update.masters, update.moments, update.gradients) == (4 * size // 8, 8 * size // 8, 4 * size // 8)
    assert update.weights == 2 * (size - (model.n_layer - 2) * block)
    assert moments["the loss, backward"].gradients == 4 * size  # whole ones, of the first micro-batch
    shares = sharded(Sharding("fsdp", 3, keeps_gradients=False), steps=2)
    assert shares["the loss, backward"].gradients == 4 * size // 8
    within = sharded(Sharding("fsdp", 3, ranks=4))["the update"]
    assert within.masters == 2 * update.masters


def test_zero_3_divides_the_weights_and_zero_0_nothing():
    size = sum(memory.parameter_sizes(ModelConfig().resolve()))
    second, third = (sharded(Sharding("deepspeed", stage, 500_000_000, 1)) for stage in (2, 3))
    assert third["the update"].weights < second["the update"].weights / 2
    assert third["the update"].masters == second["the update"].masters
    none = sharded(Sharding("deepspeed", 0))["the update"]
    assert (none.weights, none.masters, none.moments, none.gradients) == (2 * size, 4 * size, 8 * size, 6 * size)


def test_offloading_leaves_no_optimizer_state_on_the_gpu():
    for stage in (1, 2, 3):
        moments = sharded(Sharding("deepspeed", stage, 1000, 1, offload=True)).values()
        assert all(moment.masters == moment.moments == 0 for moment in moments)


def test_ddp_keeps_two_messages_under_way_and_the_masters_gradients():
    size = sum(memory.parameter_sizes(ModelConfig().resolve()))
    moments = sharded(Sharding("ddp"))
    assert "gradients to the masters" not in moments
    message = memory._largest_message(memory.parameter_sizes(ModelConfig().resolve()))
    reduced = moments["the all-reduce"]
    assert (reduced.gradients, reduced.communication) == (4 * size, 2 * 4 * message)


def test_more_never_needs_less():
    setup = zero(2, 4, 2, steps=2)
    larger = [
        setup.with_micro_size(4),
        dataclasses.replace(setup, precision="fp32"),
        dataclasses.replace(setup, model=dataclasses.replace(setup.model, n_layer=25)),
        dataclasses.replace(setup, sharding=dataclasses.replace(setup.sharding, stage=1)),
    ]
    assert all(memory.required_bytes(each) > memory.required_bytes(setup) for each in larger)
    selective, full = setup.with_checkpointing("selective"), setup.with_checkpointing("full")
    assert memory.required_bytes(full) < memory.required_bytes(selective) < memory.required_bytes(setup)
    whole = setup.with_micro_size(8)
    chunked = dataclasses.replace(whole, model=dataclasses.replace(whole.model, loss_chunks=8))
    assert memory.required_bytes(chunked) < memory.required_bytes(whole)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    setup = zero(2, 8, 1, steps=16)
    available = memory.available_bytes(80 * 10**9)
    largest = memory.largest_micro_size(setup, available)
    assert largest in setup.micro_sizes
    assert setup.micro_sizes == [1, 2, 4, 8, 16]
    assert memory.required_bytes(setup.with_micro_size(largest)) <= available
    assert memory.required_bytes(setup.with_micro_size(2 * largest)) > available
    assert memory.largest_micro_size(setup, 10**9) == 0


def test_a_gpus_allocator_is_asked_for_the_peak_of_steps_and_not_of_building(monkeypatch):
    """There is no GPU here: the engine runs on the CPU, and the allocator is played."""
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append("peak") or 12345)
    step = NativeEngine.train_step
    monkeypatch.setattr(NativeEngine, "train_step", lambda *words: asked.append("step") or step(*words))
    setup = setup_of("custom", 2, steps=2, n_layer=1, n_head=2, d_model=16, vocab_size=30, seq_len=8)
    assert measure_peak(setup, torch.device("cpu")) == 12345
    assert asked == ["reset", "step", "step", "peak"]
