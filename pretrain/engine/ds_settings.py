"""DeepSpeed's configuration: ds_config.json for what only DeepSpeed needs to know, the rest from our own config.

A ds_config.json that says something else than the config is refused, so that no value has two owners. No torch here:
the problems are reported before it is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.config import BatchConfig, EngineConfig, OptimConfig

SHIPPED = Path(__file__).resolve().parents[2] / "ds_config.json"
OWNED_BY_OPTIM = ("optimizer", "scheduler")  # built in optim.py, so that every engine has the same ones
CPU_OFFLOAD = {"device": "cpu", "pin_memory": True}


def derived_settings(
    engine: EngineConfig, optim: OptimConfig, batch: BatchConfig, precision: str, world_size: int
) -> dict[str, Any]:
    """What the config determines of DeepSpeed's configuration."""
    fp16 = {
        "enabled": precision == "fp16",
        "loss_scale": 0,
        "initial_scale_power": max(0, int(engine.initial_loss_scale).bit_length() - 1),
        "loss_scale_window": engine.loss_scale_window,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = CPU_OFFLOAD
    return {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.accumulation(world_size),
        "gradient_clipping": optim.clip,
        "fp16": fp16,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": zero,
        # torch's AdamW updates on the host as well; DeepSpeed's own would need a compiler, and differ from it
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,  # our own log speaks
    }


def deepspeed_settings(
    engine: EngineConfig, optim: OptimConfig, batch: BatchConfig, precision: str, world_size: int
) -> tuple[dict[str, Any], list[str]]:
    """(the dict for deepspeed.initialize, problems of ds_config.json)."""
    path = Path(engine.ds_config) if engine.ds_config else SHIPPED
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [f"engine.ds_config {path} can't be read: {error.strerror}"]
    except ValueError as error:  # neither text nor JSON
        return {}, [f"engine.ds_config {path} is not valid JSON: {error}"]
    if not isinstance(settings, dict):
        return {}, [f"engine.ds_config {path} must hold an object, found {type(settings).__name__}"]
    problems = [
        f"{path} sets {key!r}, which belongs to the optim section: delete it there"
        for key in OWNED_BY_OPTIM
        if key in settings
    ]
    problems += _offload_problems(settings.get("zero_optimization"), engine, str(path))
    derived = derived_settings(engine, optim, batch, precision, world_size)
    problems += _contradictions(settings, derived, str(path))
    return _merged(settings, derived), problems


def _offload_problems(zero: Any, engine: EngineConfig, where: str) -> list[str]:
    """What of ZeRO's offloading can't be."""
    problems = []
    if engine.offload_optimizer and engine.zero_stage == 0:
        problems.append("engine.offload_optimizer needs ZeRO: set engine.zero_stage to 1, 2 or 3")
    if not isinstance(zero, dict):
        return problems
    if "offload_param" in zero:
        problems.append(f"{where} asks for offload_param, which this engine does not run: delete it there")
    if "offload_optimizer" in zero and not engine.offload_optimizer:
        problems.append(f"{where} asks for offload_optimizer: delete it there, and set engine.offload_optimizer")
    return problems


def _merged(settings: dict[str, Any], derived: dict[str, Any]) -> dict[str, Any]:
    """The file's settings under the derived ones, section by section: what only the file says of a section stays."""
    merged = {**settings, **derived}
    for key, section in derived.items():
        if isinstance(section, dict) and isinstance(settings.get(key), dict):
            merged[key] = _merged(settings[key], section)
    return merged


def _contradictions(settings: dict[str, Any], derived: dict[str, Any], where: str) -> list[str]:
    """Keys of the file whose value is not the one that the config determines."""
    problems = []
    for key, value in derived.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            problems += _contradictions(settings[key], value, f"{where}: {key}")
        elif key in settings and settings[key] not in (value, "auto"):
            problems.append(f"{where} says {key} = {settings[key]}, but the config gives {value}: delete it there")
    return problems
