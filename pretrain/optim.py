"""Parameter groups, AdamW, the learning rate's course, and the dynamic loss scale of fp16."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig

MIN_LOSS_SCALE = 1.0
MAX_LOSS_SCALE = 2.0**24


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices, which decay, and vectors (biases, norms), which don't.

    Source: GPT-3 (arXiv 2005.14165) decays by 0.1; that vectors are spared is the practice of nanoGPT and others.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in named:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a parameter empty, and notes its shape
        (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the groups, in torch's fused form, which CPU and CUDA both have."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(optimizer_step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of the update after `optimizer_step` earlier ones.

    Linear warm-up over `warmup_steps`, then by `schedule` down to `min_lr_ratio` of the peak at `total_steps`, then
    constant. Skipped updates are not counted, so they don't move the schedule.
    """
    if optimizer_step < config.warmup_steps:
        return config.lr * (optimizer_step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (optimizer_step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    course = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * course)


@dataclass
class LossScale:
    """Dynamic loss scale (arXiv 1710.03740, section 3.2): halve on overflow, double after `window` finite steps."""

    scale: float
    window: int
    finite_steps: int = 0

    def update(self, finite: bool) -> None:
        """Learn from one step whether its unscaled gradients were finite."""
        if not finite:
            self.scale = max(MIN_LOSS_SCALE, self.scale / 2)
            self.finite_steps = 0
            return
        self.finite_steps += 1
        if self.finite_steps == self.window:
            self.scale = min(MAX_LOSS_SCALE, self.scale * 2)
            self.finite_steps = 0

    def restore(self, scale: float, finite_steps: int) -> None:
        """Go on from a checkpoint; one of another precision has no scale, it says 0, and the first one stays."""
        if scale:
            self.scale, self.finite_steps = scale, finite_steps
