from __future__ import annotations

import dataclasses

import pytest

from pretrain.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    profile_steps,
)
from pretrain.config_checks import validate
from pretrain.model_config import FAMILIES, MODEL_SIZES, ModelConfig

COUNTS = {
    "125M": 125_226_240,
    "350M": 355_871_744,
    "760M": 760_300_032,
    "1.2B": 1_315_723_264,
    "1.3B": 1_315_723_264,
    "3B": 2_651_553_280,
    "7B": 6_658_404_352,
    "8B": 7_463_923_712,
}


def make(**sections) -> Config:
    """A valid config, with whole sections replaced."""
    base = Config(model=ModelConfig(size="125M").resolve(), data=DataConfig(source="gs://bucket/data"))
    return dataclasses.replace(base, **sections)


def test_every_size_of_the_gpt_family_has_its_exact_count():
    sizes = [size for size, shape in MODEL_SIZES.items() if shape.family == "gpt"]
    assert {size: ModelConfig(size=size).resolve().n_parameters for size in sizes} == COUNTS


def test_a_size_names_its_family_and_a_family_its_options():
    assert ModelConfig(size="medium").resolve().family == "llama"
    assert ModelConfig(size="125M").resolve().family == "gpt"
    medium = ModelConfig(size="medium").resolve()
    assert (medium.n_kv_head, medium.d_ff, medium.head_dim, medium.norm, medium.bias) == (8, 2816, 64, "rmsnorm", False)
    neox = ModelConfig(family="neox", size="1.2B").resolve()
    assert (neox.n_layer, neox.d_model, neox.n_head, neox.d_ff) == (24, 2048, 16, 8192)
    assert (neox.rotary_pct, neox.rotary_dim, neox.parallel_residual, neox.tie_embeddings) == (0.25, 32, True, False)
    assert ModelConfig(family="qwen3").resolve().qk_norm and ModelConfig(family="opt").resolve().activation == "relu"


def test_a_given_option_wins_over_its_family_and_false_is_given():
    model = ModelConfig(family="gpt", bias=False, tie_embeddings=False, norm="rmsnorm", rotary_pct=0.5).resolve()
    assert (model.bias, model.tie_embeddings, model.norm, model.rotary_pct) == (False, False, "rmsnorm", 0.5)
    assert model.position == "learned" and model.qk_norm is False


def test_resolving_twice_changes_nothing():
    for family in FAMILIES:
        model = ModelConfig(family=family, size="350M").resolve()
        assert model.resolve() == model


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_head": 5}, "d_model 768 is not divisible by model.n_head 5"),
        ({"n_kv_head": 5}, "n_head 12 is not divisible by model.n_kv_head 5"),
        ({"family": "neox", "rotary_pct": 0.03}, "rotates 1 numbers"),
        ({"rotary_pct": 0.25}, "means nothing with learned positions"),
        ({"family": "llama", "rotary_pct": 1.5}, "must be in (0, 1]"),
        ({"rope_theta": 5e5}, "rope_theta 500000.0 means nothing with learned positions"),
        ({"family": "llama", "rope_theta": 0.5}, "rope_theta 0.5 must be above 1"),
        ({"loss_chunks": 0}, "loss_chunks 0 must be at least 1"),
        ({"norm_eps": -1.0}, "norm_eps -1.0 must not be negative"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(fields, words):
    (problem,) = validate(make(model=ModelConfig(size="125M", **fields).resolve()), world_size=1)
    assert words in problem


def test_a_field_overrides_its_part_of_the_size():
    model = ModelConfig(size="125M", n_layer=2, d_ff=100).resolve()
    assert (model.n_layer, model.n_head, model.d_model, model.d_ff) == (2, 12, 768, 100)
    assert ModelConfig(size="125M", d_model=96).resolve().d_ff == 384


@pytest.mark.parametrize(("vocab_size", "padded"), [(50257, 50304), (128, 128), (129, 256), (8192, 8192)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert ModelConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_22_billion_tokens_are_83923_steps():
    config = make(
        model=ModelConfig().resolve(),
        batch=BatchConfig(global_size=128),
        train=TrainConfig(max_tokens=22_000_000_000),
    )
    assert config.tokens_per_step == 262_144
    assert config.total_steps(windows_per_epoch=1) == 83_923


def test_steps_win_over_tokens_and_tokens_over_epochs():
    batch = BatchConfig(global_size=4)
    both = make(batch=batch, train=TrainConfig(max_steps=7, max_tokens=10**9))
    assert both.total_steps(100) == 7
    epochs = make(batch=batch, train=TrainConfig(epochs=1.5))
    assert epochs.total_steps(100) == 38  # 150 windows; what the last step lacks comes from the next pass


def test_accumulation_is_derived():
    assert BatchConfig(global_size=128, micro_size=8).accumulation(world_size=8) == 2


def test_a_sound_config_has_no_problems():
    assert validate(make(), world_size=8) == []


def test_every_problem_is_reported_at_once():
    broken = make(
        run=RunConfig(name="a/b"),
        model=ModelConfig(size="125M", n_head=7).resolve(),
        data=DataConfig(),
        optim=OptimConfig(lr=-1.0, betas=(0.9, 1.0)),
    )
    problems = validate(broken, world_size=3)
    expected = ["n_head 7", "× 3 ranks", "data.source is empty", "optim.lr", "optim.betas", "run.name"]
    assert len(problems) == len(expected)
    assert all(any(word in problem for problem in problems) for word in expected)


@pytest.mark.parametrize(
    ("optim", "engine", "words"),
    [
        ({"name": "muon"}, "deepspeed", "which engine.name deepspeed does not train with"),
        ({"name": "muon", "muon_lr": -1.0}, "ddp", "optim.muon_lr -1.0 must be positive"),
        ({"name": "muon", "muon_momentum": 1.0}, "ddp", "optim.muon_momentum 1.0 must be in [0, 1)"),
        ({"muon_lr": 1e-3}, "deepspeed", "optim.muon_lr 0.001 means nothing to adamw"),
        ({"cooldown": "linear"}, "deepspeed", "optim.cooldown linear means nothing to cosine"),
        ({"schedule": "wsd", "cooldown_fraction": 0.0}, "deepspeed", "optim.cooldown_fraction 0.0 must be in (0, 1]"),
    ],
)
def test_an_optimizer_that_cannot_be_is_told(optim, engine, words):
    (problem,) = validate(make(optim=OptimConfig(**optim), engine=EngineConfig(name=engine)), world_size=8)
    assert words in problem
    sound = {"name": "muon", "muon_lr": 1e-2, "schedule": "wsd", "cooldown": "linear"}
    for name in ("single", "native", "ddp", "fsdp"):
        assert validate(make(optim=OptimConfig(**sound), engine=EngineConfig(name=name)), world_size=8) == []


@pytest.mark.parametrize("url", ["here", "./here/", "elsewhere/../here", "file://here"])
def test_a_bucket_that_is_the_local_folder_is_refused(url):
    [problem] = validate(make(checkpoint=CheckpointConfig(dir="here", url=url)), world_size=8)
    assert problem.startswith(f"checkpoint.url {url} is checkpoint.dir")
    for other in ("", "gs://here", "here/bucket", "there"):
        assert validate(make(checkpoint=CheckpointConfig(dir="here", url=other)), world_size=8) == []


def test_an_impossible_batch_names_the_micro_batches_that_fit():
    problem = validate(make(batch=BatchConfig(global_size=12, micro_size=8)), world_size=2)
    assert problem == [
        "batch.global_size 12 is not divisible by micro_size 8 × 2 ranks = 16: "
        "set batch.micro_size to one of [1, 2, 3, 6]"
    ]
    nothing_fits = validate(make(batch=BatchConfig(global_size=4, micro_size=1)), world_size=3)
    assert "set batch.global_size to a multiple of the 3 ranks" in nothing_fits[0]


@pytest.mark.parametrize("model", [ModelConfig(size="2B"), ModelConfig(size="custom", n_layer=2)])
def test_an_unknown_size_names_the_known_ones(model):
    (problem,) = validate(make(model=model.resolve()), world_size=1)
    assert "125M" in problem and "custom" in problem


@pytest.mark.parametrize("fields", [{"n_head": -1}, {"n_layer": -2}, {"d_model": -768}])
def test_negative_sizes_are_refused(fields):
    assert validate(make(model=ModelConfig(size="125M", **fields).resolve()), world_size=1)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "vocab_size", 1),
        ("model", "seq_len", 0),
        ("model", "dropout", 1.0),
        ("data", "max_files", -1),
        ("data", "shuffle_shards", 0),
        ("data", "download_workers", 0),
        ("data", "raw_shard_tokens", 0),
        ("batch", "micro_size", -1),
        ("optim", "min_lr_ratio", 1.5),
        ("optim", "warmup_steps", -1),
        ("optim", "weight_decay", -0.1),
        ("optim", "clip", -1.0),
        ("train", "max_steps", -1),
        ("train", "epochs", 0.0),
        ("train", "eval_interval", -1),
        ("train", "eval_sequences", 0),
        ("train", "max_skipped", 0),
        ("train", "timeout_minutes", 0),
        ("train", "max_rollbacks", -1),
        ("train", "spike_threshold", -1.0),
        ("train", "spike_window", 7),
        ("train", "hang_timeout_s", -1.0),
        ("engine", "initial_loss_scale", 0.5),
        ("engine", "loss_scale_window", 0),
        ("checkpoint", "every_files", -1),
        ("checkpoint", "every_steps", -1),
        ("checkpoint", "keep", -1),
        ("checkpoint", "max_waiting", 0),
        ("log", "sample_tokens", 0),
        ("storage", "deadline_s", 0.0),
        ("storage", "timeout_s", 0.0),
        ("storage", "upload_workers", 0),
        ("log", "interval", 0),
        ("run", "name", ".hidden"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(section, field, value):
    config = make()
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})
    problems = validate(config, world_size=1)
    assert len(problems) == 1 and f"{field}" in problems[0]


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"budget_hours": -1.0}, "train.budget_hours is -1"),
        ({"budget_usd": -1.0}, "train.budget_usd is -1"),
        ({"price_per_gpu_hour": -2.0}, "train.price_per_gpu_hour is -2"),
        ({"budget_usd": 10.0}, "train.price_per_gpu_hour is not: give --price_per_gpu_hour"),
    ],
)
def test_a_budget_must_be_positive_and_have_a_price(train, problem):
    (found,) = validate(make(train=TrainConfig(**train)), world_size=1)
    assert problem in found
    sound = TrainConfig(budget_hours=1.0, budget_usd=10.0, price_per_gpu_hour=2.5)
    assert validate(make(train=sound), world_size=1) == []


@pytest.mark.parametrize("text", ["5", "5:", ":5", "a:b", "0:3", "7:6", "-1:4", "1.5:2", "1:2:3", "1:500"])
def test_a_profile_is_start_to_stop(text):
    with pytest.raises(ValueError, match=r"log\.profile"):
        profile_steps(text)
    (found,) = validate(make(log=LogConfig(profile=text)), world_size=1)
    assert "log.profile" in found


def test_the_steps_of_a_profile_are_both_included_and_need_telemetry():
    assert list(profile_steps("10:12")) == [10, 11, 12] and list(profile_steps("3:3")) == [3]
    assert not profile_steps("")
    assert validate(make(log=LogConfig(profile="1:2", telemetry=False)), world_size=1) == [
        "log.profile needs log.telemetry"
    ]


def test_causal_mfu_counts_half_of_the_attention():
    model = ModelConfig(size="1.2B").resolve()
    attention = 12.0 * model.n_layer * model.n_head * model.head_dim * model.seq_len
    assert model.flops_per_token - model.causal_flops_per_token == attention / 2


def test_raw_text_that_is_prepared_ahead_needs_a_number_of_steps():
    raw = {"source": "c4", "tokenizer": "tokenizer.json"}
    (problem,) = validate(make(data=DataConfig(**raw), train=TrainConfig()), world_size=1)
    assert "give --max-tokens or --max-steps" in problem and "--data.raw_ahead false" in problem
    for data, train in ((raw, {"max_steps": 9}), (raw, {"max_tokens": 9}), ({**raw, "raw_ahead": False}, {})):
        assert validate(make(data=DataConfig(**data), train=TrainConfig(**train)), world_size=1) == []
