from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pretrain.arguments import parse
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine.ds_settings import SHIPPED, deepspeed_settings
from tests.helpers_training import ROOT

OPTIM, BATCH = OptimConfig(clip=1.0), BatchConfig(global_size=32, micro_size=4)


def settings_of(tmp_path: Path, tree: object, precision: str = "fp16", world_size: int = 2, **engine: object):
    """(settings, problems) of a ds_config.json that holds `tree` (text as it stands)."""
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return deepspeed_settings(EngineConfig(ds_config=str(path), **engine), OPTIM, BATCH, precision, world_size)


def zero(**more: object) -> dict[str, object]:
    return {"zero_optimization": {"overlap_comm": True}, **more}


def test_what_the_config_determines_is_filled_in(tmp_path):
    settings, problems = settings_of(tmp_path, zero(), initial_loss_scale=1024.0, loss_scale_window=7)
    assert problems == []
    assert settings["train_batch_size"] == 32
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 4  # 32 = 4 × 4 × 2 ranks
    assert settings["gradient_clipping"] == 1.0
    fp16 = settings["fp16"]
    assert (fp16["enabled"], fp16["initial_scale_power"], fp16["loss_scale_window"]) == (True, 10, 7)
    assert settings["bf16"] == {"enabled": False, "check_grad_overflow": True}
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}


@pytest.mark.parametrize(("precision", "fp16", "bf16"), [("fp32", 0, 0), ("bf16", 0, 1), ("fp16", 1, 0)])
def test_precision_switches_exactly_one_of_deepspeeds_sections_on(tmp_path, precision, fp16, bf16):
    settings, _ = settings_of(tmp_path, zero(), precision)
    assert (settings["fp16"]["enabled"], settings["bf16"]["enabled"]) == (bool(fp16), bool(bf16))


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"train_batch_size": 64}, "train_batch_size = 64"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps = 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5"),
        ({"fp16": {"enabled": False}}, "enabled = False"),
        ({"fp16": {"loss_scale_window": 1}}, "loss_scale_window = 1"),
        ({"bf16": {"enabled": True}}, "enabled = True"),
        ({"fp16": True}, "fp16 = True"),
    ],
)
def test_a_contradiction_names_the_key_and_the_file(tmp_path, tree, named):
    _, problems = settings_of(tmp_path, zero(**tree))
    assert len(problems) == 1
    assert named in problems[0] and "ds.json" in problems[0] and "delete it there" in problems[0]


def test_every_contradiction_is_reported_at_once(tmp_path):
    _, problems = settings_of(tmp_path, zero(train_batch_size=1, gradient_clipping=9.0, optimizer={"type": "Adam"}))
    assert len(problems) == 3


def test_auto_and_the_same_value_are_no_contradiction(tmp_path):
    tree = zero(train_batch_size="auto", gradient_clipping=1, fp16={"enabled": "auto"}, bf16={"enabled": False})
    settings, problems = settings_of(tmp_path, tree)
    assert problems == []
    assert settings["train_batch_size"] == 32 and settings["fp16"]["enabled"] is True


def test_what_only_deepspeed_knows_of_a_shared_section_is_kept(tmp_path):
    settings, problems = settings_of(tmp_path, zero(bf16={"enabled": "auto", "bf16_master_weights_and_grads": False}))
    assert problems == []
    assert settings["bf16"]["bf16_master_weights_and_grads"] is False
    assert settings["bf16"]["check_grad_overflow"] is True


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_is_the_configs_and_a_file_may_only_agree(tmp_path, stage):
    for tree in ({}, {"zero_optimization": {"stage": stage}}):
        settings, problems = settings_of(tmp_path, tree, zero_stage=stage)
        assert problems == [] and settings["zero_optimization"]["stage"] == stage
    _, problems = settings_of(tmp_path, {"zero_optimization": {"stage": 3 - stage}}, zero_stage=stage)
    assert len(problems) == 1 and f"stage = {3 - stage}, but the config gives {stage}" in problems[0]


@pytest.mark.parametrize("tree", [{"zero_optimization": True}, {"zero_optimization": 2}])
def test_a_zero_section_that_is_no_object_is_refused(tmp_path, tree):
    _, problems = settings_of(tmp_path, tree)
    assert len(problems) == 1 and "zero_optimization = " in problems[0]


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_sections_that_the_config_owns_are_refused(tmp_path, section):
    _, problems = settings_of(tmp_path, zero(**{section: {"type": "Any"}}))
    assert len(problems) == 1 and f"{section!r}" in problems[0] and "optim section" in problems[0]


@pytest.mark.parametrize("text", ["{", "", '{"zero_optimization": }', "[1, 2]", "3"])
def test_a_file_that_is_no_json_object_is_one_problem(tmp_path, text):
    _, problems = settings_of(tmp_path, text)
    assert len(problems) == 1 and "ds.json" in problems[0]


def test_a_file_that_is_not_text_is_one_problem(tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xff\xfe\x00{")
    _, problems = deepspeed_settings(EngineConfig(ds_config=str(path)), OPTIM, BATCH, "fp32", 1)
    assert len(problems) == 1 and "ds.json" in problems[0]


def test_a_missing_file_is_one_problem():
    _, problems = deepspeed_settings(EngineConfig(ds_config="/nowhere/ds.json"), OPTIM, BATCH, "fp32", 1)
    assert len(problems) == 1 and "/nowhere/ds.json" in problems[0] and "No such file" in problems[0]


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_file_fits_every_shipped_config(config, world_size):
    batch = yaml.safe_load(config.read_text(encoding="utf-8"))["batch"]
    fits = str(min(batch["micro_size"], batch["global_size"] // world_size))
    arguments = ["--config", str(config), "--data", "somewhere", "--batch.micro_size", fits, "--optim.name", "adamw"]
    parsed = parse([*arguments, "--engine", "deepspeed"], world_size).config
    assert parsed.engine.ds_config == "" and SHIPPED.is_file()
    _, problems = deepspeed_settings(parsed.engine, parsed.optim, parsed.batch, parsed.train.precision, world_size)
    assert problems == []


@pytest.mark.parametrize(
    ("key", "mend"), [("offload_optimizer", "engine.offload_optimizer"), ("offload_param", "delete")]
)
def test_offloading_in_the_file_is_refused_by_name(tmp_path, key, mend):
    _, problems = settings_of(tmp_path, {"zero_optimization": {key: {"device": "cpu"}}})
    assert len(problems) == 1 and f"asks for {key}" in problems[0] and mend in problems[0]


def test_offloading_is_asked_for_in_the_config_and_its_details_in_the_file(tmp_path):
    tree = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    settings, problems = settings_of(tmp_path, tree, offload_optimizer=True)
    assert problems == []
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "ratio": 0.5, "pin_memory": True}
    assert settings["zero_force_ds_cpu_optimizer"] is False
    tree["zero_optimization"]["offload_optimizer"]["device"] = "nvme"
    assert "device = nvme" in settings_of(tmp_path, tree, offload_optimizer=True)[1][0]


def test_offloading_without_zero_is_refused(tmp_path):
    _, problems = settings_of(tmp_path, {}, zero_stage=0, offload_optimizer=True)
    assert problems == ["engine.offload_optimizer needs ZeRO: set engine.zero_stage to 1, 2 or 3"]
