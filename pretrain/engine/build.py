"""Which engine runs this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pretrain import log
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine.base import Engine
from pretrain.engine.choice import engine_problems, traffic
from pretrain.engine.ds_settings import deepspeed_settings
from pretrain.engine.lean import import_deepspeed, leave_compiler_out
from pretrain.engine.native import NativeEngine
from pretrain.errors import ConfigError
from pretrain.ranks import Ranks
from pretrain.startup import START

logger = log.get(__name__)


def build_engine(
    model: nn.Module,
    engine: EngineConfig,
    optim: OptimConfig,
    batch: BatchConfig,
    precision: str,
    device: torch.device,
    ranks: Ranks,
) -> Engine:
    """The engine that `engine.name` asks for, or the native one where DeepSpeed can't run on this CPU, said aloud.

    Raises:
        ConfigError: DeepSpeed is asked for and not installed, ds_config.json contradicts the config, or the engine
            can't run on these ranks.
    """
    if problems := engine_problems(engine, ranks.world_size):
        raise ConfigError(problems)
    leave_compiler_out()
    built = _build(model, engine, optim, batch, precision, device, ranks)
    name: Any = built.name  # that of the engine which stands in for DeepSpeed, too
    paid = traffic(replace(engine, name=name), batch.accumulation(ranks.world_size), ranks.world_size)
    if ranks.is_first and paid:
        logger.info("%s", paid)
    return built


def _build(
    model: nn.Module,
    engine: EngineConfig,
    optim: OptimConfig,
    batch: BatchConfig,
    precision: str,
    device: torch.device,
    ranks: Ranks,
) -> Engine:
    if engine.name == "deepspeed":
        settings, problems = deepspeed_settings(engine, optim, batch, precision, ranks.world_size)
        if problems:
            raise ConfigError(problems)
        if _deepspeed_can_run(device, ranks):
            from pretrain.engine.zero import ZeroEngine

            return ZeroEngine(model, settings, optim, device)
    if engine.name == "fsdp":
        from pretrain.engine.fsdp import FsdpEngine

        return FsdpEngine(model, optim, engine, precision, device, ranks)
    return NativeEngine(model, optim, engine, precision, device, ranks.world_size)


def _deepspeed_can_run(device: torch.device, ranks: Ranks) -> bool:
    """Whether every rank can; the reason where not is logged, and all ranks decide alike."""
    from pretrain.engine import zero

    zero.prepare_import(device)
    try:
        import_deepspeed()
    except ImportError as error:
        mend = "run bash setup_env.sh, or choose --engine native"
        raise ConfigError(f"engine.name is deepspeed, but it can't be imported: {error}", mend) from error
    START.ended("deepspeed")
    problem = zero.cpu_op_problem() if device.type == "cpu" else ""
    START.ended("deepspeed's op")
    if not ranks.any(bool(problem)):
        return True
    if ranks.is_first:
        reason = problem or "another rank can't build it"
        logger.warning(
            "DeepSpeed's CPU op can't be built here (%s): going on with the native engine. "
            "It trains and checkpoints alike; install a C++ compiler to use DeepSpeed.",
            reason,
        )
    return False
