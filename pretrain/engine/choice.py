"""What can be known of an engine before it is built, without torch: whether it can run so, and what its traffic is."""

from __future__ import annotations

from pretrain.config import EngineConfig


def engine_problems(engine: EngineConfig, world_size: int) -> list[str]:
    """Why the engine can't run on so many ranks."""
    if engine.name == "single" and world_size > 1:
        what = f"engine.name is single, but there are {world_size} ranks"
        return [f"{what}: choose --engine ddp, fsdp or deepspeed, or start one process"]
    return []


def traffic(engine: EngineConfig, accumulation: int, world_size: int) -> str:
    """How often a step reduces gradients and gathers weights, in one line; '' on one rank, where nothing travels.

    Args:
        accumulation: micro-batches in a step of one rank.
    """
    if world_size == 1:
        return ""
    if engine.name == "deepspeed":
        return _traffic_of_zero(engine.zero_stage, accumulation)
    if engine.name == "fsdp":
        return _traffic_of_fsdp(engine.fsdp_reduce == "step", accumulation)
    return f"{engine.name} reduces gradients once a step, while the last of {_passes(accumulation)} still runs"


def _traffic_of_zero(stage: int, accumulation: int) -> str:
    if stage < 2:
        return f"ZeRO-{stage} reduces gradients once a step, behind {_passes(accumulation)}"
    gathers = f", and gathers the weights {2 * accumulation} times" if stage == 3 else ""
    if accumulation == 1:
        return f"ZeRO-{stage} reduces gradients once a step, there being one micro-batch{gathers}"
    return (
        f"ZeRO-{stage} reduces at every micro-step{gathers}: accumulation {accumulation} moves {accumulation} × the "
        "gradients; ZeRO-1 would move them once, and keep them whole until then"
    )


def _traffic_of_fsdp(at_the_end: bool, accumulation: int) -> str:
    gathers = f"gathers the weights {2 * accumulation} times a step"
    if accumulation == 1:
        return f"FSDP reduces gradients once a step, there being one micro-batch, and {gathers}"
    if at_the_end:
        return f"FSDP reduces gradients once a step, keeps them whole in fp32 until then, and {gathers}"
    return (
        f"FSDP reduces at every micro-step and {gathers}: accumulation {accumulation} moves {accumulation} × the "
        "gradients; engine.fsdp_reduce step would move them once, and keep them whole until then"
    )


def _passes(accumulation: int) -> str:
    return "one micro-batch" if accumulation == 1 else f"{accumulation} micro-batches"
