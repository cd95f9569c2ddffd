"""What is shipped in configs/ can't rot: each file parses, validates and says what the documentation says of it."""

from __future__ import annotations

import pytest

from pretrain.arguments import ROOT, parse

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_the_two_main_configs_are_shipped():
    assert {"test", "production"} <= set(NAMES)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_is_valid(name, world_size):
    assert parse(["--config", name, "--data", "gs://bucket/data"], world_size).config_name == name


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_production_is_what_it_says(world_size):
    config = parse(["--config", "production", "--data", "gs://bucket/data"], world_size).config
    assert config.model.n_parameters == 1_315_723_264
    assert config.total_steps(windows_per_epoch=0) == 83_923
    assert (config.model.seq_len, config.model.dropout, config.model.activation_checkpointing) == (2048, 0.1, "full")
    assert (config.batch.global_size, config.batch.micro_size) == (128, 8)
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (6e-4, (0.9, 0.95), 0.1)
    assert (config.optim.schedule, config.optim.min_lr_ratio, config.optim.warmup_steps) == ("cosine", 0.1, 2000)
    assert (config.optim.clip, config.train.precision, config.checkpoint.every_files) == (1.0, "fp16", 5)


def test_the_demo_model_is_small_enough_for_a_laptop():
    config = parse(["--config", "test", "--data", "demo"]).config
    assert 10_000_000 <= config.model.n_parameters <= 15_000_000
    assert config.engine.name == "deepspeed" and config.checkpoint.every_files == 5
