"""The optimizer's settings, what it remembers of each parameter, and what is wrong with them. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.model_config import ModelConfig, parameter_shapes

FP32_BYTES = 4
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the blocks' matrices, and AdamW for embeddings, head, norms and biases. With every
    engine but deepspeed."""
    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The learning rate ends at this fraction of its peak."""
    warmup_steps: int = 2000
    """Optimizer steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up; wsd: stable at its peak, then a cool-down."""
    cooldown_fraction: float = 0.2
    """Part of all steps that wsd's cool-down takes, in (0, 1]."""
    cooldown: Literal["sqrt", "linear"] = "sqrt"
    """Form of wsd's cool-down: 1 - sqrt, which falls fast and then slowly, or a line."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_lr: float = 0.0
    """Muon's peak learning rate, on AdamW's scale: an update as large as AdamW's usually is. 0: that of lr."""
    muon_momentum: float = 0.95
    """Muon's decay rate of its momentum, which is Nesterov's."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def moments(self, name: str, n_dims: int) -> tuple[str, ...]:
        """What the optimizer remembers of a parameter, each fp32 and of its shape.

        Args:
            name: canonical.
            n_dims: of its whole shape.
        """
        return MUON_MOMENTS if self.name == "muon" and n_dims == 2 and name.startswith("blocks.") else ADAM_MOMENTS


def moments_bytes(optim: OptimConfig, model: ModelConfig) -> int:
    """Bytes of all that the optimizer remembers of a resolved shape."""
    return FP32_BYTES * sum(size * n_moments for size, n_moments in _sizes(optim, model))


def largest_state_bytes(optim: OptimConfig, model: ModelConfig) -> int:
    """Bytes of the named full fp32 tensors of one parameter, the weight and its moments, where they are the most."""
    return FP32_BYTES * max(size * (1 + n_moments) for size, n_moments in _sizes(optim, model))


def _sizes(optim: OptimConfig, model: ModelConfig) -> list[tuple[int, int]]:
    """(its elements, how many moments it has) of each parameter."""
    return [(math.prod(shape), len(optim.moments(name, len(shape)))) for name, shape in parameter_shapes(model)]


def newton_schulz_bytes(optim: OptimConfig, model: ModelConfig) -> int:
    """Bytes in which Muon makes one matrix orthogonal: it in fp32, twice in bf16, its Gram matrix twice; 0 of AdamW."""
    shapes = [shape for name, shape in parameter_shapes(model) if optim.moments(name, len(shape)) == MUON_MOMENTS]
    return max((8 * math.prod(shape) + 4 * min(shape) ** 2 for shape in shapes), default=0)


def optim_problems(optim: OptimConfig, engine: str) -> list[str]:
    """What can't be, each with its mend.

    Args:
        engine: a value of `engine.name`.
    """
    o, default = optim, OptimConfig()
    rules = [
        (o.lr <= 0, f"optim.lr {o.lr} must be positive"),
        (not 0 <= o.min_lr_ratio <= 1, f"optim.min_lr_ratio {o.min_lr_ratio} must be in [0, 1]"),
        (o.warmup_steps < 0, f"optim.warmup_steps {o.warmup_steps} must not be negative"),
        (not 0 < o.cooldown_fraction <= 1, f"optim.cooldown_fraction {o.cooldown_fraction} must be in (0, 1]"),
        *(
            (
                o.schedule != "wsd" and getattr(o, name) != getattr(default, name),
                f"optim.{name} {getattr(o, name)} means nothing to {o.schedule}: it is of --optim.schedule wsd",
            )
            for name in ("cooldown_fraction", "cooldown")
        ),
        (not all(0 <= b < 1 for b in o.betas), f"optim.betas {o.betas} must be in [0, 1)"),
        (o.weight_decay < 0, f"optim.weight_decay {o.weight_decay} must not be negative"),
        (o.clip < 0, f"optim.clip {o.clip} must not be negative"),
        (o.muon_lr < 0, f"optim.muon_lr {o.muon_lr} must be positive, or 0 for that of optim.lr"),
        (not 0 <= o.muon_momentum < 1, f"optim.muon_momentum {o.muon_momentum} must be in [0, 1)"),
        *(
            (
                o.name != "muon" and getattr(o, name) != getattr(default, name),
                f"optim.{name} {getattr(o, name)} means nothing to {o.name}: it is of --optim.name muon",
            )
            for name in ("muon_lr", "muon_momentum")
        ),
        (
            o.name == "muon" and engine == "deepspeed",
            "optim.name is muon, which engine.name deepspeed does not train with (its own Muon clips the update and "
            "not the gradient): choose --engine native, single, ddp or fsdp",
        ),
    ]
    return [problem for broken, problem in rules if broken]
